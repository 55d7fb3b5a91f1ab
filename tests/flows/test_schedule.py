import asyncio

import pytest


@pytest.mark.usefixtures("prefect_server")
def test_a_schedule_becomes_runs():
    """Prefect's scheduler, as it is with the installed versions of what it is built on; its tests' server has none.

    With SQLAlchemy 2.1 it fails at every turn, and says so in the server's log only.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.schedules import Cron
    from prefect.server.services.scheduler import schedule_deployments

    from flows.pipeline import run_flow

    deployment = run_flow.to_deployment("scheduled", schedule=Cron("0 3 * * *", timezone="Europe/Berlin")).apply()
    asyncio.run(schedule_deployments())
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id={"any_": [deployment]}))
        client.delete_deployment(deployment)
    assert len(runs) >= 3
    assert {run.expected_start_time.astimezone().minute for run in runs} == {0}
