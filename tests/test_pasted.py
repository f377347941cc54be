"""Every printed command works when pasted into bash, also in a project with an awkward path."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import forked
import pytest
from running import TINY

from regrow.record.records import load_status

# Used as the project's path and as a run's.
PLACE = 'Dropbox (Uni)/lr=1, [b]/Ünï $HOME #1; it\'s "so"'
RUN = "mine/Ünï (2), {x}=~'y' ${seed}.."
SMALL = (*TINY, "trainer.max_steps=2", "trainer.progress_bar=false")
LONG = ("trainer.max_steps=1000000", "trainer.max_epochs=null", "trainer.log_every_steps=1000")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this project in a folder with every awkward character, and `python` on its PATH."""
    root = tmp_path_factory.mktemp("projects") / PLACE
    forked.copy_project(root)
    python = root / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return root


def environment(project: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    kept["PYTHONPATH"] = forked.python_path()
    return {**kept, "PATH": f"{project / 'bin'}:{kept['PATH']}", **more}


def pasted(
    project: Path, line: str, *, cwd: Path | None = None, code: int | None = 0, **more: str
) -> str:
    """Return bash's output when the line is pasted."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=cwd or project, env=environment(project, **more),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=300,
    )  # fmt: skip
    said = done.stdout.decode("utf-8", "surrogateescape")
    assert code is None or done.returncode == code, f"{line}\n{said}"
    return said


def train(*arguments: str) -> str:
    return shlex.join(["python", "scripts/train.py", *arguments])


def commands(said: str) -> list[str]:
    return re.findall(r"(?<!\w)python \S*scripts/\w+\.py .*", said)


def stopped(project: Path, arguments: Sequence[str], folder: Path) -> str:
    """Return the output of a command that gets a SIGTERM once the run in `folder` is running."""
    process = subprocess.Popen(
        [sys.executable, "scripts/train.py", *arguments], cwd=project, env=environment(project),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while (load_status(folder) or {}).get("state") != "running" and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=240)[0].decode()


@pytest.mark.slow
@pytest.mark.nightly
def test_a_run_in_an_awkward_folder_resumes_by_its_printed_command(project: Path) -> None:
    said = pasted(project, train(*SMALL, f"hydra.run.dir={RUN}"))
    assert (project / RUN / "manifest.json").is_file()
    longer = commands(said)[1]
    assert "resuming from step 2" in pasted(project, longer)


@pytest.mark.slow
@pytest.mark.nightly
def test_every_command_of_a_run_works_as_pasted(project: Path) -> None:
    folder = project / "stopped" / RUN
    said = stopped(project, (*SMALL, *LONG, f"hydra.run.dir=stopped/{RUN}"), folder)
    assert "stopped by SIGTERM" in said, said
    lines = commands(said)
    assert len(lines) == 2 and lines[0] == lines[1]
    said = pasted(project, f"{lines[1]} trainer.max_seconds=1")
    resume, longer, evaluate, seeds = commands(said)
    assert "is complete" in pasted(project, resume)
    assert "resuming from step" in pasted(project, longer)
    assert "test/accuracy" in pasted(project, evaluate)
    pasted(project, f"{seeds} trainer.max_steps=1")


@pytest.mark.nightly
@pytest.mark.slow
def test_every_command_of_a_sweep_works_as_pasted(project: Path) -> None:
    where = f"sweeps/{RUN}"
    said = stopped(
        project,
        ("-m", *SMALL, *LONG, "seed=0,1", f"hydra.sweep.dir={where}"),
        project / where / "0",
    )
    again = commands(said)
    assert again and all(line == again[0] for line in again), said
    more = f"{again[0]} ~trainer.max_epochs"
    assert "error: " in pasted(project, more, code=2)
    said = pasted(project, train("-m", *SMALL, "seed=0,1", f"hydra.sweep.dir=done/{RUN}"))
    for line in commands(said):
        pasted(project, line)
    pasted(project, train("-m", f"resume=done/{RUN}", "seed=0,1,2"))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_record_in_an_awkward_folder_is_reproduced(project: Path) -> None:
    data = project / "data=1, (x)"
    data.mkdir()
    pasted(project, train(*SMALL, f"data.root={data.name}", "hydra.run.dir=again/Ünï=1"))
    line = shlex.join(["python", "scripts/reproduce.py", "run=again/Ünï=1"])
    assert "identical: " in pasted(project, line)


@pytest.mark.slow
def test_the_advice_of_a_syntax_error_works_as_pasted(project: Path) -> None:
    for argument in (
        "notes=a=b",
        "notes=Ünï (2)",
        'notes=it\'s "so" $HOME',
        "name=lr=1",
        "tags=[a",
    ):
        said = pasted(project, train(argument, "--cfg", "job"), code=2)
        assert said.count("\n") == 1 and argument in said
        (quoted,) = re.findall(r"(?:text|quotes): (.*)", said)
        said = pasted(project, f"python scripts/train.py {quoted} --cfg job")
        assert "\nseed: 0\n" in said
    assert "notes..x=1 cannot be read: " in pasted(project, train("notes..x=1"), code=2)


def test_a_line_break_in_a_folder_is_one_line(project: Path) -> None:
    said = pasted(project, train("hydra.run.dir=a\nb"), code=2)
    assert "must not contain a line break" in said and said.count("\n") == 1
