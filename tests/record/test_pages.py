from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest
import torch
import yaml
from fakes import make_run, write_lines

from regrow.errors import UserError
from regrow.feeding.batch import LoadedBatch
from regrow.record import (
    by_class,
    comparison,
    logged_images,
    pages,
    pictures,
    plots,
    report,
    side_by_side,
)
from regrow.record.records import read_metrics, set_status, write_json

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []  # kind and text
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append((dict(attributes).get("type"), ""))
        for name, value in attributes:
            assert not name.startswith("on"), name
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        else:
            self.words.append(data)

    @property
    def code(self) -> list[str]:
        """The scripts that a browser runs."""
        return [text for kind, text in self.scripts if kind != "application/json"]

    @property
    def data(self) -> list[Any]:
        def refuse(text: str) -> None:
            raise AssertionError(f"{text} is not JSON: a browser refuses it")

        texts = [text for kind, text in self.scripts if kind == "application/json"]
        return [json.loads(text, parse_constant=refuse) for text in texts]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def compare(folders: list[Path], output: Path) -> Path:
    rows = comparison.rows_of([report.load(folder) for folder in folders])
    return side_by_side.write_page(comparison.compare(rows), output)


@pytest.mark.parametrize(
    ("task", "picture"),
    [
        ("multiclass", "confusion_test"),
        ("multilabel", "confusion_test"),
        ("regression", "predicted_test"),
    ],
)
@pytest.mark.slow
def test_a_run_gets_its_plots_and_its_page(tmp_path: Path, task: str, picture: str) -> None:
    folder = make_run(tmp_path / "run", task=task)
    drawn = plots.draw(folder)
    assert [path.stem for path in drawn] == ["learning_curves", "learning_rate", picture]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    page = Page(report.write(folder))
    assert page.tags.count("svg") == 3
    for words in ("completed", "loss", "optimizer.lr=0.001", "4f1d0c9e4f", "240", "torch 2.15.0"):
        assert words in page.text
    metric = "rmse" if task == "regression" else "accuracy"
    value = read_metrics(folder)[-2][f"val/{metric}"]
    assert f"{value:.4f}" in page.text
    assert "weight_decay: 0.01" in page.text


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = Page(report.write(make_run(tmp_path / "run")))
    assert not [link for link in page.links if not link.startswith(("#", "data:"))]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "@import" not in text and "url(http" not in text
    assert not {"link", "iframe", "object"} & set(page.tags)


