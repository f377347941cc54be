"""`make_shards.py` as a command: each kind of source, a kill at any instant, and its errors."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from PIL import Image
from running import fingerprint, metrics_of, train

from regrow.feeding.remote import Folder
from regrow.feeding.shards import read_index
from regrow.project import ROOT

SMALL = ("shard_mb=0.1", "block_mb=0.02")
DIGITS = (
    *("data=shards", "data.num_classes=10", "data.input_shape=[1,8,8]", "data.augment=false"),
    *("trainer.max_epochs=1", "trainer.num_threads=1", "trainer.device=cpu", "model.hidden=[8]"),
    *("data.num_workers=0", "data.source.pool_mb=0.2", "trainer.log_every_steps=1"),
)


class Columns:
    names = ("cat", "dog")


class Rows:
    """A data set like those of Hugging Face: rows by column, and `features`."""

    def __init__(self, count: int) -> None:
        self.count, self.features = count, {"label": Columns()}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": Image.new("RGB", (6, 5), (index, 0, 0)), "label": index % 2, "more": "x"}


def splits(count: int) -> dict[str, Rows]:
    return {"train": Rows(count), "test": Rows(3)}


def make(*arguments: str, cwd: Path) -> Any:
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": forked.python_path(folder, folder.parent)}
    return forked.run(
        [sys.executable, ROOT / "scripts" / "make_shards.py", *arguments], cwd=cwd,
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    done = make("data=digits", "output=shards", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "train 1,258, val 180, test 359 in shards" in done.stdout
    return folder / "shards"


def test_a_folder_of_images_becomes_shards_of_its_files(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "photos" / ("train", "val")[number % 3 == 0] / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    done = make("folder=photos", "output=my (shards)", "data.source.test_fraction=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "my (shards)").rename(tmp_path / "shards")
    index = read_index(Folder(str(tmp_path / "shards")))
    assert index.facts.kind == "images" and index.facts.class_names == ["a", "b"]
    shard = (tmp_path / "shards" / "train" / "000000.tar").read_bytes()
    for file in (tmp_path / "photos" / "train").rglob("*.png"):
        assert file.read_bytes() in shard
    line = "data=shards 'data.source.root=\"my (shards)\"' data.num_classes=2"
    assert line in done.stdout.splitlines()


@pytest.mark.parametrize(
    "source",
    [
        ("data._target_=test_make_shards.splits", "data.count=8"),
        (
            *("data.train._target_=test_make_shards.Rows", "data.train.count=8"),
            *("data.test._target_=test_make_shards.Rows", "data.test.count=3"),
        ),
    ],
)
def test_rows_like_those_of_hugging_face_become_shards(
    source: tuple[str, ...], tmp_path: Path
) -> None:
    done = make(*source, "inputs=image", "targets=label", "output=shards", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    index = read_index(Folder(str(tmp_path / "shards")))
    assert index.facts.kind == "images" and index.facts.class_names == ["cat", "dog"]
    assert {name: s[0].num_examples for name, s in index.sets.items()} == {"train": 8, "test": 3}


def test_a_command_killed_at_any_instant_is_continued_by_itself(
    digits: Path, tmp_path: Path
) -> None:
    dice = random.Random(4)
    command = [sys.executable, str(ROOT / "scripts" / "make_shards.py"), "data=digits", "output=o"]
    for _ in range(3):
        running = forked.popen(
            [*command, *SMALL], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 60
        while not (tmp_path / "o" / "train").exists() and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.15)
        running.send_signal(signal.SIGKILL)
        running.wait()
    done = make("data=digits", "output=o", *SMALL, cwd=tmp_path)
    if done.returncode:  # a kill came after the index
        assert "holds shards already" in done.stderr
    assert contents(tmp_path / "o") == contents(digits)
    assert make("data=digits", "output=p", "seed=1", *SMALL, cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "p") != contents(digits)  # the negative control


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("output=a",), "there is nothing to write: add folder=…, data=… or data._target_=…"),
        (("output=a", "data=digit"), "data=digit: there is no such option. Did you mean digits?"),
        (("output=a", "data=digits", "folder=b"), "folder=b and data=digits: give one of them."),
        (("output=a", "data=digits", "data.seed=1,2"), "values are a sweep, not one config."),
        (("output=a", "data=csv"), "must be given: add data."),
        (("output=a", "folder=none"), "data.root=none: not a folder."),
        (("output=a", "data=digits", "block_mb=0"), "block_mb=0 must be more than 0."),
        (("output=a", "data.train.count=3"), "data.train: without data=… or folder=…, it must"),
        (("output=a", "data._target_=x", "data.path=a,b"), "quotes: 'data.path=\"a,b\"'"),
        (("output=a", "data._target_=x", "data.path=a=b"), "quotes: 'data.path=\"a=b\"'"),
        (("output=a", "data=digits", "inputs=x"), "inputs=… and targets=… are given together"),
        (("output=a", "data=digits", "seeds=1"), "seeds: there is no such key. Did you mean seed?"),
        (
            ("output=a", "data._target_=test_make_shards.splits", "data.count=3", "inputs=picture",
             "targets=label"),
            "inputs=picture: the items have no such field. There are image, label, more.",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: tuple[str, ...], error: str, tmp_path: Path
) -> None:
    done = make(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert error in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_reader_that_leaves_early_ends_the_command_without_an_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does, sooner or later
    folder = Path(__file__).parent
    path = {"PYTHONPATH": forked.python_path(folder, folder.parent), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "make_shards.py"), "output=o", *(
        "data._target_=test_make_shards.splits", "data.count=8", "inputs=image", "targets=label",
    )]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **path}, stdout=writer, stderr=subprocess.PIPE,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# A run on shards


def test_a_stopped_run_on_shards_ends_with_the_same_bits(digits: Path, tmp_path: Path) -> None:
    root = f"data.source.root={digits}"
    train(tmp_path / "whole", *DIGITS, root)
    for stop, workers in ((5, 1), (None, 0)):
        train(tmp_path / "parts", *DIGITS, root, f"data.num_workers={workers}", stop_at=stop)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    train(tmp_path / "other", *DIGITS, root, "data.source.pool_mb=0.1")
    assert metrics_of(tmp_path / "other") != metrics_of(tmp_path / "whole")  # negative control


@pytest.mark.slow
def test_a_resume_refuses_other_shards(digits: Path, tmp_path: Path) -> None:
    def trained(*arguments: str) -> Any:
        command = [sys.executable, ROOT / "scripts" / "train.py", *arguments]
        return forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    options = [option for option in DIGITS if "max_epochs" not in option]
    place = f"data.source.root={digits}"
    done = trained(*options, place, "trainer.max_steps=2", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    done = make("data=digits", "output=other", "seed=1", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.copytree(digits, tmp_path / "copy")
    done = trained("resume=run", "trainer.max_steps=3", "data.source.root=other")
    assert done.returncode == 2
    assert "data.changed=accept" in done.stderr and done.stderr.count("\n") == 1
    done = trained("resume=run", "trainer.max_steps=3", "data.source.root=copy")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "copy" / "train" / "000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:600] + bytes([content[600] ^ 1]) + content[601:])
    done = trained("resume=run", "trainer.max_steps=4", "data.source.root=copy")
    assert done.returncode == 2
    assert "train/000001.tar is " in done.stderr and "index.json" in done.stderr
