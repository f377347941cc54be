"""One run as plain data, so that one process can compose it and others can run it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from regrow.config import flags, registered
from regrow.config.command_line import key_of, quoted
from regrow.config.hydra_access import plain, typed_overrides
from regrow.config.recorded import ELSEWHERE, is_of_the_launcher, overrides_in
from regrow.config.yaml_files import redact_yaml
from regrow.dotted import Checked, Config
from regrow.record.redact import redact_all


@dataclass(frozen=True)
class Job:
    """A run's config and place, as JSON data: `Job(**json.loads(job.to_json())) == job`.

    Nobody writes to its fields. Each reason to change one has a method here, which returns another
    job.
    """

    config: Checked  # resolved
    folder: str | None  # the run's own; None: a new one under outputs/<name>
    overrides: tuple[str, ...]
    choices: Mapping[str, Any]  # the chosen options, by group
    composed: Mapping[str, str]  # what Hydra composed, by file name in `.hydra/`
    command: tuple[str, ...]
    source: Mapping[str, Any] | None = None  # the config it was composed from: see flags.py
    draws: bool = True  # plots and page, at the end of the run
    owner: Mapping[str, Any] | None = None  # its folder's owner.json, made where the user's list is
    trial: Mapping[str, Any] | None = None  # of a search that may end the run: see sweep/trial.py

    def __post_init__(self) -> None:
        for name in ("overrides", "command"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def resuming(self, kept: Mapping[str, Config] | None) -> Job:
        """Return the job with what a resume keeps of the record, or as it is for a new run."""
        return self._with_values(**kept or {})

    def of_processes(self, count: int, num_threads: int | None) -> Job:
        """Return the job of `count` ranks, with `num_threads` each, as a run or its preview has."""
        return self._with_trainer(devices=count, num_threads=num_threads)

    def settled(self, config: Checked, num_threads: int) -> Job:
        """Return the job with the config that rank 0 has settled, and its threads."""
        return self._with_values(**config)._with_trainer(num_threads=num_threads)

    def monitoring(self, metric: str | None, mode: str | None) -> Job:
        """Return the job with the monitor that the built task and data have."""
        return self._with_trainer(monitor=metric, mode=mode)

    def started_again(self) -> Job:
        """Return the job as it continues in its folder: a sweep's, a restart's, a requeued one."""
        return self._with_values(resume="auto")

    def in_folder(self, folder: str | None) -> Job:
        """Return the job in the folder that was made for it."""
        return dataclasses.replace(self, folder=folder)

    def owned(self, owner: Mapping[str, Any]) -> Job:
        """Return the job with its entry in the user's list of folders."""
        return dataclasses.replace(self, owner=owner)

    def of_sweep(self, group: str, num_threads: int | None, *, draws: bool) -> Job:
        """Return a sweep's job: its `group` in wandb, and its threads, unless its config sets them.

        None for `num_threads` leaves them to the run.
        """
        job = dataclasses.replace(self, draws=draws)
        tracker = job.config["logger"].get("wandb")
        if isinstance(tracker, Mapping) and tracker.get("group", ...) is None:
            job = with_override(job, "logger.wandb.group", group)
        if num_threads is not None and job.config["trainer"]["num_threads"] is None:
            job = with_override(job, "trainer.num_threads", num_threads)
        return job

    def of_trial(self, trial: Mapping[str, Any]) -> Job:
        """Return the job with what a search must know to end it early."""
        return dataclasses.replace(self, trial=trial)

    def _with_values(self, **values: Any) -> Job:
        """Return the job with other values at the top of its config."""
        return dataclasses.replace(self, config={**self.config, **values})

    def _with_trainer(self, **values: Any) -> Job:
        """Return the job with other values in the node `trainer`."""
        return self._with_values(trainer={**self.config["trainer"], **values})


def job_of(cfg: DictConfig, folder: Path | None, command: Sequence[str]) -> Job:
    """Return the job that `cfg` and Hydra's current config describe.

    `folder` is the run's own, or None for a new one under outputs/<name>.
    """
    hydra = HydraConfig.get()
    if folder is not None and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    overrides = [o for o in typed_overrides(hydra.overrides.task) if not is_of_the_launcher(o)]
    kept = [o for o in overrides if key_of(o) != "resume"]
    choices = {str(g): option for g, option in hydra.runtime.choices.items() if g not in ELSEWHERE}
    cfg, its_hydra = copy.deepcopy(cfg), cast(DictConfig, copy.deepcopy(hydra))
    OmegaConf.set_struct(cfg, False)
    OmegaConf.set_readonly(its_hydra, False)
    for group in ELSEWHERE:
        cfg.pop(group, None)
    cfg.pop("hydra", None)
    its_hydra.overrides.task, its_hydra.runtime.choices = overrides, choices
    if (masked := redact_all(overrides)) != overrides:  # joined, secrets would not be told apart
        its_hydra.job.override_dirname = ",".join(masked)
    composed = {"overrides.yaml": kept, "config.yaml": cfg, "hydra.yaml": its_hydra}
    return Job(
        config=plain(cfg),
        folder=None if folder is None else str(folder),
        overrides=tuple(overrides),
        choices=choices,
        composed={name: OmegaConf.to_yaml(content) for name, content in composed.items()}
        | ({registered.NAME: nodes} if (nodes := registered.text(redact_yaml)) is not None else {}),
        command=tuple(command),
        source=flags.source_of(hydra),
    )


def as_recorded(job: Job) -> list[str]:
    """Return what resuming the run will use, and what its seal covers.

    These are the overrides as the run's folder will hold them, the places that its config came
    from, and a digest of registered nodes.
    """
    overrides = overrides_in(redact_yaml(job.composed["overrides.yaml"]))
    nodes = job.composed.get(registered.NAME)
    seal = registered.sealed(None if nodes is None else nodes.encode())
    return [*overrides, *flags.followed_places(job.source), *seal]


def with_override(job: Job, key: str, value: Any) -> Job:
    """Return the job with one more override, as if it had been typed."""
    config = copy.deepcopy(dict(job.config))
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    line = f"{key}={quoted(value) if isinstance(value, str) else value}"
    kept = [o for o in job.overrides if key_of(o) != "resume"]
    composed = {**job.composed, "overrides.yaml": OmegaConf.to_yaml([*kept, line])}
    return dataclasses.replace(
        job,
        config=config,
        overrides=(*job.overrides, line),
        composed=composed,
        command=(*job.command, line),
    )
