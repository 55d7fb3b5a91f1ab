"""One job of a comparison, in this process: train a model and write down what that cost, or let it answer."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from orpo_data.errors import OrpoError
from orpo_data.manifest import read_manifest
from orpo_data.places import write_whole
from orpo_data.shards import read_table
from orpo_train.evaluate import Precision, evaluate, load_tokenizer
from orpo_train.memory import peak_memory
from pipelines.compare.config import CompareConfig
from pipelines.compare.plan import ANSWERS_NAME, Job, answers_folder, job_config, model_folder
from pipelines.judging import Judge, draw_answers
from pipelines.layout import Layout
from pipelines.reading import HeldOut, Reader
from pipelines.recipe import JudgeConfig, Recipe
from pipelines.reference import reference
from pipelines.training import train_model

log = logging.getLogger(__name__)

COST_NAME = "cost.json"
ANSWERS_VERSION = 1  # raised whenever the same models would answer otherwise, or be judged otherwise

Outcome = dict[str, Any]
"""Of a job: `path`, whether it `ran`; of a training also `content_hash` and `cost`."""


def run_job(job: Job, recipe: Recipe, root: Path) -> Outcome:
    """Do a job below `root`, unless it is done: where its folder lies, whether it ran, and what its training cost.

    Raises OrpoError where it cannot be done.
    """
    return answer(job, recipe, root) if job.answers else train(job, recipe, root)


def train(job: Job, recipe: Recipe, root: Path) -> Outcome:
    """The job's model: from the recipe's base model, or from the policy that the method starts from."""
    started, worked, before = time.monotonic(), time.process_time(), peak_memory()
    config = job_config(job, recipe, root)
    dataset, folder = Layout(root).tokenize, model_folder(root, job.name)
    if config.needs_reference:
        referring = recipe.model_copy(update={"train": config})
        dataset = reference(dataset, referring, folder.parent / "reference").path
    report = train_model(dataset, config, folder, job=f"{recipe.name} {job.name}")
    cost_file = report.path.parent / COST_NAME
    if report.ran:
        seconds = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
        cost = {**seconds, "peak_bytes": peak_memory() - before}
        cost_file.write_text(json.dumps(cost) + "\n", "utf-8")
    return {
        "path": str(report.path),
        "ran": report.ran,
        "content_hash": report.content_hash,
        "cost": json.loads(cost_file.read_text("utf-8")) if cost_file.exists() else None,
    }


def answer(job: Job, recipe: Recipe, root: Path) -> Outcome:
    """The policy's answers to held-out prompts under the judge; up to date, they are kept.

    Raises OrpoError where there are no held-out prompts, or a model cannot answer or judge.
    """
    assert recipe.compare is not None
    policy, judge = (model_folder(root, name) for name in job.needs)
    dataset, settings = Layout(root).tokenize, recipe.compare
    inputs = [read_manifest(folder).content_hash for folder in (policy, judge, dataset)]
    asked = settings.model_dump(mode="json", include={"prompts", "draws", "sampling"})
    key = {"version": ANSWERS_VERSION, "inputs": inputs, **asked}
    file = answers_folder(root, job) / ANSWERS_NAME
    ran = not file.exists() or json.loads(file.read_text("utf-8"))["key"] != key
    if ran:
        log.info("answers: running into %s", file)
        told = _judged_answers(policy, judge, dataset, job_config(job, recipe, root).precision, recipe.compare)
        write_whole(file, json.dumps({"key": key, **told}) + "\n")
    return {"path": str(file), "ran": ran}


def _judged_answers(
    policy: Path, judge: Path, dataset: Path, precision: Precision, settings: CompareConfig
) -> dict[str, Any]:
    """Answers [draws][prompts] with their rewards, and how far the policy tells the held-out pairs apart."""
    data = read_manifest(dataset)
    table = read_table(dataset, "eval") if "eval" in data.splits else None
    if table is None or not len(table):
        raise OrpoError(f"{dataset}: has no held-out prompts to answer; raise split.eval_fraction")
    tokenizer = load_tokenizer(policy)
    prompts = HeldOut(dataset, data, table, tokenizer).prompts(settings.prompts)
    seeds = [settings.sampling.seed + number for number in range(settings.draws)]
    asked = settings.sampling.model_dump(include={"max_new_tokens", "temperature", "top_p"})
    sampling = JudgeConfig(reward_model=str(judge), prompts=settings.prompts, seeds=seeds, **asked)
    answers = draw_answers(Reader.of(policy, tokenizer), prompts, sampling, precision)
    judged = Judge(judge, tokenizer)
    pairs = evaluate(policy, None, table, precision=precision, samples=0)["per_pair"]
    return {
        "ids": prompts.ids,
        "seeds": seeds,
        "rewards": [judged.rewards(prompts, draw).tolist() for draw in answers.draws],
        "characters": answers.characters.tolist(),
        "ended": [[answer.ended for answer in draw] for draw in answers.draws],
        "texts": answers.texts,
        "pairs": {"odds": pairs["after_margin"], "probability": pairs["after_probability_ratio"]},
    }
