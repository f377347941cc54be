"""A result that was measured before: where its new numbers differ, and where it is kept."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regrow.record.locks import wait_for
from regrow.record.records import as_json, write_bytes, write_text

# Facts of an evaluation that make it another one, with their words; `swapped` are keys of the data.
FACTS = {"step": "step", "examples": "examples", "swapped": "data", "device": "device",
         "precision": "precision"}  # fmt: skip
NUM_SHOWN = 4  # metrics that a line names; the others are counted


def write_over(path: Path, content: Mapping[str, Any]) -> str:
    """Write an evaluation as JSON; an earlier one of other numbers stays beside it, numbered.

    `content` holds `values` and facts such as `step`. Returns a line on how it compares with the
    earlier one, or "" without one. evaluation_test.json becomes evaluation_test.1.json, unless a
    numbered file has its bytes already. Raises OSError.
    """
    text = as_json(content)
    with _alone(path.parent):
        # A link in a foreign folder may lead to a secret, which a copy would show.
        is_there = path.is_file() and not path.is_symlink()
        before = path.read_bytes() if is_there else None
        line = "" if before is None else _line(path.name, before, json.loads(text))
        if before is not None and line:
            line = f"{path.name}: {line}; the earlier one is in {_kept(path, before).name}"
        elif before is not None:
            line = f"{path.name}: as before"
        write_text(path, text)
    return line


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let two evaluations write one after the other, on file systems that can lock a folder.

    The lock is the folder's own: a run that trains holds that of its file for hours.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not readable, or a file system without such locks
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            wait_for(descriptor, f"the folder {folder}")
        yield


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return where the metrics that both have differ: `accuracy was 0.93, is 0.95; …`; or ""."""
    names = [key for key in old if key in new and repr(old[key]) != repr(new[key])]
    # Those of a whole set first, and the loss after the metrics.
    names.sort(key=lambda key: (key.count("/") > 1, key.endswith("/loss")))
    parts = [
        f"{key.partition('/')[2] or key} was {one}, is {other}"
        for key, (one, other) in ((key, _shown(old[key], new[key])) for key in names[:NUM_SHOWN])
    ]
    if rest := len(names) - len(parts):
        parts.append(f"{rest} more differ{'s'[: rest == 1]}")
    return "; ".join(parts)


def _line(name: str, before: bytes, new: Mapping[str, Any]) -> str:
    """Return how an earlier file differs, or "" if values and facts are equal."""
    try:
        old = json.loads(before)
        found = [differences(old["values"], new["values"])]
        for which, keys in (
            ("not measured before", new["values"].keys() - old["values"].keys()),
            ("no longer measured", old["values"].keys() - new["values"].keys()),
        ):
            found += [f"{which}: {', '.join(sorted(keys))}"] if keys else []
        found += [
            f"{words} was {_plain(old[key])}, is {_plain(new[key])}"
            for key, words in FACTS.items()
            if key in old and key in new and old[key] != new[key]
        ]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "it was not readable"
    return "; ".join(part for part in found if part)


def _kept(path: Path, content: bytes) -> Path:
    """Return the numbered file beside `path` that holds `content`; writes it if there is none."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        with contextlib.suppress(OSError):
            if kept.is_file() and kept.read_bytes() == content:
                return kept
        number += 1
    write_bytes(kept, content)
    return kept


def _shown(old: Any, new: Any) -> tuple[str, str]:
    """Return two values with five digits, or with all if these would look equal."""
    pair = tuple(f"{it:.5g}" if isinstance(it, float) else _plain(it) for it in (old, new))
    return (pair[0], pair[1]) if pair[0] != pair[1] else (repr(old), repr(new))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"data.{key}={one}" for key, one in value.items()) or "the run's own"
    return str(value)
