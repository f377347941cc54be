"""Start the processes of a job, and watch them until the last one has ended.

PyTorch starts and ends them (torch.distributed.elastic.multiprocessing). This module sets their
environment and handles a failure. torchrun and srun do the same from outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regrow.config.job import Job
from regrow.dotted import Checked
from regrow.errors import MachineFault, UserError
from regrow.processes import begin, outside
from regrow.processes.signals import (
    STOPPING,
    before_the_run,
    handled,
    held,
    name_of,
    tell_of_nothing,
)
from regrow.record import records

log = logging.getLogger("regrow")

STOPPED = tuple(128 + number for number in STOPPING)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a start ended."""

    exit_code: int  # 0 if all processes exited with 0
    folder: str | None  # the run's, once it exists
    best: float | None
    error: dict[str, Any] | None  # reported by the first process that failed


def count_of(trainer: Checked) -> int:
    """Return the number of processes on this machine. Raises UserError for an impossible one."""
    import torch

    devices, device = trainer["devices"], trainer["device"]
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if devices == "auto":
        if gpus == 0:
            raise UserError(
                "trainer.devices=auto counts GPUs, and there is none to use here. "
                "Give the number of processes: trainer.devices=2."
            )
        return gpus
    is_mps = device == "mps" or (
        device == "auto" and not gpus and torch.backends.mps.is_available()
    )
    if devices > 1 and is_mps:
        raise UserError(f"trainer.devices={devices}: MPS takes one process. Use trainer.devices=1.")
    if gpus and devices > 1 and not torch.distributed.is_nccl_available():
        raise UserError(
            f"trainer.devices={devices}: this torch has no NCCL, through which GPUs exchange "
            "gradients. Use trainer.devices=1, or trainer.device=cpu."
        )
    if 0 < gpus < devices:
        raise UserError(
            f"trainer.devices={devices}: this machine has {gpus} GPU{'s'[: gpus > 1]}. "
            f"Use trainer.devices={gpus}, or trainer.device=cpu."
        )
    return int(devices)


def run(job: Job, count: int) -> float | None:
    """Run the job in `count` processes and return the best monitored value.

    If one dies, all end. They restart together from the last checkpoint, up to
    trainer.max_restarts times; and, with smaller micro-batches, after one ran out of memory.
    """
    restarts = job.config["trainer"]["max_restarts"]
    began = False
    while True:
        outcome = start(job, count)
        began = began or outcome.folder is not None
        if outcome.exit_code == 0:
            return outcome.best
        if outcome.exit_code in STOPPED:
            if not began:
                tell_of_nothing()
            raise SystemExit(outcome.exit_code)
        error = outcome.error or {"kind": "lost", "text": "no process said why", "step": 0}
        if error["kind"] == "not_reached":  # the least loss, by a run that is complete
            raise SystemExit(1)
        if error["kind"] == "user":
            raise UserError(error["text"])
        memory = error["kind"] == "memory"
        if outcome.folder is not None:
            said = {k: error[k] for k in ("num_micro_batches",) if memory}
            said |= {"step": error["step"], "error": error["text"]}
            records.set_status(Path(outcome.folder), "failed", pids=[], **said)
        if outcome.folder is None or not (memory or restarts):
            log.error("failed: %s", error["text"])
            raise SystemExit(1)
        restarts -= not memory
        log.warning("%s. Starting again from the last checkpoint.", error["text"])
        job = job.started_again().in_folder(outcome.folder)


def start(job: Job, count: int) -> Outcome:
    """Start all processes once and wait for their end."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = outside.host_store(listener)
    store = dist.PrefixStore("attempt_0", server)  # type: ignore[attr-defined]
    begin.built()  # before the handlers change: see `session.run_objects`
    before_the_run.end()
    forwarded = Forwarded()
    with handled(STOPPING, forwarded.note), private_folder() as private:
        path = Path(private, "job.json")  # private: the ranks execute it
        try:
            path.write_text(job.to_json(), encoding="utf-8")
            with held():
                context = start_processes(
                    name="train",
                    entrypoint=sys.executable,
                    args=dict.fromkeys(range(count), ("-u", "-P", "-m", "regrow.runs.child")),
                    envs={rank: environment(rank, count, port, path) for rank in range(count)},
                    logs_specs=DefaultLogsSpecs(log_dir=private),
                )
        except OSError as fault:
            raise no_temporary_files(fault) from fault
        try:
            forwarded.to(list(context.pids().values()))
            result = context.wait(period=0.05)
        finally:
            context.close(signal.SIGKILL)
    assert result is not None
    said = {name: read(store, name) for name in ("folder", "best", "error", "lost")}
    codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
    if forwarded.signals and codes:  # a starting rank may not exit cleanly
        return Outcome(128 + forwarded.signals[0], said["folder"], None, None)
    stopped = [code for code in codes.values() if code in STOPPED]
    error = said["error"]
    # Once one rank ends, PyTorch sends the others SIGTERM, also if they are about to end anyway.
    expected = {-signal.SIGTERM} if stopped else set()
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code not in expected}
    if error is None and killed:
        rank, number = next(iter(killed.items()))
        error = {"kind": "killed", "text": f"rank {rank} was killed by {name_of(number)}"}
        stopped = []
    error = error or said["lost"]
    if error is not None and "step" not in error:
        error["step"] = (said["lost"] or {}).get("step", 0)
    code = 0 if not codes else 1 if error is not None or not stopped else stopped[0]
    return Outcome(code, said["folder"], said["best"], error)


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """Yield a temporary folder that no other user can read. Raises MachineFault."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="regrow-")
    except OSError as error:
        raise no_temporary_files(error) from error
    with folder as name:
        yield name


def no_temporary_files(error: OSError) -> OSError:
    """Return a MachineFault if the temporary folder is full or read-only, else `error` itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return error
    return MachineFault(
        f"{tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder that has room."
    )


def environment(rank: int, count: int, port: int, job: Path) -> dict[str, str]:
    """Return a rank's environment, for torch's env:// rendezvous with the store at `port`."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "REGROW_PARENT": str(os.getpid()),
        "REGROW_WATCHED": "1",
        # By default gloo listens on the interface that the machine's name resolves to.
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        "REGROW_JOB": str(job),
        "PYTHONPATH": begin.python_path(),
    }


def read(store: Any, name: str) -> Any:
    return json.loads(store.get(name)) if store.check([name]) else None


@dataclasses.dataclass
class Forwarded:
    """The signals that this process has received and forwards to every rank, which handles them."""

    signals: list[int] = dataclasses.field(default_factory=list)
    pids: list[int] = dataclasses.field(default_factory=list)

    def note(self, number: int, frame: object = None) -> None:
        self.signals.append(number)
        self._send(number)

    def to(self, pids: list[int]) -> None:
        """Set the ranks' process ids and send them the signals received so far."""
        self.pids = pids
        for number in self.signals:
            self._send(number)

    def _send(self, number: int) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
