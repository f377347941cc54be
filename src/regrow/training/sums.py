"""The sums of a step and an epoch: loss, score, weight, examples, then a loss's named parts.

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

Sums = Tensor | list[float]  # (4 + components,) of a step, (4,) of an epoch


def on_host(device: torch.device) -> bool:
    """Return True if numbers of this device are read without waiting."""
    return device.type == "cpu"


def slice_sums(values: Sequence[Tensor | float], like: Tensor) -> Sums:
    """A slice's sums from () tensors and numbers; on a device in the dtype of `like`."""
    if on_host(like.device):
        return [float(value) for value in values]
    return torch.stack(
        [v if isinstance(v, Tensor) else constant(v, like.dtype, like.device) for v in values]
    )


def epoch_sums(device: torch.device) -> Sums:
    """Zeros. In float64, where the device has it: a million examples need the digits."""
    if on_host(device):
        return [0.0] * COUNTED
    return torch.zeros(COUNTED, dtype=sum_dtype(device), device=device)


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def added(total: Sums, more: Sums) -> Sums:
    """`total` plus its places of `more`, which may have others behind them."""
    more = more[: len(total)]
    if isinstance(total, list):
        return [a + b for a, b in zip(total, more, strict=True)]
    assert isinstance(more, Tensor)
    return total + more


def read(sums: Sums) -> list[float]:
    """The sums as numbers; waits for the device."""
    return sums if isinstance(sums, list) else sums.tolist()


def ratio(total: float, divisor: float) -> float:
    return total / divisor if divisor else math.nan


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """() on the device, made once: a fresh one costs a copy to the device each step."""
    return torch.full((), value, dtype=dtype, device=device)