@pytest.mark.slow
def test_the_page_shows_the_command_of_each_resume_and_folds_the_later_ones(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run")
    first = json.loads((folder / "manifest.json").read_text())
    once = {"step": 40, "started": "2026-11-21T11:00:00+01:00"}  # by the same command
    later = {**once, "command": f"python scripts/train.py resume={EVIL}", "step": None}

    def shown(*resumes: dict[str, Any]) -> tuple[str, str]:
        write_json(folder / "manifest.json", {**first, "resumes": [*resumes]})
        page = report.write(folder)
        facts = page.read_text().partition("<h2>Facts</h2>")[2].partition("</section>")[0]
        return facts, Page(page).text

    assert "resumed" not in shown()[0]
    facts, text = shown(once, later)
    when = "2026-11-21T11:00:00+01:00"
    assert f"resumed 2 times {when} from step 40: {first['command']} {when}: python" in text
    assert f"{when}: python scripts/train.py resume={EVIL} steps" in text
    assert "<details>" not in facts and EVIL not in facts
    facts, text = shown(*[once] * 200)
    opened, _, folded = facts.partition("<details>")
    assert opened.count(first["command"]) == 1 + report.OPEN_RESUMES
    assert folded.count(first["command"]) == report.MOST_RESUMES - report.OPEN_RESUMES
    assert "the 197 later ones" in text and "and 100 more, in manifest.json" in text


@pytest.mark.slow
def test_the_page_says_of_which_step_the_results_of_a_run_are_that_trains_longer(
    tmp_path: Path,
) -> None:
    folder = make_run(tmp_path / "run")
    said = "These are the results of step 240, where the run was complete."
    assert said not in Page(report.write(folder)).text
    set_status(folder, "interrupted", step=240, pids=[])  # resumed, and no step was taken
    assert said not in Page(report.write(folder)).text
    set_status(folder, "interrupted", step=1300, pids=[])
    text = Page(report.write(folder)).text
    assert f"{said} It was resumed to train longer, and is at step 1,300." in text
    assert "steps 1 300 epochs" in text
    (folder / "summary.json").unlink()  # a run that was never complete
    text = Page(report.write(folder)).text
    assert "These are the results" not in text and "steps 1 300" in text


def test_a_page_runs_its_own_script_and_no_other(tmp_path: Path) -> None:
    """The page names the hash of that script, by which a browser refuses all others."""
    page = report.write(make_run(tmp_path / "run"))
    (code,) = Page(page).code
    assert code == (Path(pages.__file__).parent / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    (policy,) = re.findall(
        r'http-equiv="Content-Security-Policy" content="([^"]*)"', page.read_text()
    )
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


@pytest.mark.slow
def test_everything_is_escaped(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", name=EVIL, state="failed")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"tags": [EVIL], "notes": EVIL, EVIL: EVIL, "model": {"hidden": EVIL}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    write_json(
        folder / "plots" / "test.json",
        {"confusion_matrix": [[1, 0], [0, 1]], "class_names": ["a $x$ <b>", EVIL]},
    )
    write_json(folder / "status.json", {"state": EVIL, "error": EVIL})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"command": EVIL, "packages": {EVIL: EVIL}}
    manifest["git"]["branch"] = EVIL
    write_json(folder / "manifest.json", manifest)
    lines = read_metrics(folder)
    lines.append({"step": 300, "epoch": 1, f"val/{EVIL}": 1.0, "val/<img src=x>": 2.0})
    write_lines(folder, lines)
    other = make_run(tmp_path / EVIL.replace("/", "_"), lr=0.5)
    for path in (report.write(folder), compare([folder, other], tmp_path / "c.html")):
        page = Page(path)
        assert not {"img", "b"} & set(page.tags)
        assert len(page.code) == 1 and "alert" not in page.code[0]
    control = tmp_path / "control.html"
    control.write_text(f"<p>{EVIL}</p>")
    assert "script" in Page(control).tags


def test_a_folders_name_cannot_be_read_as_the_scheme_of_a_link(tmp_path: Path) -> None:
    folders = [tmp_path / "javascript:alert(1)", tmp_path / "lr=1#2?a"]
    for folder in folders:
        make_run(folder)
    links = Page(compare(folders, tmp_path / "page.html")).links
    links = [link for link in links if not link.startswith(("#", "data:"))]
    assert len(links) == 3 and all(":" not in link and "#" not in link for link in links)
    assert [(tmp_path / unquote(link)).resolve() for link in links[1:]] == folders


def test_no_secret_enters_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "run")
    monkeypatch.setenv("MY_TOKEN", "planted-value-1")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"notes": "see planted-value-1", "store": {"password": "planted-value-2"}}
    config["data"] = {"url": "https://me:planted-value-3@host/x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = report.write(folder).read_text()
    assert "planted-value" not in text and "***" in text


def test_a_log_that_ends_at_any_line_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1, steps_per_epoch=5)
    lines = read_metrics(folder)
    for name in ("summary.json", "manifest.json", "config.yaml", "plots/test.json"):
        (folder / name).unlink()
    for count in range(len(lines) + 1):
        write_lines(folder, lines[:count])
        report.write(folder)
    (folder / "status.json").write_text("{")
    (folder / "config.yaml").write_text("a: [1")
    (folder / "manifest.json").write_text("[]")
    assert "unknown" in Page(report.write(folder)).text


