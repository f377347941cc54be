"""Sweeps by the real command: what they leave, and that each job equals the standalone run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from sweeping import (
    LONG,
    SMALL,
    command,
    environment,
    sweep,
    table,
    under_way,
    weights,
    without_options,
)
from waiting import until

from regrow.project import ROOT
from regrow.record.records import load_status, read_json

TWO_BY_TWO = ("optimizer=adamw,sgd", "seed=0,1")
MISTAKEN = """
import numpy, torch

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(6, 3)
        drawn = numpy.random.default_rng().normal(size=(3, 6))
        self.weight.data = torch.from_numpy(drawn).float()
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete grid of four jobs. Its output is in `said`."""
    folder = tmp_path_factory.mktemp("grid")
    done = sweep(folder, *SMALL, *TWO_BY_TWO, "tags=[tried]", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder / "said").write_text(done.stdout)
    return folder / "sweep"


def alone(folder: Path, overrides: list[str]) -> str:
    """Return the weights of a job's own command, run by itself."""
    forked.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *overrides, "hydra.run.dir=alone"],
        cwd=folder, env=environment(), check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    return str(read_json(folder / "alone" / "summary.json")["weights_sha256"])


def test_a_grid_leaves_a_table_with_a_row_for_each_job(grid: Path) -> None:
    rows = table(grid)
    header = [*rows[0]]
    assert header[:4] == ["job", "status", "optimizer", "seed"]
    assert header[-4:] == ["weights_sha256", "folder", "reason", "log"]
    assert {"val/accuracy", "test/accuracy", "test/loss"} < set(header)
    assert [(row["optimizer"], row["seed"]) for row in rows] == [
        ("adamw", "0"), ("adamw", "1"), ("sgd", "0"), ("sgd", "1"),
    ]  # fmt: skip
    for row in rows:
        assert row["status"] == "completed"
        summary = read_json(grid / row["folder"] / "summary.json")
        assert row["weights_sha256"] == summary["weights_sha256"]
        assert float(row["test/accuracy"]) == summary["test"]["test/accuracy"]


def test_the_results_are_printed_and_on_the_page(grid: Path) -> None:
    said = (grid.parent / "said").read_text()
    assert "optimizer=sgd" in said and " ± " in said and "best job: " in said
    page = (grid / "sweep.html").read_text()
    assert "Settings" in page and "<svg" in page and "optimizer=adamw seed=1" in page


@pytest.mark.nightly
@pytest.mark.slow
def test_a_job_is_the_run_that_it_would_be_by_itself(grid: Path, tmp_path: Path) -> None:
    row = table(grid)[3]
    overrides = json.loads(
        json.dumps((grid / row["folder"] / ".hydra" / "overrides.yaml").read_text().split("\n- "))
    )
    overrides = [line.removeprefix("- ").strip().strip("'") for line in overrides if line.strip()]
    assert any(line.startswith("trainer.num_threads=") for line in overrides)
    assert alone(tmp_path, overrides) == row["weights_sha256"]
    other = [line for line in overrides if not line.startswith("seed=")]
    shutil.rmtree(tmp_path / "alone")
    assert alone(tmp_path, [*other, "seed=2"]) != row["weights_sha256"]


@pytest.mark.nightly
@pytest.mark.slow
def test_fresh_processes_come_to_the_same(grid: Path, tmp_path: Path) -> None:
    arguments = ("launcher.fresh_processes=true", "hydra.sweep.dir=sweep", "tags=[tried]")
    done = sweep(tmp_path, *SMALL, *TWO_BY_TWO, *arguments)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "sweep") == weights(grid)
    # The negative control: two jobs that differ only in their logs give different runs if the
    # model draws from an unseeded generator.
    (tmp_path / "mistaken.py").write_text(MISTAKEN)
    mistaken = (*without_options("mistaken.Net"), "trainer.log_every_steps=1,2")
    arguments = ("launcher.fresh_processes=true", "hydra.sweep.dir=mistaken")
    done = sweep(tmp_path, *SMALL, *mistaken, *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len({*weights(tmp_path / "mistaken").values()}) == 2


@pytest.mark.slow
def test_repeating_the_command_of_a_complete_sweep_runs_no_job(grid: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in grid.glob("*/summary.json")}
    rows = table(grid)
    arguments = (*SMALL, *TWO_BY_TWO, "tags=[tried]", "hydra.sweep.dir=sweep")
    done = sweep(grid.parent, *arguments)
    assert done.returncode == 0 and "4 jobs, 4 done" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in grid.glob("*/summary.json")} == before
    assert table(grid) == rows


