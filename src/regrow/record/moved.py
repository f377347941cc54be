"""Where targets of older versions are now: a record may name them, and so may one's own YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regrow.project import of_lab

# Names in version 0.1.0, each with its name today: modules, and classes that left theirs. The first
# match counts. `lab` stands for the lab's package, which a clone renames.
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
    "regrow.training.sums": "regrow.numerics.sums",
    "regrow.data.augment": "lab.data.augment",
    "regrow.data.datasets": "lab.data.datasets",
    "regrow.models": "lab.models",
    "regrow.tasks": "lab.tasks",
    "regrow.training": "lab",
}
_NAMES = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, MOVED))})(?!\w)")


def in_text(text: str) -> str:
    """Return the text with each moved name as it is today."""
    return _NAMES.sub(lambda found: of_lab(MOVED[found[0]]), text)


def in_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a recorded config whose targets are named as they are today."""
    return {
        key: in_text(value) if key == "_target_" and isinstance(value, str) else _renamed(value)
        for key, value in config.items()
    }


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return in_config(value)
    return [*map(_renamed, value)] if isinstance(value, list) else value
