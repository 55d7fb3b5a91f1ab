"""The evaluation stage: a trained model and held-out pairs in, figures and a page out."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from orpo_data import provenance
from orpo_data.cache import beside
from orpo_data.errors import OrpoError
from orpo_data.events import Recorder
from orpo_data.folders import commit_folder, refuse_foreign_folder
from orpo_data.locking import writing
from orpo_data.manifest import FORMAT_VERSION, Input, Manifest, digest, read_manifest
from orpo_data.pages.evaluation import evaluation_page
from orpo_data.places import as_path, remove_folder
from orpo_data.schema import TOKEN_STAGES
from orpo_data.shards import check_file, fetch_folder, read_table
from orpo_data.stage import dataset_input, refuse_other_stage, why_run
from orpo_data.verification import content_hash
from orpo_train.checkpoint import METRICS_NAME
from orpo_train.config import TrainConfig
from orpo_train.evaluate import evaluate, load_tokenizer
from orpo_train.loop import CURVES_NAME
from orpo_train.reward import is_reward_model
from orpo_train.reward_evaluation import evaluate_reward
from pipelines.judging import judge_models
from pipelines.layout import Layout
from pipelines.reading import HeldOut, rows_with_texts
from pipelines.recipe import EvaluateConfig, JudgeConfig
from pipelines.training import check_model, fetch_model, model_fingerprint

log = logging.getLogger(__name__)

CODE_VERSION = 2
RESULT_NAME = "evaluation.json"
FOLDERS = ("reward_model", "against", "embedding_model")


@dataclass(frozen=True)
class EvaluationReport:
    """What the evaluation stage returns; `result` is evaluation.json."""

    path: Path
    fingerprint: str
    content_hash: str
    ran: bool
    why: str
    result: dict[str, Any]
    seconds: float = field(compare=False)


def evaluate_model(
    model_dir: Path, dataset: Path, output: Path, settings: EvaluateConfig | None = None, *, job: str = "orpo"
) -> EvaluationReport:
    """Score the eval split under the model and under the model it was trained from; write JSON and a page.

    Of a reward model: how often it prefers the chosen answer, and how sure it is when it is right.
    """
    with writing(output):
        return _evaluate_model(model_dir, dataset, output, settings or EvaluateConfig(), job)


def _evaluate_model(
    model_dir: Path, dataset: Path, output: Path, settings: EvaluateConfig, job: str
) -> EvaluationReport:
    started = time.monotonic()
    refuse_foreign_folder(output)
    refuse_other_stage(output, "evaluate")
    data = read_manifest(dataset)
    if data.stage not in TOKEN_STAGES:
        raise OrpoError(f"{dataset}: is the output of {data.stage}, a model is judged on the output of tokenize")
    if "eval" not in data.splits:
        raise OrpoError(f"{dataset}: has no eval split to judge a model on")
    table = read_table(dataset, "eval")
    if not len(table):
        raise OrpoError(f"{dataset}: the eval split is empty; raise split.eval_fraction")
    inputs, base, config = _model_inputs(model_dir, output)
    model_dir = fetch_folder(model_dir)
    inputs.append(dataset_input(dataset, output))
    models = _models_to_judge(model_dir, base, settings.judge) if settings.judge else {}
    inputs += [_model_input(folder, output) for folder in _further_folders(settings.judge)]
    config_without_folders = settings.model_dump(mode="json", exclude={"judge": set(FOLDERS)})  # their bytes are inputs
    key = {
        "stage": "evaluate",
        "version": CODE_VERSION,
        "inputs": [item.fingerprint for item in inputs],
        "folders": [name for name in FOLDERS if settings.judge and getattr(settings.judge, name)],
        "config": config_without_folders,
    }
    why = why_run(output, key)
    if why:
        log.info("evaluate: running into %s, %s", output, why)
        work = beside(output) / f".{output.name}.partial"
        remove_folder(work)
        work.mkdir(parents=True)
        with Recorder(job, "evaluate", work, output) as recorder:
            recorder.start(inputs)
            pairs = table.slice(0, settings.max_pairs)
            judged: dict[str, Any] = {}
            if settings.judge:
                held_out = HeldOut(dataset, data, pairs, load_tokenizer(model_dir))
                judged["judge"] = judge_models(models, held_out, settings.judge, config.precision, work)
            if is_reward_model(model_dir):
                result = evaluate_reward(model_dir, pairs, config.precision)
            else:
                result = evaluate(
                    model_dir,
                    base,
                    pairs,
                    nll_scope=config.nll_scope,
                    precision=config.precision,
                    samples=settings.samples,
                    max_new_tokens=settings.max_new_tokens,
                )
            result |= judged | {
                "dataset": data.fingerprint[:12],
                "training": _evaluations(model_dir),
                "samples": with_texts(result["samples"], dataset, data),
            }
            (work / RESULT_NAME).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
            (work / "report.html").write_text(evaluation_page(result), "utf-8")
            if (model_dir / CURVES_NAME).exists():
                shutil.copyfile(model_dir / CURVES_NAME, work / CURVES_NAME)
            manifest = _manifest(key, inputs, settings, len(table))
            recorder.complete(manifest)
            commit_folder(work, output, manifest)
    return _report(output, why, started)


def _model_inputs(model_dir: Path, output: Path) -> tuple[list[Input], Path | None, TrainConfig]:
    """The model, the base model it was trained from (none for a foreign model), and its training's settings."""
    model = _model_input(model_dir, output)
    if model.stage is None:
        return [model], None, TrainConfig(model=str(model_dir), precision="fp32")
    trained = read_manifest(model_dir)
    config = TrainConfig.model_validate(trained.recipe["train"])
    return [model, trained.inputs[1]], fetch_model(config.model, config.revision), config


