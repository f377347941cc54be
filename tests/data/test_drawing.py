"""Sampling with replacement: shares, reproducibility, repeated draws and refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from test_files import SMALL, Noisy, of_ones_own
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.images import ImageFiles
from regrow.feeding.loaders import Data
from regrow.feeding.sampling import balancing, repeats_of, rows_of, sample
from regrow.feeding.splits import Examples

Make = Callable[..., Data]
CPU = torch.device("cpu")
COUNTS = (200, 90, 10)  # examples of each class
UNLIKELY = 1e-4  # a p-value below it fails


class Listed(Noisy):
    """A user's data set that tells its classes without reading an item."""

    targets: Sequence[Any] = tuple(min(n // 5, 2) for n in range(13))  # 5, 5 and 3 of them

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)[0], self.targets[index]


def rare(**changes: Any) -> Data:
    targets = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    inputs = torch.arange(len(targets)).float().unsqueeze(1).expand(-1, 4).contiguous()
    return of_ones_own(Examples(inputs, targets), batch_size=32, **changes)


def drawn(data: Data, epochs: int) -> tuple[Tensor, Tensor]:
    """Return the numbers of all examples drawn in some epochs, and their classes."""
    batches = [batch for epoch in range(epochs) for batch in data.train(device=CPU).epoch(epoch)]
    numbers = torch.cat([batch.inputs[:, 0] for batch in batches]).long()
    return numbers, torch.cat([batch.targets for batch in batches])


def p_value(values: Tensor, weights: Tensor) -> float:
    """Return the p-value of Pearson's chi-square test that values occur by their weights."""
    seen = torch.bincount(values, minlength=len(weights)).double()
    return float(chisquare(seen, weights * seen.sum() / weights.sum()).pvalue)


def test_balanced_classes_are_equally_likely() -> None:
    numbers, classes = drawn(rare(sampling="balanced"), 20)
    assert len(classes) == 20 * sum(COUNTS)
    equal = torch.ones(3, dtype=torch.float64)
    assert p_value(classes, equal) > UNLIKELY
    for number, count in enumerate(COUNTS):  # within a class, every example is as likely
        members = numbers[classes == number] - sum(COUNTS[:number])
        assert p_value(members, torch.ones(count, dtype=torch.float64)) > UNLIKELY
    # The negative controls: the order without sampling, and draws of equal weights.
    assert p_value(drawn(rare(), 20)[1], equal) < UNLIKELY
    plain = sample(0, 0, torch.ones(sum(COUNTS), dtype=torch.float64))
    assert p_value(drawn(rare(), 1)[1][plain.argsort()], equal) < UNLIKELY


def test_examples_are_drawn_by_their_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 2.5, 0.5, 6.0, 0.0]).double().repeat(50)
    order = torch.cat([sample(3, epoch, weights) for epoch in range(40)])
    assert p_value(order[weights[order] > 0] % 6, weights.view(-1, 6).sum(0) + 1e-300) > UNLIKELY
    assert not (weights[order] == 0).any()
    assert p_value(order % 6, torch.ones(6, dtype=torch.float64)) < UNLIKELY  # the control


def test_an_epoch_is_as_many_draws_as_examples_and_differs_by_seed_and_epoch() -> None:
    weights = torch.rand(100, dtype=torch.float64)
    orders = [sample(seed, epoch, weights) for seed in (0, 1) for epoch in (0, 1)]
    assert {len(order) for order in orders} == {100}
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert torch.equal(orders[0], sample(0, 0, weights))
    assert rare(sampling="balanced").train(device=CPU).steps_per_epoch == 10
    for which, classes in (("first", [0, 1]), ("random", [0, 1, 2])):
        limited = rare(sampling="balanced", limit_train=250, limit_by=which)
        assert drawn(limited, 1)[1].unique().tolist() == classes


