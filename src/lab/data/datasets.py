"""Data sources: functions for `data.source` that return train and named sets as `Splits`.

Your own source is a function that returns `Splits` of `Examples` (tensors, kept on the device) or
of map-style data sets (read by DataLoader workers); `from_datasets` makes one from your own
`torch.utils.data.Dataset`s.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import DataError, UserError, brief
from regrow.feeding.images import image_folder as image_folder
from regrow.feeding.masks import mask_folder as mask_folder
from regrow.feeding.shards import shards as shards
from regrow.feeding.splits import (
    Examples,
    MapStyle,
    Splits,
    check_fractions,
    cut_examples,
    origins_of,
    strata_of,
)
from regrow.feeding.tables import csv as csv
from regrow.feeding.texts import text as text_files
from regrow.randomness import generator
from regrow.record import locks

ATTRIBUTES = {
    "even": (0, 2, 4, 6, 8),
    "prime": (2, 3, 5, 7),
    "above_four": (5, 6, 7, 8, 9),
    "has_a_loop": (0, 6, 8, 9),
}


TEXTS = Path(__file__).parent / "texts"


def digits(
    *, val_fraction: float, test_fraction: float, seed: int, folds: int | None, fold: int
) -> Splits:
    """Return 1,797 handwritten digits of 8x8 pixels in 0 … 16 (UCI, Alpaydin and Kaynak, 1998)."""
    images, classes = _digits()
    return _cut(images, classes, val_fraction, test_fraction, seed, folds, fold, input_max=16.0)


def digits_attributes(
    *, val_fraction: float, test_fraction: float, seed: int, folds: int | None, fold: int
) -> Splits:
    """Return four labels of the same digits and splits: even, prime, above four, has a loop."""
    images, classes = _digits()
    members = [torch.isin(classes, torch.tensor(values)) for values in ATTRIBUTES.values()]
    labels = torch.stack(members, 1).float()
    how = (val_fraction, test_fraction, seed, folds, fold)
    return _cut(images, labels, *how, input_max=16.0, strata=strata_of(classes))


def digit_scenes(
    *,
    size: int,
    most_digits: int,
    num_train: int,
    num_val: int,
    num_test: int,
    val_fraction: float,
    test_fraction: float,
    folds: int | None,
    fold: int,
    seed: int,
) -> Splits:
    """Return grey scenes of one to `most_digits` of those digits on texture, with masks.

    A pixel's class is that of its digit, 0 … 9, or 10 for the background. Faint ink is 255. The
    scenes of a split hold only its own digits. Everything is drawn and computed in integers, so
    every machine gets the same scenes.
    """
    images, classes = _digits()
    cut = _cut(images, classes, val_fraction, test_fraction, seed, folds, fold)

    def drawn(name: str, digits: Any, count: int) -> Examples | None:
        if digits is None or count == 0:
            return None
        random = generator(seed, "scenes", name)

        def draw(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=random)

        texture = torch.zeros(count, size, size, dtype=torch.int64)
        for grain in (1, 2, 4, 8):  # noise of several scales
            side = -(-size // grain)
            noise = draw(24, count, side, side)
            texture += noise.repeat_interleave(grain, 1).repeat_interleave(grain, 2)[
                :, :size, :size
            ]
        masks = torch.full_like(texture, 10)
        for scene, mask in zip(texture, masks, strict=True):
            for _ in range(1 + int(draw(most_digits, 1))):
                number, (top, left) = int(draw(len(digits), 1)), draw(size - 7, 2).tolist()
                ink = digits.inputs[number, 0].long()  # 0 … 16
                place = (slice(top, top + 8), slice(left, left + 8))
                scene[place] = (scene[place] * (16 - ink) + 255 * ink) // 16
                mask[place] = mask[place].where(ink == 0, 255)
                mask[place] = mask[place].where(ink < 6, digits.targets[number])
        return Examples(texture.to(torch.uint8).unsqueeze(1), masks.to(torch.uint8))

    require("data.source.num_train", num_train)
    train = drawn("train", cut.train, num_train)
    assert train is not None
    sets = (train, drawn("val", cut.val, num_val), drawn("test", cut.test, num_test))
    return Splits(*sets, origins=cut.origins)


def breast_cancer(
    *, val_fraction: float, test_fraction: float, seed: int, folds: int | None, fold: int
) -> Splits:
    """Return 569 tumours, 30 measures, malignant (0) or benign (1) (UCI, Wolberg et al., 1995)."""
    rows = _bundled("breast_cancer.csv", delimiter=",", skiprows=1)
    inputs, targets = torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, -1]).float()
    return _cut(inputs, targets, val_fraction, test_fraction, seed, folds, fold)


def diabetes(
    *, val_fraction: float, test_fraction: float, seed: int, folds: int | None, fold: int
) -> Splits:
    """Return 442 patients, 10 measures, disease progression after a year (Efron et al., 2004)."""
    inputs = torch.from_numpy(_bundled("diabetes_data_raw.csv.gz"))
    targets = torch.from_numpy(_bundled("diabetes_target.csv.gz")).float()
    splits = _cut(inputs, targets, val_fraction, test_fraction, seed, folds, fold)
    names = ["age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]  # as in scikit-learn
    return replace(splits, columns=names)


def _digits() -> tuple[Tensor, Tensor]:
    rows = _bundled("digits.csv.gz", delimiter=",", dtype=np.uint8)
    images = torch.from_numpy(rows[:, :-1].reshape(-1, 1, 8, 8).copy())
    return images, torch.from_numpy(rows[:, -1].astype(np.int64))


def _bundled(file: str, **options: Any) -> Any:
    """Return a table that scikit-learn ships, without importing it, which takes over a second."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "This data set comes with scikit-learn. Install it: pip install scikit-learn"
        )
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / file
    if not path.exists():
        raise UserError(f"scikit-learn no longer ships {path}. Install scikit-learn 1.9.")
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return np.loadtxt(lines, **options)


