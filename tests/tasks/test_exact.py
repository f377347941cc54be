"""The area under the curve is counted in whole numbers."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from regrow.numerics import exact

RNG = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("decimals", [1, 9])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_ties_count_half_in_chunks_as_in_one(
    decimals: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "CHUNK_ELEMENTS", chunk)
    scores = torch.rand(5, 301, generator=RNG, dtype=torch.float64).round(decimals=decimals)
    positive = torch.rand(5, 301, generator=RNG) < 0.3
    areas = exact.auroc(scores, positive)
    expected = [roc_auc_score(p, s) for p, s in zip(positive.numpy(), scores.numpy(), strict=True)]
    assert areas.tolist() == pytest.approx(expected, abs=1e-15)


def test_small_cases_by_hand() -> None:
    scores = torch.tensor([[1.0, 2, 3, 4], [1, 1, 1, 1], [4, 3, 2, 1], [1, 2, 2, 3]])
    positive = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert exact.auroc(scores, positive).tolist() == [1.0, 0.5, 0.0, 0.875]


def test_the_area_is_nan_where_one_side_is_missing() -> None:
    scores = torch.rand(2, 7, generator=RNG)
    sides = torch.tensor([[True], [False]]).expand(2, 7)
    assert exact.auroc(scores, sides).isnan().all()
    assert exact.auroc(scores[:, :0], sides[:, :0]).isnan().all()


def test_torchmetrics_own_rounds() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, generator=rng, dtype=torch.float64)
    targets = (torch.rand(1000, generator=rng) < 0.5).long()
    expected = roc_auc_score(targets, scores)
    ours, theirs = exact.BinaryAUROC(), exact.classification.BinaryAUROC()
    for metric in (ours, theirs):
        metric.update(scores, targets)
    assert abs(ours.compute().item() - expected) < 1e-15
    assert abs(theirs.compute().item() - expected) > 1e-9
