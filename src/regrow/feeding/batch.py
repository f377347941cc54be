"""One process's examples of one optimizer step, and how they are split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow import protocols
from regrow.protocols import Inputs, Targets
from regrow.randomness import generator


def parts_of(value: Inputs) -> list[Tensor]:
    """Return the tensors of inputs or targets: at least one, all of the same examples."""
    if isinstance(value, Tensor):
        return [value]
    return [*(value.values() if isinstance(value, Mapping) else value)]


def each(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Return the inputs, or targets, with `function` applied to every tensor."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    return tuple(function(value) for value in inputs)


@dataclass(slots=True, eq=False, repr=False)
class LoadedBatch:
    """One process's part of a window of examples, on the device.

    A process without an example gets one of weight zero, so that its forward and backward pass take
    part in the collectives.
    """

    inputs: Inputs  # (B, …)
    targets: Targets  # (B, …)
    weights: Tensor | None  # (B,); None for all one
    num_local: int  # real examples in it
    num_global: int  # examples of the window, over all processes
    first: int = 0  # position of the first example in the window

    def split(self, slices: int) -> list[LoadedBatch]:
        """Return `slices` micro-batches of nearly equal size; an empty one gets weight zero."""
        if slices == 1:
            return [self]
        return [self._slice(index, slices) for index in range(slices)]

    def _slice(self, index: int, slices: int) -> LoadedBatch:
        start, stop = share(0, self.num_local, index, slices)
        num_local = stop - start
        if num_local == 0:
            start, stop = 0, 1
            weights: Tensor | None = parts_of(self.targets)[0].new_zeros(1, dtype=torch.float32)
        else:
            weights = None if self.weights is None else self.weights[start:stop]
        inputs, targets = (
            each(part, lambda tensor: tensor[start:stop]) for part in (self.inputs, self.targets)
        )
        first = self.first + start
        return LoadedBatch(inputs, targets, weights, num_local, self.num_global, first)

    def to(self, device: torch.device) -> LoadedBatch:
        """Return the batch on `device`; the host does not wait if memory is pinned."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def map(self, function: Callable[[Tensor], Tensor]) -> LoadedBatch:
        """Return the batch with `function` applied to every tensor."""
        inputs, targets = each(self.inputs, function), each(self.targets, function)
        weights = None if self.weights is None else function(self.weights)
        return LoadedBatch(inputs, targets, weights, self.num_local, self.num_global, self.first)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return values of the CPU on `device`; they are pinned, so that the host need not wait."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def noise(seed: int, step: int, batch: protocols.Batch, *shape: int) -> Tensor:
    """Return normal random numbers for each example of a batch, (B, *shape), on its device.

    They depend on the seed, the step and the example's place in the global batch, so any number of
    processes and micro-batches draws the same ones.
    """
    numbers = torch.randn(batch.num_global, *shape, generator=generator(seed, "noise", step))
    example = parts_of(batch.targets)[0]
    return sent(numbers[batch.first :][: len(example)], example.device)


def share(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return this rank's part of `start … stop`: contiguous, sizes differ by at most one."""
    size, extra = divmod(stop - start, world_size)
    first = start + rank * size + min(rank, extra)
    return first, first + size + (rank < extra)


def tensors_of(item: object) -> tuple[Inputs, Targets, Tensor | None]:
    """Return inputs, targets and weights of a collated batch: a pair, a triple or a mapping.

    Raises TypeError for anything else.
    """
    if isinstance(item, Mapping) and {"inputs", "targets"} <= item.keys():
        inputs, targets, weights = item["inputs"], item["targets"], item.get("weights")
    elif isinstance(item, list | tuple) and len(item) in (2, 3):
        inputs, targets, weights = (*item, None)[:3]
    else:
        keys = f" with keys {sorted(map(str, item))}" if isinstance(item, Mapping) else ""
        raise TypeError(f"{type(item).__name__}{keys}")
    inputs, targets = _parts("inputs", inputs), _parts("targets", targets)
    if weights is not None and not isinstance(weights, Tensor):
        raise TypeError(f"a pair whose weights are {described(weights)}, not one tensor")
    return inputs, targets, weights if weights is None else weights.float()


def _parts(name: str, value: object) -> Inputs:
    """Return a tensor, or a tuple or dict of tensors. Raises TypeError for anything else."""
    if isinstance(value, Tensor):
        return value
    found: Inputs = ()
    if isinstance(value, Mapping | list | tuple):
        found = dict(value) if isinstance(value, Mapping) else tuple(value)
    if not found:
        raise TypeError(f"a pair whose {name} are {described(value)}, not tensors")
    for part in parts_of(found):
        if not isinstance(part, Tensor):
            raise TypeError(f"a pair whose {name} hold {described(part)}, not tensors")
    return found


def dtype_of(values: Tensor) -> str:
    """Return the name of a tensor's type, such as uint8."""
    return str(values.dtype).removeprefix("torch.")


def described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with keys {sorted(map(str, value))}"
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return type(value).__name__
