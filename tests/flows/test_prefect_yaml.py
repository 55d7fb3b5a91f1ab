from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def test_there_is_one_for_the_data_and_one_for_the_whole_run():
    entrypoints = [deployment["entrypoint"] for deployment in DEPLOYMENTS]
    assert entrypoints == ["flows/pipeline.py:prepare_flow", "flows/pipeline.py:run_flow"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_can_be_run(deployment, monkeypatch):
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.flows import load_flow_from_entrypoint

    monkeypatch.chdir(ROOT)
    load_flow_from_entrypoint(deployment["entrypoint"]).validate_parameters(deployment["parameters"])
    [schedule] = deployment["schedules"]
    assert schedule.pop("active") is False, "an example does not start by itself"
    CronSchedule(**schedule)
