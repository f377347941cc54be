"""Your own losses. This one is an example; `conf/loss/mse_plus_mae.yaml` makes it an option."""

from __future__ import annotations

from torch import Tensor

from lab.tasks.losses import LossOutput, l1, mse


def mse_plus_mae(outputs: Tensor, targets: Tensor, *, mae_factor: float) -> LossOutput:
    """Return squared error plus `mae_factor` times absolute error, (B,), and both as components."""
    squared, absolute = mse(outputs, targets), l1(outputs, targets)
    parts = {"mse": squared, "mae": absolute}
    return LossOutput(squared + mae_factor * absolute, components=parts)
