"""A power cut loses no reported checkpoint: the order of the observed system calls."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from regrow.checkpoint import writer
from regrow.checkpoint.writer import CheckpointFacts, CheckpointOptions, CheckpointWriter
from regrow.record.loggers import Jsonl

OPTIONS = CheckpointOptions(
    save_every_epochs=1,
    save_every_steps=None,
    keep_last=1,
    keep_best=1,
    milestones_every_epochs=None,
    background=False,
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
Calls = list[tuple[str, str]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Return what is synced, renamed and removed, by name, in order."""
    seen: Calls = []
    fsync, rename, replace, rmtree = os.fsync, os.rename, os.replace, shutil.rmtree

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))

    def renamed(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        seen.append(("rename", f"{Path(source).name} {Path(target).name}"))

    def replaced(source: Any, target: Any, **options: Any) -> None:
        replace(source, target, **options)
        seen.append(("replace", f"{Path(source).name} {Path(target).name}"))

    def removed(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).exists():
            seen.append(("rmtree", Path(path).name))
        rmtree(path, *arguments, **options)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    return seen


def save(saver: CheckpointWriter, step: int, value: float | None = None) -> None:
    parts = {
        "model": {"weight": torch.full((3,), float(step))},
        "optimizer": {"state": {}},
    }
    facts = CheckpointFacts(step=step, epoch=step, value=value, milestone=False, metrics_bytes=0)
    saver.save(parts, facts, lambda position: None)
    assert saver.wait()


@needs_proc
def test_every_file_and_both_folders_are_synced_around_the_rename(
    tmp_path: Path, calls: Calls
) -> None:
    save(CheckpointWriter(tmp_path / "checkpoints", OPTIONS, "max"), 1)
    renamed = calls.index(("rename", ".tmp-step_00000001 step_00000001"))
    before, after = calls[:renamed], calls[renamed + 1 :]
    for name in ("model.pt", "optimizer.pt", writer.MANIFEST, ".tmp-step_00000001"):
        assert ("fsync", name) in before
    # The manifest is the last file: with it, the checkpoint counts as complete.
    files = [name for call, name in before if call == "fsync"]
    assert files[-2:] == [writer.MANIFEST, ".tmp-step_00000001"]
    assert after[0] == ("fsync", "checkpoints")


@needs_proc
def test_an_older_checkpoint_goes_only_after_the_newer_one_is_in_place_and_renamed_first(
    tmp_path: Path, calls: Calls
) -> None:
    saver = CheckpointWriter(tmp_path / "checkpoints", OPTIONS, "max")
    save(saver, 1)
    calls.clear()
    save(saver, 2)
    in_place = calls.index(("rename", ".tmp-step_00000002 step_00000002"))
    synced = calls.index(("fsync", "checkpoints"))
    set_aside = calls.index(("rename", "step_00000001 .old-step_00000001"))
    removed = calls.index(("rmtree", ".old-step_00000001"))
    assert in_place < synced < set_aside < removed
    assert [name for call, name in calls if call == "rmtree"] == [".old-step_00000001"]


@needs_proc
def test_a_checkpoint_of_the_same_step_is_complete_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved again, as after an evaluation: one complete checkpoint exists at every instant."""
    folder = tmp_path / "checkpoints"
    saver = CheckpointWriter(folder, OPTIONS, "max")
    save(saver, 1)
    save(saver, 2)
    counts = []
    rename = os.rename

    def counted(source: Any, target: Any, **options: Any) -> None:
        rename(source, target, **options)
        aside = [path for path in folder.glob(".old-step_*") if (path / "manifest.json").exists()]
        counts.append(len(writer.complete(folder)) + len(aside))

    monkeypatch.setattr(os, "rename", counted)
    save(saver, 2, value=0.5)
    assert counts and min(counts) >= 1


@needs_proc
def test_the_metrics_are_synced_before_the_checkpoint_that_knows_them(
    tmp_path: Path, calls: Calls
) -> None:
    lines = Jsonl(tmp_path)
    lines.log(1, 0, {"train/loss": 1.0})
    saver = CheckpointWriter(tmp_path / "checkpoints", OPTIONS, "max")
    position = lines.position()
    facts = CheckpointFacts(step=1, epoch=0, value=None, milestone=False, metrics_bytes=position)
    saver.save({"model": {}}, facts, lines.sync)
    assert saver.wait()
    lines.close()
    synced = calls.index(("fsync", "metrics.jsonl"))
    assert synced < calls.index(("fsync", "model.pt"))


@needs_proc
def test_a_missing_sync_would_be_seen(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: without file syncs, none are observed."""
    monkeypatch.setattr(writer, "_sync", lambda file: None)
    save(CheckpointWriter(tmp_path / "checkpoints", OPTIONS, "max"), 1)
    assert ("fsync", "model.pt") not in calls


def test_a_step_whose_write_failed_may_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(OPTIONS, background=True)
    saver = CheckpointWriter(tmp_path / "checkpoints", options, "max")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write", full)
        facts = CheckpointFacts(step=1, epoch=0, value=None, milestone=False, metrics_bytes=0)
        saver.save({"model": {}}, facts, lambda position: None)
        saver.saved = (1, False)  # as in the loop
        assert not saver.wait()
    assert saver.saved is None
    save(saver, 1)
    assert [path.name for path in writer.complete(saver.folder)] == ["step_00000001"]
