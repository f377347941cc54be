"""Find the file and line that a value of the composed config comes from.

Only errors and `--check` ask: a good start composes once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.config import flags, places
from regrow.config.command_line import key_of
from regrow.config.composition import composition, defaults_of, hydra_as_it_was
from regrow.config.entries import repeated
from regrow.config.hydra_access import typed_overrides, without_hydra
from regrow.config.yaml_keys import choices_of, keys_of
from regrow.dotted import Config, walk
from regrow.project import ROOT

TYPED = "command line"
_HOPS = 9  # of interpolations, which may form a circle


@dataclass(frozen=True)
class Layer:
    """The keys that one file, or one node of the ConfigStore, sets, each with where that is."""

    prefix: str
    keys: Mapping[str, str]
    chooses: Mapping[str, str]  # the line of the defaults list, by group

    def sets(self, key: str) -> str | None:
        """Return where this layer sets the dotted `key`, or a list or mapping that holds it."""
        if self.prefix and not key.startswith(f"{self.prefix}."):
            return None
        below = key.removeprefix(f"{self.prefix}." if self.prefix else "")
        while below not in self.keys and "." in below and below.rpartition(".")[2].isdigit():
            below = below.rpartition(".")[0]
        return self.keys.get(below)


@dataclass(frozen=True)
class Origins:
    layers: Sequence[Layer]  # in the order in which they are merged
    typed: Collection[str]  # keys
    chosen: Collection[str]  # groups whose option was typed
    config: Mapping[str, Config]  # composed, with its interpolations
    choices: Mapping[str, Any]  # the chosen options, by group

    def of(self, key: str, hops: int = _HOPS) -> str | None:
        """Return `file:line` of a key's value, TYPED, or a node of the ConfigStore; or None.

        A value that is another key's, by interpolation, comes from where that one is set.
        """
        value = self._value(key)
        if value == "???":
            return None
        if hops and (other := repeated(key, value)) and (place := self.of(other, hops - 1)):
            return place
        if any(key == typed or key.startswith(f"{typed}.") for typed in self.typed):
            return TYPED
        places_of = (layer.sets(key) for layer in reversed(self.layers))
        return next((place for place in places_of if place is not None), None)

    def of_call(self, node: str, said: str) -> str | None:
        """Return where the argument comes from that an error of the node's target names.

        `said` are the error's words. Without such an argument, where `_target_` comes from, unless
        some argument was typed, which may be the cause.
        """
        its: Any = self.config
        for part in node.split("."):
            its = its[int(part) if isinstance(its, list) else part]
        quoted = re.findall(r"['\"](\w+)['\"]", said)
        named = [word for word in (*quoted, *re.findall(r"\w+", said)) if word in its]
        if not named and any(typed.startswith(f"{node}.") for typed in self.typed):
            return TYPED
        return self.of(f"{node}.{[*named, '_target_'][0]}")

    def chose(self, group: str) -> str:
        """Return TYPED, or the last line of a defaults list that chooses an option of the group."""
        of_files = (
            layer.chooses[group] for layer in reversed(self.layers) if group in layer.chooses
        )
        return TYPED if group in self.chosen else next(of_files, TYPED)

    def _value(self, key: str) -> Any:
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node


def origins(source: Mapping[str, Any], overrides: Sequence[str]) -> Origins:
    """Return where the values come from that `source` (see `flags`) and `overrides` compose.

    Raises Hydra's errors.
    """
    from hydra.core.hydra_config import HydraConfig

    with hydra_as_it_was():
        config = composition(source, overrides)
        HydraConfig.instance().set_config(config)  # tells `places` the search path
        found = defaults_of(source, overrides)
        layers = [layer for default in found.defaults for layer in _layer(default)]
        plain, choices = _plain(config)
    typed = {override.key_or_group for override in found.config_overrides}
    named = (key_of(override).partition("@")[0] for override in overrides)
    groups = {key for key in named if key in choices and key not in typed}
    return Origins(layers, typed, groups, plain, choices)


def composed(
    source: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the composed config with its interpolations, and the chosen options by group.

    Raises Hydra's errors.
    """
    with hydra_as_it_was():
        return _plain(composition(source, overrides))


def _plain(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    from omegaconf import OmegaConf

    plain: Any = OmegaConf.to_container(without_hydra(config), resolve=False)
    choices: Any = OmegaConf.to_container(config.hydra.runtime.choices, resolve=False)
    return plain, choices


def _is_typed(key: str, overrides: Sequence[str]) -> bool:
    """Return True if an override gives the key a value of its own, not by an interpolation."""
    values = [
        value
        for name, equals, value in (override.partition("=") for override in overrides)
        if equals and name.lstrip("+") == key
    ]
    return bool(values) and not any("${" in value for value in values)


def _layer(default: Any) -> Iterator[Layer]:
    path = str(default.config_path or "")
    if path.startswith("hydra/") or not path:
        return
    group, _, option = path.rpartition("/")
    file, prefix = places.file_of(group, option), str(default.package or "")
    if file is not None:
        keys = {name: f"{shown(file)}:{key.line}" for name, key in keys_of(file).items()}
        lines = {choice.group: f"{shown(file)}:{choice.line}" for choice in choices_of(file)}
        yield Layer(prefix, keys, lines)
    elif isinstance(node := places.stored(f"{path.removesuffix('.yaml')}.yaml"), dict):
        yield Layer(prefix, {key: f"ConfigStore node {path}" for key, _ in walk(node)}, {})


def shown(file: Path) -> str:
    """Return a file's name as the user knows it, also from a sweep's copy of the code."""
    copied = flags.copied_source(ROOT)
    for name, folder in flags.folders_of(copied).items() if copied else ():
        copy = ROOT / flags.COPIES / name
        if file.is_relative_to(copy):
            file = folder / file.relative_to(copy)
    for root in (ROOT, Path.cwd()):
        if file.is_relative_to(root):
            return str(file.relative_to(root))
    return str(file)


def located(message: str) -> str:
    """Return an error about a key with the file and line of its value before it.

    Unchanged for a value from the command line, and where no file sets the key. Hydra's config of
    this process must be set.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    lines = [*typed_overrides(hydra.overrides.hydra), *typed_overrides(hydra.overrides.task)]
    return located_in(message, flags.source_of(hydra), lines)


def located_in(message: str, source: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Return what `located` does, for a config composed from `source` and `overrides`."""
    found = re.match(r"([A-Za-z_]\w*(?:\.[\w*-]+)*)(?=[=:, ])", message)
    if found is None or found[1].split(".")[0] == "hydra":
        return message  # a key of Hydra's is in files of its own, which no layer holds
    key, rest = found[1], message[found.end() :]
    called = re.match(r" \([\w.]+(?:, [^)]*)?\):", rest)  # a target, and where it failed
    option = re.match(r"=([\w-]+)", rest)
    is_group = places.is_group(key)
    if not called and ((is_group and not option) or _is_typed(key, overrides)):
        return message  # composing again would take as long as the start
    place = None
    with contextlib.suppress(Exception):  # the error itself matters more than its place
        its = origins(source, overrides)
        if called:
            place = its.of_call(key, rest[called.end() :])
        elif not is_group:
            place = its.of(key)
        elif re.match(r"=[\w-]+ needs (?:outputs|the model)", rest):
            place = its.of("model._target_")  # the model is at fault, not the choice of the task
        elif option and its.choices.get(key) == option[1]:
            place = its.chose(key)
    return message if place in (None, TYPED) else f"{place}: {message}"
