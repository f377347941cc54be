from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.splits import (
    Examples,
    Splits,
    check_overlap,
    cut,
    cut_examples,
    strata_of,
    text_names,
)

Make = Callable[..., Data]
BUNDLED = ("digits", "digits_attributes", "breast_cancer", "diabetes")


def keys(data: Data, split: str) -> set[object]:
    return set(dict(data.source.items())[split].keys())


@pytest.mark.parametrize("name", BUNDLED)
def test_the_test_split_depends_on_no_choice_but_the_seed(make_data: Make, name: str) -> None:
    one = make_data(name)
    other = make_data(name, "source.val_fraction=0.25", "batch_size=7", "augment=false")
    assert keys(one, "test") == keys(other, "test")
    again, seeded = make_data(name), make_data(name, seed=1)
    assert one.fingerprint() == again.fingerprint() != seeded.fingerprint()
    for split in ("val", "test"):
        assert keys(one, split) == keys(again, split) != keys(seeded, split)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_splits_hold_every_example_once(make_data: Make, name: str) -> None:
    data = make_data(name)
    total = {"digits": 1797, "digits_attributes": 1797, "breast_cancer": 569, "diabetes": 442}[name]
    sets = [keys(data, split) for split in ("train", "val", "test")]
    assert sum(data.num_examples.values()) == len(set.union(*sets)) == total
    assert abs(data.num_examples["test"] - 0.2 * total) < 1
    assert abs(data.num_examples["val"] - 0.1 * total) < 1.5


def test_every_class_is_split_in_proportion(make_data: Make) -> None:
    for name, split in make_data("digits").source.items():
        counts = torch.bincount(split.targets)
        assert counts.max() - counts.min() <= 0.1 * len(split) / 10 + 3, name


