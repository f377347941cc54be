"""How the parts of a run meet: batches, tasks, metrics, records and augmentations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Store(Protocol):
    def table(self, seed: int, epoch: int) -> Tensor:
        """Return an epoch's random choices, (N, …) on the CPU, row i for example i."""
        ...

    def gather(self, indices: Tensor, table: Tensor) -> Tensor:
        """Return augmented examples at `indices` (B,), given the table's rows at `indices`."""
        ...


class Augmentation(Protocol):
    def store(self, images: Tensor) -> Store: ...


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
