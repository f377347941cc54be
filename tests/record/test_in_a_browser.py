"""The pages in Chromium: curves to hover over and to zoom into, without network or errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import FOUND, Browser, Tab, browser
from fakes import make_run

from regrow.record import comparison, report, side_by_side
from regrow.record.records import read_metrics

pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="chromium is not installed"),
    pytest.mark.slow,
]
MOST_BYTES = 1_000_000
QUESTIONS = Path(__file__).with_name("in_a_browser.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def tab(chromium: Browser) -> Iterator[Tab]:
    opened = Tab(chromium)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("one") / "run")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a hundred runs whose names are long and odd."""
    folder = tmp_path_factory.mktemp("hundred")
    odd = ["<b>bold</b>", 'it\'s "quoted"', "größe ✓", "long" * 60, "a/b:c?d#e"]
    for index in range(100):
        made = make_run(
            folder / str(index), epochs=30, steps_per_epoch=40, seed=index % 2,
            lr=10 ** (-1 - index // 2 % 10 / 3), speed=2 + index * 7 % 11,
        )  # fmt: skip
        config = yaml.safe_load((made / "config.yaml").read_text())
        config["model"]["act"] = odd[index // 20]
        (made / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [report.load(it) for it in report.find_runs(folder)]
    found = comparison.compare(comparison.rows_of(runs))
    return side_by_side.write_page(found, folder / "comparison.html")


def ask(tab: Tab, call: str) -> Any:
    """Return what a function of in_a_browser.js finds in the page."""
    return tab.value(f"(() => {{{QUESTIONS}\nreturn {call};}})()")


def panel(tab: Tab, title: str) -> dict[str, Any]:
    """Return the place, the range of steps and the ticks of the panel with that title."""
    found = dict(ask(tab, f"panel({json.dumps(title)})"))
    tab.value("0")  # the page hears of its scrolling in the next frame
    return found


def place(of: dict[str, Any], step: float) -> float:
    """Return the x of a step in the window: the margins are the script's."""
    share = (step - of["low"]) / (of["high"] - of["low"])
    return float(of["left"] + 54 + share * (of["width"] - 54 - 20))


def test_the_value_under_the_mouse_is_the_one_of_the_record(tab: Tab, run: Path) -> None:
    tab.open(run / "report.html")
    own = panel(tab, "accuracy")
    values = {line["step"]: line["val/accuracy"] for line in read_metrics(run) if "val/f1" in line}
    assert ask(tab, "told()") == ""
    for step in (40, 160):
        tab.mouse("mouseMoved", place(own, step) + 1, own["top"] + own["height"] / 2)
        told = ask(tab, "told()")
        assert f"step {step}\n" in told and f"val: {float(f'{values[step]:.5g}')!r}" in told
        assert f"{float(f'{values[60]:.5g}')!r}" not in told
    tab.mouse("mouseMoved", 2, 2)
    assert ask(tab, "told()") == ""
    assert tab.requests == [(run / "report.html").resolve().as_uri()]
    assert tab.errors == []
    assert (run / "report.html").stat().st_size < MOST_BYTES


def test_a_request_an_error_and_a_refused_script_would_be_seen(tab: Tab, tmp_path: Path) -> None:
    """The negative control."""
    page = tmp_path / "page.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png"><script>nothing()</script>')
    tab.open(page)
    assert "http://127.0.0.1:9/x.png" in tab.requests
    assert any(event["method"] == "Runtime.exceptionThrown" for event in tab.errors)
    own = report.write(make_run(tmp_path / "run")).read_text()
    page.write_text(own.replace("</body>", "<script>document.title = 'mine'</script></body>"))
    tab.open(page)
    assert tab.value("document.title") != "mine" and tab.errors != []


def test_a_drag_zooms_all_panels_and_a_double_click_shows_all_steps(tab: Tab, run: Path) -> None:
    tab.open(run / "report.html")
    own = panel(tab, "loss")
    y = own["top"] + own["height"] / 2
    tab.mouse("mouseMoved", place(own, 60), y)
    tab.mouse("mousePressed", place(own, 60), y)
    for step in (80, 100, 120):
        tab.mouse("mouseMoved", place(own, step), y)
    tab.mouse("mouseReleased", place(own, 120), y)
    for title in ("loss", "accuracy"):
        zoomed = panel(tab, title)
        assert zoomed["low"] == pytest.approx(60, abs=2)
        assert zoomed["high"] == pytest.approx(120, abs=2)
        assert all(50 < float(tick) < 130 for tick in zoomed["ticks"]) and zoomed["ticks"]
        assert zoomed["ticks"] != own["ticks"]
    assert panel(tab, "learning rate")["low"] < 10  # another figure
    own = panel(tab, "loss")
    y = own["top"] + own["height"] / 2
    for clicks in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            tab.mouse(kind, place(own, 90), y, clicks=clicks)
    assert panel(tab, "loss")["high"] == 240
    assert tab.errors == []


def test_the_label_of_the_best_step_covers_no_curve(tab: Tab, run: Path) -> None:
    tab.open(run / "report.html")
    marks = "[...document.querySelectorAll('.tools .mark')].map((it) => it.innerText)"
    assert tab.value(marks) == ["best step"]
    assert tab.value("document.querySelectorAll('svg.plot .best-step').length") >= 2
    texts = "[...document.querySelectorAll('svg.plot text')].map((it) => it.textContent)"
    assert "best step" not in tab.value(texts)
    best = json.loads((run / "summary.json").read_text())["best"]["step"]
    own = panel(tab, "accuracy")
    tab.mouse("mouseMoved", place(own, best), own["top"] + own["height"] / 2)
    assert f"step {best}, the best\n" in ask(tab, "told()")


def test_without_scripts_the_plots_are_still_there(tab: Tab, run: Path) -> None:
    count = "document.querySelectorAll('.static svg').length"
    heights = "[...document.querySelectorAll('.static svg')].map((it) => it.clientHeight)"
    plots = "document.querySelectorAll('svg.plot').length"
    tab.open(run / "report.html", scripts=False)
    assert tab.still(count) == 3 and min(tab.still(heights)) > 100 and tab.still(plots) == 0
    tab.open(run / "report.html")
    assert tab.value(plots) == 6 and [it > 0 for it in tab.value(heights)] == [False, False, True]


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_of_a_hundred_runs_is_small_and_fits(tab: Tab, hundred: Path, width: int) -> None:
    assert hundred.stat().st_size < MOST_BYTES
    tab.open(hundred, width=width)
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value("document.querySelectorAll('b, img').length") == 0
    own = panel(tab, "loss")
    tab.mouse("mouseMoved", place(own, 600), own["top"] + own["height"] / 2)
    told = ask(tab, "told()")
    assert told.count("\n") == 1 and "lr=" in told  # of many runs, the nearest alone
    assert tab.requests == [hundred.resolve().as_uri()] and tab.errors == []


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of runs that differ in four settings, with six metrics each."""
    folder = tmp_path_factory.mktemp("four")
    for index in range(16):
        made = make_run(
            folder / str(index), lr=(0.001, 0.0003)[index % 2], seed=index // 2 % 2,
            optimizer=("adamw", "sgd")[index // 4 % 2], speed=2 + index * 7 % 11,
        )  # fmt: skip
        config = yaml.safe_load((made / "config.yaml").read_text())
        config["model"]["dropout"] = (0.1, 0.25)[index // 8]
        (made / "config.yaml").write_text(yaml.safe_dump(config))
    runs = [report.load(it) for it in report.find_runs(folder)]
    found = comparison.compare(comparison.rows_of(runs))
    return side_by_side.write_page(found, folder / "comparison.html")


def test_the_runs_of_four_settings_fit_and_keep_their_names_where_they_do_not(
    tab: Tab, four: Path
) -> None:
    tab.open(four, width=1200)
    wide = ask(tab, "tableOf('Runs')")
    assert wide["columns"] >= 12 and wide["table"] <= wide["frame"]
    tab.open(four, width=600)
    before = ask(tab, "tableOf('Runs')")
    after = ask(tab, "tableOf('Runs', 200)")
    assert before["table"] > before["frame"] and after["scrolled"] == 200  # the control
    assert after["first"] == before["first"] and after["second"] == before["second"] - 200


def test_a_click_on_the_head_of_a_column_sorts_its_numbers(tab: Tab, hundred: Path) -> None:
    tab.open(hundred)
    rising, falling = (ask(tab, "sortedBy('val/accuracy')") for _ in range(2))
    assert rising == sorted(rising) and len({*rising}) > 5
    assert falling == sorted(falling, reverse=True) != rising


def test_a_run_without_a_value_comes_last_in_both_directions(tab: Tab, tmp_path: Path) -> None:
    for index, speed in enumerate((3, 9, 5)):
        make_run(tmp_path / str(index), speed=speed)
    make_run(tmp_path / "3", epochs=0, state="failed")
    runs = [report.load(it) for it in report.find_runs(tmp_path)]
    found = comparison.compare(comparison.rows_of(runs))
    tab.open(side_by_side.write_page(found, tmp_path / "comparison.html"))
    for reverse in (False, True):
        *values, last = ask(tab, "sortedBy('val/accuracy')")
        assert values == sorted(values, reverse=reverse) and last is None


def test_both_colour_schemes_are_readable(tab: Tab, run: Path) -> None:
    cards = []
    for scheme in ("light", "dark"):
        tab.open(run / "report.html", scheme=scheme)
        card, text, lines = ask(tab, "contrasts()")
        assert text >= 4.5 and lines >= 3
        cards.append(card)
    assert cards[0] > 0.9 and cards[1] < 0.1
