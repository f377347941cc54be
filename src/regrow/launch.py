"""Turn Hydra's job into a run in its folder, and handle its output, log lines and exit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from regrow import config as configs
from regrow import flags, monitor, outside, ownership, ranks, registered, resume
from regrow import run as runs
from regrow.check import check
from regrow.command_line import command
from regrow.composed import as_recorded, job_of
from regrow.console import console, log_file
from regrow.errors import SlicesTooLarge, UserError, in_a_line, machine_fault
from regrow.job import Job
from regrow.load import preprocessing_record
from regrow.record import folder as records
from regrow.record import manifest, names
from regrow.record.redact import redact, redact_all
from regrow.training import checkpoint, optim
from regrow.training.interrupt import StopRequest
from regrow.training.parallel import World, lost_the_others
from regrow.training.scheduler_adapter import SchedulerAdapter
from regrow.training.schedules import RunLength
from regrow.training.state import too_short_for_average

log = logging.getLogger("regrow")

ROOT = Path(__file__).resolve().parents[2]


def launch(cfg: DictConfig) -> float | None:
    """Run what `cfg` describes and return the best monitored value, for a sweeper.

    Exits with 2 for a user's error, with 1 if the run failed, and with 128 + signal if a signal
    stopped it.
    """
    try:
        return _launch(cfg)
    except UserError as error:
        leave_nothing(configs.output_dir())
        configs.fail(str(error))
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            raise
        leave_nothing(configs.output_dir())
        configs.fail(str(fault), code=1)


def _launch(cfg: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    check(cfg, hydra.runtime.choices)
    for override in configs.typed_overrides(hydra.overrides.task):
        if resume.key_of(override).split(".")[0] == "sweep":
            raise UserError(f"{override}: one run is no sweep. Add -m, or leave it out.")
    for override in configs.typed_overrides(hydra.overrides.hydra):
        if resume.key_of(override).startswith("hydra.sweep."):
            raise UserError(f"{override} is of a sweep. A run's folder is hydra.run.dir=….")
    folder = configs.output_dir() if configs.is_named("hydra.run.dir") else None
    job = job_of(cfg, folder, [Path(sys.executable).name, *sys.argv])
    if outside.started_from_outside():
        from regrow import worker

        worker.lead(job)
    with console():
        launcher = configs.plain(cfg)["launcher"]
        if "_target_" in launcher:
            given = configs.typed_overrides(HydraConfig.get().overrides.task)
            typed = [o for o in given if resume.is_of_the_launcher(o)]
            submit(job, launcher, typed)
            return None
        return run_all(job)


def run_all(job: Job) -> float | None:
    """Run the job in as many processes as it asks for: in this one if it asks for one."""
    trainer = job.config["trainer"]
    count = trainer["devices"] = ranks.count_of(trainer)
    if count > 1 or trainer["max_restarts"]:
        return ranks.run(job, count)
    return run_job(job, World(device=runs.resolve_device(trainer["device"])))


def submit(job: Job, launcher: Mapping[str, Any], typed: Sequence[str]) -> None:
    """Submit the job to Slurm with the options in `launcher`, and return.

    The printed command to resume repeats the overrides in `typed`, those of the launcher.
    """
    from regrow import slurm

    options: slurm.SlurmOptions = configs.instantiate(launcher)
    slurm.check(options, job.config["trainer"])
    folder = Path(job.folder or records.create(Path("outputs"), job.config["name"]))
    try:
        with claimed(folder, job) as goes_on:
            if goes_on and resume.is_done(folder, job.config):
                draw_missing(folder, job)
                say_complete(folder, job)
                return
            # If Slurm rejects the job, `claimed` removes the empty folder.
            number = slurm.submit(owned(dataclasses.replace(job, folder=str(folder))), options)
    except UserError:
        if job.folder is None:
            remove_empty_parents(folder)
        raise
    log.info("submitted to Slurm: job %s, to be stopped with scancel %s", number, number)
    log.info("folder: %s", folder)
    log.info("output: %s", folder / "slurm" / f"{number}_0_log.out")
    log.info("if interrupted, resume with: %s", again(job, folder, *typed))


def owned(job: Job) -> Job:
    """Return the job with its entry in the user's list of folders, which a node may not have."""
    try:
        entry = ownership.enter()
    except OSError as error:
        log.warning("this run is not entered as yours (%s)", ownership.reason_of(error))
        return job
    return dataclasses.replace(job, owner=ownership.owner_of_job(entry, as_recorded(job)))


