"""Autocast, the loss scale of fp16, and float64 where a device lacks it."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

INITIAL = 2.0**16
# Zero gradients would let the scale grow to inf, which halving cannot undo. From this limit eight
# halvings return to the initial value. Apex has the same limit.
MAX_SCALE = 2.0**24
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a forward pass and its loss. It can be entered repeatedly."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _AUTOCAST[precision])


class LossScale:
    """The factor that keeps fp16 gradients from vanishing, as a tensor on the device.

    It halves after a step whose gradient overflowed and doubles after `growth_interval` steps
    without an overflow (Micikevicius et al., "Mixed precision training", ICLR 2018). As a tensor it
    needs no host synchronisation.
    """

    def __init__(
        self, device: torch.device, *, initial: float = INITIAL, growth_interval: int = 2000
    ) -> None:
        self.value = torch.full((), initial, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.growth_interval = growth_interval

    def update(self, skipped: bool | Tensor, empty: bool | Tensor = False) -> None:
        """Update the scale. `skipped`: True if the gradient was not finite.

        An `empty` step, whose weights were all zero, leaves the scale unchanged.
        """
        if empty is True:
            return
        skipped = torch.as_tensor(skipped, dtype=torch.float32, device=self.value.device)
        good_steps = (self.good_steps + 1) * (1 - skipped)
        grows = ((good_steps >= self.growth_interval) & (self.value < MAX_SCALE)).float()
        value = self.value * (1 - 0.5 * skipped) * (1 + grows)
        good_steps = good_steps * (good_steps < self.growth_interval)
        if isinstance(empty, Tensor):
            value = torch.where(empty.bool(), self.value, value)
            good_steps = torch.where(empty.bool(), self.good_steps, good_steps)
        self.value.copy_(value)
        self.good_steps.copy_(good_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.clone(), "good_steps": self.good_steps.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        value = float(state["value"])
        if not 0 < value < math.inf:  # from an older version without a limit
            log.warning("the checkpoint's loss scale is %g: it starts at %g again", value, INITIAL)
            value = INITIAL
        self.value.fill_(value)
        self.good_steps.copy_(state["good_steps"])


def widest(values: Tensor) -> Tensor:
    """Return `values` in float64, in which probabilities of different logits rarely tie.

    A sigmoid is 1 for all logits from 37 on.
    The result is on the CPU for MPS, which has no float64.
    """
    return (values.cpu() if values.device.type == "mps" else values).double()


def at_least_float32(values: Tensor) -> Tensor:
    """Return float32 values: half precision would lose digits in sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
