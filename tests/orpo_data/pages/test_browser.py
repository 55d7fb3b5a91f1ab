"""The report in a real browser: it is drawn, its search works, it is whole without scripts, and nothing gets out."""

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from orpo_data.schema import PAIRS

DARK = "--blink-settings=preferredColorScheme=0"
FLOW = (0x8D, 0xB2, 0xD8)  # --flow of style.css, in the light


def simple_attacks(server: str) -> str:
    return f"""<script>document.title = "owned"; fetch("{server}/fetch")</script><img src="{server}/img">
    <link rel="stylesheet" href="{server}/sheet"><style>body {{ background: url({server}/url) }}</style>"""


def attacks(server: str) -> str:
    """Everything that would show itself: by a request, or by another title."""
    return f"""{simple_attacks(server)}
    <img src="x" onerror="document.title = 'owned'"><svg onload="document.title = 'owned'"></svg>
    <iframe src="{server}/frame"></iframe><object data="{server}/object"></object>
    <video src="{server}/video" autoplay></video>
    <form id="f" action="{server}/form"></form><script>document.forms[0].submit()</script><base href="{server}/">
    <a href="javascript:document.title='owned'" ping="{server}/ping" autofocus onfocus="this.click()">x</a>"""


def test_hostile_data_does_nothing(tmp_path, write_dataset, plain_pair, loser, dom, sentinel):
    text = attacks(sentinel.url)
    rows = [plain_pair(f"</summary></details>{text}", (text, text), model_chosen=text)]
    losers = [loser("tie", text, text)]
    write_dataset(tmp_path / "d", PAIRS, {None: rows}, losers, name=text, source=text, facts={text: [text]})
    html = dom(f"file://{tmp_path}/d/report.html")
    assert "owned" not in re.search("<title>(.*?)</title>", html, re.DOTALL)[1].split("clean")[-1]
    assert f"{sentinel.url}/fetch" in html  # the text is there, as text
    assert sentinel.asked == []


def test_nothing_runs_even_if_it_stood_in_the_page_unescaped(tmp_path, write_dataset, plain_pair, dom, sentinel):
    """The policy in the page's head is a second wall: without it the same page gives itself away."""
    write_dataset(tmp_path / "d", PAIRS, {None: [plain_pair()]}, name="mine")
    html = (tmp_path / "d" / "report.html").read_text()
    (tmp_path / "guarded.html").write_text(html.replace("<main>", f"<main>{attacks(sentinel.url)}"))
    assert "<title>mine: clean</title>" in dom(f"file://{tmp_path}/guarded.html")
    assert sentinel.asked == []
    unguarded = re.sub("<meta http-equiv.*?>\n", "", html, count=1)
    (tmp_path / "unguarded.html").write_text(unguarded.replace("<main>", f"<main>{simple_attacks(sentinel.url)}"))
    assert "<title>owned</title>" in dom(f"file://{tmp_path}/unguarded.html")
    assert {"/img", "/sheet", "/url"} <= set(sentinel.asked)


def test_search_shows_the_rows_that_hold_every_word(tmp_path, write_dataset, plain_pair, dom):
    rows = [plain_pair(f"the {plant} number {n}", id=f"{n:032x}") for n, plant in enumerate(["fern", "moss", "fern"])]
    write_dataset(tmp_path / "d", PAIRS, {None: rows})
    url = f"file://{tmp_path}/d/report.html"
    every, found, none, odd = (
        dom(f"{url}{asked}") for asked in ("", "#find=FERN%20number", "#find=fern%20moss", "#find=%")
    )
    assert "6 rows</span>" in every  # a random choice of three, and the three longest
    assert sorted(shown(every)) == [0, 0, 1, 1, 2, 2]
    assert sorted(shown(found)) == [0, 0, 2, 2]
    assert "4 of 6 rows</span>" in found
    assert shown(none) == shown(odd) == []
    assert "0 of 6 rows</span>" in odd


def shown(html: str) -> list[int]:
    """The numbers of the rows that are not hidden."""
    rows = re.findall(r'<details class="row"([^>]*)><summary><span class="preview"[^>]*>the \w+ number (\d)', html)
    return [int(number) for attributes, number in rows if "hidden" not in attributes]


def test_the_page_is_whole_without_scripts(prepared: Path, dom, sentinel, read_page):
    file = prepared / "clean" / "report.html"
    sentinel.pages["/report.html"] = file.read_bytes()
    on, off = dom(f"file://{file}"), dom(f"{sentinel.url}/report.html")
    assert sentinel.asked == ["/report.html"]  # the page, and nothing for it
    assert '<div id="search" hidden' in off
    assert '<div id="search" hidden' not in on
    count = re.search(r'<span data-is="count"[^>]*>(\d+) rows</span>', on)
    assert count
    assert off.count('<details class="row"') == int(count[1])
    assert read_page(off).words == read_page(on.replace(count[0], "")).words


@pytest.mark.parametrize(("width", "dark", "scripts"), [(1100, False, True), (500, True, False)])
def test_the_page_is_drawn(prepared: Path, tmp_path, browse, sentinel, width, dark, scripts):
    """The flow takes its part of the picture, and nothing reaches over the page's right edge."""
    file, picture = prepared / "clean" / "report.html", tmp_path / "page.png"
    sentinel.pages["/report.html"] = file.read_bytes()
    url = f"file://{file}" if scripts else f"{sentinel.url}/report.html"
    browse(url, f"--screenshot={picture}", f"--window-size={width},1600", *([DARK] if dark else []))
    image = Image.open(picture).convert("RGB")
    assert image.width == width
    if not dark:
        assert Counter(image.get_flattened_data())[FLOW] > 0.02 * image.width * image.height
    right_edge = image.crop((width - 6, 80, width, image.height))  # below the navigation
    assert len(set(right_edge.get_flattened_data())) == 1
    assert (sum(right_edge.getpixel((0, 0))) < 3 * 64) == dark