def run_job(job: Job, world: World) -> float | None:
    """Run the job, or this rank's part of it, and return the best monitored value."""
    configs.allow(job.config)  # another process may have composed and checked it
    with contextlib.ExitStack() as stack:
        done, halvings = False, 0
        if job.folder is not None and world.is_main:
            folder = Path(job.folder)
            goes_on = stack.enter_context(claimed(folder, job))
            done = goes_on and resume.is_done(folder, job.config)
            # Set if the run ended because one of its ranks ran out of memory.
            halvings = (records.load_status(folder) or {}).get("halvings", 0)
            halvings = halvings if isinstance(halvings, int) else 0
        # Only the main process reads the folder: broadcast what it found to all ranks, and its
        # config, which may keep values of an older record.
        found = {"done": done, "halvings": halvings, "config": job.config}
        found = json.loads(world.from_main(json.dumps(found)))
        job.config.update(found["config"])
        if not found["done"]:
            return run_in(job, world, found["halvings"])
        if world.is_main:
            draw_missing(Path(str(job.folder)), job)
    return say_complete(Path(str(job.folder)), job)


def draw_missing(folder: Path, job: Job) -> None:
    """Draw the plots and the page of a complete run that was killed before it drew them."""
    if job.draws and not runs.is_drawn(folder):
        log.info("%s is complete but for its plots and its page, which are drawn now", folder)
        runs.draw(folder)


def say_complete(folder: Path, job: Job) -> float | None:
    """Log how to train longer, and return the best monitored value."""
    summary = records.load_summary(folder)
    log.info("%s is complete. To train longer, raise what ended it:", folder)
    log.info("  %s", longer(folder, job, summary))
    best: float | None = summary["best"]["value"]
    return best


@contextlib.contextmanager
def claimed(folder: Path, job: Job) -> Iterator[bool]:
    """Hold the lock of the run's folder inside, and yield True if the job resumes a run there.

    Raises UserError if the folder holds something else.
    """
    if (folder / resume.SWEEP).is_file():
        raise UserError(f"hydra.run.dir={folder} holds a sweep. Choose another folder.")
    names.refuse_foreign_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume.is_own(folder):
        records.refuse_links(folder, f"hydra.run.dir={folder}", way_out=resume.if_trusted(folder))
    with records.Lock(folder):
        try:
            yield resume.continues(folder, job.config, job.overrides)
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


def run_in(job: Job, world: World, halvings: int = 0) -> float | None:
    """Build the objects and train in the job's folder, or in a new one if it names none."""
    trainer = job.config["trainer"]
    trainer["num_threads"] = trainer["num_threads"] or runs.usable_cores()
    objects = runs.build(without_source(job, world), world)
    with contextlib.closing(objects.data):
        return run_objects(job, objects, world, halvings)


def without_source(job: Job, world: World) -> dict[str, Any]:
    """Return the config to build from, without `init_from` if the job's folder has a checkpoint.

    The checkpoint would replace those weights, and their source may be gone or have changed.
    """
    has_checkpoint = (
        job.folder is not None
        and world.is_main
        and checkpoint.outline(Path(job.folder) / "checkpoints") is not None
    )
    found: bool = json.loads(world.from_main(json.dumps(has_checkpoint)))
    return {**job.config, "init_from": None} if found else job.config


