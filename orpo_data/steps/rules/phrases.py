"""Phrases by which English answers refuse, or speak of themselves as a model, as regular expressions of polars."""

_CANNOT = (
    r"\bI(?: can(?:no|')?t| can not|(?: am|'m)(?: \w+)? (?:unable|not able|not going) to| will not| won't|'ll not)"
    r" (?:\w+ ){0,3}?"
)
_DO = (
    r"(?:assist|help(?: you| with|[.,!])|provide|fulfill|comply|support|answer|respond|engage|generate|create|write"
    r"|discuss|offer|give|share|tell you (?:how|where|who)|participate|do (?:that|this)|encourage|promote|condone)"
)

REFUSAL = "(?i)" + "|".join(
    (
        _CANNOT + _DO,
        r"\bI(?:'m| am) not (?:comfortable|willing)\b",
        r"\bI (?:don't|do not) feel comfortable\b",
        r"\bI(?:'d| would) (?:really )?(?:rather|prefer) not\b",
        r"\bI must (?:decline|refuse)\b",
    )
)

_MODEL = r"(?:AI|artificial intelligence|(?:AI |large )?language model)\b"

BOILERPLATE = "(?i)" + "|".join(
    (
        r"\bas an? (?:[\w-]+,? ){0,4}language model\b",
        r"\bas an? (?:AI|artificial intelligence)(?: \w+){0,3},? I\b",
        rf"\bI(?:'m| am) (?:just |only |merely |simply )?an? {_MODEL}",
        r"\b(?:my|of my last) (?:knowledge (?:cut-?off|update)|training data)\b",
        r"\bI (?:don't|do not) have (?:access to )?(?:real-time|personal (?:opinions|beliefs|feelings|experiences))\b",
    )
)
