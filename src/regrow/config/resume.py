"""Expand `resume=<folder>` to the command line that resumes its run or sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config import command_line, flags, older, places, registered
from regrow.config.changed_data import CHANGED
from regrow.config.command_line import key_of
from regrow.config.composition import composition, hydra_as_it_was
from regrow.config.foreign import downloads_elsewhere, is_foreign, is_own, without_loggers
from regrow.config.leads import RECIPES
from regrow.config.recorded import holds_run, recorded_overrides
from regrow.errors import UserError, printable
from regrow.record import moved, ownership
from regrow.record.ownership import SWEEP
from regrow.record.records import read_json
from regrow.record.redact import MASK


def expand(arguments: Sequence[str]) -> list[str]:
    """Expand `resume=<folder> …` to the run's recorded overrides, the new ones, and its folder.

    Returns any other command line unchanged. Raises UserError for a folder without a run.
    """
    arguments = ownership.take_trust(arguments)
    named = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("auto", "never"):
        return list(arguments)
    folder = Path(command_line.path_of("resume", named[-1]))
    given, new = flags.split([a for a in arguments if not a.startswith("resume=")])
    if (folder / SWEEP).is_file():
        _refuse_other_place(folder, "hydra.sweep.dir", new)
        return expand_sweep(folder, [*given, *new])
    _refuse_other_place(folder, "hydra.run.dir", new)
    if not (holds_run(folder) or (folder / ".hydra" / "overrides.yaml").is_file()):
        raise UserError(
            f"resume={folder}: there is no run in that folder. Give the folder that a run printed "
            "at its start, such as outputs/digits/latest."
        )
    if any(a in flags.MULTIRUN for a in arguments):
        raise UserError(f"resume={folder} resumes one run. Leave out --multirun.")
    recorded_lines = [moved.in_text(a) for a in recorded_overrides(folder)]
    added = {key_of(a) for a in recorded_lines if a.startswith("+")}
    # ~key takes a recorded +key away again, so that one must stay in front of it.
    keys = {key_of(a) for a in new if not (a.startswith("~") and key_of(a) in added)}
    keys |= {*older.removed(_recorded_config(folder)), CHANGED}
    old = [a for a in recorded_lines if key_of(a) not in keys]
    if own := is_own(folder):
        registered.take_up(folder / ".hydra")
    for override in old:  # the folder may come from someone else
        if is_foreign(override, may_refer=own):
            raise UserError(
                f"resume={folder}: its overrides.yaml has {override}, which is none of a run's own "
                "keys. It is not followed."
            )
    if not own:
        old = without_loggers(folder, old)
        if downloads_elsewhere(folder, _recorded_config(folder), keys):
            old.append("data.source.download=false")
    chosen = flags.followed(
        f"resume={folder}", flags.recorded(folder), flags.typed(arguments), is_own=own
    )
    new = [line for line in new if key_of(line) != flags.SEARCH_PATH]
    old = _without_lacked(folder, old, new, chosen)
    refuse_masked(folder, old)
    given = [*flags.others(given), *flags.arguments_of(chosen)]
    place = command_line.override("hydra.run.dir", folder.resolve())
    return [*given, *old, command_line.override("resume", folder), *new, place]


def expand_sweep(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return the sweep's overrides, the new ones, and its folder. Its frozen code runs again."""
    given, new = flags.split(arguments)
    named, folder = folder, Path(os.path.relpath(folder.resolve()))  # the link `latest` may move
    ownership.check_sweep(folder, f"resume={named}")  # before Hydra reads the folder
    registered.take_up(folder / ownership.CODE)
    content = read_json(folder / SWEEP)
    keys = {key_of(a) for a in new}
    before = content.get("overrides", [])
    if "launcher" not in keys:  # a different launcher has different options
        before = [*before, *content.get("launcher", [])]
    old = [str(a) for a in before if key_of(str(a)) not in (*keys, CHANGED)]
    refuse_masked(folder, old)
    source, code = flags.of_sweep(folder), folder / ownership.CODE
    if flags.copied_source(code) is not None:
        source = flags.in_copy(source, code)
    chosen = flags.followed(f"resume={folder}", source, flags.typed([*given, *new]), is_own=True)
    old, new = ([a for a in its if key_of(a) != flags.SEARCH_PATH] for its in (old, new))
    given = [a for a in flags.others(given) if a not in flags.MULTIRUN]
    return [
        "-m",
        *given,
        *flags.arguments_of(chosen),
        *old,
        *new,
        command_line.override("hydra.sweep.dir", folder),
    ]


def _refuse_other_place(folder: Path, key: str, new: Sequence[str]) -> None:
    """Raise UserError if `new` names another folder under `key`, which a resume does not take."""
    for line in new:
        named = line.partition("=")[2]
        if key_of(line) == key and Path(command_line.path_of(key, named)).resolve() != (
            folder.resolve()
        ):
            raise UserError(
                f"{line}: resume={folder} writes to {folder}. Leave out {key}, or copy the folder "
                "and resume the copy."
            )


def _without_lacked(
    folder: Path, old: Sequence[str], new: Sequence[str], source: Mapping[str, Any]
) -> list[str]:
    """Return the recorded overrides without keys that newly typed options of groups lack.

    Prints a line about those, which Hydra would refuse although nobody has typed them now.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = [key_of(line) for line in new if places.is_group(key_of(line))]
    below = tuple(f"{group.replace('/', '.')}." for group in groups if group not in RECIPES)
    asked = [a for a in old if key_of(a).startswith(below) and not a.startswith(("+", "~"))]
    if not asked:
        return list(old)
    try:
        with hydra_as_it_was():
            config = composition(source, [*(a for a in old if a not in asked), *new])
    except (HydraException, OmegaConfBaseException):
        return list(old)  # Hydra will report it
    values = OmegaConf.to_container(config)
    lacked = [a for a in asked if _lacks(values, key_of(a))]
    for group in groups:
        if its := [a for a in lacked if key_of(a).startswith(f"{group.replace('/', '.')}.")]:
            print(
                f"note: resume={folder}: the {group} that was chosen now lacks what the run's "
                f"command sets, which is left out: {printable(', '.join(its))}",
                file=sys.stderr,
            )
    return [a for a in old if a not in lacked]


def _lacks(values: Any, key: str) -> bool:
    """Return True if a mapping on the way to a dotted key lacks the next part."""
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return False
        if part not in values:
            return True
        values = values[part]
    return False


def refuse_masked(folder: Path, overrides: Sequence[str]) -> None:
    for override in overrides:
        if MASK in override:
            raise UserError(
                f"resume={folder}: the value of {key_of(override)} was taken for a secret and not "
                f"recorded. Give it again: {key_of(override)}=…"
            )


def _recorded_config(folder: Path) -> dict[str, Any]:
    return moved.in_config(places.read(folder / "config.yaml"))
