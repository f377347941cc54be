"""A run is built without searching for garbage, and its process exits without a teardown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from finished import SCRIPTS

OWN = """
import atexit, gc, threading, time
from pathlib import Path

from lab.models.mlp import MLP

atexit.register(Path("handled").touch)


def late():
    time.sleep(0.5)
    Path("joined").touch()


class Watched(MLP):
    def forward(self, inputs):
        if self.training and Path("collects").exists() and FAILS:
            raise FAILS
        if self.training and not Path("collects").exists():
            Path("collects").write_text(f"{gc.isenabled()} {gc.get_freeze_count() > 100_000}")
            threading.Thread(target=late).start()
        return super().forward(inputs)


FAILS = None
"""
TINY = ("model._target_=watched.Watched", "model.hidden=[8]", "trainer.check_first_batch=false")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fails", "code"),
    [("None", 0), ("ValueError('no')", 1), ("SystemExit(7)", 7), ("KeyboardInterrupt()", 130)],
)
def test_a_run_exits_at_once_but_after_its_exit_handlers_and_threads(
    tmp_path: Path, fails: str, code: int
) -> None:
    (tmp_path / "watched.py").write_text(OWN.replace("FAILS = None", f"FAILS = {fails}"))
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "train.py"), *TINY, "trainer.max_steps=3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "collects").read_text() == "True True"
    assert (tmp_path / "handled").exists() and (tmp_path / "joined").exists()
    assert "leaked" not in ended.stderr
    assert bool(ended.stderr) == (code != 0), ended.stderr


def test_a_script_that_returns_its_exit_code_ends_with_it(tmp_path: Path) -> None:
    report = [sys.executable, str(SCRIPTS / "report.py"), "nowhere"]
    ended = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: nowhere: no run is there.")