def _cut(
    inputs: Tensor,
    targets: Tensor,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    folds: int | None,
    fold: int,
    *,
    input_max: float = 255.0,
    strata: Any = None,
) -> Splits:
    train, val, test = cut_examples(
        Examples(inputs, targets),
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        folds=folds,
        fold=fold,
        strata=strata,
    )
    origins = origins_of(val_fraction, test_fraction, folds, fold)
    return Splits(train, val, test, input_max=input_max, origins=origins)


def synthetic(
    *,
    input_shape: list[int],
    target_kind: str,
    num_outputs: int,
    num_train: int,
    num_val: int,
    num_test: int,
    noise: float,
    seed: int,
) -> Splits:
    """Return examples of any shape with learnable targets; images, (C, H, W), are uint8.

    Targets come from a random linear map of the inputs, plus `noise` times a normal deviate.
    """
    width = int(np.prod(input_shape))
    teacher = torch.randn(width, num_outputs, generator=generator(seed, "teacher")) / width**0.5

    made: dict[str, Callable[[Tensor], Tensor]] = {
        "multiclass": lambda scores: scores.argmax(1),
        "binary": lambda scores: (scores[:, 0] > 0).float(),
        "multilabel": lambda scores: (scores > 0).float(),
        "regression": lambda scores: scores.squeeze(1),
    }
    if target_kind not in made:
        raise UserError(
            f"data.target_kind={target_kind}: synthetic examples have no targets of this kind. Use "
            f"{', '.join(made)}, or other data."
        )

    def draw(name: str, count: int) -> Examples | None:
        if count == 0:
            return None
        random = generator(seed, name)
        inputs = torch.randn(count, width, generator=random)
        scores = inputs @ teacher + noise * torch.randn(count, num_outputs, generator=random)
        targets = made[target_kind](scores)
        if len(input_shape) == 3:
            inputs = (inputs * 40 + 128).round().clamp(0, 255).to(torch.uint8)
        return Examples(inputs.view(count, *input_shape), targets)

    require("data.source.num_train", num_train)
    train = draw("train", num_train)
    assert train is not None
    return Splits(train, draw("val", num_val), draw("test", num_test))


def text(*, root: str, **options: Any) -> Splits:
    """Return the splits of a text, with the options of `regrow.feeding.texts.text`.

    If `root` does not exist, a text of this name in data/texts/ is used: persuasion.
    """
    shipped = TEXTS / root
    is_named = shipped.is_dir() and not Path(root).exists()
    return text_files(root=str(shipped) if is_named else root, **options)


