import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from flows import cli
from orpo_data.errors import OrpoError, UsageError

ROOT = Path(__file__).parents[2]


def orpo(*arguments, **environment):
    """The command in a process of its own, without what the user has set for Prefect."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    environment = own | {"PYTHONPATH": str(ROOT)} | environment
    code = "from flows.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def call(*arguments):
    """The command in this process; what it raises is raised."""
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.fixture
def served(monkeypatch):
    """What `orpo serve` hands to Prefect, with a server that always answers."""
    from contextlib import nullcontext

    from flows.pipeline import run_flow

    calls = []
    monkeypatch.setattr(cli, "_server", nullcontext)
    monkeypatch.setattr(type(run_flow), "serve", lambda self, **arguments: calls.append((self.name, arguments)))
    return calls


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from flows.cli import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0; "
        "print(sorted({'prefect', 'torch', 'transformers', 'datasets', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_analytics_are_off_unless_the_user_chose():
    code = "import os, flows; print(os.environ['DO_NOT_TRACK'], os.environ['PREFECT_SERVER_ANALYTICS_ENABLED'])"
    free = {name: value for name, value in os.environ.items() if name != "DO_NOT_TRACK" and "PREFECT" not in name}
    for chosen, expected in (({}, "1 false"), ({"DO_NOT_TRACK": "0"}, "0 false")):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=free | chosen)
        assert done.stdout.strip() == expected


def test_a_wrong_recipe_is_told_before_prefect_starts():
    done = orpo("run", "no-such-recipe")
    assert done.returncode == 2
    assert done.stderr.startswith("orpo: no recipe file 'no-such-recipe'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["run"], ["compare"], ["serve", "--cron", "0 3 * * *"]])
@pytest.mark.parametrize(
    ("option", "value", "key"),
    [
        ("--set", "sources.0.path=https://planted@host/a.jsonl", "sources.0.path"),
        ("--set", "sources.0={dataset: hh-rlhf, path: 's3://bucket/a.jsonl?sig=planted'}", "sources.0"),
        ("--set", "sources=[{path: 'https://u:planted@host/a.jsonl'}]", "sources"),
        ("--address", "tcp://u:planted@host:8786", "runner.address"),
    ],
)
def test_a_secret_is_refused_before_prefect_keeps_it(recipe_file, served, command, option, value, key):
    if command[0] == "serve" and option != "--set":
        return
    with pytest.raises(UsageError, match=f"--set {key}: Prefect would keep the user, password or query") as told:
        call(command[0], recipe_file(), *command[1:], option, value)
    assert "planted" not in str(told.value)
    assert served == []


@pytest.mark.parametrize(("cron", "timezone"), [("0 3 * *", "UTC"), ("daily at three", "UTC"), ("0 3 * * *", "Mars/X")])
def test_a_wrong_schedule_is_wrong_usage(recipe_file, served, cron, timezone):
    with pytest.raises(UsageError, match="not a cron expression"):
        call("serve", recipe_file(), "--cron", cron, "--timezone", timezone)
    assert served == []


def test_serve_hands_the_schedule_and_absolute_paths_to_prefect(recipe_file, served, tmp_path, monkeypatch):
    from flows.pipeline import run_flow

    recipe = recipe_file()
    monkeypatch.chdir(Path(recipe).parent)
    call("serve", "recipe.yaml", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", "--set", "clean.ties=keep")
    [(flow_name, arguments)] = served
    assert flow_name == "orpo-run"
    assert arguments["pause_on_shutdown"] is False
    assert arguments["parameters"] == {
        "recipe": str(Path(recipe).resolve()),
        "overrides": ["clean.ties=keep"],
        "output": str(Path(recipe).parent.resolve() / "runs" / "test"),
    }
    del arguments["pause_on_shutdown"]
    deployment = run_flow.to_deployment(**arguments)
    assert deployment.entrypoint == "flows.pipeline.run_flow"
    [schedule] = deployment.schedules
    assert (schedule.schedule.cron, schedule.schedule.timezone) == ("0 3 * * *", "Europe/Berlin")
    run_flow.validate_parameters(deployment.parameters)


def test_serve_says_what_to_start_when_no_server_answers(monkeypatch):
    monkeypatch.setattr(cli, "LOCAL_SERVER", "http://127.0.0.1:1/api")
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(OrpoError, match=r"no Prefect server answers at .*; start one: prefect server start"),
        cli._server(),
    ):
        pass


def test_prefects_own_accounts_stay_off_the_terminal():
    def shown(name, level):
        return cli._is_for_the_terminal(logging.LogRecord(name, level, __file__, 1, "text", None, None))

    assert shown("orpo_data.stage", logging.INFO)
    assert shown("prefect.client", logging.WARNING)
    assert not shown("prefect.client", logging.INFO)
    assert not shown("prefect.flow_runs", logging.ERROR)
    assert not shown("prefect.task_runs", logging.ERROR)


def test_run_shows_stages_figures_and_places(recipe_file, monkeypatch):
    report = {"path": "out/clean", "fingerprint": "f", "content_hash": "c", "ran": True, "why": "", "seconds": 1.0}
    result = {
        "stages": [report | {"stage": "clean", "rows_in": 5, "rows_out": 3, "dropped": {"tie": 2}}],
        "model": report | {"path": "out/model", "metrics": {}},
        "evaluation": report
        | {"path": "out/evaluate", "result": {"pairs": 7, "before": {"nll": 2.5}, "after": {"nll": 2.25}}},
    }
    monkeypatch.setattr(cli, "_run_flow", lambda *arguments: result)
    text = call("run", recipe_file()).stdout
    for expected in ("2 tie", "7 held-out pairs", "2.5000", "-0.2500", "out/model", "out/evaluate/report.html"):
        assert expected in text
    assert json.loads(call("run", recipe_file(), "--json").stdout) == result


def test_samples_are_shown_as_they_are(tmp_path, capsys):
    sample = {"prompt": "Why [bold]?", "chosen": "So.", "before": "no", "after": " yes "}
    (tmp_path / "evaluation.json").write_text(json.dumps({"samples": [sample] * 3}))
    cli._show_samples(tmp_path)
    assert capsys.readouterr().out == "\nprompt: Why [bold]?\nbefore: no\nafter: yes\n" * 2


def test_run_takes_the_cluster_from_its_options(recipe_file, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "_run_flow", lambda recipe, overrides, output: given.append(overrides) or {"stages": []})
    monkeypatch.setattr(cli, "_show", lambda result: None)
    assert (
        call("run", recipe_file(), "--set", "name=x", "--runner", "dask", "--address", "tcp://host:8786").exit_code == 0
    )
    assert call("run", recipe_file()).exit_code == 0
    assert call("run", recipe_file(), "--runner", "spark").exit_code == 2
    assert given == [["name=x", "runner.kind=dask", "runner.address=tcp://host:8786"], []]


@pytest.mark.parametrize(("address", "url"), [(None, ""), ("tcp://host:8786", ""), ("tcp://host:8786", "http://x/api")])
def test_workers_elsewhere_are_not_told_of_a_server_that_only_this_machine_reaches(address, url, monkeypatch, caplog):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import server
    from pipelines.recipe import RunnerConfig

    started = []
    monkeypatch.setattr(server, "start_server_ahead", lambda: started.append(address))
    with temporary_settings({PREFECT_API_URL: url}):
        cli._start_server(SimpleNamespace(runner=RunnerConfig(kind="dask", address=address)))
    assert started == ([None] if address is None else [])
    assert ("PREFECT_API_URL" in caplog.text) == bool(address and not url)


@pytest.mark.slow
def test_run_without_a_server_configured_and_the_line_of_a_failed_one(recipe_file, tmp_path):
    home = str(tmp_path / "home")
    done = orpo("run", recipe_file(), "-o", str(tmp_path / "out"), "--json", PREFECT_HOME=home)
    assert done.returncode == 0, done.stderr
    assert [report["stage"] for report in json.loads(done.stdout)["stages"]][-1] == "tokenize"
    assert "clean: running into" in done.stderr
    assert "prefect" not in done.stderr.lower()

    missing = f"sources.1.path={tmp_path / 'none.jsonl'}"
    failed = orpo("run", recipe_file(), "-o", str(tmp_path / "out2"), "--set", missing, PREFECT_HOME=home)
    assert failed.returncode == 1
    assert failed.stdout == ""
    told = [line for line in failed.stderr.splitlines() if "running" not in line]
    assert len(told) == 1
    assert told[0].startswith("orpo: ")
    assert "none.jsonl: no such file or folder" in told[0]
