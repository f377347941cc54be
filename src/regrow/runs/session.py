"""A run in its folder: where it writes, and how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import shlex
import signal
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from regrow.checkpoint import writer
from regrow.config import changed_data, flags, foreign, registered, resumed_config
from regrow.config.job import Job, as_recorded
from regrow.config.origins import located_in
from regrow.config.recorded import ELSEWHERE
from regrow.config.targets import allow, note_typed
from regrow.config.yaml_files import redact_yaml
from regrow.distributed.parallel import World, lost_the_others
from regrow.dotted import leaves
from regrow.errors import (
    DataError,
    OwnCodeError,
    RunFailed,
    SlicesTooLarge,
    UserError,
    in_a_line,
    machine_fault,
)
from regrow.feeding.broken_images import BrokenImages
from regrow.processes import begin, ranks
from regrow.processes.interrupt import StopRequest
from regrow.processes.signals import before_the_run
from regrow.project import ROOT
from regrow.protocols import Objects
from regrow.record import manifest, names, ownership, records
from regrow.record.redact import redact_all
from regrow.runs import fault_checks, machine, training
from regrow.runs.banner import conclude, in_warmup, introduce, longer, resume_command
from regrow.runs.console import early_lines, log_file
from regrow.runs.first_steps import FirstSteps
from regrow.runs.loaded import preprocessing_record
from regrow.runs.other_code import naming_code

log = logging.getLogger("regrow")


def run_all(job: Job) -> float | None:
    """Run the job: in this process if it needs one and no restarts, else in child processes."""
    trainer = job.config["trainer"]
    try:
        count = ranks.count_of(trainer)
        if count > 1 or trainer["max_restarts"]:
            return ranks.run(job, count)
        return run_job(job, World(device=machine.resolve_device(trainer["device"])))
    except UserError as error:
        said = located_in(str(error), job.source or flags.DEFAULT, job.overrides)
        raise type(error)(said) from error.__cause__


def run_job(job: Job, world: World) -> float | None:
    """Run the job, or this rank's part of it, and return the best monitored value."""
    begin.imported()
    allow(job.config)  # another process may have composed and checked it
    note_typed(job.overrides)
    with contextlib.ExitStack() as stack:
        stack.enter_context(early_lines())
        job, found = settled(job, world, stack)
        allow(job.config)  # it may keep targets of the table for older runs
        if not found.done:
            return run_in(job, found, world)
        if found.has_changes:
            refuse_changes(job, world)
        before_the_run.end()
        if world.is_main:
            draw_missing(Path(str(job.folder)), job)
    return say_complete(Path(str(job.folder)), job, has_changes=found.has_changes)


@dataclasses.dataclass(frozen=True)
class FolderState:
    """The state of the job's folder before it runs."""

    done: bool = False  # the run is complete
    has_changes: bool = False  # and the job names other keys than those that would extend it
    has_checkpoint: bool = False
    num_micro_batches: int = 1  # the least, after a rank ran out of memory


def settled(job: Job, world: World, stack: contextlib.ExitStack) -> tuple[Job, FolderState]:
    """Return the final job and the state of its folder. `stack` takes the folder's lock.

    Fills in `trainer.devices`, `trainer.num_threads`, and the recorded values that a resume keeps.
    """
    threads = job.config["trainer"]["num_threads"]
    job, found = job.of_processes(machine.processes_here(), threads), FolderState()
    if job.folder is not None and world.is_main:
        folder = Path(job.folder)
        kept = stack.enter_context(claimed(folder, job))
        job = job.resuming(kept)
        least = (records.load_status(folder) or {}).get("num_micro_batches")
        done = kept is not None and resumed_config.is_done(folder, job.config)
        found = FolderState(
            done=done,
            has_changes=done and resumed_config.has_changes(folder, job.config),
            has_checkpoint=writer.outline(folder / "checkpoints") is not None,
            num_micro_batches=least if isinstance(least, int) else 1,
        )
    # The main process decides, and broadcasts the result.
    told = json.dumps([job.config, dataclasses.asdict(found)])
    config, fields = json.loads(world.from_main(told))
    threads = config["trainer"]["num_threads"] or machine.usable_cores()
    return job.settled(config, threads), FolderState(**fields)


def draw_missing(folder: Path, job: Job) -> None:
    """Draw the plots and the page of a complete run that was killed before it drew them."""
    if job.draws and not training.is_drawn(folder):
        log.info("%s is complete except for its plots and page, which are made now", folder)
        training.draw(folder)


