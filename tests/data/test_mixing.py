"""MixUp and CutMix: partners, shares and soft targets are a function of (seed, epoch, index)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import beta, chisquare, kstest
from test_drawing import joined
from test_files import SMALL, of_ones_own
from torch import Tensor

from lab.data.augment import CutMix, MixUp
from regrow.errors import DataError, UserError
from regrow.feeding import mixing
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import Data
from regrow.feeding.mixing import Mix, pairs_of
from regrow.feeding.sampling import Windows, permutation
from regrow.project import CONF

Make = Callable[..., Data]
Same = Callable[[list[LoadedBatch], list[LoadedBatch]], bool]
CPU = torch.device("cpu")
COUNT, SIZE = 45, 11  # windows of 11, 11, 11, 11 and 1


class Unit:
    """Example i is the i-th unit vector, so that a mixture shows what it is made of."""

    def __init__(self, read: list[int] | None = None) -> None:
        self.read = read

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.read is not None:
            self.read.append(index)
        return torch.eye(COUNT)[index], index % 3


class Weighted(Unit):
    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def __getitem__(self, index: int) -> Any:
        inputs, targets = super().__getitem__(index)
        return {"inputs": inputs, "targets": targets, "weights": self.weights[index]}


def units(train: Any = None, mix: Mix | None = MixUp(alpha=0.7), **changes: Any) -> Data:  # noqa: B008
    options = {"batch_size": SIZE, "input_shape": [COUNT], "mixing": mix, **changes}
    return of_ones_own(Unit() if train is None else train, **options)


def batches_of(
    data: Data, epoch: int = 0, world_size: int = 1, start: int = 0
) -> list[LoadedBatch]:
    """Return the global batches of an epoch, joined from the shares of all processes."""
    ranks = [
        list(data.train(device=CPU, rank=rank, world_size=world_size).epoch(epoch, start))
        for rank in range(world_size)
    ]
    data.close()
    return [joined(parts) for parts in zip(*ranks, strict=True)]


def test_an_example_is_mixed_with_another_of_its_batch_and_so_is_its_target() -> None:
    order = permutation(0, 0, COUNT)
    others = []
    for number, batch in enumerate(batches_of(units())):
        window = order[number * SIZE : (number + 1) * SIZE]
        for own, row, target in zip(window.tolist(), batch.inputs, batch.targets, strict=True):
            made_of = {int(i): float(row[i]) for i in row.nonzero()}
            assert sum(made_of.values()) == pytest.approx(1.0)
            if len(window) == 1:
                assert made_of == {own: 1.0}  # alone, it stays as it is
            else:
                (other,) = {*made_of} - {own} or {own}
                assert other != own or made_of[own] > 0.999999
                assert other in window and len(made_of) <= 2
                others.append(other)
            expected = torch.zeros(3)
            for index, share in made_of.items():
                expected[index % 3] += share
            assert torch.allclose(target, expected, atol=1e-6)
    assert len(set(others)) > COUNT // 3


def test_shares_follow_the_beta_distribution_and_partners_are_equally_likely() -> None:
    random = torch.Generator().manual_seed(0)
    numbers = torch.rand(4000, 1, dtype=torch.float64, generator=random)
    for alpha in (0.2, 1.0, 3.0):
        share = MixUp(alpha=alpha).draw(numbers)[:, 0]
        assert kstest(share.numpy(), beta(alpha, alpha).cdf).pvalue > 1e-4
        assert kstest(share.numpy(), beta(alpha + 0.5, alpha).cdf).pvalue < 1e-4  # the control
    # The offsets from place to partner, over many epochs: 1 … SIZE - 1, each as likely.
    offsets = torch.zeros(SIZE)
    for epoch in range(60):
        order = permutation(0, epoch, 4 * SIZE)
        pairs = pairs_of(MixUp(alpha=1), order, None, SIZE, seed=0, epoch=epoch, num_classes=None)
        places = torch.arange(4 * SIZE)
        assert torch.equal(pairs.partners // SIZE, places // SIZE)
        offsets += torch.bincount((pairs.partners - places) % SIZE, minlength=SIZE)
    assert offsets[0] == 0 and chisquare(offsets[1:].numpy()).pvalue > 1e-4


def test_ranks_workers_and_a_resume_mix_the_same(same: Same) -> None:
    whole = [batches_of(units(), epoch) for epoch in (0, 1)]
    for world_size, num_workers in ((2, 0), (3, 0), (1, 2), (2, 2)):
        many = units(num_workers=num_workers)
        assert same(batches_of(many, 1, world_size), whole[1])
    assert same(batches_of(units(), 1, 2, start=2), whole[1][2:])
    assert not same(whole[0], whole[1])


def test_another_seed_or_another_rule_for_partners_would_be_found(
    same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative controls."""
    whole = batches_of(units())
    assert not same(batches_of(units(seed=1)), whole)
    assert not same(batches_of(units(mix=MixUp(alpha=0.71))), whole)
    # A partner from the rank's own share, as a loader that mixes its own batch does.
    monkeypatch.setattr(
        mixing.Pairs, "read_by",
        lambda self, share: (torch.arange(share.start, share.stop),
                             torch.arange(share.stop - share.start).flip(0)),
    )  # fmt: skip
    own = [batches_of(units(), 0, world_size) for world_size in (1, 2)]
    assert not same(own[0], whole) and not same(*own)


