"""The reference stage: tokenized pairs and a model in, the same pairs with that model's log-probabilities out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.batches import batches_of
from orpo_data.branch import Branch
from orpo_data.errors import OrpoError, UsageError
from orpo_data.locking import writing
from orpo_data.manifest import Input, digest, read_manifest
from orpo_data.parts import ShardPart
from orpo_data.schema import DROPPED, REFERENCED, TOKEN_IDS, TOKENIZED, no_rows
from orpo_data.shards import read_shard
from orpo_data.stage import StageReport, dataset_input, run_stage
from orpo_data.steps.step import Step, StepOutput
from orpo_train.batching import KL_COLUMNS
from orpo_train.reference import ReferenceModel, answers_to_other_prompts
from pipelines.checks import chat_of, check_tokenizer
from pipelines.recipe import Recipe
from pipelines.stages import Progress, quiet
from pipelines.training import fetch_model, model_fingerprint

BATCH_ROWS = 256  # between two reports of progress: a model is slower than any other step


class Reference(Step):
    """Adds log-probabilities of the answers under the model, which is what training starts from."""

    name: ClassVar[str] = "reference"
    version: ClassVar[int] = 1

    model: ReferenceModel = Field(exclude=True)  # for `fingerprint` says which one it is
    fingerprint: str = Field(description="Hash of the model's weights, configuration and tokenizer.")
    precision: str = Field(description="Of the model's matrix products.")
    kl_length: int | None = Field(description="Most tokens of the sequences that kto asks for; null: there are none.")

    def apply(self, table: pa.Table) -> StepOutput:
        chosen, rejected = self.model.answer_logps(table.select(TOKENIZED.names)).T
        nothing = pa.nulls(len(table), TOKEN_IDS)
        ids = table["kl_input_ids"] if self.kl_length else nothing
        kept = table.select(TOKENIZED.names)
        for name, values in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
            kept = kept.append_column(name, pa.array(values, pa.float32()))
        kept = kept.append_column("kl_input_ids", ids).append_column("ref_kl_logps", self._kl_logps(table))
        return StepOutput(kept, no_rows(DROPPED))

    def _kl_logps(self, table: pa.Table) -> pa.Array:
        if not self.kl_length:
            return pa.nulls(len(table), pa.float32())
        columns = {"id": table["id"], "prompt_len": table["prompt_len"]}
        columns |= dict.fromkeys(("chosen_input_ids", "rejected_input_ids"), table["kl_input_ids"])
        return pa.array(self.model.answer_logps(pa.table(columns), rejected=False)[:, 0], pa.float32())


@dataclass(frozen=True)
class NeighbourPart(ShardPart):
    """A shard whose rows also have another prompt's answer: which one depends on the whole shard, not on a batch."""

    max_length: int

    @property
    def fingerprint(self) -> str:
        return digest([self.shard.sha256, self.max_length])

    def read(self, batch_rows: int) -> Iterator[pa.Table]:
        table = read_shard(self.folder, self.shard)
        table = table.append_column(KL_COLUMNS[0], answers_to_other_prompts(table, self.max_length))
        return batches_of(table, batch_rows)


def reference(inputs: Path, recipe: Recipe, output: Path, progress: Progress = quiet) -> StageReport:
    """TOKENIZED to REFERENCED, split by split, by the model that the recipe's training starts from.

    Raises UsageError when the recipe's objective needs no reference, OrpoError when the model cannot be had or has
    another tokenizer than the dataset, or if another run writes there.
    """
    config = recipe.train
    if config is None or not config.needs_reference:
        told = "has no `train` section" if config is None else f"trains with objective {config.objective}"
        raise UsageError(f"{recipe.name}: {told}, which needs no reference model; dpo, ipo and kto do")
    data = read_manifest(inputs)
    if data.stage != "tokenize":
        raise OrpoError(f"{inputs}: is the output of {data.stage}, the output of tokenize is needed here")
    folder = fetch_model(config.model, config.revision)
    check_tokenizer(chat_of(data).tokenizer, folder, config.model)
    fingerprint = model_fingerprint(folder)
    kl_length = data.recipe["tokenize"]["max_length"] if config.objective == "kto" else None
    model = ReferenceModel(folder, config)
    step = Reference(model=model, fingerprint=fingerprint, precision=config.precision, kl_length=kl_length)
    parts = [NeighbourPart(inputs, s, kl_length) if kl_length else ShardPart(inputs, s) for s in data.shards]
    branch = Branch(
        inputs=[
            dataset_input(inputs, output),
            Input(name=config.model, fingerprint=fingerprint, revision=config.revision),
        ],
        parts=parts,
        steps=[step],
    )
    with writing(output):
        return run_stage(
            "reference",
            output,
            REFERENCED,
            [branch],
            splits=data.splits,
            recipe=data.recipe | {"train": recipe.resolved()["train"]},
            job=recipe.name,
            batch_rows=BATCH_ROWS,
            progress=lambda rows: progress("reference", rows),
        )
