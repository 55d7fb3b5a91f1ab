"""The README of a trained model."""

from typing import Any

from orpo_data.manifest import Manifest

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [orpo, preference-optimization]
---

# {name}

{base} trained with {objective} on the preference pairs with fingerprint `{dataset}`.

| setting | value |
|---|---|
{settings}

{steps} optimizer steps, {tokens:,} tokens.

![curves](curves.png)

| metric | at the end |
|---|---|
{metrics}

The supervised loss covers {scope}, averaged {reduction}. Every setting is in `train.json`, the way back to the raw
files in `_manifest.json` and `_lineage.ndjson`. Fingerprint `{fingerprint}`.
"""

SHOWN = ("lambda", "learning_rate", "schedule", "epochs", "max_steps", "batch_size", "precision", "seed")
REDUCTIONS = {"sequence": "over each sequence, then over the pairs", "token": "over all tokens of the batch"}
SCOPES = {"response": "the chosen answer", "prompt+response": "the prompt and the chosen answer"}


def model_card(manifest: Manifest, trained: dict[str, Any]) -> str:
    """Settings, data and figures of a training run as Markdown; `trained` is the run's train.json."""
    config = manifest.recipe["train"]
    return CARD.format(
        name=f"{manifest.inputs[1].name.rstrip('/').split('/')[-1]}-{config['objective']}",
        base=manifest.inputs[1].name,
        objective=config["objective"].upper(),
        dataset=manifest.inputs[0].fingerprint,
        settings="\n".join(f"| {name} | {config[name]} |" for name in SHOWN),
        steps=trained["steps"],
        tokens=trained["tokens"],
        metrics="\n".join(f"| {name} | {value:.5g} |" for name, value in trained["metrics"].items()),
        scope=SCOPES[config["nll_scope"]],
        reduction=REDUCTIONS[config["nll_reduction"]],
        fingerprint=manifest.fingerprint,
    )
