"""The config of a recorded run."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError, brief
from regrow.record import moved

MASKS = "segmentation"

log = logging.getLogger("regrow")


def recorded_config(folder: Path, where: str) -> dict[str, Any]:
    """Return the config of the run in `folder`, which `where` names as the user did.

    Targets that have moved since have their names of today.
    If config.yaml is damaged, uses Hydra's own copy and logs a warning. Raises UserError if that is
    damaged as well.
    """
    try:
        return _whole(read_yaml(folder / "config.yaml"))
    except Exception as error:  # the YAML reader raises a dozen different kinds
        reason = brief(error, 200)
    copy = folder / ".hydra" / "config.yaml"
    try:
        text = copy.read_text(encoding="utf-8")
        its = read_yaml(copy.with_name("hydra.yaml"))
        choices = its.get("hydra", its)["runtime"]["choices"]
        choice = r"\$\{hydra:runtime\.choices\.(\w+)\}"
        text = re.sub(choice, lambda found: json.dumps(str(choices[found[1]])), text)
        # The folder may be untrusted: resolve only references to the config's own keys.
        if "${" in re.sub(r"\$\{(if_chosen:|oc\.select:)?[\w.,]*\}", "", text):
            raise ValueError("it refers to more than its own keys")
        config = _whole(OmegaConf.to_container(OmegaConf.create(text), resolve=True))
    except Exception:
        raise UserError(
            f"{where}: its config.yaml cannot be read: {reason}, and neither can its copy in "
            f".hydra. Its weights can start a new run: {shlex.quote(f'init_from={folder}')}"
        ) from None
    log.warning("%s: its config.yaml is damaged (%s). Its copy in .hydra is used.", where, reason)
    return config


def refuse_other_folder(folder: Path, given: Path) -> None:
    """Raise UserError, which names the folder as `given`, if it holds no run. Needs no torch."""
    if not (folder / "config.yaml").is_file():
        what = "there is no such folder" if not folder.is_dir() else "it holds no config.yaml"
        raise UserError(
            f"run={given}: not a run's folder ({what}). Give the folder that a run printed at its "
            "start, such as outputs/digits/latest."
        )


def gives_masks(folder: Path) -> bool:
    """Return True if the run in `folder` is a segmentation; False if its config is unreadable."""
    try:
        kind: object = _whole(read_yaml(folder / "config.yaml"))["data"].get("target_kind")
    except Exception:  # reported when the run is loaded
        return False
    return kind == MASKS


def _whole(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}")
    for group in ("data", "model", "task", "loss", "trainer"):
        if not isinstance(config.get(group), dict):
            raise ValueError(f"it has no node {group}. Is it a run's?")
    return moved.in_config(config)
