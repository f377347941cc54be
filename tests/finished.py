"""Complete runs for tests, in this process, with everything that a run leaves in its folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest
import torch
from running import CPU, as_hydra_has_it, composed

from regrow.config.job import job_of
from regrow.project import CONF
from regrow.runs import training
from regrow.runs.session import run_job

SCRIPTS = CONF.parent / "scripts"
QUICK = ("trainer.max_steps=4", "trainer.num_threads=1", "trainer.device=cpu")


def finished(folder: Path, *overrides: str) -> Path:
    """Make a complete run in `folder`, without plots."""
    folder.mkdir(parents=True, exist_ok=True)
    config = composed(*QUICK, *overrides, f"hydra.run.dir={folder.resolve()}")
    job = job_of(as_hydra_has_it(config), folder.resolve(), ["python", "train.py"])
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw", lambda folder: None)
        run_job(job, CPU)
    return folder


def script(name: str) -> ModuleType:
    """Import a script as a module, so that its `main` can be called in this process."""
    if str(SCRIPTS) not in sys.path:  # as Python does for a script
        sys.path.append(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def process(name: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Start a script from `folder`, as a user does."""
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    return forked.run(
        [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextlib.contextmanager
def one_line_and_exit_code_2(capsys: Any, message: str) -> Iterator[None]:
    """Check the output and exit code of an error that the user must fix."""
    with pytest.raises(SystemExit) as ended:
        yield
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    assert message in errors[0]
