"""A sweep whose job fails, or which is stopped or killed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from sweeping import LONG, SMALL, pids_of, sweep, table, under_way, without_options
from waiting import alive, until

from regrow.project import ROOT, lab_name
from regrow.record.records import load_status, read_json

FOUR = (*LONG, "seed=0,1,2,3", "launcher.jobs=2", "hydra.sweep.dir=sweep")
BOMB = """
import os, signal
from torch import nn

class Net(nn.Module):
    def __init__(self, ends: str):
        super().__init__()
        self.layer, self.ends = nn.Linear(6, 3), ends

    def forward(self, inputs):
        if self.training and self.ends == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.training and self.ends == "raised":
            raise KeyError("my own mistake")
        if self.training and self.ends == "memory":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory")
        endless = self.training and self.ends == "endless"
        return self.layer(inputs) * (float("nan") if endless else 1)
"""


def bombs(folder: Path) -> tuple[str, ...]:
    """A custom model whose value `ends` chooses how it ends."""
    (folder / "bomb.py").write_text(BOMB)
    return without_options("bomb.Net")


def model_of(folder: Path) -> tuple[str, ...]:
    return (*bombs(folder), "+model.ends=fine,killed,raised,memory,endless")


@pytest.mark.slow
@pytest.mark.nightly
def test_failures_stay_where_they_are(tmp_path: Path) -> None:
    arguments = (*SMALL, *model_of(tmp_path), "trainer.max_skipped_steps=2")
    named = (*arguments, "trainer.precision=fp32", "hydra.sweep.dir=sweep")
    done = sweep(tmp_path, *named, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    rows = {row["model.ends"]: row for row in table(tmp_path / "sweep")}
    assert {ends: row["status"] for ends, row in rows.items()} == {
        "fine": "completed", **dict.fromkeys(("killed", "raised", "memory", "endless"), "failed"),
    }  # fmt: skip
    assert "killed by SIGKILL" in rows["killed"]["reason"]
    assert "my own mistake" in rows["raised"]["reason"]
    assert "memory" in rows["memory"]["reason"]
    assert "finite" in rows["endless"]["reason"]
    for row in rows.values():
        assert (tmp_path / "sweep" / row["log"]).is_file()
    assert "my own mistake" in (tmp_path / "sweep" / rows["raised"]["log"]).read_text()
    assert "4 of 5 jobs failed" in done.stderr and "sweep.retry_failed=true" in done.stderr
    # The same command leaves failed jobs alone; sweep.retry_failed runs them again, once fixed.
    path = {"PYTHONPATH": str(tmp_path)}
    again = sweep(tmp_path, *named, **path)
    assert again.returncode == 1 and "started" not in again.stdout
    (tmp_path / "bomb.py").write_text(BOMB.replace("self.training and", "False and"))
    fixed = sweep(tmp_path, *named, "sweep.retry_failed=true", **path)
    assert fixed.returncode == 0, fixed.stderr
    assert {row["status"] for row in table(tmp_path / "sweep")} == {"completed"}


@pytest.mark.slow
def test_a_mistake_that_only_the_job_finds_is_recorded(tmp_path: Path) -> None:
    arguments = ("trainer.monitor=val/accuracy,val/nothing", "hydra.sweep.dir=sweep")
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 1
    good, bad = table(tmp_path / "sweep")
    assert good["status"] == "completed" and bad["status"] == "failed"
    assert bad["reason"].startswith("trainer.monitor=val/nothing is not measured")
    assert not (tmp_path / "sweep" / "1").exists()  # as for a single run, nothing is left


@pytest.mark.slow
def test_a_sweep_of_which_nothing_came_ends_with_its_table(tmp_path: Path) -> None:
    done = sweep(tmp_path, *SMALL, "init_from=/nowhere", "seed=0,1", "hydra.sweep.dir=sweep")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["failed", "failed"]
    assert (tmp_path / "sweep" / "sweep.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("fresh", ["false", pytest.param("true", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_stop_as_jobs_start_leaves_none_that_failed(
    tmp_path: Path, untouched: list[dict[str, str]], fresh: str, times: int
) -> None:
    folder = tmp_path / "sweep"
    arguments = (*FOUR, f"launcher.fresh_processes={fresh}")
    with under_way(tmp_path, *arguments) as process:
        until((folder / "logs" / "1.log").exists)
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "failed" not in {row["status"] for row in table(folder)}
    assert sweep(tmp_path, *FOUR).returncode == 0
    assert table(folder) == untouched


@pytest.mark.slow
def test_a_stop_while_planning_leaves_nothing(tmp_path: Path) -> None:
    many = ("seed=range(1000)", "hydra.sweep.dir=sweep")  # one or two minutes of composing
    with under_way(tmp_path, *SMALL, *many) as process:
        until((tmp_path / "sweep" / "code").is_dir)
        time.sleep(8)  # meanwhile, the copy's Python has started
        assert not (tmp_path / "sweep" / "sweep.json").exists()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_jobs_whose_code_cannot_be_imported_fail_each_by_itself(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for part in ("src", "conf", "scripts"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "src" / lab_name() / "models" / "mlp.py").write_text("raise RuntimeError('half fixed')")
    done = sweep(tmp_path, *SMALL, "seed=0,1", "hydra.sweep.dir=sweep", root=copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert all("half fixed" in row["reason"] for row in rows)


@pytest.mark.slow
def test_fail_fast_stops_the_others(tmp_path: Path) -> None:
    """The second job fails by its bad numbers when the first has long started."""
    arguments = (*LONG, "optimizer=sgd", "seed=0,1", "optimizer.lr=0.01,1e30", "launcher.jobs=2")
    late = ("trainer.max_skipped_steps=300", "trainer.max_epochs=5000")
    done = sweep(tmp_path, *arguments, *late, "sweep.fail_fast=true", "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    states = [row["status"] for row in table(tmp_path / "sweep")]
    assert states == ["interrupted", "failed", "waiting", "waiting"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("untouched")
    done = sweep(folder, *FOUR)
    assert done.returncode == 0, done.stderr
    return table(folder / "sweep")


def server_of(jobs: list[int]) -> int:
    """Return the process that forked the jobs."""
    status = Path(f"/proc/{jobs[0]}/status").read_text()
    (server,) = [int(x.split()[1]) for x in status.splitlines() if x.startswith("PPid:")]
    return server


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)]
)
def test_a_stop_lets_all_jobs_save_and_the_same_command_resumes(
    number: signal.Signals, tmp_path: Path, untouched: list[dict[str, str]]
) -> None:
    """Ctrl-C and `timeout` signal the whole group, with the process that forks the jobs."""
    folder = tmp_path / "sweep"
    with under_way(tmp_path, *FOUR) as process:
        until(lambda: len([*folder.glob("*/checkpoints/last")]) >= 2)
        os.kill(server_of(pids_of(folder)), number)
        process.send_signal(number)
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number, said
    assert f"-m resume={folder.name}" in said
    states = [row["status"] for row in table(folder)]
    assert states.count("interrupted") >= 1 and set(states) <= {
        "interrupted", "waiting", "completed"
    }  # fmt: skip
    assert sweep(tmp_path, *FOUR).returncode == 0
    assert table(folder) == untouched


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_killed_sweep_takes_its_jobs_with_it_and_grows_back(
    seed: int, tmp_path: Path, untouched: list[dict[str, str]]
) -> None:
    """SIGKILL of the parent at random instants, several times in a row."""
    instants = random.Random(seed)
    folder = tmp_path / "sweep"
    for _ in range(3):
        with under_way(tmp_path, *FOUR) as process:
            time.sleep(instants.uniform(0.3, 8))
            if process.poll() is not None:
                break
            pids = pids_of(folder)
            process.kill()
            process.wait()
            until(lambda pids=pids: not any(alive(pid) for pid in pids), seconds=10)
    assert sweep(tmp_path, *FOUR).returncode == 0
    assert table(folder) == untouched


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_sweep_takes_the_ranks_of_its_jobs_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    ranks = ("trainer=ddp", "trainer.devices=2", "launcher.jobs=2", "seed=0,1")
    with under_way(tmp_path, *LONG, *ranks, "hydra.sweep.dir=sweep") as process:
        until(lambda: len(pids_of(folder)) == 4)
        pids = pids_of(folder)
        assert all(alive(pid) for pid in pids)
        process.kill()
        process.wait()
        until(lambda: not any(alive(pid) for pid in pids), seconds=10)


@pytest.mark.slow
def test_a_sweep_in_use_cannot_be_resumed(tmp_path: Path) -> None:
    with under_way(tmp_path, *FOUR) as process:
        until((tmp_path / "sweep" / "0" / "status.json").exists)
        second = sweep(tmp_path, *FOUR)
        assert second.returncode == 2 and "is in use by process" in second.stderr
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_same_command_resumes_a_sweep_without_a_named_folder(tmp_path: Path) -> None:
    arguments = [o for o in FOUR if not o.startswith("hydra.")]
    sweeps = tmp_path / "outputs" / "synthetic" / "sweeps"
    with under_way(tmp_path, *arguments) as process:
        until(lambda: [*sweeps.glob("*/*/checkpoints/last")])
        process.kill()
        process.wait()
    (first,) = [path for path in sweeps.iterdir() if not path.is_symlink()]
    assert sweep(tmp_path, *arguments).returncode == 0
    assert [path for path in sweeps.iterdir() if not path.is_symlink()] == [first]
    assert {row["status"] for row in table(first)} == {"completed"}
    # A complete sweep is not resumed: the next one is new.
    other = [o for o in arguments if not o.startswith("trainer.max_epochs=150")]
    assert sweep(tmp_path, *other, "trainer.max_epochs=1").returncode == 0
    assert len([path for path in sweeps.iterdir() if not path.is_symlink()]) == 2


@pytest.mark.nightly
@pytest.mark.slow
def test_interrupted_jobs_resume_when_the_command_names_others_too(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    with under_way(tmp_path, *FOUR) as process:
        until((folder / "0" / "checkpoints" / "last").exists)
        process.kill()
        process.wait()
    assert sweep(tmp_path, "resume=sweep", "seed=7").returncode == 0
    assert [(row["seed"], row["status"]) for row in table(folder)] == [
        (seed, "completed") for seed in "01237"
    ]  # fmt: skip


@pytest.mark.nightly
@pytest.mark.slow
def test_a_killed_server_ends_its_jobs_and_is_said(tmp_path: Path) -> None:
    """The process that forks the jobs is killed alone: no job continues unwatched."""
    folder = tmp_path / "sweep"
    with under_way(tmp_path, *FOUR, "sweep.fail_fast=true") as process:
        until(lambda: len(pids_of(folder)) == 2)
        pids = pids_of(folder)
        assert server_of(pids) != process.pid
        os.kill(server_of(pids), signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids), seconds=10)
        process.communicate(timeout=60)
    assert process.returncode == 1
    assert "failed" in {row["status"] for row in table(folder)}
    assert load_status(folder / "0") is not None and read_json(folder / "sweep.json")["jobs"]
