from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.preprocess import Preprocessing

Make = Callable[..., Data]
CPU = torch.device("cpu")


def from_folder_alone(data: Data) -> Preprocessing:
    """Built from the run's folder alone."""
    return Preprocessing.from_dict(json.loads(json.dumps(data.preprocessing.to_dict())))


def evaluated(data: Data, split: str = "test") -> torch.Tensor:
    return torch.cat([batch.inputs for batch in data.evaluation(split, device=CPU)])


def read(data: Data, path: Path) -> torch.Tensor:
    parts = list(from_folder_alone(data).read(path, 7))
    assert all(len(names) == len(inputs) for names, inputs in parts)
    return torch.cat([inputs for _, inputs in parts])


@pytest.mark.parametrize("form", ["nchw", "nhw", "nhwc", "flat", "float"])
def test_an_array_of_digits_is_processed_as_in_evaluation(
    make_data: Make, tmp_path: Path, form: str
) -> None:
    data = make_data("digits")
    images = data.source.test.inputs.numpy()
    arrays = {
        "nchw": images, "nhw": images[:, 0], "nhwc": images.transpose(0, 2, 3, 1),
        "flat": images.reshape(len(images), -1), "float": images.astype(np.float64),
    }  # fmt: skip
    np.save(tmp_path / "images.npy", arrays[form])
    assert torch.equal(read(data, tmp_path / "images.npy"), evaluated(data))
    np.save(tmp_path / "images.npy", arrays[form][::-1])  # the negative control
    assert not torch.equal(read(data, tmp_path / "images.npy"), evaluated(data))
    np.save(tmp_path / "one.npy", images[0])
    assert torch.equal(read(data, tmp_path / "one.npy"), evaluated(data)[:1])


def test_image_files_are_processed_as_in_evaluation(make_data: Make, image_root: Path) -> None:
    data = make_data(
        "image_folder", f"root={image_root}", "num_classes=2", "input_shape=[3,16,16]",
        "source.resize=18", "num_workers=0",
    )  # fmt: skip
    want = evaluated(data)
    for file, inputs in zip(data.source.test.files, want, strict=True):
        assert torch.equal(read(data, Path(file))[0], inputs)
    names = [name for part, _ in from_folder_alone(data).read(image_root, 7) for name in part]
    assert len(names) == 24 and names == sorted(names)


def test_an_image_of_any_size_reaches_a_model_of_digits(make_data: Make, tmp_path: Path) -> None:
    from PIL import Image

    data = make_data("digits")
    pixels = data.source.test.inputs[0, 0].float() * (255 / 16)
    grey = Image.fromarray(pixels.round().byte().numpy())
    grey.save(tmp_path / "same.png")
    assert torch.allclose(read(data, tmp_path / "same.png"), evaluated(data)[:1], atol=0.02)
    grey.resize((64, 64)).convert("RGB").save(tmp_path / "large.png")
    assert read(data, tmp_path / "large.png").shape == (1, 1, 8, 8)


def test_rows_of_a_table_are_processed_as_in_evaluation(make_data: Make, tmp_path: Path) -> None:
    rows = [f"{n % 2},{n * 1.5},{n**0.5}" for n in range(50)]
    (tmp_path / "rows.csv").write_text("\n".join(["label,b,a", *rows]))
    data = make_data(
        "csv", f"root={tmp_path}", "source.train_file=rows.csv", "source.target_columns=[label]",
        "target_kind=binary", "num_classes=2", "num_outputs=1", "input_shape=[2]",
    )  # fmt: skip
    test = data.source.test.inputs
    lines = [f"{b},{a}" for a, b in test[:, [1, 0]].tolist()]  # no target, other column order
    (tmp_path / "new.csv").write_text("\n".join(["b,a", *lines]))
    assert torch.equal(read(data, tmp_path / "new.csv"), evaluated(data))
    # An error offers no change of what a run has fixed.
    for text, said in (("b;a\n1;2\n", "The run's is ','."), ("b,a\n1,x\n", "Write a number.")):
        (tmp_path / "new.csv").write_text(text)
        with pytest.raises(DataError) as caught:
            read(data, tmp_path / "new.csv")
        assert str(caught.value).endswith(said)
    np.save(tmp_path / "new.npy", test.numpy())
    assert torch.equal(read(data, tmp_path / "new.npy"), evaluated(data))


def test_wrong_inputs_are_one_line(make_data: Make, tmp_path: Path) -> None:
    digits, table = make_data("digits"), make_data("breast_cancer")
    whole = np.zeros((3, 8, 8))
    whole[1, 0, 0] = 255
    cases = [
        (digits, "wide.npy", np.zeros((3, 9, 9)), "model takes images (N, 1, 8, 8)"),
        (digits, "bright.npy", whole, "row 1: values 0 … 255, this run's images are in 0 … 16"),
        (digits, "dark.npy", whole / 255, "Multiply by 16"),
        (digits, "nan.npy", whole * np.nan, "row 0: a value is NaN or infinite"),
        (digits, "none.npy", np.zeros((0, 8, 8)), "holds no examples"),
        (digits, "text.npy", np.array(["a"]), "no plain numbers"),
        (table, "few.npy", np.zeros((3, 4)), "rows of shape [4], this run's model takes [30]"),
        (table, "row.npy", np.array([1, np.nan]), "row 1: a value is NaN or infinite"),
        (table, "rows.csv", None, "features have no names"),
        (digits, "rows.csv", None, "model takes images of shape [1, 8, 8]"),
        (
            digits,
            "file.xyz",
            None,
            "not a known kind. Use an image, a folder of images, .npy or .csv",
        ),
        (digits, "folder", None, "holds no images"),
        (digits, "broken.png", None, "broken.png is not a readable image"),
        (digits, "broken.npy", None, "is not a readable array"),
        (digits, "nowhere.png", None, "does not exist"),
    ]
    (tmp_path / "folder").mkdir()
    for data, name, array, message in cases:
        path = tmp_path / name
        if array is not None:
            np.save(path, array)
        elif not path.exists() and name != "nowhere.png":
            path.write_text("a,b\n1,2\n")
        with pytest.raises(UserError) as caught:
            read(data, path)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert name in str(caught.value) and "allow_pickle" not in str(caught.value)
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a readable array"):
        read(digits, tmp_path / "pickled.npy")
