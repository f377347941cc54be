"""All pages of the site in Chromium, wide and narrow: they fit and ask nobody for anything."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import FOUND, Browser, Tab, browser

from regrow.project import ROOT

TOOLS = ROOT / "build" / "site-tools"
pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="chromium is not installed"),
    pytest.mark.skipif(not (TOOLS / "complete").exists(), reason="make site installs zensical"),
    pytest.mark.slow,
]
# The widths of the page's content, and of each table that its frame cuts with that of the frame.
WIDTHS = """(() => ({
  page: document.documentElement.scrollWidth,
  cut: [...document.querySelectorAll('.md-typeset table')]
    .map((it) => [it.scrollWidth, it.closest('.md-typeset__scrollwrap')?.clientWidth ?? 0])
    .filter(([table, frame]) => table > frame + 1),
  tables: document.querySelectorAll('.md-typeset table').length,
}))()"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, str(ROOT / "docs" / "site" / "build.py"), str(folder)]
    subprocess.run(build, env={**os.environ, "PYTHONPATH": str(TOOLS)}, check=True)
    return folder / "html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


def faults(tab: Tab, page: Path, width: int) -> tuple[list[Any], int]:
    """Return what is wrong with a page at a width, and the number of its tables."""
    tab.open(page, width=width)
    found = tab.value(WIDTHS)
    wrong: list[Any] = [f"{page.name}: {found['page']} wide"] if found["page"] > width else []
    wrong += [f"{page.name}: {it}" for it in found["cut"]] if width == 1280 else []
    return wrong + [it for it in tab.requests if not it.startswith("file:")], found["tables"]


@pytest.mark.parametrize("width", [1280, 390])
def test_every_page_of_the_site_fits(chromium: Browser, html: Path, width: int) -> None:
    tab = Tab(chromium)
    pages = sorted(html.rglob("*.html"))
    found = [faults(tab, page, width) for page in pages]
    tab.close()
    assert [fault for wrong, _ in found for fault in wrong] == []
    assert len(pages) > 50 and sum(count for _, count in found) > 50


def test_a_wide_page_a_wide_table_and_a_request_elsewhere_are_found(
    chromium: Browser, tmp_path: Path
) -> None:
    """The negative control."""
    page = tmp_path / "page.html"
    page.write_text(
        '<div class="md-typeset"><div class="md-typeset__scrollwrap" style="overflow: auto">'
        '<table style="width: 1500px"><tr><td>a</table></div></div>'
        '<img src="http://127.0.0.1:9/x.png"><p style="width: 1400px">wide'
    )
    tab = Tab(chromium)
    wide, cut, asked = faults(tab, page, 1280)[0]
    tab.close()
    assert "wide" in wide and "[1500," in cut and asked == "http://127.0.0.1:9/x.png"
