"""Refuse to resume a run whose data has changed, unless the user accepts it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config import command_line
from regrow.config.command_line import key_of, typed
from regrow.errors import UserError
from regrow.record import manifest

log = logging.getLogger(__name__)

CHANGED = "data.changed"


def refuse_other_data(
    folder: Path, fingerprint: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the splits whose content changed since the run began, each with both fingerprints.

    Raises UserError if there are any, unless `data.changed=accept` was typed for this start.
    """
    before = recorded_data(folder)
    changed = {
        name: {"was": before.get(name), "is": fingerprint.get(name)}
        for name in {**fingerprint, **before}
        if before and fingerprint.get(name) != before.get(name)
    }
    now = typed(overrides)
    values = [o.partition("=")[2] for o in now if key_of(o) == CHANGED]
    if changed and values[-1:] != ["accept"]:
        shown = "; ".join(
            _change_of(name, both["was"], both["is"]) for name, both in changed.items()
        )
        more = [o for o in now if key_of(o) != CHANGED] if now != [*overrides] else []
        typed_now = command_line.shell(
            [command_line.override("resume", folder), *more, f"{CHANGED}=accept"]
        )
        raise UserError(
            f"{folder}: the data has changed since that run began ({shown}). Put it back, start a "
            f"new run, or resume with the data as it is now: {typed_now}"
        )
    for name, both in changed.items():
        log.warning("%s=accept: %s", CHANGED, _change_of(name, both["was"], both["is"]))
    return changed


def change_of_split(folder: Path, name: str, fingerprint: Mapping[str, Any]) -> str:
    """Return how a split differs from the one that the run in `folder` recorded; "" if it does not.

    `fingerprint` is the split's. Returns "" also if the run recorded none.
    """
    before = (_latest_data(folder) or {}).get(name)
    if not isinstance(before, dict) or before == fingerprint:
        return ""
    return _change_of(name, before, fingerprint)


def recorded_data(folder: Path) -> dict[str, Any]:
    """Return the data's fingerprint at the run's latest start; empty if it is lost."""
    data = _latest_data(folder)
    if isinstance(data, dict) and all(isinstance(it, dict) for it in data.values()):
        return data
    log.warning(
        "%s: it is unknown whether the data has changed since that run began",
        folder / manifest.NAME,
    )
    return {}


def _latest_data(folder: Path) -> Any:
    recorded = manifest.read(folder)
    for later in recorded.get("resumes", []):
        recorded |= later
    return recorded.get("data")


def _change_of(name: str, before: Any, now: Any) -> str:
    then, today = ((it or {}).get("examples", 0) for it in (before, now))
    if then != today:
        return f"{name}: {then:,} examples then, {today:,} now"
    return f"{name}: other content in {today:,} examples"
