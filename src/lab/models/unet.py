"""A small U-Net (Ronneberger, Fischer and Brox, 2015): an output per pixel."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.models import freezing, initialisation
from lab.models.cnn import NORMS, image_shape, stage
from lab.models.mlp import choice
from regrow.config.rules import require


class UNet(nn.Module):
    """Maps images (B, C, H, W) of any channels and sizes to (B, num_outputs, H, W).

    Each width in `channels` is a stage of two 3x3 convolutions. The image is halved between the
    stages on the way down. On the way up it is enlarged to the size of the stage above, whose
    features are added as further channels.
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
        require("model.channels", channels)
        fewer = "Give fewer model.channels, or larger images."
        in_channels, _, _ = image_shape(input_shape, 2 ** (len(channels) - 1), fewer)
        choice("norm", norm, NORMS)
        widths = itertools.pairwise([in_channels, *channels])
        self.down = nn.ModuleList(stage(before, after, norm) for before, after in widths)
        above = itertools.pairwise(reversed(channels))
        self.up = nn.ModuleList(stage(below + width, width, norm) for below, width in above)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(channels[0], num_outputs, 1)
        initialisation.apply(self, init)
        freezing.freeze(self, freeze)

    def forward(self, inputs: Tensor) -> Tensor:
        features, kept = inputs, []
        for index, down in enumerate(self.down):
            features = down(F.max_pool2d(features, 2) if index else features)
            kept.append(features)
        for up, beside in zip(self.up, reversed(kept[:-1]), strict=True):
            enlarged = F.interpolate(features, beside.shape[2:])  # nearest: exact on a GPU too
            features = up(torch.cat([enlarged, beside], 1))
        outputs: Tensor = self.head(self.dropout(features))
        return outputs
