"""Processes that torchrun or srun started: which of them this one is, and how they are one run."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from regrow.errors import UserError
from regrow.record.folder import write_text

T = TypeVar("T")
PATIENCE = 300.0  # seconds in which the first process must say where the others find it
TELL_SECONDS = 5.0  # a wait that is longer says what it waits for
OF_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
ALONE = "To run in one process, unset RANK and WORLD_SIZE."


def started_from_outside() -> bool:
    """Return True if torchrun or srun started this process as one of several."""
    several = number_of("WORLD_SIZE", 1) > 1 and "RANK" in os.environ
    return several and "REGROW_PARENT" not in os.environ


def number_of(name: str, default: int) -> int:
    """The environment's variable as a number. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{name}={text} in the environment is not a number. {ALONE}")
    return int(text)


def check_environment() -> None:
    """Raise UserError where the variables that make this process one of several contradict."""
    rank, size = number_of("RANK", 0), number_of("WORLD_SIZE", 1)
    local, here = number_of("LOCAL_RANK", 0), number_of("LOCAL_WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"RANK={rank} with WORLD_SIZE={size}: ranks count from 0. {ALONE}")
    if here > size or local >= max(here, 1 + local * ("LOCAL_WORLD_SIZE" not in os.environ)):
        raise UserError(
            f"LOCAL_RANK={local}, LOCAL_WORLD_SIZE={here} and WORLD_SIZE={size} contradict each "
            f"other. Start with torchrun or srun, which set them. {ALONE}"
        )
    if "MASTER_ADDR" not in os.environ:
        if "SLURM_STEP_ID" not in os.environ:
            raise UserError(
                f"RANK={rank} and WORLD_SIZE={size} are set, but MASTER_ADDR is not: nothing says "
                f"where the {size} processes meet. Start them with torchrun. {ALONE}"
            )
        if os.environ.get("SLURM_PROCID") != os.environ["RANK"]:
            raise UserError(
                f"RANK={rank} is set, and Slurm says SLURM_PROCID="
                f"{os.environ.get('SLURM_PROCID')}. Unset RANK and WORLD_SIZE: srun's are enough."
            )
    elif os.environ["MASTER_ADDR"].startswith("["):
        address = os.environ["MASTER_ADDR"]
        raise UserError(
            f"MASTER_ADDR={address}: give the address without brackets: {address.strip('[]')}"
        )
    elif not 0 < number_of("MASTER_PORT", 0) < 1 << 16:
        raise UserError(
            f"MASTER_PORT={os.environ.get('MASTER_PORT', '')}: with MASTER_ADDR="
            f"{os.environ['MASTER_ADDR']} it must be a port, from 1 to 65535. {ALONE}"
        )


def is_in_a_shell() -> bool:
    """Return True if a person's shell started this process, in a step such as `srun --pty bash`.

    Such a shell starts each command in a process group of its own, on its terminal. A task of srun
    has no terminal; with --pty the first has one, as the leader of its session.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return os.getpgrp() != os.getsid(0)


def srun_environment() -> dict[str, str]:
    """What torchrun would say of one of several processes that srun started; else nothing.

    See "OUTPUT ENVIRONMENT VARIABLES" in srun's manual.
    """
    said = os.environ
    if "RANK" in said or number_of("SLURM_STEP_NUM_TASKS", 1) == 1 or is_in_a_shell():
        return {}
    absent = [name for name in OF_SRUN if name not in said]
    if absent:
        raise UserError(
            f"SLURM_STEP_NUM_TASKS={said['SLURM_STEP_NUM_TASKS']} is set, but {', '.join(absent)} "
            "not. Start the processes with srun, or unset SLURM_STEP_NUM_TASKS."
        )
    node = int(said["SLURM_NODEID"])
    return {
        "RANK": said["SLURM_PROCID"],
        "WORLD_SIZE": said["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": said["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node(said["SLURM_STEP_TASKS_PER_NODE"])[node]),
    }


def per_node(text: str) -> list[int]:
    """Slurm's way to write one number for each node: "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
        counts += [int(count)] * int(times or 1)
    return counts


def meeting_file() -> Path:
    """Where srun's first process writes at which address it waits for the others.

    All are in the same folder, of a file system that they share.
    """
    said = os.environ
    restart = said.get("SLURM_RESTART_COUNT", "0")
    return Path(f".meeting-{said['SLURM_JOB_ID']}.{said['SLURM_STEP_ID']}.{restart}")


def meeting_place() -> tuple[str, int] | None:
    """The host and port in the meeting file, or None while it is not there.

    Raises UserError for a file that another user may have written: it says whom to connect to.
    """
    file = meeting_file()
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}. Remove it.") from None
    with open(descriptor, encoding="utf-8") as text:  # noqa: PTH123
        status = os.fstat(descriptor)
        is_file = stat.S_ISREG(status.st_mode) and not stat.S_IMODE(status.st_mode) & 0o077
        if not is_file or status.st_uid != os.geteuid():
            raise UserError(
                f"{file} says where the processes meet, and others may have written it. Remove it."
            )
        host, port = text.read().split()
    return host, int(port)


