"""Unusable data ends in one line with the fix; readable data is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exact_numbers import CLASSES, CPU, data_of
from test_files import of_ones_own

from lab.data.datasets import from_datasets
from lab.tasks.losses import CrossEntropy
from lab.tasks.tasks import Multiclass
from regrow.errors import DataError, UserError
from regrow.feeding.items import outside
from regrow.feeding.loaders import Data
from regrow.feeding.splits import Examples, Splits

Make = Callable[..., Data]


def table(make: Make, folder: Path, text: str, *more: str, width: int = 2) -> Data:
    (folder / "rows.csv").write_text(text, encoding="utf-8")
    return make(
        *("csv", f"root={folder}", "source.train_file=rows.csv", "source.target_columns=[y]"),
        *("target_kind=regression", "num_classes=null", "num_outputs=1", f"input_shape=[{width}]"),
        *("overlap=ignore", *more),
    )


def rows(*cells: str) -> str:
    """A table with columns a, b, y whose column b cycles through `cells`."""
    lines = [f"{n},{cells[n % len(cells)]},{n}" for n in range(40)]
    return "\n".join(["a,b,y", *lines]) + "\n"


@pytest.mark.parametrize("words", [("True", "False"), ("TRUE", "FALSE"), ("true", "false")])
def test_true_and_false_are_one_and_zero(
    words: tuple[str, str], make_data: Make, tmp_path: Path
) -> None:
    data = table(make_data, tmp_path, rows(*words))
    for _, split in data.source.items():
        assert torch.equal(split.inputs[:, 1], (split.inputs[:, 0] + 1) % 2)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (("1", "True"), "line 3, column 'b': the cell holds 'True', and the cells above hold num"),
        (("True", "0.5"), "line 3, column 'b': the cell holds '0.5', and the cells above hold tru"),
        (("1", "nan"), "line 3, column 'b': the cell holds 'nan', which is not a finite number"),
        (("1", "-inf"), "line 3, column 'b': the cell holds '-inf'"),
        (("1", "1_000"), "holds '1_000', which is not a finite number. Write numbers as 1234.5"),
        (("1", '"1,5"'), "holds '1,5', which is not a finite number. Write numbers as 1234.5"),
        (("1", ""), "line 3, column 'b': the cell is empty"),
        (("1", "1,"), "line 3: 4 cells where the header names 3"),
        (("1", "# note"), "line 3, column 'b': the cell holds '# note'"),
        (("1", "2024-05-01"), "Write a number, or name the columns of numbers in data.source.feat"),
        (("1", "Bern"), "A category needs a column of 0 and 1 for each of its values"),
    ],
)
def test_an_unreadable_cell_is_named_by_line_and_column(
    cells: tuple[str, ...], message: str, make_data: Make, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        table(make_data, tmp_path, rows(*cells))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("header", ["a,b,y", "a,b,y,"])
def test_a_comma_at_the_end_of_each_line_is_recognised(
    header: str, make_data: Make, tmp_path: Path
) -> None:
    text = rows("1").replace("\n", ",\n").replace("a,b,y,", header)
    with pytest.raises(DataError, match=r"line 2.*Remove the ',' at the end of each line") as error:
        table(make_data, tmp_path, text)
    assert "\n" not in str(error.value)
    assert table(make_data, tmp_path, rows("1"))


def test_lines_and_columns_that_are_left_out_are_named(
    make_data: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    text = "\ufeff" + rows("1").replace("3,1,3\n", "3,1,3\n\n\n")
    table(make_data, tmp_path, text, "source.feature_columns=[a]", width=1)
    assert "left out 2 blank lines" in caplog.text
    assert "columns that are not used: b" in caplog.text
    table(make_data, tmp_path, rows("1").replace("a,b,y", ",b,y"))
    assert "column 1 has no name and is used as a feature" in caplog.text


def test_a_list_of_columns_says_how_many_it_leaves_out(make_data: Make, tmp_path: Path) -> None:
    names = [f"x{n}" for n in range(23)]
    lines = [",".join([*names, "y"]), *(",".join([str(n)] * 24) for n in range(30))]
    with pytest.raises(UserError, match=r"the columns x0, .*, x19 and 3 more\. Set 'data"):
        table(make_data, tmp_path, "\n".join(lines) + "\n")


def test_another_delimiter_is_recognised(make_data: Make, tmp_path: Path) -> None:
    for sign, typed in ((";", "'data.source.delimiter=\";\"'"), ("\t", "\\t\"'")):
        text = rows("1").replace(",", sign)
        with pytest.raises(UserError, match=r"its delimiter\? Then add") as refused:
            table(make_data, tmp_path, text)
        assert typed in str(refused.value)
        assert table(make_data, tmp_path, text, f'source.delimiter="{sign}"')


def test_targets_that_the_loss_leaves_out_need_not_be_a_class(
    make_data: Make, tmp_path: Path
) -> None:
    inputs, targets = torch.randn(4, 4), torch.tensor([0, 255, 2, 0])
    pairs = list(zip(inputs, targets, strict=True))
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=255)
    task = Multiclass(
        **{"num_classes": 3, "class_names": None, "monitor": "val/accuracy"},
        **{"per_class": False, "auroc": False, "extra_metrics": None, "loss": loss},
    )
    for split in (Examples(inputs, targets), pairs):
        with pytest.raises(DataError, match="class 255 is out of range"):
            list(data_of(split).evaluation("val", device=CPU))
        (batch,) = data_of(split, ignore_index=255).evaluation("val", device=CPU)
        task.check(batch.inputs[:, :3], batch.targets)
        metrics = task.metrics(CPU)
        metrics.update(torch.eye(3)[[0, 1, 2, 1]], batch.targets)
        assert metrics.scalars()["accuracy"] == pytest.approx(2 / 3)
    text = rows("1").replace(",1,3\n", ",1,255\n")
    kinds = ("target_kind=multiclass", "num_classes=40", "num_outputs=40")
    assert 255 in torch.cat(
        [split.targets for _, split in table(
            make_data, tmp_path, text, *kinds, "ignore_index=255"
        ).source.items()]
    )  # fmt: skip


def generated() -> Any:
    yield torch.zeros(4), 0


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_a_label_that_is_not_0_or_1_is_named_wherever_it_is(kind: str) -> None:
    """A task looks at the first batch alone."""

    def data(wrong: float, row: int) -> Data:
        targets = torch.tensor([0.0, 1.0]).repeat(20)
        targets[row] = wrong
        if kind == "multilabel":
            targets = torch.stack([targets.clamp(0, 1)] * 2 + [targets], 1)
        sizes = {"num_classes": None, "num_outputs": 1} if kind == "binary" else {}
        return of_ones_own(Examples(torch.randn(40, 4), targets), target_kind=kind, **sizes)

    for soft in (0.0, 0.25, 1.0):
        assert data(soft, 0).num_examples == {"train": 40}
    for wrong in (2, -1, 1.5):
        with pytest.raises(DataError, match=rf"^split train, example 33: {kind} .* got {wrong}\."):
            data(wrong, 33)


def test_images_of_a_set_in_another_type_than_those_of_train_are_refused() -> None:
    """The statistics of pixels in 0 … 255 would make pixels in 0 … 1 nearly constant."""
    pixels = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    classes = torch.arange(40) % 3
    train, val = Examples(pixels, classes), Examples(pixels.flip(0) / 255, classes)
    for one, other, said in ((train, val, "float32, and train of uint8"), (val, train, "uint8")):
        with pytest.raises(DataError, match=rf"^split val holds images of {said}"):
            data_of(one, source=Splits(one, other), input_shape=[3, 4, 4])
        assert data_of(one, input_shape=[3, 4, 4]).num_examples == {"train": 40, "val": 40}
    whole = Splits(train, Examples(pixels.long(), classes))  # integers too, in the same range
    assert data_of(train, source=whole, input_shape=[3, 4, 4]).num_examples["val"] == 40


def test_a_soft_target_that_is_not_a_distribution_is_named_wherever_it_is() -> None:
    def data(*row: float) -> Data:
        targets = torch.full((40, 3), 1 / 3)
        targets[33] = torch.tensor(row)
        return of_ones_own(Examples(torch.randn(40, 4), targets), target_kind="multiclass")

    for good in ((0.0, 0.25, 0.75), (0.0, 1.0, 0.0)):
        assert data(*good).num_examples == {"train": 40}
    for wrong in ((5.0, 5.0, 5.0), (0.0, 0.0, 0.0), (-1.0, 1.0, 1.0)):
        with pytest.raises(DataError, match=r"^split train, example 33: a soft target of multicl"):
            data(*wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_a_class_is_in_range_whatever_holds_it(dtype: torch.dtype) -> None:
    targets = torch.tensor([0, 3, 127], dtype=dtype)
    assert outside(targets, 128, -100) is outside(targets, 40_000, 255) is None
    assert outside(targets, 127, 200) == 127 and outside(targets, 3, None) == 3


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (generated(), "generator has no numbered items"),
        ({"train": 1}, "dict has no numbered items"),
        (torch.utils.data.DataLoader([1]), "DataLoader; the run makes its own"),  # type: ignore[arg-type]
    ],
)
def test_a_split_without_numbered_items_is_refused(split: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_datasets(train=split, val=None, test=None, collate=None)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": torch.zeros(4), "label": 0}, r"dict with keys \['label', 'text'\]"),
        ((torch.zeros(4), {"boxes": torch.zeros(2)}), r"targets are a mapping with keys \['boxes'"),
        ((torch.zeros(4), "cat"), "targets hold str"),
        (("a text", 0), "inputs hold str"),
        ((torch.zeros(4), None), "items of the data set do not make a batch"),
        (torch.zeros(4), "a batch of the data set is Tensor"),
    ],
)
def test_items_that_make_no_batch_are_one_line(item: Any, message: str) -> None:
    data = data_of([item] * 4, num_classes=None, target_kind="regression", num_outputs=1)
    with pytest.raises(DataError, match=message) as refused:
        list(data.evaluation("val", device=CPU))
    assert "\n" not in str(refused.value) and "collate" in str(refused.value)


def test_items_of_several_shapes_are_one_line() -> None:
    items = [(torch.zeros(2 + n % 2), 0) for n in range(4)]
    with pytest.raises(DataError, match="collate"):
        list(data_of(items).evaluation("val", device=CPU))


def collate(items: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([it["x"] for it in items]), torch.tensor([it["label"] for it in items])


def test_items_that_only_a_collate_can_read_are_read_and_checked() -> None:
    """Like those of a Hugging Face data set."""
    items = [{"x": torch.full((4,), float(n)), "label": n % 3} for n in range(6)]
    source = from_datasets(train=items, val=items, test=None, collate=collate)
    (batch,) = data_of(items, source=source).evaluation("val", device=CPU)
    assert batch.targets.tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(
        DataError, match=r"in a batch: class 2 is out of range.*Number the classes from 0"
    ):
        list(data_of(items, source=source, num_classes=2).evaluation("val", device=CPU))


def test_a_collate_that_drops_items_is_refused() -> None:
    items = [{"x": torch.zeros(4), "label": 0}] * 4
    source = from_datasets(train=items, val=items, test=None, collate=lambda it: collate(it[1:]))
    with pytest.raises(DataError, match="a batch of 4 items has targets of shape"):
        list(data_of(items, source=source).evaluation("val", device=CPU))


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.array([["a"] * 4] * 4), CLASSES, "Examples.inputs: ndarray of <U1"),
        (np.array([[None] * 4] * 4), CLASSES, "Examples.inputs: ndarray of object"),
        ([torch.zeros(2), torch.zeros(3)], CLASSES, "a list of tensors of 2 shapes"),
        ([[1, 2], [3]], CLASSES, "Examples.inputs: setting an array element"),
        (torch.zeros(4, 4), ["a", "b", "c", "a"], "Examples.targets: list of <U1"),
        (torch.zeros(4, 4, dtype=torch.complex64), CLASSES, "complex or sparse"),
        (torch.tensor(1.0), CLASSES, "Examples.inputs: one number"),
    ],
)
def test_examples_of_no_numbers_are_one_line(inputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        Examples(inputs, targets)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [1.0, np.nan, 1.0, 1.0]])
def test_weights_are_one_number_of_zero_or_more_for_each_example(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"Examples\.weights"):
        Examples(torch.zeros(4, 4), CLASSES, np.array(weights))


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, torch.ones(1)])
def test_the_weight_of_an_item_is_a_number_of_zero_or_more(weight: Any) -> None:
    def batches(weight: Any) -> list[Any]:
        items = [(torch.zeros(4), 0, weight)] * 4
        source = from_datasets(train=items, val=items, test=None, collate=None)
        return list(data_of(items, source=source).evaluation("val", device=CPU))

    assert batches(0.5)[0].weights.tolist() == [0.5] * 4
    with pytest.raises(
        DataError, match=r"^val: the weights of a batch, of shape .* are not one fi"
    ):
        batches(weight)


def test_a_source_that_returns_something_else_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.source gives a tuple"):
        data_of(None, source=(1, 2, 3))


def test_numpy_of_any_byte_order_becomes_a_tensor() -> None:
    made = Examples(np.arange(4, dtype=">f8").reshape(2, 2), np.arange(2, dtype=np.uint16))
    assert made.inputs.dtype == torch.float64 and made.targets.dtype == torch.int64
    assert Examples(np.ones((2, 2), np.longdouble), [0, 1]).inputs.tolist() == [[1.0, 1.0]] * 2
    assert isinstance(Splits(made, None, None).train, Examples)


def test_targets_labels_and_weights_are_in_the_fingerprint() -> None:
    inputs = torch.arange(16.0).view(4, 4)
    prints = [
        data_of(Examples(inputs, targets, weights)).fingerprint()["train"]["sha256"]
        for targets, weights in (
            *((CLASSES, None), (CLASSES.flip(0).roll(1), None)),
            *((CLASSES, torch.ones(4)), (CLASSES, torch.arange(4.0))),
        )
    ]
    assert len({*prints}) == 4
