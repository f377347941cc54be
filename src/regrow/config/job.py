"""One run as plain data, so that one process can compose it and others can run it."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from regrow.config import flags, registered, resume
from regrow.config.command_line import quoted
from regrow.config.hydra_access import plain, typed_overrides
from regrow.config.resume import ELSEWHERE
from regrow.dotted import Checked
from regrow.record.redact import redact


@dataclass(frozen=True)
class Job:
    """A run's config and place, as JSON data: `Job(**json.loads(job.to_json())) == job`.

    Nobody writes to its fields: `session.settled` and the methods return another job.
    """

    config: Checked  # resolved
    folder: str | None  # the run's own; None: a new one under outputs/<name>
    overrides: list[str]
    choices: dict[str, Any]  # the chosen options, by group
    composed: dict[str, str]  # what Hydra composed, by file name in `.hydra/`
    command: list[str]
    source: dict[str, Any] | None = None  # the config it was composed from: see flags.py
    draws: bool = True  # plots and page, at the end of the run
    owner: dict[str, Any] | None = None  # its folder's owner.json, made where the user's list is
    trial: dict[str, Any] | None = None  # of a search that may end the run: see sweep/trial.py

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def with_values(self, **values: Any) -> Job:
        """Return the job with other values at the top of its config."""
        return dataclasses.replace(self, config={**self.config, **values})

    def with_trainer(self, **values: Any) -> Job:
        """Return the job with other values in the node `trainer`."""
        return self.with_values(trainer={**self.config["trainer"], **values})


def job_of(cfg: DictConfig, folder: Path | None, command: Sequence[str]) -> Job:
    """Return the job that `cfg` and Hydra's current config describe.

    `folder` is the run's own, or None for a new one under outputs/<name>.
    """
    hydra = HydraConfig.get()
    if folder is not None and folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    overrides = [
        o for o in typed_overrides(hydra.overrides.task) if not resume.is_of_the_launcher(o)
    ]
    kept = [o for o in overrides if resume.key_of(o) != "resume"]
    choices = {str(g): option for g, option in hydra.runtime.choices.items() if g not in ELSEWHERE}
    cfg, its_hydra = copy.deepcopy(cfg), cast(DictConfig, copy.deepcopy(hydra))
    OmegaConf.set_struct(cfg, False)
    OmegaConf.set_readonly(its_hydra, False)
    for group in ELSEWHERE:
        cfg.pop(group, None)
    cfg.pop("hydra", None)
    its_hydra.overrides.task, its_hydra.runtime.choices = overrides, choices
    composed = {"overrides.yaml": kept, "config.yaml": cfg, "hydra.yaml": its_hydra}
    return Job(
        config=plain(cfg),
        folder=None if folder is None else str(folder),
        overrides=overrides,
        choices=choices,
        composed={name: OmegaConf.to_yaml(content) for name, content in composed.items()}
        | ({registered.NAME: nodes} if (nodes := registered.text(redact)) is not None else {}),
        command=list(command),
        source=flags.source_of(hydra),
    )


def as_recorded(job: Job) -> list[str]:
    """Return what resuming the run will use, and what its seal covers.

    These are the overrides as the run's folder will hold them, the places that its config came
    from, and a digest of registered nodes.
    """
    overrides = resume.overrides_in(redact(job.composed["overrides.yaml"]))
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
    kept = [o for o in job.overrides if resume.key_of(o) != "resume"]
    composed = {**job.composed, "overrides.yaml": OmegaConf.to_yaml([*kept, line])}
    return dataclasses.replace(
        job,
        config=config,
        overrides=[*job.overrides, line],
        composed=composed,
        command=[*job.command, line],
    )