def test_memory_and_files_mix_the_same(same: Same) -> None:
    from regrow.feeding.splits import Examples

    targets = torch.arange(COUNT) % 3
    memory = Examples(torch.eye(COUNT), targets)
    for world_size in (1, 2):
        assert same(batches_of(units(memory), 2, world_size), batches_of(units(), 2))
    weights = torch.rand(COUNT)
    inputs = [batch.inputs for batch in batches_of(units())]
    for train in (Examples(torch.eye(COUNT), targets, weights), Weighted(weights)):
        for found, rows in zip(batches_of_rank(units(train)), inputs, strict=True):
            assert found.weights is not None
            assert torch.allclose(found.weights, rows @ weights, atol=1e-6)  # type: ignore[operator]


def batches_of_rank(data: Data) -> list[LoadedBatch]:
    return list(data.train(device=CPU).epoch(0))


def test_draws_with_replacement_have_partners_of_their_own(same: Same) -> None:
    from regrow.feeding.splits import Examples

    def batches(train: Any, world_size: int = 1, **changes: Any) -> list[LoadedBatch]:
        return batches_of(units(train, sampling="balanced", **changes), 3, world_size)

    memory = Examples(torch.eye(COUNT), torch.tensor([0] * 30 + [1] * 13 + [2] * 2))
    files = Unit()
    files.targets = memory.targets.tolist()  # type: ignore[attr-defined]
    whole = batches(memory)
    assert same(batches(memory, 3), whole)
    assert not same(batches(memory, seed=1), whole)
    ours, theirs = batches(files), batches(files, 2, num_workers=2)
    assert same(ours, theirs)
    rows = torch.cat([b.inputs for b in whole])  # type: ignore[arg-type]
    rare = rows[rows.argmax(1) >= 43]
    assert len(rare) > 5 and len(rare.unique(dim=0)) > len(rare) // 2


def test_one_process_reads_nothing_twice_and_two_read_their_partners() -> None:
    read: list[int] = []
    list(units(Unit(read)).train(device=CPU).epoch(0))
    assert sorted(read) == [*range(COUNT)]
    for rank in range(2):
        read.clear()
        batches = list(units(Unit(read)).train(device=CPU, rank=rank, world_size=2).epoch(0))
        windows = Windows(COUNT, SIZE, False, rank, 2)
        own = sum(max(1, windows.share(number).num_local) for number in range(len(windows)))
        assert len(batches[-1].targets) == 1 and own < len(read) <= 2 * own  # type: ignore[arg-type]


