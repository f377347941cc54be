"""Segmentation: what fits, the loss over pixels, and pictures for the report."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import Bench, batch_of
from torch import Tensor
from torch.optim import SGD

from lab.models.unet import UNet
from lab.tasks.losses import CrossEntropy
from lab.tasks.tasks import Segmentation
from regrow.errors import UserError
from regrow.record import pictures, plots

C = 3
RNG = torch.Generator().manual_seed(0)


def segmentation(ignore_index: int | None = 255) -> Segmentation:
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=ignore_index)
    return Segmentation(
        num_classes=C,
        class_names=["road", "tree", "sky $x$"],
        monitor="val/iou",
        per_class=True,
        extra_metrics=None,
        loss=loss,
    )


def unet(channels: list[int] | None = None, norm: str = "none") -> UNet:
    torch.manual_seed(0)
    shape, widths = [1, 8, 8], channels or [4, 6]
    return UNet(
        input_shape=shape,
        num_outputs=C,
        channels=widths,
        norm=norm,
        dropout=0.0,
        init="default",
        freeze=[],
    )


def masks(count: int, *, ignored: float = 0.0) -> Tensor:
    classes = torch.randint(C, (count, 8, 8), generator=RNG, dtype=torch.uint8)
    return classes.where(torch.rand(count, 8, 8, generator=RNG) >= ignored, 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_logits_and_masks_that_fit_are_accepted(dtype: torch.dtype) -> None:
    outputs = torch.randn(4, C, 8, 8, requires_grad=True)
    segmentation().check(outputs, masks(4, ignored=0.3).to(dtype))


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (
            torch.randn(4, C),
            masks(4),
            r"outputs of shape \(B, 3, H, W\), got \(B, 3\). Use a model",
        ),
        (torch.randn(4, 2, 8, 8), masks(4), r"\(B, 3, H, W\), got \(B, 2, 8, 8\)"),
        (torch.randn(4, C, 4, 4), masks(4), r"shape \(4, 4, 4\), got torch.uint8 of shape \(4, 8"),
        (torch.randn(4, C, 4, 4), masks(4), "outputs be as large as the masks"),
        (torch.randn(4, C, 8, 8), masks(4).float(), r"got torch.float32 .* give targets.long\(\)"),
        (torch.randn(4, C, 8, 8), masks(4).unsqueeze(1), r"one class index per pixel, \(B, H, W\)"),
        (torch.randn(4, C, 8, 8), masks(4) + 1, "class index 3 with data.num_classes=3"),
        (torch.randn(4, C, 8, 8).softmax(1), masks(4), "ends in a softmax"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error(
    outputs: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        segmentation().check(outputs, targets)


def test_other_losses_and_lists_of_another_length_are_refused() -> None:
    weights = CrossEntropy(label_smoothing=0.0, class_weights=[1.0, 2.0], ignore_index=255)
    with pytest.raises(UserError, match=r"loss.class_weights has 2 numbers for 3 classes"):
        Segmentation(
            num_classes=C,
            class_names=None,
            monitor="val/iou",
            per_class=True,
            extra_metrics=None,
            loss=weights,
        )


@pytest.mark.parametrize("slices", [1, 2, 5])
def test_micro_batches_give_the_mean_over_the_valid_pixels_of_the_batch(slices: int) -> None:
    """Images differ in the number of ignored pixels, so a mean of means is another number."""
    inputs, targets = torch.randn(5, 1, 8, 8, dtype=torch.float64), masks(5)
    for number, mask in enumerate(targets):
        mask[: 2 * number] = 255 if number < 4 else mask[: 2 * number]
    bench = Bench(unet().double(), segmentation(), SGD, slices=slices)
    line = bench.step(batch_of(inputs, targets))
    model = unet().double()
    whole = F.cross_entropy(model(inputs), targets.long(), ignore_index=255)
    whole.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert line["train/loss"] == pytest.approx(whole.item(), abs=1e-12)
    assert line["train/grad_norm"] == pytest.approx(norm.item(), abs=1e-12)
    each = [
        F.cross_entropy(model(x[None]), y[None].long(), ignore_index=255)
        for x, y in zip(inputs, targets, strict=True)
    ]
    assert abs(torch.stack(each).mean().item() - whole.item()) > 1e-4


def test_a_batch_of_ignored_pixels_alone_changes_no_weight() -> None:
    bench = Bench(unet(), segmentation(), SGD)
    before = [p.detach().clone() for p in bench.state.model.parameters()]
    line = bench.step(batch_of(torch.randn(2, 1, 8, 8), torch.full((2, 8, 8), 255).byte()))
    assert line["train/empty_steps"] == 1
    after = bench.state.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [(8, 8), (13, 9), (16, 4)])
@pytest.mark.parametrize("norm", ["none", "group", "batch"])
def test_a_unet_gives_an_output_per_pixel(size: tuple[int, int], norm: str) -> None:
    model = unet([4, 6, 8], norm)
    assert model(torch.randn(2, 1, *size)).shape == (2, C, *size)


def test_deeper_stages_see_further() -> None:
    inputs = torch.zeros(1, 1, 16, 16)
    inputs[0, 0, 0, 0] = 9.0

    def reach(channels: list[int]) -> int:
        model = unet(channels)
        changed = (model(inputs) - model(inputs * 0)).abs().amax(1)[0] > 0
        return int(changed.nonzero().max())

    assert reach([4]) == 2 and reach([4, 6, 8]) > 6


def test_predictions_are_a_class_and_shares_per_pixel() -> None:
    outputs = torch.randn(2, C, 8, 8)
    found = segmentation().predict(outputs)
    assert torch.equal(found["prediction"], outputs.argmax(1))
    assert torch.allclose(found["probability"].sum(1), torch.ones(2, 8, 8))


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as file:
        return np.array(file)


def test_the_first_examples_are_shown_as_they_were_measured() -> None:
    task, targets = segmentation(), masks(9, ignored=0.2)
    outputs = torch.randn(9, C, 8, 8)
    shown = task.examples(batch_of(torch.randn(9, 1, 8, 8), targets), outputs)
    columns = shown["examples"]
    assert [*columns] == ["input", "true", "predicted"]
    assert {len(column) for column in columns.values()} == {pictures.NUM_SHOWN}
    for index in range(pictures.NUM_SHOWN):
        expected = targets[index].where(targets[index] != 255, C)
        assert np.array_equal(decoded(columns["true"][index]), expected)
        assert np.array_equal(decoded(columns["predicted"][index]), outputs[index].argmax(0))
        image = decoded(columns["input"][index])
        assert image.min() == 0 and image.max() == 255
    figure = pictures.figure(columns, shown["class_names"], plots.COLOURS[:C])
    page = plots.to_svg(figure)
    assert page.count("<image") == 3 * pictures.NUM_SHOWN and "http://" not in page.split("<g>")[1]
    assert task.examples(batch_of((targets, targets), targets), outputs) == {}  # several inputs


def test_large_images_are_thinned_for_the_page() -> None:
    inputs = torch.rand(1, 3, 700, 300)
    shown = pictures.of_masks(inputs, {"true": torch.zeros(1, 700, 300)}, ["a"], None, None)
    assert decoded(shown["examples"]["input"][0]).shape == (math.ceil(700 / 3), 100, 3)
    assert decoded(shown["examples"]["true"][0]).shape == (math.ceil(700 / 3), 100)