@pytest.mark.slow
def test_nan_is_shown_as_nan(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2)
    nan: list[dict[str, Any]] = [
        {
            "step": step,
            "epoch": 0,
            "train/loss": math.nan,
            "train/lr": math.inf,
            "train/grad_norm": -math.inf,
            "val/loss": math.nan if step % 2 else 1.0,
            "val/accuracy": math.nan,
        }
        for step in range(5)
    ]
    write_lines(folder, nan)
    best = {"metric": "val/accuracy", "value": math.nan, "step": 3}
    val = {"val/accuracy": math.nan}
    write_json(folder / "summary.json", {"val": val, "seconds": math.nan, "best": best})
    write_json(folder / "plots" / "test.json", {"true": [1.0, 2.0], "predicted": [math.nan, 1.0]})
    plots.draw(folder)
    page = Page(report.write(folder))
    assert "NaN" in page.text
    loss = page.data[0]["panels"][0]
    assert loss["title"] == "loss" and loss["best"] == 3
    assert {line["name"]: line["y"] for line in loss["lines"]}["val"] == [1.0, None, 1.0, None, 1.0]


def test_the_page_holds_the_curves_and_marks_the_best_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["best"]["step"], summary["parameters"] = 180, 288_170
    write_json(folder / "summary.json", summary)
    page = Page(report.write(folder))
    curves, _ = page.data
    panels = {panel["title"]: panel for panel in curves["panels"]}
    assert {panel["best"] for panel in panels.values()} == {180}
    assert panels["accuracy"]["bestValue"] == summary["best"]["value"]
    assert "bestValue" not in panels["loss"]
    lines = {line["name"]: line for line in panels["accuracy"]["lines"]}
    found = dict(zip(curves["xs"][lines["val"]["x"]], lines["val"]["y"], strict=True))
    logged = {it["step"]: it["val/accuracy"] for it in read_metrics(folder) if "val/f1" in it}
    assert found == {step: float(f"{value:.5g}") for step, value in logged.items()}
    assert "288 170" in page.text and "best val/accuracy" in page.text


@pytest.mark.slow
def test_rates_of_a_short_run_are_left_out_with_one_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2)
    lines = [{"step": 50 * index, "epoch": index, "train/lr": 0.1, "train/grad_norm": 1.0,
              "train/loss": 1.0} for index in (1, 2, 3)]  # fmt: skip
    said = "Learning rate and gradient norm: not drawn, as fewer than 3 steps"
    for count in (1, 2, 3):
        write_lines(folder, lines[:count])
        page = Page(report.write(folder))
        titles = [panel["title"] for chart in page.data for panel in chart["panels"]]
        is_short = count < 3
        assert ("learning rate" in titles) != is_short and "loss" in titles
        assert ("gradient norm, before clipping" in titles) != is_short
        assert (said in page.text) == is_short


@pytest.mark.parametrize(
    ("losses", "is_there"),
    [([], False), ([0.5], False), ([0.5, 0.4], False), ([0.5, 0.4, 0.3], True),
     ([math.nan], True)],
)  # fmt: skip
def test_the_legend_names_single_steps_only_if_enough_are_drawn(
    losses: list[float], is_there: bool
) -> None:
    of_steps = [{"step": 50 * n, "train/loss": loss} for n, loss in enumerate(losses, 1)]
    of_epochs = [{"step": 4 * n, "train/epoch_loss": 0.5, "val/loss": 0.6} for n in range(1, 41)]
    (panel,) = plots.curves([*of_steps, *of_epochs])
    names = [line.name for line in panel.lines]
    assert names == ["train, single steps"] * is_there + ["train", "val"]
    (single,) = plots.curves(of_steps) or [plots.Panel("loss", [])]  # without whole epochs
    assert [len(line.steps) for line in single.lines] == [len(losses)] * bool(losses)