def test_two_processes_read_some_1_4_times_as_many_examples() -> None:
    count, size = 64 * 200, 64
    how: dict[str, Any] = {"seed": 0, "epoch": 0, "num_classes": None}
    pairs = pairs_of(MixUp(alpha=1.0), torch.arange(count), None, size, **how)
    read = sum(
        len(pairs.read_by(windows.share(number))[0])
        for windows in (Windows(count, size, False, rank, 2) for rank in range(2))
        for number in range(len(windows))
    )
    page = (CONF.parent / "docs" / "recipes" / "mixing.md").read_text(encoding="utf-8")
    assert f"with two processes, some {read / count:.1f} times" in page


def test_a_rank_without_an_example_in_the_last_window_still_gets_a_batch() -> None:
    (*_, last) = units().train(device=CPU, rank=1, world_size=2).epoch(0)
    assert last.num_local == 0 and last.num_global == 1
    assert last.weights is not None and last.weights.tolist() == [0.0]
    assert last.targets.shape == (1, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_micro_batches_join_to_the_mixed_batch(slices: int) -> None:
    batch = batches_of(units())[1]
    parts = batch.split(slices)
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)  # type: ignore[arg-type]


def test_cutmix_takes_a_box_of_the_partner_and_its_area_from_the_target() -> None:
    random = torch.Generator().manual_seed(0)
    own, partners = torch.zeros(500, 2, 12, 10), torch.ones(500, 2, 12, 10)
    numbers = torch.rand(500, 3, dtype=torch.float64, generator=random)
    mix = CutMix(alpha=1.0)
    mixed, share = mix(own, partners, mix.draw(numbers).float())
    assert torch.allclose(1 - mixed.mean((1, 2, 3)), share, atol=1e-6)
    for image in mixed:
        assert torch.equal(image[0], image[1])  # all channels alike
        rows, columns = image[0].amax(1), image[0].amax(0)
        assert torch.equal(torch.outer(rows, columns), image[0])  # one box
        assert rows.diff().abs().sum() <= 2 and columns.diff().abs().sum() <= 2
    assert 0.3 < float(share.mean()) < 0.9 and len(share.unique()) > 30
    numbers[:, 1:] = 0.5  # no box reaches beyond the border, so its area is as drawn
    large = torch.zeros(500, 1, 64, 64)
    whole = mix(large, large, mix.draw(numbers).float())[1].numpy()
    assert kstest(whole, beta(1, 1).cdf).statistic < 0.08 < kstest(whole, beta(2, 2).cdf).statistic


@pytest.mark.parametrize("kind", ["binary", "multilabel", "regression", "wide"])
def test_targets_that_are_numbers_are_mixed_as_they_are(kind: str) -> None:
    from regrow.feeding.splits import Examples

    random = torch.Generator().manual_seed(0)
    shape = {"multilabel": (COUNT, 3), "wide": (COUNT, 2)}.get(kind, (COUNT,))
    targets = torch.randn(shape, generator=random)
    if kind in ("binary", "multilabel"):
        targets = (targets > 0).float()
    options = {"binary": (2, 1), "multilabel": (3, 3), "regression": (None, 1), "wide": (None, 2)}
    num_classes, num_outputs = options[kind]
    data = units(
        Examples(torch.eye(COUNT), targets),
        target_kind="regression" if kind == "wide" else kind,
        num_classes=num_classes, num_outputs=num_outputs, normalize_targets=kind == "wide",
    )  # fmt: skip
    expected = targets if kind != "wide" else (targets - targets.mean(0)) / targets.std(
        0, correction=0
    )  # fmt: skip
    for batch in data.train(device=CPU).epoch(0):
        assert torch.allclose(batch.targets, batch.inputs @ expected, atol=1e-5)  # type: ignore[arg-type, operator]


