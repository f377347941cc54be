"""A run killed after its training, while its plots are drawn, gets them later."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import forked
import pytest
from running import launched

from regrow.record.records import load_status
from regrow.runs import training

TESTS = Path(__file__).resolve().parent
# A run in its own process, which is killed before the page is written.
KILLED = f"""
import os, signal, sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent / "src")!r}]
from regrow.record import report
from running import launched
report._write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
launched("hydra.run.dir=run", *sys.argv[1:], draws=True)
"""


def killed(folder: Path, *overrides: str) -> None:
    done = forked.run(
        [sys.executable, "-c", KILLED, *overrides], cwd=folder, timeout=300, draws=True
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_was_drawn_is_drawn_when_it_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    killed(tmp_path)
    run = Path("run")
    status = load_status(run)
    assert status is not None and status["state"] == "completed"
    assert not (run / "report.html").exists()
    launched("hydra.run.dir=run", draws=True)
    assert (run / "report.html").is_file() and list((run / "plots").glob("*.png"))
    said = capfd.readouterr()
    assert "complete except for its plots" in said.out + said.err
    assert "run is complete. To" in said.out + said.err
    page = (run / "report.html").stat().st_mtime_ns
    launched("hydra.run.dir=run", draws=True)  # nothing is missing, so nothing is drawn
    assert (run / "report.html").stat().st_mtime_ns == page
    # A page from before the run was extended does not show its results, whatever the clock says.
    later = page + 3600 * 10**9
    os.utime(run / "report.html", ns=(later, later))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw", lambda folder: None)  # as if killed before
        launched("hydra.run.dir=run", "trainer.max_epochs=4")
    launched("hydra.run.dir=run", "trainer.max_epochs=4", draws=True)
    assert (run / "report.html").stat().st_mtime_ns < later
