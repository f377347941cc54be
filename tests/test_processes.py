"""The command with several processes: one folder, one result, and what happens when one dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
from running import TINY, fingerprint, metrics_of, train

from regrow.project import CONF
from regrow.record.records import read_json

TRAIN = CONF.parent / "scripts" / "train.py"
TWO = (*TINY, "trainer=ddp", "trainer.devices=2", "trainer.device=cpu", "trainer.num_threads=1")
LONG = (*TWO, "trainer.max_epochs=60", "trainer.eval_every_epochs=20",
        "trainer.checkpoint.save_every_steps=7")  # fmt: skip
THREE_SHARDED = (*TINY, "trainer=fsdp", "trainer.devices=3", "trainer.device=cpu")
# Arguments of an MLP that the modules of blocks.py do not take.
BARE = tuple(
    f"~model.{key}" for key in ("init", "hidden", "dropout", "activation", "norm", "freeze")
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": forked.python_path(Path(__file__).parent)}


def start(folder: Path, *overrides: str, by: tuple[str, ...] = (), **options: Any) -> Any:
    command = [*(by or (sys.executable,)), str(TRAIN), *overrides, f"hydra.run.dir={folder}"]
    return forked.popen(
        command, cwd=folder.parent, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def run(folder: Path, *overrides: str, code: int = 0, by: tuple[str, ...] = ()) -> str:
    """Run to the end; returns its stderr."""
    process = start(folder, *overrides, by=by)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return str(err)


def until(happened: Any, process: Any) -> None:
    deadline = time.monotonic() + 90
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[int]:
    return list(read_json(folder / "status.json")["pids"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The results of the long run, undisturbed."""
    folder = tmp_path_factory.mktemp("long") / "whole"
    run(folder, *LONG)
    return fingerprint(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run of two processes."""
    folder = tmp_path_factory.mktemp("short") / "two"
    run(folder, *TWO)
    return folder


def test_two_processes_leave_one_record_with_the_numbers_of_one(two: Path, tmp_path: Path) -> None:
    train(tmp_path / "one", *TINY)
    lines, expected = metrics_of(two), metrics_of(tmp_path / "one")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, its in zip(lines, expected, strict=True):
        assert line == pytest.approx(its, abs=1e-4, nan_ok=True)
    assert (two / "train.log").read_text().count("batch: 16 = 2 devices × 1 micro-batch × 8") == 1
    assert read_json(two / "status.json")["state"] == "completed"
    assert len(set(ranks_of(two))) == 2


def variables_of(starter: str, rank: int) -> dict[str, str]:
    """Return the variables that torchrun, or srun, sets for one of two processes on a machine."""
    if starter == "torchrun":
        names: dict[str, Any] = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
        }
        names["MASTER_ADDR"] = "127.0.0.1"
    else:
        names = {"SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_NODES": 1}
        names |= {"SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_TASKS_PER_NODE": 2, "SLURM_NODEID": 0}
        names |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
    return {name: str(value) for name, value in names.items()}


@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_two_that_were_started_outside_are_the_run_that_one_would_start(
    starter: str, two: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = {"MASTER_PORT": str(listener.getsockname()[1])} if starter == "torchrun" else {}
    processes = [
        forked.popen(
            [sys.executable, str(TRAIN), *TINY, "trainer=ddp", "trainer.device=cpu",
             "hydra.run.dir=run"],
            cwd=tmp_path, env={**ENVIRONMENT, **port, **variables_of(starter, rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum(out.count("record: ") for out, _ in said) == 1
    assert fingerprint(tmp_path / "run") == fingerprint(two)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_run_started_outside_by_torchrun_is_the_same_run(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
    port = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")
    run(tmp_path / "outside", *TINY, "trainer=ddp", "trainer.device=cpu", by=(*torchrun, *port))
    run(tmp_path / "inside", *TWO)
    assert fingerprint(tmp_path / "outside") == fingerprint(tmp_path / "inside")


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.nightly)])
def test_two_agents_make_one_run_and_a_killed_one_ends_it(
    killed: int, whole: str, tmp_path: Path
) -> None:
    """As on two machines: each has its own torchrun."""
    folder = tmp_path / "agents"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    one = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=2")
    one = (*one, "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}")
    alone = [o for o in LONG if not o.startswith("trainer.devices")]
    agents = [start(folder, *alone, by=one) for _ in range(2)]
    until((folder / "checkpoints" / "last").exists, agents[0])
    ranks = ranks_of(folder)
    agents[killed].kill()
    for agent in agents:
        agent.communicate(timeout=60)
        assert agent.returncode != 0
    until_gone(ranks)
    agents = [start(folder, *alone, by=one) for _ in range(2)]
    said = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert sum(out.count("record: ") for out, _ in said) == 1
    assert fingerprint(folder) == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "number", "name"),
    [
        (0, signal.SIGKILL, "SIGKILL"),
        pytest.param(1, signal.SIGKILL, "SIGKILL", marks=pytest.mark.nightly),
        pytest.param(1, 40, "signal 40", marks=pytest.mark.nightly),  # a real-time signal
    ],
)
def test_a_killed_process_ends_the_run_and_the_same_command_resumes_it(
    rank: int, number: int, name: str, whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    process = start(folder, *LONG)
    until((folder / "checkpoints" / "last").exists, process)
    os.kill(ranks_of(folder)[rank], number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and f"rank {rank} was killed by {name}" in err
    status = read_json(folder / "status.json")
    assert status["state"] == "failed" and name in status["error"]
    run(folder, *LONG)
    assert fingerprint(folder) == whole


@pytest.mark.slow
def test_a_sharded_run_grows_back_and_is_read_by_one_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sharded = (*LONG, "trainer=fsdp", "trainer.devices=2", "trainer.ema_decay=0.9")
    run(tmp_path / "whole", *sharded)
    process = start(tmp_path / "killed", *sharded)
    until((tmp_path / "killed" / "checkpoints" / "last").exists, process)
    os.kill(ranks_of(tmp_path / "killed")[1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1 and "rank 1 was killed by SIGKILL" in err
    run(tmp_path / "killed", *sharded)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    evaluated = forked.run(
        [sys.executable, str(TRAIN.with_name("evaluate.py")), f"run={tmp_path / 'whole'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert "The run itself measured the same" in evaluated.stdout, evaluated.stderr
    caplog.set_level("INFO")
    start_from = f"init_from={tmp_path / 'whole' / 'weights.pt'}"
    train(tmp_path / "from", *TINY, start_from, "trainer.max_epochs=1")
    assert "6 of 6 tensors" in caplog.text


@pytest.mark.slow
def test_a_sharded_run_begins_where_one_process_has_a_single_example(tmp_path: Path) -> None:
    """The check of its first batch must make as many passes in each process, or all would wait."""
    few = ("data.source.num_val=3", "trainer.timeout_seconds=60", "trainer.max_epochs=1")
    run(tmp_path / "few", *TWO, "trainer=fsdp", *few)
    assert read_json(tmp_path / "few" / "status.json")["state"] == "completed"


@pytest.mark.slow
def test_a_run_starts_again_by_itself_after_a_process_was_killed(
    whole: str, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    process = start(folder, *LONG, "trainer.max_restarts=1")
    until((folder / "checkpoints" / "last").exists, process)
    os.kill(ranks_of(folder)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0 and "Starting again from the last checkpoint" in err
    assert fingerprint(folder) == whole


@pytest.mark.slow
def test_a_signal_to_one_process_or_all_stops_all_at_one_step(whole: str, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    for number, code in {signal.SIGTERM: 143, signal.SIGINT: 130}.items():
        process = start(folder, *LONG)
        until(lambda: (folder / "checkpoints" / "last").exists() and running(folder), process)
        ranks = ranks_of(folder)
        # To one of them, then to all, as schedulers do, including the parent.
        for pid in [ranks[1]] if number == signal.SIGTERM else [process.pid, *ranks]:
            os.kill(pid, number)
        _, err = process.communicate(timeout=90)
        if process.returncode == 0:  # it was done before the signal
            break
        assert process.returncode == code, err
        assert read_json(folder / "status.json")["state"] == "interrupted"
    else:
        run(folder, *LONG)
    assert fingerprint(folder) == whole


def running(folder: Path) -> bool:
    return bool(read_json(folder / "status.json")["state"] == "running")


@pytest.mark.slow
def test_a_signal_in_an_evaluation_stops_all(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    model = ("model._target_=blocks.Slow", "+model.seconds=0.2", f"+model.gate={gate}")
    sizes = ("data.source.num_val=200", "data.eval_batch_size=2", "trainer.check_first_batch=false")
    folder = tmp_path / "stopped"
    process = start(folder, *TWO, *BARE, *model, *sizes)
    until(gate.exists, process)
    os.kill(ranks_of(folder)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert read_json(folder / "status.json")["state"] == "interrupted"
    assert (folder / "checkpoints" / "last").exists()


@pytest.mark.nightly
@pytest.mark.slow
def test_the_number_of_processes_may_change_in_between(tmp_path: Path) -> None:
    plain = ("scheduler=constant", "optimizer=sgd", "optimizer.lr=0.1")
    train(tmp_path / "whole", *TINY, *plain, "trainer.max_epochs=6")
    folder = tmp_path / "changing"
    run(folder, *TWO, *plain, "trainer.max_epochs=1")
    run(folder, *THREE_SHARDED, *plain, "trainer.max_epochs=2")
    run(folder, *TINY, *plain, "trainer.max_epochs=3")
    run(folder, *TWO, *plain, "trainer.max_epochs=4", "trainer.strategy=fsdp")
    run(folder, *TWO, *plain, "trainer.max_epochs=6")
    changed, whole = losses(folder), losses(tmp_path / "whole")
    assert len(whole) == 24 and changed == pytest.approx(whole, abs=1e-5)


def losses(folder: Path) -> list[float]:
    return [line["train/loss"] for line in metrics_of(folder) if "train/loss" in line]


@pytest.mark.slow
def test_a_failing_process_tells_why_and_ends_all(tmp_path: Path) -> None:
    err = run(
        tmp_path / "failing", *TWO, *BARE, "model._target_=blocks.Failing", "+model.rank=1", code=1
    )
    assert "rank 1: ArithmeticError: on cue" in err and "blocks.py" in err
    status = read_json(tmp_path / "failing" / "status.json")
    assert status["state"] == "failed" and "on cue" in status["error"]


@pytest.mark.nightly
@pytest.mark.slow
def test_out_of_memory_in_one_process_starts_all_again_in_smaller_micro_batches(
    tmp_path: Path,
) -> None:
    hungry = ("model._target_=blocks.Hungry", "+model.rank=1")
    err = run(tmp_path / "hungry", *TWO, *BARE, *hungry, "+model.room=4")
    assert "out of memory" in err and "Starting again" in err
    run(tmp_path / "fed", *TWO, *BARE, *hungry, "+model.room=100")
    hungry_lines, fed_lines = metrics_of(tmp_path / "hungry"), metrics_of(tmp_path / "fed")
    for line, expected in zip(hungry_lines, fed_lines, strict=True):
        assert line == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.slow
def test_a_run_of_one_process_starts_again_as_often_as_it_may(tmp_path: Path) -> None:
    hopeless = ("optimizer.lr=1e30", "optimizer=sgd", "trainer.max_skipped_steps=1")
    err = run(tmp_path / "hopeless", *TINY, *hopeless, "trainer.max_restarts=1", code=1)
    assert err.count("Starting again") == 1 and "failed: rank 0: FloatingPointError" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_leaves_the_others_alone(tmp_path: Path) -> None:
    lrs = ("-m", "optimizer.lr=1e30,0.1", "optimizer=sgd", "trainer.max_skipped_steps=1")
    process = forked.popen(
        [sys.executable, str(TRAIN), *TINY, *lrs, "hydra.sweep.dir=sweep"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    _, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    states = [read_json(tmp_path / "sweep" / job / "status.json")["state"] for job in "01"]
    assert states == ["failed", "completed"] and "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("trainer.devices=0",), "trainer.devices=0"),
        (("trainer=ddp", "trainer.device=cpu"), "trainer.devices=2"),
        (("trainer.devices=2", "trainer.device=mps"), "trainer.devices=1"),
    ],
)
def test_a_wrong_number_of_devices_is_one_line(
    overrides: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    err = run(tmp_path / "wrong", *TINY[:-1], *overrides, code=2)
    assert len(err.splitlines()) == 1 and says in err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_bad_data_is_one_line_from_several_processes(tmp_path: Path) -> None:
    missing = ("data=csv", f"data.source.train_file={tmp_path}/none.csv", "data.num_classes=2",
               "data.source.target_columns=[a]", "data.target_kind=multiclass",
               "data.num_outputs=2", "data.input_shape=[1]")  # fmt: skip
    err = run(tmp_path / "bad", "trainer.devices=2", "trainer.device=cpu", *missing, code=2)
    assert len(err.splitlines()) == 1 and err.startswith("error: ") and "none.csv" in err
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_two_jobs_on_one_machine_do_not_meet(tmp_path: Path) -> None:
    processes = [start(tmp_path / name, *TWO) for name in ("a", "b")]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_the_ranks_end_with_a_killed_parent(tmp_path: Path) -> None:
    folder = tmp_path / "orphan"
    process = start(folder, *LONG)
    until((folder / "checkpoints" / "last").exists, process)
    assert listening(process.pid) == {"0100007F"}  # 127.0.0.1: no other machine may join
    pids = ranks_of(folder)
    assert {address for pid in pids for address in listening(pid)} == {"0100007F"}
    process.kill()
    process.communicate(timeout=30)
    until_gone(pids)


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def listening(pid: int) -> set[str]:
    """Return the addresses that a process listens on, as the kernel writes them."""
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the process closes files meanwhile
            links.add(str(link.readlink()))
    lines = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {f[1].split(":")[0] for f in lines if f[3] == "0A" and f"socket:[{f[9]}]" in links}


def test_json_carries_a_job_whole() -> None:
    from regrow.config.job import Job

    job = Job({"a": [1, None, 0.1]}, None, ["a=1"], {"model": "mlp"}, {"x.yaml": "é"}, ["p"])
    assert Job(**json.loads(job.to_json())) == job
