"""Check what the engine promises with real commands, on the short run that `running.TINY` names."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from running import TINY

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
IN_TEMPLATE = not (ROOT / ".template").is_dir()
SHORT = (*TINY, "trainer.max_epochs=15", "trainer.checkpoint.save_every_epochs=5")
SHORT += ("hydra.run.dir=run",)

# The template has faster tests of each promise.
pytestmark = [pytest.mark.slow] if IN_TEMPLATE else []


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]


def run(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300}
    return forked.run(command(name, *arguments), cwd=folder, **options)


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    """Train in `folder` and return the summary and the metrics, without the clock."""
    done = run(folder, "train", *SHORT, *arguments)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "run/summary.json").read_text())
    return {
        "weights": summary["weights_sha256"],
        "best": summary["best"],
        "metrics": [{k: v for k, v in it.items() if not k.startswith("time/")} for it in lines],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "result.json").write_text(json.dumps(train(folder)))
    return folder


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_a_killed_run_resumes_to_the_same_end(whole: Path, tmp_path: Path) -> None:
    process = forked.popen(
        command("train", *SHORT),
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/checkpoints/last").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "run/summary.json").exists(), "the run was over before the kill"
    assert train(tmp_path) == result(whole)


def test_another_seed_gives_another_end(whole: Path, tmp_path: Path) -> None:
    """The negative control."""
    assert train(tmp_path, "seed=1")["weights"] != result(whole)["weights"]


def test_a_completed_run_is_left_alone_and_evaluates_to_its_own_numbers(whole: Path) -> None:
    done = run(whole, "train", *SHORT)
    assert done.returncode == 0, done.stderr
    done = run(whole, "evaluate", "run=run", "split=test", "output=numbers.json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads((whole / "numbers.json").read_text())["values"]
    assert numbers == json.loads((whole / "run/summary.json").read_text())["test"]


def test_a_change_of_the_maths_is_refused_at_a_resume_unless_it_is_named(whole: Path) -> None:
    changed = run(whole, "train", *SHORT, "seed=1")
    assert changed.returncode == 2 and "seed was 0 and would be 1" in changed.stderr


def test_a_damaged_checkpoint_is_named_and_not_used(whole: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-a", str(whole / "run"), str(tmp_path / "run")], check=True)
    newest = max((tmp_path / "run/checkpoints").glob("step_*"))
    file = newest / "model.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    more = ("trainer.max_epochs=16", "resume=run")
    done = run(tmp_path, "train", *more)
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}/model.pt does not match its SHA-256" in done.stdout + done.stderr


def test_a_misspelt_key_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "train", "trainer.max_stepz=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "trainer.max_stepz" in done.stderr and not list(tmp_path.iterdir())


def imports_of(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_the_engine_imports_no_package_of_the_project() -> None:
    own = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()} - {"regrow"}
    for file in (SOURCE / "regrow").rglob("*.py"):
        assert not own & {name.partition(".")[0] for name in imports_of(file)}, file
    assert "regrow.cli.start" in imports_of(ROOT / "scripts" / "train.py")  # the control


@pytest.mark.skipif(IN_TEMPLATE, reason="this is the template itself")
def test_the_engine_is_the_one_that_the_template_wrote() -> None:
    """An update would discard edits of the engine, so it refuses them."""
    spec = importlib.util.spec_from_file_location("update", ROOT / "scripts" / "update.py")
    assert spec is not None and spec.loader is not None
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    assert update.engine_hash(ROOT) == update.read_record(ROOT)["engine"]
