"""Slurm starts the processes, or gets the job: the run is the same, and it is requeued."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import slurm
from running import TINY, config_of, fingerprint, train

from regrow.errors import MachineFault, UserError
from regrow.processes import outside
from regrow.processes.slurm import SlurmOptions, SrunTask, check, waiting_or_running
from regrow.project import CONF
from regrow.record.records import read_json
from regrow.sweep import ledger
from regrow.sweep.cluster import Cluster

TRAIN = CONF.parent / "scripts" / "train.py"
TWO = (*TINY, "trainer=ddp", "trainer.devices=2", "trainer.device=cpu", "trainer.num_threads=1")
LONG = (*TWO, "trainer.max_epochs=60", "trainer.eval_every_epochs=20",
        "trainer.checkpoint.save_every_steps=7")  # fmt: skip
HERE = ("launcher.cpus_per_task=2",)
ON_NODES = ("launcher=slurm_nodes", "launcher.nodes=1")
WHY_NOT = slurm.why_not()


def needs_slurm(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)(test))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm.running(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**environment, "PYTHONPATH": forked.python_path(Path(__file__).parent)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The results of `LONG`, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    subprocess.run(
        [sys.executable, str(TRAIN), *LONG, f"hydra.run.dir={folder}"],
        env={**os.environ, "PYTHONPATH": forked.python_path(Path(__file__).parent)},
        check=True, capture_output=True, timeout=240,
    )  # fmt: skip
    return fingerprint(folder)


def call(
    cluster: dict[str, str], folder: Path, *arguments: str, by: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end, in the folder's parent."""
    return subprocess.run(
        [*by, sys.executable, str(TRAIN), *arguments, f"hydra.run.dir={folder.name}"],
        cwd=folder.parent, env=cluster, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def submitted(cluster: dict[str, str], folder: Path, *arguments: str) -> str:
    """Return the number of the submitted job, once it has saved a checkpoint."""
    done = call(cluster, folder, *LONG, *HERE, *arguments)
    assert done.returncode == 0, done.stderr
    until((folder / "checkpoints" / "last").exists, folder)
    (number,) = jobs(cluster)
    return number


def jobs(cluster: dict[str, str]) -> dict[str, str]:
    """Return the state of each job in Slurm."""
    command = ["squeue", "--noheader", "--format=%i %T"]
    said = subprocess.run(command, env=cluster, capture_output=True, text=True, check=True)
    return dict(line.split() for line in said.stdout.splitlines())  # type: ignore[misc]


def until_done(cluster: dict[str, str], folder: Path) -> str:
    """Wait until Slurm has no job; returns their output."""
    deadline = time.monotonic() + 300
    while jobs(cluster):
        assert time.monotonic() < deadline, output_of(folder)
        time.sleep(0.2)
    return output_of(folder)


def output_of(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("slurm/*.out")))


