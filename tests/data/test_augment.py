from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lab.data import augment
from lab.data.augment import CropFlip, CropResized
from regrow.errors import UserError


def crop_flip(**changed: Any) -> CropFlip:
    options = {"pad": 0, "flip": False, "padding_mode": "constant", "alternate_flips": False}
    return CropFlip(**(options | changed))  # type: ignore[arg-type]


def slowly(image: torch.Tensor, top: int, left: int, mirror: bool, pad: int) -> torch.Tensor:
    padded = F.pad(image, (pad, pad, pad, pad))
    padded = padded.flip(2) if mirror else padded
    return padded[:, top : top + image.shape[1], left : left + image.shape[2]]


@pytest.mark.parametrize(
    ("channels", "height", "width", "pad"), [(1, 8, 8, 1), (3, 6, 9, 2), (3, 5, 5, 0)]
)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_a_crop_read_from_flat_memory_is_the_crop_of_the_padded_image(
    channels: int,
    height: int,
    width: int,
    pad: int,
    flip: bool,
    written: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment, "WRITTEN_BYTES", 10**9 if written else 0)
    random = torch.Generator().manual_seed(0)
    shape = (6, channels, height, width)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=random)
    store = crop_flip(pad=pad, flip=flip).store(images)
    columns = width + 2 * pad
    stride = channels * columns * (height + 2 * pad)
    if written:
        columns, stride = 2 * pad + 1, (2 * pad + 1) ** 2
    for index in range(6):
        for mirror in (False, True)[: 1 + flip]:
            for top in range(2 * pad + 1):
                for left in range(2 * pad + 1):
                    offset = top * columns + left + mirror * 6 * stride
                    got = store.gather(torch.tensor([index]), torch.tensor([offset]))[0]
                    assert torch.equal(got, slowly(images[index], top, left, mirror, pad))


def test_an_epoch_is_the_same_whether_crops_are_written_out_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.randint(0, 256, (50, 2, 7, 5), dtype=torch.uint8)
    indices = torch.randperm(50)

    def epoch(number: int) -> torch.Tensor:
        store = crop_flip(pad=2, flip=True).store(images)
        table = store.table(0, number)
        return store.gather(indices, table[indices])

    written = epoch(3)
    monkeypatch.setattr(augment, "WRITTEN_BYTES", 0)
    assert torch.equal(epoch(3), written)
    assert not torch.equal(epoch(4), written)


def test_the_table_uses_every_shift_and_both_mirrors_evenly() -> None:
    images = torch.zeros(9000, 1, 4, 4, dtype=torch.uint8)
    store = crop_flip(pad=1, flip=True).store(images)
    counts = store.table(0, 0).unique(return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 400 and counts.max() < 600
    assert not torch.equal(store.table(0, 0), store.table(0, 1))


@pytest.mark.parametrize("written", [False, True])
def test_reflected_borders_are_those_of_torch(
    written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "WRITTEN_BYTES", 10**9 if written else 0)
    images = torch.randint(1, 256, (4, 3, 6, 9), dtype=torch.uint8)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    indices = torch.arange(4)
    for mode, equal in (("reflect", True), ("constant", False)):
        store = crop_flip(pad=2, padding_mode=mode).store(images)
        found = store.gather(indices, torch.zeros(4, dtype=torch.int64))
        assert torch.equal(found, padded[:, :, :6, :9]) is equal
        centre = store.gather(indices, torch.full((4,), 2 * (5 if written else 13) + 2))
        assert torch.equal(centre, images)


def test_alternate_flips_mirror_each_image_in_every_other_epoch() -> None:
    images = torch.randint(0, 256, (2000, 1, 4, 4), dtype=torch.uint8)

    def mirrored(epoch: int, alternate: bool, seed: int = 0) -> torch.Tensor:
        store = crop_flip(flip=True, alternate_flips=alternate).store(images)
        seen = store.gather(torch.arange(2000), store.table(seed, epoch))
        return (seen == images.flip(3)).flatten(1).all(1)

    first = mirrored(0, True)
    assert 0.45 < first.double().mean() < 0.55
    assert not torch.equal(first, mirrored(0, True, seed=1))
    for epoch in range(1, 5):
        assert torch.equal(mirrored(epoch, True), first ^ bool(epoch % 2))
        by_chance = (mirrored(epoch, False) == mirrored(epoch - 1, False)).double().mean()
        assert 0.45 < by_chance < 0.55


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pad": -1}, r"pad=-1 must be an integer of at least 0"),
        ({"padding_mode": "zeros"}, "must be one of constant, reflect"),
        ({"alternate_flips": True}, "flip=true too"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"data\.augmentation\..*{says}"):
        crop_flip(**options)


def test_an_image_reflects_no_more_than_it_has() -> None:
    images = torch.zeros(2, 1, 4, 9, dtype=torch.uint8)
    crop_flip(pad=3, padding_mode="reflect").store(images)
    with pytest.raises(UserError, match=r"pad=4 .* Use 3 at most"):
        crop_flip(pad=4, padding_mode="reflect").store(images)


def test_a_crop_of_the_resized_image_lies_anywhere_in_it_and_is_mirrored_half_the_time() -> None:
    image = torch.arange(5 * 7, dtype=torch.uint8).view(1, 5, 7)
    crop = CropResized(input_shape=[1, 3, 4], flip=True)
    torch.manual_seed(0)
    seen: dict[tuple[int, bool], int] = {}
    for _ in range(2400):
        found = crop(image)
        assert found.shape == (1, 3, 4)
        mirrored = int(found[0, 0, 0]) > int(found[0, 0, 1])
        upright = found.flip(2) if mirrored else found
        first = int(upright[0, 0, 0])
        top, left = divmod(first, 7)
        assert torch.equal(upright, image[:, top : top + 3, left : left + 4])
        seen[first, mirrored] = seen.get((first, mirrored), 0) + 1
    assert len(seen) == 3 * 4 * 2  # every place, both ways
    assert all(60 < count < 140 for count in seen.values()), seen  # 100 each
    still = CropResized(input_shape=[1, 3, 4], flip=False)
    assert all(bool((still(image).diff(dim=2) == 1).all()) for _ in range(20))  # never mirrored
    assert torch.equal(CropResized(input_shape=[1, 5, 7], flip=False)(image), image)
