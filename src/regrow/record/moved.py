"""New names of targets of older versions, which records and YAML files may still contain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regrow.project import of_lab

# Names in version 0.1.0, of modules and of classes that left theirs, each with its current name.
# The first match counts: list longer names first. `lab` stands for the lab's package.
MOVED: Mapping[str, str] = {
    "regrow.check": "regrow.config.check",
    "regrow.data.batch": "regrow.feeding.batch",
    "regrow.data.feeds": "regrow.feeding.feeds",
    "regrow.data.files": "regrow.feeding.files",
    "regrow.data.identity": "regrow.feeding.identity",
    "regrow.data.images": "regrow.feeding.images",
    "regrow.data.loaders": "regrow.feeding.loaders",
    "regrow.data.preprocess": "regrow.feeding.preprocess",
    "regrow.data.sampling": "regrow.feeding.sampling",
    "regrow.data.splits": "regrow.feeding.splits",
    "regrow.data.tables": "regrow.feeding.tables",
    "regrow.sweep.options": "regrow.sweep.kinds",
    "regrow.slurm": "regrow.processes.slurm",
    "regrow.training.activation_checkpointing": "regrow.distributed.activation_checkpointing",
    "regrow.training.checkpoint": "regrow.checkpoint.writer",
    "regrow.training.memory": "regrow.numerics.memory",
    "regrow.training.options.CheckpointOptions": "regrow.checkpoint.writer.CheckpointOptions",
    "regrow.training.options.DDPOptions": "regrow.distributed.parallel.DDPOptions",
    "regrow.training.options.FSDPOptions": "regrow.distributed.sharding.FSDPOptions",
    "regrow.training.parallel": "regrow.distributed.parallel",
    "regrow.training.precision": "regrow.numerics.precision",
    "regrow.training.sharding": "regrow.distributed.sharding",
    "regrow.tasks.exact": "regrow.numerics.exact",
    "regrow.training.lr_finder": "regrow.runs.lr_finder",
    "regrow.training.model_checks": "regrow.runs.model_checks",
    "regrow.training.scheduler_adapter": "regrow.numerics.scheduler_adapter",
    "regrow.training.sums": "regrow.numerics.totals",
    "regrow.data.augment": "lab.data.augment",
    "regrow.data.datasets": "lab.data.datasets",
    "regrow.models": "lab.models",
    "regrow.tasks": "lab.tasks",
    "regrow.training": "lab",
}
_NAMES = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, MOVED))})(?!\w)")


def in_text(text: str) -> str:
    """Return the text with old names replaced by the current ones."""
    return _NAMES.sub(lambda found: of_lab(MOVED[found[0]]), text)


def in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded config with the current name in every `_target_`."""
    return {
        key: in_text(value) if key == "_target_" and isinstance(value, str) else _renamed(value)
        for key, value in config.items()
    }


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return in_config(value)
    return [*map(_renamed, value)] if isinstance(value, list) else value
