"""The card of a dataset folder: README.md in the form of the Hugging Face hub. It holds no text of any row."""

from collections.abc import Sequence
from typing import Any

import yaml

from orpo_data.chain import Node, raw_rows, title
from orpo_data.manifest import Manifest
from orpo_data.pages.glossary import COLUMNS
from orpo_data.pages.limits import known_limits
from orpo_data.pages.measures import KINDS, Measures
from orpo_data.pages.render import render
from orpo_data.pages.upstream import SourceOfRows, public_recipe, sources_of

OTHER = "other"  # the hub's word for a licence that it does not list, or that nobody stated


def card(chain: Sequence[Node], measures: Measures) -> str:
    """README.md of the last dataset of the chain."""
    manifest = chain[-1].manifest
    sources = sources_of(manifest, measures.by_source())
    return render(
        "README.md.jinja",
        front_matter=yaml.safe_dump(front_matter(manifest, sources), sort_keys=False, allow_unicode=True),
        title=title(manifest),
        manifest=manifest,
        chain=chain,
        raw_rows=raw_rows(chain),
        about=KINDS[measures.kind],
        columns=[(name, COLUMNS.get(name, "")) for name in measures.schema.names],
        sources=sources,
        rows_by_source=measures.by_source(),
        limits=known_limits(chain, measures),
        recipe=fenced(yaml.safe_dump(public_recipe(manifest.recipe), sort_keys=False, allow_unicode=True), "yaml"),
    )


def front_matter(manifest: Manifest, sources: Sequence[SourceOfRows]) -> dict[str, Any]:
    """The card's YAML, by which the hub finds, sizes and opens the data."""
    files = [{"split": name, "path": f"{name}/data-*.arrow"} for name in manifest.splits]
    licences = sorted({source.upstream.licence or OTHER for source in sources}) or [OTHER]
    languages = sorted({source.upstream.language for source in sources if source.upstream.language})
    known = all(source.upstream.language for source in sources)
    return {
        "pretty_name": title(manifest),
        **({"language": languages} if languages and known else {}),
        "license": licences[0] if len(licences) == 1 else licences,
        "task_categories": ["text-generation"],
        "size_categories": [size_category(manifest.rows)],
        "tags": ["preference", "orpo", "dpo", "rlhf", *sorted({source.dataset for source in sources})],
        "configs": [{"config_name": "default", "data_files": files or [{"split": "train", "path": "data-*.arrow"}]}],
    }


def size_category(rows: int) -> str:
    """The hub's name for an order of magnitude."""
    power = next((n for n in range(3, 13) if rows < 10**n), 13)
    names = {n: f"{10 ** (n % 3)}{'KMBT'[n // 3 - 1]}" for n in range(3, 13)}
    if power == 3:
        return "n<1K"
    return f"n>{names[12]}" if power == 13 else f"{names[power - 1]}<n<{names[power]}"


def fenced(text: str, language: str) -> str:
    """A block of code behind a fence that no line of it can close."""
    fence = "`" * 3
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}{fence}\n"
