"""How pages for people are drawn: templates that escape everything, under a policy that lets nothing else in.

A page is one file. It loads nothing, and runs at most the one script that came with it: the policy in its head names
the hashes of its own style and script, so nothing that data might smuggle in takes effect. The same values give the
same bytes.
"""

import base64
import hashlib
import html
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from orpo_data.chain import record_name
from orpo_data.pages.charts import CHART_HEIGHT, CHART_WIDTH
from orpo_data.pages.upstream import public

TEMPLATES = Path(__file__).parent
ELLIPSIS = "…"


def shorten(text: object, limit: int) -> str:
    """At most `limit` characters of a text, its beginning and its end: a transcript's last turn matters most."""
    whole = str(text)
    if len(whole) <= limit:
        return whole
    half = limit // 2
    return f"{whole[:half]} {ELLIPSIS} ({len(whole) - 2 * half:,} characters left out) {ELLIPSIS} {whole[-half:]}"


def preview(text: object, limit: int = 140) -> str:
    """The beginning of a text on one line."""
    line = " ".join(str(text)[: 4 * limit].split())
    return line if len(line) <= limit else f"{line[:limit].rstrip()}{ELLIPSIS}"


def markdown(text: object) -> Markup:
    """A text as one line of Markdown, in a table too, that means nothing but itself."""
    line = html.escape(" ".join(str(text).split()), quote=False).replace("|", "&#124;")
    return Markup(re.sub(r"([\\`*_\[\]~$])", r"\\\1", line))


def figure(value: float | None, digits: int = 4) -> str:
    """A measured value with as many digits as mean something; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,.{digits}g}" if abs(value) < 1e4 else f"{value:,.0f}"


def percent(part: float, whole: float) -> str:
    """A share, never rounded to nothing or to everything."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    return f"{min(share, 99.9) if part < whole else share:.1f} %"


def _thousands(number: float, digits: int = 0) -> str:
    return f"{number:,.{digits}f}"


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "thousands": _thousands,
        "shorten": shorten,
        "preview": preview,
        "markdown": markdown,
        "figure": figure,
        "zip": zip,
        "policy_hash": _policy_hash,
        "public": public,
        "record_name": record_name,
        "url_path": lambda path: quote(str(path), safe="/"),
    }
    style, search = (Markup((TEMPLATES / name).read_text("utf-8")) for name in ("style.css", "search.js"))
    environment.globals |= {
        "chart_width": CHART_WIDTH,
        "chart_height": CHART_HEIGHT,
        "percent": percent,
        "style": style,
        "search_script": search,
    }
    return environment
