"""Processes that torchrun or srun started: read their ranks and join them into one run."""

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
from regrow.record.records import write_text

T = TypeVar("T")
PATIENCE = 300.0  # seconds that the other ranks wait for rank 0
TELL_SECONDS = 5.0  # a longer wait is announced in one line
OF_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE")
ALONE = "To run in one process, unset RANK and WORLD_SIZE."


def started_from_outside() -> bool:
    """Return True if torchrun or srun started this process as one of several."""
    several = number_of("WORLD_SIZE", 1) > 1 and "RANK" in os.environ
    return several and "REGROW_PARENT" not in os.environ


def number_of(name: str, default: int) -> int:
    """Return an environment variable as a number. Raises UserError."""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{name}={text} in the environment is not a number. {ALONE}")
    return int(text)


def check_environment() -> None:
    """Raise UserError if the variables for rank, world size and rendezvous contradict."""
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
    """Return True if an interactive shell started this process, as in `srun --pty bash`.

    Such a shell starts each command on its terminal, in a separate process group. A task of srun
    has no terminal; with --pty the first task has one, as session leader.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return os.getpgrp() != os.getsid(0)


def srun_environment() -> dict[str, str]:
    """Return torchrun's variables for one of several processes that srun started; else nothing.

    Raises UserError if srun's variables are incomplete. See "OUTPUT ENVIRONMENT VARIABLES" in
    srun's manual.
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
    """Parse Slurm's notation for one number per node: "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, times = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups()  # type: ignore[union-attr]
        counts += [int(count)] * int(times or 1)
    return counts


def meeting_file() -> Path:
    """Return the file in which srun's rank 0 writes the address of the rendezvous.

    All ranks have the same current folder, on a shared file system.
    """
    said = os.environ
    restart = said.get("SLURM_RESTART_COUNT", "0")
    return Path(f".meeting-{said['SLURM_JOB_ID']}.{said['SLURM_STEP_ID']}.{restart}")


def meeting_place() -> tuple[str, int] | None:
    """Return the host and port in the meeting file, or None while it does not exist.

    Raises UserError if another user may have written it: this process connects to that address.
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
    """Return the store that all ranks share and rank 0 hosts.

    Its address is MASTER_ADDR, as for torchrun's env://, or for srun is in a file. Raises UserError
    if it does not appear in time.
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
    """Host the store in this process: at MASTER_PORT, or at a free port written to the file."""
    if named is None:
        is_local, port = os.environ.get("SLURM_STEP_NUM_NODES") == "1", 0
    else:
        is_local, port = named in ("127.0.0.1", "::1", "localhost"), number_of("MASTER_PORT", 0)
    try:
        if named is not None and is_ipv6(named):
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
    store = host_store(listener)
    if named is None:
        host = "127.0.0.1" if is_local else socket.gethostname()
        write_text(meeting_file(), f"{host} {port}", private=True)
    return store


def is_ipv6(host: str) -> bool:
    """Return True if a host resolves to IPv6 addresses only."""
    with contextlib.suppress(OSError):  # rank 0 may be unable to resolve its own name
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return all(family == socket.AF_INET6 for family, *_ in found)
    return False


def host_store(listener: socket.socket) -> Any:
    """Host a store in this process at the port of `listener`.

    Without a listener, torch would listen on every network.
    """
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
    """Announce this rank in the store. Raises UserError if the rank is announced already."""
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if store.add(f"ranks/{rank}", 1) > 1:
        raise UserError(f"RANK={rank}: two processes say that they are this one. {ALONE}")
    store.set(f"here/{rank}", size)


def wait_for_all(store: Any, seconds: float) -> None:
    """As rank 0, wait for the other ranks. Raises UserError, also for another world size."""
    wait_for_others(store, "here", seconds)
    for rank in range(int(os.environ["WORLD_SIZE"])):
        check_size(store, rank)


def wait_for_others(store: Any, what: str, seconds: float) -> None:
    """As rank 0, wait until the others have written `what`. Prints which are missing.

    Raises UserError after `seconds`.
    """
    wait_until(
        lambda: not absent(store, what), lambda: others_in_words(absent(store, what)), seconds
    )


def check_size(store: Any, rank: int) -> None:
    """Raise UserError if `rank` has a different world size."""
    size, other = os.environ["WORLD_SIZE"], store.get(f"here/{rank}").decode()
    if other != size:
        raise UserError(
            f"WORLD_SIZE={size} here, and {other} in rank {rank}. Give all the same. {ALONE}"
        )


def absent(store: Any, what: str) -> list[int]:
    """Return the ranks that have not written `what` into the store."""
    size = int(os.environ["WORLD_SIZE"])
    return [rank for rank in range(1, size) if not store.check([f"{what}/{rank}"])]


def others_in_words(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    by_srun = "SLURM_STEP_ID" in os.environ and "MASTER_ADDR" not in os.environ
    said = "SLURM_STEP_NUM_TASKS" if by_srun else "WORLD_SIZE"
    return f"rank{'s'[: len(ranks) > 1]} {shown} of {said}={os.environ['WORLD_SIZE']}"


def wait_until(happened: Callable[[], T | None], what: Callable[[], str], seconds: float) -> T:
    """Wait until `happened` returns a true value, and return it.

    After TELL_SECONDS prints `what` it waits for. Raises UserError after `seconds`.
    """
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
    """Return the advice how to run in one process, for srun or for variables."""
    by_srun = "SLURM_STEP_ID" in os.environ and "MASTER_ADDR" not in os.environ
    return "To run in one process, use srun --ntasks=1." if by_srun else ALONE


def have_met() -> None:
    """Remove the meeting file of srun's processes, if there is one."""
    if "MASTER_ADDR" not in os.environ and "SLURM_JOB_ID" in os.environ:
        meeting_file().unlink(missing_ok=True)