def test_the_throughput_counts_the_examples_of_smaller_last_batches(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")  # 12 epochs of 1,257 examples in 21.4 s
    assert report.load(folder).examples_per_second is None  # an unknown batch
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"data": {"batch_size": 64}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert report.load(folder).examples_per_second == pytest.approx(12 * 1257 / 21.4)
    config["data"]["drop_last"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert report.load(folder).examples_per_second == pytest.approx(240 * 64 / 21.4)
    assert "718" in Page(report.write(folder)).text


def test_the_page_shows_the_medians_of_what_the_log_says_of_speed(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    text = Page(report.write(folder)).text
    assert "waiting for data 3.0 %" in " ".join(text.split()) and "MFU 17.4 %" in " ".join(
        text.split()
    )
    lines = [{"step": 1, "train/loss": 0.5, "time/waiting_for_data": "much", "time/mfu": math.nan}]
    write_lines(folder, lines)
    assert "MFU" not in Page(report.write(folder)).text  # such as on an unknown card


def test_wrong_images_are_shown_with_truth_and_prediction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "figures", lambda *_: {})
    folder = make_run(tmp_path / "run")
    pixels = pictures._png(torch.arange(64, dtype=torch.uint8).view(1, 8, 8))
    wrong = {"image": [pixels], "true": ["<b>cat"], "predicted": ["dog"], "probability": [0.875]}
    write_json(folder / "plots" / "test.json", {"wrong": wrong})
    page = report.write(folder)
    assert f'<img src="data:image/png;base64,{pixels}"' in page.read_text()
    assert "true <b>cat predicted dog 0.88" in Page(page).text
    assert 'title="&lt;b&gt;cat"' in page.read_text() and 'title="dog"' in page.read_text()
    assert "The first wrong ones in the order of the data, at most 16, each with" in Page(page).text
    for key, damage in (("image", ["no base64"]), ("image", []), ("true", 3), ("predicted", None)):
        write_json(folder / "plots" / "test.json", {"wrong": {**wrong, key: damage}})
        assert "img" not in Page(report.write(folder)).tags


def photographs() -> dict[str, Any]:
    """Wrong images of noise, which no compression makes smaller."""
    torch.manual_seed(0)
    inputs, targets = torch.rand(20, 3, 224, 224), torch.zeros(20, dtype=torch.int64)
    batch = LoadedBatch(inputs, targets, None, 20, 20)
    told = {"prediction": targets + 1, "probability": torch.full((20, 2), 0.5)}
    return pictures.of_wrong(batch, targets, lambda _: told, ["cat", "dog"], None)


def test_a_page_full_of_photographs_stays_below_a_megabyte(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    details = json.loads((folder / "plots" / "test.json").read_text())
    write_json(folder / "plots" / "test.json", details | photographs())
    page = report.write(folder)
    assert page.read_text().count("<img ") == pictures.NUM_WRONG
    assert page.stat().st_size < 1_000_000


def test_a_long_text_ends_after_a_line_and_says_how_much_is_shown() -> None:
    text = "".join(f"<{number}>\n" for number in range(1000))
    shown, said = pages.clipped(text, 500)
    assert text.startswith(shown) and shown.endswith(">\n")
    assert 400 < len(shown.replace("<", "&lt;").replace(">", "&gt;")) <= 500
    assert said == f"Shown: the first {len(shown)} of 5,890 characters."
    assert pages.clipped("é" * 100, 51)[0] == "é" * 25  # bytes, of a single line
    assert pages.clipped(text, 20_000) == (text, "")


def wide(folder: Path) -> Path:
    """A run of 1,000 classes and five sets, whose config, manifest and notes are of megabytes."""
    make_run(folder, state="failed")
    (folder / "metrics.jsonl").write_text("")  # no plot is left out to make room
    (folder / "plots" / "test.json").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    for shift, its in enumerate(("val", "night", "fog", "snow", "test")):
        values = {f"{its}/loss": 1.0}
        for metric in ("accuracy", "precision", "recall", "f1"):
            names = [(n, f"{its}/{metric}/{n:03d}{'<' * 300}") for n in range(1000)]
            values |= {f"{its}/{metric}": 0.5} | {name: (n + shift) / 2000 for n, name in names}
        summary[its] = values
    write_json(folder / "summary.json", summary)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config |= {"tags": ["<" * 190] * 1500, "notes": "<" * 260_000, "more": "<" * 260_000}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = json.loads((folder / "manifest.json").read_text())
    resumes = [{"command": "<" * 20_000, "step": n, "started": "<" * 9_000} for n in range(100)]
    facts |= {"command": "<" * 260_000, "changed": ["<" * 900] * 300, "resumes": resumes}
    facts |= {"started": "<" * 260_000, "hardware": {"cpu": "<" * 260_000, "cpus": 2}}
    write_json(folder / "manifest.json", facts)
    status = json.loads((folder / "status.json").read_text())
    write_json(folder / "status.json", status | {"error": "<" * 260_000})
    return folder


@pytest.mark.slow
def test_a_page_of_many_classes_sets_and_settings_is_bounded_and_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = wide(tmp_path / "run")
    page = report.write(folder)
    assert 300_000 < page.stat().st_size < 1_000_000
    read = Page(page)
    assert "Shown: the 50 worst of 1,000 classes by test/f1. All are in summary.json" in read.text
    assert read.text.index(f"f1/000{'<' * 100}") < read.text.index(f"f1/049{'<' * 100}")
    assert "f1/050" not in read.text and "and 1,400 more, in config.yaml" in read.text
    for name in ("config.yaml", "manifest.json"):
        assert re.search(
            rf"Shown: the first [\d,]+ of [\d,]+ characters. All are in {name}", read.text
        )
    assert {"summary.json", "config.yaml", "manifest.json"} <= {*read.links}
    assert len(re.findall(r"… \(Shown: the first [\d,]+ of", read.text)) == 5 + 4  # of two resumes
    assert size_without(monkeypatch, folder, by_class, "MOST_OF_PAGE", "MOST_CELLS") > 1_000_000
    assert size_without(monkeypatch, folder, pages, "MOST_OF_TEXT") > 1_000_000
    assert size_without(monkeypatch, folder, pages, "MOST_OF_WORDS") > 1_000_000
    assert size_without(monkeypatch, folder, report, "MOST_TAGS") > 1_000_000
    assert size_without(monkeypatch, folder, report, "MOST_OF_RESUMES") > 1_000_000
    assert re.search(r"resumed\s+100 times", read.text) and "and 98 more, in man" in read.text


def size_without(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: ModuleType, *bounds: str
) -> int:
    """Return the page's size without these bounds: the negative control."""
    with monkeypatch.context() as patched:
        for bound in bounds:
            patched.setattr(module, bound, 10**9)
        return report.write(folder).stat().st_size


@pytest.mark.slow
def test_plots_curves_and_wrong_images_share_the_megabyte_of_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=2000, steps_per_epoch=40)
    counts, names = [[7] * 20] * 20, [f"class {index}" for index in range(20)]
    wrong = photographs()
    for name in ("a", "b", "test"):
        details = {"confusion_matrix": counts, "class_names": names, **wrong}
        write_json(folder / "plots" / f"{name}.json", details)
    logged = torch.rand(16, 3, 64, 64)
    for index in range(20):
        for step in range(4):
            logged_images.write(logged_images.place(folder, f"name {index}", step), logged)
    page = report.write(folder)
    text = page.read_text()
    assert 800_000 < page.stat().st_size < 1_000_000
    assert "Left out, as the page has at most 1 MB: plots/confusion_" in text
    assert "plots/learning_curves.png" not in text
    assert text.count("Shown: ") >= 1 and text.count("<img ") > 16
    assert "application/json" in text  # the curves


def test_a_long_line_is_thinned_and_keeps_its_peaks_and_its_wide_gaps() -> None:
    steps = list(range(100_000))
    values = [math.sin(step / 5000) for step in steps]
    values[12_345], values[54_321] = 7.0, -7.0
    values[70_000:80_000] = [math.nan] * 10_000
    few, thin = plots.thinned(steps, values)
    assert len(few) == len(thin) <= plots.POINTS
    assert list(few) == sorted(few)
    there = dict(zip(few, thin, strict=True))
    assert (there[12_345], there[54_321]) == (7.0, -7.0)
    gap = [step for step, value in there.items() if math.isnan(value)]
    assert gap and 70_000 <= min(gap) <= max(gap) < 80_000
    assert plots.thinned(steps[:100], values[:100]) == (steps[:100], values[:100])


@pytest.mark.slow
def test_many_classes_empty_rows_and_missing_names_can_be_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1)
    size = 50
    matrix = [[row % 3 if row == column else 0 for column in range(size)] for row in range(size)]
    for details in (
        {"confusion_matrix": matrix, "class_names": None},
        {"confusion_matrix": [[[1, 0], [0, 0]]] * 30},
        {"true": [[1.0, 2.0]] * 4, "predicted": [[1.0, 2.0]] * 4},
        {"true": [], "predicted": []},
        {"something": "else"},
        [],
    ):
        write_json(folder / "plots" / "test.json", details)
        plots.draw(folder)


def test_the_later_of_two_values_of_a_step_counts() -> None:
    lines = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2}, {"step": 2, "a": 3.0}, {"step": 3}]
    assert plots.series(lines, "a") == ([1, 2], [1.0, 3.0])