def test_binary_targets_are_split_in_proportion_and_values_by_their_deciles() -> None:
    assert set(strata_of(torch.tensor([0.0, 1.0] * 50))) == {0, 1}
    assert strata_of(torch.arange(100.0)).tolist() == [n // 10 for n in range(100)]


def test_both_digit_tasks_have_the_same_images_in_each_split(make_data: Make) -> None:
    one, other = make_data("digits"), make_data("digits_attributes")
    assert all(keys(one, name) == keys(other, name) for name in ("train", "val", "test"))
    digit = one.source.train.targets
    labels = other.source.train.targets
    assert torch.equal(labels[:, 0], (digit % 2 == 0).float())
    assert torch.equal(labels[:, 2], (digit > 4).float())


def test_bundled_tables_are_those_of_scikit_learn(make_data: Make) -> None:
    from sklearn import datasets

    for name, load in (
        ("digits", datasets.load_digits),
        ("breast_cancer", datasets.load_breast_cancer),
        ("diabetes", lambda: datasets.load_diabetes(scaled=False)),
    ):
        parts = [split for _, split in make_data(name).source.items()]
        inputs = torch.cat([part.inputs for part in parts]).flatten(1).numpy().astype(float)
        targets = torch.cat([part.targets for part in parts]).numpy()
        want = load()
        ours, theirs = np.lexsort(inputs.T), np.lexsort(want.data.T)
        assert np.array_equal(inputs[ours], want.data[theirs])
        assert np.array_equal(targets[ours], want.target[theirs].astype(targets.dtype))


def test_duplicates_land_in_one_split() -> None:
    inputs = torch.arange(50).repeat(4).view(-1, 1).float()
    examples = Examples(inputs, torch.zeros(200, dtype=torch.int64))
    parts = cut_examples(examples, val_fraction=0.2, test_fraction=0.2, seed=0)
    sets = [set(part.inputs.view(-1).tolist()) for part in parts if part is not None]
    assert sum(map(len, sets)) == 50 and [len(p) for p in parts] == [120, 40, 40]
    check_overlap(Splits(*parts), "refuse")
    signed = torch.cat([inputs[:50], -inputs[:50]])  # 0.0 and -0.0 are one number
    assert len({*Examples(signed, torch.zeros(100)).keys()}) == 99
    # The negative control: split by row, the same values are in two splits.
    train, val, _ = cut(range(200), np.zeros(200), val_fraction=0.2, test_fraction=0.2, seed=0)
    with pytest.raises(DataError, match="val examples are in train too"):
        check_overlap(Splits(examples.subset(train), examples.subset(val), None), "refuse")


def test_overlap_is_refused_or_reported_or_not_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    one = Examples(torch.randn(5, 3), torch.zeros(5))
    both = Examples(torch.cat([torch.randn(2, 3), one.inputs[3:4]]), torch.ones(3))
    splits = Splits(one, None, both)
    with pytest.raises(DataError, match=r"1 of the 3 test examples .* number 2.*data\.overlap"):
        check_overlap(splits, "refuse")
    assert check_overlap(splits, "report") == {"train/test": 1}
    assert "1 of the 3 test examples" in caplog.text
    assert check_overlap(splits, "ignore") == {}


def test_subsets_and_the_same_data_set_given_twice_are_seen() -> None:
    whole = torch.utils.data.TensorDataset(torch.randn(10, 2), torch.zeros(10))
    subset = torch.utils.data.Subset
    check_overlap(Splits(subset(whole, range(5)), subset(whole, range(5, 10)), None), "refuse")
    with pytest.raises(DataError, match="1 of the 6 val"):
        check_overlap(Splits(subset(whole, range(5)), subset(whole, range(4, 10)), None), "refuse")
    with pytest.raises(DataError, match="10 of the 10 test"):
        check_overlap(Splits(whole, None, whole), "refuse")


class Table(torch.utils.data.TensorDataset):
    """Its `keys()` are its columns', as those of h5py and pandas are."""

    def keys(self) -> list[str]:
        return ["inputs", "targets"]


def test_keys_that_are_not_one_per_example_are_not_compared() -> None:
    one, other = (Table(torch.randn(10, 2), torch.zeros(10)) for _ in range(2))
    subset = torch.utils.data.Subset
    check_overlap(Splits(subset(one, range(5)), subset(one, range(5, 10)), None), "refuse")
    check_overlap(Splits(one, other), "refuse")
    with pytest.raises(DataError, match="1 of the 6 val"):  # the control: as without keys
        check_overlap(Splits(subset(one, range(5)), subset(one, range(4, 10)), None), "refuse")


@pytest.mark.parametrize("fractions", [(0.6, 0.5), (0.0, 1.0)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(
    fractions: tuple[float, float],
) -> None:
    with pytest.raises(UserError, match="leave nothing to train on"):
        cut(range(10), np.zeros(10), val_fraction=fractions[0], test_fraction=fractions[1], seed=0)


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
@pytest.mark.parametrize("name", ["val_fraction", "test_fraction"])
def test_a_fraction_out_of_range_is_refused_without_a_config_too(
    name: str, fraction: float
) -> None:
    given = {"val_fraction": 0.1, "test_fraction": 0.1, name: fraction}
    message = rf"data\.source\.{name}={fraction} must be a number from 0 to 1\."
    with pytest.raises(UserError, match=message):
        cut(range(10), np.zeros(10), seed=0, **given)
    with pytest.raises(UserError, match=message):  # also where folds give the test split
        cut(range(10), np.zeros(10), seed=0, folds=2, **given)


def test_an_empty_split_is_named_and_a_fraction_of_zero_makes_no_split() -> None:
    with pytest.raises(DataError, match=r"split val is empty: data\.source\.val_fraction=0\.01"):
        cut(range(10), np.zeros(10), val_fraction=0.01, test_fraction=0.2, seed=0)
    train, val, test = cut(range(10), np.zeros(10), val_fraction=0.0, test_fraction=0.0, seed=0)
    assert len(train) == 10 and val is None and test is None


def test_normalisation_uses_the_training_split_only(make_data: Make, cpu: torch.device) -> None:
    for name in BUNDLED:
        data = make_data(name, "augment=false")
        inputs = torch.cat([batch.inputs for batch in data.evaluation("train", device=cpu)])
        dims = (0,) if inputs.ndim == 2 else (0, 2, 3)
        assert inputs.mean(dims).abs().max() < 1e-5
        varying = inputs.std(dims, correction=0)
        assert torch.allclose(varying, torch.ones_like(varying), atol=1e-5)
        held_out = torch.cat([batch.inputs for batch in data.evaluation("test", device=cpu)])
        assert held_out.mean(dims).abs().max() > 1e-4  # its own statistics would give zero


def test_standardised_targets_come_back_in_their_units(make_data: Make, cpu: torch.device) -> None:
    data = make_data("diabetes")
    targets = torch.cat([batch.targets for batch in data.evaluation("train", device=cpu)])
    assert abs(float(targets.mean())) < 1e-5 and abs(float(targets.std(correction=0)) - 1) < 1e-5
    assert torch.allclose(data.in_units(targets).float(), data.source.train.targets, atol=1e-3)
    raw = make_data("diabetes", "normalize_targets=false")
    assert torch.equal(raw.in_units(targets), targets.double()) and raw.target_mean is None


@pytest.mark.parametrize(
    ("options", "causes"),
    [
        ({"test_fraction": 0.0, "folds": 2}, r"data\.source\.val_fraction=0\.1 and data\.folds=2"),
        ({"test_fraction": 0.8}, r"val_fraction=0\.1 and data\.source\.test_fraction=0\.8"),
    ],
)
def test_one_group_leaves_nothing_to_train_on(options: dict[str, Any], causes: str) -> None:
    whole = (list(range(10)), np.zeros(10))
    with pytest.raises(DataError, match=rf"split train is empty: .*{causes} of 1 group\. Let val"):
        cut(*whole, val_fraction=0.1, seed=0, groups=["a"] * 10, **options)


def test_equal_examples_leave_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match=r"^split train .*: data\.source\.val_fraction=0\.5 of 1 d"):
        cut([7] * 4, np.zeros(4), val_fraction=0.5, test_fraction=0.0, seed=0)


def test_few_distinct_rows_make_odd_splits_with_a_word_and_even_ones_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = [number % 7 for number in range(1000)]
    whole: dict[str, Any] = {"val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}
    _, _, test = cut(keys, np.zeros(1000), **whole)
    assert test is not None and len(test) == 143
    assert caplog.messages[-1].startswith(
        "split test has 143 of 1000 examples instead of 200: data.source.test_fraction=0.2 of 7 "
        "distinct examples. Equal examples stay in one split"
    )
    caplog.clear()
    found = cut(keys, np.zeros(1000), **whole, keeps_equal_together=False)
    assert [len(split) for split in found if split is not None] == [700, 100, 200]
    groups = [number // 10 for number in range(1000)]  # each holds all kinds of rows
    with pytest.raises(DataError, match=r"of 1 group\. .* and so do their groups\. Do this\.$"):
        cut(keys, np.zeros(1000), **whole, groups=groups, way_apart="Do this.")
    found = cut(keys, np.zeros(1000), **whole, groups=groups, keeps_equal_together=False)
    assert [len(split) for split in found if split is not None] == [700, 100, 200]
    held = [{groups[index] for index in split.tolist()} for split in found if split is not None]
    assert sum(map(len, held)) == 100  # no group is in two splits
    assert not caplog.messages


def test_equal_rows_of_a_table_are_split_one_by_one_where_an_overlap_is_ignored(
    make_data: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{number % 3},{number % 2},{number % 5}" for number in range(500)]
    (tmp_path / "few.csv").write_text("\n".join(["a,b,y", *rows]))
    given = (f"source.train_file={tmp_path}/few.csv", "source.target_columns=[y]")
    given += ("input_shape=[2]", "target_kind=multiclass", "num_classes=5", "num_outputs=5")
    together = make_data("csv", *given)
    assert caplog.messages[-1].endswith("add data.overlap=ignore, which splits them one by one.")
    apart = make_data("csv", *given, "overlap=ignore")
    assert together.num_examples != {"train": 350, "val": 50, "test": 100}
    assert apart.num_examples == {"train": 350, "val": 50, "test": 100}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.int16])
def test_inputs_of_any_type_and_shape_have_keys(dtype: torch.dtype) -> None:
    for shape in ((6,), (6, 1), (6, 2, 3)):
        inputs = (torch.arange(6) // 2 % 2).view(6, *[1] * (len(shape) - 1)).expand(shape)
        keys = Examples(inputs.to(dtype), torch.zeros(6)).keys()
        assert [keys.index(key) for key in keys] == [0, 0, 2, 2, 0, 0]
    for shape in ((0,), (0, 3), (2, 0)):
        assert len({*Examples(torch.zeros(shape, dtype=dtype), torch.zeros(2)).keys()}) <= 1


def test_keys_are_hashes_of_the_bytes_in_memory() -> None:
    rows = torch.randn(3, 4)
    expected = [hashlib.blake2b(row.numpy().tobytes(), digest_size=16).digest() for row in rows]
    assert Examples(rows, torch.zeros(3)).keys() == expected


class Keyed(torch.utils.data.Dataset[int]):
    """Numbers modulo 5, with keys or without."""

    def __init__(self, count: int, *, has_keys: bool) -> None:
        self.count = count
        if has_keys:
            self.keys = lambda: [index % 5 for index in range(count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index % 5


@pytest.mark.parametrize("has_keys", [True, False])
def test_a_subset_and_its_data_set_overlap(has_keys: bool) -> None:
    subset = torch.utils.data.Subset
    whole = Keyed(5, has_keys=has_keys)
    for train in (subset(whole, [0, -1]), subset(subset(whole, [0, 2, -1]), [0, -1])):
        with pytest.raises(DataError, match="2 of the 5 test examples are in train too"):
            check_overlap(Splits(train, None, whole), "refuse")
        with pytest.raises(DataError, match="1 of the 2 test"):
            check_overlap(Splits(train, None, subset(whole, [3, 4])), "refuse")
        check_overlap(Splits(train, None, subset(whole, [1, 3])), "refuse")
    twice = Keyed(10, has_keys=has_keys)  # each number is there twice
    splits = Splits(subset(twice, range(5)), None, subset(twice, range(5, 10)))
    assert check_overlap(splits, "report") == ({"train/test": 5} if has_keys else {})


def test_copies_do_not_hide_examples_of_a_group_trained_on() -> None:
    train = Examples(torch.arange(3.0), torch.zeros(3), groups=["a", "b", "c"])
    test = Examples(torch.tensor([7.0, 8, 2, 9]), torch.zeros(4), groups=["a", "a", "c", "new"])
    both = (
        r"^1 of the 4 test examples are in train too, the first is number 2; 2 of the 4 test "
        r"examples have their group .* in train too, the first is number 0\. Remove"
    )
    with pytest.raises(DataError, match=both):
        check_overlap(Splits(train, None, test), "refuse")
    assert check_overlap(Splits(train, None, test), "report") == {"train/test": 3}


def test_class_names_are_text_or_integers() -> None:
    assert text_names(["a", 3]) == ["a", "3"]
    for name in (1.5, False, None):
        with pytest.raises(UserError, match=f"YAML reads one of the names as {name}"):
            text_names([name])
