"""Everything that stays the same during a run, and the interfaces that the loop expects."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lab import optim
from lab.options import TrainerOptions
from regrow.checkpoint.writer import CheckpointWriter
from regrow.distributed.parallel import Exchange, World
from regrow.numerics.buffers import Buffers
from regrow.processes.interrupt import StopRequest
from regrow.protocols import EvalBatches, Record, Task, TrainBatches, Trial


@dataclass(frozen=True)
class Plan:
    """Everything that stays the same during a run."""

    options: TrainerOptions
    task: Task
    train: TrainBatches
    val: EvalBatches | None
    forward: nn.Module  # the model, or DDP around it
    world: World
    seed: int
    total_steps: int | None
    parameters: list[nn.Parameter]  # the trainable ones
    clipping: optim.Clipping
    buffers: Buffers
    checkpoints: CheckpointWriter
    record: Record
    stop: StopRequest
    exchange: Exchange
    trial: Trial | None = None
