"""A multilayer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection

from torch import Tensor, nn

from lab.models import freezing, initialisation
from regrow.config.rules import require
from regrow.errors import UserError, did_you_mean

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
}
NORMS = ("none", "layer", "batch")


class MLP(nn.Module):
    """Maps inputs of any shape (B, *input_shape), flattened, to (B, num_outputs).

    Each width in `hidden` adds a linear layer, then norm, activation and dropout; an empty list
    gives a linear model.
    """

    def __init__(
        self,
        *,
        input_shape: list[int],
        num_outputs: int,
        hidden: list[int],
        activation: str,
        norm: str,
        dropout: float,
        init: str,
        freeze: list[str],
    ) -> None:
        super().__init__()
        require("model.input_shape", input_shape)
        require("model.hidden", hidden)
        choice("norm", norm, NORMS)
        choice("activation", activation, ACTIVATIONS)
        widths = [math.prod(input_shape), *hidden]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers.append(nn.Linear(before, after))
            if norm != "none":
                layers.append(nn.LayerNorm(after) if norm == "layer" else nn.BatchNorm1d(after))
            layers.append(ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_outputs)
        initialisation.apply(self, init)
        freezing.freeze(self, freeze)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs.flatten(1)))
        return outputs


def choice(key: str, value: str, known: Collection[str]) -> str:
    """Return `value`. Raises UserError if it is unknown."""
    if value not in known:
        hint = did_you_mean(value, known) or f" Choose from {', '.join(known)}."
        raise UserError(f"model.{key}={value} is unknown.{hint}")
    return value
