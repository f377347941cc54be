"""The options of each kind of sweep. Their defaults are in `conf/sweep/` only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of values."""

    params: dict[str, Any] | None
    fail_fast: bool
    retry_failed: bool
    pictures: str


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Sets of overrides that belong together."""

    params: dict[str, Any] | None
    fail_fast: bool
    retry_failed: bool
    pictures: str
    sets: list[Any]
    file: str | None


@dataclass(frozen=True, kw_only=True)
class Search:
    """Optuna's search; option names are Optuna's where it has one."""

    params: dict[str, Any] | None
    fail_fast: bool
    retry_failed: bool
    pictures: str
    n_trials: int
    metric: str | list[str] | None
    direction: str | list[str] | None
    sampler: str
    multivariate: bool
    seed: int
    pruner: str
    pruner_startup_trials: int
    pruner_warmup_evaluations: int
    max_failures: int


Options = Grid | Sets | Search