@pytest.mark.slow
def test_side_by_side_shows_only_the_keys_that_differ(tmp_path: Path) -> None:
    for index, (lr, speed) in enumerate([(0.001, 5.0), (0.01, 3.0), (0.1, 1.0)]):
        make_run(tmp_path / "sweep" / str(index), lr=lr, speed=speed)
    runs = report.find_runs(tmp_path / "sweep")
    assert [run.name for run in runs] == ["0", "1", "2"]
    configs = [report.load(run).config for run in runs]
    assert report.differing_keys(configs) == ["optimizer.lr"]
    report.write(runs[0])
    page = Page(compare(runs, tmp_path / "sweep" / "comparison.html"))
    assert "optimizer.lr" in page.text and "weight_decay" not in page.text
    links = [link for link in page.links if not link.startswith("#")]
    assert links == ["0/report.html", "0/report.html", "1", "2"]  # first, the best
    accuracy = json.loads((runs[2] / "summary.json").read_text())["test"]["test/accuracy"]
    assert f"{accuracy:.4f}" in page.text and "test/accuracy" in page.text


def test_a_key_that_only_one_has_differs_and_one_is_not_true() -> None:
    configs = [{"a": {"b": 1}, "c": True, "d": [1], "resume": "auto"}, {"a": {}, "c": 1, "d": [1]}]
    assert report.differing_keys(configs) == ["a.b", "c", "a"]


