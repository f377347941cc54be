"""The sums of a step and an epoch: loss, score, weight, examples, then a loss's named components.

On a GPU the sums stay on the device, so that the host does not wait. On a CPU they are plain
numbers: adding tiny tensors took a twentieth of a small model's step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOSS, SCORE, WEIGHT, EXAMPLES, COUNTED = range(5)  # indices into the sums; the components follow

Sums = Tensor | list[float]  # (4 + components,) of a step, (4,) of an epoch


def on_host(device: torch.device) -> bool:
    """Return True if the host can read this device's numbers without waiting."""
    return device.type == "cpu"


def slice_sums(values: Sequence[Tensor | float], like: Tensor) -> Sums:
    """Return a micro-batch's sums from () tensors and numbers; on a GPU in the dtype of `like`."""
    if on_host(like.device):
        return [float(value) for value in values]
    return torch.stack(
        [v if isinstance(v, Tensor) else constant(v, like.dtype, like.device) for v in values]
    )


def epoch_sums(device: torch.device) -> Sums:
    """Return zeros, in float64 where the device supports it: a million examples need the digits."""
    if on_host(device):
        return [0.0] * COUNTED
    return torch.zeros(COUNTED, dtype=sum_dtype(device), device=device)


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS does not support float64


def added(total: Sums, more: Sums) -> Sums:
    """Return `total` plus the leading entries of `more`, which may be longer."""
    more = more[: len(total)]
    if isinstance(total, list):
        return [a + b for a, b in zip(total, more, strict=True)]
    assert isinstance(more, Tensor)
    return total + more


def cleared(total: Sums) -> Sums:
    """Return zeros; on a device in the same memory, which a CUDA graph adds to."""
    return [0.0] * len(total) if isinstance(total, list) else total.zero_()


def read(sums: Sums) -> list[float]:
    """Return the sums as numbers; waits for the device."""
    return sums if isinstance(sums, list) else sums.tolist()


def ratio(total: float, divisor: float) -> float:
    return total / divisor if divisor else math.nan


@functools.lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a cached () tensor: creating one costs a copy to the device at each step."""
    return torch.full((), value, dtype=dtype, device=device)


# True if a step was skipped as non-finite: a bool on the host, or a () tensor of 1.0 or 0.0.
Skipped = bool | Tensor


def gradient_norm(gradients: list[Tensor]) -> Tensor | float:
    """Return the () global 2-norm, NaN or inf if any element is; a float on a CPU."""
    half = any(gradient.dtype in (torch.float16, torch.bfloat16) for gradient in gradients)
    # float16 ends at 65,504: a norm of inf would skip a good step.
    norms = torch._foreach_norm(gradients, 2, torch.float32 if half else None)
    if on_host(norms[0].device):
        return math.hypot(*[norm.item() for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
