"""Complete older records with keys added since, at the values for the earlier behaviour.

A run's config holds every key that existed at its time. Later versions add keys, some with a
default that changes the maths. `complete` gives an older record the value that reproduces what the
code did without the key, so that resume, evaluate, predict and reproduce keep the run's meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from regrow.config.command_line import override
from regrow.project import of_lab


class AddedKey(NamedTuple):
    # `_target_` of the node that holds the key, where `lab` stands for the lab's package; None: the
    # top level
    target: str | None
    key: str
    before: Any  # reproduces the behaviour from before the key existed
    follows: str | None = None  # the dotted key that conf/ interpolates it from


IMAGE_FOLDER = "lab.data.datasets.image_folder"
EARLY_EXTENSIONS = [
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
]
ADDED_KEYS: tuple[AddedKey, ...] = (
    AddedKey(None, "step", {"_target_": of_lab("lab.step.train_step"), "_partial_": True}),
    AddedKey(IMAGE_FOLDER, "exif_orientation", False),
    AddedKey(IMAGE_FOLDER, "extensions", EARLY_EXTENSIONS),
    AddedKey(IMAGE_FOLDER, "leave_out", []),
    AddedKey(IMAGE_FOLDER, "identity", "ends"),
    AddedKey("regrow.feeding.loaders.Data", "changed", "refuse"),
    AddedKey("regrow.feeding.loaders.Data", "identity", "length"),
    AddedKey("lab.options.TrainerOptions", "ema_warmup", False),
    AddedKey("lab.options.TrainerOptions", "capture", False),
    AddedKey("regrow.feeding.loaders.Data", "integers", "float32"),
    AddedKey("regrow.feeding.loaders.Data", "ignore_index", None, "loss.ignore_index"),
    AddedKey("lab.data.datasets.csv", "ignore_index", None, "data.ignore_index"),
    AddedKey("lab.data.datasets.csv", "target_dtype", "float32", "data.target_dtype"),
    AddedKey("regrow.feeding.loaders.Data", "target_dtype", "float32"),
)
# Keys that this code no longer accepts, by `_target_`; another key replaces each.
REMOVED_KEYS: tuple[tuple[str, str], ...] = tuple(
    (f"lab.tasks.tasks.{task}", "mode")  # trainer.mode
    for task in ("Multiclass", "Binary", "Multilabel", "Regression")
)
# Added fields of preprocessing.json, which says how a run reads the files it predicts for.
ADDED_PREPROCESSING: Mapping[str, Any] = {
    "exif_orientation": False,
    "extensions": EARLY_EXTENSIONS,
    "leave_out": [],
}
# Added fields of a checkpoint's progress.
ADDED_PROGRESS: Mapping[str, Any] = {"empty_steps": 0}


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that a recorded config lacks. Returns them, dotted, with their values.

    Also deletes keys that this code no longer accepts: see `removed`.
    """
    added: dict[str, Any] = {}
    for key in removed(config):
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        del node[last]
    for row, node, key in _rows(config, None, ""):
        if row.key not in node:
            node[row.key] = added[key] = row.before
    return added


def removed(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of a recorded config that this code no longer accepts."""
    target = config.get("_target_")
    found = [
        f"{prefix}{key}" for its, key in REMOVED_KEYS if of_lab(its) == target and key in config
    ]
    for name, value in config.items():
        if isinstance(value, dict):
            found += removed(value, f"{prefix}{name}.")
    return found


def _rows(
    node: dict[str, Any], target: Any, prefix: str
) -> Iterator[tuple[AddedKey, dict[str, Any], str]]:
    """Yield the rows for each node of a config, with the node and the key's dotted name."""
    for row in ADDED_KEYS:
        if (row.target and of_lab(row.target)) == target:
            yield row, node, f"{prefix}{row.key}"
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _rows(value, value.get("_target_", ""), f"{prefix}{name}.")


def earlier(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted keys that have their earlier value in a completed config."""
    rows = _rows(config, None, "")
    return {key: row.before for row, node, key in rows if node.get(row.key, ...) == row.before}


def following(config: dict[str, Any], changed: Iterable[str]) -> set[str]:
    """Return the dotted keys that conf/ interpolates from one of the `changed` keys or groups."""
    found = set(changed)
    for row, _, key in _rows(config, None, ""):
        if row.follows and any(f"{row.follows}.".startswith(f"{each}.") for each in found):
            found.add(key)
    return found.difference(changed)


def adopt(config: dict[str, Any], added: Mapping[str, Any], typed: Iterable[str]) -> dict[str, Any]:
    """Copy what `complete` added into the config of the resumed run, and return what changed.

    Skips keys in `typed` (dotted) and keys that the config lacks.
    """
    typed, adopted = set(typed), {}
    for key, value in added.items():
        *parents, last = key.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if key not in typed and isinstance(node, dict) and last in node and node[last] != value:
            node[last] = adopted[key] = value
    return adopted


def line(where: str, keys: Mapping[str, Any]) -> str:
    """Return one line about the keys that an older record was given."""
    return f"{where} is older than these keys, which keep what the code did then: " + ", ".join(
        as_override(key, value) for key, value in keys.items()
    )


def as_override(key: str, value: Any) -> str:
    """Return `key=value` in Hydra's grammar, for a plain value."""
    if isinstance(value, str):
        return override(key, value)
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