def test_a_value_that_follows_from_another_key_is_not_listed_as_a_difference() -> None:
    """A reference to another key, and the keys of another class."""
    configs: list[dict[str, Any]] = [
        {"seed": 0, "data": {"seed": 0}, "opt": {"_target_": "a.SGD", "lr": 1.0, "momentum": 0.9}},
        {"seed": 1, "data": {"seed": 1}, "opt": {"_target_": "a.Adam", "lr": 1.0, "eps": 1e-8}},
        {"seed": 1, "data": {"seed": 1}, "opt": {"_target_": "a.Adam", "lr": 1.0, "eps": 1e-8}},
    ]
    assert report.differing_keys(configs, ["data.seed"]) == ["seed", "opt._target_"]
    configs[2]["opt"]["eps"] = 1e-6
    assert report.differing_keys(configs) == ["seed", "data.seed", "opt._target_", "opt.eps"]


def test_runs_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "\u00b2"):  # a superscript two is a digit, and no number of Python's
        make_run(tmp_path / name, epochs=1)
    assert [it.name for it in report.find_runs(tmp_path)] == ["\u00b2", "9", "10"]


def test_runs_side_by_side_are_called_by_the_overrides_that_differ(tmp_path: Path) -> None:
    overrides = [["model=cnn", "seed=0", "notes=x"], ["model=cnn", "seed=1"], ["model=cnn"]]
    for index, own in enumerate(overrides):
        folder = make_run(tmp_path / str(index), seed=index)
        composed = {"seed": index, "data": {"seed": "${seed}"}}
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(own))
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(composed))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"seed": index}}))
    page = Page(compare(report.find_runs(tmp_path), tmp_path / "c.html"))
    assert {"seed=0", "seed=1", "2"} <= set(page.words)
    assert "model=cnn" not in page.text and "notes=x" not in page.text
    assert "data.seed" not in page.text
    shutil.copytree(tmp_path / "0", tmp_path / "again")
    page = Page(compare(report.find_runs(tmp_path), tmp_path / "c.html"))
    assert {"seed=0 0", "seed=0 again", "seed=1"} <= set(page.words)
    (tmp_path / "2" / ".hydra" / "config.yaml").unlink()  # the others still tell
    page = Page(compare(report.find_runs(tmp_path), tmp_path / "c.html"))
    assert "data.seed" not in page.text


