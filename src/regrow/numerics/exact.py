"""Metrics that torchmetrics lacks or rounds, on its classes, which gather states over processes.

Importing torchmetrics takes a second, so import this module only when there is something to
measure.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torchmetrics import Metric, classification
from torchmetrics.utilities import dim_zero_cat

FAR = 1e6  # sums of squares this many times the scatter have lost six digits
CHUNK_ELEMENTS = 1 << 20  # scores sorted at once


class Seen(Metric):
    """(2,) the number of rows, and of NaNs among the outputs; in integers, -1 stands for NaN."""

    rows: Tensor
    nans: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.zeros((), dtype=torch.int64), "sum")
        self.add_state("nans", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.rows += outputs.shape[0]
        self.nans += (outputs.isnan() if outputs.is_floating_point() else outputs < 0).sum()

    def compute(self) -> Tensor:
        return torch.stack([self.rows, self.nans])


class ClassCounts(Metric):
    """(3, C) the number of right predictions of each class, of its targets and its predictions."""

    counts: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        predicted = outputs.argmax(1)
        for row, classes in enumerate((targets[predicted == targets], targets, predicted)):
            self.counts[row] += torch.bincount(classes, minlength=self.counts.shape[1])

    def compute(self) -> Tensor:
        return self.counts


class TokenSums(Metric):
    """(4,) float64 sums over tokens: losses, right predictions, tokens and bytes."""

    sums: Tensor
    num_bytes: Tensor

    def __init__(self, num_tokens: int, num_bytes: list[int]) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), "sum")
        lengths = torch.zeros(num_tokens, dtype=torch.int64)  # unused tokens have no bytes
        lengths[: len(num_bytes)] = torch.tensor(num_bytes, dtype=torch.int64)
        self.register_buffer("num_bytes", lengths, persistent=False)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add rows (N, 2) of a loss and the predicted token, and their targets (N,)."""
        self.sums[0] += outputs[:, 0].sum()
        self.sums[1] += outputs[:, 1].eq(targets).sum()
        self.sums[2] += len(targets)
        self.sums[3] += self.num_bytes[targets].sum()

    def compute(self) -> Tensor:
        return self.sums


class ExactR2(Metric):
    """(D,) R² of each output, () of a single one; NaN if its targets are constant.

    Computed from sums like torchmetrics, but without its tolerance, which takes small targets for
    constant ones. Sums of squares lose digits for targets far from zero: there the count, mean and
    scatter of each update are merged (Chan, Golub and LeVeque, 1983).
    """

    parts: list[Tensor]  # per update: (1, 6) or, for several outputs, (1, 6, D)

    def __init__(self) -> None:
        super().__init__()
        self.add_state("parts", [], "cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        errors, total = targets - outputs, targets.sum(0)
        mean = total / max(1, len(targets))
        scatter, count = ((targets - mean) ** 2).sum(0), torch.full_like(mean, len(targets))
        sums = [count, total, (targets * targets).sum(0), (errors * errors).sum(0), mean, scatter]
        self.parts.append(torch.stack(sums)[None])

    def compute(self) -> Tensor:
        parts = dim_zero_cat(self.parts)
        count, total, squares, residual = functools.reduce(torch.add, parts)[:4]
        counts, means, scatters = parts[:, 0], parts[:, 4], parts[:, 5]
        merged = (scatters + counts * (means - total / count) ** 2).sum(0)
        near = squares - total**2 / count
        eps = torch.finfo(squares.dtype).eps
        is_far = squares > FAR * merged
        scatter = torch.where(is_far, merged, near)
        lost = torch.where(is_far, squares * (8 * eps) ** 2, eps * squares * 4)
        return torch.where(scatter > lost, 1 - residual / scatter, math.nan)


class BinaryAUROC(classification.BinaryAUROC):
    def compute(self) -> Tensor:  # type: ignore[override]
        return auroc(dim_zero_cat(self.preds)[None], dim_zero_cat(self.target)[None] == 1)[0]


class MulticlassAUROC(classification.MulticlassAUROC):
    """(C,) AUROC of each class against all others."""

    def compute(self) -> Tensor:  # type: ignore[override]
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        classes = torch.arange(scores.shape[1], device=targets.device)
        return auroc(scores.T, targets == classes[:, None])


class MultilabelAUROC(classification.MultilabelAUROC):
    """(C,) AUROC of each label."""

    def compute(self) -> Tensor:  # type: ignore[override]
        return auroc(dim_zero_cat(self.preds).T, dim_zero_cat(self.target).T == 1)


def auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the (C,) float64 areas under the ROC curves, on the CPU.

    `scores` are (C, N); `positive`, (C, N) bool, marks those that should be higher. NaN where all
    or none is positive. The area is the share of (positive, negative) pairs in the right order,
    ties counting half, from the sum of the positives' ranks (Mann and Whitney, 1947). Pairs are
    counted as integers: torchmetrics accumulates the area in float32.
    """
    rows = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    chunks = zip(torch.split(scores, rows), torch.split(positive, rows), strict=True)
    right, pairs = zip(*(_twice_pairs(*chunk) for chunk in chunks), strict=True)
    return torch.cat(right).cpu().double() / torch.cat(pairs).cpu().double()


def _twice_pairs(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return twice the pairs in the right order, and twice all pairs; both (C,) int64."""
    scores, order = scores.contiguous().sort(1)
    positive = positive.gather(1, order)
    num = scores.shape[1]
    places = torch.arange(1, num + 1, device=scores.device)
    begins = torch.ones_like(positive)  # start of each run of ties
    begins[:, 1:] = scores[:, 1:] != scores[:, :-1]
    ends = begins.roll(-1, 1)  # the first place always begins a run
    first = places.where(begins, 0).cummax(1).values
    last = places.where(ends, num).flip(1).cummin(1).values.flip(1)
    ones = positive.sum(1)
    twice_ranks = ((first + last) * positive).sum(1)
    return twice_ranks - ones * (ones + 1), 2 * ones * (num - ones)
