"""Augmentation of training examples, exactly reproducible per (seed, epoch, example).

Images in memory are augmented a batch at a time. An object such as `CropFlip` lays them out once
(`store`), draws one table of random numbers per epoch, with a row per example (`table`), and reads
augmented examples by index (`gather`), so an augmented example does not depend on its batch. Images
in files are augmented one by one in the workers, by any callable on a PIL image, such as `Photo`;
torch, numpy and `random` are seeded for each example before the call. `MixUp` and `CutMix` blend an
example with a partner from its batch, by random numbers that each example has for an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import UserError
from regrow.feeding.mixing import Mix
from regrow.randomness import generator

WRITTEN_BYTES = 1 << 22  # up to this size all crops are written out, which takes milliseconds


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """Shift by up to `pad` pixels each way, and mirror half of the images.

    The border is filled with zeros, or with the reflected image for `padding_mode="reflect"`. With
    `alternate_flips` each image is mirrored in every other epoch, so that no two consecutive epochs
    show the same one (Jordan, "94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024); a random
    draw decides which images start mirrored.
    """

    pad: int
    flip: bool
    padding_mode: str
    alternate_flips: bool

    only_moves_pixels = True  # so a mask may be an extra channel

    def __post_init__(self) -> None:
        require("data.augmentation.pad", self.pad)
        require("data.augmentation.padding_mode", self.padding_mode)
        if self.alternate_flips and not self.flip:
            raise UserError(
                "data.augmentation.alternate_flips=true mirrors nothing with flip=false. "
                "Set data.augmentation.flip=true too."
            )

    def store(self, images: Tensor) -> _Crops:
        return _Crops(images, self)


class _Crops:
    """Every crop of every padded image, and of its mirror, as one overlapping view of flat memory.

    Entry s of the view is the crop whose first pixel is byte s of the padded images, so one
    `index_select` reads a batch of crops at the speed of a copy, without an index per pixel. For a
    few small images, whose rows are too short for that, the crops are written out and entry s is
    one of them.
    """

    def __init__(self, images: Tensor, options: CropFlip) -> None:
        self.num, channels, height, width = images.shape  # (N, C, H, W) uint8
        self.options = options
        pad = options.pad
        if options.padding_mode == "reflect":
            padded = _reflected(images, pad)
        else:
            padded = F.pad(images, (pad, pad, pad, pad))
        if options.flip:
            padded = torch.cat([padded, padded.flip(3)])
        padded = padded.contiguous()
        self.rows, self.columns = height + 2 * pad, width + 2 * pad
        self.stride = channels * self.rows * self.columns
        plane = self.rows * self.columns
        reach = (channels - 1) * plane + (height - 1) * self.columns + width
        self.crops = padded.as_strided(
            (padded.numel() - reach + 1, channels, height, width), (1, plane, self.columns, 1)
        )
        shifts = 2 * pad + 1
        if len(padded) * shifts**2 * channels * height * width <= WRITTEN_BYTES:
            all_shifts = (len(padded), shifts, shifts, channels, height, width)
            strides = (self.stride, self.columns, 1, plane, self.columns, 1)
            written = padded.as_strided(all_shifts, strides).reshape(-1, channels, height, width)
            self.crops, self.columns, self.stride = written, shifts, shifts**2

    def table(self, seed: int, epoch: int) -> Tensor:
        """Return each example's crop offset, (N,); those beyond the last image address mirrors."""
        size, shifts = (self.num,), 2 * self.options.pad + 1
        random = generator(seed, "augment", epoch)
        top = torch.randint(0, shifts, size, generator=random)
        left = torch.randint(0, shifts, size, generator=random)
        offsets = top * self.columns + left
        if self.options.flip:
            if self.options.alternate_flips:
                first = torch.randint(0, 2, size, generator=generator(seed, "augment", "mirror"))
                mirror = (first + epoch) % 2
            else:
                mirror = torch.randint(0, 2, size, generator=random)
            offsets += mirror * (self.num * self.stride)
        return offsets

    def gather(self, indices: Tensor, table: Tensor) -> Tensor:
        return self.crops.index_select(0, indices * self.stride + table)


def _reflected(images: Tensor, pad: int) -> Tensor:
    """Return (N, C, H + 2 pad, W + 2 pad) images, reflected; F.pad reflects only floats."""
    for dim in (2, 3):
        last = images.shape[dim] - 1
        if pad > last:
            raise UserError(
                f"data.augmentation.pad={pad} reflects more pixels than images of {last + 1} have. "
                f"Use {last} at most, or data.augmentation.padding_mode=constant."
            )
        places = torch.arange(-pad, last + 1 + pad, device=images.device)
        images = images.index_select(dim, last - (last - places.abs()).abs())
    return images


@dataclass(frozen=True, kw_only=True)
class Photo:
    """RandomResizedCrop to (C, H, W), random mirror and ColorJitter, on one PIL image.

    With a mask as a second argument, returns both, the mask moved like the image. With the decoder
    torchvision, the image is uint8 (C, H, W) instead of PIL.
    """

    takes = "pixels"

    input_shape: list[int]
    crop_scale: list[float]
    crop_ratio: list[float]
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float

    def __call__(self, *image_and_mask: Any) -> Any:
        return self._transform(*image_and_mask)

    @cached_property
    def _transform(self) -> Any:
        from torchvision.transforms import v2

        size = self.input_shape[1:]
        steps: list[Any] = [v2.RandomResizedCrop(size, self.crop_scale, self.crop_ratio)]
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        jitter = (self.brightness, self.contrast, self.saturation, self.hue)
        if any(jitter):
            steps.append(v2.ColorJitter(*jitter))
        return v2.Compose(steps)


@dataclass(frozen=True, kw_only=True)
class CropResized:
    """RandomCrop to (C, H, W) and random mirror of the resized image, uint8 (C, H', W')."""

    input_shape: list[int]
    flip: bool

    takes = "resized"  # so the image may come from data.cache

    def __call__(self, image: Tensor) -> Tensor:
        *places, side = torch.rand(3).tolist()
        for dim, size, place in zip((1, 2), self.input_shape[1:], places, strict=True):
            image = image.narrow(dim, int(place * (image.shape[dim] - size + 1)), size)
        return image.flip(2) if self.flip and side < 0.5 else image


@dataclass(frozen=True, kw_only=True)
class MixUp(Mix):
    """Blend two examples of any shape, by a share from Beta(alpha, alpha) (Zhang et al., 2018)."""

    alpha: float  # 0.2: mostly one of the two; 1: every share is equally likely

    num_numbers = 1

    def draw(self, numbers: Tensor) -> Tensor:
        return _beta(self.alpha, numbers)

    def __call__(self, inputs: Tensor, partners: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        share = choices.view(-1, *[1] * (inputs.ndim - 1))
        return inputs * share + partners * (1 - share), choices[:, 0]


@dataclass(frozen=True, kw_only=True)
class CutMix(Mix):
    """Replace a box of each image by the partner's (Yun et al., 2019).

    Its area is a share from Beta(alpha, alpha), less what lies beyond the border.
    """

    alpha: float

    num_numbers = 3  # the share, and the centre of the box

    def draw(self, numbers: Tensor) -> Tensor:
        side = (1 - _beta(self.alpha, numbers[:, :1])).sqrt()  # as a fraction of the image's
        return torch.cat([side, numbers[:, 1:]], 1)

    def __call__(self, inputs: Tensor, partners: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        if inputs.ndim != 4:
            raise UserError(
                f"data.mixing=CutMix takes images (C, H, W), and inputs are of shape "
                f"{list(inputs.shape[1:])}. Use lab.data.augment.MixUp."
            )
        side, *centre = choices.unbind(1)
        outside, lengths = [], []
        for middle, size in zip(centre, inputs.shape[2:], strict=True):
            ends = (middle + sign * side / 2 for sign in (-1, 1))
            low, high = ((end * size).round().clamp(0, size) for end in ends)
            places = torch.arange(size, device=inputs.device)
            outside.append((places < low[:, None]) | (places >= high[:, None]))  # (B, size)
            lengths.append((high - low) / size)
        own = outside[0][:, None, :, None] | outside[1][:, None, None, :]
        return torch.where(own, inputs, partners), 1 - lengths[0] * lengths[1]


def _beta(alpha: float, uniform: Tensor) -> Tensor:
    """Return Beta(alpha, alpha) numbers by the inverse of their distribution function.

    This takes one uniform number per example; a sampler would reject some and draw again.
    """
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, uniform.numpy()))
