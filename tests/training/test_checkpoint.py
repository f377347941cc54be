"""Checkpoints: damage is found, the previous one is used, rotation keeps what must stay."""

from __future__ import annotations

import dataclasses
import errno
import gc
import hashlib
import json
import logging
import os
import resource
import shutil
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, before_each_step, config_of, fingerprint, train

from lab import optim
from lab.state import FOLLOWS, TrainState
from lab.step import train_step
from regrow.checkpoint import writer
from regrow.checkpoint.writer import (
    CheckpointFacts,
    CheckpointOptions,
    CheckpointWriter,
    DamagedCheckpoint,
)
from regrow.errors import UserError
from regrow.numerics.totals import Skipped
from regrow.record import loggers
from regrow.record.records import load_status, set_status
from regrow.runs import training
from regrow.runs.weights import load_weights

RUN = (
    *(*TINY, "task.per_class=false", "task.auroc=false", "model.dropout=0.3"),
    *("trainer.ema_decay=0.9", "scheduler=plateau", "trainer.checkpoint.save_every_steps=3"),
    *("trainer.monitor=val/loss", "trainer.mode=min", "optimizer.lr=0.02"),
)
OPTIONS = CheckpointOptions(
    save_every_epochs=1,
    save_every_steps=None,
    keep_last=2,
    keep_best=1,
    milestones_every_epochs=None,
    background=True,
)
FILES = ("model", "optimizer", "progress", "averaged", "schedule")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_off_the_last_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def zero_a_block(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(len(content[middle : middle + 64]))
    file.write_bytes(content)


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def delete(file: Path) -> None:
    file.unlink()


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (
    *(truncate, cut_off_the_last_byte, empty, flip_one_bit),
    *(zero_a_block, append, delete, folder_in_its_place),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, *RUN)["status"] == "completed"
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 7, with the checkpoints of steps 6 and 7 and the best one."""
    folder = tmp_path_factory.mktemp("stopped")
    assert train(folder, *RUN, stop_at=7)["steps"] == 7
    return folder


def checkpoints_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def test_the_stopped_run_is_what_the_tests_of_damage_take_it_for(stopped: Path) -> None:
    assert checkpoints_of(stopped)[-2:] == ["step_00000006", "step_00000007"]
    newest = stopped / "checkpoints" / "last"
    assert newest.readlink() == Path("step_00000007")
    found = {path.name for path in newest.iterdir()}
    assert found == {"manifest.json", *(f"{name}.pt" for name in FILES)}


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return " ".join(r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", *(f"{name}.pt" for name in FILES)])
def test_damage_to_any_file_is_found_and_named_and_the_older_checkpoint_is_used(
    name: str,
    damage: Callable[[Path], None],
    stopped: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", folder, symlinks=True)
    damage(folder / "step_00000007" / name)
    loaded = writer.load_newest(folder)
    assert loaded is not None
    assert loaded[1]["step"] == 6
    warned = warnings_of(caplog)
    assert f"step_00000007/{name}" in warned
    assert "Going back to step_00000006" in warned
    assert (folder / "damaged_step_00000007").is_dir()  # set aside, and kept
    assert not (folder / "step_00000007").exists()


def test_a_copy_that_followed_the_links_ends_the_same(
    whole: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)  # as by `scp -r`
    assert not (folder / "checkpoints" / "last").is_symlink()  # the control
    assert train(folder, *RUN)["status"] == "completed"
    assert "not saved" not in warnings_of(caplog)
    assert fingerprint(folder) == fingerprint(whole)
    for name in ("last", "best"):
        links = [each / "checkpoints" / name for each in (folder, whole)]
        assert links[0].readlink() == links[1].readlink()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_newest_checkpoint_is_damaged_ends_the_same(
    damage: Callable[[Path], None], whole: Path, stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    damage(folder / "checkpoints" / "step_00000007" / "model.pt")
    train(folder, *RUN)
    assert fingerprint(folder) == fingerprint(whole)
    assert (folder / "checkpoints" / "damaged_step_00000007").is_dir()


def test_an_empty_checkpoint_folder_is_passed_over(
    whole: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    for file in (folder / "checkpoints" / "step_00000007").iterdir():
        file.unlink()
    train(folder, *RUN)
    assert "step_00000007/manifest.json is missing" in warnings_of(caplog)
    assert fingerprint(folder) == fingerprint(whole)


def test_torch_alone_takes_a_flipped_bit_and_the_end_differs(
    whole: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: without the manifest's hashes, the same damage goes unnoticed."""
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    file = folder / "checkpoints" / "step_00000007" / "model.pt"
    weights = torch.load(file, weights_only=True)["head.weight"].numpy().tobytes()
    content = bytearray(file.read_bytes())
    content[content.index(weights) + 2] ^= 4
    file.write_bytes(content)
    monkeypatch.setattr(writer, "verify", writer.read_manifest)
    train(folder, *RUN)
    assert fingerprint(folder) != fingerprint(whole)


def test_a_flipped_bit_in_any_byte_of_a_manifest_is_found(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped / "checkpoints" / "step_00000007", tmp_path / "step_00000007")
    folder = tmp_path / "step_00000007"
    manifest = folder / "manifest.json"
    content = manifest.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        manifest.write_bytes(flipped)
        with pytest.raises(DamagedCheckpoint):
            writer.read_manifest(folder)
    manifest.write_bytes(content)
    writer.verify(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "7", '"text"', "{", "\x00" * 50])
