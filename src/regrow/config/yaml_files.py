"""YAML files of a config."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from regrow.project import CONF, ROOT
from regrow.record.redact import redact, redact_all


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads 1e-3 as a number and 2026-11-28 as text, as Hydra does; PyYAML follows YAML 1.1."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as PyYAML has it
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    [*"-+0123456789"],
)


def readable(pattern: str, place: Path = CONF) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the files in `place` that match, each with its mapping.

    Skips unreadable files: a command that does not compose them must not fail, and Hydra names
    those that it does compose.
    """
    for path in sorted(place.glob(pattern)):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
            content = read_yaml(path)
            if isinstance(content, dict):
                yield path, content


def broken_files() -> list[str]:
    """Return the files in conf/ that are not valid YAML, each with the line."""
    found = []
    for path in sorted(CONF.rglob("*.yaml")):
        try:
            read_yaml(path)
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
            line = f":{mark.line + 1}" if mark is not None else ""
            found.append(f"{path.relative_to(ROOT)}{line}")
    return found


def plain_value(text: str) -> Any:
    """Return the value that `text` has behind a key. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        return yaml.load(file, Loader=_Loader) or {}


def redact_yaml(text: str) -> str:
    """Return the text of a YAML file redacted: under a secret key, the whole value.

    In a text alone, a value without quotes ends at its first space or sign.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = plain_value(text)
        masked = redact_all(content)
        return text if masked == content else OmegaConf.to_yaml(OmegaConf.create(masked))
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError):  # such as a tag for an object
        return redact(text)
