"""Several models, optimizers or schedules by name. One of each is the common case.

If `model`, `optimizer` or `scheduler` is a mapping of names without `_target_`, there is one per
name. Each optimizer updates the model of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from regrow.dotted import Checked, Config
from regrow.errors import UserError

T = TypeVar("T")


class Models(nn.ModuleDict):
    """Models by name. A step calls them one by one: `state.model["generator"](noise)`."""


def by_name(value: Any) -> dict[str, Any]:
    """Return several things by name; a single one has the empty name."""
    if isinstance(value, Models):
        return dict(value.items())
    return value if isinstance(value, dict) else {"": value}


def one_or_all(found: dict[str, T]) -> T | dict[str, T]:
    """Return the single thing, or all of them by name: the reverse of `by_name`."""
    return found.get("", found)


def full(kind: str, name: str, separator: str = ".") -> str:
    """Return the name of a checkpoint's part or a rate, such as model.generator or model alone."""
    return f"{kind}{separator}{name}" if name else kind


def names_in(node: Mapping[str, Config]) -> list[str]:
    """Return the names of the several things that a node of a config describes; [""] for one."""
    return [""] if "_target_" in node else [str(name) for name in node]


def each(node: Mapping[str, Any], make: Callable[[Mapping[str, Any]], T]) -> dict[str, T]:
    """Return what `make` makes of a node, or of each of the nodes below it, by name."""
    return {name: make(node[name] if name else node) for name in names_in(node)}


def refuse_foreign(patterns: Iterable[str], key: str, names: Collection[str]) -> None:
    """Raise UserError for a module pattern that does not begin with the name of a model."""
    for pattern in patterns:
        if pattern.partition(".")[0] not in names:
            raise UserError(
                f"{key}: {pattern} must begin with the name of a model, such as "
                f"{next(iter(names))}.*. The models are {', '.join(names)}."
            )


def check(config: Checked) -> None:
    """Raise UserError unless the names of models, optimizers and schedules fit together."""
    models, optimizers, schedulers = (
        names_in(config[group]) for group in ("model", "optimizer", "scheduler")
    )
    for group, names, others, whose in (
        ("optimizer", optimizers, models, "model"),
        ("scheduler", schedulers, optimizers, "optimizer"),
    ):
        if names != [""] and set(names) != set(others):
            raise UserError(
                f"{group}: it names {', '.join(names)}, and {whose} names "
                f"{', '.join(filter(None, others)) or 'none'}. Use the same names, or one {group} "
                "with a _target_ for all."
            )
    if models != [""]:
        task = config["task"]
        if task.get("evaluates") not in models:
            see = (
                ""
                if "evaluates" in task
                else " The shipped tasks lack this key: see docs/recipes/several_models.md."
            )
            raise UserError(
                f"task.evaluates={task.get('evaluates')} must name the model that is evaluated and "
                f"kept: {' or '.join(models)}.{see}"
            )