def test_a_manifest_that_is_something_else_is_damage(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match=r"step_00000001/manifest\.json"):
        writer.read_manifest(folder)


def contents_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_when_all_are_damaged_one_line_says_so_and_nothing_is_deleted(
    stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder, symlinks=True)
    names = checkpoints_of(folder)
    for name in names:
        flip_one_bit(folder / "checkpoints" / name / "optimizer.pt")
    before = contents_of(folder)
    for _ in range(2):  # trying again does no harm
        with pytest.raises(UserError, match="every checkpoint is damaged") as caught:
            train(folder, *RUN)
        assert "\n" not in str(caught.value)
        assert all(f"{name}/optimizer.pt" in str(caught.value) for name in names)
        assert contents_of(folder) == before


def test_a_step_damaged_twice_is_set_aside_twice(tmp_path: Path) -> None:
    for _ in range(2):
        for step in (1, 2):
            writer.write(tmp_path, part(step), facts(step))
        flip_one_bit(tmp_path / "step_00000002" / "model.pt")
        assert writer.load_newest(tmp_path)
    aside = sorted(path.name for path in tmp_path.glob("damaged_*"))
    assert aside == ["damaged_step_00000002", "damaged_step_00000002_1"]


def test_a_damaged_best_checkpoint_is_named_when_it_is_to_be_tested(tmp_path: Path) -> None:
    # The highest loss is that of the first evaluation, at step 4.
    run = (*RUN, "trainer.monitor=val/loss", "trainer.mode=max")
    train(tmp_path, *run, stop_at=9)
    flip_one_bit(tmp_path / "checkpoints" / "step_00000004" / "averaged.pt")
    with pytest.raises(UserError, match=r"step_00000004/averaged\.pt") as caught:
        train(tmp_path, *run)
    assert "\n" not in str(caught.value)


# Parts


@pytest.mark.parametrize("name", FILES)
def test_a_missing_part_is_an_error(name: str, stopped: Path) -> None:
    objects = training.build(config_of(*RUN), CPU)
    parts, _ = writer.load((stopped / "checkpoints" / "last").resolve())
    del parts[name]
    with pytest.raises(ValueError, match=f"lacks {name}; unexpected in it: nothing"):
        objects.state.load_state_dict(parts)


def test_an_unexpected_part_is_an_error(stopped: Path) -> None:
    parts, _ = writer.load((stopped / "checkpoints" / "last").resolve())
    plain = tuple(o for o in RUN if "ema_decay" not in o)
    objects = training.build(config_of(*plain), CPU)
    with pytest.raises(ValueError, match="lacks nothing; unexpected in it: averaged"):
        objects.state.load_state_dict(parts)
    objects = training.build(config_of(*RUN), CPU)
    objects.state.load_state_dict(parts)
    assert objects.state.step == 7


@pytest.mark.parametrize("name", ["best_value", "num_micro_batches", "evaluated_step", "sums"])
def test_a_missing_field_of_the_progress_is_an_error(name: str, stopped: Path) -> None:
    parts, _ = writer.load((stopped / "checkpoints" / "last").resolve())
    del parts["progress"][name]
    objects = training.build(config_of(*RUN), CPU)
    with pytest.raises((ValueError, KeyError, TypeError), match=name):
        objects.state.load_state_dict(parts)


def test_a_missing_or_unexpected_weight_is_an_error(stopped: Path) -> None:
    for change in (lambda p: p.pop("head.bias"), lambda p: p.update(more=torch.zeros(1))):
        parts, _ = writer.load((stopped / "checkpoints" / "last").resolve())
        change(parts["model"])
        with pytest.raises(UserError, match=r"head\.bias|more"):
            training.build(config_of(*RUN), CPU).state.load_state_dict(parts)


