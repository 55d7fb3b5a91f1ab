"""What may be wrong with a dataset, said in sentences: what was measured, what was not looked for, what is known."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from orpo_data.chain import Node
from orpo_data.pages.measures import Measures
from orpo_data.pages.render import figure, percent
from orpo_data.pages.upstream import sources_of
from orpo_data.schema import TOKEN_STAGES

NOISY = 0.5

JUDGED_STAGES = ("clean", "split", *TOKEN_STAGES)
NOT_LOOKED_FOR = {
    "dedup": "Duplicates and near-duplicates were not removed: a prompt may stand many times on its side of the split.",
    "decontaminate": "The prompts were not compared with any evaluation set. Questions of TruthfulQA and MT-Bench are "
    "known to be in published preference data, so scores on such tests may be too good.",
    "label_noise": "The labels were taken as they are: nothing was scored for how likely they are wrong.",
}
"""Steps that a recipe can leave out, and what it means that they were."""


class Limit(NamedTuple):
    """`measured` is false where the sentence tells what nobody looked at."""

    title: str
    text: str


def known_limits(chain: Sequence[Node], measures: Measures) -> list[Limit]:
    """The most particular to this dataset first, what holds of its sources last."""
    manifest = chain[-1].manifest
    found = [*_labels(measures), *_flags(measures), *_truncation(measures), *_lengths(measures), *_scores(measures)]
    if manifest.stage in JUDGED_STAGES:
        found += _left_out(chain)
    for source in sources_of(manifest, measures.by_source()):
        found += [Limit(source.label, caveat) for caveat in source.upstream.caveats]
        if source.upstream.licence is None:
            found.append(Limit(source.label, "Its licence, language and origin are for its owner to state."))
    return found


def _labels(measures: Measures) -> Iterator[Limit]:
    noise = measures.finite("label_noise")
    if len(noise):
        rows = int((noise >= NOISY).sum())
        yield Limit(
            "Doubtful labels",
            f"label_noise is {NOISY} or more in {rows:,} of {len(noise):,} scored rows ({percent(rows, len(noise))}). "
            "The score drops nothing: sort or filter by the column. It weighs simple signals and is no second "
            "opinion of a person.",
        )


def _flags(measures: Measures) -> Iterator[Limit]:
    if measures.flagged_rows:
        rules = ", ".join(f"{rows:,} {rule}" for rule, rows in measures.flagged.items())
        yield Limit(
            "Flagged rows",
            f"Kept with a flag: {measures.flagged_rows:,} of {measures.rows:,} rows "
            f"({percent(measures.flagged_rows, measures.rows)}): {rules}. The column flags says which rule, which side "
            "and what it measured.",
        )


def _truncation(measures: Measures) -> Iterator[Limit]:
    if measures.kind != "tokenized":
        return
    cut = {side: int(measures.numbers[f"{side}_truncated"].sum()) for side in ("chosen", "rejected")}
    if any(cut.values()):
        yield Limit(
            "Cut answers",
            f"Answers cut at the length limit, without their end and end of turn: {cut['chosen']:,} chosen, "
            f"{cut['rejected']:,} rejected.",
        )
    if shortened := int((measures.numbers["prompt_turns_dropped"] > 0).sum()):
        yield Limit("Shortened prompts", f"Prompts that lost their oldest turns to the length limit: {shortened:,}.")


def _lengths(measures: Measures) -> Iterator[Limit]:
    unit = "tokens" if measures.kind == "tokenized" else "characters"
    chosen, rejected = (measures.numbers.get(f"{side}_{unit}") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or not len(chosen):
        return
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    if abs(longer - shorter) > 0.1 * len(chosen):
        which, rows = ("longer", longer) if longer > shorter else ("shorter", shorter)
        yield Limit(
            "Length tells the label",
            f"The chosen answer is the {which} one in {percent(rows, len(chosen))} of the rows: a model may learn the "
            "length instead of the quality.",
        )


def _scores(measures: Measures) -> Iterator[Limit]:
    margins = measures.finite("margin")
    if measures.kind == "pairs" and 0 < len(margins) < measures.rows:
        scored = f"{len(margins):,} of {measures.rows:,}"
        yield Limit("Scores", f"Only {scored} rows have scores; of the others only the label is known.")
    if against := int((margins < 0).sum()):
        yield Limit(
            "Scores against labels",
            f"Rows whose rejected answer has the higher score: {against:,} (by up to {figure(float(-margins.min()))}).",
        )


def _left_out(chain: Sequence[Node]) -> Iterator[Limit]:
    """Only where the whole way is known: else a step may have been run before what can be seen."""
    if chain[0].manifest.stage != "ingest":
        return
    done = {step.step for node in chain for step in node.manifest.steps}
    for step, text in NOT_LOOKED_FOR.items():
        if step not in done:
            yield Limit("Not looked for", text)
