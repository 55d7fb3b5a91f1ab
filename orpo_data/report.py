"""The pages of a dataset folder: README.md, its card, and report.html, which answers by itself what came in, what was
dropped and why, what a row looks like, and what may be wrong with it.

What stands on them is found by the modules of orpo_data.pages, one a part.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orpo_data.chain import Node, raw_rows, read_sound_chain, title
from orpo_data.manifest import Manifest
from orpo_data.pages import samples
from orpo_data.pages.card import card
from orpo_data.pages.charts import Histogram, Numbers, length_histogram, value_histogram
from orpo_data.pages.effects import effects
from orpo_data.pages.flow import flow
from orpo_data.pages.glossary import COLUMNS, MEANINGS, STEPS
from orpo_data.pages.limits import known_limits
from orpo_data.pages.measures import KINDS, Measures, kind_of, measure
from orpo_data.pages.render import render
from orpo_data.pages.rows import Row, Rows, read_dropped, read_input_rows, read_rows

MOST_MODELS = 20


def write_pages(folder: Path, manifest: Manifest) -> None:
    """Write README.md and report.html into a dataset folder whose shards are closed but whose manifest is not there."""
    chain, rows = read_sound_chain(folder, manifest), read_rows(folder, manifest)
    source = read_input_rows(chain)
    with ThreadPoolExecutor(1) as aside:  # both look at all rows, each on one core
        choice = aside.submit(_choose, rows, source)
        measures = measure(rows)
    (folder / "README.md").write_bytes(card(chain, measures).encode())
    (folder / "report.html").write_bytes(report(chain, measures, rows, source, choice.result()).encode())


@dataclass(frozen=True)
class Choice:
    """A random choice of rows; `texts` has those that tokenized rows were made of, by id."""

    rows: list[Row]
    texts: dict[str, Row]


def _choose(rows: Rows, source: Rows | None) -> Choice:
    chosen = samples.random_rows(rows)
    tokenized = kind_of(rows.tables[0].schema) == "tokenized"
    return Choice(chosen, samples.texts_of(source, chosen) if tokenized else {})


def report(chain: Sequence[Node], measures: Measures, rows: Rows, source: Rows | None, choice: Choice) -> str:
    """report.html of the last dataset of the chain.

    The template gets no figures of every row: what it gets lives on in cycles, until the next full collection.
    """
    folder, manifest = chain[-1].path, chain[-1].manifest
    dropped = read_dropped(folder, manifest)
    models = _models(measures)
    return render(
        "report.html.jinja",
        title=title(manifest),
        about=KINDS[measures.kind],
        manifest=manifest,
        chain=chain,
        raw_rows=raw_rows(chain),
        lost=sum(sum(node.manifest.drop_reasons.values()) for node in chain),
        kind=measures.kind,
        rows_by_source=measures.by_source(),
        largest_sources=measures.largest_sources(),
        flagged_rows=measures.flagged_rows,
        flagged=measures.flagged,
        findings=measures.flags,
        flow=flow(chain),
        effects=effects(manifest, measures, dropped, source),
        dropped=samples.dropped_rows(dropped, manifest.drop_reasons, rows),
        overlaps=samples.overlaps(dropped),
        contaminated=sum(n for reason, n in manifest.drop_reasons.items() if reason.startswith(samples.CONTAMINATED)),
        limits=known_limits(chain, measures),
        flags=samples.flagged_rows(rows, {rule: measures.flagged_at[rule] for rule in measures.flagged}),
        schema=[(field.name, str(field.type), COLUMNS.get(field.name, "")) for field in measures.schema],
        groups=[Group("A random choice", choice.rows), *_extremes(rows, measures)],
        texts=choice.texts,
        changes=samples.changed_rows(rows, source) if any(step.changed for step in manifest.steps) else [],
        charts=list(_charts(measures)),
        models=models[:MOST_MODELS],
        more_models=len(models[MOST_MODELS:]),
        step_meanings=STEPS,
        meanings=MEANINGS,
    )


@dataclass(frozen=True)
class Group:
    """Rows that are shown for the same reason."""

    title: str
    rows: list[Row]


def _extremes(rows: Rows, measures: Measures) -> Iterator[Group]:
    """Rows that stand out."""
    extremes = {
        "Labels most in doubt": ("label_noise", True),
        "Smallest margins": ("margin", False),
        "Longest prompts": ("prompt_characters", True),
    }
    for name, (column, highest) in extremes.items():
        if measures.kind == "pairs" and measures.finite(column).any():
            yield Group(name, samples.extreme_rows(rows, measures.numbers[column], highest=highest))


@dataclass(frozen=True)
class Chart:
    """A picture with its heading, and the digits that its figures need."""

    caption: str
    histogram: Histogram
    digits: int = 0


def _charts(measures: Measures) -> Iterator[Chart]:
    """Lengths, then scores and margins of each source in its own unit, then how doubtful the labels are."""
    unit = "tokens" if measures.kind == "tokenized" else "characters"
    lengths = {name: measures.numbers.get(f"{name}_{unit}") for name in ("prompt", "chosen", "rejected")}
    answers = {"answers": measures.numbers.get("answer_characters")} if measures.kind == "rated" else lengths
    # the two sides in one chart: their difference is what a model may learn instead of the preference
    for series in ({"prompt": lengths["prompt"]}, {name: answers[name] for name in answers if name != "prompt"}):
        known = {name: values for name, values in series.items() if values is not None}
        if known and (chart := length_histogram(known)):
            yield Chart(f"Rows by {unit} of the {' and '.join(known)} (logarithmic axis)", chart)
    yield from _score_charts(measures)
    noise = measures.finite("label_noise")
    if len(noise) and (chart := value_histogram({"label_noise": noise})):
        yield Chart("Rows by label_noise: 0 nothing speaks against the label, 1 everything does", chart, 2)


def _score_charts(measures: Measures) -> Iterator[Chart]:
    if "score_chosen" not in measures.numbers:
        return
    for source in measures.largest_sources():
        rows = (measures.sources == source).to_numpy()
        own: dict[str, Numbers] = {
            name: measures.numbers[name][rows] for name in ("score_chosen", "score_rejected", "margin")
        }
        if not np.isfinite(own["margin"]).any():
            continue
        sides = {side: own[f"score_{side}"] for side in ("chosen", "rejected")}
        for caption, series in ((f"Scores in {source}", sides), (f"Margins in {source}", {"margin": own["margin"]})):
            finite = {name: values[np.isfinite(values)] for name, values in series.items()}
            if chart := value_histogram(finite):
                yield Chart(f"{caption}, in the source's unit", chart, 2)


@dataclass(frozen=True)
class Model:
    """How often a model's answers stand on each side."""

    name: str
    chosen: int
    rejected: int
    answers: int

    @property
    def rows(self) -> int:
        return self.chosen + self.rejected + self.answers


def _models(measures: Measures) -> list[Model]:
    """The models with the most answers first."""
    sides = [measures.models.get(side, Counter()) for side in ("chosen", "rejected", "answers")]
    names = {name for side in sides for name in side}
    found = [Model(name, *(side[name] for side in sides)) for name in names]
    return sorted(found, key=lambda model: (-model.rows, model.name))
