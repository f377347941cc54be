"""`key=value` arguments of the scripts that are not Hydra apps, parsed without torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from regrow.config.command_line import PATHS
from regrow.config.rules import Rule, integer, number
from regrow.config.yaml_files import plain_value
from regrow.errors import UserError, did_you_mean

KINDS = {
    "boolean": Rule("true or false", {"type": "boolean"}),
    "integer": integer(1),
    "count": integer(0),
    "number": Rule("a number of at least 0", number(0).schema),
}


@dataclass(frozen=True)
class Option:
    """One key. `kind` is text, integer (1 or more), count (0 or more), number or boolean."""

    help: str
    default: Any = None
    kind: str = "text"
    choices: Sequence[str] = ()
    required: bool = False


@dataclass(frozen=True)
class Arguments:
    values: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)  # of `data.<key>=…`, by dotted key

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def parse(
    arguments: Sequence[str], options: Mapping[str, Option], *, text: str, takes_data: bool = False
) -> Arguments:
    """Parse a command line. `--help` prints `text` and the options, and exits.

    Raises UserError for an unknown option or an invalid value.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        with contextlib.suppress(BrokenPipeError):  # `| head -1` closes the pipe early
            print(usage(options, text, takes_data=takes_data))
        sys.exit(0)
    values = {key: option.default for key, option in options.items()}
    data: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"{argument}: arguments are key=value. --help lists the keys.")
        if takes_data and key.startswith("data."):
            is_path = key in PATHS and os.path.lexists(value)  # literally, as train.py takes it
            data[key.removeprefix("data.")] = value if is_path else _plain(key, value)
        elif key not in options:
            known = f"{', '.join(options)}{' and data.…' if takes_data else ''}"
            rest = "; everything else comes from the run" if "run" in options else ""
            raise UserError(
                f"{key}: there is no such key.{did_you_mean(key, options)} "
                f"There are {known or 'none'}{rest}."
            )
        else:
            values[key] = _value(key, value, options[key])
    for key, option in options.items():
        if option.required and values[key] in (None, ""):
            raise UserError(f"{key} must be given: add {key}=…")
    return Arguments(values, data)


def usage(options: Mapping[str, Option], text: str, *, takes_data: bool = False) -> str:
    lines = [text.strip(), ""]
    for key, option in options.items():
        default = "" if option.default is None else f" [{_shown(option.default)}]"
        lines.append(f"  {key + '=…':14} {option.help}{default}")
    if takes_data:
        lines.append("  data.<key>=…   another value for a key of the data, such as data.root")
    return "\n".join(lines)


def _value(key: str, value: str, option: Option) -> Any:
    if option.choices and value not in option.choices:
        raise UserError(f"{key}={value} must be one of {', '.join(option.choices)}.")
    if option.kind == "text":
        return value
    read, rule = _plain(key, value), KINDS[option.kind]
    if not rule.allows(read):
        raise UserError(f"{key}={value} must be {rule.says}.")
    return float(read) if option.kind == "number" else read


def _plain(key: str, value: str) -> Any:
    try:
        return plain_value(value) if value else ""
    except yaml.YAMLError:
        raise UserError(
            f"{key}={value} cannot be read. Put special characters in quotes."
        ) from None


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
