"""Regrow: an experiment repository whose runs are pure functions of code, config and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from regrow.run import Objects

__all__ = ["build", "compose"]


def compose(config_name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `python scripts/train.py` would compose of these overrides, checked and
    resolved. In a notebook: no Hydra needs to be initialised, and none that is is touched.

    Raises UserError for whatever is wrong with it, in one line.
    """
    from regrow import notebook  # Hydra comes with it

    return notebook.compose(config_name, overrides)


def build(config: Mapping[str, Any] | DictConfig) -> Objects:
    """The objects that a config describes, as a run makes them: `state.model`, `state.optimizer`,
    `data`, `task`, the batches `train` and `val`. Starts no run and writes nothing.

    Seeds and threads of this process are set as the run's are. `objects.data.close()` ends the
    data's workers. Raises UserError, as for a target that neither conf/ nor `compose` named.
    """
    from regrow import notebook  # torch comes with it

    return notebook.build(config)
