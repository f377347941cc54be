from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.tables import read_header

Make = Callable[..., Data]
CPU = torch.device("cpu")
CROP = (
    "augmentation={_target_: lab.data.augment.CropFlip, pad: 1, flip: false, "
    "padding_mode: constant, alternate_flips: false}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [f"{n},{n * 0.5},{'abc'[n % 3]},{n % 2},{n % 4 // 2},{n / 10}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["x,y,kind,even,half,w", *rows]) + "\n")
    return tmp_path


def arguments(
    folder: Path, kind: str, target: str, outputs: int, shape: int, *more: str
) -> list[str]:
    classes = {"multiclass": "3", "binary": "2"}.get(kind, "null")
    return [
        "csv", f"root={folder}", "source.train_file=rows.csv", f"source.target_columns=[{target}]",
        f"target_kind={kind}", f"num_classes={classes}", f"num_outputs={outputs}",
        f"input_shape=[{shape}]", *more,
    ]  # fmt: skip


def test_classes_by_name_become_indices(make_data: Make, folder: Path) -> None:
    columns = "source.feature_columns=[x,y]"
    data = make_data(*arguments(folder, "multiclass", "kind", 3, 2, columns))
    assert data.class_names == ["a", "b", "c"] and data.num_examples == {
        "train": 42,
        "val": 6,
        "test": 12,
    }
    for _, split in data.source.items():
        assert torch.equal(split.inputs[:, 0].long() % 3, split.targets)
    renamed = make_data(
        *arguments(folder, "multiclass", "kind", 3, 2, columns, "class_names=[c,b,a]")
    )
    split = renamed.source.train
    assert torch.equal(2 - split.inputs[:, 0].long() % 3, split.targets)


def test_a_class_named_by_a_number_is_not_taken_for_an_index(
    make_data: Make, tmp_path: Path
) -> None:
    """pandas writes a column of integers as 1.0 and 2.0 once a cell of it was missing."""
    rows = "".join(f"{index},{index % 2 + 1}.0\n" for index in range(20))
    (tmp_path / "rows.csv").write_text(f"x,grade\n{rows}")
    (tmp_path / "val.csv").write_text("x,grade\n30,1\n31,1\n")
    given = ("num_classes=2", "source.val_file=val.csv")
    with pytest.raises(DataError, match=r"class '1' is none of the 2 classes 1\.0, 2\.0"):
        make_data(*arguments(tmp_path, "multiclass", "grade", 2, 1, *given))


def test_a_class_may_be_called_none(make_data: Make, tmp_path: Path) -> None:
    rows = "".join(f"{index},{'None' if index % 2 else 'Mild'}\n" for index in range(20))
    (tmp_path / "rows.csv").write_text(f"x,kind\n{rows}")
    given = ("num_classes=2", "source.feature_columns=[x]")
    data = make_data(*arguments(tmp_path, "multiclass", "kind", 2, 1, *given))
    assert data.class_names == ["Mild", "None"]


def test_every_kind_of_target_and_weights_are_read(make_data: Make, folder: Path) -> None:
    xy = "source.feature_columns=[x,y]"
    binary = make_data(*arguments(folder, "binary", "even", 1, 2, xy, "source.weight_column=w"))
    train = binary.source.train
    assert torch.equal(train.inputs[:, 0].float() % 2, train.targets)
    assert torch.allclose(train.weights, train.inputs[:, 0].float() / 10)
    batch = next(binary.train(device=CPU).epoch(0))
    assert batch.weights is not None and batch.weights.shape == batch.targets.shape
    labels = make_data(*arguments(folder, "multilabel", "even,half", 2, 2, xy))
    assert labels.source.train.targets.shape == (42, 2) and labels.class_names == ["even", "half"]
    values = make_data(*arguments(folder, "regression", "y,w", 2, 1, "source.feature_columns=[x]",
                                  "normalize_targets=true"))  # fmt: skip
    assert values.source.train.targets.shape == (42, 2) and len(values.target_mean or []) == 2


def test_splits_in_files_of_their_own_and_a_row_in_two_is_refused(
    make_data: Make, folder: Path
) -> None:
    header, *rows = (folder / "rows.csv").read_text().splitlines()
    (folder / "rows.csv").write_text("\n".join([header, *rows[:40]]))
    (folder / "test.csv").write_text("\n".join([header, *rows[40:]]))
    call = arguments(folder, "binary", "even", 1, 2, "source.feature_columns=[x,y]",
                     "source.test_file=test.csv")  # fmt: skip
    assert make_data(*call).num_examples == {"train": 36, "val": 4, "test": 20}
    (folder / "test.csv").write_text("\n".join([header, *rows[39:]]))
    with pytest.raises(DataError, match=r"1 of the 21 test examples are in (train|val) too"):
        make_data(*call)
    assert make_data(*call, "overlap=report").num_examples["test"] == 21


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,a,0,0", "line 62: 5 cells where the header names 6"),
        ("1,zwei,a,0,0,1", "line 62, column 'y': the cell holds 'zwei'"),
        ("1,,a,0,0,1", "line 62, column 'y': the cell is empty"),
        ("1,nan,a,0,0,1", "line 62, column 'y': the cell holds 'nan'"),
        ('1,"2,a,0,0,1', "line 62: unexpected end of data"),
        ("1,2,\udcff,0,0,1", "not UTF-8 (invalid start byte). Save the file as UTF-8."),
    ],
)
def test_a_broken_line_is_named(make_data: Make, folder: Path, line: str, message: str) -> None:
    with (folder / "rows.csv").open("a", errors="surrogateescape") as file:
        file.write(line)
    with pytest.raises(DataError) as caught:
        make_data(*arguments(folder, "binary", "even", 1, 2, "source.feature_columns=[x,y]"))
    assert f"{folder / 'rows.csv'}, " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (gzip.compress(b"x,y"), "rows.csv: compressed (gzip). Unpack it."),
        (lzma.compress(b"x,y"), "rows.csv: compressed (xz). Unpack it."),
        (bz2.compress(b"x,y"), "rows.csv: compressed (bzip2). Unpack it."),
        (b"\x28\xb5\x2f\xfd\x04", "rows.csv: compressed (zstd). Unpack it."),
        (b"PK\x03\x04\x14\x00\xff", "rows.csv: compressed (zip). Unpack it."),
        (b"BZh\xe4user,y", "rows.csv, after line 0: not UTF-8 (invalid continuation byte)."),
    ],
    ids=["gzip", "xz", "bzip2", "zstd", "zip", "latin1"],
)
def test_a_compressed_table_is_not_called_wrong_text(
    make_data: Make, folder: Path, start: bytes, message: str
) -> None:
    (folder / "rows.csv").write_bytes(start)
    with pytest.raises(DataError, match=re.escape(message)):
        make_data(*arguments(folder, "binary", "even", 1, 2, "source.feature_columns=[x,y]"))


