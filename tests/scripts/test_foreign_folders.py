"""No script executes code that a foreign run's folder names, or starts its loggers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from finished import finished, script
from running import TINY

from regrow.config import recorded, resume
from regrow.config.targets import allow, instantiate
from regrow.config.yaml_files import read_yaml
from regrow.record import ownership

SCRIPTS = {name: script(name) for name in ("evaluate", "predict", "reproduce", "report")}
STARTED = Path("started")  # in the current folder


class Marks:
    """A logger that leaves a trace when it starts."""

    def __init__(self) -> None:
        STARTED.touch()

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None: ...
    def flush(self) -> None: ...
    def close(self, exit_code: int = 0) -> None: ...


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        finished(folder / "run", *TINY, "+logger.mine._target_=test_foreign_folders.Marks")
        assert STARTED.exists()  # the negative control: one's own run starts it
    return folder / "run"


@pytest.fixture
def foreign(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that is not in this user's list."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(ownership, "_trusted", set())
    monkeypatch.setattr(SCRIPTS["reproduce"], "train", lambda arguments, **_: 1)
    np.save(tmp_path / "rows.npy", np.ones((2, 6), dtype=np.float32))
    return Path(shutil.copytree(original, tmp_path / "run", symlinks=True))


def ended(name: str, *more: str) -> int:
    """Return the script's exit code for the foreign run."""
    arguments = {
        "predict": ["run=run", "input=rows.npy", "output=out.csv"],
        "report": ["run"],
    }.get(name, ["run=run"])
    try:
        return int(SCRIPTS[name].main([*arguments, *more]) or 0)
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("name", [*SCRIPTS])
def test_a_script_starts_no_logger_of_a_foreign_run(name: str, foreign: Path) -> None:
    assert ended(name) == (2 if name == "reproduce" else 0)  # it refuses what it cannot repeat
    assert not STARTED.exists()


def test_only_trust_starts_the_loggers_of_a_foreign_run(foreign: Path) -> None:
    def loggers(*more: str) -> list[str]:
        return [a for a in resume.expand(["resume=run", *more]) if "logger.mine" in a]

    assert loggers() == []
    digits = ownership.digest_of_run(recorded.recorded_overrides(foreign))[: ownership.DIGITS]
    assert len(loggers(f"trust={digits}")) == 1  # the negative control


def target(folder: Path) -> dict[str, Any]:
    return {"_target_": "os.makedirs", "name": str(folder.parent / "executed")}


def module_beside(folder: Path) -> dict[str, Any]:
    made = folder.parent / "executed"
    code = f"import pathlib, torch\npathlib.Path({str(made)!r}).mkdir()\nNet = torch.nn.Identity\n"
    (folder.parent / "evil_beside.py").write_text(code)
    return {"_target_": "evil_beside.Net"}


@pytest.mark.parametrize("attack", [target, module_beside])
@pytest.mark.parametrize("name", [*SCRIPTS])
def test_a_script_executes_nothing_that_a_foreign_run_names(
    name: str,
    attack: Callable[[Path], dict[str, Any]],
    foreign: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend("")  # as in a notebook
    evil = attack(foreign)
    for file in ("config.yaml", ".hydra/config.yaml"):
        config = read_yaml(foreign / file)
        config["model"] = evil
        (foreign / file).write_text(yaml.safe_dump(config))
    code = ended(name)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(said)) == ((0, 0) if name == "report" else (2, 1))
    assert not Path("executed").exists()
    if name == "evaluate":  # the negative control: instantiated, it would have run
        allow(evil)
        instantiate(evil)
        assert Path("executed").exists()
