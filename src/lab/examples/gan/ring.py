"""Points on a ring of Gaussians, and the task of covering all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lab.tasks.losses import LossOutput
from regrow.errors import UserError
from regrow.feeding.splits import Examples, Splits
from regrow.randomness import generator


def ring(
    *, num_modes: int, deviation: float, num_train: int, num_val: int, num_test: int, seed: int
) -> Splits:
    """Return real points to train on, and latent points, fixed, to evaluate the generator with."""
    random = generator(seed, "ring")
    modes = torch.randint(num_modes, (num_train,), generator=random)
    points = centres(num_modes)[modes] + deviation * torch.randn(num_train, 2, generator=random)
    latents = [torch.randn(count, 2, generator=random) for count in (num_val, num_test)]
    train, val, test = (Examples(each, torch.zeros(len(each))) for each in (points, *latents))
    return Splits(train, val, test)


def centres(num_modes: int) -> Tensor:
    """Return the modes' centres on the unit circle, (M, 2)."""
    angles = torch.arange(num_modes) * (2 * math.pi / num_modes)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


class Coverage:
    """The task of generating the ring: no targets, and metrics of the generated points."""

    kind = "generation"
    running_name = None
    sums_over_examples = True

    def __init__(
        self, *, num_modes: int, deviation: float, monitor: str, evaluates: str, loss: object
    ) -> None:
        self.centres, self.reach, self.monitor = centres(num_modes), 3 * deviation, monitor
        self.evaluates = evaluates

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        """Return the distance of each point from the nearest centre, (B,)."""
        return LossOutput(torch.cdist(outputs, self.centres.to(outputs)).amin(1), weights)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape[1:] != (2,):
            raise UserError(f"task: the generator gives {list(outputs.shape)}, not points (B, 2).")

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"prediction": outputs.double()}

    def metrics(self, device: torch.device) -> CoverageMetrics:
        return CoverageMetrics(self.centres.to(device), self.reach)


class Counts(Metric):
    """The points at each centre, and all points. torchmetrics adds them up over processes."""

    near: Tensor  # (M,)
    total: Tensor  # ()

    def __init__(self, num_modes: int) -> None:
        super().__init__()
        self.add_state("near", torch.zeros(num_modes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, nearest: Tensor, count: int) -> None:
        self.near += torch.bincount(nearest, minlength=len(self.near))
        self.total += count

    def compute(self) -> tuple[list[int], int]:
        return self.near.tolist(), int(self.total)


class CoverageMetrics:
    """Counts of the points within reach of each centre, over all processes.

    modes: centres with at least a fifth of their share of the points. near: share of the points
    within reach of a centre.
    """

    names = ("modes", "near")

    def __init__(self, centres: Tensor, reach: float) -> None:
        self.centres, self.reach = centres, reach
        self.counts = Counts(len(centres)).to(centres.device)

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        if weights is not None:  # zero for what a process without examples holds
            outputs = outputs[weights != 0]
        distance, nearest = torch.cdist(outputs.float(), self.centres).min(1)
        self.counts.update(nearest[distance < self.reach], len(outputs))

    def scalars(self) -> dict[str, float]:
        counts, total = self.counts.compute()
        modes = sum(count >= 0.2 * total / len(counts) for count in counts)
        return {"modes": float(modes), "near": sum(counts) / total if total else math.nan}

    def details(self) -> dict[str, object]:
        return {}
