"""Build the objects of train.py from its config, to time them inside one process."""

from __future__ import annotations

from typing import Any

from lab.build import BuiltObjects
from regrow.config.targets import allow
from regrow.distributed.parallel import World
from regrow.runs import training
from regrow.runs.machine import resolve_device


def config_of(*overrides: str) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    from regrow.config.hydra_access import plain, version_arguments, without_hydra
    from regrow.project import CONF

    with initialize_config_dir(str(CONF), **version_arguments()):
        config = compose("train", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return plain(without_hydra(config))


def world_of(*overrides: str) -> World:
    return World(device=resolve_device(config_of(*overrides)["trainer"]["device"]))


def build(world: World, *overrides: str) -> tuple[BuiltObjects, dict[str, Any]]:
    config = config_of(*overrides)
    allow(config)  # as the check of a command line does
    return training.build(config, world), config
