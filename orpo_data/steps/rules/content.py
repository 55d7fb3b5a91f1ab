"""Rules on what the texts of a pair say: labels inside, lengths, repetition, phrases, personal data, language."""

from functools import reduce
from typing import Any, ClassVar, Self

import polars as pl
from pydantic import Field, field_validator, model_validator

from orpo_data.errors import UsageError
from orpo_data.extras import require_package
from orpo_data.schema import SIDES
from orpo_data.steps import personal_data
from orpo_data.steps.rules import phrases
from orpo_data.steps.rules.language import NO_LANGUAGE, identify, known_languages
from orpo_data.steps.rules.rule import Measured, Rule, only_where, quotient, text

ROLE_LABEL = r"(?mi)^[ \t>*#]*(?:human|hum|assistant|user|ai)[ \t*]*:"
OPENING = 300  # characters: who refuses does so at once; later on, "I can't help" belongs to a story


class RoleLabelInText(Measured):
    """A line begins with "Human:", "Assistant:" or the like: turns run together, or an answer that talks to itself."""

    name: ClassVar[str] = "role_label_in_text"
    sides: ClassVar[tuple[str, ...]] = SIDES

    @property
    def limit(self) -> str:
        return "at the start of a line"

    def measure(self, side: str) -> pl.Expr:
        return text(side).str.count_matches(ROLE_LABEL)

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured > 0


class TooShort(Measured):
    """An answer of very few characters, outer white space aside."""

    name: ClassVar[str] = "too_short"

    at_least: int = Field(default=10, ge=1, description="Fewest characters of an answer.")

    @property
    def limit(self) -> str:
        return f"characters, at least {self.at_least}"

    def measure(self, side: str) -> pl.Expr:
        return text(side).str.strip_chars().str.len_chars()

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured < self.at_least


class TooLong(Measured):
    """A prompt or an answer of very many characters: a pasted file, a generator that never stopped."""

    name: ClassVar[str] = "too_long"
    sides: ClassVar[tuple[str, ...]] = SIDES

    at_most: int = Field(default=50_000, ge=1, description="Most characters of a prompt, and of an answer.")

    @property
    def limit(self) -> str:
        return f"characters, at most {self.at_most}"

    def measure(self, side: str) -> pl.Expr:
        return text(side).str.len_chars()

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured > self.at_most


class LengthRatio(Measured):
    """One answer, the side that is named, has many times as many characters as the other."""

    name: ClassVar[str] = "length_ratio"
    decimals: ClassVar[int] = 1

    at_most: float = Field(default=20.0, ge=1, description="Most characters of the longer answer for one of the other.")

    @property
    def limit(self) -> str:
        return f"times as long as the other answer, at most {self.at_most:g}"

    def measure(self, side: str) -> pl.Expr:
        other = "rejected" if side == "chosen" else "chosen"
        return quotient(text(side).str.len_chars(), text(other).str.len_chars())

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured > self.at_most


class Repetition(Measured):
    """An answer goes round in circles: too many of its word n-grams have stood in it before.

    The share is 1 - distinct-n (Li et al. 2016, arXiv 1510.03055). Texts without spaces between words, such as Chinese,
    have few words here and pass.
    """

    name: ClassVar[str] = "repetition"
    decimals: ClassVar[int] = 2

    at_most: float = Field(default=0.5, ge=0, le=1, description="Largest share of an answer's n-grams that repeat.")
    ngram: int = Field(default=3, ge=1, description="Words in a row that count as one n-gram.")
    words_at_least: int = Field(default=20, ge=1, description="Fewest words of an answer that is judged.")

    @property
    def limit(self) -> str:
        return f"of {self.ngram}-grams repeat, at most {self.at_most:g}"

    def measure(self, side: str) -> pl.Expr:
        words = text(side).str.to_lowercase().str.extract_all(r"\w+")
        ngrams = words.list.eval(pl.concat_str(self._run(pl.element()), separator=" ").drop_nulls())
        share = 1 - quotient(ngrams.list.n_unique(), ngrams.list.len())
        hashes = words.list.eval(pl.element().hash())
        runs = hashes.list.eval(reduce(lambda run, word: 31 * run + word, self._run(pl.element())))
        return only_where(self._suspect(pl.col("runs")), share, [text(side), runs.alias("runs")], pl.Float64())

    def _run(self, word: pl.Expr) -> list[pl.Expr]:
        """A word and those that follow it in an n-gram; null at the end of a text."""
        return [word.shift(-i) for i in range(self.ngram)]

    def _suspect(self, runs: pl.Expr) -> pl.Expr:
        """Whether there are enough words, and few enough hashes of n-grams: equal n-grams have equal hashes."""
        incomplete = self.ngram - 1  # those at the end are null
        share = 1 - quotient(runs.list.n_unique() - min(incomplete, 1), runs.list.len() - incomplete)
        return (runs.list.len() >= max(self.words_at_least, self.ngram)) & (share > self.at_most)

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return measured > self.at_most


