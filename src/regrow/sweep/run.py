"""Run a sweep, from its command to its table of results."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf

from regrow.config import flags
from regrow.config.changed_data import CHANGED
from regrow.config.check import check_group
from regrow.config.command_line import command, key_of
from regrow.config.hydra_access import is_named, plain
from regrow.config.job import as_recorded
from regrow.config.targets import instantiate
from regrow.errors import UserError
from regrow.processes import begin, outside, slurm
from regrow.processes.signals import before_the_run
from regrow.record import manifest, ownership, records
from regrow.runs.console import console
from regrow.sweep import cluster, frozen, gpus, ledger, local, planning, process, results, schedule
from regrow.sweep.composed import Composed
from regrow.sweep.kinds import Options, Search
from regrow.sweep.planning import Planned
from regrow.sweep.show import Show

log = logging.getLogger("regrow")

# Keys that do not identify a sweep: commands that differ only in these mean the same sweep.
BESIDE = ("hydra.sweep.dir", "resume", CHANGED, "sweep.retry_failed", "sweep.fail_fast")


def run(loader: ConfigLoader, config: DictConfig, arguments: Sequence[str]) -> None:
    """Run the sweep that --multirun asks for, and exit. Raises UserError.

    The exit code is 0 if all jobs are complete or were submitted, 1 if some failed, and
    128 + signal if the sweep was stopped. A sweep that fails before it plans a job leaves nothing.
    """
    enter(config)
    begin.built()  # its jobs build the objects
    told = begin.handed
    lock = records.Lock.taken_over(Path(told[frozen.FOLDER]), int(told[frozen.LOCK]))
    with lock, console():
        try:
            code = _run(loader, config, list(arguments), lock.folder, told[frozen.IDENTITY])
        except BaseException:  # including Ctrl-C
            leave_nothing(lock.folder)
            raise
    raise SystemExit(code)


def enter(config: DictConfig) -> None:
    """Freeze the code and continue as its copy, unless this is the copy. Raises UserError."""
    if outside.started_from_outside():
        raise UserError(
            "--multirun starts its processes itself. Start it without torchrun or srun."
        )
    for override in planning.overrides_of(config):
        if key_of(override) == "hydra.run.dir":
            raise UserError(f"{override} is for one run. A sweep's folder is hydra.sweep.dir=….")
    for group in ("launcher", "sweep"):
        check_group(config, group)
    if frozen.is_entered():
        return
    before_the_run.end()
    named = Path(config.hydra.sweep.dir) if is_named("hydra.sweep.dir") else None
    source = flags.source_of(config.hydra)
    frozen_code = frozen.opened(
        named, str(config.name), same_sweep(config), str(config.resume), source
    )
    warm = not config.launcher.get("fresh_processes", True)
    frozen.become(*frozen_code, sys.argv[1:], warm=warm)


def same_sweep(config: DictConfig) -> list[str]:
    """Return the overrides that identify the sweep of a command."""
    return [
        override
        for override in planning.overrides_of(config)
        if key_of(override) not in BESIDE and not is_of(override, "launcher")
    ]


def is_of(override: str, group: str) -> bool:
    return key_of(override).split(".")[0] == group


def leave_nothing(folder: Path) -> None:
    """Remove a sweep's folder and its empty parents, unless a job is planned there."""
    if (folder / ledger.FILE).exists():
        return
    if frozen.is_copy(folder / ledger.CODE):
        shutil.rmtree(folder / ledger.CODE, ignore_errors=True)
    for name in (ledger.LOCK, ledger.RESULTS_LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        records.remove_unused(folder)
        for parent in folder.absolute().parents:
            if parent == Path.cwd() or not parent.is_relative_to(Path.cwd()):
                break
            parent.rmdir()


def _run(
    loader: ConfigLoader, config: DictConfig, arguments: list[str], folder: Path, identity: str
) -> int:
    values = plain(OmegaConf.masked_copy(config, ["name", "launcher", "sweep"]))
    options: Options = instantiate(values["sweep"])
    composer = planning.Composer(Composed(loader, config), folder)
    sweep = Sweep(
        folder=folder,
        options=options,
        launcher=values["launcher"],
        facts={
            "name": values["name"],
            "kind": "search" if isinstance(options, Search) else "list of jobs",
            "overrides": same_sweep(config),
            "launcher": [o for o in planning.overrides_of(config) if is_of(o, "launcher")],
            "config": flags.source_of(config.hydra),
            "pictures": options.pictures,
            "complete": False,
            "id": identity,
        },
        entry=ownership.find(identity),
    )
    if not sweep.is_for_slurm:
        sweep.context = process.make_context(fresh=sweep.launcher["fresh_processes"])
    if isinstance(options, Search):
        return search(sweep, composer, options, arguments)
    varied = ledger.read(folder).get("varied", [])
    wanted = list(planning.combinations(loader, options, arguments, varied))
    known = ledger.entries(folder)
    swept = [override for _, its in wanted for override in its]
    lines = [*planning.lines_of(options.params), *arguments]
    sweep.agree(planning.fixed_by(lines, swept), swept)
    known = [planning.distinguished(entry, sweep.facts["varied"]) for entry in known]
    planned = planning.numbered(composer, wanted, known)
    rest = planning.left_over(composer, planned, known, retry=options.retry_failed)
    jobs = sweep.prepared([*planned, *rest])
    numbers = {one.number for one in jobs}
    entries = [*(one for one in known if one.number not in numbers), *(o.entry for o in jobs)]
    entries.sort(key=lambda entry: entry.number)
    todo = [o for o in jobs if ledger.is_to_be_run(folder, o.entry, retry=options.retry_failed)]
    if sweep.is_for_slurm and todo:
        return submit(sweep, entries, todo)
    sweep.write(entries, total=len(entries))
    what = counted(len(jobs))
    what += f" of {len(entries)}" if len(entries) > len(jobs) else ""
    introduce(folder, what, len(jobs) - len(todo), sweep.at_once, jobs)
    if not todo:
        return conclude(sweep, (), len(entries))
    show = Show(folder, len(jobs), len(jobs) - len(todo), sweep.at_once)
    place = local.Local(folder, sweep.at_once, sweep.context, gpus.Leases(sweep.gpus))
    queue = schedule.Queue(todo)
    stop = schedule.run(folder, queue, place, show, fail_fast=options.fail_fast)
    with stop.echoes_ignored():
        return conclude(sweep, stop.signals, len(entries))


@dataclass
class Sweep:
    """The facts that all parts of a sweep share."""

    folder: Path
    options: Options
    launcher: dict[str, Any]
    facts: dict[str, Any]
    context: Any = None  # multiprocessing's
    gpus: list[str] = field(default_factory=gpus.visible)
    at_once: int = 1
    entry: ownership.ListedFolder | None = None  # in the list of the user's folders
    shares: int = 1  # jobs that share the cores; fixed, because exact results depend on it

    @property
    def is_for_slurm(self) -> bool:
        return "_target_" in self.launcher

    def agree(self, fixed: Mapping[str, str], swept: Sequence[str]) -> None:
        """Add `fixed` and `swept` to the facts. Raises UserError if the folder's jobs conflict."""
        content = ledger.read(self.folder)
        if content:
            before = flags.of_sweep(self.folder)
            frozen.refuse_another_source(self.folder, before, self.facts["config"])
        kind = content.get("kind", self.facts["kind"])
        if kind != self.facts["kind"]:
            raise UserError(
                f"{self.folder} holds a {kind}, and this is a {self.facts['kind']}. "
                "Another kind of sweep needs another folder."
            )
        planning.refuse_another(self.folder, fixed, swept)
        varied = [*content.get("varied", []), *map(key_of, swept)]
        self.facts |= {"fixed": dict(fixed), "varied": [*dict.fromkeys(varied)]}

    def prepared(self, planned: Sequence[Planned]) -> list[Planned]:
        """Return the jobs ready to run, after setting how many run at once."""
        if not self.is_for_slurm:
            trainers = [one.job.config["trainer"] for one in planned]
            self.at_once = local.jobs_at_once(self.launcher["jobs"], trainers, len(self.gpus))
            self.shares = ledger.read(self.folder).get("shares", self.at_once)
            self.facts["shares"] = self.shares
        return [self.prepare(one) for one in planned]

    def prepare(self, planned: Planned) -> Planned:
        threads = None
        if not self.is_for_slurm:
            trainer = planned.job.config["trainer"]
            threads = local.threads_of(trainer, self.shares, len(self.gpus))
        job = planned.job.of_sweep(self.folder.name, threads, draws=self.options.pictures == "all")
        if self.entry is not None:
            job = job.owned(ownership.owner_of_job(self.entry, as_recorded(job)))
        return dataclasses.replace(planned, job=job)

    def write(self, entries: Sequence[ledger.JobEntry], **facts: Any) -> None:
        """Write sweep.json, which makes the folder a sweep's, and update the link to the latest."""
        ledger.write(self.folder, entries, **self.facts, **facts)
        records.link_latest(self.folder, Path("outputs", self.facts["name"]))


def search(
    sweep: Sweep, composer: planning.Composer, options: Search, arguments: Sequence[str]
) -> int:
    """Run a sweep whose jobs Optuna proposes, and return the exit code."""
    from regrow.sweep import search  # takes half a second to import

    folder = sweep.folder
    space = search.space_of(composer, options, arguments)
    likely = search.representative(composer, space)
    metrics, directions = search.objectives(options, likely.job.config)
    total = options.n_trials
    if options.sampler == "grid":
        total = min(total, len(space.combinations()))
    sweep.agree(planning.fixed_by(space.fixed, [*space.varied]), [*space.varied])
    search.refuse_another(folder, space, options)
    search.keep_sampler(folder, options)
    sweep.facts["space"] = space.described()
    if options.sampler == "tpe":
        sweep.facts["multivariate"] = options.multivariate
    (likely,) = sweep.prepared([likely])
    place: schedule.Executor = local.Local(
        folder, sweep.at_once, sweep.context, gpus.Leases(sweep.gpus)
    )
    if sweep.is_for_slurm:
        place = cluster.Cluster(folder, slurm_options(sweep, [likely]))
        sweep.at_once = place.at_once
    if (odd := search.warning_of(space, options)) is not None:
        log.warning("%s", odd)
    sweep.write(
        ledger.entries(folder),
        total=total,
        metric=metrics[0],
        mode={"maximize": "max", "minimize": "min"}[directions[0]],
    )
    study = search.open_study(folder, directions)
    trials = search.Trials(composer, options, space, metrics, sweep.prepare, study, total)
    trials.take_up()
    done = sum(ledger.state_of(folder, one)[0] in ledger.ENDED for one in ledger.entries(folder))
    introduce(folder, f"{total} trials", done, sweep.at_once, [likely] * total)
    show = Show(folder, total, done, sweep.at_once)
    stop = schedule.run(folder, trials, place, show, fail_fast=options.fail_fast)
    with stop.echoes_ignored():
        code = conclude(sweep, stop.signals, total)
    if len(metrics) > 1:
        log.info("no trial beats these in all of %s:", ", ".join(metrics))
        for one in study.best_trials:
            log.info("  job %d: %s", one.number, "  ".join(f"{v:.5g}" for v in one.values))
    return code


def slurm_options(sweep: Sweep, jobs: Sequence[Planned]) -> slurm.SlurmOptions:
    """Return the request of the jobs to Slurm. Raises UserError if Slurm would reject it."""
    options: slurm.SlurmOptions = instantiate(sweep.launcher)
    if sweep.options.fail_fast:
        raise UserError(
            "sweep.fail_fast=true: Slurm's jobs cannot be stopped from here. Leave it out, and "
            "stop them with scancel; for a search, sweep.max_failures=1 begins no more trials."
        )
    for one in jobs:
        slurm.check(options, one.job.config["trainer"])
    return options


def submit(sweep: Sweep, entries: Sequence[ledger.JobEntry], todo: Sequence[Planned]) -> int:
    """Submit the jobs in `todo` to Slurm as one array, and return 0. The last writes the page."""
    folder, name = sweep.folder, sweep.facts["name"]
    is_new = not (folder / ledger.FILE).exists()
    options = slurm_options(sweep, todo)
    queued = cluster.queued(folder, [one.number for one in todo])
    jobs = {one.number: one.job for one in todo if one.number not in queued}
    ledger.write(folder, entries, **sweep.facts, total=len(entries))  # a job may end at once
    try:
        given = cluster.submit(folder, jobs, options, name) if jobs else {}
    except UserError:
        if is_new:
            for entry in entries:
                shutil.rmtree(folder / entry.folder, ignore_errors=True)
            (folder / ledger.FILE).unlink()
        raise
    records.link_latest(folder, Path("outputs", name))
    if queued:
        log.info("queued or running already: %s", counted(len(queued)))
    if given:
        array = next(iter(given.values())).partition("_")[0]
        log.info(
            "submitted to Slurm: %s, to be stopped with scancel %s", counted(len(given)), array
        )
    where = os.path.relpath(folder)
    log.info("folder: %s", where)
    log.info("how it stands: %s", command(where, script="report.py", root=manifest.own_root()))
    return 0


def counted(jobs: int) -> str:
    return f"{jobs} job{'s'[: jobs > 1]}"


def introduce(folder: Path, what: str, done: int, at_once: int, jobs: Sequence[Planned]) -> None:
    """Log what is about to run, and the command to resume it."""
    threads = {one.job.config["trainer"]["num_threads"] for one in jobs}
    count = threads.pop() if len(threads) == 1 else None
    each = f", each process with {count} thread{'s'[: count > 1]}" if count else ""
    log.info("sweep: %s%s, %d at once%s", what, f", {done} done" if done else "", at_once, each)
    where = os.path.relpath(folder)
    log.info("folder: %s", where)
    if done < len(jobs):
        log.info("if interrupted, resume with: %s", resume_command(folder))


def resume_command(folder: Path, *more: str) -> str:
    where = os.path.relpath(folder)
    places = flags.arguments_of(flags.of_sweep(folder))
    words = [f"resume={where}", *ownership.trust_of(folder), *more]
    return command("-m", *places, *words, root=manifest.own_root())


def conclude(sweep: Sweep, signals: Sequence[int], total: int) -> int:
    """Write and log the results of up to `total` jobs, and return the exit code.

    `signals` are those that stopped the sweep, if any.
    """
    folder = sweep.folder
    found = results.write_table(folder)
    states = [row.state for row in found.rows]
    for line in results.summary_of(folder, found):
        log.info("%s", line)
    results.write_page(folder, found, sweep.options.pictures)
    complete = len(states) >= total and all(its in ledger.GOOD for its in states)
    ledger.write(folder, complete=complete)
    if signals:
        log.warning("stopped. Resume with: %s", resume_command(folder))
        return 128 + signals[0]
    if "failed" in states:
        again = resume_command(folder, "sweep.retry_failed=true")
        words = "%d of %d jobs failed. To run them again: %s"
        log.warning(words, states.count("failed"), len(states), again)
    return 0 if complete else 1
