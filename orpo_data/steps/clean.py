"""What a preference pair must be like before anyone trains on it, and what one should know of it.

Each rule judges the pair and says which side failed, with what it measured. The first rule set to `drop` that fails
names the reason; what rules set to `flag` find in the pairs that are left is written down in the column `flags`.
After this step `chosen` and `rejected` are exactly one assistant message that answers the user's last turn.
"""

from typing import ClassVar

import pyarrow as pa
from pydantic import Field

from orpo_data.steps.flags import arrow, each_row, judged, rows_by_rule
from orpo_data.steps.rules import content, structure
from orpo_data.steps.rules.judge import judge
from orpo_data.steps.rules.rule import Rule, rows_to_judge
from orpo_data.steps.step import Step, StepOutput, dropped_rows


class Clean(Step):
    """Its settings are the rules, in the order in which they name the reason: {action: drop, flag or off, ...}.

    On by default are those of the ORPO paper (empty sides, identical pairs), those without which a dialogue is none,
    and ties. The others are a matter of taste and data.
    """

    name: ClassVar[str] = "clean"
    version: ClassVar[int] = 5

    empty_turn: structure.EmptyTurn = structure.EmptyTurn()
    ends_with_human: structure.EndsWithHuman = structure.EndsWithHuman()
    not_alternating: structure.NotAlternating = structure.NotAlternating()
    diverges_early: structure.DivergesEarly = structure.DivergesEarly()
    identical_pair: structure.IdenticalPair = structure.IdenticalPair()
    identical_after_normalisation: structure.IdenticalAfterNormalisation = structure.IdenticalAfterNormalisation()
    ties: structure.Tie = Field(default=structure.Tie(), description="The rule `tie`: pairs with two equal scores.")
    low_margin: structure.LowMargin = structure.LowMargin()
    role_label_in_text: content.RoleLabelInText = content.RoleLabelInText()
    too_short: content.TooShort = content.TooShort()
    too_long: content.TooLong = content.TooLong()
    length_ratio: content.LengthRatio = content.LengthRatio()
    repetition: content.Repetition = content.Repetition()
    refusal: content.Refusal = content.Refusal()
    boilerplate: content.Boilerplate = content.Boilerplate()
    personal_data: content.PersonalData = content.PersonalData()
    language: content.Language = content.Language()

    def apply(self, table: pa.Table) -> StepOutput:
        """PAIRS or JUDGED to JUDGED."""
        rules = self.rules()
        found = judge(rules, rows_to_judge(table))
        dropped_for = found.filter(action="drop").unique("row", keep="first", maintain_order=True)
        flagged = found.filter(action="flag").join(dropped_for, on="row", how="anti", maintain_order="left")
        reasons, details = (
            arrow(each_row(dropped_for, column, len(table)), pa.string()) for column in ("rule", "detail")
        )
        rows = judged(table, flagged, [rule.name for rule in rules])
        fails = reasons.is_valid()
        dropped = dropped_rows(self.name, table.filter(fails), reasons.drop_null(), details.drop_null())
        return StepOutput(rows.filter(reasons.is_null()), dropped, flagged=rows_by_rule(flagged))

    def rules(self) -> list[Rule]:
        """Those that are not off, in the order in which they name the reason."""
        settings = (getattr(self, name) for name in type(self).model_fields)
        return [rule for rule in settings if isinstance(rule, Rule) and rule.action != "off"]
