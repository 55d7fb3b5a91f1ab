"""Everything that a page names is explained."""

from orpo_data.manifest import read_manifest
from orpo_data.pages.glossary import COLUMNS, MEANINGS, STEPS
from orpo_data.pages.limits import NOT_LOOKED_FOR
from orpo_data.schema import JUDGED, PAIRS, RATED, REFERENCED
from orpo_data.steps.clean import Clean


def test_every_column():
    assert set(COLUMNS) == {name for schema in (RATED, PAIRS, JUDGED, REFERENCED) for name in schema.names}


def test_every_rule_of_the_cleaning():
    assert {field.default.name for field in Clean.model_fields.values()} <= set(MEANINGS)


def test_every_step_and_reason_of_a_whole_run(prepared):
    for stage in ("ingest/hh-rlhf", "ingest/ultrafeedback", "binarize", "clean", "split", "tokenize"):
        for step in read_manifest(prepared / stage).steps:
            assert step.step in STEPS
            assert set(step.dropped) <= set(MEANINGS)


def test_steps_that_can_be_left_out_are_steps():
    assert set(NOT_LOOKED_FOR) <= set(STEPS)