def test_a_limit_takes_examples_of_all_the_split_whatever_the_seed() -> None:
    def taken(count: int, **changes: Any) -> set[int]:
        numbers, _ = drawn(rare(limit_train=count, **changes), 2)
        assert len(numbers) == 2 * count
        return set(numbers.tolist())

    whole = sum(COUNTS)
    assert taken(30, limit_by="first") == set(range(30))  # the control, and older runs
    thirty = taken(30)
    assert len(thirty) == 30 and max(thirty) > 0.8 * whole and min(thirty) < 0.2 * whole
    assert taken(30, seed=5) == thirty < taken(60)
    assert rare(limit_train=999).train(device=CPU).num_examples == whole


def test_an_ignored_target_is_never_drawn() -> None:
    classes = torch.tensor([0, 1, 1, -100, 7, 0, 0])
    weights = balancing(classes, (classes != 7) & (classes != -100))
    assert weights.tolist() == [1 / 3, 1 / 2, 1 / 2, 0, 0, 1 / 3, 1 / 3]
    some = Listed(13, 0)
    some.targets = [-100, *some.targets[1:]]
    weights = of_ones_own(some, sampling="balanced", ignore_index=2).draw_weights()
    assert weights.tolist() == [0.0] + [1 / 4] * 4 + [1 / 5] * 5 + [0.0] * 3


def test_the_classes_of_the_examples_that_a_limit_leaves_are_equally_likely() -> None:
    numbers, classes = drawn(rare(limit_train=100), 1)
    weights = rare(sampling="balanced", limit_train=100).draw_weights()
    likely = torch.bincount(classes[numbers.argsort()], weights)
    assert likely.tolist() == pytest.approx([1.0] * 3)


@pytest.mark.parametrize("in_files", [False, True])
def test_any_number_of_processes_and_workers_draws_the_same(
    in_files: bool, same: Callable[[list[LoadedBatch], list[LoadedBatch]], bool]
) -> None:
    def batches(world_size: int = 1, start: int = 0, **changes: Any) -> list[LoadedBatch]:
        options = {"sampling": "balanced", **changes}
        data = of_ones_own(Listed(13, 0), **options) if in_files else rare(**options)
        shares = [data.train(device=CPU, rank=rank, world_size=world_size)
                  for rank in range(world_size)]  # fmt: skip
        ranks = [list(share.epoch(2, start)) for share in shares]
        data.close()
        return [joined(parts) for parts in zip(*ranks, strict=True)]

    whole = batches()
    assert same(batches(2), whole) and same(batches(3), whole)
    assert same(batches(start=2), whole[2:])
    if in_files:
        assert same(batches(num_workers=2), whole)
        assert same(batches(2, start=1, num_workers=1), whole[1:])
    assert not same(batches(seed=1), whole)
    assert not same(batches(sampling=None), whole)


def joined(parts: tuple[LoadedBatch, ...]) -> LoadedBatch:
    """Join the shares of all processes to their global batch."""
    inputs = torch.cat([part.inputs[: part.num_local] for part in parts])  # type: ignore[index]
    targets = torch.cat([part.targets[: part.num_local] for part in parts])  # type: ignore[index]
    return LoadedBatch(inputs, targets, None, len(targets), parts[0].num_global)


def test_a_second_draw_in_an_epoch_is_augmented_another_way() -> None:
    order = torch.tensor([4, 2, 4, 4, 0, 2])
    assert repeats_of(order).tolist() == [0, 0, 1, 2, 0, 1]
    rows = rows_of(lambda way: torch.arange(5) + 10 * way, order, repeats_of(order))
    assert rows.tolist() == [4, 2, 14, 24, 0, 12]
    many = torch.zeros(40, dtype=torch.int64)
    assert len(rows_of(lambda way: torch.tensor([way]), many, repeats_of(many)).unique()) == 16
    # In files, each draw has a noise of its own; without sampling nothing changes.
    data = of_ones_own(Listed(13, 0), sampling="balanced")
    rows = torch.cat([batch.inputs for batch in data.train(device=CPU).epoch(0)])
    assert len(rows[:, 0].unique()) < 13 and len(rows[:, 1].unique()) == 13


