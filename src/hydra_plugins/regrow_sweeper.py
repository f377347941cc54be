"""What Hydra finds of this package: the sweeper behind `--multirun`, and nothing more.

Hydra imports this file in every one of its programs, so it imports nothing of ours by itself.
"""

from collections.abc import Sequence
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class RegrowSweeper(Sweeper):
    """Hands Hydra's multirun to `regrow.sweep`. What it does is set by the group `sweep`."""

    def __init__(self, **options: Any) -> None:
        """`options` are those of Hydra's own sweeper, which have no meaning here."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.loader, self.composed = hydra_context.config_loader, config

    def sweep(self, arguments: Sequence[str]) -> None:
        from regrow.sweep.run import run

        run(self.loader, self.composed, list(arguments))
