"""What a config that came with a run's folder may make: nothing but what belongs in its place.

A folder may come from anybody, and a `_target_` can name any function that is installed. So a
target is made only if a file in `conf/` names it for that group, or if it is a class of the role's
own kind, such as an `nn.Module` in the model's place. No list of trusted packages would do: torch
itself holds functions that run a shell.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from regrow.check import locate
from regrow.config import CONF, read_yaml
from regrow.errors import UserError

# Where any class of a kind is in its place.
KINDS = {
    "model": "torch.nn.Module",
    "loss": "torch.nn.Module",
    "data.augmentation": "torch.nn.Module",
    "optimizer": "torch.optim.Optimizer",
}


def check_roles(config: Mapping[str, Any], groups: tuple[str, ...], where: str) -> None:
    """Raise UserError for the first target, in the groups that are about to be made, that is
    foreign to its place, and for an interpolation, which a recorded config has none of.

    `where` names the folder as the user did, such as run=outputs/digits/latest.
    """
    for group in groups:
        for path, key, value in _entries(config.get(group), group):
            if isinstance(value, str) and "${" in value:
                raise UserError(
                    f"{where}: its config.yaml has {path}.{key}={value}, where a plain value "
                    "is expected. It is not made."
                )
            if key == "_target_" and not _fits(value, group, path):
                raise UserError(
                    f"{where}: its config.yaml has {path}._target_={value}, which no file in "
                    f"conf/{group} names. It is not made. If it is yours, add such a file."
                )


def _fits(target: Any, group: str, path: str) -> bool:
    if not isinstance(target, str):
        return False
    if target in listed(group):
        return True
    kinds = [kind for place, kind in KINDS.items() if f"{path}.".startswith(f"{place}.")]
    if not kinds:
        return False
    found = locate(target, path)
    return inspect.isclass(found) and issubclass(found, locate(kinds[0], path))


@functools.cache
def listed(group: str) -> frozenset[str]:
    """The targets that this repository's own `conf/` names for a group."""
    found = set()
    for file in sorted(CONF.rglob("*.yaml")):
        content = read_yaml(file)
        node = content if file.parent.name == group else content.get(group)
        found |= {value for _, key, value in _entries(node, group) if key == "_target_"}
    return frozenset(value for value in found if isinstance(value, str))


def _entries(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path of the node, key, value) of everything below."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield path, str(key), value
            yield from _entries(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield path, str(index), value
            yield from _entries(value, f"{path}.{index}")
