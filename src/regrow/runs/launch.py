"""From Hydra's job to a run, on this machine or on Slurm."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from regrow.config import resumed_config
from regrow.config.check import check_once
from regrow.config.command_line import key_of
from regrow.config.hydra_access import is_named, output_dir, plain, typed_overrides
from regrow.config.job import Job, as_recorded, job_of
from regrow.config.recorded import is_of_the_launcher
from regrow.config.started import is_check, remove_created
from regrow.config.targets import instantiate
from regrow.errors import UserError
from regrow.failing import in_one_line
from regrow.processes import outside
from regrow.processes.signals import before_the_run
from regrow.record import ownership, records
from regrow.runs.banner import resume_command
from regrow.runs.console import console
from regrow.runs.session import (
    claimed,
    draw_missing,
    leave_nothing,
    remove_empty_parents,
    run_all,
    say_complete,
)

log = logging.getLogger("regrow")


@in_one_line()
def launch(cfg: DictConfig) -> float | None:
    """Run what `cfg` describes and return the best monitored value, for a sweeper.

    Exits with 2 for a user's error, with 1 if the run failed, and with 128 + signal if a signal
    stopped it.
    """
    try:
        return _launch(cfg)
    except BaseException:  # including a signal to ranks that have no folder yet
        if not is_check():
            leave_nothing(output_dir())
        remove_created()
        raise


def _launch(cfg: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    check_once(cfg, hydra.runtime.choices)
    for override in typed_overrides(hydra.overrides.task):
        if key_of(override).split(".")[0] == "sweep":
            raise UserError(f"{override}: sweep keys only apply to sweeps. Add -m, or remove it.")
    for override in typed_overrides(hydra.overrides.hydra):
        if key_of(override).startswith("hydra.sweep."):
            raise UserError(f"{override} is for a sweep. A run's folder is hydra.run.dir=….")
    folder = output_dir() if is_named("hydra.run.dir") else None
    job = job_of(cfg, folder, [Path(sys.executable).name, *sys.argv])
    launcher = plain(cfg)["launcher"]
    if is_check():
        if outside.started_from_outside():
            raise UserError("--check is one process. Start it without torchrun or srun.")
        with console():
            from regrow.runs import preview

            if "_target_" in launcher:
                from regrow.processes import slurm

                slurm.check_request(instantiate(launcher), job.config["trainer"])
                if slurm.is_missing():
                    log.warning("there is no sbatch on this machine, so a start here would fail")
            preview.report(job)
            remove_created()
            return None
    if outside.started_from_outside():
        from regrow.runs import worker

        worker.lead(job)
    with console():
        if "_target_" in launcher:
            typed = typed_overrides(hydra.overrides.task)
            submit(job, launcher, [o for o in typed if is_of_the_launcher(o)])
            return None
        return run_all(job)


def submit(job: Job, launcher: Mapping[str, Any], typed: Sequence[str]) -> None:
    """Submit the job to Slurm with the options in `launcher`, and return.

    The printed command to resume repeats the overrides in `typed`, those of the launcher.
    """
    from regrow.processes import slurm

    before_the_run.end()  # the job may be submitted when a signal comes
    options: slurm.SlurmOptions = instantiate(launcher)
    slurm.check(options, job.config["trainer"])
    folder = Path(job.folder or records.create(Path("outputs"), job.config["name"]))
    try:
        with claimed(folder, job) as kept:
            job = job.resuming(kept)
            if kept is not None and resumed_config.is_done(folder, job.config):
                draw_missing(folder, job)
                say_complete(folder, job)
                return
            # If Slurm rejects the job, `claimed` removes the empty folder.
            number = slurm.submit(owned(job.in_folder(str(folder))), options)
    except UserError:
        if job.folder is None:
            remove_empty_parents(folder)
        raise
    log.info("submitted to Slurm: job %s, to be stopped with scancel %s", number, number)
    log.info("folder: %s", folder)
    log.info("output: %s", folder / "slurm" / f"{number}_0_log.out")
    log.info("if interrupted, resume with: %s", resume_command(job, folder, *typed))


def owned(job: Job) -> Job:
    """Return the job with its entry in the user's list of folders, which a node may not have."""
    try:
        entry = ownership.enter()
    except OSError as error:
        log.warning("this run could not be listed as yours (%s)", ownership.reason_of(error))
        return job
    return job.owned(ownership.owner_of_job(entry, as_recorded(job)))
