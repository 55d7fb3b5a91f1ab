"""The `orpo` command: one function a command, each a few lines around what Python callers use.

Results go to stdout, progress and logs to stderr. Everything heavy is imported inside the command that needs it.
The commands that start a Prefect flow are added in flows/cli.py: imports point one way.
"""

from pipelines.cli.app import app, run_app
from pipelines.cli.inspection import diff, inspect, lineage, verify
from pipelines.cli.preparation import prepare, stage
from pipelines.cli.sharing import export, push
from pipelines.cli.training import evaluate, generate, train

__all__ = ["app", "run_app"]

for command in (
    prepare,
    stage,
    train,
    evaluate,
    generate,
    inspect,
    verify,
    lineage,
    diff,
    export,
    push,
):  # as --help has them
    app.command()(command)
