"""A whole pipeline as one typed document, read from YAML.

The sections are the steps' own settings, so a recipe's keys are documented where they act.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from orpo_data.chat import Chat
from orpo_data.errors import UsageError
from orpo_data.extras import require_package
from orpo_data.places import without_secrets
from orpo_data.sources import Diverging, check_settings
from orpo_data.sources.json_text import CHUNK, LIMITS
from orpo_data.steps.binarize import Binarize
from orpo_data.steps.chat_template import ChatTemplate
from orpo_data.steps.clean import Clean
from orpo_data.steps.control_text import ControlText
from orpo_data.steps.decontaminate import Decontaminate, OverlapRules
from orpo_data.steps.dedup import Dedup
from orpo_data.steps.evaluation_sets import EvaluationSource, read_evaluation_set
from orpo_data.steps.label_noise import LabelNoise
from orpo_data.steps.normalise import Normalise
from orpo_data.steps.split import Split
from orpo_data.steps.step import Step
from orpo_data.steps.tokenize import Tokenize
from orpo_data.steps.truncate import Truncate
from orpo_train.config import Sampling, TrainConfig
from pipelines.compare.config import CompareConfig
from pipelines.documents import apply_override, read_document
from pipelines.drift import DriftConfig


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Section):
    """One raw data set."""

    dataset: Literal["ultrafeedback", "hh-rlhf", "pairs"] = Field(description="The upstream format.")
    path: str = Field(description="Hub id, local file, folder or glob, or any fsspec URL.")
    name: str = Field(
        default="",
        pattern=r"^(\w[\w.-]*)?$",  # it becomes a folder's name
        description="Name in `source` and in the output's folders; by default the dataset's.",
    )
    revision: str | None = Field(default=None, description="Commit on the hub.")
    files: str | None = Field(default=None, description="Glob of the files to read inside a folder or hub id.")
    columns: dict[str, str] = Field(default={}, description="Our column names to the file's, for `pairs`.")
    diverges: Diverging = Field(
        default="drop", description="Dialogues whose histories part early: drop them, or keep-common-prefix."
    )
    max_record_bytes: int = Field(
        default=LIMITS.record,
        ge=CHUNK,
        description="A longer line, or row of a table, is not read: it is dropped as unparsable.",
    )
    max_array_bytes: int = Field(
        default=LIMITS.array,
        ge=CHUNK,
        description="Most bytes, decompressed, of a file that is one JSON array, of a row group of a parquet file, or "
        "of a record batch of an Arrow file.",
    )
    weight: float = Field(default=1.0, gt=0, le=1, description="Share of the source's pairs that is kept.")
    count: int | None = Field(
        default=None, ge=1, description="Number of the source's pairs that is kept, instead of `weight`."
    )

    @model_validator(mode="after")
    def _weight_or_count(self) -> Self:
        if self.count and self.weight != 1:
            raise ValueError(f"weight ({self.weight}) and count ({self.count}) cannot both be set: drop one")
        return self

    @model_validator(mode="after")
    def _fits_the_dataset(self) -> Self:
        check_settings(self.dataset, self.columns, self.diverges)
        return self

    @property
    def label(self) -> str:
        return self.name or self.dataset


class DecontaminateConfig(_Section, OverlapRules):
    """Which evaluation sets the pairs must not overlap with, and what counts as overlap."""

    against: list[EvaluationSource] = Field(default=[], description="Evaluation sets: built-in names, or own ones.")

    @model_validator(mode="after")
    def _something_to_compare_with(self) -> Self:
        names = [source.name for source in self.against]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"against: {doubled[0]!r} stands twice; give each its own `name`")
        if not names and not self.subsets:
            raise ValueError("nothing to compare with: name evaluation sets in `against`, or `subsets` to drop")
        return self

    def step(self) -> Decontaminate:
        """The step, with the evaluation sets read (and fetched, if they are not here)."""
        sets = [read_evaluation_set(source) for source in self.against]
        return Decontaminate(sets=sets, **self.model_dump(exclude={"against"}))


class TokenizeConfig(_Section):
    """How text becomes token ids."""

    tokenizer: str = Field(description="Local folder or hub id.")
    revision: str | None = Field(default=None, description="Commit of the tokenizer on the hub.")
    chat_template: str | None = Field(
        default=None, description="A name, a jinja file, or null for the tokenizer's own."
    )
    max_length: int = Field(default=2048, ge=2, description="Most tokens of prompt and answer together.")
    max_prompt_length: int = Field(default=1792, ge=1, description="Most tokens of the prompt.")
    overlong_prompt: Literal["drop-turns", "drop"] = Field(
        default="drop-turns", description="Leave out whole oldest turns, or the pair."
    )
    overlong_response: Literal["truncate", "drop"] = Field(
        default="truncate", description="Cut the answer at the end, or leave out the pair."
    )

    control_text: ControlText = Field(
        default="drop",
        description="A message that spells a control token or a turn's beginning: drop the pair, escape the text (a "
        "space inside, so that it is neither), or flag: escape and count it by kind.",
    )

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> Self:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) must be below max_length ({self.max_length}), "
                "or no token is left for an answer"
            )
        return self

    def steps(self, chat: Chat) -> list[Step]:
        limits = self.model_dump(include={"max_length", "max_prompt_length", "overlong_prompt", "overlong_response"})
        template = ChatTemplate(chat=chat, control_text=self.control_text)
        return [template, Tokenize(chat=chat), Truncate(chat=chat, **limits)]


class JudgeConfig(_Section):
    """How a reward model judges the answers to held-out prompts."""

    reward_model: str = Field(description="Folder of a reward model (AutoModelForSequenceClassification, one label).")
    against: str | None = Field(
        default=None, description="Folder of the model to compare with; by default the one that training began with."
    )
    embedding_model: str | None = Field(
        default=None, description="Folder of a model whose mean hidden states tell how alike answers are; null: none."
    )
    prompts: int | None = Field(default=100, ge=1, description="Most held-out prompts to answer; null answers all.")
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1, description="Each draws an answer to every prompt.")
    max_new_tokens: int = Field(default=256, ge=1, description="Most tokens of an answer.")
    temperature: float = Field(default=1.0, ge=0, description="Logits are divided by it; 0: the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Draw among the likeliest tokens of this probability.")

    @model_validator(mode="after")
    def _distinct_seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds}: each must be a number from 0 and stand once")
        return self

    def sampling(self, seed: int) -> Sampling:
        return Sampling(**self.model_dump(include={"max_new_tokens", "temperature", "top_p"}), seed=seed)


class EvaluateConfig(_Section):
    """How a trained model is judged on the held-out pairs."""

    max_pairs: int | None = Field(default=None, ge=1, description="Most held-out pairs to score; null scores all.")
    samples: int = Field(default=4, ge=0, description="Held-out prompts to answer, before and after.")
    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of a sample answer.")
    judge: JudgeConfig | None = Field(default=None, description="A reward model to judge answers with; null: none.")


class RunnerConfig(_Section):
    """Where the parts of a stage are worked on; decides nothing about the rows."""

    kind: Literal["local", "dask", "ray"] = Field(
        default="local", description="In this process, or as tasks on a Dask or Ray cluster (extras dask, ray)."
    )
    address: str | None = Field(
        default=None, description="Of the cluster's scheduler; by default one is started here for the run."
    )

    workers: int = Field(
        default=1, ge=1, description="Of the local runner: jobs of a comparison that run at a time, in processes."
    )

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.kind != "local":
            require_package(f"prefect_{self.kind}", self.kind, "runner.kind")
        elif self.address:
            raise ValueError("address: the local runner has none; set runner.kind to dask or ray")
        return self


class Recipe(_Section):
    """Sources, the steps on their rows, the training run and its evaluation."""

    name: str = Field(
        min_length=1, pattern=r"^[^./\\][^/\\]*$", description="Name of the run: in lineage, dashboards and paths."
    )
    sources: list[SourceConfig] = Field(min_length=1)
    binarize: Binarize = Binarize()
    normalise: Normalise | None = None
    clean: Clean = Clean()
    dedup: Dedup | None = None
    decontaminate: DecontaminateConfig | None = None
    label_noise: LabelNoise | None = None
    split: Split = Split()
    tokenize: TokenizeConfig
    train: TrainConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig | None = None
    drift: DriftConfig | None = None
    runner: RunnerConfig = RunnerConfig()

    @model_validator(mode="after")
    def _distinct_names(self) -> Self:
        labels = [source.label for source in self.sources]
        if doubled := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"sources: {doubled[0]!r} stands twice; give each its own `name`")
        if unknown := sorted(self.split.eval_fractions.keys() - labels):
            raise ValueError(f"split.eval_fractions: no source {unknown[0]!r}, there are {', '.join(labels)}")
        return self

    @classmethod
    def read(cls, recipe: str | Path, overrides: Sequence[str] = ()) -> Self:
        """A recipe file, or a ready recipe by name, with `key.path=value` overrides.

        Raises UsageError naming the key (and the nearest one) when something does not fit.
        """
        document = read_document(recipe)
        for override in overrides:
            apply_override(document, override)
        return cls.parse(document, str(recipe))

    @classmethod
    def parse(cls, document: Any, origin: str = "recipe") -> Self:
        """A recipe from plain values."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise UsageError(explain_errors(cls, origin, error)) from None

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, as it is saved with each output."""
        return self.model_dump(mode="json", by_alias=True)


def explain_errors(model: type[BaseModel], origin: str, error: ValidationError) -> str:
    """The first three things wrong with a document, each named by its key."""
    return "; ".join(_explain(model, origin, item) for item in error.errors()[:3])


def _explain(model: type[BaseModel], origin: str, error: ErrorDetails) -> str:
    """One validation error as a line that names the key."""
    key = ".".join(str(part) for part in error["loc"]) or "recipe"
    if error["type"] == "extra_forbidden":
        known = list(_known_keys(model, error["loc"][:-1]))
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        return f"{origin}: unknown key {key!r}; {hint}"
    if error["type"] == "missing":
        return f"{origin}: {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = f" (it is {without_secrets(error['input'])!r})" if not isinstance(error["input"], dict | BaseModel) else ""
    return f"{origin}: {key}: {message}{value}"


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> Iterator[str]:
    """The keys allowed at a place of the document."""
    current: Any = model
    for part in location:
        if isinstance(part, str):
            names = {field.alias or name: field.annotation for name, field in current.model_fields.items()}
            current = _model_of(names[part])
    for name, field in current.model_fields.items():
        yield field.alias or name


def _model_of(annotation: Any) -> Any:
    """The settings class inside `X`, `X | None` or `list[X]`."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
