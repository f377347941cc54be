"""Regrow: an experiment repository whose runs are pure functions of code, config and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from regrow.protocols import Config, Objects

__all__ = ["__version__", "build", "compose"]

__version__ = "1.0.0"  # of the engine; `protocols.VERSION` says which labs it works with


def compose(config_name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config that `python scripts/train.py` composes from these overrides, resolved.

    The config is checked. Works in a notebook, with or without an initialised Hydra, and leaves
    Hydra's state unchanged. Raises UserError with one line for a mistake.
    """
    from regrow.cli import notebook  # imports Hydra

    return notebook.compose(config_name, overrides)


def build(config: Mapping[str, Config] | DictConfig) -> Objects:
    """Return the objects that a config describes, as a run builds them, without starting one.

    These are `state.model`, `state.optimizer`, `data`, `task`, and the batches: `train` and `sets`.
    Sets this process's seeds and threads as a run does. `objects.data.close()` ends the data's
    workers. Raises UserError, for example for a target that neither conf/ nor `compose` named.
    """
    from regrow.cli import notebook  # imports Hydra

    return notebook.build(config)