def names_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(k) for k in value] + [n for v in value.values() for n in names_in(v)]
    if isinstance(value, list | tuple):
        return [name for item in value for name in names_in(item)]
    return []


@pytest.mark.slow
def test_no_key_carries_the_prefix_of_a_wrapper(stopped: Path) -> None:
    compiled = training.build(config_of(*RUN, "trainer.compile=true"), CPU)
    parts, _ = writer.load((stopped / "checkpoints" / "last").resolve())
    for found in (names_in(parts), names_in(compiled.state.state_dict())):
        assert "head.weight" in found
        assert not [name for name in found if "module." in name or "_orig_mod" in name]
    wrapped = torch.compile(compiled.state.model).state_dict()
    assert [name for name in wrapped if "_orig_mod" in name]  # the control: the wrapper has them


# Rotation


def facts(step: int, value: float | None = None, **more: Any) -> CheckpointFacts:
    known = {"epoch": step, "milestone": False, "metrics_bytes": 0}
    return CheckpointFacts(step=step, value=value, **{**known, **more})


def part(value: float = 0.0) -> dict[str, dict[str, Any]]:
    return {"model": {"weight": torch.full((4,), value)}}


def written(folder: Path, values: list[float | None], options: Any, mode: str = "max") -> set[int]:
    """Return the steps left after a checkpoint and a rotation for each value."""
    for step, value in enumerate(values, 1):
        milestone = bool(options.milestones_every_epochs) and step % 3 == 0
        writer.write(folder, part(step), facts(step, value, milestone=milestone))
        writer.rotate(folder, options, mode, written=step)
        names = {path.name for path in folder.glob("step_*")}
        assert f"step_{step:08d}" in names  # the one just written
        assert (folder / "last").resolve().name == f"step_{step:08d}"
        known = [v for v in values[:step] if v is not None and v == v]
        if known:
            best = (max if mode == "max" else min)(known)
            latest = max(at for at, v in enumerate(values[:step], 1) if v == best)
            assert (folder / "best").resolve().name == f"step_{latest:08d}"
        writer.load((folder / "last").resolve())
    return {int(path.name[5:]) for path in folder.glob("step_????????")}


def options_of(**changes: Any) -> CheckpointOptions:
    return CheckpointOptions(**{**vars(OPTIONS), **changes})


NAN = float("nan")


@pytest.mark.parametrize(
    ("changes", "mode", "values", "left"),
    [
        ({}, "max", [0.9, 0.1, 0.2, 0.3, 0.4], {1, 4, 5}),
        ({}, "min", [0.9, 0.1, 0.2, 0.3, 0.4], {2, 4, 5}),
        ({}, "max", [None, None, None, None], {3, 4}),
        ({}, "max", [0.5, 0.5, 0.5, 0.5], {3, 4}),
        ({}, "max", [0.5, 0.5, 0.5, 0.1, 0.1, 0.1], {3, 5, 6}),
        ({}, "min", [0.5, 0.5, 0.6, 0.6, 0.6], {2, 4, 5}),
        ({"keep_best": 2}, "max", [0.5, 0.5, 0.5, 0.1, 0.1, 0.1], {2, 3, 5, 6}),
        ({}, "max", [NAN, 0.5, NAN, 0.1, NAN], {2, 4, 5}),
        ({"keep_last": 1}, "max", [0.1, 0.2, 0.3], {3}),
        ({"keep_last": 0, "keep_best": 0}, "max", [0.3, 0.2, 0.1], {1, 3}),
        ({"keep_best": 3}, "max", [0.9, 0.8, 0.7, 0.1, 0.2, 0.3], {1, 2, 3, 5, 6}),
        ({"milestones_every_epochs": 3}, "max", [0.1] * 8, {3, 6, 7, 8}),
    ],
)
def test_rotation_keeps_newest_best_and_milestones(
    changes: dict[str, Any], mode: str, values: list[float | None], left: set[int], tmp_path: Path
) -> None:
    assert written(tmp_path, values, options_of(**changes), mode) == left


