"""One rank of several, started by `ranks.start` or from outside.

It joins the rendezvous, receives the job, and runs its part. The first rank that fails reports it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from regrow.config.job import Job
from regrow.config.own_modules import import_own_modules
from regrow.distributed.parallel import World, lost_the_others
from regrow.errors import RunFailed, SlicesTooLarge, UserError, in_a_line, machine_fault
from regrow.failing import exit_code_of, in_one_line, show_traceback, tell
from regrow.processes import outside
from regrow.processes.signals import before_the_run, handled
from regrow.runs import machine
from regrow.runs.console import console
from regrow.runs.session import is_plain, leave_nothing, run_all, run_job

log = logging.getLogger("regrow")


def main() -> None:
    """Run this process's part of a job that another process composed."""
    before_the_run.end()
    with in_one_line():
        import_own_modules()  # ranks that torchrun or srun started need it too
        file = os.environ.get("REGROW_JOB")
        text = Path(file).read_text(encoding="utf-8") if file else ""
        if "RANK" not in os.environ:
            work_alone(text)
            sys.exit(0)
        store = meet()
        said = json.loads(text or job_from(store))
    if os.environ["RANK"] != "0":
        store.set(f"came/{os.environ['RANK']}", "")
    if isinstance(said, int):  # an exit code: there is no job
        leave(said)
    work(Job(**said), store)


def work_alone(text: str) -> None:
    """Run all of a job, as JSON, that another process composed."""
    import_own_modules()
    job = Job(**json.loads(text))
    try:
        with console():
            run_all(job)
    except UserError:
        if job.folder is not None:
            leave_nothing(Path(job.folder))
        raise


def meet() -> Any:
    """Return the store that all ranks share, by the environment variables of the launcher."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    else:
        store = outside.meet()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may keep its store
    store = dist.PrefixStore(f"attempt_{attempt}", store)  # type: ignore[attr-defined]
    if "REGROW_WATCHED" not in os.environ:
        outside.arrive(store)
    return store


def job_from(store: Any) -> str:
    """Return the job from rank 0, as JSON. Raises UserError if it does not arrive in time."""
    try:
        outside.wait_until(
            lambda: bool(store.check(["job"])),
            lambda: "the first process, which composes the config",
            outside.PATIENCE,
        )
        job = str(store.get("job").decode())
        outside.check_size(store, 0)
        return job
    except RuntimeError:
        raise UserError("the first process ended before it gave this one its job.") from None


def lead(job: Job) -> NoReturn:
    """As rank 0 of processes started from outside, send the job to the other ranks and run it.

    A signal still ends this process with one line, until the run has a folder. A signal to this
    process alone takes effect once the other ranks have answered it, or have ended.
    """
    before_the_run.undo(outside.have_met)
    trainer = job.config["trainer"]
    local = machine.processes_here()
    if trainer["devices"] not in ("auto", 1, local):
        raise UserError(
            f"trainer.devices={trainer['devices']}: {local} were started on this machine. "
            "Leave out trainer.devices, or give the same number to both."
        )
    store = meet()
    store.set("job", job.to_json())
    try:
        outside.wait_for_all(store, trainer["timeout_seconds"])
    except UserError as error:  # the other ranks end when the store does
        tell(str(error))
        outside.have_met()
        if job.folder is not None:
            leave_nothing(Path(job.folder))
        leave(2)
    work(job, store)


def dismiss(code: int) -> NoReturn:
    """As rank 0 of processes started from outside, end all ranks, as there is no job."""
    try:
        store = meet()
    except UserError:  # `lead` may have reported it
        leave(code)
    store.set("job", json.dumps(code))
    wait_for_others(store)
    leave(code)


def wait_for_others(store: Any) -> None:
    """Wait up to 60 seconds until all ranks have read the job from this process's store."""
    try:
        outside.wait_for_others(store, "came", 60)
    except (UserError, KeyboardInterrupt):
        pass  # the error was reported before
    finally:
        outside.have_met()


def work(job: Job, store: Any) -> NoReturn:
    """Run this process's part of the job, and exit."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shown = console() if rank == 0 else contextlib.nullcontext()
    numbers = [] if before_the_run.is_active else [signal.SIGINT]
    try:
        with handled(numbers, signal.default_int_handler), shown:
            run_part(job, store, rank, size)
        code = 0
    except SystemExit as end:
        code = exit_code_of(end)
    except KeyboardInterrupt:  # before the run handles signals
        code = 128 + signal.SIGINT
    except BaseException as raised:
        error, step = raised, None
        if isinstance(raised, RunFailed):
            error, step = raised.error, raised.step
        report(error, step, store, rank)
        code = 2 if isinstance(error, UserError) else 1
        if rank == 0 and job.folder is not None:
            leave_nothing(Path(job.folder))
        if rank == 0 and "REGROW_WATCHED" not in os.environ:
            with contextlib.suppress(RuntimeError):  # torchrun hosts the store and may have ended
                wait_for_others(store)
    leave(code)


def run_part(job: Job, store: Any, rank: int, size: int) -> None:
    """Join the process group and run this rank's part of the job."""
    trainer = job.config["trainer"]
    alone = "SLURM_STEP_ID" in os.environ and torch.cuda.device_count() == 1  # bound by Slurm
    index = 0 if alone else int(os.environ.get("LOCAL_RANK", rank))
    device = machine.resolve_device(trainer["device"], index)
    world = World(device=device, rank=rank, size=size, store=store)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL uses the current one
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=trainer["timeout_seconds"]),
    )
    if world.is_main:
        outside.have_met()
    if trainer["strategy"] == "fsdp" and size > 1:
        world = dataclasses.replace(world, mesh=init_device_mesh(device.type, (size,)))
    best = run_job(job, world)
    if world.is_main:
        store.set("best", json.dumps(best))
    world.barrier()


def report(error: BaseException, step: int | None, store: Any, rank: int) -> None:
    """Report what ended this process, unless it ended because another rank failed.

    If the run failed at a `step`, it has logged the error.
    """
    name = "" if machine_fault(error) else f"{type(error).__name__}: "
    text = f"rank {rank}: {name}{in_a_line(error)}"
    said: dict[str, Any] = {"kind": "failure", "text": text, "step": step or 0}
    if isinstance(error, UserError):
        said |= {"kind": "user", "text": str(error)}
    elif isinstance(error, SlicesTooLarge):
        said |= {"kind": "memory", "num_micro_batches": error.num_micro_batches}
    try:
        if lost_the_others(error):
            store.set("lost", json.dumps(said))
            return
        if store.add("failures", 1) > 1:
            return
        store.set("error", json.dumps(said))
    except RuntimeError:  # the store is gone, and so are its readers
        if lost_the_others(error) or (said["kind"] == "user" and rank > 0):
            return  # rank 0, which hosted the store, has reported the same
    if said["kind"] == "user":
        show_traceback(error)
        if "REGROW_WATCHED" not in os.environ:  # else `ranks.run` prints it
            tell(str(error))
    elif fault := machine_fault(error):
        if step is None:
            tell(f"rank {rank}: {fault}")
    elif lost_the_others(error):
        tell(text)
    elif not isinstance(error, SlicesTooLarge) and (step is None or not is_plain(error)):
        traceback.print_exception(error)


def leave(code: int) -> NoReturn:
    """Exit at once, without cleanup: a process group's threads may hang or crash at exit."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
