"""Losses of your own. This one is the example; `conf/loss/mse_plus_mae.yaml` makes it an option."""

from __future__ import annotations

from torch import Tensor

from regrow.tasks.losses import LossOutput, l1, mse


def mse_plus_mae(outputs: Tensor, targets: Tensor, *, mae_factor: float) -> LossOutput:
    """Squared error plus `mae_factor` times absolute error, (B,) each; both parts are logged."""
    squared, absolute = mse(outputs, targets), l1(outputs, targets)
    parts = {"mse": squared, "mae": absolute}
    return LossOutput(squared + mae_factor * absolute, components=parts)