def test_steps_of_nine_digits_are_the_newest_and_are_rotated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = 99_999_998
    for step in range(first, first + 5):
        writer.write(tmp_path, part(step), facts(step))
        writer.rotate(tmp_path, OPTIONS, None, written=step)
        assert (tmp_path / "last").resolve().name == f"step_{step}"
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_100000001", "step_100000002"}
    newest = CheckpointWriter(tmp_path, OPTIONS, None).newest_until
    assert newest(10**9) == "step_100000002" and newest(100_000_001) == "step_100000001"
    (tmp_path / "step_100000002" / "model.pt").write_bytes(b"")
    for foreign in ("step_0000000100", "step_\u0661\u0662\u0663\u0664\u0665\u0666\u0667\u0668"):
        (tmp_path / foreign).mkdir()
    loaded = writer.load_newest(tmp_path)
    assert loaded is not None and loaded[1]["step"] == 100_000_001
    assert (tmp_path / "damaged_step_100000002").is_dir()
    for prefix in (".tmp-", ".old-"):
        (tmp_path / f"{prefix}step_100000000").mkdir()
    CheckpointWriter(tmp_path, OPTIONS, None)
    assert not [*tmp_path.glob(".*-step_*")]


@pytest.mark.parametrize("every", ["null", "1"])
def test_a_milestone_is_the_last_step_of_its_epoch(every: str, tmp_path: Path) -> None:
    run = (*TINY, "trainer.checkpoint.save_every_epochs=null", "trainer.eval_every_epochs=null")
    run = (*run, "trainer.checkpoint.keep_last=1", f"trainer.checkpoint.save_every_steps={every}")
    train(tmp_path, *run, "trainer.checkpoint.milestones_every_epochs=2")
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step_*")}
    assert kept == {"step_00000008", "step_00000012"}  # an epoch has four steps


def test_a_folder_called_best_that_lacks_a_manifest_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "notes.txt").touch()
    writer.write(tmp_path, part(1), facts(1, 0.5))
    with pytest.raises(OSError, match="best"):
        writer.rotate(tmp_path, OPTIONS, "max", written=1)
    assert (tmp_path / "best" / "notes.txt").exists()


def test_rotation_keeps_a_written_one_that_is_neither_newest_nor_best(tmp_path: Path) -> None:
    for step in (5, 6, 7, 3):
        writer.write(tmp_path, part(step), facts(step, 0.1 * step))
    writer.rotate(tmp_path, OPTIONS, "max", written=3)
    assert checkpoints_of_folder(tmp_path) == ["step_00000003", "step_00000006", "step_00000007"]


def test_rotation_touches_nothing_but_checkpoints_of_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.pt").write_bytes(b"x")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "step_final").mkdir()
    (folder / "damaged_step_00000001").mkdir()
    (folder / ".tmp-step_00000099").symlink_to(outside)
    (folder / ".old-step_00000098").symlink_to(outside)
    CheckpointWriter(folder, OPTIONS, "max")
    written(folder, [0.1, 0.2, 0.3, 0.4], OPTIONS)
    assert contents_of(outside) == {"precious.pt": b"x"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "step_final").is_dir()
    assert (folder / "damaged_step_00000001").is_dir()


def test_a_checkpoint_of_a_newer_format_is_refused_and_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, [0.1], OPTIONS)
    with monkeypatch.context() as later:
        later.setattr(writer, "FORMAT", 2)
        writer.write(tmp_path, part(), facts(2))
        assert writer.load_newest(tmp_path) is not None
    with pytest.raises(UserError, match="has format 2, and this code reads up to 1"):
        writer.load_newest(tmp_path)
    assert (tmp_path / "step_00000002").is_dir()


def test_last_and_best_are_files_where_links_are_not_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    summary = train(tmp_path, *RUN)
    folder = tmp_path / "checkpoints"
    assert not any(path.is_symlink() for path in folder.iterdir())
    for name, step in (("last", summary["steps"]), ("best", summary["best"]["step"])):
        assert writer.named(folder, name) == folder / f"step_{step:08d}"
    assert summary["test"]["test/loss"] > 0
    model = training.build(config_of(*RUN), CPU).state.model
    load_weights(model, tmp_path)


def test_a_killed_runs_status_tells_the_step_of_its_last_checkpoint(tmp_path: Path) -> None:
    set_status(tmp_path, "running", step=0, pids=[1])
    train(tmp_path, *RUN, stop_at=7)
    status = load_status(tmp_path)
    assert status is not None and (status["step"], status["state"]) == (7, "interrupted")


def test_incomplete_folders_do_not_count_as_kept_ones(tmp_path: Path) -> None:
    written(tmp_path, [0.1, 0.2], OPTIONS)
    for step in (8, 9):  # newer, and without a manifest
        (tmp_path / f"step_{step:08d}").mkdir()
    writer.rotate(tmp_path, OPTIONS, "max", written=2)
    assert {path.name for path in writer.complete(tmp_path)} == {
        "step_00000001",
        "step_00000002",
    }
    assert (tmp_path / "last").resolve().name == "step_00000002"


