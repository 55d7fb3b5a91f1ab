"""The training stage: a tokenized dataset and a base model in, a model folder out.

While it runs, the work (with its checkpoints) lies in a hidden folder named after the fingerprint of everything the
weights depend on, so an interrupted run goes on and a changed one starts afresh; the finished folder is moved to its
place whole, with a manifest like any dataset's.
"""

import json
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orpo_data import provenance
from orpo_data.cache import beside
from orpo_data.chat import Chat
from orpo_data.errors import OrpoError
from orpo_data.events import EVENTS_NAME, Recorder
from orpo_data.folders import commit_folder, refuse_foreign_folder
from orpo_data.history import lineage
from orpo_data.locking import writing
from orpo_data.manifest import FORMAT_VERSION, MANIFEST_NAME, Input, Manifest, Shard, digest, read_manifest
from orpo_data.places import file_sha256, remove_folder
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import check_file, list_files, opened_shards, read_table
from orpo_data.stage import dataset_input, refuse_other_stage, why_run
from orpo_data.verification import content_hash
from orpo_train.checkpoint import METRICS_NAME, remove_checkpoints
from orpo_train.config import TrainConfig
from orpo_train.loop import CURVES_NAME, NONFINITE_NAME, NOT_IDENTITY, TRAIN_NAME, train
from orpo_train.run import process_state
from pipelines.checks import check_inputs
from pipelines.model_card import model_card

log = logging.getLogger(__name__)

CODE_VERSION = 3  # raised whenever the same configuration would train other weights
NAMES: Any = {"model": True, "revision": True, "ppo": {"reward_model"}}
"""Settings that say where a model is: what it is, its fingerprint tells."""

CARD_NAME = "README.md"

MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelReport:
    """What the training stage returns: `metrics` are the last evaluation's, or the last step's."""

    path: Path
    fingerprint: str
    content_hash: str
    ran: bool
    why: str
    metrics: dict[str, float]
    seconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"path": str(self.path)}

    def summary(self) -> str:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        took = f"{self.seconds:.0f} s" if self.ran else "unchanged"
        return f"model  {self.path}  ({took})\n{figures}"


def train_model(
    dataset: Path, config: TrainConfig, output: Path, *, job: str, show_progress: bool = False
) -> ModelReport:
    """Train into the model folder `output`, unless it holds the model of the same data, base and settings.

    Raises OrpoError if another run writes there, if data or base model are damaged or do not fit together.
    """
    with writing(output) if process_state().is_main_process else nullcontext():
        return _train_model(dataset, config, output, job=job, show_progress=show_progress)


def _train_model(dataset: Path, config: TrainConfig, output: Path, *, job: str, show_progress: bool) -> ModelReport:
    started = time.monotonic()
    refuse_foreign_folder(output)
    refuse_other_stage(output, "train")
    data = training_data(dataset, config)
    base = fetch_model(config.model, config.revision)
    inputs = [
        dataset_input(dataset, output),
        Input(name=config.model, fingerprint=model_fingerprint(base), revision=config.revision),
    ]
    judge = fetch_model(config.ppo.reward_model, None) if config.ppo and config.objective == "ppo" else None
    if config.ppo and judge:
        inputs.append(Input(name=config.ppo.reward_model, fingerprint=model_fingerprint(judge)))
    if config.needs_reference and data.inputs[1].fingerprint != inputs[1].fingerprint:
        raise OrpoError(
            f"{dataset}: its reference is {data.inputs[1].name}, training starts from another model, {config.model}: "
            f"{_reference_command(config)}"
        )
    key = {
        "stage": "train",
        "version": CODE_VERSION,
        "inputs": [item.fingerprint for item in inputs],
        "config": config.model_dump(mode="json", by_alias=True, exclude=NAMES),
    }
    why = why_run(output, key)
    if not why:
        return _report(output, ran=False, why="unchanged", started=started)
    log.info("train: running into %s, %s", output, why)
    work = beside(output) / f".{output.name}.{digest(_weights_key(key))[:12]}.partial"
    chat = check_inputs(dataset, data, config, base)  # in every process, so that each ends with the same line
    processes = process_state()
    if processes.is_main_process:
        if config.resume_other_dataset:
            adopt_interrupted_run(work, output)
        work.mkdir(parents=True, exist_ok=True)
    processes.wait_for_everyone()
    with Recorder(job, "train", work, output) as recorder:
        if processes.is_main_process:
            recorder.start(inputs)
            save_tokenizer(chat, work)
        evaluation = read_table(dataset, "eval") if "eval" in data.splits else None
        train(
            with_local_models(config, base, judge),
            read_table(dataset, "train"),
            evaluation if evaluation is not None and len(evaluation) else None,
            work,
            data.fingerprint,
            show_progress=show_progress,
        )
        if processes.is_main_process:
            _commit(dataset, work, output, key, inputs, config, recorder)
        processes.wait_for_everyone()
    return _report(output, ran=True, why=why, started=started)


def with_local_models(config: TrainConfig, base: Path, judge: Path | None) -> TrainConfig:
    """The same settings with the folders that their models lie in."""
    ppo = config.ppo.model_copy(update={"reward_model": str(judge)}) if config.ppo and judge else config.ppo
    return config.model_copy(update={"model": str(base), "revision": None, "ppo": ppo})