@pytest.mark.slow
def test_more_values_run_the_new_jobs_alone(grid: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(grid, tmp_path / "sweep", symlinks=True)
    before = {path: path.stat().st_mtime_ns for path in mine.glob("*/summary.json")}
    done = sweep(tmp_path, "resume=sweep", "seed=0,1,2")
    assert done.returncode == 0 and "6 jobs, 4 done" in done.stdout, done.stderr
    rows = table(mine)
    assert [(r["job"], r["optimizer"], r["seed"]) for r in rows[4:]] == [
        ("4", "adamw", "2"), ("5", "sgd", "2"),
    ]  # fmt: skip
    assert rows[:4] == table(grid)
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.slow
def test_a_key_that_is_varied_later_distinguishes_the_earlier_jobs_too(
    grid: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(grid, tmp_path / "sweep", symlinks=True)
    later = ("optimizer=adamw", "seed=0", "data.batch_size=16,8")
    done = sweep(tmp_path, "resume=sweep", *later)
    assert done.returncode == 0, done.stderr
    assert [row["data.batch_size"] for row in table(mine)] == ["16", "16", "16", "16", "8"]


@pytest.mark.slow
def test_a_job_that_somebody_changed_is_named(grid: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(grid, tmp_path / "sweep", symlinks=True)
    assert all(row["reason"] == "" for row in table(mine))
    changed = ["resume=sweep/2", "trainer.max_epochs=4"]
    forked.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *changed],
        cwd=tmp_path, env=environment(), check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    done = sweep(tmp_path, "resume=sweep")
    assert done.returncode == 0, done.stderr
    said = "its run was resumed outside the sweep with trainer.max_epochs=4"
    assert f"completed: job 2, optimizer=sgd seed=0: {said}" in done.stdout
    assert [row["reason"] for row in table(mine)] == ["", "", said, ""]
    assert said in (mine / "sweep.html").read_text()


@pytest.mark.nightly
@pytest.mark.slow
def test_edits_change_nothing_of_a_sweep_under_way(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    for part in ("src", "conf", "scripts"):
        shutil.copytree(ROOT / part, root / part)
    module = root / "src" / "regrow" / "runs" / "training.py"
    code = module.read_text()
    arguments = (*LONG, "seed=0,1,2", "launcher.jobs=1", "trainer.num_threads=1")
    untouched = sweep(tmp_path / "untouched", *arguments, "hydra.sweep.dir=sweep", root=root)
    assert untouched.returncode == 0, untouched.stderr
    with under_way(tmp_path / "edited", *arguments, "hydra.sweep.dir=sweep", root=root) as process:
        until((tmp_path / "edited" / "sweep" / "0" / "metrics.jsonl").exists)
        module.write_text("this is not Python")
        config = root / "conf" / "optimizer" / "adamw.yaml"
        config.write_text(config.read_text().replace("lr:", "lr: 0.5 #"))
        said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert table(tmp_path / "edited" / "sweep") == table(tmp_path / "untouched" / "sweep")
    # A sweep that starts now uses the edits; the copy held the code from before.
    module.write_text(code)
    other = sweep(tmp_path / "later", *SMALL, "seed=0", "hydra.sweep.dir=sweep", root=root)
    assert other.returncode == 0
    assert "lr: 0.5" in (tmp_path / "later" / "sweep" / "0" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_bad_config_of_any_job_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = sweep(tmp_path, *SMALL, "optimizer.lr=0.1,abc")
    assert done.returncode == 2
    assert done.stderr == (
        "error: optimizer.lr=abc must be a number above 0. (job 1: optimizer.lr=abc)\n"
    )
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("optimizer.lr=interval(0,1)",), "Use sweep=optuna"),
        (("launcher.jobs=1,2",), "launcher.jobs is the sweep's own, and takes one value"),
        (("sweep.params.seed=0,1",), "takes one value. Write seed=0,1"),
        (("launcher.jobs=0",), "launcher.jobs=0 must be an integer of at least 1, or auto"),
        (("sweep=list",), "there is no set"),
        (("sweep=list", "sweep.sets=[adamw]"), "must be overrides"),
        (("sweep=list", 'sweep.sets=["seed=0","launcher.jobs=1"]'), "sets[1]: launcher.jobs is"),
        (("sweep=list", 'sweep.sets=["seed=0,1"]'), "sets[0]: seed=0,1: a set takes one value"),
        (("sweep.params={seed: 1, launcher: slurm}",), "sweep.params: launcher is the sweep's own"),
        (("sweep=optuna",), "nothing is varied"),
        (("sweep=optuna", "seed=0,1", "sweep.metric=accuracy"), "Did you mean"),
        (
            ("sweep=optuna", "optimizer.lr=interval(1,2)", "sweep.sampler=grid"),
            "infinitely many values",
        ),
        (("sweep=optuna", "seed=0,1", "sweep.n_trials=0"), "sweep.n_trials=0 must be"),
        (("sweep=optuna", "seed=0,1", "sweep.metric=[]"), "or a list of 1 or more"),
        (("sweep.fail_fats=true",), "Did you mean sweep.fail_fast?"),
        (("seed=0,1", "launcher=slurm", "sweep.fail_fast=true"), "fail_fast=true: Slurm's jobs"),
        (("seed=0,1", "hydra.sweep.subdir=x"), "would share it with job 0"),
        (("seed=0,1", "hydra.sweep.subdir=../x"), "must lie in the sweep's folder"),
    ],
)
@pytest.mark.slow
def test_a_wrong_override_of_a_sweep_is_an_error_of_one_line(
    arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    done = sweep(tmp_path, *SMALL, "seed=0", "hydra.sweep.dir=thesis")
    assert done.returncode == 2 and "holds chapter, which no sweep" in done.stderr
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter"]


@pytest.mark.nightly
@pytest.mark.slow
def test_sets_from_a_file_are_paired_and_combined_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(
        "- {optimizer: sgd, optimizer.lr: 0.1}\n- optimizer=adamw optimizer.lr=0.001\n"
    )
    (tmp_path / "sets.txt").write_text("# mine\noptimizer=rmsprop model.hidden=[4]\n")
    from_yaml = ("sweep=list", "sweep.file=sets.yaml", "seed=0,1", "hydra.sweep.dir=sweep")
    assert sweep(tmp_path, *SMALL, *from_yaml).returncode == 0
    rows = table(tmp_path / "sweep")
    assert [(r["optimizer"], r["optimizer.lr"], r["seed"]) for r in rows] == [
        ("sgd", "0.1", "0"), ("sgd", "0.1", "1"), ("adamw", "0.001", "0"), ("adamw", "0.001", "1"),
    ]  # fmt: skip
    from_text = ("sweep=list", "sweep.file=sets.txt", "hydra.sweep.dir=other")
    assert sweep(tmp_path, *SMALL, *from_text).returncode == 0
    assert [row["model.hidden"] for row in table(tmp_path / "other")] == ["[4]"]


@pytest.mark.nightly
@pytest.mark.slow
def test_twenty_sweeps_in_one_instant_have_twenty_folders(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            command(*SMALL, "trainer.max_epochs=1", "seed=0"), cwd=tmp_path, env=environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(20)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 20, said
    sweeps = tmp_path / "outputs" / "synthetic" / "sweeps"
    folders = [path for path in sweeps.iterdir() if not path.is_symlink()]
    assert len(folders) == 20
    assert all(len(table(folder)) == 1 for folder in folders)
    assert (sweeps / "latest").resolve() in folders


@pytest.mark.slow
def test_the_jobs_share_a_group_and_carry_the_tags(tmp_path: Path) -> None:
    tracker = ("logger=[wandb]", "logger.wandb.mode=offline", "tags=[tried]", "seed=0,1")
    done = sweep(tmp_path, *SMALL, *tracker, "hydra.sweep.dir=mine")
    assert done.returncode == 0, done.stdout
    for number in ("0", "1"):
        config = (tmp_path / "mine" / number / "config.yaml").read_text()
        assert "group: mine" in config and "- tried" in config
        assert [*(tmp_path / "mine" / number).glob("wandb/offline-run-*")]


@pytest.mark.slow
def test_several_processes_in_a_job(tmp_path: Path) -> None:
    arguments = ("trainer=ddp", "trainer.devices=2", "seed=0,1", "launcher.jobs=1")
    done = sweep(tmp_path, *SMALL, *arguments, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    for number in ("0", "1"):
        status = load_status(tmp_path / "sweep" / number)
        assert status is not None and len(status["pids"]) == 2


@pytest.mark.slow
def test_each_job_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    """GPUs are listed as by the driver's program; torch finds none here and uses the CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    small = [o for o in SMALL if not o.startswith("trainer.device")]
    done = sweep(tmp_path, *small, "seed=0,1,2,3", "hydra.sweep.dir=sweep", PATH=path)
    assert done.returncode == 0, done.stderr
    assert "2 at once" in done.stdout
    manifests = [read_json(tmp_path / "sweep" / n / "manifest.json") for n in "0123"]
    lent = [manifest["environment"]["CUDA_VISIBLE_DEVICES"] for manifest in manifests]
    assert set(lent) == {"0", "1"} and set(lent[:2]) == {"0", "1"}


def test_a_resumed_sweep_names_its_folder(tmp_path: Path) -> None:
    done = sweep(tmp_path, "resume=nowhere", "seed=0,1")
    assert done.returncode == 2 and "resume=nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == []
