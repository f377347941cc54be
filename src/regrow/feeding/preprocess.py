"""Converts raw examples to model inputs, the same way in training, evaluation and prediction."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.config import older
from regrow.config.class_folders import suffixes_of
from regrow.errors import DataError, UserError, brief, listed
from regrow.feeding.batch import dtype_of, each
from regrow.feeding.decoding import (
    DECODERS,
    BrokenImage,
    converted,
    fit,
    load,
    pixels_of,
    to_tensor,
)
from regrow.feeding.files import KINDS_LEFT_OUT, LeftOut
from regrow.feeding.images import find_images
from regrow.feeding.shards import ShardItems
from regrow.feeding.splits import Examples, Reading, Splits, as_tensor
from regrow.feeding.tables import read_table
from regrow.feeding.tokens import Tokens
from regrow.feeding.vocabulary import is_record
from regrow.numerics.precision import widest
from regrow.protocols import Inputs

# Mean and deviation of ImageNet's training images in 0 … 1, which torchvision's pretrained models
# were trained with.
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# Number of examples, spread over a split, for `normalize: train` of image files and for
# `sample_inputs`.
NUM_SAMPLED = 1024
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

log = logging.getLogger("regrow.data")


@dataclass(frozen=True)
class Preprocessing:
    """All that prediction needs, as plain values, stored as JSON in a run's folder.

    input_shape: of an example; None for items of a data set that have no common shape.
    kind: image (uint8 pixels), table (floating features), integer (int64, such as tokens) or tensor
        (passed through unchanged).
    mean, std: per channel of pixels in 0 … 1, or per feature in raw units; None: not normalised.
    input_max: the raw value of white.
    resize: the shorter side before the centre crop, or None to scale directly to the input size.
    target_mean, target_std: revert the standardisation of regression targets and outputs.
    exif_orientation, extensions, leave_out, decoder: how files are read, see `Reading`.
    vocabulary: the record of a text's, see `regrow.feeding.vocabulary`.
    """

    kind: str
    input_shape: list[int] | None
    input_max: float
    mean: list[float] | None
    std: list[float] | None
    resize: int | None
    columns: list[str] | None
    delimiter: str
    target_mean: list[float] | None
    target_std: list[float] | None
    exif_orientation: bool
    extensions: list[str] | None
    leave_out: list[str]
    vocabulary: dict[str, str] | None
    decoder: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Return the values of a run's preprocessing.json, which may lack fields added later.

        Raises TypeError for unknown fields or wrong types.
        """
        how = cls(**{**older.ADDED_PREPROCESSING, **values})
        numbers = (how.mean, how.std, how.target_mean, how.target_std)
        if (
            how.kind not in ("image", "table", "integer", "tensor")
            or not (
                _is_list(how.input_shape, int) or (how.input_shape is None and how.kind == "tensor")
            )
            or not isinstance(how.input_max, int | float)
            or not all(it is None or _is_list(it, int, float) for it in numbers)
            or not (how.columns is None or _is_list(how.columns, str))
            or not isinstance(how.delimiter, str)
            or not isinstance(how.resize, int | None)
            or not isinstance(how.exif_orientation, bool)
            or not (how.extensions is None or _is_list(how.extensions, str))
            or not _is_list(how.leave_out, str)
            or not (how.vocabulary is None or is_record(how.vocabulary))
            or how.decoder not in DECODERS
        ):
            raise TypeError("a field is of a wrong type")
        return how

    @property
    def shape(self) -> list[int]:
        """The shape of an example; empty for a data set of one's own that has no common shape."""
        return self.input_shape or []

    def read(
        self, given: Any, batch_size: int, broken: list[str] | None = None
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and model inputs (B, …) on the CPU, batch by batch, of what is `given`.

        That is a path, or values in memory. A path names an image, a folder of images, an .npy
        array (N, …) in the data set's raw units, or a .csv with the feature columns by name. In
        memory: a Pillow image, a list of images or of their paths, a pandas DataFrame or Series, an
        array, a tensor or a list of numbers. Names are file paths, labels of a DataFrame's index,
        or row numbers from 0. Raises UserError or DataError, which name the file and the row. With
        a list `broken`, images of a folder that cannot be read are left out and listed there.
        """
        normalize = Normalizer(self)
        if isinstance(given, str | Path):
            batches = self._raw(given, batch_size, broken)
        else:
            batches = self._in_memory(given, batch_size)
        for names, raw in batches:
            inputs = normalize(raw)
            assert isinstance(inputs, Tensor)
            yield names, inputs

    def _in_memory(self, given: Any, batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
        what = "inputs"
        given = [given] if hasattr(given, "getexif") else given  # one Pillow image
        labels: list[str] | None = None
        if isinstance(given, list | tuple) and any(_is_image(each) for each in given):
            self._must_be("image", what)
            for start in range(0, len(given), batch_size):
                chosen = given[start : start + batch_size]
                named = zip(itertools.count(start), chosen, strict=False)
                names = [str(each if isinstance(each, str | Path) else n) for n, each in named]
                yield names, torch.stack([self._file(each) for each in chosen])
            return
        if hasattr(given, "to_frame") and hasattr(given, "index"):  # a row of a DataFrame
            given = given.to_frame().T
        if hasattr(given, "columns") and hasattr(given, "to_numpy"):  # pandas need not be installed
            self._must_be("table", what)
            labels = [str(label) for label in given.index]
            given = _of_frame(given, self.columns)
        values = as_tensor(given, what)
        array = self._batched(values.numpy(), what)
        yield from self._parts(array, what, batch_size, labels)

    def _raw(
        self, given: str | Path, batch_size: int, broken: list[str] | None
    ) -> Iterator[tuple[list[str], Tensor]]:
        path = Path(given)
        suffix = path.suffix.lower()
        if not path.exists():
            raise UserError(f"input={path} does not exist. Give an image, a folder, .npy or .csv.")
        if path.is_dir() or suffix in suffixes_of(None):
            self._must_be("image", path)
            files = self._files(path) if path.is_dir() else [path]
            for start in range(0, len(files), batch_size):
                some = [*self._readable(files[start : start + batch_size], broken)]
                if some:
                    names, images = zip(*some, strict=True)
                    yield [*names], torch.stack(images)
            if broken and len(broken) == len(files):
                raise DataError(f"input={path}: none of its {len(files):,} images can be read.")
        elif suffix == ".npy":
            yield from self._parts(self._array(path), str(path), batch_size)
        elif suffix in (".csv", ".tsv", ".txt"):
            self._must_be("table", path)
            columns = self.columns
            if columns is None:
                raise UserError(
                    f"input={path}: this run's features have no names. Give an .npy array (N, "
                    f"{self.shape[0]}) instead."
                )
            table = read_table(path, self.delimiter, columns, [], is_fixed=True)
            yield from self._parts(table.features, str(path), batch_size)
        else:
            raise UserError(
                f"input={path}: not a known kind. Use an image, a folder of images, .npy or .csv."
            )

    def _must_be(self, kind: str, given: str | Path) -> None:
        if self.kind != kind:
            takes = {"image": "images", "table": "rows of numbers (.csv, .npy)"}
            what = f"input={given}" if isinstance(given, Path) else given
            raise UserError(
                f"{what}: this run's model takes {takes.get(self.kind, 'arrays (.npy)')} of "
                f"shape {self.input_shape}."
            )

    def _files(self, folder: Path) -> list[Path]:
        reading = Reading(self.extensions, tuple(self.leave_out), self.exif_orientation)
        left_out = LeftOut(folder)
        files = find_images(folder, reading, left_out)
        if not files:
            raise UserError(f"input={folder} holds no images.{left_out.sentence()}")
        if left_out.counts:
            log.warning("%s", left_out)
        return files

    def _readable(
        self, files: list[Path], broken: list[str] | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield names and pixels. Appends files that cannot be read to `broken`, if it is there."""
        for file in files:
            try:
                yield str(file), self._file(file)
            except BrokenImage:
                if broken is None:
                    raise
                broken.append(str(file))

    def _file(self, given: Any) -> Tensor:
        """Return an image's pixels, (C, H, W), from its path or from a Pillow image."""
        channels, *size = self.shape
        what = f"input={given}" if isinstance(given, str | Path) else "inputs"
        if channels not in (1, 3):
            raise UserError(
                f"{what}: this run's model takes images of {channels} channels, and an image is "
                f"read as grey or RGB. Give an array (N, {channels}, H, W), in a file .npy."
            )
        if not _is_image(given):
            raise UserError(f"{what}: a {type(given).__name__} among images. Give images alone.")
        if isinstance(given, str | Path):
            image = load(
                given, channels, exif_orientation=self.exif_orientation, decoder=self.decoder
            )
        else:
            image = self._decoded(
                converted(given, channels, exif_orientation=self.exif_orientation)
            )
        pixels = to_tensor(fit(image, size, self.resize))
        return pixels if self.input_max == 255 else pixels.float() * (self.input_max / 255)

    def _array(self, path: Path) -> npt.NDArray[Any]:
        """Return the file as numbers (N, …); a single example becomes N = 1."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = brief(error, 200).partition(". ")[0].rstrip(".")
            if "pickle" in reason:  # numpy's words for any file without an array's first bytes
                reason = "it does not begin as an array"
            raise DataError(f"{path} is not a readable array: {reason}.") from None
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif":
            raise DataError(f"{path} holds no plain numbers. Save one numeric array with np.save.")
        return self._batched(array, str(path))

    def _batched(self, array: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
        """Return (N, …) from that, or from a single example."""
        shape = tuple(self.shape)
        single = [shape, (*shape[1:], shape[0]) if self.kind == "image" else shape]
        if self.kind == "image" and shape[0] == 1:
            single.append(shape[1:])
        array = array[None] if array.shape in single else array
        if array.ndim == 0 or len(array) == 0:
            raise DataError(f"{what} holds no examples: its shape is {array.shape}.")
        return array

    def _parts(
        self, array: npt.NDArray[Any], what: str, batch_size: int, labels: list[str] | None = None
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names and rows, batch by batch; the names are the `labels`, or numbers from 0."""
        for start in range(0, len(array), batch_size):
            part = self._part(np.asarray(array[start : start + batch_size]), what, start)
            rows = range(start, start + len(part))
            yield [labels[row] if labels else str(row) for row in rows], part

    def _part(self, array: npt.NDArray[Any], what: str, start: int) -> Tensor:
        shape = tuple(self.shape)
        # torch supports neither foreign byte orders nor most unsigned and long types.
        wide = {"u": np.int64, "f": np.float64, "i": np.int64, "b": np.bool_}[array.dtype.kind]
        is_known = array.dtype in (np.uint8, np.float16, np.float32) and array.dtype.isnative
        kind = array.dtype if is_known else np.dtype(wide)
        tensor = torch.from_numpy(np.array(array, dtype=kind, order="C"))
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            row = int((~tensor.isfinite()).nonzero()[0][0])
            raise DataError(f"{what}, row {start + row}: a value is NaN or infinite.")
        if self.kind == "integer" and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            raise DataError(
                f"{what}: values of type {dtype_of(tensor)}, this run's "
                "model takes integers. Save an array of integers."
            )
        if self.input_shape is None:
            return tensor
        if self.kind != "image":
            if tuple(tensor.shape[1:]) != shape:
                raise DataError(
                    f"{what}: rows of shape {list(tensor.shape[1:])}, this run's model takes "
                    f"{list(shape)}."
                )
            return tensor
        images = self._images(tensor, what)
        flat = images.flatten(1).float()
        low, high = flat.amin(1), flat.amax(1)
        wrong = ((low < 0) | (high > self.input_max)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{what}, row {start + row}: values {low[row]:g} … {high[row]:g}, this run's "
                f"images are in 0 … {self.input_max:g}."
            )
        is_share = tensor.is_floating_point() or tensor.dtype == torch.bool
        if is_share and 0 < float(high.max()) <= 1 < self.input_max:
            raise DataError(
                f"{what}: values reach only {high.max():g}, this run's images are in "
                f"0 … {self.input_max:g}. Multiply by {self.input_max:g}."
            )
        return images

    def _images(self, tensor: Tensor, what: str) -> Tensor:
        """Return (N, C, H, W) images from that, (N, H, W, C), (N, H, W) or (N, C·H·W).

        uint8 images of other sizes are fitted. Raises DataError for other shapes.
        """
        channels, *size = self.shape
        if tensor.ndim == 2 and tensor.shape[1] == np.prod(self.shape):
            return tensor.view(-1, channels, *size)
        if tensor.ndim == 3 and channels == 1:
            tensor = tensor.unsqueeze(1)
        elif tensor.ndim == 4 and tensor.shape[3] == channels and tensor.shape[1] != channels:
            tensor = tensor.permute(0, 3, 1, 2)
        if tensor.ndim == 4 and tensor.shape[1] == channels:
            if list(tensor.shape[2:]) == size and self.resize is None:
                return tensor.contiguous()
            if tensor.dtype == torch.uint8 and self.input_max == 255 and channels in (1, 3):
                return torch.stack([self._fitted(image) for image in tensor])
        raise DataError(
            f"{what}: an array of shape (N, {', '.join(map(str, tensor.shape[1:]))}), this run's "
            f"model takes images (N, {channels}, {size[0]}, {size[1]})."
        )

    def _fitted(self, image: Tensor) -> Tensor:
        from PIL import Image

        pixels = image.permute(1, 2, 0).numpy() if image.shape[0] == 3 else image[0].numpy()
        fitted = fit(self._decoded(Image.fromarray(pixels)), self.shape[1:], self.resize)
        return to_tensor(fitted)

    def _decoded(self, image: Any) -> Any:
        """Return a Pillow image as the decoder would give it."""
        return image if self.decoder == "pillow" else pixels_of(image)


def _is_image(value: Any) -> bool:
    return isinstance(value, str | Path) or hasattr(value, "getexif")


def _of_frame(frame: Any, columns: list[str] | None) -> npt.NDArray[Any]:
    """Return a DataFrame's feature columns, (N, F). Raises DataError for a column without numbers.

    Without recorded `columns`, all of its columns are features.
    """
    there = [str(name) for name in frame.columns]
    names = there if columns is None else columns
    if missing := [name for name in names if name not in there]:
        raise DataError(f"inputs: no column {missing[0]!r}. There are {listed(there)}.")
    found = []
    for name in names:
        column = frame.iloc[:, there.index(name)]
        try:
            found.append(column.to_numpy(dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise DataError(f"inputs, column {name!r}: {brief(error, 100)}.") from None
    return np.stack(found, 1) if found else np.empty((len(frame), 0))


def _is_list(value: Any, *types: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, types) for item in value)


class Normalizer:
    """Converts raw inputs to float32 model inputs, on the device of the inputs."""

    def __init__(self, how: Preprocessing) -> None:
        self.kind = how.kind
        self.mean = self.std = None
        if how.mean is not None and how.std is not None:
            self.mean = torch.tensor(how.mean, dtype=torch.float64)
            self.std = torch.tensor(how.std, dtype=torch.float64)
        if how.kind == "image" or (how.kind == "tensor" and self.mean is not None):
            one = torch.ones(how.shape[0], dtype=torch.float64)
            mean = one * 0 if self.mean is None else self.mean
            std = one if self.std is None else self.std
            self.scale = (1 / (how.input_max * std)).float().view(-1, 1, 1)
            self.shift = (-mean / std).float().view(-1, 1, 1)
        elif self.mean is not None and self.std is not None and len(how.shape) > 1:
            per_channel = (-1, *[1] * (len(how.shape) - 1))
            self.mean, self.std = self.mean.view(per_channel), self.std.view(per_channel)

    def __call__(self, inputs: Inputs) -> Inputs:
        """Return images (B, C, H, W) or features (B, …) as float32, normalised."""
        if self.kind == "image":
            return each(inputs, self.image)
        if self.kind == "table":
            return each(inputs, self.features)
        if self.kind == "integer":
            return each(inputs, Tensor.long)
        return each(inputs, single if self.mean is None else self.pixels)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Return a user's data set's images, normalised. Raises UserError unless they are uint8."""
        if inputs.dtype != torch.uint8:
            raise UserError(
                "data.normalize is for uint8 images, and this data set gives "
                f"{dtype_of(inputs)}. Use none, and normalise in it."
            )
        return self.image(inputs)

    def image(self, pixels: Tensor) -> Tensor:
        if self.scale.device != pixels.device:
            self.scale, self.shift = self.scale.to(pixels.device), self.shift.to(pixels.device)
        return pixels.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift)

    def features(self, rows: Tensor) -> Tensor:
        if self.mean is None or self.std is None:
            return rows.float()
        if self.mean.device != rows.device:
            self.mean, self.std = self.mean.to(rows.device), self.std.to(rows.device)
        return ((rows.double() - self.mean) / self.std).float()


def single(values: Tensor) -> Tensor:
    """Return float64 as float32, which models compute in; other dtypes unchanged."""
    return values.float() if values.dtype == torch.float64 else values


def standardised(
    values: Tensor,
    mean: list[float] | None,
    std: list[float] | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return targets (N,) or (N, K) as float32, standardised in float64.

    `dtype` is that of the statistics: float32 for older records, which rounded them.
    """
    if mean is None or std is None:
        return single(values)
    columns = values.double().reshape(len(values), -1)
    shift, scale = (torch.tensor(it, dtype=dtype).to(columns) for it in (mean, std))
    rows = (columns - shift) / scale
    return rows.float().view_as(values)


def in_units(values: Tensor, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """Return standardised targets, or outputs, in the targets' own units, as float64.

    float32 has seven digits: too few for the minute of a Unix time.
    """
    wide = widest(values)
    if mean is None or std is None:
        return wide
    return wide * wide.new_tensor(std) + wide.new_tensor(mean)


def rounding(values: Tensor) -> float:
    """Return the share of the spread that float32 rounds away, in float64 `values` (N, …)."""
    if values.dtype != torch.float64 or len(values) < 2:
        return 0.0
    columns = values.reshape(len(values), -1)
    lost = (columns - columns.float().double()).abs().amax(0)
    spread = columns.std(0)
    return float(torch.where(spread > 0, lost / spread.clamp(min=1e-300), 0.0).max())


def preprocessing(
    splits: Splits,
    *,
    input_shape: list[int] | None,
    normalize: Any,
    normalize_targets: bool,
    integers: str,
) -> Preprocessing:
    """Return the preprocessing, with statistics of the training split alone, or the given ones."""
    train = splits.train
    kind = _kind(splits, normalize, integers)
    if input_shape is None and normalize != "none":
        raise UserError(
            f"data.input_shape=null: data.normalize={normalize} needs the number of channels or "
            "features. Set data.normalize=none, or the shape."
        )
    mean, std = _statistics(splits, kind, input_shape or [], normalize)
    target_mean = target_std = None
    if normalize_targets:
        if not isinstance(train, Examples):
            raise UserError(
                "data.normalize_targets=true needs targets in memory. Set it to false, and scale "
                "the targets in the data set."
            )
        columns = train.targets.double().reshape(len(train), -1)
        target_mean, target_std = columns.mean(0).tolist(), _deviations(columns)
    return Preprocessing(
        kind=kind,
        input_shape=input_shape,
        input_max=splits.input_max,
        mean=mean,
        std=std,
        resize=splits.resize,
        columns=splits.columns,
        delimiter=splits.delimiter,
        target_mean=target_mean,
        target_std=target_std,
        exif_orientation=splits.reading.exif_orientation,
        extensions=splits.reading.extensions,
        leave_out=[it for it in splits.reading.leave_out if it in KINDS_LEFT_OUT],  # no paths
        vocabulary=None if splits.vocabulary is None else dict(splits.vocabulary),
        decoder=splits.reading.decoder,
    )


def _kind(splits: Splits, normalize: Any, integers: str) -> str:
    """Return the kind of the inputs, see `Preprocessing`.

    In memory, uint8 (N, C, H, W) is an image; other integers that are not normalised are integer,
    or features as `integers` says. A user's data set is not touched.
    """
    if isinstance(splits.train, Examples):
        inputs = splits.train.inputs
        # Older records have float32, and took all of one channel for images.
        of_older = integers == "float32" and inputs.ndim > 2 and inputs.shape[1] == 1
        if inputs.dtype == torch.uint8 and (inputs.ndim == 4 or of_older):
            return "image"
        if inputs.dtype in INTEGERS and normalize == "none" and integers == "int64":
            return "integer"
        return "table"
    if isinstance(splits.train, Tokens):
        return "integer"
    return "image" if splits.reads_images else "tensor"


def _statistics(
    splits: Splits, kind: str, input_shape: list[int], normalize: Any
) -> tuple[list[float] | None, list[float] | None]:
    if normalize == "none":
        return None, None
    number = input_shape[0]
    if isinstance(normalize, dict):
        mean, std = list(normalize["mean"]), list(normalize["std"])
    elif normalize == "imagenet":
        mean, std = IMAGENET if number == 3 else ([0.449], [0.226])  # one channel: their mean
    elif kind == "tensor":
        raise UserError(
            "data.normalize=train cannot look into a data set of your own. Use none, or give "
            "{mean: […], std: […]}."
        )
    else:
        return _train_statistics(splits, kind)
    if len(mean) != number or len(std) != number or not all(value > 0 for value in std):
        raise UserError(
            f"data.normalize={normalize} does not fit data.input_shape={input_shape}: it takes "
            f"{number} means and {number} positive deviations."
        )
    return mean, std


def _train_statistics(splits: Splits, kind: str) -> tuple[list[float], list[float]]:
    train = splits.train
    if kind == "image":
        if isinstance(train, Examples):
            images = [train.inputs]
        else:
            # The sample of shards comes from few blocks, which are not held afterwards.
            of_shards = train if isinstance(train, ShardItems) else None
            step = max(1, -(-len(train) // NUM_SAMPLED))
            chosen = of_shards.sample(NUM_SAMPLED) if of_shards else range(0, len(train), step)
            images = [train[index][0].unsqueeze(0) for index in chosen]
            if of_shards:
                of_shards.release()
        counts = sum(_histogram(image) for image in images).double()  # type: ignore[union-attr]
        levels = torch.arange(256, dtype=torch.float64) / splits.input_max
        share = counts / counts.sum(1, keepdim=True)
        mean = (share * levels).sum(1)
        return mean.tolist(), _nonzero(((share * levels**2).sum(1) - mean**2).clamp(min=0).sqrt())
    assert isinstance(train, Examples)
    values = train.inputs.double()
    if values.ndim > 2:  # per channel
        values = values.transpose(0, 1).flatten(1).T
    mean = values.mean(0)
    if not bool(mean.isfinite().all()) and len(wrong := (~train.inputs.isfinite()).nonzero()):
        example, *place = wrong[0].tolist()
        raise DataError(
            f"split train, example {example}: the input at {place} is NaN or infinite, and with "
            "data.normalize=train all examples would be. Fill it in, or leave the example out."
        )
    return mean.tolist(), _deviations(values)


def _histogram(images: Tensor) -> Tensor:
    """Return (C, 256) counts of the pixel values: exact, in one pass over bytes."""
    channels = images.transpose(0, 1).flatten(1)
    return torch.stack([torch.bincount(channel, minlength=256) for channel in channels])


def _deviations(columns: Tensor) -> list[float]:
    """Return the deviation of each column of (N, F); 0 for a constant, not a rounded 1e-17."""
    is_constant = columns.amin(0) == columns.amax(0)
    return _nonzero(columns.std(0, correction=0).masked_fill(is_constant, 0.0))


def _nonzero(std: Tensor) -> list[float]:
    """Replace zeros by one, so that a constant feature is shifted and not scaled."""
    return torch.where(std > 0, std, torch.ones_like(std)).tolist()
