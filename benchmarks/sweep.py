"""Twenty jobs with one second of training each, two at a time: the overhead of a sweep."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import Table, in_turn

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts" / "train.py")
JOBS = 20
# About a second of training on one core of the machine that RESULTS.md names.
JOB = ("trainer.max_epochs=25", "trainer.num_threads=1", "trainer.device=cpu")


def measure() -> Table:
    with tempfile.TemporaryDirectory() as folder:
        return measure_in(Path(folder))


def measure_in(folder: Path) -> Table:
    trained: list[float] = []

    def call(*arguments: str) -> None:
        command = [sys.executable, TRAIN, *JOB, *arguments]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)

    def sweep(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(folder / "sweep", ignore_errors=True)
            here = ("launcher.jobs=2", "hydra.sweep.dir=sweep")
            call("-m", f"seed=range({JOBS})", *here, *arguments)
            summaries = (folder / "sweep").glob("*/summary.json")
            trained.append(sum(json.loads(s.read_text())["seconds"] for s in summaries) / 2)

        return run

    def by_hand() -> None:
        shutil.rmtree(folder / "hand", ignore_errors=True)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: call(f"seed={n}", f"hydra.run.dir=hand/{n}"), range(JOBS)))

    seconds = in_turn(
        {
            "train.py -m": sweep(),
            "train.py -m, fresh processes": sweep("launcher.fresh_processes=true"),
            "train.py by hand, two at a time": by_hand,
        },
        rounds=1,
    )
    return Table(
        title="A sweep of twenty jobs",
        note="Digits for 25 epochs each, two at a time, one thread each. By hand each run also "
        "draws its pictures, which a sweep does for the best alone. Training alone, the jobs' own "
        f"seconds halved: {min(trained):.1f} to {max(trained):.1f} s.",
        unit="s",
        reference="train.py by hand, two at a time",
        seconds=seconds,
    )
