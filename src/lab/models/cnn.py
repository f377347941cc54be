"""A small convolutional network for small images."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from lab.models import freezing, initialisation
from lab.models.mlp import choice
from regrow.config.rules import require
from regrow.errors import UserError

NORMS = ("none", "group", "batch")
SMALLEST_SIZE = 8


class CNN(nn.Module):
    """Maps images (B, C, H, W) of any channels and sizes from 8x8 to (B, num_outputs).

    Each width in `channels` is a stage of two 3x3 convolutions. The image is halved between stages
    as long as it has at least four rows and columns. The mean over positions goes to the head.
    """

    def __init__(
        self,
        *,
        input_shape: list[int],
        num_outputs: int,
        channels: list[int],
        norm: str,
        dropout: float,
        init: str,
        freeze: list[str],
    ) -> None:
        super().__init__()
        in_channels, height, width = image_shape(input_shape, SMALLEST_SIZE)
        require("model.channels", channels)
        choice("norm", norm, NORMS)
        size = min(height, width)
        stages: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise([in_channels, *channels])):
            if index and size >= 4:
                stages.append(nn.MaxPool2d(2))
                size //= 2
            stages.append(stage(before, after, norm))
        self.body = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], num_outputs)
        initialisation.apply(self, init)
        freezing.freeze(self, freeze)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.body(inputs).mean((2, 3))
        outputs: Tensor = self.head(self.dropout(features))
        return outputs


def stage(before: int, after: int, norm: str) -> nn.Sequential:
    """Return two 3x3 convolutions, each followed by the norm and a ReLU."""
    layers: list[nn.Module] = []
    for channels in (before, after):
        layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=norm == "none"))
        if norm == "batch":
            layers.append(nn.BatchNorm2d(after))
        elif norm == "group":
            groups = max(number for number in (1, 2, 4, 8) if after % number == 0)
            layers.append(nn.GroupNorm(groups, after))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def image_shape(
    input_shape: list[int], smallest: int, way_out: str = "Use model=mlp."
) -> tuple[int, int, int]:
    """Return (C, H, W). Raises UserError unless the data are images of at least that size."""
    if len(input_shape) != 3:
        raise UserError(
            f"data.input_shape={list(input_shape)}: this model needs images, (C, H, W). "
            "Use model=mlp."
        )
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise UserError(
            f"data.input_shape={list(input_shape)} is smaller than {smallest}x{smallest}, the "
            f"least this model takes. {way_out}"
        )
    return channels, height, width
