"""Personal data and secrets in text: found by their form, and by a check digit or range where they have one.

What is reserved for examples or belongs to nobody in particular is passed over: example.com, private addresses,
toll-free numbers. Names, postal addresses and national identity numbers are not looked for: patterns cannot tell them.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

Kind = Literal["secret", "email", "iban", "credit_card", "ip", "phone"]


class Pattern(NamedTuple):
    form: re.Pattern[str]  # bounded runs only, anchored where a run begins: linear in the text, however hostile
    holds: Callable[[str], bool]  # whether a match is what it looks like
    hint: str  # what a text must contain to be worth a look, as a regular expression of polars


def _always(match: str) -> bool:
    return True


SECRETS = (
    r"-----BEGIN (?:[A-Z]{1,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z ]{1,40}-----|\Z)",  # PEM, PGP
    r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # Amazon
    r"\b(?:gh[pousr]_[0-9A-Za-z]{36,255}|github_pat_[0-9A-Za-z_]{22,255})\b",  # GitHub
    r"\bsk-(?=[\w-]{0,200}\d)[0-9A-Za-z_-]{20,200}\b",  # OpenAI, Anthropic and their like
    r"\b[sr]k_live_[0-9A-Za-z]{16,255}\b",  # Stripe
    r"\bAIza[0-9A-Za-z_-]{35}",  # Google
    r"\bxox[abeoprs]-[0-9A-Za-z-]{10,255}\b",  # Slack
    r"\bhf_[0-9A-Za-z]{30,255}\b",  # Hugging Face
    r"\beyJ[0-9A-Za-z_-]{10,2000}\.eyJ[0-9A-Za-z_-]{10,4000}\.[0-9A-Za-z_-]{10,1000}",  # a signed JSON web token
)

RESERVED_DOMAIN = re.compile(r"(?:^|\.)(?:example\.(?:com|net|org)|example|test|invalid|localhost)$")  # RFC 2606


def _real_domain(email: str) -> bool:
    return not RESERVED_DOMAIN.search(email.rpartition("@")[2].lower())


def _iban(text: str) -> bool:
    """ISO 13616: the country moved behind the number, letters as 10..35, leaves 1 modulo 97."""
    code = text.replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


ISSUERS = re.compile(r"4\d{15}|5[1-5]\d{14}|2[2-7]\d{14}|6(?:011|5\d\d)\d{12}|3[47]\d{13}")


def _credit_card(text: str) -> bool:
    """The length and first digits of a large issuer, and Luhn's check digit (ISO/IEC 7812)."""
    digits = re.sub(r"\D", "", text)
    doubled = [int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits))]
    return ISSUERS.fullmatch(digits) is not None and sum(d // 10 + d % 10 for d in doubled) % 10 == 0


def _public_address(text: str) -> bool:
    """An address that is routed in the public internet: `1::2` and the like stand in program text."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and (address.version == 4 or address in ipaddress.IPv6Network("2000::/3"))


TOLL_FREE = re.compile(r"(?:\+?1)?8(?:00|88|77|66|55|44|33)|\+800")  # +855 is Cambodia


def _subscriber(text: str) -> bool:
    """A telephone number of somebody: neither toll-free nor one of those kept for fiction (555-01xx)."""
    digits = re.sub(r"[^\d+]", "", text)
    return len(digits) >= 10 and not TOLL_FREE.match(digits) and not re.fullmatch(r".*55501\d\d", digits)


KINDS: dict[Kind, Pattern] = {  # in the order of redaction: the longer forms first
    "secret": Pattern(
        re.compile("|".join(SECRETS)),
        _always,
        r"PRIVATE KEY|AKIA|ASIA|gh[pousr]_|github_pat_|sk-[0-9A-Za-z_-]{20}|k_live_|AIza|xox[abeoprs]-|hf_|eyJ",
    ),
    "email": Pattern(
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[a-zA-Z\d-]{1,63}\.){1,8}[a-zA-Z]{2,24}(?![\w-])"),
        _real_domain,
        r"@[a-zA-Z\d.-]+\.[a-zA-Z]{2}",
    ),
    "iban": Pattern(
        re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2,7}(?: ?\d{1,3})?\b"), _iban, r"[A-Z]{2}\d{2}(?: ?[A-Z\d]{4}){2}"
    ),
    "credit_card": Pattern(
        re.compile(r"(?<![\d.,/+-])(?:\d[ -]?){13,18}\d(?![\d-]|[.,]\d)"), _credit_card, r"(?:\d[ -]?){14}"
    ),
    "ip": Pattern(
        re.compile(
            r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)"
            r"|(?<![\w.:])[\da-fA-F]{1,4}(?::[\da-fA-F]{0,4}){2,7}(?![\w:])"
        ),
        _public_address,
        r"\d(?:\.\d{1,3}){3}|[\da-fA-F](?::[\da-fA-F]{0,4}){2}",
    ),
    "phone": Pattern(
        re.compile(
            r"(?<![\w.+/-])(?:"
            r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # E.164, written in groups
            r"|(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"  # North America
            r")(?![\w+/-]|\.\d)"
        ),
        _subscriber,
        r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2}|[2-9]\d{2}[) .-]{1,2}[2-9]\d{2}[ .-]\d{4}",
    ),
}


def redact(text: str, kinds: Collection[Kind]) -> tuple[str, dict[Kind, int]]:
    """`text` with [EMAIL], [PHONE] and so on in place of what was found, and how much of each kind that was."""
    found: Counter[Kind] = Counter()
    while True:  # what is redacted can bare its neighbour: a key right behind a card number
        before = found.total()
        for kind, pattern in KINDS.items():
            if kind in kinds:
                text, count = _replace(text, kind, pattern)
                found[kind] += count
        if found.total() == before:
            return text, dict(+found)


def _replace(text: str, kind: Kind, pattern: Pattern) -> tuple[str, int]:
    count = 0

    def placeholder(match: re.Match[str]) -> str:
        nonlocal count
        if not pattern.holds(match.group()):
            return match.group()
        count += 1
        return f"[{kind.upper()}]"

    return pattern.form.sub(placeholder, text), count


def hint(kinds: Collection[Kind]) -> str:
    """A regular expression that every text with one of these kinds matches, for polars to sort out the others."""
    return "|".join(f"(?:{pattern.hint})" for kind, pattern in KINDS.items() if kind in kinds)