@pytest.mark.parametrize("transforms", ["[]", "[{_target_: torch.nn.Identity}]"])
def test_images_in_memory_that_are_drawn_twice_differ(make_data: Make, transforms: str) -> None:
    data = make_data("digits", "sampling=balanced", "limit_train=60", "batch_size=60",
                     "augmentation.pad=3", f"transforms={transforms}")  # fmt: skip
    weights = torch.zeros(60, dtype=torch.float64)
    weights[7] = 1.0
    data.draw_weights = lambda: weights  # type: ignore[method-assign]
    (batch,) = data.train(device=CPU).epoch(0)
    assert isinstance(batch.inputs, Tensor) and len(batch.targets.unique()) == 1  # type: ignore[union-attr]
    assert 10 < len(batch.inputs.unique(dim=0)) <= 16


def test_a_folder_is_balanced_without_reading_an_image(
    image_root: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in sorted((image_root / "cat").iterdir())[:8]:
        file.unlink()
    data = make_data(
        "image_folder", f"root={image_root}", *SMALL, "sampling=balanced", "normalize=imagenet",
        "source.val_fraction=0", "source.test_fraction=0",
    )  # fmt: skip
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda self, index: 1 / 0)
    weights = data.draw_weights()
    found = [weights[torch.tensor(data.source.train.classes) == n].sum() for n in (0, 1)]  # type: ignore[union-attr]
    assert found == pytest.approx([1.0, 1.0]) and len(weights.unique()) == 2


def test_parts_of_a_data_set_know_their_classes() -> None:
    part = torch.utils.data.Subset(Listed(13, 0), [12, 0, 11, 5])
    nested = torch.utils.data.Subset(part, [0, 2, 3])
    data = of_ones_own(nested, sampling="balanced")
    assert data.draw_weights().tolist() == [0.5, 0.5, 1.0]


def test_classes_in_one_byte_are_all_drawn() -> None:
    """In uint8, -100 is 156."""
    wide = Listed(13, 0)
    wide.targets = [n * 13 for n in range(13)]
    narrow = Listed(13, 0)
    narrow.targets = torch.tensor(wide.targets, dtype=torch.uint8)  # type: ignore[assignment]
    assert wide.targets[12] == 156
    how = {"sampling": "balanced", "num_classes": 200, "num_outputs": 200}
    for data in (of_ones_own(narrow, **how), of_ones_own(wide, **how)):
        assert data.draw_weights().tolist() == [1.0] * 13


def table(make: Make, folder: Path, text: str, *more: str) -> Data:
    (folder / "rows.csv").write_text(text, encoding="utf-8")
    return make(
        *("csv", f"root={folder}", "source.train_file=rows.csv", "source.target_columns=[y]"),
        *("target_kind=multiclass", "num_classes=2", "num_outputs=2", "input_shape=[1]"),
        *("sampling={column: w}", "normalize=none", *more),
    )


def rows(*weights: str, header: str = "a,y,w") -> str:
    lines = [f"{n},{n % 2},{weights[n % len(weights)]}" for n in range(40)]
    return "\n".join([header, *lines]) + "\n"


