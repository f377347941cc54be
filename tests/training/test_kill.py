"""A run killed anywhere, and however often, ends like the uninterrupted run."""

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

import forked
import pytest
import torch
from PIL import Image
from processes import Process
from running import TINY, config_of, fingerprint, train

from regrow.runs import training

RUN = (
    *(*TINY, "task.per_class=false", "task.auroc=false", "model.dropout=0.3"),
    *("trainer.ema_decay=0.9", "scheduler=plateau", "scheduler.patience=0"),
    *("trainer.checkpoint.save_every_steps=3", "trainer.accumulation_steps=2"),
    *("trainer.monitor=val/loss", "trainer.mode=min"),  # so that the last step is the best
)
HARNESS = Path(__file__).with_name("killing.py")
POINTS = (
    *("step", "report", "evaluate", "decide", "save", "copy", "write", "sync", "sync_folder"),
    *("rotate", "point", "rename", "rmtree", "line", "rewind", "load", "best", "test", "summary"),
)


def killed(
    tmp_path: Path, jobs: list[dict[str, Any]], *, seconds: float, run: tuple[str, ...] = RUN
) -> list[dict[str, Any]]:
    """Start a run for each job, kill it as the job says, and restart it until it is complete."""
    jobs = [
        {"mistake": "none", **job, "folder": str(tmp_path / f"{i}")} for i, job in enumerate(jobs)
    ]
    request = tmp_path / "request.json"
    undisturbed = str(tmp_path / "undisturbed")
    request.write_text(
        json.dumps({"config": config_of(*run), "jobs": jobs, "undisturbed": undisturbed})
    )
    source, tests = Path(training.__file__).parents[2], Path(__file__).parents[1]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(request)],
        env={**os.environ, **threads, "PYTHONPATH": forked.python_path(source, tests)},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def differing(answers: list[dict[str, Any]], whole: Path) -> list[dict[str, Any]]:
    """Return the runs that did not end like the uninterrupted run."""
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
    summary = train(folder, *RUN)
    assert summary["best"]["step"] == summary["steps"] == 12
    return folder


def instants(number: int, in_a_row: int, *, seed: int) -> list[list[Any]]:
    """Several kills of a run, one after the other, at random fractions of its length."""
    drawn = random.Random(seed)
    return [[drawn.uniform(0.0, 1.0) for _ in range(in_a_row)] for _ in range(number)]


def points(shares: tuple[float, ...], seed: int) -> list[list[Any]]:
    """Deaths before and after every named point, each followed by another one."""
    drawn = random.Random(seed)
    # Only a resumed run rewinds its log.
    begun = {"rewind": [["step", "after", 0.5]]}
    return [
        [*begun.get(point, []), [point, when, share], [drawn.choice(POINTS), "before", 0.0]]
        for point in POINTS
        for when in ("before", "after")
        for share in shares
    ]


def by_point(answer: dict[str, Any]) -> bool:
    first = answer["kills"][0]
    return isinstance(first, list) and isinstance(first[0], str)


def not_reached(answers: list[dict[str, Any]]) -> list[Any]:
    """Return the named points where no child died, though it was their turn."""
    return [
        answer["kills"] for answer in answers if by_point(answer) and None in answer["killed"][:-1]
    ]


def test_a_run_killed_at_random_instants_and_points_ends_the_same(
    whole: Path, tmp_path: Path
) -> None:
    # No event follows the last rotation.
    last = [["rotate", "before", 1.0], ["point", "before", 1.0], ["summary", "after", 1.0]]
    kills = [*instants(3, 3, seed=0), *points((0.5,), seed=0)[::5], *([kill] for kill in last)]
    # Mistakes that the comparison must detect, in the same process, which is slow to start.
    broken: list[dict[str, Any]] = [
        {"mistake": mistake, "kills": [["report", "after", 0.7]]}
        for mistake in ("without_rewind", "without_seeds")
    ]
    answers = killed(tmp_path, [*({"kills": k} for k in kills), *broken], seconds=120)
    good = [answer for answer in answers if answer["mistake"] == "none"]
    bad = [answer for answer in answers if answer["mistake"] != "none"]
    assert sum(step is not None for answer in good for step in answer["killed"]) >= 12
    assert not_reached(good) == []
    assert differing(good, whole) == []
    assert [None in answer["killed"] for answer in bad] == [False, False]
    assert differing(bad, whole) == bad


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_killed_hundreds_of_times_ends_the_same(whole: Path, tmp_path: Path) -> None:
    kills = [*instants(50, 4, seed=1), *points((0.0, 1.0), seed=1), *points((0.4,), seed=2)]
    # On any machine: some before the first checkpoint, some between two, and some after the last
    # one, during the test, the plots and the summary.
    kills += [[share / 100] for share in range(10)]
    kills += [[[step, share / 10]] for step in (6, 12) for share in range(9)]
    answers = killed(tmp_path, [{"kills": k} for k in kills], seconds=900)
    assert not_reached(answers) == []
    deaths = [step for answer in answers for step in answer["killed"] if step is not None]
    assert len(deaths) >= 200
    by_time = [step for a in answers if not by_point(a) for step in a["killed"]]
    assert sum(step == 0 for step in by_time) >= 10  # before the first checkpoint
    assert sum(step is not None and 0 < step < 12 for step in by_time) >= 10
    assert sum(step == 12 for step in by_time) >= 3  # at its end
    assert differing(answers, whole) == []


IMAGES = (
    *("data=image_folder", "data.root=images", "data.num_classes=2", "data.input_shape=[3,8,8]"),
    *("data.source.resize=10", "data.batch_size=16", "data.eval_batch_size=5", "model=cnn"),
    *("model.channels=[4]", "model.dropout=0.3", "optimizer.lr=0.02", "scheduler=plateau"),
    *("scheduler.patience=0", "trainer.max_epochs=60", "trainer.early_stopping.patience=40"),
    *("trainer.ema_decay=0.9", "trainer.accumulation_steps=2", "trainer.log_every_steps=1"),
    *("trainer.checkpoint.save_every_steps=20", "trainer.num_threads=1", "trainer.device=cpu"),
    *("task.per_class=false", "task.auroc=false"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of noise in two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("images")
    noise = torch.Generator().manual_seed(0)
    for index in range(60):
        pixels = torch.randint(0, 128, (12, 12, 3), generator=noise) + 128 * (index % 2)
        path = folder / ("dark", "bright")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.nightly), 2])
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

    kill(0, lambda process: trains())
    assert not list(checkpoints.glob("step_*"))  # before the first
    kill(0, Process.is_saving)
    kill(drawn.uniform(0, 1))
    kill(drawn.uniform(0, 1.5))
    for _ in range(3):
        kill(drawn.uniform(0, 0.3), goes_on_again())
    train(run, *IMAGES, f"data.num_workers={workers}")
    train(tmp_path / "whole", *IMAGES)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    assert weights_of(run) == weights_of(tmp_path / "whole")
