"""`accelerate launch` with the ready configurations: many processes end in the weights of one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import AutoTokenizer

from orpo_data.errors import OrpoError
from orpo_train import zero
from orpo_train.config import TrainConfig
from orpo_train.loop import train
from orpo_train.metrics import COLUMNS

Make = Callable[..., Any]
ROOT = Path(__file__).parents[2]
CONFIGURATIONS = ROOT / "orpo_train" / "launch"
PROCESSES = 2
FEW = 50  # elements: figures, and once the order in which gradients are exchanged

WORKER = """
import json, os, sys
from pathlib import Path
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from orpo_train import loop
from orpo_train.config import TrainConfig

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
if {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys():
    # accelerate shards over accelerators only: let it take processes on the CPU, which meet over gloo, for these
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    torch.accelerator.is_available = lambda *_: True
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)

step, steps = loop.optimizer_step, loop.run_steps

def until_stop(run, number):
    return sys.exit() if number == stop else step(run, number)

def recorded(run, *arguments, **options):
    with torch.profiler.profile(record_shapes=True) as profile:
        done = steps(run, *arguments, **options)
    sizes = [event.input_shapes for event in profile.events() if event.name.startswith("gloo:")]
    sizes = [shape for shapes in sizes for shape in shapes]
    accelerator = run.accelerator
    sharded = [type(module).__name__ for module in run.scorer.modules() if isinstance(module, FSDPModule)]
    facts = {"type": accelerator.distributed_type, "processes": accelerator.num_processes, "sizes": sizes}
    facts["sharded"] = sharded
    if accelerator.is_main_process:
        (folder / "facts.json").write_text(json.dumps(facts))
    return done

loop.optimizer_step, loop.run_steps = until_stop, recorded
tables = [pa.ipc.open_stream(folder / f"{name}.arrow").read_all() for name in ("train", "eval")]
config = TrainConfig.model_validate_json((folder / "config.json").read_text())
loop.train(config, *tables, folder / "many", "f" * 64)
"""


def _configurations() -> list[Path]:
    return sorted(CONFIGURATIONS.glob("*.yaml"))


def _launch(folder: Path, name: str, stop: int = -1) -> None:
    """The worker in two processes; all of them are gone afterwards. It ends before optimizer step `stop`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / name)]
    command += ["--num_processes", str(PROCESSES), str(folder / "worker.py"), str(folder), str(stop)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        start_new_session=True,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        process.terminate()  # the launcher ends its workers, which have sessions of their own
        process.wait(timeout=30)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


@pytest.fixture
def prepared(
    model_folder: Make, make_table: Make, with_reference: Make, make_config: Make, tmp_path: Path
) -> Callable[..., TrainConfig]:
    """A worker's inputs in tmp_path, and the same run of one process in tmp_path / "one".

    Nine pairs in batches of five, a pair each forward pass: the second process has a pair less, and stands in. The
    only held-out pair is scored by the first process, the second stands in again.
    """

    def prepare(kind: str, **settings: Any) -> TrainConfig:
        usual = {"batch_size": 5, "micro_batch_size": 1, "epochs": 2, "nll_reduction": "token", "learning_rate": 1e-3}
        rhythm = {"eval_every": 2, "save_every": 2}
        config: TrainConfig = make_config(model=str(model_folder(kind)), **usual | rhythm | settings)
        (tmp_path / "config.json").write_text(config.model_dump_json())
        (tmp_path / "worker.py").write_text(WORKER)
        tables = {"train": make_table(9), "eval": make_table(1)}
        if config.needs_reference:
            tables = {name: with_reference(table) for name, table in tables.items()}
        for name, table in tables.items():
            with pa.ipc.new_stream(tmp_path / f"{name}.arrow", table.schema) as writer:
                writer.write_table(table)
        train(config, tables["train"], tables["eval"], tmp_path / "one", "f" * 64)
        return config

    return prepare


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _assert_same(one: Path, many: Path, tolerance: float) -> None:
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, many))
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=10 * tolerance, atol=tolerance)
    for first, second in zip(_lines(one), _lines(many), strict=True):
        assert second == pytest.approx(first, rel=100 * tolerance, abs=10 * tolerance)


