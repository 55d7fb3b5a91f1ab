"""Which language a text is in, by py3langid: its model lies inside the package, nothing is fetched.

Chosen for saying little of short texts: "OK." is no language with any confidence, where fastText's small model is ten
times as fast, but sure that it is Polish. A text in two languages often counts as the one in the rarer script.

Only the languages with a two-letter code are told apart. The model's others are dialects and creoles, which it sees in
short texts of the large languages: "Search for Halsey songs" was Nigerian Pidgin.
"""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

NO_LANGUAGE = "zxx"  # ISO 639-2: no linguistic content, such as numbers and program text
ENOUGH = 1_000  # characters that are read of a text


@cache
def _identifier() -> "LanguageIdentifier":
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([code for code in identifier.labels if len(code) == 2 or code == NO_LANGUAGE])
    return identifier


def known_languages() -> set[str]:
    """Their ISO 639-1 codes."""
    return set(_identifier().labels) - {NO_LANGUAGE}


def identify(text: str) -> tuple[str, float]:
    """The language's ISO 639-1 code and how sure that is, 0..1; short texts are never sure."""
    language, confidence = _identifier().classify(text[:ENOUGH])
    return language, float(confidence)
