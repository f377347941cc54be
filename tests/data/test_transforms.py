"""Transforms of torchvision.transforms.v2, on images in memory and in files, one by one."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_files import SMALL, Noisy, of_ones_own
from test_mixing import batches_of
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.feeding import items
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import Data
from regrow.feeding.splits import Examples
from regrow.feeding.transforms import FailedTransform, Transformed
from regrow.processes.interrupt import Interrupted

Make = Callable[..., Data]
Same = Callable[[list[LoadedBatch], list[LoadedBatch]], bool]
CPU = torch.device("cpu")
V2 = "torchvision.transforms.v2"
RAND = f"{{_target_: {V2}.RandAugment, magnitude: 15}}"
ERASE = f"{{_target_: {V2}.RandomErasing, p: 0.7}}"
MIX = "mixing={_target_: lab.data.augment.MixUp, alpha: 1.0}"


@pytest.fixture(params=["memory", "crops", "files", "mixed"])
def make(
    request: pytest.FixtureRequest, make_data: Make, image_root: Path
) -> Callable[..., list[LoadedBatch]]:
    """Makes the batches of an epoch, with RandAugment and RandomErasing."""
    digits = ("digits", "batch_size=9", "limit_train=30")
    arguments = {
        "memory": (*digits, "augmentation=null"),
        "crops": (*digits, "sampling=balanced"),
        "files": ("image_folder", f"root={image_root}", *SMALL),
        "mixed": (*digits, MIX),
    }[request.param]

    def batches(
        *overrides: str, epoch: int = 1, world_size: int = 1, start: int = 0, **options: Any
    ) -> list[LoadedBatch]:
        given = (*arguments, f"transforms=[{RAND},{ERASE}]", "num_workers=0", *overrides)
        return batches_of(make_data(*given, **options), epoch, world_size, start)

    return batches


def test_images_are_drawn_by_seed_epoch_and_index(
    make: Callable[..., list[LoadedBatch]], same: Same, global_state_unchanged: None
) -> None:
    whole = make()
    assert same(make(world_size=2), whole) and same(make(start=1), whole[1:])
    assert same(make("num_workers=2"), whole)
    assert not same(make(seed=1), whole) and not same(make(epoch=2), whole)
    assert not same(make("augment=false"), whole)
    assert not same(make(f"transforms=[{RAND}]"), whole)


def test_without_a_seed_per_example_the_number_of_workers_would_show(
    make_data: Make, same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: v2 draws from torch's global state."""
    monkeypatch.setattr(items, "seeded", lambda value: contextlib.nullcontext())
    runs = [
        batches_of(make_data("digits", "limit_train=20", f"transforms=[{RAND}]",
                             f"num_workers={number}"))
        for number in (0, 1)
    ]  # fmt: skip
    assert not same(*runs)


def test_each_image_of_a_batch_gets_draws_of_its_own(make_data: Make) -> None:
    data = make_data(
        "digits", "augmentation=null", "limit_train=64", "batch_size=64",
        f"transforms=[{{_target_: {V2}.RandomHorizontalFlip}}]", "normalize=none",
    )  # fmt: skip
    (batch,) = data.train(device=CPU).epoch(0)
    (plain,) = make_data("digits", "augment=false", "limit_train=64", "batch_size=64",
                         "normalize=none").train(device=CPU).epoch(0)  # fmt: skip
    as_was = (batch.inputs == plain.inputs).flatten(1).all(1)  # type: ignore[union-attr, operator]
    mirrored = (batch.inputs == plain.inputs.flip(3)).flatten(1).all(1)  # type: ignore[union-attr, operator]
    assert (as_was | mirrored).all() and 16 < int(mirrored.sum()) < 48
    # Pixels of 0 … 16 come back as they were from a scale of 0 … 255.
    assert torch.equal(batch.targets, plain.targets)  # type: ignore[arg-type]


