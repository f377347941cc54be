from __future__ import annotations

import dataclasses
import hashlib
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.data import datasets
from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.splits import Examples

Make = Callable[..., Data]
CPU = torch.device("cpu")
CONF = Path(__file__).parents[2] / "conf" / "data"
OPTIONS = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))


def write_idx(path: Path, array: np.ndarray) -> None:
    magic = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    path.write_bytes(magic + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def write_mnist(folder: Path) -> dict[str, np.ndarray]:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 40), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
        arrays[name] = images
    return arrays


def test_mnist_is_read_from_its_files(make_data: Make, tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    data = make_data("mnist", f"root={tmp_path}", "source.val_fraction=0.25", "normalize=none")
    assert data.num_examples == {"train": 30, "val": 10, "test": 10}
    batch = next(iter(data.evaluation("test", device=CPU)))
    want = torch.from_numpy(arrays["t10k"]).unsqueeze(1).float() / 255
    assert torch.allclose(batch.inputs, want) and batch.targets.tolist() == list(range(10))
    assert next(data.train(device=CPU).epoch(0)).inputs.shape == (30, 1, 28, 28)


def test_broken_mnist_files_are_named(make_data: Make, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"MNIST under data\.root=.* is broken"):
        make_data("mnist", f"root={tmp_path}")


def test_cifar10_is_read_from_its_files(
    make_data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the on-disk format; the checksums are those of the small files."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    images = {}
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(CIFAR10, attribute):
            images[name] = random.integers(0, 256, (10, 3072), dtype=np.uint8)
            entries.append([name, write(name, {"data": images[name], "labels": list(range(10))})])
        monkeypatch.setattr(CIFAR10, attribute, entries)
    names = make_data("synthetic").class_names or [str(number) for number in range(10)]
    meta = CIFAR10.meta | {"md5": write("batches.meta", {"label_names": names})}
    monkeypatch.setattr(CIFAR10, "meta", meta)

    data = make_data("cifar10", f"root={tmp_path}")
    assert data.num_examples == {"train": 45, "val": 5, "test": 10}
    raw = torch.from_numpy(images["test_batch"]).view(10, 3, 32, 32)
    assert torch.equal(data.source.test.inputs, raw)
    batch = next(data.train(device=CPU).epoch(0))
    assert batch.inputs.shape == (45, 3, 32, 32) and batch.inputs.is_contiguous()
    (folder / "test_batch").write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"data\.source\.download=true"):
        make_data("cifar10", f"root={tmp_path}", "source.download=false")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_without_network_one_line_says_what_to_do(
    make_data: Make, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no server listens there
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        make_data(name, f"root={tmp_path}")
    line = str(caught.value)
    assert f"data={name}: " in line and "the download failed" in line and "data=digits" in line
    assert str(tmp_path) in line and "\n" not in line and len(line) < 330
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


@pytest.mark.parametrize("mine", [False, True])
def test_a_failed_download_leaves_no_empty_folder(tmp_path: Path, mine: bool) -> None:
    root = tmp_path / "data"
    if mine:
        root.mkdir()
    with pytest.raises(OSError, match="no network"), datasets._alone(root):
        (root / "MNIST" / "raw").mkdir(parents=True)  # as torchvision does
        raise OSError("no network")
    assert root.exists() is mine


@pytest.mark.parametrize(
    ("kind", "shape", "outputs"),
    [("multiclass", [3, 16, 16], 10), ("multiclass", [7], 10), ("binary", [2, 3], 1),
     ("multilabel", [5], 4), ("regression", [1, 8, 8], 1), ("regression", [4], 3)],
)  # fmt: skip
def test_synthetic_examples_come_in_any_shape(
    make_data: Make, kind: str, shape: list[int], outputs: int
) -> None:
    classes = {"multiclass": outputs, "binary": 2}.get(kind, "null")
    data = make_data(
        "synthetic", f"input_shape={shape}", f"target_kind={kind}", f"num_outputs={outputs}",
        f"num_classes={classes}",
    )  # fmt: skip
    batch = next(data.train(device=CPU).epoch(0))
    assert batch.inputs.shape == (64, *shape) and batch.inputs.dtype == torch.float32
    again = make_data("synthetic", f"input_shape={shape}", f"target_kind={kind}",
                      f"num_outputs={outputs}", f"num_classes={classes}", seed=9)  # fmt: skip
    assert (
        again.fingerprint() == data.fingerprint()
    )  # the run's seed changes the order, not the data
    with pytest.raises(UserError, match=r"num_train=0 must be an integer of at least 1"):
        make_data("synthetic", "source.num_train=0")
    with pytest.raises(
        UserError, match=r"data.target_kind=segmentation: synthetic .* Use multiclass"
    ):
        make_data("synthetic", "target_kind=segmentation")


@pytest.mark.slow
def test_digits_are_read_without_heavy_imports() -> None:
    code = (
        "import sys, torch; from lab.data.datasets import digits;"
        "digits(val_fraction=0.1, test_fraction=0.2, seed=0, folds=None, fold=0);"
        "import regrow.feeding.loaders, lab.data.augment;"
        "heavy = ('sklearn', 'torchvision', 'PIL', 'omegaconf', 'hydra');"
        "print([name for name in heavy if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_augment_false_leaves_the_images_as_they_are(make_data: Make) -> None:
    plain = make_data("digits", "augment=false")
    batch = next(plain.train(device=CPU).epoch(0))
    known = torch.cat([b.inputs for b in plain.evaluation("train", device=CPU)])
    rows = {row.numpy().tobytes() for row in known}
    assert all(image.numpy().tobytes() in rows for image in batch.inputs)
    shifted = next(make_data("digits").train(device=CPU).epoch(0))
    assert torch.equal(shifted.targets, batch.targets)  # the same order
    assert sum(image.numpy().tobytes() in rows for image in shifted.inputs) < 32
    evaluated = torch.cat([b.inputs for b in make_data("digits").evaluation("train", device=CPU)])
    assert torch.equal(evaluated, known)


def test_a_model_that_starts_from_data_sees_examples_spread_over_what_is_trained_on(
    make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = torch.cat([b.inputs for b in make_data("digits").evaluation("train", device=CPU)])
    assert len(known) > 1024
    found = make_data("digits").sample_inputs()
    assert len(found) == 1024 and torch.equal(found[-1], known[1023 * len(known) // 1024])
    first = make_data("digits", "limit_train=9", "limit_by=first")
    assert torch.equal(first.sample_inputs(), known[:9])
    some = make_data("digits", "limit_train=9")
    assert torch.equal(some.sample_inputs(), known[some._chosen()])
    monkeypatch.setattr("regrow.feeding.loaders.NUM_SAMPLED", 100)
    places = [number * len(known) // 100 for number in range(100)]
    assert torch.equal(make_data("digits").sample_inputs(), known[places])


def test_inputs_become_the_nearest_shades_of_the_images_that_they_were(make_data: Make) -> None:
    data = make_data("digits")  # of 0 to 16
    raw = torch.cat([*data.raw_inputs("val")])  # type: ignore[arg-type]
    shown = [data.as_pixels(b.inputs) for b in data.evaluation("val", device=CPU)]  # type: ignore[arg-type]
    assert (torch.cat(shown).double() - raw.double() * 255 / 16).abs().max() < 0.501


def test_large_sets_are_normalised_by_the_batch_with_the_same_bits(
    make_data: Make, same: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = list(make_data("digits", "augment=false").train(device=CPU).epoch(0))
    monkeypatch.setattr("regrow.feeding.feeds.RESIDENT_BYTES", 0)
    monkeypatch.setattr("regrow.feeding.feeds.CHUNK_BYTES", 1)
    assert same(resident, list(make_data("digits", "augment=false").train(device=CPU).epoch(0)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "data.batch_size=0 must be an integer of at least 1."),
        ("eval_batch_size=0", "data.eval_batch_size=0"),
        ("num_workers=-1", "data.num_workers=-1"),
        ("num_classes=9", "out of range for data.num_classes=9"),
        ("num_outputs=9", "data.num_outputs=9"),
        ("input_shape=[1,9,9]", "Set 'data.input_shape=[1,8,8]'"),
        ("class_names=[a,b]", "data.class_names has 2 names for data.num_classes=10"),
        ("target_kind=ranking", "data.target_kind=ranking must be one of"),
        ("overlap=perhaps", "data.overlap=perhaps must be one of"),
        ("source.val_fraction=0.9", "data.source.val_fraction=0.9"),
    ],
)
def test_a_wrong_setting_is_one_line(make_data: Make, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_data("digits", override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_dropping_every_window_and_a_split_that_is_not_there_are_refused(make_data: Make) -> None:
    data = make_data("digits", "batch_size=5000", "drop_last=true", "source.val_fraction=0")
    with pytest.raises(UserError, match=r"data\.batch_size=5000 is more than the 1438 training"):
        data.train(device=CPU)
    with pytest.raises(
        UserError, match=r"split=val does not exist in this data\. It has train, test"
    ):
        data.evaluation("val", device=CPU)


def test_the_fingerprint_is_over_inputs_targets_and_weights(make_data: Make) -> None:
    data = make_data("synthetic")
    examples = data.source.train
    assert isinstance(examples, Examples)
    weights = torch.ones(len(examples.inputs))
    found = [data.fingerprint()["train"]["sha256"]]
    for changed in (
        {"inputs": -examples.inputs},
        {"targets": examples.targets.flip(0)},
        {"weights": weights},
        {"weights": weights / 2},
    ):
        train = dataclasses.replace(examples, **changed)
        data.source = dataclasses.replace(data.source, train=train)
        found.append(data.fingerprint()["train"]["sha256"])
    assert len({*found}) == 5
