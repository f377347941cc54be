"""Commands of tests find the packages that the tests find."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest


def test_a_command_finds_packages_that_are_on_pythonpath_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "a_package.py").touch()
    (tmp_path / "code" / "regrow").mkdir(parents=True)
    given = os.pathsep.join([str(tmp_path / "packages"), str(tmp_path / "code")])
    monkeypatch.setenv("PYTHONPATH", given)
    path = forked.python_path(tmp_path)

    def code_of(path: str) -> int:
        command = [sys.executable, "-c", "import a_package"]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode

    assert code_of(path) == 0
    assert str(tmp_path / "code") not in path  # a test chooses which copy of this code runs
    assert code_of(str(tmp_path)) == 1  # the control
