"""The README of a trained model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orpo_data.chain import Node
from orpo_data.manifest import Manifest
from orpo_data.pages.card import fenced
from orpo_data.pages.render import markdown
from orpo_train.objectives import OBJECTIVES

CARD = """\
---
{front}---

# {name}

{base} trained on {pairs} preference pairs with the objective `{objective}` (see the
[ORPO paper](https://arxiv.org/abs/2403.07691)). Dataset fingerprint `{dataset}`.

```python
{usage}```

## Figures

{steps:,} optimizer steps, {tokens:,} tokens; the weights are those of step {exported:,}.

| at that step | training batch | held out |
|---|---:|---:|
{metrics}

![curves](curves.png)

## Training

| setting | value |
|---|---|
{settings}

{supervised}Pairs lay in memory in the layout `{layout}`.

<details><summary>The whole recipe</summary>

{recipe}
</details>

## Data

| stage | rows in | rows out | dropped | content hash |
|---|---:|---:|---|---|
{stages}

Raw files and base model, by the sha256 of their contents:

{sources}

The way of a single row: `orpo lineage FOLDER --row ID`. Every setting is in `train.json`; `_manifest.json` and
`_lineage.ndjson` say what this folder was made of. Fingerprint `{fingerprint}`.
"""

GENERATE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{"role": "user", "content": "Why is the evening sky red?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""

SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
question = {"role": "user", "content": "Why is the evening sky red?"}
for answer in ("Its light comes a long way through air, which scatters blue.", "No idea."):
    messages = [question, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()  # the score is read at the end of the turn
    print(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())  # more is better
"""

SHOWN = ("learning_rate", "schedule", "epochs", "max_steps", "batch_size", "precision", "seed")
REDUCTIONS = {"sequence": "over each sequence, then over the pairs", "token": "over all tokens of the batch"}
SCOPES = {"response": "the chosen answer", "prompt+response": "the prompt and the chosen answer"}
NO_FIGURES = {
    "grad_norm",
    "learning_rate",
    "tokens",
    "pairs",
    "answers_so_far",
    "tokens_so_far",
}  # of the last batch alone
MOST_FILES = 20


def model_card(manifest: Manifest, trained: dict[str, Any], nodes: Sequence[Node]) -> str:
    """A training run as Markdown: how to use the model, its figures, settings and data.

    `trained` is the run's train.json; `nodes` is the chain of data folders down to the dataset it was trained on.
    """
    config = manifest.recipe["train"]
    data = nodes[-1].manifest
    base = config["model"]
    base_name = Path(base).name
    return CARD.format(
        front=_front(config),
        name=markdown(f"{base_name}-{config['objective']}"),
        usage=SCORE if config["objective"] == "reward" else GENERATE,
        base=markdown(base_name if Path(base).is_dir() else base),
        objective=config["objective"],
        pairs=f"{sum(shard.rows for shard in data.shards if shard.split == 'train'):,}",
        dataset=manifest.inputs[0].fingerprint,
        steps=trained["steps"],
        exported=trained["exported_step"],
        tokens=trained["tokens"],
        metrics="\n".join(_figures(trained["metrics"])),
        settings="\n".join(f"| {key} | {markdown(config[key])} |" for key in ("objective", *_weight(config), *SHOWN)),
        supervised=_supervised(config) + _remote_code(config),
        layout=trained["layout"],
        recipe=fenced(yaml.safe_dump(data.recipe | manifest.recipe, sort_keys=False, allow_unicode=True), "yaml"),
        stages="\n".join(_stage_row(node) for node in nodes),
        sources="\n".join(_sources(manifest, nodes)),
        fingerprint=manifest.fingerprint,
    )


def _supervised(config: dict[str, Any]) -> str:
    if config["objective"] not in OBJECTIVES or not OBJECTIVES[config["objective"]].supervised:
        return ""
    scope, reduction = SCOPES[config["nll_scope"]], REDUCTIONS[config["nll_reduction"]]
    return f"The supervised loss covers {scope}, averaged {reduction}. "


def _remote_code(config: dict[str, Any]) -> str:
    return "The base model's own code ran (`trust_remote_code`). " if config["trust_remote_code"] else ""


def _weight(config: dict[str, Any]) -> list[str]:
    """The name of the setting that weighs the objective's preference term, if it has one."""
    weight = OBJECTIVES[config["objective"]].weight if config["objective"] in OBJECTIVES else "ppo"
    return [weight] if weight else []


def _front(config: dict[str, Any]) -> str:
    """The card's metadata, as the hub reads it; a base model is linked when it is one of the hub's."""
    task = "text-classification" if config["objective"] == "reward" else "text-generation"
    front = {"library_name": "transformers", "pipeline_tag": task, "tags": ["preference-optimization"]}
    front["tags"] = [config["objective"], *front["tags"]]
    if not Path(config["model"]).is_dir():
        front["base_model"] = config["model"]
    return yaml.safe_dump(front, sort_keys=False)


def _figures(metrics: dict[str, float]) -> list[str]:
    """A row for each metric, of the last training batch and of the held-out pairs."""
    names = dict.fromkeys(name.removeprefix("eval/") for name in metrics if name not in NO_FIGURES)
    values = ([metrics.get(name), metrics.get(f"eval/{name}")] for name in names)
    cells = (" | ".join("" if value is None else f"{value:.5g}" for value in pair) for pair in values)
    return [f"| {name} | {pair} |" for name, pair in zip(names, cells, strict=True)]


def _stage_row(node: Node) -> str:
    manifest = node.manifest
    name = f"ingest {node.path.name}" if manifest.stage == "ingest" else manifest.stage
    dropped = markdown(", ".join(f"{count:,} {reason}" for reason, count in manifest.drop_reasons.items()))
    rows = f"{manifest.rows_in:,} | {manifest.rows:,}"
    return f"| {markdown(name)} | {rows} | {dropped} | `{manifest.content_hash[:12]}` |"


def _sources(manifest: Manifest, nodes: Sequence[Node]) -> list[str]:
    """What the chain began with: the first raw files, how many more there are, the base model, the judge."""
    files = [item for node in nodes for item in node.manifest.inputs if item.path is None]
    shown = [*files[:MOST_FILES], *manifest.inputs[1:]]
    names = [f"{item.name} at {item.revision}" if item.revision else item.name for item in shown]
    lines = [f"- {markdown(name)} `{item.fingerprint[:12]}`" for name, item in zip(names, shown, strict=True)]
    if len(files) > MOST_FILES:
        lines.insert(MOST_FILES, f"- and {len(files) - MOST_FILES:,} more files")
    return lines
