"""A run is built without searching for garbage, and its process exits without a teardown."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from finished import SCRIPTS

from regrow.project import ROOT

OWN = """
import atexit, gc, threading, time
from pathlib import Path

from lab.models.mlp import MLP

atexit.register(Path("handled").touch)


def late():
    time.sleep(0.5)
    Path("joined").touch()


class Watched(MLP):
    def _apply(self, *arguments, **named):  # by `model.to(device)`, while the run is built
        Path("built").write_text(f"{gc.isenabled()} {gc.get_freeze_count() > 100_000}")
        return super()._apply(*arguments, **named)

    def forward(self, inputs):
        if self.training and Path("collects").exists() and FAILS:
            raise FAILS
        if self.training and not Path("collects").exists():
            is_searched = any(it is self for it in gc.get_objects())  # which lists nothing frozen
            Path("collects").write_text(f"{gc.isenabled()} {is_searched}")
            threading.Thread(target=late).start()
        return super().forward(inputs)


FAILS = None
"""
LEAVES = """
import os
from pathlib import Path

real = os._exit
os._exit = lambda code: (Path("left").touch(), real(code))
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
    assert (tmp_path / "built").read_text() == "True True"
    assert (tmp_path / "collects").read_text() == "True False"
    assert (tmp_path / "handled").exists() and (tmp_path / "joined").exists()
    assert "leaked" not in ended.stderr
    assert bool(ended.stderr) == (code != 0), ended.stderr


def test_a_script_that_returns_its_exit_code_ends_with_it(tmp_path: Path) -> None:
    report = [sys.executable, str(SCRIPTS / "report.py"), "nowhere"]
    ended = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: nowhere: no run is there.")


@pytest.mark.slow
def test_a_file_that_a_module_leaves_open_is_complete(tmp_path: Path) -> None:
    """The process is then taken apart, which closes it. Without a stderr, a run ends well too."""
    own = OWN + '\nLOG = Path("log").open("w")\nLOG.write("kept")\n'
    (tmp_path / "watched.py").write_text(own)
    run = [sys.executable, str(SCRIPTS / "train.py"), *TINY, "trainer.max_steps=3"]
    subprocess.run(
        ["bash", "-c", f"exec {shlex.join(run)} 2>&-"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert (tmp_path / "log").read_text() == "kept"


@pytest.mark.parametrize(
    ("early", "environment"), [(True, {}), (False, {"CUDA_INJECTION64_PATH": "x"}), (False, {})]
)
def test_handlers_of_others_are_called(
    tmp_path: Path, early: bool, environment: dict[str, str]
) -> None:
    """Those older than the command, as for coverage of child processes, and those of profilers.

    Without any, the process leaves at once.
    """
    register = "import atexit, pathlib; atexit.register(pathlib.Path('handled').touch)" * early
    (tmp_path / "sitecustomize.py").write_text(f"{register}\n{LEAVES}\n")
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / "report.py"), "nowhere"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2, ended.stderr
    assert (tmp_path / "handled").exists() is early
    assert (tmp_path / "left").exists() is not (early or bool(environment))


@pytest.mark.slow
def test_a_process_that_slurm_started_leaves_at_once_too(tmp_path: Path) -> None:
    """Otherwise libraries would report leaks at the end of its output."""
    (tmp_path / "sitecustomize.py").write_text(LEAVES)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    told = {"PYTHONPATH": path, "REGROW_JOB": "nowhere", "REGROW_PARENT": str(os.getpid())}
    child = [sys.executable, "-P", "-m", "regrow.runs.child"]
    ended = subprocess.run(child, cwd=tmp_path, env={**os.environ, **told}, capture_output=True)
    assert ended.returncode == 1 and b"nowhere" in ended.stderr
    assert (tmp_path / "left").exists()
