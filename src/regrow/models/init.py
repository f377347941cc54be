"""How weights start: one scheme over all linear and convolutional layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regrow.errors import UserError, did_you_mean


@runtime_checkable
class StartsFromData(Protocol):
    """A model whose first weights follow from training examples."""

    def initialize_from(self, inputs: Tensor) -> None:
        """Set them, after the model is made and before weights are loaded into it.

        inputs: (N, …) float32 on the CPU, up to 1,024 training examples spread over the split,
        normalised and not augmented; the same in every process and at every start. No gradients
        are recorded.
        """
        ...


@torch.no_grad()
def start_from_data(model: StartsFromData, inputs: Tensor) -> None:
    """Let the model set its first weights; UserError where it could not be loaded or trained then.

    Whoever loads a run makes the model without data, so all that it holds must be there before.
    """
    assert isinstance(model, nn.Module)
    before = {name: tensor.shape for name, tensor in _tensors(model).items()}
    model.initialize_from(inputs)
    after = _tensors(model)
    changed = {n for n, t in after.items() if before.get(n) != t.shape} | (before.keys() - after)
    if changed:
        raise UserError(
            f"model: initialize_from made or changed the shape of {', '.join(sorted(changed))}. "
            "Make it in __init__, and only fill it from the data."
        )
    for name, tensor in after.items():
        if not tensor.isfinite().all():
            raise UserError(f"model: initialize_from left {name} with values that are not finite.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The entries of state_dict without those of get_extra_state."""
    return {name: v for name, v in model.state_dict().items() if isinstance(v, Tensor)}


def _he(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _truncated_normal(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)


SCHEMES: dict[str, Callable[[Tensor], object]] = {
    "he": _he,  # He et al. 2015, for ReLU: normal, variance 2 / fan_in
    "kaiming": _he,
    "xavier": nn.init.xavier_uniform_,  # Glorot and Bengio 2010
    "orthogonal": nn.init.orthogonal_,  # Saxe et al. 2014
    "truncated_normal": _truncated_normal,  # standard deviation 0.02, cut at two of them
}


def apply(model: nn.Module, scheme: str) -> None:
    """Draw the weights of linear, convolutional and attention layers anew; biases become zero.

    Norms keep their ones and zeros. `default` leaves all as the layers made themselves. Draws from
    torch's global generator, in the order of `model.modules()`.
    """
    if scheme == "default":
        return
    if scheme not in SCHEMES:
        known = ["default", *SCHEMES]
        hint = did_you_mean(scheme, known) or f" Choose from {', '.join(known)}."
        raise UserError(f"model.init={scheme} is unknown.{hint}")
    draw = SCHEMES[scheme]
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            for part in module.in_proj_weight.data.chunk(3):  # query, key and value have own fans
                draw(part)
            if module.in_proj_bias is not None:
                nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
