"""`regrow.compose` and `regrow.build`: a config and its objects, in a notebook or your own script.

They start no run and write nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow.config import flags
from regrow.config.command_line import escaped, paths_as_typed
from regrow.config.composition import composition, hydra_as_it_was
from regrow.config.explain import composition_error, hydras_value_error, wrong_options
from regrow.config.hydra_access import plain, without_hydra
from regrow.config.own_modules import import_own_modules
from regrow.dotted import Config
from regrow.errors import UserError

if TYPE_CHECKING:
    from regrow.protocols import Objects


def compose(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config as `python scripts/train.py …` would compose and check it, resolved."""
    from regrow.config.check import check

    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r} must be a list, such as [{overrides!r}].")
    for override in overrides:
        if override.startswith("-"):
            raise UserError(f"{override} is a flag. compose takes overrides, such as seed=1.")
        key, _, value = override.partition("=")
        if key == "resume" and value not in ("auto", "never"):
            raise UserError(
                f"{override}: compose does not resume runs. regrow.load.load_run gives its model; "
                "a new run starts from its weights with init_from=…"
            )
    with composed(config_name, overrides) as config:
        check(config, config.hydra.runtime.choices)
        values = plain(without_hydra(config))
    resolved: DictConfig = OmegaConf.create(_literal(values))
    return resolved


@contextlib.contextmanager
def composed(name: str, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """Yield the composed config, with the node `hydra`, while it is Hydra's own.

    Raises UserError for an error of Hydra's, also of one while its values are read.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    with hydra_as_it_was():
        if (wrong := wrong_options(overrides)) is not None:
            raise UserError(wrong)
        try:
            typed = flags.absolute(paths_as_typed(overrides, multirun=False))
            config = composition({**flags.DEFAULT, "name": name}, typed)
            HydraConfig.instance().set_config(config)
            yield config
        except (HydraException, OmegaConfBaseException) as error:
            said = composition_error(error)
            raise UserError(said.replace("a sweep: add -m.", "a sweep, not one config.")) from error
        except ValueError as error:
            if isinstance(error, UserError) or (wrong := hydras_value_error(error)) is None:
                raise
            raise UserError(wrong) from error


def build(config: Mapping[str, Config] | DictConfig) -> Objects:
    """Return all objects of a run, on the config's device. Sets threads and seeds as a run does."""
    from regrow.config.check import check_values
    from regrow.distributed.parallel import World
    from regrow.runs import machine, training

    import_own_modules()
    try:
        node = config if isinstance(config, DictConfig) else OmegaConf.create(_literal(config))
        values = plain(without_hydra(node))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{composition_error(error)} Compose it with regrow.compose, which resolves it."
        ) from error
    try:
        trainer = values["trainer"]
        count, device = trainer["devices"], trainer["device"]
    except (KeyError, TypeError):
        raise UserError("this is not a run's config. Make one with regrow.compose.") from None
    if count not in (1, "auto"):
        raise UserError(f"trainer.devices={count}: this is one process. Use trainer.devices=1.")
    check_values(values)
    return training.build(values, World(device=machine.resolve_device(device)))


def _literal(value: Any) -> Any:
    """Return plain values with `${` escaped, so that OmegaConf does not interpolate their text."""
    if isinstance(value, Mapping):
        return {key: _literal(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(each) for each in value]
    return escaped(value) if isinstance(value, str) else value
