"""What a step and an epoch add up: loss, score, weight, examples, then a loss's named parts.

On a device that one would have to wait for, the sums stay there. On a CPU they are plain numbers:
adding up tiny tensors took a twentieth of a small model's step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOSS, SCORE, WEIGHT, EXAMPLES, COUNTED = range(5)  # places in the sums; then the components

Sums = Tensor | list[float]  # (4 + components,) of a step, (4,) float64 of an epoch


def on_host(device: torch.device) -> bool:
    """Whether to read a number of this device is no wait."""
    return device.type == "cpu"


def slice_sums(values: Sequence[Tensor | float], like: Tensor) -> Sums:
    """() tensors and numbers, in the order of the places, to where the tensor `like` lives."""
    if on_host(like.device):
        return [float(value) for value in values]
    return torch.stack(
        [v if isinstance(v, Tensor) else constant(v, like.dtype, like.device) for v in values]
    )


def over_slices(parts: Sequence[Sums]) -> Sums:
    if len(parts) == 1:
        return parts[0]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return (
        torch.stack(tensors).sum(0) if tensors else [math.fsum(v) for v in zip(*parts, strict=True)]
    )


def epoch_sums(device: torch.device) -> Sums:
    """Zeros. In float64, where the device has it: a million examples need the digits."""
    if on_host(device):
        return [0.0] * COUNTED
    return torch.zeros(COUNTED, dtype=sum_dtype(device), device=device)


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def added(epoch: Sums, step: Sums) -> Sums:
    """The epoch's sums with those of one more step."""
    if isinstance(epoch, list):
        return [total + value for total, value in zip(epoch, step[:COUNTED], strict=True)]
    return epoch + torch.as_tensor(step[:COUNTED], device=epoch.device)


def read(sums: Sums) -> list[float]:
    """The sums as numbers; waits for the device."""
    return sums if isinstance(sums, list) else sums.tolist()


def ratio(total: float, divisor: float) -> float:
    return total / divisor if divisor else math.nan


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """() on the device, made once: a fresh one costs a copy to the device each step."""
    return torch.full((), value, dtype=dtype, device=device)