def test_evaluation_never_mixes_and_augment_false_turns_it_off(same: Same) -> None:
    data = units()
    data.train(device=CPU)
    for batch in data.evaluation("train", device=CPU):
        assert batch.targets.dtype == torch.int64  # type: ignore[union-attr]
        assert batch.inputs.sum(1).eq(1).all() and batch.inputs.amax(1).eq(1).all()  # type: ignore[union-attr]
    assert same(batches_of(units(augment=False)), batches_of(units(mix=None)))


def test_images_of_a_folder_and_in_memory_are_mixed(
    image_root: Path, make_data: Make, same: Same
) -> None:
    how = "mixing={_target_: lab.data.augment.CutMix, alpha: 1.0}"
    for name, options in (
        ("image_folder", (f"root={image_root}", *SMALL)),
        ("digits", ("limit_train=50", "batch_size=15")),
    ):
        data = [make_data(name, *options, *more, "num_workers=0") for more in ((how,), (how,), ())]
        whole, two, plain = (
            batches_of(each, 1, world_size)
            for each, world_size in zip(data, (1, 2, 1), strict=True)
        )
        assert same(whole, two) and not same(whole, plain)
        for mixed, batch in itertools.islice(zip(whole, plain, strict=True), 3):
            kept = (mixed.inputs == batch.inputs).flatten(1).float().mean(1)  # type: ignore[union-attr, operator]
            target = mixed.targets.gather(1, batch.targets.unsqueeze(1)).squeeze(1)  # type: ignore[union-attr, call-overload]
            assert (kept >= target - 1e-5)[target < 1].float().mean() > 0.5


class Doubling(Mix):
    num_numbers = 0

    def __call__(self, inputs: Tensor, partners: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([inputs, partners], 1), torch.ones(len(inputs))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("text", (), "does not fit task=language: tokens cannot be blended"),
        ("digit_scenes", (), "does not fit task=segmentation: a mask of class indices cannot"),
        ("digits", ("ignore_index=3",), "does not fit loss.ignore_index=3"),
        ("diabetes", (), r"CutMix takes images \(C, H, W\), and inputs are of shape \[10\]"),
    ],
)
def test_mixing_data_that_cannot_be_mixed_is_an_error_of_one_line(
    name: str, overrides: tuple[str, ...], message: str, make_data: Make
) -> None:
    how = "mixing={_target_: lab.data.augment.CutMix, alpha: 1.0}"
    overrides = overrides or (("ignore_index=null",) if name != "digit_scenes" else ())
    with pytest.raises(UserError, match=message) as found:
        make_data(name, how, *(overrides or ("ignore_index=255",)))
    assert "\n" not in str(found.value)


def test_a_mix_or_data_of_another_form_is_one_line() -> None:
    from regrow.feeding.splits import Examples

    with pytest.raises(UserError, match=r"ReLU is not a regrow\.feeding\.mixing\.Mix"):
        units(mix=torch.nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"Doubling gave inputs of shape \[2, 90\]"):
        units(mix=Doubling())
    tokens = Examples(torch.ones(4, 6, dtype=torch.int64), torch.zeros(4).long())
    with pytest.raises(DataError, match="these are integers, such as tokens"):
        units(tokens, input_shape=[6])
    with pytest.raises(DataError, match="these are integers, such as tokens"):
        list(units([(torch.tensor([1]), 0)] * 4, input_shape=[1]).train(device=CPU).epoch(0))
    pair = [({"a": torch.ones(2), "b": torch.ones(2)}, 0)] * 4
    with pytest.raises(DataError, match="one tensor each"):
        list(units(pair, input_shape=None).train(device=CPU).epoch(0))


def test_a_target_outside_the_classes_is_never_a_row_of_zeros() -> None:
    rows = mixing.softened(torch.tensor([1, -100, 3]), 3)
    assert rows[0].tolist() == [0.0, 1.0, 0.0]
    assert bool(rows[1:].isnan().all())
