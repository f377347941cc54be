"""A small fast network for small photographs (Jordan, "94% on CIFAR-10 in 3.29 seconds", 2024)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.models import freezing
from lab.models.cnn import image_shape
from lab.models.mlp import choice
from regrow.config.rules import require
from regrow.errors import UserError

VIEWS = ("one", "mirror", "mirror_shift")
PATCH = 2  # side in pixels of the patches that the first layer whitens
ADDED_VARIANCE = 5e-4  # of each direction; directions that hardly vary are mostly noise
SMALLEST_SIZE = 9


class WhitenedCNN(nn.Module):
    """Maps images (B, C, H, W), from 9x9, to (B, num_outputs).

    The first layer's filters are not learnt: they are the principal directions of the training
    images' 2x2 patches, each scaled to a variance of nearly one and used with both signs
    (`initialize_from`). Each of three stages halves the image. Convolutions are initialised to pass
    their input on. Only the norms' shift is learnt, not their scale.

    In evaluation the outputs of several `views` of an image are averaged. `one`: the image.
    `mirror`: the image and its mirror. `mirror_shift`: these two, with a weight of a quarter each,
    and the same two of the image shifted by a pixel down and right, and up and left, with an eighth
    each.
    """

    def __init__(
        self,
        *,
        input_shape: list[int],
        num_outputs: int,
        channels: list[int],
        norm_momentum: float,
        views: str,
        freeze: list[str],
    ) -> None:
        super().__init__()
        in_channels, _, _ = image_shape(input_shape, SMALLEST_SIZE)
        require("model.channels", channels)
        if len(channels) != 3:
            raise UserError(
                f"model.channels={channels}: there are three stages. Give three widths."
            )
        self.views = choice("views", views, VIEWS)
        directions = in_channels * PATCH**2
        self.whiten = nn.Conv2d(in_channels, 2 * directions, PATCH)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        widths = itertools.pairwise([2 * directions, *channels])
        self.stages = nn.Sequential(*(_Stage(*pair, norm_momentum) for pair in widths))
        self.head = nn.Linear(channels[-1], num_outputs, bias=False)
        nn.init.normal_(self.head.weight, std=1 / channels[-1])
        freezing.freeze(self, freeze)

    def initialize_from(self, inputs: Tensor) -> None:
        """Set the first layer's filters from training images (N, C, H, W), normalised."""
        weight = self.whiten.weight
        size = weight[0].numel()
        products, count = torch.zeros(size, size, dtype=torch.float64), 0
        for part in torch.split(inputs, 64):  # all patches of large images would take gigabytes
            patches = F.unfold(part, PATCH).transpose(1, 2).flatten(0, 1).double()
            products += patches.T @ patches
            count += len(patches)
        values, vectors = torch.linalg.eigh(products / count)
        # The sign of an eigenvector depends on rounding, so fix it.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        filters = (vectors * largest.sign() / (values + ADDED_VARIANCE).sqrt()).T
        weight.copy_(torch.cat([filters, -filters]).view_as(weight))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training or self.views == "one":
            return self._outputs(inputs)
        both = self._with_mirror(inputs)
        if self.views == "mirror":
            return both
        height, width = inputs.shape[2:]
        padded = F.pad(inputs, (1, 1, 1, 1), mode="reflect")
        down = self._with_mirror(padded[:, :, :height, :width])
        up = self._with_mirror(padded[:, :, 2:, 2:])
        return both / 2 + (down + up) / 4

    def _with_mirror(self, inputs: Tensor) -> Tensor:
        return (self._outputs(inputs) + self._outputs(inputs.flip(3))) / 2

    def _outputs(self, inputs: Tensor) -> Tensor:
        features = self.stages(F.gelu(self.whiten(inputs)))
        outputs: Tensor = self.head(largest(features))
        return outputs


def largest(features: Tensor) -> Tensor:
    """Return the largest value of each channel, (B, C).

    Unlike `amax`, it has a finite gradient when compiled in bf16 (torch 2.11 to 2.15): `amax` looks
    for the rounded maximum among values that were not rounded, and divides by their number.
    """
    return features.flatten(2).max(2).values


class _Stage(nn.Module):
    """Maps (B, before, H, W) to (B, after, H // 2, W // 2)."""

    def __init__(self, before: int, after: int, norm_momentum: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = _convolution(before, after), _norm(after, norm_momentum)
        self.conv2, self.norm2 = _convolution(after, after), _norm(after, norm_momentum)

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = F.gelu(self.norm1(F.max_pool2d(self.conv1(inputs), 2)))
        return F.gelu(self.norm2(self.conv2(inputs)))


def _convolution(before: int, after: int) -> nn.Conv2d:
    convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
    nn.init.dirac_(convolution.weight.data[:before])  # the first filters pass their input on
    return convolution


def _norm(channels: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad_(False)
    return norm
