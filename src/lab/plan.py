"""Everything that a run needs besides its state, set once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from lab.optim import Clipping
from lab.options import TrainerOptions
from regrow.checkpoint.writer import CheckpointWriter
from regrow.distributed import sharding
from regrow.distributed.parallel import Exchange, World, synchronises
from regrow.numerics.buffers import Buffers
from regrow.numerics.capture import Eager
from regrow.numerics.precision import autocast
from regrow.numerics.totals import Skipped, Totals
from regrow.numerics.unsaved import Unsaved
from regrow.processes.interrupt import StopRequest
from regrow.protocols import EvalBatches, Record, Task, TrainBatches, Trial
from regrow.randomness import key
from regrow.record.meter import Meter
from regrow.runs.fault_checks import Untrained


@dataclass(frozen=True)
class StepPlan:
    """The part that one optimizer step needs."""

    options: TrainerOptions
    task: Task
    world: World
    seed: int
    forward: Any  # the model, wrapped in DDP if needed; a mapping for several models
    parameters: list[nn.Parameter]  # the trainable ones
    clipping: Clipping
    buffers: Buffers
    exchange: Exchange
    capture: Eager
    # For record.image. Ranks other than 0 have one that writes nothing.
    record: Record | None = None
    untrained: Untrained = field(default_factory=Untrained)  # what the first steps do not reach
    name: str = ""  # the model to update, if there are several: see `of`

    def of(self, name: str) -> StepPlan:
        """Return the plan of an update of one of several models."""
        parameters = [p for p in self.forward[name].parameters() if p.requires_grad]
        return dataclasses.replace(
            self, forward=self.forward[name], parameters=parameters, name=name
        )

    def seed_of(self, step: int, micro_batch: int) -> int:
        """Return the seed of torch, numpy and `random` for a micro-batch."""
        return key(self.seed, self.name or "model", step, micro_batch, self.world.rank)

    def synchronises(self, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context that sums gradients over processes in the last micro-batch only."""
        return synchronises(self.forward, is_last)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context for a forward pass and its loss, in the run's precision."""
        return autocast(self.world.device, self.options.precision)

    def gradients(self) -> list[Tensor]:
        """Return this process's part of each gradient."""
        return sharding.local([p.grad for p in self.parameters if p.grad is not None])


class StepResult(NamedTuple):
    totals: Totals  # over all micro-batches and processes
    grad_norm: Tensor | float  # () of the unscaled gradients, over all processes, before clipping
    skipped: Skipped


@dataclass(frozen=True)
class LoopPlan:
    """The part that the loop needs besides. Some of its fields are also the step's."""

    step: StepPlan
    train_step: Callable[..., Any]  # (state, batch, `step`) -> StepResult; the config chooses it
    options: TrainerOptions
    task: Task
    world: World
    train: TrainBatches
    sets: Mapping[str, EvalBatches]  # those that are measured during training, by name
    total_steps: int | None  # None: only time limits the run
    checkpoints: CheckpointWriter
    record: Record
    stop: StopRequest
    trial: Trial | None = None
    meter: Meter = field(default_factory=Meter)
    unsaved: Unsaved = field(default_factory=Unsaved)  # what changes and no checkpoint holds
