"""Compose a config through Hydra's API, in any process, not only in a Hydra app."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from regrow.config import flags
from regrow.config.hydra_access import version_arguments
from regrow.config.own_modules import import_own_modules
from regrow.project import CONF


def composition(source: Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    """Return the composed config of a source (see `flags`), with the `hydra` node.

    Raises Hydra's errors.
    """
    from hydra import compose as by_hydra

    with initialised(source):
        typed = [*_searched(source), *overrides]
        return by_hydra(source["name"], typed, return_hydra_config=True)


def defaults_of(source: Mapping[str, Any], overrides: Sequence[str]) -> Any:
    """Return the defaults list that Hydra composes from, in its own class. Raises its errors."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with initialised(source):
        loader: Any = GlobalHydra.instance().config_loader()
        typed = [*_searched(source), *overrides]
        return loader.compute_defaults_list(source["name"], typed, RunMode.RUN)


def _searched(source: Mapping[str, Any]) -> list[str]:
    return [flags.as_override(source["searchpath"])] if source["searchpath"] else []


@contextlib.contextmanager
def initialised(source: Mapping[str, Any]) -> Iterator[None]:
    """Initialise Hydra with the search path of a source."""
    from hydra import initialize_config_dir
    from hydra._internal.hydra import Hydra
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    import_own_modules()
    with initialize_config_dir(
        str(source["path"] or CONF), job_name="train", **version_arguments()
    ):
        if source["dir"] is not None:  # as --config-dir does
            loader: Any = GlobalHydra.instance().config_loader()
            searched = loader.get_search_path()
            anchor = SearchPathQuery(provider="schema")
            searched.prepend("command-line", f"file://{source['dir']}", anchor)
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("train", searched)
        yield


@contextlib.contextmanager
def hydra_as_it_was() -> Iterator[None]:
    """Restore Hydra's global state at the end: a notebook may have initialised Hydra itself."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.singleton import Singleton
    from hydra.version import VersionBase

    there: dict[Any, Any] = Singleton._instances
    kinds: tuple[Any, ...] = (GlobalHydra, HydraConfig, VersionBase)
    before = {kind: there.pop(kind) for kind in kinds if kind in there}
    try:
        yield
    finally:
        for kind in kinds:
            there.pop(kind, None)
        there.update(before)
