"""Compare the values of a config with the ranges of `rules`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from regrow.config import leads
from regrow.config.command_line import shell
from regrow.config.rules import RULES, applies, refusal
from regrow.dotted import Config, walk
from regrow.errors import UserError

OF_SEVERAL = ("model", "optimizer", "scheduler")  # may hold nodes by name: see `lab.several`


def check_ranges(values: Mapping[str, Config]) -> None:
    """Raise UserError for the first value of a config, or of a part of one, outside its range."""
    for prefix, part in _parts(values):
        there = dict(walk(part, closed=RULES))
        for path in (path for path in RULES if path in there):  # reports a value's owner first
            value = there[path]
            is_text = isinstance(value, str) and "${" in value  # resolved elsewhere
            is_known = not is_text and applies(_node_of(part, path).get("_target_"))
            if is_known and not RULES[path].allows(value):
                full = f"{prefix}{path.partition('.')[2]}" if prefix else path
                said = refusal(full, value, RULES[path])
                raise UserError(leads.as_shape(f"{full}={value}") or said + _as_column(path, value))


def _parts(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a config without its groups of several nodes, and each of these nodes as if alone."""
    several = {
        group: node
        for group in OF_SEVERAL
        if isinstance(node := values.get(group), Mapping) and "_target_" not in node
    }
    yield "", {key: value for key, value in values.items() if key not in several}
    for group, nodes in several.items():
        for name, node in nodes.items():
            yield f"{group}.{name}.", {group: node}


def _as_column(path: str, value: Any) -> str:
    if path != "data.sampling" or not isinstance(value, str):
        return ""
    return f" For a column of that name: {shell([f'{path}={{column: {value}}}'])}"


def _node_of(values: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    for key in path.split(".")[:-1]:
        values = values[key]
    return values