def mnist(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    """Return 70,000 handwritten digits of 28x28 pixels, with the published 10,000 for testing."""
    return _torchvision("MNIST", "mnist", root, download, val_fraction, seed)


def fashion_mnist(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    """Return 70,000 articles of clothing of 28x28 pixels, with the published 10,000 for testing."""
    return _torchvision("FashionMNIST", "fashion_mnist", root, download, val_fraction, seed)


def cifar10(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    """Return 60,000 colour photographs of 32x32 pixels, with the published 10,000 for testing."""
    return _torchvision("CIFAR10", "cifar10", root, download, val_fraction, seed)


def cifar100(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    """Return photographs like CIFAR-10's, in 100 classes."""
    return _torchvision("CIFAR100", "cifar100", root, download, val_fraction, seed)


def _torchvision(
    kind: str, name: str, root: str, download: bool, val_fraction: float, seed: int
) -> Splits:
    check_fractions(val_fraction, 0.0)
    class_names: list[str] = []

    def read(train: bool) -> Examples:
        found = _find_or_download(kind, name, root, train, download)
        class_names.extend(found.classes[len(class_names) :])
        inputs = torch.as_tensor(found.data)  # (N, H, W) grey or (N, H, W, 3)
        images = inputs.unsqueeze(1) if inputs.ndim == 3 else inputs.permute(0, 3, 1, 2)
        return Examples(images.contiguous(), torch.as_tensor(found.targets, dtype=torch.int64))

    train, val, _ = cut_examples(
        read(train=True), val_fraction=val_fraction, test_fraction=0.0, seed=seed
    )
    origins = origins_of(val_fraction, 0.0, given=["test"])
    return Splits(train, val, read(train=False), class_names=class_names, origins=origins)


def _find_or_download(kind: str, name: str, root: str, train: bool, download: bool) -> Any:
    """Return torchvision's data set from `root`, downloaded if missing and allowed.

    Raises UserError if it is unavailable, DataError if its files are broken.
    """
    import torchvision.datasets

    make = getattr(torchvision.datasets, kind)
    missing = "it is not there"
    try:
        return make(root, train=train, download=False)
    except Exception as error:  # a RuntimeError: files are missing or incomplete
        if not isinstance(error, RuntimeError) or "not found" not in str(error):
            raise DataError(_broken(kind, root, error)) from None
    if download:
        try:
            with _alone(Path(root)), _quiet():
                return make(root, train=train, download=True)
        except (ValueError, EOFError) as error:  # the downloaded files cannot be parsed
            raise DataError(_broken(kind, root, error)) from None
        except Exception as error:
            # URLError, HTTPError, ConnectionError, a RuntimeError over all mirrors, an OSError …
            reason = brief(error)
            found = re.search(r"<urlopen error (.*?)>", reason)
            missing = f"the download failed ({found[1] if found else reason[:120]})"
    way_out = "give the machine network" if download else "set data.source.download=true"
    raise UserError(
        f"data={name}: no {kind} under data.root={root}, and {missing}. Put torchvision's files "
        f"there, {way_out}, or use data=digits, which needs no download."
    )


def _broken(kind: str, root: str, error: Exception) -> str:
    reason = brief(error, 200)
    return (
        f"{kind} under data.root={root} is broken: {reason}. Delete it there to download it again."
    )


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one process at a time download; the others then find the files."""
    is_new = not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root, os.O_RDONLY)  # locking the folder leaves no lock file
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock folders
            locks.wait_for(descriptor, f"the folder {root}, to download into it")
        yield
    except BaseException:
        if is_new:  # torchvision creates folders before it downloads
            for folder, _, _ in os.walk(root, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # noqa: PTH106
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide torchvision's progress and retry lines, and limit the wait for a server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30.0)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def from_datasets(
    *,
    train: MapStyle,
    val: MapStyle | None,
    test: MapStyle | None,
    collate: Callable[[list[Any]], Any] | None,
    sets: Mapping[str, MapStyle] | None = None,
) -> Splits:
    """Return splits of your own map-style data sets, which you name in YAML.

    The rest of `data` stays as it is.

        data:
          source:
            _target_: lab.data.datasets.from_datasets
            train: {_target_: my_project.Spectra, folder: spectra/train, augment: ${data.augment}}
            val: {_target_: my_project.Spectra, folder: spectra/val, augment: false}
            test: null
            sets: null # or further data sets to evaluate, by name: {night: {_target_: …}}
            collate: null # or a function from a list of items to a batch
          normalize: none
          augmentation: null

    An item is `(inputs, targets)`, a mapping with inputs, targets and optionally weights, or
    anything that `collate` can make a batch of. Inputs and targets are a tensor, or a tuple or
    mapping of tensors. torch, numpy and `random` are seeded for each item from (seed, epoch,
    index), so items may draw from them; if a data set keeps its own random state, batches are not
    reproducible. uint8 images (C, H, W) can be normalised with `normalize: imagenet` or a given
    mean and std. A resume compares 16 items of each split with those of the earlier run, or instead
    the text that a method `fingerprint()` returns. A method `set_epoch(epoch)`, for a curriculum,
    is called in each process before the first item of an epoch; evaluations are epoch 0.
    `data.sampling` reads an attribute `targets` or `draw_weights`.
    """
    return Splits(train, val, test, sets or {}, collate=collate)
