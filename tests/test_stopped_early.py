"""A signal before a run has its folder: one line, the exit code, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from waiting import until

from regrow.processes.signals import STOPPING, held
from regrow.project import ROOT

TRAIN = ROOT / "scripts" / "train.py"
RUN = ("hydra.run.dir=runs/one", "trainer.device=cpu", "trainer.num_threads=1")
TWO = ("trainer=ddp", "trainer.devices=2")
SAID = "stopped before the run began; no run folder was written\n"
SLOW_DATA = """
import pathlib, time

from regrow.record.output import whole_file


def splits(**options):
    with whole_file(pathlib.Path("kept.bin")):
        pathlib.Path("reached").touch()
        time.sleep(60)
"""

# Collects garbage for a minute where the run does so before it trains.
SLOW_GARBAGE = """
import gc, pathlib, time

from lab.data.datasets import synthetic


def splits(**options):
    collect = gc.collect

    def slowly():
        collect()
        pathlib.Path("reached").touch()
        time.sleep(60)

    gc.collect = slowly
    return synthetic(**options)
"""


def start(folder: Path, *arguments: str, by: Any = forked.popen, **more: str) -> Any:
    return by(
        [sys.executable, str(TRAIN), *RUN, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": forked.python_path(folder), **more},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def imports_torch(pid: int) -> bool:
    try:
        return "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def stopped(process: Any, number: signal.Signals) -> str:
    """Send the signal to all processes of a command, and return what it wrote to stderr."""
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    return str(errors)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
both = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)


@linux
@both
def test_a_signal_while_torch_is_imported_leaves_a_line_and_nothing_else(
    number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, by=subprocess.Popen)
    until(lambda: imports_torch(process.pid))
    assert stopped(process, number) == SAID
    assert [*tmp_path.iterdir()] == []


@both
def test_a_signal_while_the_data_is_read_leaves_no_folder(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "slow_data.py").write_text(SLOW_DATA)
    process = start(tmp_path, "data.source._target_=slow_data.splits")
    until((tmp_path / "reached").exists)
    # The controls: both are removed again.
    assert (tmp_path / "runs" / "one" / ".lock").is_file() and [*tmp_path.glob(".kept.bin.*.tmp")]
    assert stopped(process, number) == SAID
    assert {path.name for path in tmp_path.iterdir()} <= {"slow_data.py", "reached", "__pycache__"}


@both
def test_a_signal_while_garbage_is_collected_leaves_no_folder(
    number: signal.Signals, tmp_path: Path
) -> None:
    """The last thing before a run handles signals itself takes a tenth of a second."""
    (tmp_path / "slow_data.py").write_text(SLOW_GARBAGE)
    process = start(tmp_path, "data=synthetic", "data.source._target_=slow_data.splits")
    until((tmp_path / "reached").exists)
    assert (tmp_path / "runs" / "one" / ".lock").is_file()  # the control
    assert stopped(process, number) == SAID
    assert {path.name for path in tmp_path.iterdir()} <= {"slow_data.py", "reached", "__pycache__"}


def test_a_process_that_is_started_with_signals_held_gets_none_before_it_asks() -> None:
    """Else the Python of a rank that begins prints a traceback for Ctrl-C."""
    shown = "import signal; print(sum(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"

    def blocked() -> int:
        command = [sys.executable, "-I", "-c", shown]
        return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    assert blocked() == 0  # the control
    with held():
        assert blocked() == sum(STOPPING)
    assert blocked() == 0


@linux
@both
@pytest.mark.parametrize("reached", [lambda _: True, imports_torch], ids=["starts", "torch"])
@pytest.mark.slow
def test_a_signal_while_ranks_start_leaves_one_line(
    reached: Callable[[int], bool], number: signal.Signals, tmp_path: Path
) -> None:
    process = start(tmp_path, *TWO)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

    def is_time() -> bool:
        found = [int(pid) for pid in children.read_text().split()]
        return len(found) >= 2 and any(map(reached, found))

    until(is_time)
    assert stopped(process, number) == SAID
    assert [*tmp_path.iterdir()] == []


def of_rank(rank: int, starter: str, port: int) -> dict[str, str]:
    """Return the variables that torchrun or srun sets for one of two processes."""
    if starter == "torchrun":
        return {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            **{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
    return {
        **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1"},
        **{"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    }


def hosts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@both
@pytest.mark.parametrize("starter", ["torchrun", "srun"])
def test_a_signal_while_a_rank_started_outside_waits_for_another_leaves_one_line(
    starter: str, number: signal.Signals, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = start(tmp_path, "trainer=ddp", **of_rank(0, starter, port))
    met = tmp_path / ".meeting-7.0.0"
    until(met.exists if starter == "srun" else lambda: hosts(port))
    assert stopped(process, number) == SAID
    assert [*tmp_path.iterdir()] == []


@both
def test_a_signal_while_ranks_started_outside_read_data_leaves_one_line(
    number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "slow_data.py").write_text(SLOW_DATA)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    given = ("trainer=ddp", "data.source._target_=slow_data.splits")
    processes = [start(tmp_path, *given, **of_rank(rank, "torchrun", port)) for rank in range(2)]
    until((tmp_path / "reached").exists)
    assert (tmp_path / "runs" / "one" / ".lock").is_file()  # the control
    for process in processes:
        os.killpg(process.pid, number)
    said = [process.communicate(timeout=30)[1] for process in processes]
    assert processes[0].returncode == 128 + number and said[0] == SAID
    assert "Traceback" not in said[1]
    assert not (tmp_path / "runs").exists()