def refuse_changes(job: Job, world: World) -> None:
    """Raise UserError if a complete run cannot be resumed with the job's changes: see `run_in`."""
    objects = training.build({**job.config, "init_from": None}, world, job.folder)
    with contextlib.closing(objects.data):
        if world.is_main:
            folder = Path(str(job.folder))
            refuse_other_state(objects, folder)
            if (folder / manifest.NAME).is_file():
                changed_data.refuse_other_data(folder, objects.data.fingerprint(), job.overrides)


def refuse_other_state(objects: Objects, folder: Path) -> None:
    """Raise UserError if the newest checkpoint in `folder` is of another model or has other parts.

    Says how to get the run's code back if it has changed.
    """
    with naming_code(folder):
        if outline := writer.outline(folder / "checkpoints"):
            objects.state.refuse_other(outline)


def say_complete(folder: Path, job: Job, *, has_changes: bool = False) -> float | None:
    """Log how to train longer, and return the best monitored value."""
    summary = records.load_summary(folder)
    so = ", so the changes have no effect" * has_changes
    log.info("%s is complete%s. To train longer, raise what ended it:", folder, so)
    log.info("  %s", longer(folder, job, summary))
    best: float | None = summary["best"]["value"]
    return best


@contextlib.contextmanager
def claimed(folder: Path, job: Job) -> Iterator[dict[str, Any] | None]:
    """Lock the run's folder. Yields the config to resume with, or None for a new run.

    Raises UserError if the folder holds a sweep or what is not a run's.
    """
    if (folder / ownership.SWEEP).is_file():
        raise UserError(f"hydra.run.dir={folder} holds a sweep. Choose another folder.")
    names.refuse_foreign_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not foreign.is_own(folder):
        records.refuse_links(folder, f"hydra.run.dir={folder}", way_out=foreign.if_trusted(folder))
    with records.Lock(folder):
        before_the_run.undo(functools.partial(records.remove_unused, folder))
        try:
            yield resumed_config.resumed(folder, job.config, job.overrides)
        finally:
            records.remove_unused(folder)


def leave_nothing(folder: Path) -> None:
    """Remove a run's own folder if nothing was written there and nobody holds its lock."""
    if folder.resolve() == Path.cwd() or not folder.is_dir():
        return
    if any(path.name != names.LOCK for path in folder.iterdir()):
        return
    with contextlib.suppress(OSError, UserError), records.Lock(folder):
        records.remove_unused(folder)


def remove_empty_parents(folder: Path) -> None:
    """Remove the parent folders that are empty."""
    for parent in folder.parents[:-1]:
        with contextlib.suppress(OSError):
            parent.rmdir()


def run_in(job: Job, found: FolderState, world: World) -> float | None:
    """Build the objects and train in the job's folder, or in a new one if it names none."""
    # A checkpoint holds the weights, and the source of `init_from` may be gone or have changed.
    init_from = None if found.has_checkpoint else job.config["init_from"]
    objects = training.build({**job.config, "init_from": init_from}, world, job.folder)
    with contextlib.closing(objects.data):
        return run_objects(job, objects, world, found.num_micro_batches)