def run_objects(job: Job, objects: runs.Objects, world: World, halvings: int) -> float | None:
    """Train the built objects and write the run's record."""
    config, trainer = job.config, job.config["trainer"]
    trainer["monitor"], trainer["mode"] = objects.options.monitor, objects.options.mode
    objects.state.progress.halvings = halvings
    if trainer["check_first_batch"]:
        runs.check_first_batch(objects, world)
    trial = trial_of(job, objects, world)
    if job.folder is not None and world.is_main:
        outline = checkpoint.outline(Path(job.folder) / "checkpoints")
        if outline:
            objects.state.refuse_other(outline)
    world.barrier()  # a rank that fails before this line leaves no folder behind
    with contextlib.ExitStack() as stack:
        try:
            folder = open_folder(job, world, stack)
            is_new = all(path.name == names.LOCK for path in folder.iterdir())
            stack.enter_context(log_file(folder, world.rank))
            accepted = write_start(folder, job, objects) if world.is_main else {}
        except OSError as error:
            raise UserError(
                f"hydra.run.dir={job.folder or 'outputs'} cannot be written: "
                f"{error.strerror or error}. Make room there, or choose another folder."
            ) from error
        with StopRequest() as stop:  # install the handlers before the status says "running"
            pids = world.gather(os.getpid())
            if world.is_main:
                records.set_status(folder, "running", step=0, pids=pids)
                introduce(folder, job, objects, world)
                if is_new and (far := objects.data.far_targets()) is not None:
                    log.warning("%s", far)
            begun = False

            def begin() -> None:
                nonlocal begun
                begun = True
                records.link_latest(folder, Path("outputs", config["name"]))

            try:
                summary = runs.train(objects, config, folder, world, stop, trial, accepted, begin)
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
                fault = None if lost_the_others(raised) else machine_fault(raised)
                cause = fault or raised
                note_failure(cause, folder, job, objects.state.step, world)
                if world.store is None and is_plain(cause):
                    raise SystemExit(1) from cause
                if fault is None:
                    raise
                raise fault from raised
        number = max(world.gather(stop.signal or 0))  # any rank may have received the signal
        if world.is_main:
            records.set_status(folder, summary["status"], step=summary["steps"], pids=pids)
        if summary["status"] == "interrupted":
            name = signal.Signals(number).name
            if world.is_main:
                log.warning("stopped by %s at step %d. Resume with:", name, summary["steps"])
                log.warning("  %s", again(job, folder))
            world.barrier()
            raise SystemExit(128 + number)
        if world.is_main:
            warmup = warmup_of(config, objects)
            if objects.state.step < warmup and objects.state.step != objects.total_steps:
                log.warning(
                    "%s", in_warmup(objects.state.step, warmup)
                )  # max_seconds or early stopping ended it
            if job.draws:
                runs.draw(folder)  # the page shows the status, so write that first
            conclude(folder, job, summary)
        best: float | None = summary["best"]["value"]
        return best


def trial_of(job: Job, objects: runs.Objects, world: World) -> Any:
    """Return the reporter for the search that the job is a trial of, or None.

    Raises UserError if the search's metric is not measured.
    """
    if job.trial is None:
        return None
    from regrow.sweep.trial import Reporter

    reporter = Reporter(**job.trial)
    reporter.check(runs.measured_by(objects.task, world.device))
    return reporter


def open_folder(job: Job, world: World, stack: contextlib.ExitStack) -> Path:
    """Return the run's folder, in every rank. A new one is created, and locked by `stack`."""
    name = job.folder or ""
    if job.folder is None and world.is_main:
        created = records.create(Path("outputs"), job.config["name"])
        stack.enter_context(records.Lock(created))
        name = str(created)
    name = world.from_main(name)
    if world.store is not None and world.is_main:
        world.store.set("folder", json.dumps(name))
    return Path(name)


def is_plain(error: BaseException) -> bool:
    """Return True if one line is enough: for bad numbers or a bad disk, not for a bug."""
    return isinstance(error, FloatingPointError | OSError) and hasattr(error, "step")


def note_failure(error: BaseException, folder: Path, job: Job, step: int, world: World) -> None:
    """Record and log why the run failed, once: the other ranks fail because this one does."""
    error.step = step  # type: ignore[attr-defined]  # for the process that reports the error
    if lost_the_others(error) or not world.is_first("to fail"):
        return
    line = f"{type(error).__name__}: {error}"
    halvings = {"halvings": error.halvings} if isinstance(error, SlicesTooLarge) else {}
    records.set_status(folder, "failed", step=step, pids=[os.getpid()], error=line, **halvings)
    if not isinstance(error, UserError):
        log.error("failed at step %d: %s", step, in_a_line(error))
        if isinstance(error, OSError):  # usually a disk problem that the user can fix
            log.error("Once that is fixed, resume with:")
            log.error("  %s", again(job, folder))
        logging.getLogger("regrow.file").error("%s", traceback.format_exc())


