"""`make bench-gpu` without a GPU: its parts, their stored results, its page and its pictures."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="a copy without benchmarks"
)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_page_is_written_from_results_and_keeps_what_was_written_by_hand(
    tmp_path: Path,
) -> None:
    from benchmarks.gpu import page

    written = tmp_path / "gpu.md"
    written.write_text("of before\n\n## Checks\n\nby hand\n")
    facts = page.machine(torch.device("cpu"), commit="abc1234") | {"device": "NVIDIA H200"}
    seconds = {"train.py": [3.0, 3.0], "train.py with one batch for all steps": [2.4, 2.4]}
    table = {"title": "bf16", "note": "", "unit": "s", "reference": "train.py", "seconds": seconds}
    row: dict[str, Any] = {"table": table, "flops": 989e12, "memory": {"train.py": 70.4}, **facts}
    page.store(tmp_path, "step", "a model", row)
    tests = {"tests": 3, "skipped": 1, "failed": ["test_a"], "seconds": 1.0}
    page.store(tmp_path, "tests", "Some tests", tests | facts)
    page.write(written, tmp_path, ["tests", "step", "cifar"])
    text = written.read_text()
    assert text.endswith("\n## Checks\n\nby hand\n") and "of before" not in text
    assert "Not measured: cifar." in text
    assert "2 tests ran, 1 were skipped, 1 failed.\n- test_a" in text
    assert "| train.py with one batch for all steps | 2.4 | 2.4 | 0.80 |" in text
    assert "Share of a step that data cost: 20.0%." in text
    assert "MFU, of 989 Tflop/s: train.py 33.3%" in text
    assert "at most: train.py 70." in text
    assert f"NVIDIA H200, torch {torch.__version__}" in text and "at abc1234" in text
    before = text
    page.write(written, tmp_path, ["tests", "step", "cifar"])
    assert written.read_text() == before


def arguments(results: Path, page: Path | str = "") -> list[str]:
    return ["step", "device=cpu", "size=tiny", f"results={results}", f"page={page}"]


def test_the_page_is_also_written_where_all_results_are_there(tmp_path: Path) -> None:
    from benchmarks.gpu import __main__, page

    facts = page.machine(torch.device("cpu"), commit="abc1234")
    for name in ("mlp", "resnet18"):
        table = {"title": name, "note": "", "unit": "s", "reference": "a", "seconds": {"a": [1.0]}}
        page.store(tmp_path, "step", name, {"table": table, **facts})
    assert __main__.main(*arguments(tmp_path, tmp_path / "gpu.md")) == 0
    assert "## mlp" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("wrong", ["size=tin", "device=gpu"])
def test_a_wrong_size_or_device_is_refused(wrong: str, tmp_path: Path) -> None:
    from benchmarks.gpu import __main__

    with pytest.raises(SystemExit, match=f"benchmarks: {wrong} must be"):
        __main__.main(*arguments(tmp_path), wrong)


@pytest.mark.parametrize("module", ["benchmarks", "benchmarks.gpu"])
@pytest.mark.slow
def test_help_that_nobody_reads_to_its_end_ends_without_a_traceback(module: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-u", "-m", module, "--help"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"},
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_ratio_is_drawn_however_long_a_step_takes() -> None:
    from benchmarks import picture
    from benchmarks.measure import Table

    table = Table("A step", "", "µs a step", "a", {"a": [12_345.0], "b": [1.0]})
    rows = [row["name"] for row in picture.ROW.finditer(table.text())]
    assert rows == ["a", "b"] and "1.234e+04" in table.text()


def test_images_packed_into_one_file_come_back_bit_for_bit(tmp_path: Path) -> None:
    from benchmarks.gpu import sprites

    images = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    sprites.pack(images, tmp_path / "train_0.webp")
    found = sprites.unpack(tmp_path / "train_0.webp")
    assert torch.equal(found, images)
    assert not torch.equal(found.flip(0), images)  # the control


def run(part: str, results: Path) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu", part, *arguments(results)[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_a_part_runs_and_what_is_stored_is_not_measured_again(tmp_path: Path) -> None:
    assert "step: mlp took" in run("step", tmp_path)
    stored = json.loads((tmp_path / "step.json").read_text())
    assert stored["mlp"]["table"]["seconds"].keys() == {"train.py", "bare loop"}
    del stored["resnet18"]  # as after an interruption
    (tmp_path / "step.json").write_text(json.dumps(stored))
    said = run("step", tmp_path)
    assert "step: mlp is there" in said and "step: resnet18 took" in said


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "stored"),
    [("resnet50", {"resnet50", "checkpoint", "evaluation"}), ("cifar", {"cifar10"})],
)
def test_the_other_parts_run(part: str, stored: set[str], tmp_path: Path) -> None:
    run(part, tmp_path)
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found.keys() == stored
    assert all(min(its) > 0 for one in found.values() for its in one["table"]["seconds"].values())


def compared_in(case: Any, per_epoch: int) -> list[int]:
    """Return how many timed steps of train.py are compared with uncaptured ones, by round."""
    from regrow.numerics.capture import WARM_UP, Recording

    found, state = [], 0
    for _ in range(1 + case.rounds):  # each captures again
        recording, count = None, 0
        for number in range(case.before + case.steps):
            epoch = (state + number) // per_epoch
            if recording is not None:
                count += recording.count_replay(epoch) and number >= case.before
            elif number == WARM_UP:
                recording = Recording({}, epoch)
        found.append(count)
        state += case.before + case.steps
    return found


def test_no_timed_step_of_images_is_compared_or_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.configured import config_of
    from benchmarks.gpu import loops, parts

    cases: list[Any] = []
    monkeypatch.setattr(loops, "measure", lambda case, device: cases.append(case) or {})
    setting = parts.Setting(torch.device("cpu"), False, None)
    for part in (parts.step, parts.resnet50):
        for name, run in part(setting):
            if name in ("mlp", "resnet18", "resnet50"):
                run()
    digits, *images = cases
    assert compared_in(digits, 1258 // 64) == [1] * 6  # as its note says
    for case in images:
        config = config_of(*case.overrides)
        per_epoch = config["data"]["source"]["num_train"] // case.batch
        assert compared_in(case, per_epoch) == [0] * (1 + case.rounds)
        assert config["trainer"]["checkpoint"]["save_every_steps"] is None
    fewer = dataclasses.replace(images[1], before=18)
    assert compared_in(fewer, 8) == [0, 0, 0, 1]  # the control
