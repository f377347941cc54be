"""Setting the clock, by hand or by NTP, changes no limit and no wait."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import TINY, train

from lab import loop, step
from regrow.distributed import parallel
from regrow.project import ROOT

# Wall-clock time for people to read, and for the age of a file, whose timestamp uses that clock.
WALL = r"time\.time(_ns)?\(|datetime\.now\(|st_mtime(_ns)?\b"
ALLOWED = {
    "src/regrow/record/records.py": 2,  # a new folder's name; `updated` in status.json
    "src/regrow/record/manifest.py": 1,  # `started`
    "src/regrow/record/mlflow_logger.py": 1,  # MLflow's own timestamps
    "src/regrow/record/loggers.py": 1,  # the names of TensorBoard's files
    "src/regrow/feeding/block_cache.py": 1,  # which blocks are the oldest
    "src/regrow/feeding/files.py": 3,  # a file's timestamp; one in the future is read again
}


def test_no_duration_is_measured_by_a_clock_that_can_be_set() -> None:
    found = {}
    for part in ("src", "scripts"):
        for path in sorted((ROOT / part).rglob("*.py")):
            if count := len(re.findall(WALL, path.read_text(encoding="utf-8"))):
                found[path.relative_to(ROOT).as_posix()] = count
    assert found == ALLOWED


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_a_limit_in_seconds_holds_while_the_clock_jumps(
    jump: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(time.time(), jump)
    monkeypatch.setattr(time, "time", lambda: next(now))
    summary = train(tmp_path / "run", *TINY, "trainer.max_seconds=600")
    assert summary["status"] == "completed" and summary["epochs"] == 3
    assert 0 < summary["seconds"] < 600


def test_a_limit_in_seconds_counts_all_steps_and_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def taking(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **more: Any) -> Any:
            now[0] += seconds
            return work(*args, **more)

        return timed

    monkeypatch.setattr(parallel, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(step, "train_step", taking(1.0, step.train_step))
    monkeypatch.setattr(loop, "evaluate", taking(100.0, loop.evaluate))
    summary = train(tmp_path / "run", *TINY, "trainer.max_seconds=6")  # an epoch has four steps
    assert (summary["seconds"], summary["steps"]) == (6.0, 6)
