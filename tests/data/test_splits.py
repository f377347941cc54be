from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.splits import Examples, Splits, check_overlap, cut, cut_examples

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


def test_every_class_is_cut_in_proportion(make_data: Make) -> None:
    for name, split in make_data("digits").source.items():
        counts = torch.bincount(split.targets)
        assert counts.max() - counts.min() <= 0.1 * len(split) / 10 + 3, name


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


@pytest.mark.parametrize("fractions", [(0.6, 0.5), (-0.1, 0.2), (0.0, 1.0), (float("nan"), 0.1)])
def test_fractions_that_leave_nothing_to_train_on_are_refused(
    fractions: tuple[float, float],
) -> None:
    with pytest.raises(UserError, match="leave nothing to train on"):
        cut(range(10), np.zeros(10), val_fraction=fractions[0], test_fraction=fractions[1], seed=0)


def test_an_empty_split_is_named_and_a_fraction_of_zero_is_no_split() -> None:
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