def test_metrics_of_single_classes_are_folded_away(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    summary["test"]["test/f1/zero"] = 0.5
    write_json(folder / "summary.json", summary)
    text = report.write(folder).read_text()
    before, _, folded = text.partition("<details><summary>per class</summary>")
    assert "f1/zero" in folded.partition("</details>")[0] and "f1/zero" not in before
    assert "accuracy" in before


def test_more_runs_than_are_drawn_can_be_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i), epochs=2, steps_per_epoch=5, seed=i) for i in range(45)]
    page = Page(compare(report.find_runs(tmp_path), tmp_path / "c.html"))
    links = [link for link in page.links if link in {run.name for run in runs}]
    assert len({*links}) == len(runs)
    assert "The first 40 of 45 runs" in page.text
    assert {len(panel["lines"]) for panel in page.data[-1]["panels"]} == {45}


def script() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))  # as for a script
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


@pytest.mark.slow
def test_the_script_writes_one_page_for_one_run_and_one_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = script().main
    first, second = make_run(tmp_path / "s" / "a"), make_run(tmp_path / "s" / "b", lr=0.1)
    (tmp_path / "s" / "latest").symlink_to("b")
    assert main([str(first)]) == 0
    assert (first / "report.html").exists() and (first / "plots" / "learning_curves.png").exists()
    assert main([str(tmp_path / "s")]) == 0
    assert "2 runs" in Page(tmp_path / "s" / "comparison.html").text
    assert main([str(first), str(second), f"output={tmp_path / 'x.html'}"]) == 0
    assert main([str(second), f"output={tmp_path / 'y.html'}"]) == 0
    assert (tmp_path / "x.html").exists() and (tmp_path / "y.html").exists()
    assert not (second / "report.html").exists()
    assert not (second / "plots" / "learning_curves.png").exists()  # it may be on a read-only disk
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for wrong in ("empty", "nowhere"):
        assert main([str(tmp_path / wrong)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_repeats_another_with_another_result_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, speed in (("a", 5.0), ("b", 5.0), ("c", 1.0)):
        make_run(tmp_path / name, speed=speed)
    main = script().main
    assert main(["a", "b"]) == 0 and "not counted" not in capsys.readouterr().out
    assert main(["a", "b", "c"]) == 0
    assert (
        "note: not counted, as another run of the same setting and seed is, with another "
        "val/accuracy: c\n"
    ) in capsys.readouterr().out


def test_paths_of_a_glob_that_are_not_runs_are_left_out_with_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "sweeps/x/0"):
        make_run(tmp_path / name)
    (tmp_path / "latest").symlink_to("b")
    (tmp_path / "find_lr" / "x").mkdir(parents=True)
    (tmp_path / "comparison.html").write_text("")
    output = tmp_path / "c.html"
    arguments = [str(path) for path in sorted(tmp_path.iterdir())]
    assert script().main([*arguments, f"output={output}", "overwrite=true"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("note: no run in ") and error.count("\n") == 1
    assert "find_lr" in error and "comparison.html" not in error  # a file that this command writes
    assert "3 runs" in Page(output).text


@pytest.mark.parametrize("arguments", [[], ["--nothing", "x"]])
def test_a_wrong_command_line_of_the_script_gets_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script().main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path)


def test_nothing_heavy_is_imported_until_a_plot_is_drawn() -> None:
    code = (
        "import sys\nimport regrow.record.records, regrow.record.loggers, regrow.record.manifest\n"
        "import regrow.record.plots, regrow.record.report\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'tensorboard', 'wandb', 'yaml', 'hydra'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_plots_leave_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=1)
    code = (
        "import sys; from pathlib import Path; from regrow.record import plots, report\n"
        f"plots.draw(Path({str(folder)!r})); report.write(Path({str(folder)!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
        "import matplotlib; assert matplotlib.rcParams['svg.fonttype'] == 'path'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_are_not_written_through_a_link(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    shutil.rmtree(folder / "plots")
    (tmp_path / "victim").mkdir()
    (folder / "plots").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="leads out of the folder"):
        report.draw(folder)
    assert [*(tmp_path / "victim").iterdir()] == []