def _model_input(folder: Path, output: Path) -> Input:
    """A model folder, with its place where it was trained here and so has a history."""
    if not (folder / "config.json").is_file():
        inside = Layout(folder).model
        hint = f"; its model is in {inside}" if (inside / "config.json").is_file() else ""
        raise OrpoError(f"{folder}: no model folder (it has no config.json){hint}")
    here = fetch_folder(folder)
    check_model(here)
    own = (here / "train.json").is_file()
    return Input(
        name=folder.name,
        path=provenance.relative_path(folder, output) if own else None,
        stage="train" if own else None,
        fingerprint=model_fingerprint(here),
    )


def _models_to_judge(model_dir: Path, base: Path | None, judge: JudgeConfig) -> dict[str, Path]:
    """The model, and the one to compare it with: the one that was asked for, or the one that training began with."""
    if is_reward_model(model_dir):
        raise OrpoError(f"{model_dir}: is a reward model, which answers no prompts; judge a language model with it")
    against = fetch_folder(as_path(judge.against)) if judge.against else base
    return {"model": model_dir} | ({"against": against} if against else {})


def _further_folders(judge: JudgeConfig | None) -> list[Path]:
    """Models that judging reads beside the one that is judged and its base."""
    return [as_path(folder) for name in FOLDERS if judge and (folder := getattr(judge, name))]


def _evaluations(model_dir: Path) -> list[dict[str, Any]]:
    """What training measured on the held-out pairs on its way; nothing of a model trained elsewhere."""
    file = model_dir / METRICS_NAME
    lines = map(json.loads, file.read_text("utf-8").splitlines()) if file.is_file() else ()
    return [line for line in lines if "eval/loss" in line]


def with_texts(samples: list[dict[str, Any]], dataset: Path, data: Manifest) -> list[dict[str, Any]]:
    """Add each sample's last user turn and chosen answer, looked up in the dataset the ids were made of.

    Empty where that dataset is not there any more.
    """
    rows = rows_with_texts(dataset, data, [sample["id"] for sample in samples])
    nothing = {"prompt": [{"content": ""}], "chosen": [{"content": ""}]}
    return [
        sample | {name: rows.get(sample["id"], nothing)[name][-1]["content"] for name in ("prompt", "chosen")}
        for sample in samples
    ]


def _manifest(key: dict[str, Any], inputs: list[Input], settings: EvaluateConfig, rows: int) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        stage="evaluate",
        fingerprint=digest(key),
        content_hash=content_hash([], []),
        key=key,
        inputs=inputs,
        rows_in=rows,
        steps=[],
        shards=[],
        dropped=[],
        files={},
        recipe={"evaluate": settings.model_dump(mode="json")},
        seed=None,
        versions=provenance.package_versions(),
        git_commit=provenance.git_commit(),
    )


def _report(output: Path, why: str, started: float) -> EvaluationReport:
    manifest = read_manifest(output)
    return EvaluationReport(
        path=output,
        fingerprint=manifest.fingerprint,
        content_hash=manifest.content_hash,
        ran=bool(why),
        why=why or "unchanged",
        result=json.loads(check_file(output, manifest, RESULT_NAME)),
        seconds=time.monotonic() - started,
    )


def evaluation_table(result: dict[str, Any]) -> Table:
    """The metrics before and after training, side by side."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{result['pairs']} held-out pairs")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for name, after in result["after"].items():
        before = (result["before"] or {}).get(name)
        known = before is not None
        table.add_row(name, f"{before:.4f}" if known else "", f"{after:.4f}", f"{after - before:+.4f}" if known else "")
    return table