def test_the_crop_before_a_transform_differs_by_epoch(make_data: Make) -> None:
    erase_nothing = f"transforms=[{{_target_: {V2}.RandomErasing, p: 0}}]"

    def first_image(epoch: int, *overrides: str) -> Tensor:
        given = ("limit_train=9", "batch_size=9", "augmentation.pad=3", *overrides)
        (batch,) = make_data("digits", *given).train(device=CPU).epoch(epoch)
        return batch.inputs[int(batch.targets.argsort(stable=True)[0])]  # type: ignore[union-attr, index]

    for epoch in (0, 1, 2):  # transforms that change nothing leave the crop of the epoch
        assert torch.equal(first_image(epoch, erase_nothing), first_image(epoch))
    seen = torch.stack([first_image(epoch, erase_nothing) for epoch in range(6)])
    assert len(seen.unique(dim=0)) > 2


def test_a_transform_in_place_leaves_the_images_in_memory_as_they_were(
    make_data: Make, same: Same
) -> None:
    """Else an epoch would depend on those before it, on a resume and on the workers."""

    def epochs(erase: str, num_workers: int) -> list[LoadedBatch]:
        how = ("synthetic", "augmentation=null", "source.num_train=20", f"transforms=[{erase}]")
        data = make_data(*how, f"num_workers={num_workers}")
        found = [batch for number in range(3) for batch in data.train(device=CPU).epoch(number)]
        data.close()
        return found

    in_place = f"{{_target_: {V2}.RandomErasing, p: 0.7, inplace: true}}"
    whole = epochs(ERASE, 0)
    assert same(epochs(in_place, 0), whole) and same(epochs(in_place, 1), whole)


def test_an_evaluation_is_not_transformed(make_data: Make, same: Same) -> None:
    sets = [
        list(make_data("digits", *more).evaluation("train", device=CPU))
        for more in ((f"transforms=[{RAND}]",), ())
    ]
    assert same(*sets)


def test_a_transform_in_place_of_the_augmentation_takes_single_images(
    make_data: Make, same: Same
) -> None:
    compose = f"{{_target_: {V2}.Compose, transforms: [{RAND}, {ERASE}]}}"
    both = (f"transforms=[{RAND},{ERASE}]",)
    two = [
        batches_of(make_data("synthetic", "source.num_train=20", *how))
        for how in ((f"augmentation={compose}",), both)
    ]
    assert same(*two)


def test_a_pipeline_in_files_may_end_in_tensors(
    image_root: Path, make_data: Make, same: Same
) -> None:
    def batches(*names: str, num_workers: int = 0) -> list[LoadedBatch]:
        steps = [f"{{_target_: {V2}.RandomResizedCrop, size: [16,16]}}", *names]
        compose = f"{{_target_: {V2}.Compose, transforms: [{','.join(steps)}]}}"
        given = ("image_folder", f"root={image_root}", *SMALL, f"num_workers={num_workers}")
        return batches_of(make_data(*given, "~augmentation", f"+augmentation={compose}"))

    whole = batches(RAND, f"{{_target_: {V2}.PILToTensor}}", ERASE)
    assert same(batches(RAND, f"{{_target_: {V2}.PILToTensor}}", ERASE, num_workers=2), whole)
    assert not same(batches(RAND), whole)
    with pytest.raises(DataError, match=r"data.augmentation gave torch.float32 of shape"):
        batches(f"{{_target_: {V2}.PILToTensor}}", f"{{_target_: {V2}.ConvertImageDtype}}")


class Reads:
    """Draws from torch, numpy and `random`, as transforms of others may."""

    def __call__(self, image: Tensor) -> Tensor:
        noise = torch.rand(()) + np.random.rand() + random.random()
        return (image + 20 * noise).to(torch.uint8)


def images(count: int = 12) -> Examples:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 100, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)
    return Examples(pixels, torch.arange(count) % 3, weights=pixels[:, 0, 0, 0] / 100)


