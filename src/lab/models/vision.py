"""torchvision's networks, with the first layer and head fitted to the data's images and classes.

torchvision is imported when a model is created, because that takes more than a second.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from lab.models import freezing, initialisation
from lab.models.cnn import image_shape
from regrow.errors import UserError

SMALL_IMAGE = 64  # up to this size a ResNet's stem keeps the resolution
PATCHES_PER_SIDE = 8, 14  # at most, for small and for large images
VIT_B_16 = {"patch_size": 16, "width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4}

log = logging.getLogger(__name__)


def resnet(
    *,
    depth: int,
    input_shape: list[int],
    num_outputs: int,
    pretrained: bool,
    zero_init_residual: bool,
    init: str,
    freeze: list[str],
) -> nn.Module:
    """Return a ResNet-18 or -50 (He et al. 2016), (B, C, H, W) to (B, num_outputs).

    Images of up to 64x64 get the stem of the paper's CIFAR networks, a 3x3 convolution without
    stride or pooling. `zero_init_residual` starts each block as the identity (Goyal et al. 2017).
    """
    from torchvision.models import ResNet18_Weights, ResNet50_Weights, resnet18, resnet50

    makers = {18: (resnet18, ResNet18_Weights), 50: (resnet50, ResNet50_Weights)}
    if depth not in makers:
        raise UserError(f"model.depth={depth} is not available. Choose 18 or 50.")
    channels, height, width = image_shape(input_shape, 8)
    _one_start(pretrained, init)
    make, weights = makers[depth]
    model: Any = make(num_classes=num_outputs, zero_init_residual=zero_init_residual)
    small = max(height, width) <= SMALL_IMAGE
    if small:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    if small or channels != 3:
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    initialisation.apply(model, init)
    if pretrained:
        load_fitting(model, _download(weights.DEFAULT))
    freezing.freeze(model, freeze)
    return model  # type: ignore[no-any-return]


def vit(
    *,
    input_shape: list[int],
    num_outputs: int,
    patch_size: int | None,
    width: int,
    depth: int,
    heads: int,
    mlp_ratio: int,
    dropout: float,
    pretrained: bool,
    init: str,
    freeze: list[str],
) -> nn.Module:
    """Return a vision transformer (Dosovitskiy et al. 2021), (B, C, S, S) to (B, num_outputs)."""
    from torchvision.models import VisionTransformer, ViT_B_16_Weights
    from torchvision.models.vision_transformer import interpolate_embeddings

    channels, height, image_width = image_shape(input_shape, 8)
    if height != image_width:
        raise UserError(
            f"data.input_shape={list(input_shape)} is not square, and model=vit needs that. "
            "Resize or crop the images, or use model=resnet18."
        )
    _one_start(pretrained, init)
    patch_size = fitting_patch(height) if patch_size is None else patch_size
    if not 0 < patch_size < height or height % patch_size:
        raise UserError(
            f"model.patch_size={patch_size} does not divide images of {height}x{height} into "
            "patches. Choose a divisor, or null to have one chosen."
        )
    if width % heads:
        raise UserError(
            f"model.heads={heads} does not divide model.width={width}. Choose a divisor."
        )
    chosen = {"patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    chosen["mlp_ratio"] = mlp_ratio
    if pretrained and chosen != VIT_B_16:
        wanted = " ".join(f"model.{key}={value}" for key, value in VIT_B_16.items())
        raise UserError(f"model.pretrained=true is available for ViT-B/16 only. Set {wanted}.")
    model: Any = VisionTransformer(
        image_size=height,
        patch_size=patch_size,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=width * mlp_ratio,
        dropout=dropout,
        num_classes=num_outputs,
    )
    if channels != 3:
        model.conv_proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        nn.init.trunc_normal_(model.conv_proj.weight, std=1 / math.sqrt(channels * patch_size**2))
        nn.init.zeros_(model.conv_proj.bias)
    initialisation.apply(model, init)
    if pretrained:
        found = _download(ViT_B_16_Weights.DEFAULT)
        load_fitting(model, interpolate_embeddings(height, patch_size, found))
    freezing.freeze(model, freeze)
    return model  # type: ignore[no-any-return]


def fitting_patch(size: int) -> int:
    """Return the smallest patch size, from 2, with at most 8 (large images: 14) per side."""
    most = PATCHES_PER_SIDE[size > SMALL_IMAGE]
    fitting = [patch for patch in range(2, size) if size % patch == 0 and size // patch <= most]
    if not fitting:
        raise UserError(
            f"data.input_shape has images of {size}x{size}, which no patch divides. Resize or crop "
            f"them to {size // 8 * 8}x{size // 8 * 8}."
        )
    return fitting[0]


def load_fitting(model: nn.Module, found: dict[str, Tensor]) -> None:
    """Load the tensors that match in name and shape, and log the rest: a new stem, a new head."""
    own = model.state_dict()
    fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    fresh = [name for name in own if name not in fitting]
    model.load_state_dict(fitting, strict=False)
    said = ", ".join(fresh) if fresh else "none"
    log.info("pretrained: %d of %d tensors loaded; new: %s", len(fitting), len(own), said)


def _download(weights: Any) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except (OSError, RuntimeError) as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise UserError(
            f"model.pretrained=true: could not get {weights.url} ({error}). Put that file into "
            f"{folder}, or set model.pretrained=false."
        ) from error
    return found


def _one_start(pretrained: bool, init: str) -> None:
    if pretrained and init != "default":
        raise UserError(
            f"model.init={init} and model.pretrained=true both set the weights. Choose one: "
            "model.init=default or model.pretrained=false."
        )
