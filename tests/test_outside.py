"""Processes started by something else: contradictions are named, and no wait is silent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from running import TINY
from waiting import until

from regrow.errors import UserError
from regrow.processes import outside
from regrow.processes.signals import NOTHING
from regrow.project import CONF

TRAIN = CONF.parent / "scripts" / "train.py"


@pytest.fixture
def in_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The rendezvous file of a step of srun, not written yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    return outside.meeting_file()


def test_processes_meet_where_this_user_says(
    in_a_step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "1")
    assert outside.meeting_place() is None
    store = outside.hold_store(None)
    place = outside.meeting_place()
    assert place is not None and place[0] == "127.0.0.1"
    socket.create_connection(place, timeout=10).close()
    del store
    assert in_a_step.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("how", ["writable", "readable", "link", "pipe", "another's"])
def test_processes_do_not_meet_where_somebody_else_says(
    how: str, in_a_step: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = in_a_step.with_name("elsewhere")
    content.write_text("example.org 80")
    content.chmod({"writable": 0o620, "readable": 0o604}.get(how, 0o600))
    if how == "link":
        in_a_step.symlink_to(content)
    elif how == "pipe":
        os.mkfifo(in_a_step, 0o600)
    else:
        content.rename(in_a_step)
    if how == "another's":
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(UserError, match=r"\.meeting-7\.0\.0.*Remove it"):
        outside.meeting_place()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 in the environment is not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 with WORLD_SIZE=2: ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not.*unset RANK and WORLD_SIZE"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            "MASTER_PORT=: with MASTER_ADDR=127.0.0.1 it must be a port",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "[::1]", "MASTER_PORT": "1"},
            r"MASTER_ADDR=\[::1\]: give the address without brackets: ::1$",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "h"},
            "LOCAL_WORLD_SIZE=4 and WORLD_SIZE=2 contradict",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            "LOCAL_RANK=1, LOCAL_WORLD_SIZE=1",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"},
            "RANK=0 is set, and Slurm says SLURM_PROCID=1",
        ),
    ],
)
def test_variables_that_contradict_are_one_line(
    variables: Mapping[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        assert outside.started_from_outside()
        outside.check_environment()


def test_good_variables_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
    for more in ({}, {"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}):
        for name, value in {**good, **more}.items():
            monkeypatch.setenv(name, value)
        outside.check_environment()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start(folder: Path, rank: int, *overrides: str, **environment: str) -> subprocess.Popen[str]:
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", **environment}
    command = [sys.executable, str(TRAIN), *TINY, "trainer=ddp", "trainer.device=cpu", *overrides]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_a_left_over_world_size_is_named_and_ends_in_time(tmp_path: Path) -> None:
    port = str(free_port())
    process = start(tmp_path, 0, "trainer.timeout_seconds=7", MASTER_PORT=port)
    said, errors = process.communicate(timeout=150)
    assert process.returncode == 2 and not said
    waits, error = errors.splitlines()
    assert waits.startswith("rank 0: waiting for rank 1 of WORLD_SIZE=2. To run in one process, un")
    assert error.startswith("error: rank 0 waited 7 seconds for rank 1 of WORLD_SIZE=2.")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.nightly)]
)
def test_a_signal_ends_the_wait_for_the_others(number: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path, 0, MASTER_PORT=str(free_port()))
    assert process.stderr is not None
    assert "waiting for rank 1" in process.stderr.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == f"{NOTHING}\n"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_a_port_that_is_in_use_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process = start(tmp_path, 0, MASTER_PORT=port)
        _, errors = process.communicate(timeout=150)
    assert process.returncode == 2
    assert errors.startswith(f"error: MASTER_PORT={port} is in use") and errors.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "size"), [pytest.param(0, "2", marks=pytest.mark.nightly), (1, "3")]
)
def test_two_that_disagree_both_end_with_a_line(second: int, size: str, tmp_path: Path) -> None:
    """Two first processes, or two sizes."""
    port = str(free_port())
    first = start(tmp_path, 0, "trainer.timeout_seconds=60", MASTER_PORT=port)
    with socket.socket() as probe:
        until(lambda: probe.connect_ex(("127.0.0.1", int(port))) == 0, 100)
    other = start(tmp_path, second, MASTER_PORT=port, WORLD_SIZE=size)
    if second == 0:
        assert "is in use" in other.communicate(timeout=150)[1]
        first.terminate()
    errors = first.communicate(timeout=150)[1]
    others = other.communicate(timeout=150)[1]
    assert other.returncode == 2 and "Traceback" not in errors + others
    if second:
        assert first.returncode == 2
        assert "error: WORLD_SIZE=2 here, and 3 in rank 1. Give all the same." in errors


@pytest.mark.slow
def test_a_first_process_that_cannot_be_reached_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outside, "TELL_SECONDS", 0.2)
    monkeypatch.setattr(outside, "PATIENCE", 1.0)
    port = free_port()
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    what = rf"the first process, at 127.0.0.1, port {port} \(Connection refused\)"
    with pytest.raises(UserError, match=f"rank 1 waited 1 seconds for {what}"):
        outside.meet()
    assert "rank 1: waiting for the first process, at 127.0.0.1" in capsys.readouterr().err


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


IPV6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        pytest.param("::1", marks=IPV6),
        pytest.param("0:0:0:0:0:0:0:1", marks=IPV6, id="as of another machine"),
    ],
)
def test_the_first_that_comes_late_is_met(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(free_port())}
    monkeypatch.setattr(outside, "PATIENCE", 20.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    held = []

    def late() -> None:
        threading.Event().wait(0.5)
        held.append(outside.hold_store(os.environ["MASTER_ADDR"]))

    thread = threading.Thread(target=late)
    thread.start()
    store = outside.meet()
    thread.join()
    outside.arrive(store)
    with pytest.raises(UserError, match="RANK=1: two processes say"):
        outside.arrive(store)
    held[0].set("here/0", "2")
    outside.wait_for_all(held[0], 5)
    assert outside.absent(held[0], "came") == [1]
    assert outside.others_in_words([*range(1, 12)]).startswith("ranks 1, 2, 3, 4, 5, 6, 7, 8, … of")