def test_the_next_writer_clears_a_killed_ones_files_and_puts_back_the_checkpoint_set_aside(
    tmp_path: Path,
) -> None:
    written(tmp_path, [0.1, 0.2], OPTIONS)
    shutil.copytree(tmp_path / "step_00000002", tmp_path / ".tmp-step_00000003")
    (tmp_path / "step_00000002").rename(tmp_path / ".old-step_00000002")  # about to be replaced
    CheckpointWriter(tmp_path, OPTIONS, "max")
    assert checkpoints_of_folder(tmp_path) == ["step_00000001", "step_00000002"]
    assert not list(tmp_path.glob(".*"))
    loaded = writer.load_newest(tmp_path)
    assert loaded is not None
    assert loaded[1]["step"] == 2


def test_a_checkpoint_half_deleted_by_a_killed_rotation_does_not_come_back(tmp_path: Path) -> None:
    written(tmp_path, [0.1, 0.2, 0.3], OPTIONS)
    old = tmp_path / ".old-step_00000001"
    shutil.copytree(tmp_path / "step_00000002", old)
    (old / "model.pt").unlink()
    CheckpointWriter(tmp_path, OPTIONS, "max")
    assert checkpoints_of_folder(tmp_path) == ["step_00000002", "step_00000003"]


def checkpoints_of_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


# Writing in the background


def test_the_copy_is_of_the_moment_of_saving(tmp_path: Path, monkeypatch: Any) -> None:
    go_on = threading.Event()
    write = writer.write

    def late(*args: Any) -> Path:
        assert go_on.wait(10)
        return write(*args)

    monkeypatch.setattr(writer, "write", late)
    saver = CheckpointWriter(tmp_path, OPTIONS, "max")
    weights = torch.ones(4)
    saver.save(
        {"model": {"weight": weights, "list": [1, (2, weights)]}}, facts(1), lambda position: None
    )
    weights.zero_()  # the next step
    assert not list(tmp_path.glob("step_*"))
    go_on.set()
    assert saver.wait()
    parts, _ = writer.load(tmp_path / "step_00000001")
    assert parts["model"]["weight"].tolist() == [1.0] * 4
    assert parts["model"]["list"][1][1].tolist() == [1.0] * 4
    # Without a copy, it would hold the weights of the next step.
    monkeypatch.setattr(CheckpointWriter, "_copy", lambda self, parts: (parts, {}))
    go_on.clear()
    weights.fill_(1)
    saver.save({"model": {"weight": weights}}, facts(2), lambda position: None)
    weights.zero_()
    go_on.set()
    saver.wait()
    assert writer.load(tmp_path / "step_00000002")[0]["model"]["weight"].tolist() == [0.0] * 4


@pytest.mark.parametrize("later", [torch.ones(4, dtype=torch.float64) / 3, torch.ones(2, 2)])
def test_the_copy_has_the_type_and_shape_of_the_moment_of_saving(
    later: torch.Tensor, tmp_path: Path
) -> None:
    saver = CheckpointWriter(tmp_path, OPTIONS, "max")
    for step, tensor in enumerate((torch.zeros(4), later), 1):
        saver.save({"model": {"cache": tensor}}, facts(step), lambda position: None)
        assert saver.wait()
        found = writer.load(tmp_path / f"step_{step:08d}")[0]["model"]["cache"]
        torch.testing.assert_close(found, tensor, rtol=0, atol=0)


@pytest.fixture
def no_garbage_is_collected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_is_collected")
def test_a_save_keeps_none_of_the_tensors_that_it_copied(tmp_path: Path) -> None:
    """Some are copies made for it, such as a schedule-free optimizer's weights, on the device."""
    saver = CheckpointWriter(tmp_path, OPTIONS, "max")
    facts = CheckpointFacts(step=1, epoch=0, value=None, milestone=False, metrics_bytes=0)
    weights = torch.zeros(4)
    uses = torch._C._storage_Use_Count(weights.untyped_storage()._cdata)
    saver.make_room(lambda: {"model": {"weights": weights}})
    saver.save({"model": {"weights": weights}}, facts, lambda position: None)
    assert saver.wait()
    assert torch._C._storage_Use_Count(weights.untyped_storage()._cdata) == uses


