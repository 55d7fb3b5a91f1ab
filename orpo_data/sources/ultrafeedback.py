"""UltraFeedback (openbmb/UltraFeedback): one instruction, answers of several models, each rated on four aspects."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from orpo_data.schema import ASPECTS, RATED
from orpo_data.sources.columns import (
    NULL,
    Fields,
    Found,
    Odd,
    Rows,
    Turns,
    field,
    get,
    listed,
    lists,
    numbers,
    of_type,
    optional,
    strings,
    texts,
    to_arrow,
)
from orpo_data.sources.record import Record, Unparsable, excerpt, json_name, number, text

SCHEMA = RATED
EXCLUDE: tuple[str, ...] = ()
COLUMNS = {"instruction": ("instruction",), "completions": ("completions",), "subset": ("source",)}

NOT_RATED = ("", "N/A")
ASPECT_SCALE = (1, 5)
OVERALL_SCALE = (0, 10)  # the critic was asked for 1 to 10, and gave less at times


def parse(record: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The content columns of a RATED row; raises Unparsable."""
    fields = Record(record, columns, COLUMNS)
    completions = fields.require("completions")
    if not isinstance(completions, list):
        raise Unparsable(f"column {fields.names('completions')[0]!r} is {json_name(completions)}, not a list")
    return {
        "prompt": [{"role": "user", "content": fields.text("instruction")}],
        "completions": [_completion(value, f"completions[{i}]") for i, value in enumerate(completions)],
        "subset": fields.optional_text("subset"),
    }


def _completion(value: Any, where: str) -> dict[str, Any]:
    fields = _object(value, where)
    annotations = fields.get("annotations")
    annotations = {} if annotations is None else _object(annotations, f"{where}.annotations")
    return {
        "model": _optional_text(fields, "model", where),
        "response": text(fields.get("response"), f"{where}.response"),
        "system_prompt": _optional_text(fields, "custom_system_prompt", where),
        "overall_score": rating(fields.get("overall_score"), f"{where}.overall_score", OVERALL_SCALE),
        **{aspect: _aspect(annotations.get(aspect), f"{where}.annotations.{aspect}") for aspect in ASPECTS},
    }


def _aspect(value: Any, where: str) -> float | None:
    """The rating of one aspect: an object, or as once published a list of one object."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return None if value is None else rating(_object(value, where).get("Rating"), f"{where}.Rating", ASPECT_SCALE)


def rating(value: Any, where: str, scale: tuple[int, int]) -> float | None:
    """A number on `scale`, published as a string at times; null for "N/A" or a missing one.

    One off the scale costs the whole prompt: whatever it meant, the answer cannot be ranked, nor can it be left out
    without making another one the best or the worst.
    """
    if value is None or (isinstance(value, str) and value.strip().upper() in NOT_RATED):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Unparsable(f"{where} is {excerpt(value)}, neither a number nor 'N/A'") from None
    figure, (least, most) = number(value, where), scale
    if not least <= figure <= most:
        raise Unparsable(f"{where} is {figure:g}, not within {least} to {most}")
    return figure


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Unparsable(f"{where} is {json_name(value)}, not an object")
    return value


def _optional_text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if fields.get(key) is None else text(fields[key], f"{where}.{key}")


def fields(found: Found) -> Fields:
    """What the rows need of many records: a value each, or one for each answer; raises Odd."""
    completions = found.get("completions")
    return {
        "instruction": found.text("instruction"),
        "subset": found.optional_text("subset"),
        **(_answers_in_column if isinstance(completions, pa.Array) else _answers_in_list)(completions),
    }


def _answers_in_list(completions: Sequence[Any]) -> Fields:
    completions = of_type(completions, list)
    answers = of_type(chain.from_iterable(completions), dict)
    annotations = _objects(get(answers, "annotations"))
    return {
        "answers": [*map(len, completions)],
        "model": of_type(get(answers, "model"), str, NULL),
        "response": of_type(get(answers, "response"), str),
        "system_prompt": of_type(get(answers, "custom_system_prompt"), str, NULL),
        "overall_score": _ratings(get(answers, "overall_score"), OVERALL_SCALE),
        **{aspect: _aspects(get(annotations, aspect)) for aspect in ASPECTS},
    }


def _answers_in_column(completions: pa.Array) -> Fields:
    answers = listed(completions)
    annotations = field(answers, "annotations")
    return {
        "answers": completions.value_lengths(),
        "model": optional(field(answers, "model"), pa.string()),
        "response": strings(field(answers, "response")),
        "system_prompt": optional(field(answers, "custom_system_prompt"), pa.string()),
        "overall_score": _coded_ratings(field(answers, "overall_score"), OVERALL_SCALE),
        **{aspect: _coded_ratings(field(field(annotations, aspect), "Rating"), ASPECT_SCALE) for aspect in ASPECTS},
    }


def rows(fields: Fields) -> Rows:
    """`parse` for many."""
    answers = {name: texts(fields[name]) for name in ("model", "response", "system_prompt")}
    answers |= {name: numbers(fields[name]) for name in ("overall_score", *ASPECTS)}
    completions = pa.StructArray.from_arrays([*map(to_arrow, answers.values())], [*answers])
    columns = {
        "prompt": Turns.every("user", texts(fields["instruction"])).to_arrow(),
        "completions": lists(completions, np.array(fields["answers"], np.int64)),
        "subset": to_arrow(texts(fields["subset"])),
    }
    return Rows(columns, np.zeros(len(fields["instruction"]), np.bool_))


def _objects(values: Sequence[Any]) -> list[dict[str, Any]]:
    """Objects, empty ones for nulls."""
    objects = of_type(values, dict, NULL)
    return [value or {} for value in objects] if NULL in {*map(type, objects)} else objects


def _aspects(values: Sequence[Any]) -> list[float | None]:
    """`_aspect` for many."""
    if list in {*map(type, values)}:
        values = [value[0] if type(value) is list and len(value) == 1 else value for value in values]
    return _ratings(get(_objects(values), "Rating"), ASPECT_SCALE)


def _ratings(values: Sequence[Any], scale: tuple[int, int]) -> list[float | None]:
    """`rating` for many, asked once for each different value."""
    different = set(of_type(values, str, int, float, NULL))
    if 0 in different:  # which of 0 and -0.0?
        raise Odd
    try:
        known = {value: rating(value, "", scale) for value in different}
    except Unparsable:
        raise Odd from None
    return [*map(known.__getitem__, values)]


def _coded_ratings(values: pa.Array, scale: tuple[int, int]) -> pa.Array:
    if pa.types.is_nested(values.type):
        raise Odd
    coded = values.dictionary_encode()
    return pa.array(_ratings(coded.dictionary.to_pylist(), scale), pa.float64()).take(coded.indices)