def test_a_tables_column_weighs_the_draws(make_data: Make, tmp_path: Path) -> None:
    data = table(make_data, tmp_path, rows("0", "2", "0", "0.5"), "batch_size=5")
    assert data.source.columns == ["a"]
    weights, numbers = data.draw_weights(), data.source.train.inputs[:, 0]  # type: ignore[union-attr]
    assert weights.tolist() == [[0, 2, 0, 0.5][int(n) % 4] for n in numbers]
    seen = torch.cat([batch.inputs[:, 0] for batch in data.train(device=CPU).epoch(0)])  # type: ignore[index]
    assert {int(n) % 4 for n in seen} == {1, 3}
    others = table(make_data, tmp_path, rows("0", "2", "0", "0.25")).fingerprint()
    assert others["train"] != data.fingerprint()["train"]  # a resume with other weights is refused
    # A val file of its own needs no such column, and the loss has its own weights.
    (tmp_path / "val.csv").write_text("a,y,v\n70,1,1\n71,0,1\n", encoding="utf-8")
    text = rows("1,3", "2,3", header="a,y,w,v")
    data = table(make_data, tmp_path, text, "source.val_file=val.csv", "source.weight_column=v",
                 "batch_size=7")  # fmt: skip
    batch = next(iter(data.train(device=CPU).epoch(0)))
    assert batch.weights is not None and batch.weights.tolist() == [3.0] * 7
    assert data.source.columns == ["a"]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (rows("1", header="a,y,v"), (), "rows.csv has no column 'w'; it has a, y, v"),
        (rows("1", "-2"), (), "line 3, column 'w': the weight -2.0 is negative"),
        (rows("1", "nan"), (), "line 3, column 'w': the cell holds 'nan', which is not a finite"),
        (rows("1", ""), (), "line 3, column 'w': the cell is empty"),
        (rows("0"), (), r"data.sampling={column: w}: no example can be drawn, they are all zero"),
        (rows("1"), ("source.feature_columns=[a,w]",), "cannot be the features beside"),
    ],
)
def test_a_column_that_gives_no_draws_is_one_line(
    text: str, more: tuple[str, ...], message: str, make_data: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as found:
        table(make_data, tmp_path, text, *more).train(device=CPU)
    assert "\n" not in str(found.value)


def refused(train: Any, **changes: Any) -> str:
    with pytest.raises(UserError) as found:
        of_ones_own(train, **changes).train(device=CPU)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_data_without_classes_or_weights_is_one_line() -> None:
    assert "Noisy does not give its classes" in refused(Noisy(13, 0), sampling="balanced")
    assert "use it with data=csv" in refused(Noisy(13, 0), sampling={"column": "w"}).lower()
    short = Listed(13, 0)
    short.targets = [0, 1]
    assert "must hold one number for each of the 13" in refused(short, sampling="balanced")
    soft = Examples(torch.ones(4, 4), torch.full((4, 3), 1 / 3))
    assert "must hold one number" in refused(soft, sampling="balanced")
    weighted = Listed(13, 0)
    for bad in (float("nan"), -1.0):
        weighted.draw_weights = [1.0] * 12 + [bad]  # type: ignore[attr-defined]
        assert "negative, NaN or infinite" in refused(weighted, sampling={"column": "w"})
    weighted.draw_weights = [0.0] * 12 + [1.0]  # type: ignore[attr-defined]
    only = of_ones_own(weighted, sampling={"column": "w"}).train(device=CPU).epoch(0)
    assert {int(n) for batch in only for n in batch.inputs[:, 0]} == {12}  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("digits_attributes", "loss.pos_weight"),
        ("diabetes", "data.sampling={column: …}"),
        ("digit_scenes", "loss.class_weights"),
    ],
)
def test_targets_without_one_class_say_what_to_use(
    name: str, instead: str, make_data: Make
) -> None:
    with pytest.raises(UserError, match=r"data.sampling=balanced does not fit") as found:
        make_data(name, "sampling=balanced", "ignore_index=255")
    assert instead in str(found.value) and "\n" not in str(found.value)


def test_a_binary_task_is_balanced_too(make_data: Make) -> None:
    weights = make_data("breast_cancer", "sampling=balanced").draw_weights()
    assert weights.sum().item() == pytest.approx(2.0) and len(weights.unique()) == 2


def test_a_broken_list_of_classes_is_a_data_error() -> None:
    broken = Listed(13, 0)
    broken.targets = ["a"] * 13
    with pytest.raises(DataError, match="must hold one number"):
        of_ones_own(broken, sampling="balanced").train(device=CPU)
