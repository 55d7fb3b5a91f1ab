"""One form for the texts of a pair, before anything judges them.

What cannot be seen escapes most filters and teaches a model nothing: control characters, zero-width spaces, direction
overrides, CRLF, letters in two Unicode forms. A row that is altered counts as changed and gets a new id.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from orpo_data.extras import require_package
from orpo_data.schema import DROPPED, SIDES, no_rows, pair_ids
from orpo_data.steps.personal_data import Kind, hint, redact
from orpo_data.steps.step import Step, StepOutput

NEWLINE = r"\r\n?|\x{85}"
INVISIBLE = "|".join(
    (
        r"[\p{Cc}&&[^\n\t]]",  # NUL and its kind
        r"[\x{200B}\x{2060}\x{FEFF}\x{AD}]",  # zero-width spaces, byte order mark, soft hyphen
        r"[\x{202A}-\x{202E}\x{2066}-\x{2069}]",  # direction overrides (CVE-2021-42574)
    )
)  # not the zero-width joiners: emoji, Persian and the scripts of India need them


class Normalise(Step):
    """Invisible characters removed, one newline, one Unicode form; broken encodings and personal data when asked."""

    name: ClassVar[str] = "normalise"
    version: ClassVar[int] = 3

    control_characters: bool = Field(
        default=True, description="Turn CRLF into LF and remove invisible characters other than newline and tab."
    )
    nfc: bool = Field(default=True, description="Bring letters that have several Unicode forms into one (NFC).")
    mojibake: bool = Field(default=False, description="Repair wrongly decoded text, cafÃ© to café, by ftfy.")
    redact: tuple[Kind, ...] = Field(default=(), description="Personal data to replace by [EMAIL], [PHONE] and so on.")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if self.mojibake:
            require_package("ftfy", "mojibake", "normalise.mojibake")
        return self

    def apply(self, table: pa.Table) -> StepOutput:
        """PAIRS to PAIRS."""
        before = pl.from_arrow(table.select(SIDES))
        assert isinstance(before, pl.DataFrame)
        message = pl.element().struct
        normal = pl.struct(role=message.field("role"), content=self._normal(message.field("content")))
        after = before.with_columns(pl.col(side).list.eval(normal) for side in SIDES)
        changed = (before != after).select(pl.any_horizontal(*SIDES)).to_series()
        columns = {name: after[name].to_arrow(compat_level=pl.CompatLevel.oldest()) for name in SIDES}
        new_ids = pair_ids(after.filter(changed))
        columns["id"] = pc.replace_with_mask(table["id"], changed.to_arrow(), new_ids)
        kept = pa.table({**{name: table[name] for name in table.schema.names}, **columns}).cast(table.schema)
        return StepOutput(kept, no_rows(DROPPED), changed=len(new_ids))

    def _normal(self, text: pl.Expr) -> pl.Expr:
        if self.mojibake:
            text = _where(r"[^\x00-\x7F]", _repair, text)
        if self.control_characters:
            text = text.str.replace_all(NEWLINE, "\n").str.replace_all(INVISIBLE, "")
        if self.nfc:
            text = text.str.normalize("NFC")
        if self.redact:
            text = _where(hint(self.redact), lambda found: redact(found, self.redact)[0], text)
        return text


def _where(pattern: str, change: Callable[[str], str], text: pl.Expr) -> pl.Expr:
    """`change` on the texts that match `pattern`: polars passes over the others faster than Python looks at them."""

    def change_matching(texts: pl.Series) -> pl.Series:
        found = texts.str.contains(pattern)
        changed = texts.filter(found).map_elements(change, pl.String)
        return texts.clone().scatter(found.arg_true(), changed)

    return text.map_batches(change_matching, pl.String, is_elementwise=True)


def _repair(text: str) -> str:
    import ftfy

    return ftfy.fix_encoding(text)
