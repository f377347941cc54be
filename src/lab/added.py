"""Options of the lab that older runs lack, each with the value that keeps what the code did then.

Add a row for each option and each field of `state.Progress` that you add, and for each default that
you change. Otherwise no older run can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.config.older import EARLY_EXTENSIONS, AddedKey, EarlierDefault

IMAGE_FOLDER = "lab.data.datasets.image_folder"
SOURCES = (
    "digits",
    "digits_attributes",
    "breast_cancer",
    "diabetes",
    "csv",
    "image_folder",
    "text",
)
CUT_HERE = tuple(f"lab.data.datasets.{name}" for name in SOURCES)
ADDED_KEYS = (
    AddedKey(None, "step", {"_target_": "lab.step.train_step", "_partial_": True}),
    AddedKey(IMAGE_FOLDER, "exif_orientation", False),
    AddedKey(IMAGE_FOLDER, "extensions", EARLY_EXTENSIONS),
    AddedKey(IMAGE_FOLDER, "leave_out", []),
    AddedKey(IMAGE_FOLDER, "identity", "ends"),
    AddedKey(IMAGE_FOLDER, "sets", []),
    AddedKey("lab.data.datasets.csv", "sets", None),
    *(AddedKey(source, "folds", None, "data.folds") for source in CUT_HERE),
    *(AddedKey(source, "fold", 0, "data.fold") for source in CUT_HERE),
    AddedKey(IMAGE_FOLDER, "group", None),
    AddedKey(IMAGE_FOLDER, "decoder", "pillow"),
    AddedKey("lab.data.datasets.shards", "decoder", "pillow"),
    AddedKey("lab.data.datasets.csv", "group", None),
    AddedKey("lab.data.datasets.csv", "overlap", "refuse", "data.overlap"),
    AddedKey("lab.data.datasets.csv", "sampling", None, "data.sampling"),
    AddedKey("lab.data.datasets.csv", "ignore_index", None, "data.ignore_index"),
    AddedKey("lab.data.datasets.csv", "target_dtype", "float32", "data.target_dtype"),
    *(
        AddedKey(f"lab.tasks.tasks.{task}", "extra_metrics", None)
        for task in ("Multiclass", "Binary", "Multilabel", "Regression")
    ),
    AddedKey("lab.tasks.tasks.Regression", "target_names", None),
    AddedKey("lab.tasks.tasks.Regression", "per_target", False),
    AddedKey("lab.options.TrainerOptions", "ema_warmup", False),
    AddedKey("lab.options.TrainerOptions", "capture", False),
    AddedKey("lab.options.TrainerOptions", "find_faults", False),
)
# Defaults in conf/ that have changed: a run that recorded the earlier one keeps it.
EARLIER_DEFAULTS = (
    EarlierDefault(IMAGE_FOLDER, "resize", 256),
    EarlierDefault("torch.optim.AdamW", "weight_decay", 0.5),
)
# Keys that the code no longer accepts, by `_target_`; another key replaces each.
REMOVED_KEYS = tuple(
    (f"lab.tasks.tasks.{task}", "mode")  # trainer.mode
    for task in ("Multiclass", "Binary", "Multilabel", "Regression")
)
# Added fields of a checkpoint's progress.
ADDED_PROGRESS: Mapping[str, Any] = {"empty_steps": 0}


def progress_of(saved: Mapping[str, Any], accumulation_steps: int) -> dict[str, Any]:
    """Return the progress of a checkpoint with today's fields."""
    progress = {**ADDED_PROGRESS, **saved}
    if "halvings" in progress:  # of the micro-batches, one per out-of-memory error
        halvings = progress.pop("halvings")
        progress["num_micro_batches"] = accumulation_steps << halvings if halvings else 1
    return progress
