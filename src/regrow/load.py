"""Trained models back from a run's folder: for the scripts, for notebooks, and to start from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.config import instantiate, read_yaml
from regrow.errors import UserError
from regrow.training import checkpoint

log = logging.getLogger("regrow")


@dataclass(frozen=True)
class LoadedRun:
    """A run's config and data, and its model with the weights of one checkpoint, ready to use."""

    folder: Path
    config: dict[str, Any]
    model: nn.Module  # in evaluation mode, on `device`
    data: Any
    task: Any
    step: int
    device: torch.device


def load_run(
    folder: str | Path, *, which: str = "best", device: str = "cpu", **data_overrides: Any
) -> LoadedRun:
    """The run in `folder` as it was, from the folder alone.

    `which` names a checkpoint: "best", "last" or a folder such as "step_00000460". Where the run
    kept an average of its weights, that is what one gets. `data_overrides` replace keys of the
    data, such as `batch_size=1`. Raises UserError for a folder without a run or checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"run={folder}: there is no run in that folder (no config.yaml).")
    config = read_yaml(folder / "config.yaml")
    unknown = [key for key in data_overrides if key not in config["data"]]
    if unknown:
        raise UserError(
            f"data.{unknown[0]}: the run's data has no such key. "
            f"It has {', '.join(key for key in config['data'] if not key.startswith('_'))}."
        )
    config["data"].update(data_overrides)
    parts, facts = _checkpoint(folder / "checkpoints", which)
    data = instantiate(config["data"])
    model: nn.Module = instantiate(config["model"])
    model.load_state_dict(parts.get("averaged", parts["model"]))
    model.to(device).eval()
    task = instantiate(config["task"], loss=instantiate(config["loss"]))
    return LoadedRun(folder, config, model, data, task, facts["step"], torch.device(device))


def _checkpoint(folder: Path, which: str) -> tuple[checkpoint.Parts, dict[str, Any]]:
    path = folder / which
    if not path.is_dir():
        there = ", ".join(p.name for p in checkpoint.complete(folder)) or "none"
        raise UserError(f"checkpoint={which}: {folder} has no such checkpoint. There is {there}.")
    try:
        return checkpoint.load(path.resolve())
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(
            f"checkpoint={which}: {damage}. Choose another with checkpoint=…."
        ) from None


def load_weights(model: nn.Module, source: Path) -> None:
    """Start `model` from the weights of a run folder, a checkpoint, or a bare state_dict file.

    Entries of another shape, such as a head for other classes, keep their fresh values and are
    named; a name that is missing or unknown on either side is said. Raises UserError when nothing
    fits.
    """
    weights = _weights(source)
    own = model.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise UserError(
            f"init_from={source}: none of its {len(weights)} tensors fits this model. "
            "Is it the same model=…?"
        )
    for name, value in weights.items():
        if name in own and own[name].shape != value.shape:
            shapes = f"{tuple(value.shape)} there, {tuple(own[name].shape)} here"
            log.warning("init_from: %s starts fresh (%s)", name, shapes)
    for title, names in (
        ("not in the model", weights.keys() - own.keys()),
        ("not in the weights, start fresh", own.keys() - weights.keys()),
    ):
        if names:
            log.warning("init_from: %s: %s", title, ", ".join(sorted(names)))
    model.load_state_dict(fitting, strict=False)
    log.info("init_from: %d of %d tensors from %s", len(fitting), len(own), source)


def _weights(source: Path) -> Mapping[str, Tensor]:
    if (source / "checkpoints").is_dir():
        which = "best" if (source / "checkpoints" / "best").exists() else "last"
        source = source / "checkpoints" / which
    try:
        if source.is_dir():
            parts, _ = checkpoint.load(source.resolve())
            return parts.get("averaged", parts["model"])
        if not source.is_file():
            raise UserError(f"init_from={source}: there is no such file or folder.")
        content = torch.load(source, map_location="cpu", weights_only=True)
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(f"init_from={source}: {damage}.") from None
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"init_from={source}: no state_dict can be read: {reason}") from None
    except Exception as error:  # pickle.UnpicklingError: it holds more than tensors
        raise UserError(
            f"init_from={source}: it holds more than tensors and plain values, and is not opened."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(
            f"init_from={source}: a dict of tensors is expected, as model.state_dict() gives."
        )
    prefixes = ("module.", "_orig_mod.")  # of DDP and torch.compile, written by other programs
    cleaned = {}
    for name, value in content.items():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        cleaned[name] = value
    return cleaned
