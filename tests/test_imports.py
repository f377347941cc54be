"""Imports run one way, and slow modules are imported when they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "regrow"
# The packages that each package or module may import. Those in SERVE_ALL serve all.
SERVE_ALL = {
    *("command_line", "errors", "flags", "leads", "locks", "monitor", "older", "output", "parent"),
    *("places", "randomness", "registered", "terminal"),
}
ALLOWED = {
    "start": {"config", "outside", "worker", "sweep"},
    "outside": {"record"},
    "child": {"worker"},
    "worker": {"launch", "run", "outside", "config", "console", "job", "training"},
    "console": {"record"},
    "composed": {"config", "resume", "job", "record"},
    "ownership": {"record"},
    "launch": {
        "composed",
        *("run", "load", "resume", "check", "config", "record", "training"),
        *("job", "ranks", "outside", "worker", "slurm", "console", "sweep", "ownership"),
    },
    "sweep": {
        *("check", "composed", "config", "console", "job", "outside", "ranks", "record", "resume"),
        *("slurm", "worker", "data", "models", "tasks", "training", "ownership"),
        *("explain", "hydras"),
    },
    "slurm": {"outside", "ranks", "job", "record"},
    "ranks": {"job", "record", "outside"},
    "run": {"config", "weights", "training", "tasks", "data", "models", "record"},
    "find_lr": {"console", "launch", "run", "resume", "check", "config", "record", "training"},
    "inference": {"config", "load", "record", "training"},
    "load": {"run", "config", "resume", "roles", "training", "data", "record"},
    "weights": {"config", "training"},
    "roles": {"config"},
    "arguments": {"config"},
    "resume": {"config", "ownership", "record", "roles"},
    "check": {"config", "explain", "hydras", "record", "resume"},
    "hydras": {"config", "explain"},
    "explain": {"composition", "config"},
    "composition": {"config"},
    "config": {"explain", "hydras", "resume", "record"},  # the first two only in the entry point
    "notebook": {"check", "composition", "config", "explain", "run", "training"},
    "training": set(),
    "tasks": set(),
    "data": set(),
    "models": set(),
    "record": set(),
}
KNOW_HYDRA = {
    "command_line",
    "flags",
    "run",
    "composed",
    "launch",
    "config",
    "check",
    "resume",
    "find_lr",
    "notebook",
    "sweep",
    "composition",
    "explain",
    "hydras",
    "places",
    "registered",
}


def imports_of(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def crossings(path: Path) -> set[str]:
    """Return the modules of this package that a file imports against the plan."""
    room = room_of(path)
    parts = {name.split(".")[1] for name in imports_of(path) if name.startswith("regrow.")}
    return parts - {room, *SERVE_ALL} - ALLOWED.get(room, set())


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    assert crossings(path) == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_few_rooms_know_hydra(path: Path) -> None:
    names = {name.split(".")[0] for name in imports_of(path)}
    assert room_of(path) in KNOW_HYDRA or not names & {"hydra", "omegaconf"}


def test_a_crossing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "data").mkdir()
    bad = tmp_path / "data" / "bad.py"
    bad.write_text("def f():\n    from regrow.tasks import losses\n")
    assert crossings(bad) == {"tasks"}


def modules_after(code: str) -> set[str]:
    script = f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); {code}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_a_config_is_checked_without_torch() -> None:
    loaded = modules_after("import regrow.config, regrow.check, regrow.resume")
    assert not loaded & {"torch", "torchvision", "sklearn", "matplotlib", "wandb", "numpy"}


def test_a_run_starts_without_what_only_its_end_needs() -> None:
    loaded = modules_after(
        "import regrow.launch, regrow.data.datasets, regrow.tasks.tasks, regrow.tasks.losses, "
        "regrow.models.mlp, regrow.training.schedules"
    )
    slow = {"torchvision", "torchmetrics", "sklearn", "matplotlib", "wandb", "tensorboard", "PIL"}
    assert not loaded & slow
    assert "torch" in loaded