class Refusal(Rule):
    """An answer opens by refusing ("I cannot assist with that"). In English only; often right in harmlessness data."""

    name: ClassVar[str] = "refusal"

    def measure(self, side: str) -> pl.Expr:
        return _straight_quotes(text(side).str.head(OPENING)).str.contains(phrases.REFUSAL)


class Boilerplate(Rule):
    """An answer speaks of itself as a model ("As an AI language model"). In English only."""

    name: ClassVar[str] = "boilerplate"

    def measure(self, side: str) -> pl.Expr:
        return _straight_quotes(text(side)).str.contains(phrases.BOILERPLATE)


def _straight_quotes(text: pl.Expr) -> pl.Expr:
    return text.str.replace_all("\u2019", "'", literal=True)


class PersonalData(Rule):
    """E-mail addresses, telephone numbers and the like, or secrets such as keys: how many, not what they are."""

    name: ClassVar[str] = "personal_data"
    sides: ClassVar[tuple[str, ...]] = SIDES

    kinds: tuple[personal_data.Kind, ...] = Field(
        default=tuple(personal_data.KINDS), min_length=1, description="What to look for."
    )

    def measure(self, side: str) -> pl.Expr:
        suspect = text(side).str.contains(personal_data.hint(self.kinds))
        hints = {kind: text(side).str.contains(personal_data.hint([kind])) for kind in self.kinds}
        kinds = pl.concat_list(pl.when(hinted).then(pl.lit(kind)) for kind, hinted in hints.items()).list.drop_nulls()
        counts = pl.Struct({"count": pl.Int64, "words": pl.String})
        counted = pl.struct(text=text(side), kinds=kinds).map_elements(_personal_data, counts)
        return only_where(suspect, counted, [text(side)], counts)

    def fails(self, measured: pl.Expr) -> pl.Expr:
        return self.value(measured) > 0

    def value(self, measured: pl.Expr) -> pl.Expr:
        return measured.struct.field("count")

    def words(self, measured: pl.Expr) -> pl.Expr:
        return measured.struct.field("words")


def _personal_data(looked_at: dict[str, Any]) -> dict[str, Any]:
    _, found = personal_data.redact(**looked_at)
    return {"count": sum(found.values()), "words": ", ".join(f"{n} {kind}" for kind, n in found.items())}


class Language(Rule):
    """A prompt or an answer is in a language that is not kept. Texts too short to tell pass."""

    name: ClassVar[str] = "language"
    sides: ClassVar[tuple[str, ...]] = SIDES

    keep: tuple[str, ...] = Field(
        default=("en",), min_length=1, description="ISO 639-1 codes of the languages to keep."
    )
    confidence: float = Field(default=0.8, ge=0, le=1, description="How sure a language must be to count, 0 to 1.")

    @field_validator("keep", mode="before")
    @classmethod
    def _norwegian(cls, value: Any) -> Any:
        """YAML reads `no` as the boolean false."""
        return ["no" if code is False else code for code in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.action != "off":
            require_package("py3langid", "language", "clean.language")
        return self

    @property
    def limit(self) -> str:
        return f"is not among {', '.join(self.keep)}"

    def measure(self, side: str) -> pl.Expr:
        if unknown := sorted(set(self.keep) - known_languages()):
            raise UsageError(
                f"clean.language.keep: {unknown[0]!r} is no two-letter code of a language that can be told"
            )
        return text(side).map_elements(_language, pl.Struct({"language": pl.String, "confidence": pl.Float64}))

    def fails(self, measured: pl.Expr) -> pl.Expr:
        kept = measured.struct.field("language").is_in([*self.keep, NO_LANGUAGE])
        return ~kept & (self.value(measured) >= self.confidence)

    def value(self, measured: pl.Expr) -> pl.Expr:
        return measured.struct.field("confidence")

    def words(self, measured: pl.Expr) -> pl.Expr:
        return measured.struct.field("language") + " (" + self.value(measured).round(2).cast(pl.String) + ")"


def _language(text: str) -> dict[str, Any]:
    language, confidence = identify(text)
    return {"language": language, "confidence": confidence}