def run_objects(job: Job, objects: Objects, world: World, num_micro_batches: int) -> float | None:
    """Train the built objects and write the run's record."""
    job = job.monitoring(objects.options.monitor, objects.options.mode)
    config = job.config
    objects.state.progress.num_micro_batches = num_micro_batches
    if config["trainer"]["check_first_batch"]:
        training.check_first_batch(objects, world)
    trial = trial_of(job, objects)
    if job.folder is not None and world.is_main:
        refuse_other_state(objects, Path(job.folder))
    world.barrier()  # a rank that fails before this line leaves no folder behind
    # First, because it takes a tenth of a second, in which a signal may come.
    begin.built()
    before_the_run.end()
    with contextlib.ExitStack() as stack:
        with StopRequest() as stop:  # install the handlers before there is a folder
            try:
                folder, is_new = open_folder(job, world, stack)
                stack.enter_context(log_file(folder, world.rank))
                accepted = write_start(folder, job, objects) if world.is_main else {}
            except OSError as error:
                raise UserError(
                    f"hydra.run.dir={job.folder or 'outputs'} cannot be written: "
                    f"{error.strerror or error}. Make room there, or choose another folder."
                ) from error
            pids = world.gather(os.getpid())
            if world.is_main:
                saved = writer.complete(folder / "checkpoints").values()
                step = max((each["step"] for each in saved), default=0)
                records.set_status(folder, "running", step=step, pids=pids)
                introduce(folder, job, objects, world)
                if is_new and (far := objects.data.far_targets()) is not None:
                    log.warning("%s", far)
            begun, runs = False, Path("outputs", config["name"])
            latest = records.linked_latest(runs)

            def note_begun() -> None:
                nonlocal begun
                begun = True
                records.link_latest(folder, runs)

            watch = None
            if config["trainer"].get("find_faults"):
                overfits = job.choices.get("debug") == "overfit"
                watch = FirstSteps(objects, world, overfits=overfits)
            try:
                summary = training.train(
                    objects, config, folder, world, stop, trial, accepted, note_begun, watch
                )
                if world.is_main:
                    manifest.note_packages(folder, ROOT)
            except BaseException as raised:
                if isinstance(raised, UserError) and world.is_main and is_new and not begun:
                    records.remove_start(folder)
                    if job.folder is None:
                        remove_empty_parents(folder)
                    raise
                if world.is_main:
                    manifest.note_packages(folder, ROOT)
                step = objects.state.step
                cause = cause_of(raised, folder, job, step)
                note_failure(cause, folder, job, step, world)
                if world.is_main and job.folder is None and step == 0:
                    with contextlib.suppress(OSError):
                        records.unlink_latest(folder, runs, latest)
                    if not isinstance(cause, OSError):  # which says how to resume
                        words = "no step was completed: %s holds a log, and nothing to resume"
                        log.info(words, folder)
                if world.store is not None and isinstance(cause, Exception):
                    raise RunFailed(cause, step) from raised
                if is_plain(cause):
                    raise SystemExit(1) from cause
                if cause is raised:
                    raise
                raise cause from raised
        number = max(world.gather(stop.signal or 0))  # any rank may have received the signal
        if world.is_main:
            records.set_status(folder, summary["status"], step=summary["steps"], pids=pids)
        if summary["status"] == "interrupted":
            name = signal.Signals(number).name
            if world.is_main:
                log.warning("stopped by %s at step %d. Resume with:", name, summary["steps"])
                log.warning("  %s", resume_command(job, folder))
            world.barrier()
            raise SystemExit(128 + number)
        if world.is_main:
            for line in shortcomings(job, objects):
                log.warning("%s", line)
            if job.draws:
                training.draw(folder)  # the page shows the status, so write that first
            conclude(folder, job, summary)
        if watch is not None:
            watch.report()
        best: float | None = summary["best"]["value"]
        return best


def shortcomings(job: Job, objects: Objects) -> Iterator[str]:
    """Yield the warnings of a run that was too short for its warm-up or its BatchNorm layers."""
    state, config, warmup = objects.state, job.config, objects.warmup_steps
    if state.step < warmup and state.step != objects.total_steps:  # else it was told at the start
        yield in_warmup(state.step, warmup)
    started = config["init_from"] or config["model"].get("pretrained")
    if not started and not job.choices.get("debug"):
        micro_batches = max(objects.options.accumulation_steps, state.progress.num_micro_batches)
        odd = fault_checks.unsettled_averages(state.evaluated, state.step, micro_batches)
        if odd is not None:
            yield odd


def cause_of(raised: BaseException, folder: Path, job: Job, step: int) -> BaseException:
    """Return what to record and report of the error that ended a run at `step`."""
    if not lost_the_others(raised) and (fault := machine_fault(raised)) is not None:
        return fault
    if isinstance(raised, SystemExit) and not raised.code:  # of the user's code
        return RuntimeError("sys.exit() ended the run before its last step")
    if isinstance(raised, DataError) and step > 0:
        return DataError(after_a_change(raised, job, folder))
    return raised


def after_a_change(error: DataError, job: Job, folder: Path) -> str:
    """Return the error of a run that has taken steps, and how to continue with repaired data."""
    accepted = f"{changed_data.CHANGED}=accept"
    if not isinstance(error, BrokenImages):
        command = resume_command(job, folder, accepted)
        return f"{error} If this changes the data, resume with: {command}"
    names = "" if error.leave_out else " The log names them."
    skip = f" with {shlex.quote(error.leave_out)}" if error.leave_out else f" without {error.them}"
    if error.is_cut:  # without the files, val and test are other ones
        return f"{error.what}. Fix {error.them}, or start a new run{skip}.{names}"
    more = (error.leave_out, accepted) if error.leave_out else (accepted,)
    command = resume_command(job, folder, *more)
    return (
        f"{error.what}. Fix or remove {error.them}.{names} Resume without {error.them}: {command}"
    )