def test_numpy_and_random_are_seeded_too_and_weights_stay(
    same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batches(**changes: Any) -> list[LoadedBatch]:
        data = of_ones_own(images(), input_shape=[3, 4, 4], **changes)
        data.transforms = [Reads()]
        found = list(data.train(device=CPU).epoch(0))
        data.close()
        return found

    whole = batches()
    assert same(batches(num_workers=2), whole) and not same(batches(seed=1), whole)
    weights = torch.cat([batch.weights for batch in whole])  # type: ignore[misc]
    assert sorted(weights.tolist()) == pytest.approx(sorted(images().weights.tolist()))  # type: ignore[union-attr]
    # The negative control: a seed for torch alone.
    monkeypatch.setattr("regrow.randomness.random.seed", lambda value: None)
    first = batches()
    random.random()
    assert not same(batches(), first)


@pytest.mark.slow
def test_data_that_transforms_do_not_fit_is_an_error_of_one_line(make_data: Make) -> None:
    rand = f"transforms=[{RAND}]"
    with pytest.raises(UserError, match="it would not move masks with their images"):
        make_data("digit_scenes", rand, "ignore_index=255")
    with pytest.raises(UserError, match="does not fit float64 inputs of shape"):
        make_data("diabetes", rand)
    with pytest.raises(UserError, match="value=random draws numbers near 0"):
        make_data("digits", f"transforms=[{{_target_: {V2}.RandomErasing, value: random}}]")
    make_data("digits", f"transforms=[{{_target_: {V2}.RandomErasing, value: 3}}]")
    with pytest.raises(UserError, match="does not reach into a data set of your own"):
        of_ones_own(Noisy(13, 0), transforms=[{"_target_": f"{V2}.RandomErasing"}])
    with pytest.raises(UserError, match="cannot be called with an image"):
        of_ones_own(images(), input_shape=[3, 4, 4], transforms=[3])
    floats = Transformed([(torch.ones(3, 4, 4, dtype=torch.uint8), 0)], [Tensor.float], 255.0)
    with pytest.raises(DataError, match=r"must return uint8 images \(C, H, W\), and gave torch.f"):
        floats[0]
    cut = Transformed([(torch.ones(3, 4, 4, dtype=torch.uint8), 0)], [lambda x: x[:, 1:]], 255.0)
    with pytest.raises(DataError, match=r"must keep an image's shape \[3, 4, 4\], and gave \[3, 3"):
        cut[0]


class OfTensors:
    """Takes a tensor, and `raises` in its place if that is given."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.raises = raises

    def __call__(self, image: Any) -> Any:
        if self.raises is not None:
            raise self.raises
        return image.flip(-1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_ones_own_augmentation_is_one_line(
    num_workers: int, make_data: Make, image_root: Path
) -> None:
    files = ("image_folder", f"root={image_root}", *SMALL, f"num_workers={num_workers}")
    data = make_data(*files)
    data.augmentation = OfTensors()  # and files give it a PIL image
    with pytest.raises(DataError) as raised:
        batches_of(data)
    start = f"data.augmentation=OfTensors (tests/data/{Path(__file__).name}:"
    said = str(raised.value)
    assert said.startswith(start) and ": AttributeError: " in said and "\n" not in said
    assert "It got a PIL image. List it in data.transforms to get a uint8 tensor" in said
    assert "in __call__" in str(raised.value.__cause__)  # HYDRA_FULL_ERROR=1 shows it
    data = make_data(*files)
    data.transforms = [OfTensors()]  # the negative control, and the way out that the error names
    assert len(batches_of(data)) > 0


def test_an_error_of_a_transform_in_memory_names_both_keys_and_passes_others_on() -> None:
    def made(error: BaseException) -> Transformed:
        return Transformed([(torch.ones(3, 4, 4, dtype=torch.uint8), 0)], [OfTensors(error)], 255.0)

    with pytest.raises(
        FailedTransform, match=r"^data\.augmentation or data\.transforms=OfTensors \(tests"
    ):
        made(KeyError("mean"))[0]
    for error in (Interrupted(), DataError("of a file"), MemoryError()):
        with pytest.raises(type(error)) as raised:
            made(error)[0]
        assert raised.value is error
