"""Everything that a run needs besides its state, set once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lab.optim import Clipping
from lab.options import TrainerOptions
from regrow.checkpoint.writer import CheckpointWriter
from regrow.distributed.parallel import Exchange, World
from regrow.numerics.buffers import Buffers
from regrow.numerics.capture import Eager
from regrow.processes.interrupt import StopRequest
from regrow.protocols import EvalBatches, Record, Task, TrainBatches, Trial


@dataclass(frozen=True)
class StepPlan:
    """The part that one optimizer step needs."""

    options: TrainerOptions
    task: Task
    world: World
    seed: int
    forward: nn.Module  # the model, or DDP around it
    parameters: list[nn.Parameter]  # the trainable ones
    clipping: Clipping
    buffers: Buffers
    exchange: Exchange
    capture: Eager


@dataclass(frozen=True)
class Plan:
    """The part that the loop needs in addition. The first fields are also the step's."""

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
