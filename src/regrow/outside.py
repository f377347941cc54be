"""Processes that torchrun or srun started: which of them this one is, and how they are one run."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.record.folder import write_text

PATIENCE = 300.0  # seconds in which the first process has to say where the others find it


def started_from_outside() -> bool:
    """Whether torchrun or srun started this process as one of several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ
    return several and "REGROW_PARENT" not in os.environ


def srun_environment() -> dict[str, str]:
    """What torchrun would say of one of several processes that srun started; else nothing.

    See "OUTPUT ENVIRONMENT VARIABLES" in srun's manual.
    """
    said = os.environ
    if "RANK" in said or int(said.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return {}
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


def meet() -> Any:
    """The store that srun's processes share, at a free port of the first one.

    Raises UserError if that has not said in time where it is.
    """
    import torch.distributed as dist

    file = meeting_file()
    if os.environ["RANK"] == "0":
        is_local = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
        host = "127.0.0.1" if is_local else socket.gethostname()
        listener = socket.create_server((host if is_local else "", 0))
        port = listener.getsockname()[1]
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        write_text(file, f"{host} {port}")
        return store
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{file}: the first of {os.environ['WORLD_SIZE']} processes that srun started has "
                f"not written it in {PATIENCE:g} seconds. Start all of them in one folder that "
                "every node sees, or set MASTER_ADDR and MASTER_PORT."
            )
        time.sleep(0.1)
    host, port = file.read_text().split()
    return dist.TCPStore(host, int(port), is_master=False)  # type: ignore[attr-defined]


def have_met() -> None:
    """Remove the file by which srun's processes have met, if they did."""
    if "MASTER_ADDR" not in os.environ and "SLURM_JOB_ID" in os.environ:
        meeting_file().unlink(missing_ok=True)
