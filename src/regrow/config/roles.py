"""Check which targets a recorded config may instantiate.

A folder may come from anyone, and a `_target_` can name any installed function. So a target is
allowed only if a file in `conf/` names it for that group, or if it is a class of the group's own
kind, such as an `nn.Module` for the model. A list of trusted packages is not enough: torch itself
has functions that run a shell. Testing a class's kind imports its module, which executes it. So
modules in the run's folder or in Python's standard library are not imported.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from regrow.config import places
from regrow.config.leads import RECIPES
from regrow.config.targets import HYDRAS_OWN, locate
from regrow.config.yaml_files import readable
from regrow.dotted import Config
from regrow.errors import UserError
from regrow.project import CONF, ROOT

# The nodes where any class of a kind is allowed.
KINDS = {
    "model": ("torch.nn.Module",),
    "loss": ("torch.nn.Module",),
    "data.augmentation": ("torch.nn.Module",),
    "data.transforms": ("torch.nn.Module",),
    "data.mixing": ("regrow.feeding.mixing.Mix",),
    "task.extra_metrics": ("torchmetrics.Metric",),
    "optimizer": ("torch.optim.Optimizer",),
    "scheduler": ("torch.optim.lr_scheduler.LRScheduler", "timm.scheduler.scheduler.Scheduler"),
}
# The parts of torchmetrics that only compute. Others load models, some from the network.
PURE_METRICS = tuple(
    f"torchmetrics.{part}"
    for part in ("aggregation", "classification", "clustering", "nominal", "regression")
)


def check_roles(
    config: Mapping[str, Config],
    groups: Collection[str],
    folder: Path,
    where: str,
    typed: Collection[str] = (),
    others: Collection[Path] = (),
    named: Collection[tuple[str, Any]] = (),
) -> None:
    """Raise UserError for the first target that does not belong in its place, or interpolation.

    Checks targets in the `groups` that are about to be instantiated. A recorded config is resolved,
    so any interpolation below the top level is an error.

    `folder` is the run's, and `where` names it as the user did, such as run=outputs/digits/latest.
    The targets of `typed` nodes are the user's own and allowed; those of nodes below are not. Files
    in `others`, which the user named, count like those of conf/, and so do the `named` pairs of a
    node and a target.
    """
    for path, key, value in entries_of(config, ""):
        # Check all groups: they may refer to each other. Top-level values are never instantiated.
        if isinstance(value, str) and "${" in value and path:
            full = f"{path}.{key}".lstrip(".")
            raise UserError(
                f"{where}: its config.yaml has {full}={value}, where a plain value is expected. It "
                "is not instantiated."
            )
    for group in groups:
        for path, key, value in entries_of(config.get(group), group):
            if key.startswith("_") and key.endswith("_") and key not in HYDRAS_OWN:
                raise UserError(
                    f"{where}: its config.yaml has {path}.{key}, which is not a key of a run's."
                )
            if key != "_target_" or path in typed:
                continue
            if isinstance(value, str) and not is_apart(value, folder.resolve()):
                raise UserError(
                    f"{where}: its config.yaml has {path}._target_={value}, from a module in the "
                    "run's own or the current folder. It is not imported."
                )
            if isinstance(value, str) and any(value in listed(group, each) for each in others):
                continue
            if isinstance(value, str) and (path, value) in named:
                continue
            if not _fits(value, group, path):
                raise UserError(
                    f"{where}: its config.yaml has {path}._target_={value}, which no file in "
                    f"conf/{group} names. It is not instantiated. If it is yours, add such a file."
                )


def is_apart(target: str, folder: Path) -> bool:
    """Return True if a target's module is in neither the run's nor the current folder.

    The repository's root is allowed as current folder. Imports nothing.
    """
    try:
        spec = importlib.util.find_spec(target.partition(".")[0])
    except (ImportError, ValueError):
        return False
    if spec is None or spec.origin in ("built-in", "frozen"):
        return True
    found = spec.submodule_search_locations or [spec.origin or ""]
    places = [Path(place).resolve() for place in found]
    return not any(
        place.is_relative_to(folder)
        or folder.is_relative_to(place)
        or place.parent == Path.cwd() != ROOT
        for place in places
    )


def _fits(target: Any, group: str, path: str) -> bool:
    if not isinstance(target, str):
        return False
    if any(target in listed(group, place) for place in places.folders()):
        return True
    if target.partition(".")[0] in sys.stdlib_module_names or "__" in target:
        return False  # has no class of these kinds; importing some modules has side effects
    kinds = [kind for place, kind in KINDS.items() if f"{path}.".startswith(f"{place}.")]
    if not kinds:
        return False
    found = locate(target, path)
    module = str(getattr(found, "__module__", ""))
    if module.startswith("torchmetrics.") and not module.startswith(PURE_METRICS):
        return False
    # If a kind's package is not imported by now, `found` cannot be a subclass.
    there = [kind for kind in kinds[0] if kind.partition(".")[0] in sys.modules]
    return inspect.isclass(found) and any(issubclass(found, locate(k, path)) for k in there)


@functools.cache
def listed(group: str, place: Path = CONF) -> frozenset[str]:
    """Return the targets that the files of `conf/`, or of another place, name for a group."""
    # Elsewhere read only these folders: a place such as the current folder may hold runs.
    parts = [place] if place == CONF else [place / each for each in (group, *RECIPES)]
    found = set()
    for file, content in (each for part in parts for each in readable("**/*.yaml", part)):
        node = content if file.parent.name == group else content.get(group)
        found |= {value for _, key, value in entries_of(node, group) if key == "_target_"}
    return frozenset(value for value in found if isinstance(value, str))


def entries_of(node: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (dotted path of the node, key, value) of everything below."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield path, str(key), value
            yield from entries_of(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield path, str(index), value
            yield from entries_of(value, f"{path}.{index}")
