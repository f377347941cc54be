"""One run as plain data, so that one process can compose it and others can run it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to run and where, as JSON data: `Job(**json.loads(job.to_json())) == job`."""

    config: dict[str, Any]  # resolved
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