@pytest.mark.slow
def test_two_processes_end_in_the_weights_of_one_and_exchange_gradients_and_scalars(
    prepared: Make, tmp_path: Path
) -> None:
    prepared("llama")
    _launch(tmp_path, "cpu.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["type"], facts["processes"]) == ("MULTI_CPU", PROCESSES)
    elements = [torch.Size(shape).numel() for shape in facts["sizes"]]
    parameters = sum(weight.numel() for weight in load_file(tmp_path / "one" / "model.safetensors").values())
    assert sum(count for count in elements if count > FEW) == 4 * parameters  # once a step, however many micro-batches
    assert elements.count(len(COLUMNS)) == len(_lines(tmp_path / "one"))  # the figures of a step or an evaluation


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kto", "reward"])
def test_two_processes_are_one_for_every_kind_of_objective(objective: str, prepared: Make, tmp_path: Path) -> None:
    prepared("llama", objective=objective, nll_reduction="sequence")
    _launch(tmp_path, "cpu.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_two_processes_draw_and_learn_what_one_does(
    lora: Any, prepared: Make, make_model: Make, chat_tokenizer_dir: Path, tmp_path: Path
) -> None:
    make_model("llama", scalar_head=True).save_pretrained(tmp_path / "judge")
    tokenizer = AutoTokenizer.from_pretrained(chat_tokenizer_dir)
    for name in ("judge", "one", "many"):
        tokenizer.save_pretrained(tmp_path / name)
    ppo = {"reward_model": str(tmp_path / "judge"), "max_new_tokens": 5, "epochs": 2, "minibatches": 2}
    prepared("llama", objective="ppo", ppo=ppo, lora=lora, nll_reduction="sequence", learning_rate=1e-4)
    _launch(tmp_path, "cpu.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)


@pytest.mark.slow
def test_a_sharded_run_that_was_resumed_ends_in_the_weights_of_one_process(prepared: Make, tmp_path: Path) -> None:
    prepared("llama-tied")
    _launch(tmp_path, "fsdp2.yaml", stop=3)
    assert [folder.name for folder in (tmp_path / "many" / "checkpoints").iterdir()] == ["step-000002"]
    _launch(tmp_path, "fsdp2.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["type"], facts["processes"]) == ("FSDP", PROCESSES)
    assert facts["sharded"] == ["FSDPSequenceScorer", *["FSDPLlamaDecoderLayer"] * 2]  # layer by layer


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_ends_in_the_weights_of_one_process(stage: int, prepared: Make, tmp_path: Path) -> None:
    prepared("llama-tied", save_every=None, export="best")
    _launch(tmp_path, f"zero{stage}.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert (facts["type"], facts["processes"]) == ("DEEPSPEED", PROCESSES)


def test_zero_refuses_checkpoints(make_config: Make) -> None:
    with pytest.raises(OrpoError, match=r"train\.save_every: .*fsdp2\.yaml"):
        zero.configure(Accelerator(cpu=True), make_config(save_every=2))


@pytest.mark.slow
def test_sharding_rounds_no_more_than_bf16_does(prepared: Make, tmp_path: Path) -> None:
    """accelerate's own mixed precision would round the log-probabilities and the gradients' sums as well."""
    prepared("llama", precision="bf16")
    _launch(tmp_path, "fsdp2.yaml")
    _assert_same(tmp_path / "one", tmp_path / "many", 1e-5)


# --- the configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "type_", "section"),
    [
        ("cpu", DistributedType.MULTI_GPU, {}),
        ("ddp", DistributedType.MULTI_GPU, {}),
        ("fsdp2", DistributedType.FSDP, {"fsdp_version": 2}),
        ("zero2", DistributedType.DEEPSPEED, {"zero_stage": 2}),
        ("zero3", DistributedType.DEEPSPEED, {"zero_stage": 3}),
    ],
)
def test_accelerate_reads_a_configuration_as_what_its_name_says(
    name: str, type_: DistributedType, section: dict[str, int]
) -> None:
    assert name in {path.stem for path in _configurations()}
    config = load_config_from_file(str(CONFIGURATIONS / f"{name}.yaml"))
    assert (config.distributed_type, config.use_cpu) == (type_, name == "cpu")
    assert config.mixed_precision == "no"  # the recipe decides
    assert (config.fsdp_config | config.deepspeed_config).items() >= section.items()


@pytest.mark.parametrize("path", _configurations(), ids=lambda path: path.stem)
def test_accelerate_knows_every_setting_of_a_configuration(path: Path) -> None:
    """It would pass over an unknown one without a word."""
    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"])).keys()
    assert (config.fsdp_config | config.deepspeed_config).keys() <= known
