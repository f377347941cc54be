"""Runs on cached images: killed builds, several processes, and resumes with and without."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finished
import in_ranks
import numpy as np
import pytest
import torch
from forked import without_pictures
from PIL import Image
from running import CPU, config_of, fingerprint
from running import train as trained

from regrow.feeding import resized
from regrow.feeding.decoding import to_tensor
from regrow.feeding.images import ImageFiles
from regrow.feeding.resized import keep_resized

SIZES = ((40, 56), (61, 33), (37, 37))
GIVEN = (
    "data=resized_folder", "model.hidden=[8]", "data.num_classes=2", "data.input_shape=[3,16,16]",
    "data.source.resize=18", "data.batch_size=5", "data.num_workers=0", "trainer.max_epochs=2",
    "trainer.num_threads=1", "trainer.device=cpu", "trainer.log_every_steps=1",
)  # fmt: skip


def photos(root: Path, count: int) -> Path:
    for number in range(count):
        height, width = SIZES[number % 3]
        coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        folder = root / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height)).save(folder / f"{number:03}.jpg")
    return root


def split(root: Path) -> ImageFiles:
    files = sorted(map(str, root.rglob("*.jpg")))
    how = ([0] * len(files), [16, 16], 3, 18, str(root), True, "contents", "torchvision")
    return ImageFiles(files, *how)


def child(work: Callable[[], Any]) -> int:
    """Start `work` in a process of its own, which exits with 0 unless it raises."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def equal(kept: ImageFiles) -> bool:
    assert kept.resized is not None
    found = [kept.resized.read(index) for index in range(len(kept))]
    expected = [to_tensor(kept.resized_file(file)) for file in kept.files]
    return all(
        ours is not None and torch.equal(ours, theirs)
        for ours, theirs in zip(found, expected, strict=True)
    )


def test_a_killed_build_is_finished_and_loses_only_the_last_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = split(photos(tmp_path / "photos", 60))
    original = ImageFiles.resized_file
    draw = random.Random(0)

    def slow(self: ImageFiles, file: str, content: bytes | None = None) -> Any:
        time.sleep(0.004)
        return original(self, file, content)

    monkeypatch.setattr(ImageFiles, "resized_file", slow)
    monkeypatch.setattr(resized, "SYNCED_BYTES", 5_000)
    monkeypatch.setattr(resized, "cores", lambda: 1)
    folder = tmp_path / ".photos.resized"

    def index() -> Path | None:
        return next(folder.glob("*.index"), None)

    numbers, killed = [0], 0
    while numbers[-1] < 60:
        pid = child(lambda: keep_resized([images], None, 1))
        before = path.stat().st_size if (path := index()) else 0
        while (path := index()) is None or path.stat().st_size == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)  # it is not collected yet
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        found = resized.CacheFiles(path.with_suffix(""), 3).read()
        numbers.append(len(found.entries) if found else 0)
    assert killed >= 2 and numbers == sorted(numbers)  # nothing that was synced is lost
    assert sum(0 < number < 60 for number in numbers) > 0
    monkeypatch.undo()
    (kept,) = keep_resized([images], None, 1)
    assert equal(kept)
    pixels = path.with_suffix(".pixels")
    content = pixels.read_bytes()
    pixels.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not equal(kept)  # the negative control


def test_processes_at_once_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = split(photos(tmp_path / "photos", 40))
    original = ImageFiles.resized_file

    def noted(self: ImageFiles, file: str, content: bytes | None = None) -> Any:
        with (tmp_path / "resized").open("a") as notes:
            notes.write(f"{os.getpid()} {Path(file).name}\n")
        return original(self, file, content)

    monkeypatch.setattr(ImageFiles, "resized_file", noted)

    def work() -> None:
        (kept,) = keep_resized([images], None, 1)
        assert kept.resized is not None
        assert all(kept.resized.read(index) is not None for index in range(len(kept)))

    pids = [child(work) for _ in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    lines = (tmp_path / "resized").read_text().splitlines()
    assert len(lines) == 40 and len({line.split()[0] for line in lines}) == 1
    monkeypatch.undo()
    (kept,) = keep_resized([images], None, 1)
    assert equal(kept)


def train(folder: Path, *overrides: str, stop_at: int | None = None) -> None:
    with without_pictures():
        trained(folder, *overrides, stop_at=stop_at)


def test_a_run_resumes_with_and_without_cached_images(tmp_path: Path) -> None:
    given = (*GIVEN, f"data.root={photos(tmp_path / 'photos', 24)}", "trainer.max_epochs=1")
    train(tmp_path / "whole", *given, "data.cache=null")
    for name, caches in {"on": ("resized", "null"), "off": ("null", "resized")}.items():
        for cache, stop_at in zip(caches, (2, None), strict=True):
            train(tmp_path / name, *given, f"data.cache={cache}", stop_at=stop_at)
        assert fingerprint(tmp_path / name) == fingerprint(tmp_path / "whole")
    train(tmp_path / "other", *given, "data.source.decoder=pillow")
    assert fingerprint(tmp_path / "other") != fingerprint(tmp_path / "whole")  # the control


@pytest.mark.slow
def test_data_workers_and_processes_read_cached_images(tmp_path: Path) -> None:
    given = (
        *GIVEN,
        f"data.root={photos(tmp_path / 'photos', 24)}",
        "model.dropout=0",
        "optimizer=sgd",
    )
    train(tmp_path / "whole", *given, "data.cache=null")
    train(tmp_path / "workers", *given, "data.num_workers=2", stop_at=3)
    train(tmp_path / "workers", *given, "data.num_workers=1")
    assert fingerprint(tmp_path / "workers") == fingerprint(tmp_path / "whole")
    config = config_of(*GIVEN[:2], *given[2:], f"data.cache_root={tmp_path / 'new'}")
    torch.set_num_threads(1)
    one = in_ranks.trained(CPU, config_of(*given, "data.cache=null"), tmp_path)
    other = in_ranks.trained(CPU, config_of(*given, "data.seed=1"), tmp_path)
    for rank in in_ranks.together(2, config, tmp_path, ("trained",)):  # both at once make it
        assert apart(rank["trained"], one) < 1e-5
        assert apart(rank["trained"], other) > 1e-4  # the control
    assert len([*(tmp_path / "new").glob("photos-*/*.pixels")]) == 1


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(
        float((one["weights"][name] - other["weights"][name]).abs().max())
        for name in one["weights"]
    )


@pytest.mark.slow
def test_the_jobs_of_a_sweep_share_the_cached_images(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 24)
    options = [*GIVEN, f"data.root={root}", "optimizer.lr=0.01,0.02", "hydra.sweep.dir=sweep"]
    done = finished.process("train", "-m", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (index,) = (tmp_path / ".photos.resized").glob("*.index")
    size = resized.RECORD.size + resized.CHECKSUM.size
    assert (index.stat().st_size - resized.HEADER) / size == 24  # each once
