"""Values of Hydra's own config, and configs as plain data."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def register_resolver(name: str, function: Callable[..., Any]) -> None:
    """Register the resolver `${name:…}`."""
    register: Any = OmegaConf.register_resolver  # older than 2.4: a legacy function of this name
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    register(name, function, replace=True)


def if_chosen(group: str, option: str, then: Any, otherwise: Any) -> Any:
    """Return `then` if `group=option` was chosen; a config cannot test a choice otherwise."""
    from hydra.core.hydra_config import HydraConfig

    choices = _choices.get()
    if choices is None:
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    return then if choices.get(group) == option else otherwise


register_resolver("if_chosen", if_chosen)

_choices: ContextVar[Mapping[str, Any] | None] = ContextVar("_choices", default=None)


@contextlib.contextmanager
def choices_are(choices: Mapping[str, Any]) -> Iterator[None]:
    """Let `if_chosen` use a recorded run's choices, not those of this process."""
    token = _choices.set(choices)
    try:
        yield
    finally:
        _choices.reset(token)


def output_dir() -> Path:
    """Return the folder that Hydra gives the job. A name with `${` in it is taken literally."""
    from hydra.core.hydra_config import HydraConfig

    runtime = OmegaConf.to_container(HydraConfig.get().runtime, resolve=False)
    assert isinstance(runtime, dict)
    return Path(str(runtime["output_dir"]))


def is_named(key: str) -> bool:
    """Return True if `key`, hydra.run.dir or hydra.sweep.dir, was set.

    The default is the current folder, so that value only counts if it was typed.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    typed = [line.lstrip("+") for line in typed_overrides(hydra.overrides.hydra)]
    place = hydra.run.dir if key == "hydra.run.dir" else hydra.sweep.dir
    return any(line.startswith(f"{key}=") for line in typed) or Path(place).resolve() != Path.cwd()


def version_arguments() -> dict[str, Any]:
    """Return the argument `version_base` for Hydra 1.3, and nothing for 1.4."""
    import hydra

    is_new = "execution_whitelist" in inspect.signature(hydra.main).parameters
    return {} if is_new else {"version_base": None}


def typed_overrides(node: Any) -> list[str]:
    """Return a node of Hydra's overrides as typed, with interpolations unresolved."""
    overrides = OmegaConf.to_container(node, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def without_hydra(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


def plain(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """Return the config as plain dicts, lists and values; keys are text, as in a run's JSON."""
    container = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    found: dict[str, Any] = _with_text_keys(container)
    return found


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            json.dumps(key) if isinstance(key, int | float) else str(key): _with_text_keys(item)
            for key, item in value.items()
        }
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value
