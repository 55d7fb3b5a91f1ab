"""The commands of `orpo` that start Prefect flows."""

import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from orpo_data.errors import OrpoError, UsageError
from orpo_data.places import as_path, without_secrets
from pipelines.cli import app, run_app
from pipelines.cli.app import JsonOption, OutputOption, RecipeArgument, SetOption, default_output, read_recipe

if TYPE_CHECKING:
    from prefect.schedules import Schedule

    from pipelines.recipe import Recipe

log = logging.getLogger(__name__)

LOCAL_SERVER = "http://127.0.0.1:4200/api"
SAMPLES_SHOWN = 2

RunnerOption = Annotated[
    Literal["local", "dask", "ray"] | None,
    typer.Option(help="Where parts of the work are done; the same as --set runner.kind=..."),
]
AddressOption = Annotated[
    str | None, typer.Option(help="Scheduler of the Dask or Ray cluster; by default one is started here.")
]


@app.command()
def run(
    recipe: RecipeArgument,
    output: OutputOption = None,
    overrides: SetOption = None,
    runner: RunnerOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline, as the Prefect flow: raw files to an evaluated model."""
    result = _run_flow(recipe, [*(overrides or []), *_runner_overrides(runner, address)], output)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)


@app.command()
def compare(
    recipe: RecipeArgument,
    output: OutputOption = None,
    overrides: SetOption = None,
    runner: RunnerOption = None,
    address: AddressOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train SFT, DPO, PPO and ORPO on one dataset, as the recipe's `compare` section says, and compare them."""
    from pipelines.compare.plan import plan

    chosen = [*(overrides or []), *_runner_overrides(runner, address)]
    settings = _read_recipe(recipe, chosen)
    plan(settings, recipe)  # a wrong section is told before Prefect starts
    signal.signal(signal.SIGTERM, _terminate)
    _start_server(settings)
    from flows.compare import ComparisonError, compare_flow

    _quiet_prefect()
    try:
        result = compare_flow(recipe, chosen, str(output) if output else None)
    except ComparisonError as error:
        _show_comparison(error.result, as_json)
        raise
    _show_comparison(result, as_json)


@app.command()
def quickstart(output: OutputOption = None, as_json: JsonOption = False) -> None:
    """Bundled raw samples to shards, and a real 135M model trained on them and evaluated."""
    from pipelines.quickstart import RECIPE, quickstart_overrides

    result = _run_flow(str(RECIPE), quickstart_overrides(), output)
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)
        _show_samples(as_path(result["evaluation"]["path"]))


@app.command()
def serve(
    recipe: RecipeArgument,
    cron: Annotated[str, typer.Option(help="When to run, e.g. '0 3 * * *'.")],
    timezone: Annotated[str, typer.Option(help="Time zone that `--cron` is read in.")] = "UTC",
    output: OutputOption = None,
    overrides: SetOption = None,
) -> None:
    """Run the whole pipeline on a schedule, until stopped; needs `prefect server start`."""
    settings = _read_recipe(recipe, overrides or [])
    schedule = _schedule(cron, timezone)
    parameters = {
        "recipe": str(Path(recipe).resolve()) if Path(recipe).is_file() else recipe,
        "overrides": overrides or [],
        "output": str((output or default_output(settings)).absolute()),
    }
    from prefect.types.entrypoint import EntrypointType

    from flows.pipeline import run_flow

    with _server():
        run_flow.serve(
            name=settings.name,
            schedule=schedule,
            parameters=parameters,
            pause_on_shutdown=False,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )


def _runner_overrides(runner: str | None, address: str | None) -> list[str]:
    return [f"runner.{key}={value}" for key, value in (("kind", runner), ("address", address)) if value]


