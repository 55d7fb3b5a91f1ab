"""The application, what its commands share, and how it ends: one line and an exit code for what the user can mend."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_data.errors import OrpoError, UsageError
from orpo_data.places import as_path
from pipelines.printable import printable

if TYPE_CHECKING:
    from pipelines.recipe import Recipe

app = typer.Typer(
    name="orpo",
    help="Preference data from raw files to Arrow shards, and ORPO training on them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a ready recipe.", metavar="RECIPE")]
DatasetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET",
        help="A dataset folder, or its URL.",
        parser=as_path,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Where to write, a folder or URL; by default runs/NAME.",
        parser=as_path,
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.lambda=0.5.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.callback()
def setup_logging(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every detail to stderr.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s")
    for name in ("orpo_data", "orpo_train", "pipelines", "flows"):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.getLogger("huggingface_hub").propagate = False  # it writes to stderr itself


def read_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    from pipelines.recipe import Recipe

    return Recipe.read(recipe, overrides or [])


def default_output(recipe: "Recipe") -> Path:
    return Path("runs") / recipe.name


def print_json(value: Any) -> None:
    print(json.dumps(value))


def run_app(application: Any = app) -> None:
    """Run the command line; an error the user can mend is one line and an exit code."""
    try:
        application()
    except UsageError as error:
        _fail(error, 2)
    except (OrpoError, OSError) as error:
        _fail(error, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except _network_errors() as error:
        _fail(error, 1)


def _network_errors() -> tuple[type[Exception], ...]:
    """Asked for only when something was raised: what the clients of storages raise is no OSError."""
    from orpo_data.network import network_errors

    return network_errors()


def _fail(error: object, code: int) -> None:
    typer.secho(printable(f"orpo: {' '.join(str(error).split())}"), err=True, fg="red")
    raise SystemExit(code)
