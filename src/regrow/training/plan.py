"""Everything that stays the same during a run, and the interfaces that the loop expects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from regrow.training import optim
from regrow.training.checkpoint import CheckpointWriter
from regrow.training.interrupt import StopRequest
from regrow.training.options import TrainerOptions
from regrow.training.parallel import Exchange, World
from regrow.training.state import Buffers


class Batch(Protocol):
    """This process's share of one optimizer step, on the device."""

    inputs: Any  # a tensor (B, …), or a tuple or mapping of them: the model's arguments
    targets: Tensor  # (B, …)
    weights: Tensor | None  # (B,), per example; None: all one
    num_local: int  # examples in this share; an empty share holds one example of weight zero
    num_global: int  # examples in the step, over all processes

    def split(self, slices: int) -> list[Any]: ...


class TrainBatches(Protocol):
    num_examples: int
    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class EvalBatches(Protocol):
    num_examples: int

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Metrics(Protocol):
    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> None: ...
    def scalars(self) -> dict[str, float]: ...
    def details(self) -> dict[str, Any]: ...


class Task(Protocol):
    running_name: str | None
    sums_over_examples: bool

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Any: ...
    def check(self, outputs: Tensor, targets: Tensor) -> None: ...
    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None: ...
    def metrics(self, device: torch.device) -> Metrics: ...


class Record(Protocol):
    """The destination of the logged values."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None: ...
    def position(self) -> int: ...
    def sync(self, position: int) -> None: ...
    def close(self, exit_code: int = 0) -> None: ...


class Trial(Protocol):
    """A search of which this run is one trial."""

    def is_over(self, step: int, values: Mapping[str, float]) -> bool: ...


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
