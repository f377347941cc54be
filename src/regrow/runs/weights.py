"""Load weights for a new run: `init_from=` a run folder, a checkpoint or a bare state_dict."""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from regrow.checkpoint import writer
from regrow.config.yaml_files import readable
from regrow.dotted import Checked
from regrow.errors import UserError
from regrow.extras import require
from regrow.record import moved

log = logging.getLogger("regrow")

# The parts that peft inserts into names: of a module with an adapter, and of a module to save, of
# which it keeps a frozen copy and a trained one.
OF_PEFT = re.compile(r"\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")


def load_weights(model: nn.Module, source: Path) -> None:
    """Load weights from a run folder, a checkpoint, a state_dict file or .safetensors into `model`.

    Entries of a different shape, such as a head for other classes, keep their fresh values. Logs
    these, and names that only one side has. Adapters that peft has put around the model's modules
    start fresh, and the modules inside get the weights. Raises UserError if nothing fits.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    wrapped: dict[str, list[str]] = {}
    for name in own:
        wrapped.setdefault(_unwrapped(name), []).append(name)
    cleaned = {_clean(name, own): value for name, value in _weights(source).items()}
    weights = {
        place: value
        for name, value in cleaned.items()
        for place in ([name] if name in own else wrapped.get(name, [name]))
    }
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


def warn_of_other_splits(source: Path, data: Checked) -> None:
    """Log a warning if the run of the weights split the same data in a different way."""
    folders = [source, *source.resolve().parents[:3]]  # a run, or a checkpoint of one
    recorded = next((it for f in folders for _, it in readable("config.yaml", f)), {})
    its, here = moved.in_config(recorded).get("data"), data["source"]
    there = its.get("source") if isinstance(its, dict) else None  # or another program's file
    if not isinstance(there, dict) or there.get("_target_") != here.get("_target_"):
        return
    changed = [
        f"data.source.{key} was {there[key]} and is {here[key]}"
        for key in ("seed", "val_fraction", "test_fraction", "folds", "fold", "group")
        if key in there and key in here and there[key] != here[key]
    ]
    if changed:
        log.warning(
            "init_from: %s, so this run may be validated or tested on what the weights were "
            "trained on",
            ", ".join(changed),
        )


def _unwrapped(name: str) -> str:
    """Return the name that a tensor of a model has before peft wraps it."""
    return OF_PEFT.sub("", name.removeprefix("base_model.model."))


def _clean(name: str, own: Mapping[str, Tensor]) -> str:
    """Return the name without the prefixes of DDP and torch.compile in other programs' files."""
    while name not in own:
        shorter = name.removeprefix("module.").replace("_orig_mod.", "")
        if shorter == name:
            break
        name = shorter
    return name


def _weights(source: Path) -> Mapping[str, Tensor]:
    if (folder := source / "checkpoints").is_dir():
        best = writer.named(folder, "best")
        run, source = source, best if best.is_dir() else writer.named(folder, "last")
        if not source.is_dir():
            raise UserError(f"init_from={run}: that run has no checkpoint yet.")
    elif source.is_dir() and not (source / writer.MANIFEST).exists():
        raise UserError(
            f"init_from={source}: it is neither a run's folder nor a checkpoint's: "
            f"{source.name}/{writer.MANIFEST} is missing. Give a folder such as "
            "outputs/digits/latest, one in its checkpoints/, or a file of weights."
        )
    if not source.exists():
        raise UserError(f"init_from={source}: there is no such file or folder.")
    try:
        if source.is_dir():
            parts, _ = writer.load(source.resolve())
            content = writer.evaluated_weights(parts)
        elif source.suffix == ".safetensors":
            require(f"init_from={source}", "export", "safetensors")
            from safetensors.torch import load_file

            content = load_file(source)
        else:
            with warnings.catch_warnings(action="ignore"):  # about pickle protocols
                content = torch.load(source, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except writer.DamagedCheckpoint as damage:
        raise UserError(f"init_from={source}: {damage}.") from None
    except pickle.UnpicklingError as error:
        # Hide torch's advice how to open it anyway: that would execute code in the file.
        raise UserError(
            f"init_from={source}: it holds more than tensors and plain values, and is not opened."
        ) from error
    except Exception as error:  # the readers of zip and pickle raise a dozen different kinds
        reason = f"{type(error).__name__} {' '.join(str(error).split())[:200]}".strip()
        raise UserError(f"init_from={source}: no state_dict can be read ({reason}).") from None
    if isinstance(content, dict):  # results of get_extra_state belong to their run
        content = {k: v for k, v in content.items() if not str(k).endswith("_extra_state")}
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        items = content.items() if isinstance(content, dict) else ()
        nested = [str(key) for key, value in items if isinstance(value, dict)]
        hint = f" Save its entry {nested[0]!r} alone." if nested else ""
        raise UserError(
            f"init_from={source}: a dict of tensors is expected, as model.state_dict() gives.{hint}"
        )
    return content