def until(happened: object, folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < deadline, output_of(folder)
        time.sleep(0.05)


@needs_slurm
def test_a_run_that_srun_started_is_the_same_run(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    overrides = [o for o in LONG if not o.startswith("trainer.devices")]
    done = call(cluster, folder, *overrides, by=("srun", "--ntasks=2"))
    assert done.returncode == 0, done.stderr
    assert fingerprint(folder) == whole
    assert done.stdout.count("record: ") == 1  # only one of them prints
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def in_a_terminal(cluster: dict[str, str], folder: Path, command: list[str], typed: str) -> str:
    """Return everything shown until the command ends."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execvpe(command[0], command, cluster)
    shown, deadline = b"", time.monotonic() + 200
    try:
        while time.monotonic() < deadline:
            if b"# " in shown[-20:] and typed:
                os.write(terminal, typed.encode())
                typed = ""
            if select.select([terminal], [], [], 0.5)[0]:
                if not (more := os.read(terminal, 4096)):
                    break
                shown += more
    except OSError:  # its way to report that the command has ended
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        subprocess.run(["scancel", "--user=root"], env=cluster, check=True)
    return shown.decode()


@needs_slurm
def test_a_shell_that_srun_opened_with_several_tasks_trains_in_one_process(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    train = shlex.join([sys.executable, str(TRAIN), *TINY, "hydra.run.dir=run"])
    shell = {**cluster, "PS1": "# "}
    command = ["srun", "--pty", "--ntasks=4", "bash", "--norc"]
    shown = in_a_terminal(shell, tmp_path, command, f"{train}\nexit\n")
    assert "note: one process, in a shell that Slurm gave 4 tasks" in shown
    assert read_json(tmp_path / "run" / "status.json")["state"] == "completed", shown
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@needs_slurm
def test_a_task_that_is_alone_says_for_which_it_waits_and_ends(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    script = tmp_path / "first.sh"
    train = shlex.join([sys.executable, str(TRAIN), *TINY, "trainer=ddp", "trainer.device=cpu"])
    script.write_text(f"if [ $SLURM_PROCID = 0 ]; then {train} $@; fi\n")
    (tmp_path / "work").mkdir()
    command = ["srun", "--ntasks=3", "bash", str(script), "trainer.timeout_seconds=8"]
    done = subprocess.run(
        command, cwd=tmp_path / "work", env=cluster, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2
    waits, error = [line for line in done.stderr.splitlines() if not line.startswith("srun: ")]
    assert waits.startswith("rank 0: waiting for ranks 1, 2 of SLURM_STEP_NUM_TASKS=3.")
    assert error.startswith("error: rank 0 waited 8 seconds for ranks 1, 2 of SLURM_STEP_NUM_TASKS")
    assert [*(tmp_path / "work").iterdir()] == []


@needs_slurm
def test_a_bad_config_ends_all_that_srun_started_with_one_line(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    done = call(cluster, tmp_path / "run", "sed=1", by=("srun", "--ntasks=2"))
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if not line.startswith("srun: ")]
    assert ours == ["error: sed: there is no such key. Did you mean seed?"]
    assert [*tmp_path.rglob("*")] == []


@pytest.mark.nightly
@needs_slurm
def test_a_flag_that_only_prints_ends_all_that_srun_started(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    done = call(cluster, tmp_path / "run", "--cfg", "job", by=("srun", "--ntasks=2"))
    assert done.returncode == 0 and done.stdout.count("optimizer:") == 1


@needs_slurm
def test_a_signal_to_the_step_stops_all_at_one_step(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = ["srun", "--ntasks=2", sys.executable, str(TRAIN), *LONG, "hydra.run.dir=run"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=cluster, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    until((folder / "checkpoints" / "last").exists, folder)
    (number,) = jobs(cluster)
    subprocess.run(["scancel", "--signal=TERM", f"{number}.0"], env=cluster, check=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert read_json(folder / "status.json")["state"] == "interrupted"
    assert call(cluster, folder, *LONG).returncode == 0
    assert fingerprint(folder) == whole


@pytest.mark.nightly
@needs_slurm
def test_a_job_on_one_machine_leaves_the_same_record(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    done = call(cluster, folder, *LONG, "launcher=slurm", *HERE)
    assert done.returncode == 0 and "submitted to Slurm: job " in done.stdout, done.stderr
    output = until_done(cluster, folder)
    assert fingerprint(folder) == whole, output
    assert f"if interrupted, resume with: python {TRAIN} resume=run launcher=slurm" in done.stdout
    again = call(cluster, folder, *LONG, "launcher=slurm", *HERE)
    assert again.returncode == 0 and "run is complete" in again.stdout
    assert not jobs(cluster)
    assert (folder / "slurm").stat().st_mode & 0o077 == 0
    assert not (folder / "slurm" / "job.json").exists()  # it may hold API keys


@needs_slurm
def test_a_job_that_waits_is_not_submitted_twice(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = (*LONG, "launcher=slurm", *HERE, "launcher.sbatch={hold: true}", "resume=never")
    assert call(cluster, folder, *held).returncode == 0
    # a requeued run resumes, whatever its first start was to do
    assert read_json(folder / "slurm" / "job.json")["config"]["resume"] == "auto"
    (number,) = jobs(cluster)
    again = call(cluster, folder, *held)
    assert again.returncode == 2
    assert again.stderr == (
        "error: run is queued already. To submit it again, cancel that: "
        f"scancel {number}\n"
    )  # fmt: skip
    subprocess.run(["scancel", number], env=cluster, check=True)
    until_done(cluster, folder)


@needs_slurm
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("slurm",), id="slurm"),
        pytest.param(
            ("slurm_nodes", "launcher.nodes=1"), marks=pytest.mark.nightly, id="slurm_nodes"
        ),
    ],
)
def test_a_run_whose_time_is_up_saves_and_is_queued_again(
    cluster: dict[str, str], whole: str, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    """Slurm's signal before the time limit, sent by hand."""
    folder = tmp_path / "run"
    number = submitted(cluster, folder, f"launcher={launcher[0]}", *launcher[1:])
    before = read_json(folder / "status.json")["pids"]
    subprocess.run(["scancel", "--signal=USR2", number], env=cluster, check=True)
    output = until_done(cluster, folder)
    assert fingerprint(folder) == whole, output
    assert "stopped by SIGTERM at step" in output and "resuming from step" in output
    assert read_json(folder / "status.json")["pids"] != before


@pytest.mark.nightly
@needs_slurm
def test_a_cancelled_run_saves_and_is_not_queued_again(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    number = submitted(cluster, folder, "launcher=slurm")
    subprocess.run(["scancel", number], env=cluster, check=True)
    until_done(cluster, folder)
    assert read_json(folder / "status.json")["state"] == "interrupted"
    assert call(cluster, folder, *LONG).returncode == 0  # here, without Slurm
    assert fingerprint(folder) == whole


@pytest.mark.nightly
@needs_slurm
def test_a_preempted_run_saves_and_goes_back_to_the_queue(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    submitted(cluster, folder, "launcher=slurm")
    urgent = ["srun", "--partition=urgent", "--exclusive", "--ntasks=1", "true"]
    subprocess.run(urgent, env=cluster, check=True, timeout=120, capture_output=True)
    output = until_done(cluster, folder)
    assert "preempted: going back to the queue" in output and "resuming from step" in output
    assert fingerprint(folder) == whole, output


@pytest.mark.nightly
@needs_slurm
def test_a_cancelled_start_is_not_queued_again(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    nodes = (*ON_NODES, *HERE, "trainer.max_restarts=2")
    assert call(cluster, folder, *LONG, *nodes).returncode == 0
    (number,) = jobs(cluster)
    until(lambda: "Loading pickle" in output_of(folder), folder)
    time.sleep(1)  # its processes are importing
    subprocess.run(["scancel", number], env=cluster, check=True)
    output = until_done(cluster, folder)
    assert "going back" not in output and not (folder / "metrics.jsonl").exists()


@needs_slurm
def test_a_mistake_that_shows_in_the_job_is_said_there_and_not_made_again(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    nodes = (*ON_NODES, *HERE, "trainer.max_restarts=2")
    wrong = ("trainer.strategy=fsdp", "trainer.fsdp.modules=[zzz]")
    assert call(cluster, folder, *LONG, *nodes, *wrong).returncode == 0
    output = until_done(cluster, folder)
    assert output.count("error: trainer.fsdp.modules=['zzz']: no module matches zzz") == 1
    assert "going back" not in output


@needs_slurm
def test_a_job_that_sbatch_refuses_leaves_nothing(cluster: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    refused = call(cluster, folder, *TINY, "launcher=slurm", "launcher.partition=nowhere")
    assert refused.returncode == 2 and "error: launcher=slurm: " in refused.stderr
    assert [*tmp_path.rglob("*")] == []


@needs_slurm
@pytest.mark.nightly
def test_several_tasks_start_again_after_one_was_killed(
    cluster: dict[str, str], whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    submitted(cluster, folder, *ON_NODES, "trainer.max_restarts=1")
    os.kill(read_json(folder / "status.json")["pids"][1], signal.SIGKILL)
    output = until_done(cluster, folder)
    assert "ended with -9: going back to the queue" in output or "ended with 1: going" in output
    assert fingerprint(folder) == whole, output


@pytest.mark.nightly
@needs_slurm
def test_without_restarts_a_killed_task_ends_the_job(
    cluster: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    submitted(cluster, folder, *ON_NODES)
    os.kill(read_json(folder / "status.json")["pids"][0], signal.SIGKILL)
    began = time.monotonic()
    output = until_done(cluster, folder)
    assert time.monotonic() - began < 60
    assert "going back" not in output
    status = read_json(folder / "status.json")
    assert status["state"] in ("failed", "running"), status  # running without a lock: interrupted


def sweep(cluster: dict[str, str], cwd: Path, *arguments: str) -> Any:
    command = [sys.executable, str(TRAIN), "-m", *TINY, "trainer.device=cpu", *arguments]
    return subprocess.run(
        [*command, "launcher=slurm", *HERE, "hydra.sweep.dir=sweep"],
        cwd=cwd, env=cluster, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@needs_slurm
def test_a_sweep_is_submitted_as_one_array(cluster: dict[str, str], tmp_path: Path) -> None:
    wrong = "trainer.monitor=val/loss,val/nothing"  # found in the job, not before
    done = sweep(cluster, tmp_path, "seed=1,2", wrong, "trainer.mode=min")
    assert done.returncode == 0, done.stderr
    assert "submitted to Slurm: 4 jobs" in done.stdout
    assert len({name.partition("_")[0] for name in jobs(cluster)}) == 1
    again = sweep(cluster, tmp_path, "seed=1,2", wrong, "trainer.mode=min")
    assert again.returncode == 0 and "queued or running already: " in again.stdout, again.stderr
    until_done(cluster, tmp_path)
    with (tmp_path / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["trainer.monitor"], row["status"]) for row in rows] == [
        ("val/loss", "completed"), ("val/nothing", "failed"),
    ] * 2  # fmt: skip
    assert rows[1]["reason"].startswith("trainer.monitor=val/nothing is not measured")
    assert (tmp_path / "sweep" / "sweep.html").is_file()
    assert len([*(tmp_path / "sweep").glob("*/report.html")]) == 1  # sweep.pictures=best
    assert rows[0]["weights_sha256"] != rows[2]["weights_sha256"]


@needs_slurm
def test_a_search_gives_its_trials_to_slurm(cluster: dict[str, str], tmp_path: Path) -> None:
    space = ("sweep=optuna", "sweep.n_trials=3", "optimizer.lr=interval(0.001,0.1)")
    done = sweep(cluster, tmp_path, *space, "launcher.jobs=2")
    assert done.returncode == 0, done.stderr + done.stdout
    for number in ("0", "1", "2"):
        folder = tmp_path / "sweep" / number
        assert read_json(folder / "summary.json")["status"] == "completed"
    assert not jobs(cluster)


OPTIONS = SlurmOptions(
    nodes=1, tasks_per_node=1, cpus_per_task=1, gpus_per_node=0, mem_gb=None, timeout_minutes=60,
    partition=None, account=None, qos=None, constraint=None, save_seconds=120, max_timeouts=1,
    jobs=None, setup=[], sbatch={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "trainer", "says"),
    [
        ({"nodes": 2}, {"devices": 4}, "launcher.nodes=2"),
        ({"timeout_minutes": 3}, {}, "launcher.timeout_minutes=3"),
        ({}, {"device": "cuda"}, "Add launcher.gpus_per_node="),
        ({"tasks_per_node": 3}, {"devices": 2}, "Give the same number to both"),
        ({"partition": "a\ntouch /tmp/mine"}, {}, "more than one line"),
        ({"sbatch": {"comment": "a\ntouch /tmp/mine"}}, {}, "more than one line"),
    ],
)
def test_settings_that_slurm_could_never_start_are_refused_at_once(
    changed: dict[str, Any], trainer: dict[str, object], says: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    options = SlurmOptions(**{**vars(OPTIONS), **changed})
    with pytest.raises(UserError, match=says):
        check(options, {"devices": 1, "device": "auto", **trainer})
    check(OPTIONS, {"devices": 4, "device": "auto"})
    check(SlurmOptions(**{**vars(OPTIONS), "gpus_per_node": 4}), {"devices": 4, "device": "cuda"})


def test_without_slurm_it_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch on this machine"):
        check(OPTIONS, {"devices": 1, "device": "auto"})


def test_jobs_are_not_taken_for_ended_while_slurm_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that is resumed asks first; a search asks again later."""
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Socket timed out' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert waiting_or_running([]) == set()
    with pytest.raises(MachineFault, match="launcher=slurm: slurm_load_jobs error: Socket timed"):
        waiting_or_running(["12"])
    place = Cluster(tmp_path, OPTIONS, {3: None})  # type: ignore[dict-item]
    ledger.note(tmp_path, 3, "queued", slurm="12")
    assert place.ended(0) == [] and len(place.running) == 1


ON_TIME = """
import json, os, sys, time
from pathlib import Path

from regrow.processes import slurm
from regrow.runs import worker
from regrow.config.job import Job
from regrow.record.records import read_json

class Forked:
    # In place of the Python that a task starts, which takes seconds to import.
    def __init__(self, job):
        self.pid = os.fork()
        if not self.pid:
            os.environ["REGROW_JOB"] = str(job)
            worker.main()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def code(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

config, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
job = Job(config, str(folder), [], {}, {"overrides.yaml": "[]"}, ["train.py"], draws=False)
task = slurm.SrunTask(slurm.write_job(job))
task.process = Forked(task.job)
while not (folder / "checkpoints" / "last").exists():
    assert not os.waitid(os.P_PID, task.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    time.sleep(0.02)
again = task.checkpoint().function
said = [task.process.code(), read_json(folder / "status.json")["state"]]
print(json.dumps([*said, Forked(again.job).code()]), file=sys.stderr)
"""


def test_a_task_whose_time_is_up_saves_and_comes_back(tmp_path: Path) -> None:
    """Up to Slurm itself: submitit calls `checkpoint`, and queues what that returns."""
    limits = ("trainer.max_epochs=30", "trainer.eval_every_epochs=10")
    once = (*TINY, *limits, "trainer.checkpoint.save_every_epochs=5")
    train(tmp_path / "whole", *once)
    config = json.dumps(config_of(*once, "resume=never"))  # only for its first start
    done = forked.run(
        [sys.executable, "-c", ON_TIME, config, tmp_path / "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert json.loads(done.stderr.splitlines()[-1]) == [143, "interrupted", 0], done.stderr
    assert "resuming from step" in (tmp_path / "run" / "train.log").read_text()
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_task_whose_time_is_up_after_its_run_has_ended_comes_back(tmp_path: Path) -> None:
    """It may still write the table of a sweep, or ask Slurm whether it is preempted."""
    task = SrunTask(tmp_path / "slurm" / "job.json")
    task.process = subprocess.Popen(["true"])
    task.process.wait()
    assert task.checkpoint().function.job == task.job


NO_CLUSTER = """#!/bin/sh
echo 'sbatch: error: fetch_config: DNS SRV lookup failed' >&2
echo 'sbatch: fatal: Could not establish a configuration source' >&2
exit 1
"""


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (NO_CLUSTER, "sbatch finds no cluster from this machine. Submit from one that belongs to "
                     "it, or leave out launcher to run here."),
        (NO_CLUSTER.replace("Could not establish a configuration source", "Invalid account"),
         "fetch_config: DNS SRV lookup failed; Invalid account"),
    ],
)  # fmt: skip
def test_an_error_of_sbatch_is_one_line_and_nothing_is_written(
    program: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "work").mkdir()
    for name in ("sbatch", "srun"):  # submitit looks for srun, and never calls it here
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
    done = forked.run(
        [sys.executable, str(TRAIN), *TINY, "launcher=slurm"], cwd=tmp_path / "work",
        env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == f"error: launcher=slurm: {says}\n"
    assert [*(tmp_path / "work").iterdir()] == []


def test_srun_says_in_its_way_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outside.per_node("2(x3),1") == [2, 2, 2, 1]
    monkeypatch.setattr(outside, "is_in_a_shell", lambda: False)  # pytest itself may be in one
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3",
        "SLURM_PROCID": "6", "SLURM_LOCALID": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert outside.srun_environment() == {
        "RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    }  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(outside, "is_in_a_shell", lambda: True)  # of `srun --pty --ntasks=7 bash`
        assert outside.srun_environment() == {}
    with monkeypatch.context() as patch:
        patch.delenv("SLURM_NODEID")
        with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS=7 is set, but SLURM_NODEID not"):
            outside.srun_environment()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # as in the shell of an allocation
    assert outside.srun_environment() == {}


def test_a_run_of_another_does_not_submit_anything(tmp_path: Path) -> None:
    """A resume follows what a folder recorded, but not where it was run."""
    train(tmp_path / "run", *TINY)
    file = tmp_path / "run" / ".hydra" / "overrides.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(["launcher=slurm", "launcher.setup=[touch /tmp/mine]"]))
    from regrow.config.resume import expand

    with pytest.raises(UserError, match="It is not followed"):
        expand([f"resume={tmp_path / 'run'}"])
