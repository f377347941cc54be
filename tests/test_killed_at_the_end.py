"""A run or sweep killed while its results are written is completed by the same command."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from running import TINY, fingerprint

from regrow.project import ROOT
from regrow.record import manifest
from regrow.record.records import load_status, read_json

PROGRAM = """
import os, runpy, sys
import deadly
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = (
    *(*TINY, "trainer.max_epochs=2", "task.per_class=false", "task.auroc=false"),
    *("name=ends", "hydra.run.dir=outputs/ends/run", "logger=csv"),
)
WHEN = ("before", "after")
NIGHTLY = pytest.mark.nightly


def started(folder: Path, *arguments: str, dies_at: str = "") -> int:
    """Return the exit code of the command in `folder`, killed at a point."""
    (folder / "sitecustomize.py").write_text("import deadly\n")
    paths = forked.python_path(folder, Path(__file__).parent, ROOT / "src")
    done = forked.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "scripts" / "train.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "DIES_AT": dies_at},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    print(done.stdout)
    return done.returncode


def files(folder: Path) -> set[str]:
    """Return all file names below, except uncommitted changes, which each start records."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if not (name.endswith(".diff") or "__pycache__" in name)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert started(folder, *RUN) == 0
    return folder / "outputs"


def assert_is_whole(outputs: Path, whole: Path) -> None:
    run, expected = outputs / "ends" / "run", whole / "ends" / "run"
    assert files(outputs) == files(whole)
    assert (outputs / "ends" / "latest").resolve() == run.resolve()
    status = load_status(run)
    assert status is not None and status["state"] == "completed"
    assert fingerprint(run) == fingerprint(expected)
    mine, other = (read_json(folder / "summary.json") for folder in (run, expected))
    for key in ("status", "steps", "best", "val", "test", "weights_sha256"):
        assert mine[key] == other[key], key
    rows, its = ((folder / "metrics.csv").read_text().splitlines() for folder in (run, expected))
    assert (rows[0], len(rows)) == (its[0], len(its))
    its, others = (manifest.latest(manifest.read(folder))["packages"] for folder in (run, expected))
    assert its == others


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    "point", ["summary.json", "loggers", pytest.param("latest", marks=NIGHTLY)]
)
def test_a_run_killed_as_it_ends_is_completed_by_the_same_command(
    point: str, when: str, whole: Path, tmp_path: Path
) -> None:
    assert started(tmp_path, *RUN, dies_at=f"{point}:{when}") == -signal.SIGKILL
    assert started(tmp_path, *RUN) == 0
    assert_is_whole(tmp_path / "outputs", whole)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=NIGHTLY)])
def test_a_sharded_run_killed_as_it_exports_its_weights_is_completed(
    when: str, tmp_path: Path
) -> None:
    run = (*RUN, "trainer=fsdp", "trainer.devices=2", "trainer.max_epochs=2")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    assert started(killed, *run, dies_at=f"weights.pt:{when}") != 0
    folder = killed / "outputs" / "ends" / "run"
    assert (folder / "weights.pt").exists() is (when == "after")
    assert not (folder / "summary.json").exists()
    assert started(killed, *run) == started(whole, *run) == 0
    assert_is_whole(killed / "outputs", whole / "outputs")
    mine, other = (
        torch.load(outputs / "outputs" / "ends" / "run" / "weights.pt")
        for outputs in (killed, whole)
    )
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)


SWEEP = ("-m", *RUN[:-2], "hydra.sweep.dir=sweep", "seed=0,1", "launcher.jobs=1")


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole_sweep")
    assert started(folder, *SWEEP) == 0
    return folder / "sweep"


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("point", ["results.csv", pytest.param("sweep.html", marks=NIGHTLY)])
def test_a_sweep_killed_as_it_writes_its_tables_is_completed_by_the_same_command(
    point: str, when: str, whole_sweep: Path, tmp_path: Path
) -> None:
    assert started(tmp_path, *SWEEP, dies_at=f"{point}:{when}") == -signal.SIGKILL
    assert (tmp_path / "sweep" / point).exists() is (when == "after")
    assert started(tmp_path, *SWEEP) == 0
    sweep = tmp_path / "sweep"
    assert files(sweep) == files(whole_sweep)
    assert read_json(sweep / "sweep.json")["complete"] is True
    assert rows_of(sweep) == rows_of(whole_sweep)


def rows_of(sweep: Path) -> list[dict[str, str]]:
    """Return results.csv without what depends on the clock."""
    with (sweep / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
