"""Enter a sweep's frozen copy before Hydra calls other callbacks at the sweep's start."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from regrow.config.explain import composition_error
from regrow.config.started import is_started
from regrow.failing import fail, in_one_line


class EnterFrozenCopy(Callback):
    """Hydra callback that enters the frozen copy of the code.

    Hydra calls all callbacks again in the copy; without this one, they see the sweep start twice.
    """

    @in_one_line()
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if is_started():
            from regrow.sweep.run import enter

            try:
                enter(config)
            except OmegaConfBaseException as error:
                fail(composition_error(error))
