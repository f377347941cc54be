"""`run.predict` in a notebook: all that a user has gives the numbers of scripts/predict.py."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import finished, script
from PIL import Image

from regrow.errors import UserError
from regrow.load import Predictions, load_run
from regrow.runs import inference
from regrow.runs.export import facts

predict_script = script("predict").main


def by_script(run: Path, source: Path, output: Path) -> list[dict[str, str]]:
    predict_script([f"run={run}", f"input={source}", f"output={output}"])
    with output.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_inputs(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key != "input"} for row in rows]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a folder of colour images, and the folder. Returns the folder of both."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
        for index in range(12):
            pixels = random.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{index}.png")
    finished(
        root / "run",
        *("data=image_folder", f"data.root={root / 'images'}", "data.num_classes=2", "model=cnn"),
        *("data.input_shape=[3,16,16]", "data.source.resize=18", "data.num_workers=0"),
    )
    return root


def test_arrays_and_tensors_give_what_the_script_writes(digits: Path, tmp_path: Path) -> None:
    run = load_run(digits)
    test = run.data.source.test
    images = test.inputs.numpy()
    np.save(tmp_path / "images.npy", images)
    rows = by_script(digits, tmp_path / "images.npy", tmp_path / "out.csv")
    found = run.predict(images)
    assert isinstance(found, Predictions) and len(found) == len(test) == 359
    assert found.rows() == rows
    assert found.names == [row["prediction"] for row in rows]
    assert found.probabilities is not None and found.probabilities.shape == (359, 10)
    accuracy = np.mean(
        [int(name) == target for name, target in zip(found.names, test.targets, strict=True)]
    )
    assert accuracy > 0.85
    for same in (test.inputs, tmp_path / "images.npy", str(tmp_path / "images.npy"), [*images]):
        assert run.predict(same).rows() == rows
    # The negative control: the model itself takes normalised inputs, and does not say so.
    with torch.no_grad():
        raw = run.model(test.inputs.float()).argmax(1).numpy()
    assert np.mean(raw == found.prediction) < 1


def test_one_example_is_a_batch_of_one(digits: Path) -> None:
    run = load_run(digits)
    image = run.data.source.test.inputs[0]
    whole = run.predict(image[None])
    assert len(whole) == 1
    for one in (image, image.numpy(), image[0].numpy(), image[0].tolist()):
        assert run.predict(one).rows() == whole.rows()
    assert run.predict(image.flip(2)).rows() != whole.rows()


@pytest.mark.slow
def test_images_from_files_folders_and_memory(photos: Path, tmp_path: Path) -> None:
    run = load_run(photos / "run")
    folder = photos / "images" / "cat"
    rows = by_script(photos / "run", folder, tmp_path / "out.csv")
    assert run.predict(folder).rows() == rows
    files = sorted(folder.iterdir())
    assert run.predict(files).rows() == rows
    opened = [Image.open(file) for file in files]
    found = run.predict(opened)
    assert without_inputs(found.rows()) == without_inputs(rows)
    assert found.inputs == [str(place) for place in range(12)]
    assert set(found.names) <= {"cat", "dog"} and found.classes == ["cat", "dog"]
    one = run.predict(opened[3]).probabilities
    assert one is not None and found.probabilities is not None
    assert one[0] == pytest.approx(found.probabilities[3], abs=1e-6)
    grey = run.predict(opened[3].convert("L")).probabilities
    assert grey is not None and grey[0] != pytest.approx(one[0], abs=1e-6)
    arrays = [np.asarray(image) for image in opened]
    assert without_inputs(run.predict(arrays).rows()) == without_inputs(rows)


def test_a_photo_in_memory_is_turned_upright_like_its_file(photos: Path, tmp_path: Path) -> None:
    run = load_run(photos / "run")
    image = Image.open(photos / "images" / "dog" / "0.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    opened = Image.open(tmp_path / "turned.png")
    rows = without_inputs(run.predict(tmp_path / "turned.png").rows())
    assert without_inputs(run.predict(opened).rows()) == rows
    assert without_inputs(run.predict(image).rows()) != rows  # the control


def test_a_table_by_its_path_as_an_array_and_as_a_data_frame(table: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    run = load_run(table / "run")
    (tmp_path / "new.csv").write_text("y,x\n50,0.5\n20,20.5\n")
    rows = by_script(table / "run", tmp_path / "new.csv", tmp_path / "out.csv")
    frame = pandas.read_csv(tmp_path / "new.csv")
    assert run.predict(frame).rows() == rows == run.predict(frame[["x", "y"]]).rows()
    assert run.predict(np.array([[0.5, 50], [20.5, 20]])).rows() == rows
    assert run.predict([[0.5, 50], [20.5, 20]]).rows() == rows
    assert run.predict(np.array([[50, 0.5], [20, 20.5]])).rows() != rows  # the control
    frame.index = ["first", "second"]
    assert run.predict(frame).inputs == ["first", "second"]
    row = run.predict(frame.loc["second"])
    assert row.inputs == ["second"] and row.names == [rows[1]["prediction"]]
    with pytest.raises(UserError, match=r"^inputs: no column 'x'\. There are y\.$"):
        run.predict(frame[["y"]])
    with pytest.raises(UserError, match=r"^inputs, column 'x': could not convert string to float"):
        run.predict(frame.assign(x="many"))
    with pytest.raises(UserError, match=r"^inputs, row 1: a value is NaN or infinite\."):
        run.predict(frame.assign(x=[1.0, float("nan")]))


@pytest.mark.slow
def test_each_task_has_its_names(diabetes: Path, tmp_path: Path) -> None:
    run = load_run(diabetes)
    test = run.data.source.test
    values = run.predict(test.inputs)
    assert values.probabilities is None and values.prediction.dtype == np.float64
    assert values.prediction.mean() > 100  # in the target's own units
    with pytest.raises(UserError, match="names: predictions of kind regression"):
        _ = values.names

    cancer = finished(tmp_path / "binary", "data=breast_cancer", "task=binary")
    run = load_run(cancer)
    found = run.predict(run.data.source.test.inputs)
    assert found.classes == run.class_names and found.probabilities is not None
    assert found.probabilities.shape == (len(found), 2)
    second = found.probabilities[:, 1] > 0.5
    assert found.names == [found.classes[int(is_second)] for is_second in second]

    attributes = finished(tmp_path / "labels", "data=digits_attributes", "task=multilabel")
    run = load_run(attributes)
    found = run.predict(run.data.source.test.inputs[:3])
    labels = ["even", "prime", "above_four", "has_a_loop"]
    assert found.classes == labels and found.probabilities is not None
    for names, shares in zip(found.names, found.probabilities, strict=True):
        assert names == [label for label, share in zip(labels, shares, strict=True) if share > 0.5]


def test_between_two_batches_the_callers_settings_are_its_own(tmp_path: Path) -> None:
    """Also of two models side by side, whose settings would be restored in the wrong order."""
    run = finished(tmp_path / "run", "trainer.precision=bf16")
    one, other = load_run(run), load_run(run)
    images = one.data.source.test.inputs[:6]
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    torch.manual_seed(0)
    drawn = []
    for (_, outputs), _ in zip(one.outputs(images, 2), other.outputs(images, 2), strict=False):
        assert outputs.dtype == torch.bfloat16 and not outputs.requires_grad
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        drawn.append(torch.rand(()).item())
    assert drawn == expected
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class Own:
    """A task as a user writes it, without a `kind` and without classes."""

    def predict(self, outputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"prediction": outputs.double()}


class OwnNumbers(Own):
    kind = "regression"


def test_a_task_without_a_kind_gives_arrays_and_says_that_it_has_no_table(
    digits: Path, tmp_path: Path
) -> None:
    run = dataclasses.replace(load_run(digits), task=Own())
    images = run.data.source.test.inputs[:3]
    np.save(tmp_path / "images.npy", images.numpy())
    found = run.predict(images)
    assert found.prediction.shape == (3, 10) and found.classes == run.class_names
    assert facts(run)["task"] == "Own"
    message = "^predictions of a task of kind Own have no columns. .*prediction, an array"
    with pytest.raises(UserError, match=message):
        found.rows()
    with pytest.raises(UserError, match=message):
        [*inference.predict(run, tmp_path / "images.npy", 256)]
    run = dataclasses.replace(run, task=OwnNumbers())
    rows = [*inference.predict(run, tmp_path / "images.npy", 256)]
    assert [float(rows[2][f"prediction/{place}"]) for place in range(10)] == [*found.prediction[2]]


def test_a_task_without_classes_has_no_names_of_them(digits: Path) -> None:
    run = dataclasses.replace(load_run(digits), task=Own(), class_names=None)
    assert run.predict(run.data.source.test.inputs[:3]).classes == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((2, 3)), r"^inputs: an array of shape \(N, 3\), this run's model takes images"),
        (
            np.full((2, 8, 8), 40),
            r"^inputs, row 0: values 40 … 40, this run's images are in 0 … 16",
        ),
        (np.full((2, 8, 8), 0.5), r"^inputs: values reach only 0\.5.*Multiply by 16"),
        (np.zeros((0, 1, 8, 8)), r"^inputs holds no examples"),
        ("nowhere.png", r"^input=nowhere\.png does not exist"),
        (None, r"^inputs: NoneType of object, which is not a type of number"),
        ([Image.new("L", (8, 8)), 3], r"^inputs: a int among images"),
    ],
)
def test_inputs_that_do_not_fit_the_model_are_an_error_of_one_line(
    digits: Path, given: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_run(digits).predict(given)
    assert "\n" not in str(caught.value)


def test_the_folder_alone_is_enough(photos: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(photos / "run", tmp_path / "run", symlinks=True)
    image = Image.open(photos / "images" / "dog" / "0.png")
    run = load_run(moved)
    assert run.predict(image).rows() == load_run(photos / "run").predict(image).rows()
    assert "data" not in vars(run)  # it was not read