@pytest.mark.usefixtures("no_garbage_is_collected")
def test_a_resume_keeps_none_of_the_sharded_tensors_that_it_read(
    tmp_path: Path, monkeypatch: Any
) -> None:
    from regrow.checkpoint import sharded

    monkeypatch.setattr(
        sharded, "read", lambda folder, empty, mesh: {name: torch.ones(4) for name in empty}
    )
    marked = {"optimizer": {"state": [torch.empty(4, device="meta"), torch.zeros(2)]}}
    parts = writer.fill(marked, tmp_path)
    found, kept = parts["optimizer"]["state"]
    assert torch.equal(found, torch.ones(4)) and torch.equal(kept, torch.zeros(2))
    last = weakref.ref(found)
    del found, parts
    assert last() is None


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of one thread")
def test_the_memory_of_the_first_copy_is_touched_beforehand(tmp_path: Path) -> None:
    parts = {"model": {"weight": torch.ones(8 << 20), "half": torch.ones(99, dtype=torch.half)}}
    faults, kept = [], []
    for makes_room in (True, False):
        saver = CheckpointWriter(tmp_path / str(makes_room), OPTIONS, "max")
        kept.append(saver)  # its memory cannot be reused
        if makes_room:
            saver.make_room(lambda: parts)
            saver.wait()
            saver.make_room(lambda: {}["never asked again"])
        parts["model"]["weight"] += 1
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        saver.save(parts, facts(1), lambda position: None)
        faults.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
        assert saver.wait()
        saved = writer.load(saver.folder / "step_00000001")[0]["model"]["weight"]
        assert torch.equal(saved, parts["model"]["weight"])
    with_room, without = faults
    if without < 1000:
        pytest.skip("the kernel gives large pages here")
    assert with_room < without / 10  # of 8192 pages


