"""A run that is killed, wherever and however often, grows back into the one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from processes import Process
from running import TINY, config_of, fingerprint, train

from regrow import run as runs

RUN = (
    *(*TINY, "task.per_class=false", "task.auroc=false", "model.dropout=0.3"),
    *("trainer.ema_decay=0.9", "scheduler=plateau", "scheduler.patience=0"),
    *("trainer.checkpoint.save_every_steps=3", "trainer.accumulation_steps=2"),
)
HARNESS = Path(__file__).with_name("killing.py")
POINTS = (
    *("step", "report", "evaluate", "decide", "save", "copy", "write", "sync", "sync_folder"),
    *("rotate", "point", "rename", "rmtree", "line", "rewind", "load", "test", "summary"),
)


def killed(tmp_path: Path, jobs: list[dict[str, Any]], *, seconds: float) -> list[dict[str, Any]]:
    """Start a run for each job, kill it as the job says, and again until it is complete."""
    jobs = [
        {"mistake": "none", **job, "folder": str(tmp_path / f"{i}")} for i, job in enumerate(jobs)
    ]
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"config": config_of(*RUN), "jobs": jobs}))
    source, tests = Path(runs.__file__).parents[1], Path(__file__).parents[1]
    paths = os.pathsep.join([str(source), str(tests)])
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(request)],
        env={**os.environ, **threads, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def differing(answers: list[dict[str, Any]], whole: Path) -> list[dict[str, Any]]:
    """Those that did not end as the uninterrupted run."""
    expected, weights = fingerprint(whole), weights_of(whole)
    return [
        answer
        for answer in answers
        if fingerprint(Path(answer["folder"])) != expected
        or weights_of(Path(answer["folder"])) != weights
    ]


def weights_of(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text())["weights_sha256"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, *RUN)
    return folder


def instants(number: int, in_a_row: int, *, seed: int, longest: float) -> list[list[Any]]:
    """Random delays: several kills of a run, one after the other."""
    drawn = random.Random(seed)
    return [[drawn.uniform(0.0, longest) for _ in range(in_a_row)] for _ in range(number)]


def points(count: int, seed: int) -> list[list[Any]]:
    """Deaths at every named point, before and after it, each followed by another one."""
    drawn = random.Random(seed)
    return [
        [[point, when, drawn.randint(1, count)], [drawn.choice(POINTS), "before", 2]]
        for point in POINTS
        for when in ("before", "after")
    ]


def test_a_run_killed_at_random_instants_and_points_ends_the_same(
    whole: Path, tmp_path: Path
) -> None:
    kills = [*instants(3, 4, seed=0, longest=0.15), *points(3, seed=0)[::5]]
    # Mistakes that the same comparison has to catch, in the same process: it is slow to start.
    broken: list[dict[str, Any]] = [
        {"mistake": mistake, "kills": [["report", "after", 8]]}
        for mistake in ("without_rewind", "without_seeds")
    ]
    answers = killed(tmp_path, [*({"kills": k} for k in kills), *broken], seconds=120)
    good = [answer for answer in answers if answer["mistake"] == "none"]
    bad = [answer for answer in answers if answer["mistake"] != "none"]
    assert sum(answer["killed"] for answer in good) >= 12
    assert differing(good, whole) == []
    assert [answer["killed"] for answer in bad] == [1, 1]
    assert differing(bad, whole) == bad


@pytest.mark.slow
def test_a_run_killed_hundreds_of_times_ends_the_same(whole: Path, tmp_path: Path) -> None:
    kills = [*instants(60, 5, seed=1, longest=0.2), *points(2, seed=1), *points(6, seed=2)]
    answers = killed(tmp_path, [{"kills": k} for k in kills], seconds=900)
    assert sum(answer["killed"] for answer in answers) >= 200
    assert differing(answers, whole) == []


IMAGES = (
    *("data=image_folder", "data.root=images", "data.num_classes=2", "data.input_shape=[3,8,8]"),
    *("data.source.resize=10", "data.batch_size=16", "data.eval_batch_size=5", "model=cnn"),
    *("model.channels=[4]", "model.dropout=0.3", "optimizer.lr=0.02", "scheduler=plateau"),
    *("scheduler.patience=0", "trainer.max_epochs=60", "trainer.early_stopping.patience=40"),
    *("trainer.ema_decay=0.9", "trainer.accumulation_steps=2", "trainer.log_every_steps=1"),
    *("trainer.checkpoint.save_every_steps=3", "trainer.num_threads=1", "trainer.device=cpu"),
    *("task.per_class=false", "task.auroc=false"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures of noise in two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("images")
    noise = torch.Generator().manual_seed(0)
    for index in range(60):
        pixels = torch.randint(0, 128, (12, 12, 3), generator=noise) + 128 * (index % 2)
        path = folder / ("dark", "bright")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_killed_again_and_again_ends_the_same(
    workers: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").symlink_to(images)
    drawn = random.Random(workers)
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"

    def trains() -> bool:
        return (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 0

    def kill(seconds: float, when: Callable[[Process], bool] = lambda process: True) -> None:
        process = Process(tmp_path, *IMAGES, f"data.num_workers={workers}")
        process.wait_for(lambda: when(process))
        time.sleep(seconds)
        process.process.kill()
        assert process.end()[0] == -signal.SIGKILL, "it was over before it was killed"

    def goes_on_again() -> Callable[[Process], bool]:
        before = (run / "metrics.jsonl").stat().st_mtime_ns
        return lambda process: (run / "metrics.jsonl").stat().st_mtime_ns > before

    kill(drawn.uniform(0, 3))
    kill(0, lambda process: trains())
    assert not list(checkpoints.glob("step_*"))  # before the first
    kill(0, Process.is_saving)
    kill(drawn.uniform(0, 6))
    for _ in range(3):
        kill(drawn.uniform(0, 0.3), goes_on_again())
    train(run, *IMAGES, f"data.num_workers={workers}")
    train(tmp_path / "whole", *IMAGES)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    assert weights_of(run) == weights_of(tmp_path / "whole")
