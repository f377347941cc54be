"""The Hydra plugin of this package: the sweeper behind `--multirun`.

Every Hydra app imports this file, so it must not import our package at the top level.
"""

import copy
from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict


class RegrowSweeper(Sweeper):
    """Passes Hydra's multirun to `regrow.sweep`, which the config group `sweep` sets up.

    In a user's own script that only shares the configs, Hydra's own sweeper runs the task function.
    """

    def __init__(self, **options: Any) -> None:
        """Ignore `options`: they are for Hydra's own sweeper, which reads them from the config."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        from regrow.config.started import is_started

        self.context, self.composed = hydra_context, config
        self.hydras: Sweeper | None = None
        if not is_started(task_function):
            as_hydra = _with_hydras_sweeper(config)
            self.hydras = Plugins.instance().instantiate_sweeper(
                hydra_context=hydra_context, task_function=task_function, config=as_hydra
            )
            # Hydra 1.4 rejects jobs whose hydra.sweeper differs from the sweep's.
            self.hydras.setup(
                hydra_context=hydra_context, task_function=task_function, config=config
            )

    def sweep(self, arguments: Sequence[str]) -> Any:
        if self.hydras is not None:
            return self.hydras.sweep(list(arguments))
        from regrow.config.hydra_access import version_arguments
        from regrow.sweep.run import run

        try:
            run(self.context.config_loader, self.composed, list(arguments))
        except SystemExit:  # the normal end; Hydra 1.3 then calls no callback
            if version_arguments():
                self.context.callbacks.on_multirun_end(
                    config=self.composed, config_name=self.composed.hydra.job.config_name
                )
            raise


def _with_hydras_sweeper(config: DictConfig) -> DictConfig:
    """Return the config with the chosen sweeper of Hydra instead of ours from conf/train.yaml."""
    choice = config.hydra.runtime.choices.get("hydra/sweeper", "basic")
    node: Any = ConfigStore.instance().load(f"hydra/sweeper/{choice}.yaml").node
    config = copy.deepcopy(config)
    OmegaConf.set_readonly(config.hydra, False)
    with open_dict(config):
        config.hydra.sweeper._target_ = node["_target_"]
    return config
