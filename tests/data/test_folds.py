"""Folds and groups: which examples are tested, and that what belongs together stays together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import composed

from regrow.config.check import check, shipped_node
from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.splits import Examples, cut, cut_examples
from regrow.project import CONF

Make = Callable[..., Data]
SIZES = {"digits": 1797, "digits_attributes": 1797, "breast_cancer": 569, "diabetes": 442}


def table(path: Path, *, patients: int = 30, rows: int = 180) -> Path:
    """Write a table in which a patient has several rows, and some patients have many."""
    random = np.random.default_rng(0)
    of = np.sort(random.integers(0, patients, rows) // (1 + random.integers(0, 3, rows)))
    lines = [
        f"p{patient},{'ab'[number % 3 == 0]},{number},{random.normal():.5f}"
        for number, patient in enumerate(of)
    ]
    path.write_text("\n".join(["patient,kind,x,y", *lines]) + "\n")
    return path


def of_table(path: Path, *more: str, group: str | None = "patient") -> tuple[str, ...]:
    return (
        *("csv", f"root={path.parent}", f"source.train_file={path.name}"),
        *("source.target_columns=[kind]", "target_kind=multiclass", "num_classes=2"),
        *("num_outputs=2", f"input_shape=[{2 if group else 3}]"),
        *((f"source.group={group}",) if group else ()),
        *more,
    )


def split(data: Data, name: str) -> Any:
    return dict(data.source.items())[name]


@pytest.mark.parametrize("name", SIZES)
def test_each_example_is_tested_in_one_fold(make_data: Make, name: str) -> None:
    folds = [make_data(name, "folds=5", f"fold={fold}") for fold in range(5)]
    ids = [number for data in folds for number in data.ids("test")]
    assert sorted(ids) == [*range(SIZES[name])]
    counts = [len(data.ids("test")) for data in folds]
    assert max(counts) - min(counts) <= 1
    for data in folds:
        assert abs(data.num_examples["val"] - 0.1 * SIZES[name]) < 1.5  # of all examples
        everything = [number for part in ("train", "val", "test") for number in data.ids(part)]
        assert len({*everything}) == len(everything) == SIZES[name]


def test_folds_are_stratified(make_data: Make) -> None:
    folds = [make_data("digits", "folds=5", f"fold={fold}") for fold in range(5)]
    counts = torch.stack([torch.bincount(split(data, "test").targets) for data in folds])
    assert int((counts.amax(0) - counts.amin(0)).max()) <= 1
    means = [make_data("diabetes", "folds=5", f"fold={f}").source.test for f in range(5)]
    found = torch.tensor([part.targets.mean() for part in means if isinstance(part, Examples)])
    assert float(found.std()) < 5  # of targets with a standard deviation of 77
    # The negative control: folds dealt at random.
    targets, order = torch.cat([split(folds[0], n).targets for n in ("train", "val", "test")]), []
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).chunk(5)
    counts = torch.stack([torch.bincount(targets[part]) for part in order])
    assert int((counts.amax(0) - counts.amin(0)).max()) > 1


def test_the_folds_depend_on_the_seed_and_on_no_other_choice(make_data: Make) -> None:
    def ids(*overrides: str, seed: int = 0) -> list[Any]:
        return [*make_data("breast_cancer", "folds=4", "fold=2", *overrides, seed=seed).ids("test")]

    assert ids() == ids("source.val_fraction=0.3", "batch_size=7", "source.test_fraction=0.5")
    assert ids() != ids(seed=1)
    assert {*ids()}.isdisjoint(make_data("breast_cancer", "folds=4", "fold=1").ids("test"))


def test_duplicates_are_in_one_fold() -> None:
    inputs = torch.arange(50).repeat(4).view(-1, 1).float()
    examples = Examples(inputs, torch.zeros(200, dtype=torch.int64))
    found = []
    for fold in range(5):
        parts = cut_examples(
            examples, val_fraction=0.1, test_fraction=0.2, seed=0, folds=5, fold=fold
        )
        values = [set(part.inputs.view(-1).tolist()) for part in parts if part is not None]
        assert len(set.union(*values)) == sum(map(len, values)) == 50
        found.append(values[2])
    assert len(set.union(*found)) == sum(map(len, found)) == 50


# Groups.


def sides(data: Data) -> dict[str, set[str]]:
    return {name: {*its.groups} for name, its in data.source.items()}  # type: ignore[union-attr]


def apart(parts: dict[str, set[str]]) -> bool:
    return len(set.union(*parts.values())) == sum(map(len, parts.values()))


@pytest.mark.parametrize("how", [(), ("folds=5", "fold=3")], ids=["fractions", "folds"])
def test_a_patient_is_on_one_side(make_data: Make, tmp_path: Path, how: tuple[str, ...]) -> None:
    file = table(tmp_path / "rows.csv")
    data = make_data(*of_table(file, *how))
    assert set(sides(data)) == {"train", "val", "test"} and apart(sides(data))
    assert abs(data.num_examples["test"] - 36) <= 8 and abs(data.num_examples["val"] - 18) <= 8
    assert data.source.columns == ["x", "y"]  # the patient is not a feature
    # The negative control: without the key, patients are on several sides.
    (tmp_path / "plain.csv").write_text(file.read_text().replace("p", ""))
    plain = make_data(*of_table(tmp_path / "plain.csv", *how, group=None))
    patients = {
        name: {*its.inputs[:, 0].tolist()}
        for name, its in plain.source.items()  # type: ignore[union-attr]
    }
    assert not apart(patients)  # type: ignore[arg-type]


def test_each_patient_is_tested_in_one_fold_and_folds_stay_balanced(
    make_data: Make, tmp_path: Path
) -> None:
    """No less balanced than scikit-learn's StratifiedGroupKFold."""
    from sklearn.model_selection import StratifiedGroupKFold

    file = table(tmp_path / "rows.csv")
    folds = [split(make_data(*of_table(file, "folds=4", f"fold={f}")), "test") for f in range(4)]
    assert apart({str(f): {*its.groups} for f, its in enumerate(folds)})
    assert sum(map(len, folds)) == 180

    def unevenness(targets: list[np.ndarray]) -> float:
        counts = np.stack([np.bincount(its, minlength=2) for its in targets])
        return float((counts / counts.sum(0)).std(0).max())

    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    kinds, patients = np.array([row[1] == "b" for row in rows]), [row[0] for row in rows]
    theirs = StratifiedGroupKFold(4, shuffle=True, random_state=0)
    tests = [kinds[test].astype(int) for _, test in theirs.split(rows, kinds, patients)]
    assert unevenness([its.targets.numpy() for its in folds]) <= unevenness(tests) + 0.01


