"""One run as plain data, so that one process can compose it and others can do it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """What is to run and where, as what JSON can say: `Job(**json.loads(job.to_json()))` is it."""

    config: dict[str, Any]  # resolved
    folder: str | None  # the run's own, if it was named; None: a new one under outputs/<name>
    overrides: list[str]
    choices: dict[str, Any]  # the options that the config's groups were composed of
    composed: dict[str, str]  # what Hydra composed, by file name in `.hydra/`
    command: list[str]
    source: dict[str, Any] | None = None  # which config it was composed of: see flags.py
    draws: bool = True  # its pictures and its page, at its end
    owner: dict[str, Any] | None = None  # what its folder holds, made where the list of folders is
    trial: dict[str, Any] | None = None  # of a search that may end it: see sweep/trial.py

    def to_json(self) -> str:
        return json.dumps(asdict(self))