@pytest.mark.parametrize(
    ("kind", "target", "line", "message"),
    [
        (
            "binary",
            "even",
            "1,2,a,7,0,1",
            "line 62, column 'even': class '7' is none of the 2 classes",
        ),
        ("binary", "even", "1,2,a,,0,1", "line 62, column 'even': the cell is empty"),
        ("multiclass", "kind", "1,2, ,0,0,1", "line 62, column 'kind': the cell is empty"),
        ("multilabel", "even,half", "1,2,a,0,0.5,1", "line 62, column 'half': a label is 0 or 1"),
        ("regression", "half", "1,2,a,0,much,1", "line 62, column 'half': the cell holds 'much'"),
    ],
)
def test_a_target_out_of_range_is_named(
    make_data: Make, folder: Path, kind: str, target: str, line: str, message: str
) -> None:
    with (folder / "rows.csv").open("a") as file:
        file.write(line)
    with pytest.raises(DataError) as caught:
        make_data(*arguments(folder, kind, target, 2, 2, "source.feature_columns=[x,y]"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([CROP], "does not fit float64"),
        (["input_shape=[4]"], "shape [2]: the columns x, y. Set 'data.input_shape=[2]'"),
        (["num_classes=4"], "3 classes were found in column 'kind'"),
        (["num_outputs=5"], "data.num_outputs=5, but multiclass"),
        (["source.feature_columns=[x,z]"], "has no column 'z'; it has x, y, kind"),
        (["source.feature_columns=[x,kind]"], "cannot be the features"),
        (["source.target_columns=[]"], "names no column"),
        (["source.target_columns=[x,y]"], "takes one"),
        (["source.train_file=nowhere.csv"], "No such file or directory. Names of tables are"),
        (["source.train_file=."], "cannot be read: Is a directory. Name a table in it."),
        (["source.delimiter=';;'"], "must be one character"),
        (["source.delimiter=';'"], "has no column 'x'"),
        (["source.test_fraction=0.001"], "split test is empty"),
        (["normalize_targets=true"], "is for regression"),
    ],
)  # fmt: skip
def test_an_error_about_a_table_says_what_it_holds_in_one_line(
    make_data: Make, folder: Path, overrides: list[str], message: str
) -> None:
    call = arguments(folder, "multiclass", "kind", 3, 2, "source.feature_columns=[x,y]")
    with pytest.raises(UserError) as caught:
        make_data(*call, *overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_advice_about_a_number_of_classes_can_be_followed(
    make_data: Make, tmp_path: Path
) -> None:
    """It led in a circle for one class, and for a binary target of three."""

    def refusal(kind: str, names: tuple[str, ...], outputs: int) -> str:
        rows = "".join(f"{row},{names[row % len(names)]}\n" for row in range(60))
        (tmp_path / "rows.csv").write_text(f"x,kind\n{rows}")
        with pytest.raises(UserError) as caught:
            make_data(*arguments(tmp_path, kind, "kind", outputs, 1))
        return str(caught.value)

    for kind, outputs in (("multiclass", 3), ("binary", 1)):
        said = refusal(kind, ("yes",), outputs)
        assert "holds one class alone: yes." in said and "num_classes=1" not in said
    three = ("no", "yes", "maybe")
    said = refusal("binary", three, 1)
    words = "Set task=multiclass data.target_kind=multiclass data.num_classes=3 and data.num_ou"
    assert words in said
    four = refusal("multiclass", (*three, "never"), 3)
    assert "Set data.num_classes=4 and data.num_outputs=4." in four  # the negative control


def test_classes_that_are_counted_from_one_can_be_named_as_the_error_says(
    make_data: Make, tmp_path: Path
) -> None:
    rows = "".join(f"{row},{row % 3 + 1}\n" for row in range(60))
    (tmp_path / "rows.csv").write_text(f"x,kind\n{rows}")
    call = arguments(tmp_path, "multiclass", "kind", 3, 1)
    with pytest.raises(DataError, match=r"class '3' is none of the 3 classes 0 … 2\.") as caught:
        make_data(*call)
    (advice,) = re.findall(r"If 1, 2, 3 are the classes: '(?:data\.)(.*)'$", str(caught.value))
    data = make_data(*call, advice)
    assert data.class_names == ["1", "2", "3"]
    (tmp_path / "rows.csv").write_text(f"x,kind\n{rows}61,4\n")
    with pytest.raises(DataError) as caught:  # the negative control: four classes are not three
        make_data(*call)
    assert "class_names" not in str(caught.value)


def test_a_number_that_float32_makes_infinite_is_named(make_data: Make, tmp_path: Path) -> None:
    """It gave a loss of NaN in the set that holds it, and no word."""
    rows = "".join(f"{row},{row % 2}\n" for row in range(60))
    (tmp_path / "rows.csv").write_text(f"x,even\n{rows}")
    call = arguments(tmp_path, "binary", "even", 1, 1, "source.test_file=test.csv")
    for value, normalize in (("1e41", "train"), ("1e39", "none")):
        (tmp_path / "test.csv").write_text(f"x,even\n80,0\n{value},1\n")
        with pytest.raises(DataError) as caught:
            make_data(*call, f"normalize={normalize}")
        assert "split test, example 1, column 'x': 1e+" in str(caught.value)
    (tmp_path / "test.csv").write_text("x,even\n80,0\n1e39,1\n")
    far = make_data(*call).source.test  # the negative control: standardised, it is within float32
    assert far is not None and len(far) == 2


def test_a_table_that_is_read_without_a_config_keeps_the_rule_of_its_delimiter(
    folder: Path,
) -> None:
    for delimiter in (";;", ""):
        with pytest.raises(UserError) as caught:
            read_header(folder / "rows.csv", delimiter)
        said = f"data.source.delimiter={delimiter} must be one character."
        assert str(caught.value) == said
    assert read_header(folder / "rows.csv", ",")[:2] == ["x", "y"]


def test_an_empty_file_and_one_without_rows_are_named(make_data: Make, folder: Path) -> None:
    for text, message in (
        ("", "the first line is empty"),
        ("\nx,y,even\n1,1,1\n", "the first line is empty"),
        ("x,y,even\n", "a header and no rows"),
        ("x,x,even\n1,1,1\n", "twice"),
    ):
        (folder / "rows.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            make_data(*arguments(folder, "binary", "even", 1, 2))
