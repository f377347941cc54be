"""A disk that is full, temporarily or permanently: only what did not fit is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import TINY, before_each_step, fingerprint, launched, train

from regrow.checkpoint import writer
from regrow.record.records import read_json, read_metrics
from regrow.runs import training

RUN = (
    *(*TINY, "hydra.run.dir=disk/run", "task.per_class=false", "task.auroc=false"),
    *("trainer.ema_decay=0.9", "trainer.checkpoint.save_every_steps=3", "trainer.max_epochs=6"),
)


class Disk:
    """A small disk of its own, which a test fills and empties."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.filling = folder, folder / "filling"

    def fill(self) -> None:
        descriptor = os.open(self.filling, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with pytest.raises(OSError) as full:
            while True:
                os.write(descriptor, bytes(512))
        os.close(descriptor)
        assert full.value.errno == errno.ENOSPC

    def empty(self) -> None:
        self.filling.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes an administrator on Linux")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr(training, "draw", lambda folder: None)
        train(folder, *RUN)
    return fingerprint(folder)


def before_step(monkeypatch: pytest.MonkeyPatch, events: dict[int, Callable[[], None]]) -> None:
    """Call these just before the steps of these numbers, counted from one."""

    def eventful(state: Any, plan: Any) -> None:
        if plan.checkpoints._thread is not None:
            plan.checkpoints._thread.join()
        events.get(state.step + 1, lambda: None)()

    before_each_step(monkeypatch, eventful)


def fails(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Return the error that the run ends with, and how to resume."""
    with pytest.raises(SystemExit) as ended:
        launched(*RUN)
    assert ended.value.code == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if code == 1:
        assert errors[1] == "error: Once that is fixed, resume with:"
        assert errors[2].endswith("train.py resume=disk/run")
    assert len(errors) == (3 if code == 1 else 1)
    return errors[0]


def test_a_disk_that_is_full_for_a_while_costs_nothing_that_lasts(
    disk: Disk, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before_step(monkeypatch, {6: disk.fill, 20: disk.empty})
    assert launched(*RUN) is not None
    warned = capsys.readouterr().err
    assert "checkpoint not saved: " in warned and "Its lines wait in memory" in warned
    assert "written again, nothing is missing" in warned
    assert fingerprint(disk.folder / "run") == whole


def test_a_disk_that_stays_full_ends_the_run_in_one_line_and_it_grows_back(
    disk: Disk, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        before_step(patch, {6: disk.fill})
        assert fails(capsys, 1) == (
            "error: failed at step 24: the weights of step 24, the last, could not be saved"
        )
    run = disk.folder / "run"
    assert not (run / "summary.json").exists()
    assert len({path.name for path in writer.complete(run / "checkpoints")}) == 2
    loaded = writer.load_newest(run / "checkpoints")
    assert loaded is not None and loaded[1]["step"] == 4
    assert loaded[1]["metrics_bytes"] <= (run / "metrics.jsonl").stat().st_size
    disk.empty()
    launched(*RUN)
    assert fingerprint(run) == whole
    assert read_json(run / "status.json")["state"] == "completed"


def test_a_summary_that_finds_no_room_is_written_by_the_same_command_again(
    disk: Disk, whole: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure_once = training.measure_once

    def then_full(*args: Any) -> Any:
        values = measure_once(*args)
        disk.fill()
        return values

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_once", then_full)
        assert fails(capsys, 1).endswith("No space left on device")
    run = disk.folder / "run"
    assert not (run / "summary.json").exists() and not list(run.glob(".*.tmp"))
    disk.empty()
    launched(*RUN)
    assert fingerprint(run) == whole
    assert sum("test/loss" in line for line in read_metrics(run)) == 1
    assert read_json(run / "summary.json")["status"] == "completed"


def test_a_start_on_a_full_disk_is_one_line(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.fill()
    assert fails(capsys, 2) == (
        "error: hydra.run.dir=disk/run cannot be written: No space left on device. Make room "
        "there, or choose another folder."
    )
    disk.empty()
    assert launched(*RUN) is not None  # the little that was written does no harm


def test_a_checkpoint_folder_that_cannot_be_written_is_named_and_the_run_continues(
    tmp_path: Path,
    whole: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by permissions: those do not bind an administrator."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "disk" / "run"

    def spoil() -> None:
        (run / "checkpoints").rename(run / "aside")
        (run / "checkpoints").write_text("no folder")

    def repair() -> None:
        (run / "checkpoints").unlink()
        (run / "aside").rename(run / "checkpoints")

    before_step(monkeypatch, {6: spoil, 8: repair})
    assert launched(*RUN) is not None
    assert "checkpoint not saved: [Errno 20] Not a directory" in capsys.readouterr().err
    assert fingerprint(run) == whole
