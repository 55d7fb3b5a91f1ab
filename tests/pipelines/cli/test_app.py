"""What all commands share: quick help, exit codes, one line for wrong arguments."""

import resource
import subprocess
import sys

import pytest


def test_help_answers_within_half_a_second_of_cpu_time(own_process):
    def cpu_seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = own_process("--help")
        assert done.returncode == 0
        assert all(name in done.stdout for name in ("prepare", "stage", "train", "evaluate", "inspect", "verify"))
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    assert min(cpu_seconds() for _ in range(2)) < 0.5


@pytest.mark.parametrize("command", [[], ["prepare"], ["stage"], ["train"], ["run"], ["serve"]])
def test_help_imports_nothing_heavy(own_process, command):
    code = (
        "import atexit, sys\n"
        "heavy = {'torch', 'polars', 'pyarrow', 'transformers', 'prefect', 'datasets', 'accelerate'}\n"
        "atexit.register(lambda: print('imported:', sorted(heavy & set(sys.modules))))\n"
        "from flows.cli import main; main()"
    )
    done = own_process(*command, "--help", code=code)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["prepare", "nowhere.yaml"], 2, "no recipe file 'nowhere.yaml'"),
        (["prepare", "hh-rlhf", "--set", "split.seed"], 2, "write key.path=value"),
        (["stage", "clean", "hh-rlhf", "--input", "nowhere"], 1, "nowhere"),
        (["inspect", "nowhere"], 1, "nowhere"),
        (["verify", "nowhere"], 1, "nowhere"),
        (["lineage", "nowhere"], 1, "nowhere"),
        (["train"], 2, "give a RECIPE, or --dataset DIR and --model M"),
        (["train", "--dataset", "nowhere", "--model", "m", "--set", "train.lamda=1"], 2, "'lambda'"),
        (["train", "--dataset", "nowhere", "--model", "m", "--set", "lambda=1"], 2, "only train.KEY=VALUE"),
        (["train", "--dataset", "nowhere", "--model", "m"], 1, "nowhere"),
        (["evaluate", "nowhere", "--dataset", "elsewhere"], 1, "elsewhere"),
    ],
)
def test_bad_arguments_are_one_line(orpo, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    done = orpo(*arguments)
    assert done.code == code
    assert says in done.err + done.out
    assert (done.err + done.out).count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["stage", "tokenise", "hh-rlhf"], ["prepare"], ["prepare", "hh-rlhf", "--sett", "a=1"], ["cook"]]
)
def test_wrong_usage_is_two(orpo, arguments):
    assert orpo(*arguments).code == 2


def test_the_hubs_library_says_once_what_it_says() -> None:
    program = """
from pipelines.cli.app import setup_logging
setup_logging(False)
from huggingface_hub.utils.logging import get_logger
get_logger("huggingface_hub.anything").warning("Retrying")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.count("Retrying") == 1