def _read_recipe(recipe: str, overrides: list[str]) -> "Recipe":
    """UsageError also for an override with a secret: Prefect keeps what a flow is called with, and shows it."""
    from pipelines.documents import split_override

    for override in overrides:
        key, value = split_override(override)
        if without_secrets(value) != value:
            raise UsageError(
                f"--set {key}: Prefect would keep the user, password or query of its address; put the address into the "
                "recipe file, or set what is secret in the environment"
            )
    return read_recipe(recipe, overrides)


def _run_flow(recipe: str, overrides: list[str], output: Path | None) -> dict[str, Any]:
    settings = _read_recipe(recipe, overrides)  # a wrong recipe is told before Prefect starts
    signal.signal(signal.SIGTERM, _terminate)
    _start_server(settings)
    from flows.pipeline import run_flow

    _quiet_prefect()
    result: dict[str, Any] = run_flow(recipe, overrides, str(output) if output else None)
    return result


def _start_server(settings: "Recipe") -> None:
    """A temporary server is reached from this machine alone, so workers elsewhere must not be told of it."""
    from prefect.settings import PREFECT_API_URL

    from flows.server import start_server_ahead

    if settings.runner.address is None:
        start_server_ahead()
    elif not PREFECT_API_URL.value():
        log.warning("every worker starts a Prefect server of its own: set PREFECT_API_URL to one that all reach")


def _terminate(number: int, frame: object) -> None:
    """End as Ctrl-C does, so that Prefect's ephemeral server is stopped too."""
    sys.exit(128 + number)


def _quiet_prefect() -> None:
    """Keep Prefect's accounts of each run off the terminal unless --verbose; its pages get them all."""
    if logging.getLogger("flows").isEnabledFor(logging.DEBUG):
        return
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_for_the_terminal)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    """A run's failure is raised as well, and told once by the command line."""
    if record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
        return False
    return not record.name.startswith("prefect") or record.levelno >= logging.WARNING


def _schedule(cron: str, timezone: str) -> "Schedule":
    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron

    try:
        CronSchedule(cron=cron, timezone=timezone)
    except ValueError:
        raise UsageError(f"--cron {cron!r} --timezone {timezone!r}: not a cron expression and a time zone") from None
    return Cron(cron, timezone=timezone)


@contextmanager
def _server() -> Iterator[None]:
    """The Prefect server that the user has configured, or else the one on this machine."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = PREFECT_API_URL.value() or LOCAL_SERVER
    with temporary_settings({PREFECT_API_URL: url}):
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is not None:
            raise OrpoError(f"no Prefect server answers at {url}; start one: prefect server start")
        yield


def _show(result: dict[str, Any]) -> None:
    from orpo_data.stage import StageReport
    from pipelines.console import out, print_reports

    print_reports([StageReport(**report | {"path": as_path(report["path"])}) for report in result["stages"]])
    if "model" in result:
        if "evaluation" in result:
            from pipelines.evaluation import evaluation_table

            out.print(evaluation_table(result["evaluation"]["result"]))
        out.print(f"model  {result['model']['path']}", markup=False, soft_wrap=True)
    if "evaluation" in result:
        out.print(f"report {as_path(result['evaluation']['path']) / 'report.html'}", markup=False, soft_wrap=True)


def _show_comparison(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    from pipelines.compare.page import comparison_printed
    from pipelines.console import out

    out.print(comparison_printed(result["comparison"]))
    out.print(f"page   {result['page']}", markup=False, soft_wrap=True)


def _show_samples(evaluation: Path) -> None:
    """Answers to held-out prompts by the model before and after training."""
    from rich.text import Text

    from pipelines.console import out
    from pipelines.evaluation import RESULT_NAME
    from pipelines.printable import printable

    for sample in json.loads((evaluation / RESULT_NAME).read_text())["samples"][:SAMPLES_SHOWN]:
        out.print()
        for name, style in (("prompt", "dim"), ("before", "red"), ("after", "green")):
            out.print(Text(f"{name}: ", "bold").append(printable(str(sample[name]).strip()), style))


def main() -> None:
    run_app(app)