def trial_of(job: Job, objects: Objects) -> Any:
    """Return the reporter of this trial to its search, or None without a search.

    Raises UserError if the search's metric is not measured.
    """
    if job.trial is None:
        return None
    from regrow.runs.trial import Reporter

    reporter = Reporter(**job.trial)
    reporter.check(objects.measured)
    return reporter


def open_folder(job: Job, world: World, stack: contextlib.ExitStack) -> tuple[Path, bool]:
    """Return the run's folder, and in the main process whether it is empty but for its lock.

    Creates a new folder, which `stack` locks, if the job names none.
    """
    name = job.folder or ""
    if job.folder is None and world.is_main:
        created = records.create(Path("outputs"), job.config["name"])
        stack.enter_context(records.Lock(created))
        name = str(created)
    # Before the other ranks open their log there.
    is_new = world.is_main and all(path.name == names.LOCK for path in Path(name).iterdir())
    name = world.from_main(name)
    if world.store is not None and world.is_main:
        world.store.set("folder", json.dumps(name))
    return Path(name), is_new


def is_plain(error: BaseException) -> bool:
    """Return True for errors that need no traceback: non-finite numbers, and the system's."""
    # Autograd has shown the traceback of the forward pass, which is the one that matters.
    return "returned nan values in" in str(error) or isinstance(error, FloatingPointError | OSError)


def note_failure(error: BaseException, folder: Path, job: Job, step: int, world: World) -> None:
    """Record and log why the run failed, in the first rank that fails alone."""
    if lost_the_others(error) or not world.claim_first("to fail"):
        return
    line = f"{type(error).__name__}: {error}"
    least = {}
    if isinstance(error, SlicesTooLarge):
        least = {"num_micro_batches": error.num_micro_batches}
    records.set_status(folder, "failed", step=step, pids=[os.getpid()], error=line, **least)
    if not isinstance(error, UserError):
        at = f"step {step}: "  # with which some errors begin
        log.error("failed at %s%s", at, in_a_line(error).removeprefix(at))
        if isinstance(error, OSError):  # usually a disk problem that the user can fix
            log.error("Once that is fixed, resume with:")
            log.error("  %s", resume_command(job, folder))
    if not isinstance(error, UserError) or isinstance(error, OwnCodeError):
        logging.getLogger("regrow.file").error("%s", traceback.format_exc())


def write_start(folder: Path, job: Job, objects: Objects) -> dict[str, Any]:
    """Write what reproduces the run: config, overrides, code, environment, data.

    Returns the splits with changed content that the user accepts. Raises UserError, before
    anything is written, if the data is not what the run was trained on.
    """
    data, accepted = objects.data.fingerprint(), {}
    if (folder / manifest.NAME).is_file():
        accepted = changed_data.refuse_other_data(folder, data, job.overrides)
    (folder / ".hydra").mkdir(exist_ok=True)
    if lacked := resumed_config.lacked_keys(folder):  # keep them: config.yaml is overwritten
        records.write_json(folder / resumed_config.LACKED, lacked)
    recorded = OmegaConf.create(redact_all(dict(job.config)))
    records.write_text(folder / "config.yaml", OmegaConf.to_yaml(recorded))
    ownership.enter_run(folder, as_recorded(job), job.owner)
    for name, content in job.composed.items():
        text = content if name == registered.NAME else redact_yaml(content)  # none left
        records.write_text(folder / ".hydra" / name, text)
    records.write_json(folder / "preprocessing.json", preprocessing_record(objects.data))
    if (folder / manifest.NAME).is_file() and (changes := manifest.code_changes(folder, ROOT)):
        log.warning("%s", changes)
    manifest.write(
        folder,
        command=job.command,
        root=ROOT,
        data=data,
        seeds=seeds_of(job.config),
        config=job.source,
        accepted=accepted,
    )
    return accepted


def seeds_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return every seed in the config by its dotted key, such as the seed of the split."""
    kept = {key: value for key, value in config.items() if key not in ELSEWHERE}
    flat = sorted(leaves(kept).items())
    return {key: value for key, value in flat if key.split(".")[-1] == "seed"}