@pytest.mark.parametrize(
    ("skips_first", "is_small"), [(False, False), (True, False), (False, True)]
)
def test_a_run_makes_room_for_its_first_checkpoint_unless_it_is_small(
    skips_first: bool, is_small: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, even if the first step leaves the optimizer without a state."""
    if not is_small:
        monkeypatch.setattr(writer, "SMALL_BYTES", 0)
    update, updates = optim.update, []

    def updated(*args: Any, **named: Any) -> Any:
        updates.append(1)
        if len(updates) == 1 and skips_first:
            return Skipped(True)
        return update(*args, **named)

    save, ready = CheckpointWriter.save, []

    def looked_at(self: CheckpointWriter, *args: Any) -> None:
        self.wait()
        ready.append(sorted(self._copies))
        save(self, *args)

    monkeypatch.setattr(CheckpointWriter, "save", looked_at)
    monkeypatch.setattr(optim, "update", updated)
    train(tmp_path, *RUN)
    assert any(name.endswith("exp_avg_sq") for name in ready[-1])
    assert ready[0] == ([] if is_small else ready[-1])


def test_there_are_never_two_writes_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    write, active, most = writer.write, [0], [0]

    def counted(*args: Any) -> Path:
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.02)
        path = write(*args)
        active[0] -= 1
        return path

    monkeypatch.setattr(writer, "write", counted)
    for waits, expected in ((True, 1), (False, 2)):
        most[0] = 0
        saver = CheckpointWriter(tmp_path, OPTIONS, "max")
        if not waits:  # the negative control
            saver.wait = lambda: True  # type: ignore[method-assign]
        threads = []
        for step in range(1, 5):
            saver.save(part(step), facts(step), lambda position: None)
            threads.append(saver._thread)
        for thread in threads:
            assert thread is not None
            thread.join()
        assert (most[0] > 1) == (expected > 1)


class FullDisk:
    """Lets every file sync fail while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on = False
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if self.on:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_that_the_disk_cannot_read_is_damaged(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(stopped / "checkpoints", folder, symlinks=True)
    real = hashlib.file_digest

    def digest(file: Any, kind: Any) -> Any:
        if file.name.endswith("step_00000007/model.pt"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    loaded = writer.load_newest(folder)
    assert loaded is not None and loaded[1]["step"] == 6
    assert "step_00000007/model.pt cannot be read: Input/output error" in warnings_of(caplog)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_file_system_that_syncs_no_folders_takes_checkpoints(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if number == errno.EIO:  # the control: a disk that fails is told
        with pytest.raises(OSError, match="Input/output"):
            writer.write(tmp_path, part(1), facts(1))
        return
    writer.load(writer.write(tmp_path, part(1), facts(1)))


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_write_is_reported_at_the_next_save_and_the_older_one_loads(
    background: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = FullDisk(monkeypatch)
    saver = CheckpointWriter(tmp_path, options_of(background=background), "max")
    saver.save(part(1), facts(1), lambda position: None)
    assert saver.wait()
    disk.on = True
    saver.save(part(2), facts(2), lambda position: None)
    if saver._thread is not None:
        saver._thread.join()
    disk.on = False
    assert ("No space left" in warnings_of(caplog)) is not background
    saver.save(part(3), facts(3), lambda position: None)
    assert "checkpoint not saved" in warnings_of(caplog)
    assert "No space left" in warnings_of(caplog)
    assert saver.wait()
    assert checkpoints_of_folder(tmp_path) == ["step_00000001", "step_00000003"]
    assert not list(tmp_path.glob(".tmp-step*"))
    for step in (1, 3):
        writer.load(tmp_path / f"step_{step:08d}")


def test_a_failed_write_is_reported_at_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = writer.write
    reported: dict[int, bool] = {}

    def full_at_three(folder: Path, parts: Any, facts: CheckpointFacts, *others: Any) -> Path:
        if facts.step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, parts, facts, *others)

    def after_the_write(state: Any, plan: Any) -> None:
        if plan.checkpoints._thread is not None:
            plan.checkpoints._thread.join()
        reported[state.step] = "No space left" in warnings_of(caplog)

    monkeypatch.setattr(writer, "write", full_at_three)
    before_each_step(monkeypatch, after_the_write)
    run = (*TINY, "trainer.checkpoint.save_every_steps=3", "trainer.eval_every_epochs=null")
    train(tmp_path / "run", *run, "trainer.checkpoint.save_every_epochs=null")
    assert [step for step, said in reported.items() if not said] == [0, 1, 2, 3]
    # Without the check at each step, the next save would be the first to report it.
    caplog.clear()
    reported.clear()
    monkeypatch.setattr(CheckpointWriter, "poll", lambda self: None)
    train(tmp_path / "late", *run, "trainer.checkpoint.save_every_epochs=null")
    assert [step for step, said in reported.items() if not said] == [0, 1, 2, 3, 4, 5]


def test_a_checkpoint_is_never_ahead_of_its_record(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Lines of steps 4 to 6 do not fit, the checkpoint of step 6 would; then the run dies."""
    pwrite = os.pwrite
    full = [False]

    def no_room_for_lines(descriptor: int, *rest: Any) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, *rest)

    def until_eight(state: Any, *args: Any) -> Any:
        full[0] = 3 <= state.step < 7
        if state.step == 7:
            raise KeyboardInterrupt
        return train_step(state, *args)

    def dies_and_goes_on(folder: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", no_room_for_lines)
            patch.setattr("lab.step.train_step", until_eight)
            with pytest.raises(KeyboardInterrupt):
                train(folder, *RUN, "trainer.checkpoint.save_every_epochs=null")
        train(folder, *RUN, "trainer.checkpoint.save_every_epochs=null")

    run = tmp_path / "run"
    dies_and_goes_on(run)
    assert "metrics.jsonl has no room for its lines" in warnings_of(caplog)
    assert fingerprint(run) == fingerprint(whole)
    # If the file counts as complete, the waiting lines are lost.
    with monkeypatch.context() as patch:
        patch.setattr(loggers.Jsonl, "position", lambda self: self.end)
        dies_and_goes_on(tmp_path / "broken")
    assert fingerprint(tmp_path / "broken") != fingerprint(whole)


def test_a_run_on_a_full_disk_continues_and_ends_the_same(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = FullDisk(monkeypatch)

    def full_from_five_to_eight(state: Any, *args: Any) -> Any:
        disk.on = 5 <= state.step < 8
        return train_step(state, *args)

    monkeypatch.setattr("lab.step.train_step", full_from_five_to_eight)
    summary = train(tmp_path, *RUN)
    assert summary["status"] == "completed"
    assert summary["best"]["step"] == 12  # its weights were saved
    assert "checkpoint not saved" in warnings_of(caplog)
    assert fingerprint(tmp_path) == fingerprint(whole)


def test_a_best_checkpoint_that_could_not_be_saved_is_named_when_another_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = writer.write

    def full_at_four(folder: Path, parts: Any, facts: CheckpointFacts, *others: Any) -> Path:
        if facts.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(folder, parts, facts, *others)

    monkeypatch.setattr(writer, "write", full_at_four)
    # The highest loss is that of the first evaluation.
    summary = train(tmp_path, *RUN, "trainer.mode=max")
    assert summary["best"]["step"] == 4
    assert "the best weights, of step 4, were not saved" in warnings_of(caplog)


def test_an_unwritable_folder_is_reported_and_the_older_checkpoint_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not by permissions: those do not bind an administrator."""
    saver = CheckpointWriter(tmp_path, OPTIONS, "max")
    saver.save(part(1), facts(1), lambda position: None)
    saver.wait()
    mkdir = Path.mkdir

    def refused(self: Path, *args: Any, **named: Any) -> None:
        if self.parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *args, **named)

    monkeypatch.setattr(Path, "mkdir", refused)
    saver.save(part(2), facts(2), lambda position: None)
    assert not saver.wait()
    assert "Permission denied" in warnings_of(caplog)
    loaded = writer.load_newest(tmp_path)
    assert loaded is not None
    assert loaded[1]["step"] == 1


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), ValueError("boom")])
def test_any_failure_of_the_writer_is_reported(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr(writer, "rotate", fail)
    saver = CheckpointWriter(tmp_path, OPTIONS, "max")
    saver.save(part(1), facts(1), lambda position: None)
    assert not saver.wait()
    assert "checkpoint not saved" in warnings_of(caplog)


LIMITED = """
import logging, resource, signal, sys
from pathlib import Path
import torch
from regrow.checkpoint.writer import CheckpointWriter
from test_checkpoint import OPTIONS, facts
folder = Path(sys.argv[1])
logging.basicConfig(format="%(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
saver = CheckpointWriter(folder, OPTIONS, "max")
def save(step):
    parts = {"model": {"weight": torch.full((50_000,), float(step))}}
    saver.save(parts, facts(step), lambda position: None)
    print(step, saver.wait())
save(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
save(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save(3)
"""


@pytest.mark.slow
def test_a_real_limit_of_file_size_loses_one_checkpoint_and_no_more(tmp_path: Path) -> None:
    paths = [str(Path(training.__file__).parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert [line for line in said if line[0].isdigit()] == ["1 True", "2 False", "3 True"]
    (warning,) = (line for line in said if not line[0].isdigit())
    assert warning.startswith(f"checkpoint not saved: [Errno {errno.EFBIG}] ")  # not torch's words
    assert checkpoints_of_folder(tmp_path) == ["step_00000001", "step_00000003"]
    assert not list(tmp_path.glob(".tmp-*"))
    for step in (1, 3):
        parts, _ = writer.load(tmp_path / f"step_{step:08d}")
        assert parts["model"]["weight"].unique().tolist() == [step]


def test_a_checkpoint_holds_tensors_and_plain_containers_only(stopped: Path) -> None:
    folder = (stopped / "checkpoints" / "last").resolve()
    content = json.loads((folder / "manifest.json").read_text())
    assert set(content["files"]) == {f"{name}.pt" for name in FILES}
    for name in content["files"]:
        torch.load(folder / name, weights_only=True)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    writer.write(tmp_path, {"model": {"weight": Evil()}}, facts(1))
    with pytest.raises(DamagedCheckpoint, match="is not opened"):
        writer.load(tmp_path / "step_00000001")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "step_00000001" / "model.pt", weights_only=False)
    assert (tmp_path / "executed").exists()  # without the refusal, it does


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@dataclasses.dataclass
class WithMore(TrainState):
    """New fields of each kind, and nothing else."""

    number: int = 0
    mean: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3))
    totals: list[float] = dataclasses.field(default_factory=lambda: [0.0])
    counter: Counter = dataclasses.field(default_factory=Counter)
    known: int = dataclasses.field(default=0, metadata=FOLLOWS)


def test_a_new_field_of_the_state_is_saved_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lab.build.TrainState", WithMore)
    state = training.build(config_of(*RUN), CPU).state
    assert isinstance(state, WithMore)
    state.number, state.totals, state.known = 3, [0.1, 2.0], 5
    state.mean += 0.1
    state.counter.count = 4
    parts = state.state_dict()
    assert parts["counter"] == {"count": 4}
    torch.save(parts, tmp_path / "parts.pt")
    later = training.build(config_of(*RUN), CPU).state
    assert isinstance(later, WithMore)
    later.load_state_dict(torch.load(tmp_path / "parts.pt"))
    assert (later.number, later.totals, later.counter.count) == (3, [0.1, 2.0], 4)
    assert torch.equal(later.mean, state.mean)
    assert later.known == 0 and "known" not in parts["progress"]
    for lost in ("number", "mean", "counter"):  # the control: a lost field is detected
        without = {**parts, "progress": {k: v for k, v in parts["progress"].items() if k != lost}}
        without.pop(lost, None)
        with pytest.raises(UserError, match=lost):
            later.load_state_dict(without)
