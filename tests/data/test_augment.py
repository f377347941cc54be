from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from regrow.data import augment
from regrow.data.augment import CropFlip
from regrow.errors import UserError
from regrow.randomness import generator


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
    store = CropFlip(pad=pad, flip=flip).store(images)
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
        store = CropFlip(pad=2, flip=True).store(images)
        table = store.table(generator(0, "augment", number))
        return store.gather(indices, table[indices])

    written = epoch(3)
    monkeypatch.setattr(augment, "WRITTEN_BYTES", 0)
    assert torch.equal(epoch(3), written)
    assert not torch.equal(epoch(4), written)


def test_the_table_uses_every_shift_and_both_mirrors_evenly() -> None:
    images = torch.zeros(9000, 1, 4, 4, dtype=torch.uint8)
    store = CropFlip(pad=1, flip=True).store(images)
    counts = store.table(generator(0, "augment", 0)).unique(return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 400 and counts.max() < 600
    assert not torch.equal(
        store.table(generator(0, "augment", 0)), store.table(generator(0, "augment", 1))
    )


def test_a_negative_pad_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.augmentation\.pad=-1"):
        CropFlip(pad=-1, flip=False)
