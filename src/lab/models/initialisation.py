"""Weight initialisation: one scheme for all linear and convolutional layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from regrow.errors import UserError, did_you_mean


@runtime_checkable
class StartsFromData(Protocol):
    """A model whose initial weights are computed from training examples."""

    def initialize_from(self, inputs: Tensor) -> None:
        """Set the weights, after the model is created and before any weights are loaded.

        inputs: (N, …) float32 on the CPU, up to 1,024 training examples spread over the split,
        normalised and not augmented; the same in every process and at every start. Runs without
        gradients.
        """
        ...


@torch.no_grad()
def start_from_data(model: StartsFromData, inputs: Tensor) -> None:
    """Let the model set its initial weights from `inputs`.

    Raises UserError if a tensor is added, removed or reshaped, or is not finite: loading a run
    creates the model without data, so `__init__` must create every tensor.
    """
    assert isinstance(model, nn.Module)
    before = {name: tensor.shape for name, tensor in _tensors(model).items()}
    model.initialize_from(inputs)
    after = _tensors(model)
    changed = {n for n, t in after.items() if before.get(n) != t.shape} | (before.keys() - after)
    if changed:
        raise UserError(
            f"model: initialize_from created or changed the shape of {', '.join(sorted(changed))}. "
            "Create it in __init__, and only fill it from the data."
        )
    for name, tensor in after.items():
        if not tensor.isfinite().all():
            raise UserError(f"model: initialize_from left {name} with values that are not finite.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of state_dict without those of get_extra_state."""
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
    "truncated_normal": _truncated_normal,  # standard deviation 0.02, truncated at two of them
}


def apply(model: nn.Module, scheme: str) -> None:
    """Redraw the weights of linear, convolutional and attention layers; biases become zero.

    Norms are unchanged. `default` keeps the layers' own initialisation. Draws from torch's global
    generator, in the order of `model.modules()`.
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
            for part in module.in_proj_weight.data.chunk(3):  # query, key, value: each its own fan
                draw(part)
            if module.in_proj_bias is not None:
                nn.init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