def training_data(dataset: Path, config: TrainConfig) -> Manifest:
    """The manifest of a dataset that training can read; OrpoError naming the command that makes what is missing."""
    if config.needs_reference and not (dataset / MANIFEST_NAME).exists():
        raise OrpoError(f"{dataset}: no dataset is there; {_reference_command(config)}")
    data = read_manifest(dataset)
    if data.stage not in TOKEN_STAGES:
        raise OrpoError(f"{dataset}: is the output of {data.stage}, training needs the output of tokenize")
    if config.needs_reference and data.stage != "reference":
        raise OrpoError(f"{dataset}: has no reference log-probabilities; {_reference_command(config)}")
    return data


def _reference_command(config: TrainConfig) -> str:
    made = f"`orpo stage reference RECIPE --set train.objective={config.objective}` makes"
    return f"{made} what objective {config.objective} needs of the model it starts from"


def adopt_interrupted_run(work: Path, output: Path) -> None:
    """Let the newest interrupted run into the same model folder, on whatever data, be this one's beginning."""
    others = [folder for folder in work.parent.glob(f".{output.name}.*.partial") if (folder / "checkpoints").is_dir()]
    if others and not work.exists():
        max(others, key=lambda folder: folder.stat().st_mtime).rename(work)


def _weights_key(key: dict[str, Any]) -> dict[str, Any]:
    """What the weights depend on: a run may go on with a smaller micro-batch or another rhythm of its log."""
    return key | {"config": {name: value for name, value in key["config"].items() if name not in NOT_IDENTITY}}


def fetch_model(model: str, revision: str | None) -> Path:
    """The local folder of a base model; a hub id is downloaded once (weights as safetensors only)."""
    if Path(model).is_dir():
        check_model(Path(model))
        return Path(model)
    from huggingface_hub import snapshot_download

    from orpo_data.hub import HUB_ERRORS, reason

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=MODEL_FILES))
    except HUB_ERRORS as error:
        raise OrpoError(
            f"train.model: {model!r} is no local folder and cannot be had from the hub: {reason(error)}"
        ) from None


def check_model(folder: Path) -> None:
    """OrpoError naming a file of a model folder of ours that is not what its manifest says; the card may be edited."""
    if not (folder / MANIFEST_NAME).exists():
        return  # a foreign model: nobody wrote down what its bytes should be
    manifest = read_manifest(folder)
    for _ in opened_shards(folder, manifest.shards, Path):
        pass
    for name in manifest.files.keys() - {CARD_NAME}:
        check_file(folder, manifest, name)


def model_fingerprint(folder: Path) -> str:
    """Hash of a model folder's weights, configuration and tokenizer: contents, not times."""
    own = {MANIFEST_NAME, EVENTS_NAME, CARD_NAME, TRAIN_NAME, METRICS_NAME, NONFINITE_NAME, CURVES_NAME}
    return digest({name: file_sha256(folder / name) for name in list_files(folder) if name not in own})


def _commit(
    dataset: Path,
    work: Path,
    output: Path,
    key: dict[str, Any],
    inputs: list[Input],
    config: TrainConfig,
    recorder: Recorder,
) -> None:
    """Turn the finished work folder into the model folder."""
    remove_checkpoints(work / "checkpoints")
    weights = [_weights_file(work, name) for name in list_files(work) if name.endswith(".safetensors")]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        stage="train",
        fingerprint=digest(key),
        content_hash=content_hash(weights, []),
        key=key,
        inputs=inputs,
        rows_in=0,
        steps=[],
        shards=weights,
        dropped=[],
        files={},
        recipe={"train": config.model_dump(mode="json", by_alias=True)},
        seed=config.seed,
        versions=provenance.package_versions(),
        git_commit=provenance.git_commit(),
    )
    if config.scalar_head:
        set_padding(work)
    else:
        add_stop_token(work)
    trained = json.loads((work / TRAIN_NAME).read_text("utf-8"))
    (work / CARD_NAME).write_text(model_card(manifest, trained, lineage(dataset).nodes), "utf-8")
    recorder.complete(manifest)
    commit_folder(work, output, manifest)
    for stale in work.parent.glob(f".{output.name}.*.partial"):
        remove_folder(stale)


def save_tokenizer(chat: Chat, folder: Path) -> None:
    """Put the tokenizer and the template that made the dataset where the model will lie."""
    chat.tokenizer.chat_template = chat.template
    chat.tokenizer.save_pretrained(folder)


def add_stop_token(folder: Path) -> None:
    """Let generation end where the dataset's answers end; a base model may know another end only."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text("utf-8"))
    known = settings.get("eos_token_id")
    ends = known if isinstance(known, list) else [] if known is None else [known]
    end = Chat.load(str(folder)).end_of_turn_id
    if end not in ends:
        settings["eos_token_id"] = [*ends, end] if ends else end
        file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def set_padding(folder: Path) -> None:
    """Let a reward model pad with a token that ends no answer: transformers takes the last other one for the end.

    Without such a token there is none, and transformers takes one sequence at a time.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = {Chat.load(str(folder)).end_of_turn_id, tokenizer.eos_token_id}
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id)
    padding = next((token for token in candidates if token is not None and token not in ends), None)
    tokenizer.pad_token = None if padding is None else tokenizer.convert_ids_to_tokens(padding)
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.pad_token_id = padding
    config.save_pretrained(folder)


def _weights_file(folder: Path, name: str) -> Shard:
    file = folder / name
    size, sha256 = file.stat().st_size, file_sha256(file)
    return Shard(path=name, split=None, rows=0, tokens=None, bytes=size, sha256=sha256)


def _report(output: Path, *, ran: bool, why: str, started: float) -> ModelReport:
    manifest = read_manifest(output)
    trained = json.loads(check_file(output, manifest, TRAIN_NAME))
    return ModelReport(
        path=output,
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
        ran=ran,
        why=why,
        metrics=trained["metrics"],
        seconds=time.monotonic() - started,
    )