def write_start(folder: Path, job: Job, objects: runs.Objects) -> dict[str, Any]:
    """Write what reproduces the run: config, overrides, code, environment, data.

    Returns the splits with changed content that the user accepts. Raises UserError, before
    anything is written, if the data is not what the run was trained on.
    """
    data, accepted = objects.data.fingerprint(), {}
    if (folder / manifest.NAME).is_file():
        accepted = resume.refuse_other_data(folder, data, job.overrides)
    (folder / ".hydra").mkdir(exist_ok=True)
    if lacked := resume.lacked_keys(folder):  # the new config.yaml has them all
        records.write_json(folder / resume.LACKED, lacked)
    recorded = OmegaConf.create(redact_all(dict(job.config)))
    records.write_text(folder / "config.yaml", OmegaConf.to_yaml(recorded))
    ownership.enter_run(folder, as_recorded(job), job.owner)
    for name, content in job.composed.items():
        text = content if name == registered.NAME else redact(content)  # masked already
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
    flat = resume.differences({}, {k: v for k, v in config.items() if k not in resume.ELSEWHERE})
    return {key: value for key, (_, value) in flat.items() if key.split(".")[-1] == "seed"}


def introduce(folder: Path, job: Job, objects: runs.Objects, world: World) -> None:
    """Log what is about to run, and the command that resumes it."""
    options, state = objects.options, objects.state
    config = redact_all(dict(job.config))
    for line in config_tree(config, job.choices):
        log.info("%s", line)
    sizes = objects.data.num_examples
    log.info("data: %s", ", ".join(f"{count:,} {name}" for name, count in sizes.items()))
    for note in objects.data.notes:
        log.warning("%s", note)
    total = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in objects.parameters)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    log.info("model: %s with %s parameters%s", type(state.model).__name__, f"{total:,}", frozen)
    batch, slices = config["data"]["batch_size"], options.accumulation_steps
    each = -(-batch // (world.size * slices))
    log.info(
        "batch: %d = %d device%s × %d slice%s × %s%d",
        *(batch, world.size, "s"[: world.size > 1], slices, "s"[: slices > 1]),
        *("" if batch == world.size * slices * each else "at most ", each),
    )
    length = objects.total_steps
    steps = "until time is up" if length is None else f"{length:,} step{'s'[: length != 1]}"
    threads = config["trainer"]["num_threads"]
    chosen = " (trainer.device=auto)" if options.device == "auto" else ""
    log.info(
        "run: %s, %d per epoch, on %s%s in %s with %d thread%s",
        *(steps, state.steps_per_epoch, world.device, chosen, options.precision),
        *(threads, "s"[: threads > 1]),
    )
    if world.device.type != "cpu" and not optim.skips_on_device(state.optimizer, world.device):
        log.info("optimizer: it cannot skip a bad step on the device; each step waits for it once")
    if short := too_short_for_average(options, objects.total_steps):
        log.log(logging.INFO if options.ema_warmup else logging.WARNING, "%s", short)
    for line in what_is_odd(config, objects):
        log.warning("%s", line)
    if config["model"].get("pretrained") and config["data"]["normalize"] == "train":
        log.warning("the pretrained weights expect data.normalize=imagenet, and got train")
    if isinstance(state.schedule, SchedulerAdapter):
        log.info(
            "scheduler: %s is stepped once per %s (scheduler.interval)",
            *(state.schedule.name.rpartition(".")[2], state.schedule.interval),
        )
    log.info("folder: %s", folder)
    log.info("if interrupted, resume with: %s", again(job, folder))


def what_is_odd(config: Mapping[str, Any], objects: runs.Objects) -> list[str]:
    """Return one line for each setting that is probably a mistake."""
    options, lines = objects.options, []
    if options.monitor is None:
        lines.append("no metric is monitored: the last weights are the best ones")
    elif odd := monitor.contradiction(options.monitor, str(options.mode)):
        lines.append(f"trainer.mode={options.mode}: {odd}")
    batch, count = config["data"]["batch_size"], objects.train.num_examples
    if batch > count:
        lines.append(
            f"data.batch_size={batch} is more than the {count} training examples: each step is an "
            "epoch over all of them"
        )
    if objects.total_steps is not None and objects.total_steps < warmup_of(config, objects):
        lines.append(in_warmup(objects.total_steps, warmup_of(config, objects)))
    return lines


def warmup_of(config: Mapping[str, Any], objects: runs.Objects) -> int:
    """Return the steps of the schedule's warm-up; 0 if it has none under these keys."""
    length = RunLength(objects.total_steps, objects.state.steps_per_epoch)
    node = config["scheduler"]
    return length.warmup(node.get("warmup_steps"), node.get("warmup_fraction"))


def in_warmup(steps: int, warmup: int) -> str:
    return (
        f"the run ends at step {steps}, in the warm-up of {warmup} steps: the learning rate never "
        "comes to optimizer.lr. Lower scheduler.warmup_steps, or train for longer"
    )


def conclude(folder: Path, job: Job, summary: Mapping[str, Any]) -> None:
    """Log the results as a table, the folder, and commands that may come next."""
    rows = [(name, value) for name, value in summary["test"].items() if name.count("/") == 1]
    best = summary["best"]
    if best["value"] is not None:
        rows.insert(0, (f"best {best['metric']} (step {best['step']})", best["value"]))
    rows.append(("seconds of training", summary["seconds"]))
    width = max(len(name) for name, _ in rows)
    log.info("")
    for name, value in rows:
        log.info("  %s  %.5g", name.ljust(width), value)
    log.info("")
    log.info("record: %s", folder / "report.html" if job.draws else folder)
    log.info("next:   %s", longer(folder, job, summary))
    split = "test" if summary["test"] else "val" if summary["val"] else "train"
    log.info("        %s", command(f"run={folder}", f"split={split}", script="evaluate.py"))
    kept = [o for o in job.overrides if resume.key_of(o) not in ("seed", "resume")]
    log.info("        %s", command("-m", *flags.arguments_of(job.source), *kept, "seed=0,1,2"))


def config_tree(config: Mapping[str, Any], choices: Mapping[str, Any]) -> list[str]:
    """Return the config as a tree: a wrapped line for each group, without values that are off."""
    lines = []
    width = max(80, min(140, _terminal_width()))
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    for name, values in {"run": plain, **groups}.items():
        option = choices.get(name) or ""
        flat = resume.differences({}, values)
        words = [f"{k}={_short(new)}" for k, (_, new) in flat.items() if _is_shown(k, new)]
        if name == "logger":
            words = ["jsonl", *values]  # names only; config.yaml has the settings
        text = " ".join([str(option), *words]).strip()
        if not text:
            continue
        mark = "└─" if name == [*groups][-1] else "├─"
        first, rest = f"{mark} {name:<10} ", f"{'  ' if mark == '└─' else '│ '} {'':<10} "
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def longer(folder: Path, job: Job, summary: Mapping[str, Any]) -> str:
    """Return the command that trains a complete run for as long again."""
    limits = resume.reached(summary, job.config["trainer"])
    return again(job, folder, *(f"{key}={more}" for key, more in limits.items()))


def again(job: Job, folder: Path, *more: str) -> str:
    """Return the command that resumes the run in `folder`."""
    return command(*flags.arguments_of(job.source), f"resume={folder}", *more)


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def _is_shown(key: str, value: Any) -> bool:
    is_off = value is None or value is False or value in ("", [], {})
    is_off = is_off or (isinstance(value, float) and value == 0)
    return not is_off and key.split(".")[-1] not in ("_partial_", "_target_", "resume")


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).replace(" ", "")
    return text if len(text) <= 40 else f"{text[:37]}…"