def test_duplicates_bind_groups() -> None:
    """Two patients share a row, so both are on one side, with all that they have."""
    keys = [*range(40), 0]
    groups = [number // 4 for number in range(40)] + [9]
    for fold in range(5):
        parts = cut(
            *(keys, np.zeros(41)), val_fraction=0, test_fraction=0, seed=0, folds=5, fold=fold,
            groups=groups,
        )  # fmt: skip
        test = {*parts[2].tolist()} if parts[2] is not None else set()
        bound = {0, 1, 2, 3, 36, 37, 38, 39, 40}
        assert bound <= test or not bound & test


def test_a_patient_of_a_file_of_its_own_may_not_be_trained_on(
    make_data: Make, tmp_path: Path
) -> None:
    file = table(tmp_path / "rows.csv")
    (tmp_path / "night.csv").write_text("patient,kind,x,y\np0,a,999,1\nnew,b,998,1\n")
    sets = "source.sets={night: night.csv}"
    with pytest.raises(DataError, match=r"1 of the 2 night examples have their group .* number 0"):
        make_data(*of_table(file, sets))
    assert make_data(*of_table(file, sets, "overlap=report")).num_overlapping


def test_folders_of_a_depth_are_groups(make_data: Make, tmp_path: Path) -> None:
    for number in range(48):
        patient = f"p{number // 4}"
        folder = tmp_path / "ab"[number % 2] / patient / f"eye{number % 4 // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    asked = ("image_folder", f"root={tmp_path}", "num_classes=2", "input_shape=[3,8,8]",
             "source.resize=8", "num_workers=0", "source.group=1")  # fmt: skip
    data = make_data(*asked, "folds=3", "fold=1")
    assert apart(sides(data)) and sides(data)["test"] <= {f"p{n}" for n in range(12)}
    counts = Counter(split(data, "test").classes)
    assert counts[0] == counts[1] == 8
    assert all(str(name).startswith(("a/p", "b/p")) for name in data.ids("test"))
    deeper = make_data(*asked[:-1], "source.group=2")
    assert apart(sides(deeper)) and "p0/eye0" in set.union(*sides(deeper).values())
    with pytest.raises(DataError, match=r"is in no folder of depth 3 below its class"):
        make_data(*asked[:-1], "source.group=3")


# Refusals.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.fold=1",), "data.fold=1: data.folds=null. Set data.folds"),
        (("data.folds=5", "data.fold=5"), "the last fold is 4"),
        (("data.folds=1",), "data.folds=1 must be an integer of at least 2"),
        (("data.folds=5", "data=mnist"), "makes no folds, as its test split is given"),
        (("data.folds=3", "data=synthetic"), "makes no folds"),
    ],
)
def test_impossible_folds_are_refused_before_the_data_is_read(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as error:
        check(composed(*overrides), {})
    assert message in str(error.value)


def test_the_recipe_names_every_source_that_makes_folds() -> None:
    page = (CONF.parent / "docs" / "recipes" / "folds.md").read_text(encoding="utf-8")
    options = [path.stem for path in (CONF / "data").glob("[!_]*.yaml")]
    made = {name for name in options if "folds" in shipped_node("data", name).get("source", {})}
    assert len(made) > 8
    assert made == {name for name in options if f"`{name}`" in page}


def test_folds_beside_a_test_split_are_refused(make_data: Make, tmp_path: Path) -> None:
    file = table(tmp_path / "rows.csv")
    with pytest.raises(UserError, match=r"test_file=rows\.csv is a test split of its own"):
        make_data(*of_table(file, "folds=5", "source.test_file=rows.csv"))
    with pytest.raises(UserError, match=r"val_fraction=0\.8 and data\.folds=5 leave nothing"):
        make_data(*of_table(file, "folds=5", "source.val_fraction=0.8"))
    with pytest.raises(DataError, match=r"split test is empty: data\.folds=20 of \d+ groups"):
        make_data(*of_table(table(file, patients=12), "folds=20", "fold=19"))
