"""The config of a recorded run, and the overrides that started it."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from regrow.config import command_line, flags, hydra_access, registered
from regrow.config.command_line import key_of
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError, brief
from regrow.record import moved

# About where a run is started and by which package, not about the run.
ELSEWHERE = ("launcher", "sweep", "lab")
MASKS = "segmentation"
CHOICE = re.compile(r"\$\{hydra:runtime\.choices\.(\w+)\}")
ALLOWED = re.compile(r"\$\{(if_chosen:|oc\.select:)?[\w.,]*\}")

log = logging.getLogger("regrow")


def recorded_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the config of the run in `folder`.

    `where` is how the user referred to the run, for messages. Updates `_target_` paths that have
    moved since the run.
    If config.yaml is damaged or lost, uses Hydra's own copy and logs a warning. Raises UserError if
    that is damaged as well.
    """
    try:
        return _checked(read_yaml(folder / "config.yaml"))
    except Exception as error:  # the YAML reader may raise almost any exception
        reason = brief(error, 200)
    copy = folder / ".hydra" / "config.yaml"
    try:
        text = copy.read_text(encoding="utf-8")
        recorded = read_yaml(copy.with_name("hydra.yaml"))
        choices = recorded.get("hydra", recorded)["runtime"]["choices"]
        unresolved = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        with hydra_access.choices_are(choices):
            resolved = OmegaConf.create(_with_choices(unresolved, choices))
            config = _checked(OmegaConf.to_container(resolved, resolve=True))
    except Exception:
        raise UserError(
            f"{where}: its config.yaml cannot be read: {reason}, and neither can its copy in "
            f".hydra. Its weights can start a new run: {shlex.quote(f'init_from={folder}')}"
        ) from None
    log.warning("%s: its config.yaml is not read: %s. Its copy in .hydra is used.", where, reason)
    return config


def followed(folder: Path) -> list[str]:
    """Return what resuming the run in `folder` uses of its record: see `job.as_recorded`."""
    places = flags.followed_places(flags.recorded(folder))
    return [*recorded_overrides(folder), *places, *registered.recorded(folder)]


def recorded_overrides(folder: Path) -> list[str]:
    """Return the overrides that started the run in `folder`. Raises UserError if unreadable."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        return overrides_in(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = brief(error)
        raise UserError(
            f"resume={folder}: {path} cannot be read: {reason}. To resume, repeat the command in "
            "manifest.json with " + command_line.shell([f"hydra.run.dir={folder}"])
        ) from None


def overrides_in(text: str) -> list[str]:
    """Return the overrides in the text of an overrides.yaml. Raises ValueError or YAMLError."""
    overrides = yaml.safe_load(text) or []
    if not isinstance(overrides, list):
        raise ValueError("a list of overrides is expected")
    return [str(override) for override in overrides]


def is_of_the_launcher(override: str) -> bool:
    """Return True if an override is of the group launcher or sweep, which no run records."""
    return key_of(override).split(".")[0] in ELSEWHERE


def holds_run(folder: Path) -> bool:
    """Return True if the folder has the config of a run, or Hydra's copy of a lost one."""
    return any((folder / name).is_file() for name in ("config.yaml", ".hydra/config.yaml"))


def refuse_other_folder(folder: Path, given: Path | None = None) -> None:
    """Raise UserError, which names the folder as `given`, if it holds no run. Needs no torch."""
    if not holds_run(folder):
        if (folder / "sweep.json").is_file():
            raise UserError(
                f"run={given or folder}: not a run's folder (it is a sweep's folder). Give one of "
                f"its runs, such as {given or folder}/0; its table and sweep.html name the best."
            )
        what = "there is no such folder" if not folder.is_dir() else "it holds no config.yaml"
        raise UserError(
            f"run={given or folder}: not a run's folder ({what}). Give the folder that a run "
            "printed at its start, such as outputs/digits/latest."
        )


def as_shown(given: str, folder: Path) -> str:
    """Return a run's folder as it was given, with the folder's own name if that was a link."""
    return given if Path(given).name == folder.name else f"{given} ({folder.name})"


def gives_masks(folder: Path) -> bool:
    """Return True if the run in `folder` is a segmentation; False if its config is unreadable."""
    try:
        kind: object = _checked(read_yaml(folder / "config.yaml"))["data"].get("target_kind")
    except Exception:  # reported when the run is loaded
        return False
    return kind == MASKS


def _with_choices(value: Any, choices: Mapping[str, Any]) -> Any:
    """Return a value of a config with the options of the run in place of `${hydra:…}`.

    Allows `${key}`, `${if_chosen:…}` and `${oc.select:…}`. Raises ValueError for others, e.g.
    oc.env, as the folder may be untrusted.
    """
    if isinstance(value, dict):
        return {key: _with_choices(each, choices) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_choices(each, choices) for each in value]
    if isinstance(value, str):
        value = CHOICE.sub(lambda found: str(choices[found[1]]), value)
        if "${" in ALLOWED.sub("", value):
            raise ValueError("it refers to more than its own keys")
    return value


def _checked(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}")
    for group in ("data", "model", "task", "loss", "trainer"):
        if not isinstance(config.get(group), dict):
            raise ValueError(f"it has no section {group}; is this a run's folder?")
    return moved.in_config(config)