def meet() -> Any:
    """The store that the processes share, which the first one holds.

    With MASTER_ADDR it is there, as for torchrun's env://; srun's processes find it by a file.
    Raises UserError if it is not there in time.
    """
    import torch.distributed as dist

    named = os.environ.get("MASTER_ADDR")
    if os.environ["RANK"] == "0":
        return hold_store(named)
    if named is not None:
        host, port = named, number_of("MASTER_PORT", 0)
    else:
        host, port = wait_until(
            meeting_place, lambda: f"the first process, which writes {meeting_file()}", PATIENCE
        )
    last: list[OSError] = []

    def answers() -> bool:
        try:
            socket.create_connection((host, port), timeout=TELL_SECONDS).close()
        except OSError as error:
            last[:] = [error]
            return False
        return True

    wait_until(
        answers,
        lambda: f"the first process, at {host}, port {port} ({last[0].strerror or last[0]})",
        PATIENCE,
    )
    return dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]


def hold_store(named: str | None) -> Any:
    """The store, in this process: at the port that was named, or a free one that a file names."""
    is_local = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    is_local = named in ("127.0.0.1", "::1", "localhost") if named is not None else is_local
    port = number_of("MASTER_PORT", 0) if named is not None else 0
    try:
        if is_ipv6(named):
            listener = socket.create_server(
                ("::1" if is_local else "", port),
                family=socket.AF_INET6,
                dualstack_ipv6=not is_local and socket.has_dualstack_ipv6(),
            )
        else:
            listener = socket.create_server(("127.0.0.1" if is_local else "", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT={port} is in use on this machine: by another run, or by another "
                "process with RANK=0. Choose another port."
            ) from None
        said = f"MASTER_PORT={port}" if named is None else f"MASTER_ADDR={named}, port {port}"
        raise UserError(f"{said}: {error.strerror or error}.") from None
    port = listener.getsockname()[1]
    store = store_of(listener)
    if named is None:
        host = "127.0.0.1" if is_local else socket.gethostname()
        write_text(meeting_file(), f"{host} {port}", private=True)
    return store


def is_ipv6(host: str | None) -> bool:
    """Return True if a host is found at addresses of IPv6 alone."""
    if host is None:
        return False
    with contextlib.suppress(OSError):  # the first process need not find itself by name
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(family == socket.AF_INET6 for family, *_ in found)
    return False


def store_of(listener: socket.socket) -> Any:
    """A store in this process, at the port of `listener`. Left to itself, torch would listen to
    every network."""
    import torch.distributed as dist

    address, port = listener.getsockname()[:2]
    return dist.TCPStore(  # type: ignore[attr-defined]
        "::1" if address in ("::", "::1") else "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def arrive(store: Any) -> None:
    """Tell the others that this process is there. Raises UserError if it is there already."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if store.add(f"ranks/{rank}", 1) > 1:
        raise UserError(f"RANK={rank}: two processes say that they are this one. {ALONE}")
    store.set(f"here/{rank}", size)


def wait_for_all(store: Any, seconds: float) -> None:
    """As the first process, wait for the others, and say for which. Raises UserError."""
    size = os.environ["WORLD_SIZE"]
    wait_until(
        lambda: not absent(store, "here"), lambda: others_in_words(absent(store, "here")), seconds
    )
    for rank in range(int(size)):
        check_size(store, rank)


def check_size(store: Any, rank: int) -> None:
    """Raise UserError where another process counts another number of them."""
    size, other = os.environ["WORLD_SIZE"], store.get(f"here/{rank}").decode()
    if other != size:
        raise UserError(
            f"WORLD_SIZE={size} here, and {other} in rank {rank}. Give all the same. {ALONE}"
        )


def absent(store: Any, what: str) -> list[int]:
    """The ranks that have not written `what` into the store."""
    size = int(os.environ["WORLD_SIZE"])
    return [rank for rank in range(1, size) if not store.check([f"{what}/{rank}"])]


def others_in_words(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    by_srun = "SLURM_STEP_ID" in os.environ and "MASTER_ADDR" not in os.environ
    said = "SLURM_STEP_NUM_TASKS" if by_srun else "WORLD_SIZE"
    return f"rank{'s'[: len(ranks) > 1]} {shown} of {said}={os.environ['WORLD_SIZE']}"


def wait_until(happened: Callable[[], T | None], what: Callable[[], str], seconds: float) -> T:
    """Wait until `happened` gives something true, and return that. Says for `what` it waits once it
    takes a while. Raises UserError."""
    started, told = time.monotonic(), False
    while not (found := happened()):
        waited = time.monotonic() - started
        rank = os.environ["RANK"]
        if waited > seconds:
            raise UserError(
                f"rank {rank} waited {seconds:g} seconds for {what()}. Start all the processes: "
                f"torchrun and srun do. {alone()}"
            )
        if waited > TELL_SECONDS and not told:
            told = True
            print(f"rank {rank}: waiting for {what()}. {alone()}", file=sys.stderr, flush=True)
        time.sleep(0.1)
    return found


def alone() -> str:
    """How to run in one process, by what makes this process one of several."""
    by_srun = "SLURM_STEP_ID" in os.environ and "MASTER_ADDR" not in os.environ
    return "To run in one process, use srun --ntasks=1." if by_srun else ALONE


def have_met() -> None:
    """Remove the file by which srun's processes have met, if they did."""
    if "MASTER_ADDR" not in os.environ and "SLURM_JOB_ID" in os.environ:
        meeting_file().unlink(missing_ok=True)
