"""Random images of CIFAR-10's shape, which is not bundled: `data.source._target_=photographs.…`."""

from __future__ import annotations

import torch

from regrow.feeding.splits import Examples, Splits


def cifar10(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    random = torch.Generator().manual_seed(seed)

    def split(count: int) -> Examples:
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
        return Examples(images, torch.randint(0, 10, (count,), generator=random))

    return Splits(split(48), split(16), split(16))
