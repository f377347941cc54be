"""`Data`, which every `conf/data/*.yaml` creates, and its batches for the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.errors import DataError, UserError, did_you_mean
from regrow.feeding import identity
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.broken_images import counted
from regrow.feeding.data_checks import OF_CLASSES, DataChecks, order_of
from regrow.feeding.decoding import BrokenImage
from regrow.feeding.feeds import FileFeed, MemoryFeed
from regrow.feeding.images import ImageFiles
from regrow.feeding.items import input_names
from regrow.feeding.mixing import Mix, pairs_of, softened
from regrow.feeding.preprocess import (
    NUM_SAMPLED,
    Normalizer,
    Preprocessing,
    in_units,
    preprocessing,
    standardised,
)
from regrow.feeding.resized import keep_resized
from regrow.feeding.sampling import (
    Windows,
    balancing,
    per_example,
    permutation,
    repeats_of,
    sample,
)
from regrow.feeding.shards import ShardItems
from regrow.feeding.splits import Examples, Splits, check_overlap, text_names
from regrow.feeding.streams import with_stream
from regrow.feeding.tokens import TokenFeed, Tokens
from regrow.feeding.transforms import Epochs, FromMemory, Transformed
from regrow.phases import timed
from regrow.protocols import Inputs
from regrow.randomness import generator
from regrow.record.pictures import by_range

log = logging.getLogger("regrow.data")

Feed = MemoryFeed | FileFeed | TokenFeed


class TrainLoader:
    """One rank's share of the training windows; an epoch can start at any window at no cost.

    With draw weights (N,) an epoch is a sample with replacement, else each example once.
    """

    def __init__(
        self,
        feed: Feed,
        windows: Windows,
        seed: int,
        rows: int,
        *,
        draw_weights: Tensor | None = None,
        mixing: Mix | None = None,
        num_classes: int | None = None,
        own_order: Callable[[Windows, int, int], Any] | None = None,
        chosen: Tensor | None = None,
    ) -> None:
        """`own_order`: (windows, seed, epoch) to the order of an epoch, if the data has its own.

        `chosen` (N,): the numbers of the examples to train on in the split; None: its first N.
        """
        self._feed, self._windows, self._seed = feed, windows, seed
        self._draw_weights, self._mixing, self._num_classes = draw_weights, mixing, num_classes
        self._own_order, self._chosen = own_order, chosen
        self.num_examples = rows
        self.steps_per_epoch = len(windows)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[LoadedBatch]:
        """Return the batches of the epoch's windows `start …`; nothing before `start` is read."""
        repeats = pairs = None
        if self._own_order is not None:
            order = self._own_order(self._windows, self._seed, epoch)
        elif self._draw_weights is None:
            order = permutation(self._seed, epoch, self.num_examples)
        else:
            order = sample(self._seed, epoch, self._draw_weights)
            repeats = repeats_of(order)
        if self._mixing is not None:
            size = self._windows.size
            whole = order
            if self._own_order is not None:
                starts = range(0, self.num_examples, size)
                whole = torch.cat([order[start : start + size] for start in starts])
            pairs = pairs_of(
                *(self._mixing, whole, repeats, size),
                seed=self._seed,
                epoch=epoch,
                num_classes=self._num_classes,
            )
        if self._chosen is not None:
            order = self._chosen[order]
        where = (self._windows, order, epoch, start)
        if isinstance(self._feed, TokenFeed):
            return timed("data", self._feed.read(*where))
        return timed("data", self._feed.read(*where, repeats=repeats, pairs=pairs))


class EvalLoader:
    """One rank's share of a split in its own order: each example once, without padding or dropping.

    All ranks see equally many batches, so that their forward passes match. A rank without an
    example in a batch gets an example of weight zero, with `num_local` 0.
    """

    def __init__(self, feed: Feed, windows: Windows, order: Any = None) -> None:
        """`order`: of data that reads ahead in the order of its files."""
        self._feed, self._windows = feed, windows
        self.num_examples = windows.num_examples
        self._order = torch.arange(self.num_examples) if order is None else order

    def __len__(self) -> int:
        return len(self._windows)

    def start_of(self, number: int) -> int:
        """Return the place in the split of the first of this rank's examples in a batch."""
        return self._windows.share(number).start

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self._feed.read(self._windows, self._order, 0, 0)


class Data:
    """The splits, checked, and how their examples become batches.

    The sets that `final` names are measured once, at the end; the others during training.

    `batch_size` counts an optimizer step's examples over all processes, `eval_batch_size` those of
    a forward pass in one process. Targets: (B,) int64 classes; (B,) float32 0 or 1 for binary; (B,
    L) float32 for multilabel; (B, T) int64 for language, where -100 does not count; (B,) or (B, K)
    float32 for regression, standardised by the training split if `normalize_targets`: `target_mean`
    and `target_std` revert it. A `target_kind` of None leaves the targets to the task. An
    `input_shape` of None is taken from data in memory; your own data set needs none. Integer inputs
    in memory become `integers`, int64 or float32, unless they are normalised. Windows of a text
    begin elsewhere in each epoch if `augment`.

    `sampling` draws an epoch's examples with replacement: see `draw_weights`. `transforms`, after
    `augmentation`, take and return a uint8 image (C, H, W). `mixing` makes soft targets of
    multiclass, binary, multilabel and regression ones. All but `sampling` need `augment`.
    """

    def __init__(
        self,
        *,
        source: Splits,
        seed: int,
        root: str,
        target_kind: str | None,
        num_classes: int | None,
        ignore_index: int | None,
        num_outputs: int | None,
        input_shape: list[int] | None,
        class_names: list[str] | None,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        pin_memory: bool,
        persistent_workers: bool,
        drop_last: bool,
        limit_train: int | None,
        limit_by: str,
        sampling: str | dict[str, str] | None,
        cache: str | None,
        cache_root: str | None,
        cache_max_gb: float,
        augment: bool,
        augmentation: Any,
        transforms: list[Any],
        mixing: Mix | None,
        normalize: str | dict[str, list[float]],
        normalize_targets: bool,
        target_dtype: str,
        integers: str,
        changed: str,
        identity: str,
        overlap: str,
        final_sets: list[str],
        folds: int | None,
        fold: int,
    ) -> None:
        if not isinstance(source, Splits):
            raise UserError(
                f"data.source gives a {type(source).__name__}. Let it return "
                "regrow.feeding.splits.Splits(train, val, test, sets)."
            )
        source = with_stream(source, limit_train, num_workers)
        self.source, self.seed, self.root = source, seed, root
        self.target_kind, self.num_classes, self.num_outputs = target_kind, num_classes, num_outputs
        self.ignore_index, self.target_dtype = ignore_index, target_dtype
        if input_shape is None and isinstance(source.train, Examples):
            input_shape = list(source.train.inputs.shape[1:])
        self.input_shape = None if input_shape is None else list(input_shape)
        self.class_names = text_names(
            class_names if class_names is not None else source.class_names
        )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.persistent_workers, self.drop_last = persistent_workers, drop_last
        self.limit_train, self.limit_by = limit_train, limit_by
        self.augmentation = augmentation if augment else None
        self.transforms = list(transforms) if augment else []
        self.sampling, self.mixing = sampling, mixing if augment else None
        stores = hasattr(augmentation, "store") or not callable(augmentation)
        if self.augmentation is not None and isinstance(source.train, Examples) and not stores:
            # It takes single images, as the transforms do.
            self.augmentation, self.transforms = None, [augmentation, *self.transforms]
        self.overlap, self.changed = overlap, changed  # the latter is for changed_data.py
        self.identity = identity
        self.augment = augment
        self.folds, self.fold = folds, fold  # the source has cut them
        self._feeds: dict[tuple[str, bool, torch.device], Feed] = {}
        self._epochs = Epochs()
        self._standardises = normalize == "train"
        self._check(augmentation, normalize_targets)
        self.final = self._final(final_sets)
        self.num_overlapping = check_overlap(source, overlap, self.final)
        self.source = dataclasses.replace(source, known_keys={})  # frees one key per file
        try:
            if cache is not None:
                self.source = self._cached(cache_root, cache_max_gb)
            source = self.source
            self.preprocessing: Preprocessing = preprocessing(
                source,
                input_shape=self.input_shape,
                normalize=normalize,
                normalize_targets=normalize_targets,
                integers=integers,
            )
        except BrokenImage as error:
            raise counted(source, error) from None
        if self.mixing is not None:
            self._checks().check_mixing(self.mixing, self.preprocessing)
        self._checks().refuse_overflow(self.preprocessing)
        self._checks().warn_of_rounding(self.preprocessing)
        self.target_mean = self.preprocessing.target_mean
        self.target_std = self.preprocessing.target_std

    def check_cache(self) -> None:
        """Raise UserError if `data.cache=resized` does not fit the data. Resizes nothing."""
        self._checks().check_cache(self.augmentation)

    def _cached(self, cache_root: str | None, max_gb: float) -> Splits:
        """Return the source with its images resized once. Raises UserError, DataError."""
        self.check_cache()
        source, splits = self.source, dict(self.source.items())
        images = [split for split in splits.values() if isinstance(split, ImageFiles)]
        kept = keep_resized(images, cache_root, max_gb)
        found: dict[str, Any] = dict(zip(splits, kept, strict=True))
        sets = {name: found.pop(name) for name in source.sets}
        return dataclasses.replace(source, **found, sets=sets)

    @property
    def notes(self) -> list[str]:
        """Lines about the source to log at the start of a run."""
        return [*self.source.notes, *self._checks().without_a_class(self.class_names)]

    @property
    def num_examples(self) -> dict[str, int]:
        """The number of examples in each existing split."""
        return {name: len(split) for name, split in self.source.items()}

    @property
    def measured_in_training(self) -> list[str]:
        """The names of the sets that are measured during training."""
        return [name for name in self.num_examples if name not in ("train", *self.final)]

    def train(self, *, device: torch.device, rank: int = 0, world_size: int = 1) -> TrainLoader:
        count = self._num_trained_on()
        windows = Windows(count, self.batch_size, self.drop_last, rank, world_size)
        if len(windows) == 0:
            raise UserError(
                f"data.batch_size={self.batch_size} is more than the {count} training examples, "
                f"and data.drop_last=true drops them all. Lower one or set the other to false."
            )
        self._checks().warn_of_borders(self.augmentation)
        if self._standardises:
            self._checks().warn_of_mixed_features(self.preprocessing)
        rotates = self.augment and isinstance(self.source.train, Tokens)
        changed = rotates or self.augmentation is not None or bool(self.transforms)
        feed = self._feed("train", changed, device)
        draw_weights = None if self.sampling is None else self.draw_weights()
        return TrainLoader(
            *(feed, windows, self.seed, count),
            draw_weights=draw_weights,
            mixing=self.mixing,
            num_classes=self._softened_classes,
            own_order=order_of(self.source.train),
            chosen=self._chosen(),
        )

    def of_training_examples(self, name: str) -> Tensor | None:
        """Return the attribute `name` of the examples that are trained on, (N,); None without one.

        The attribute holds one number per example, such as targets; else DataError.
        """
        found, chosen = per_example(self.source.train, name), self._chosen()
        if found is None:
            return None
        return found[: self._num_trained_on()] if chosen is None else found[chosen]

    @property
    def _softened_classes(self) -> int | None:
        """The number of classes if targets are indices, which mixing makes probabilities of."""
        return self.num_classes if self.target_kind == "multiclass" else None

    def as_trained(self, batch: LoadedBatch) -> LoadedBatch:
        """Return a batch with targets as training has them: soft if it mixes examples."""
        if self.mixing is None or not isinstance(batch.targets, Tensor):
            return batch
        soft = softened(batch.targets, self._softened_classes)
        return dataclasses.replace(batch, targets=soft)

    def draw_weights(self) -> Tensor:
        """Return what `sampling` weighs the draws of the training examples with, (N,) float64.

        For balanced, every class of the training examples is equally likely; an ignored target is
        never drawn. For {column: name}, the weights are the source's: a column of a table. Raises
        UserError for data that gives neither, or if all weights are zero.
        """
        train, asked = self.source.train, self.sampling
        if isinstance(asked, dict):
            asked = f"{{column: {asked['column']}}}"
        if asked == "balanced":
            classes = self.of_training_examples("targets")
            if classes is None or (self.target_kind != "binary" and classes.is_floating_point()):
                raise UserError(
                    f"data.sampling=balanced: {type(train).__name__} does not give its classes. "
                    "Give the data set an attribute targets: a list of the class index of each "
                    "example."
                )
            ignored = -100 if self.ignore_index is None else self.ignore_index
            weights = balancing(classes, (classes != ignored) & (classes != -100))
            missing = "every target is ignored"
        else:
            found = self.of_training_examples("draw_weights")
            if found is None:
                raise UserError(
                    f"data.sampling={asked}: this data has no column of draw weights. Use "
                    "it with data=csv, or give your data set an attribute draw_weights: a list of "
                    "a number for each example."
                )
            weights = found.double()
            missing = "they are all zero for the training examples"
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise DataError(
                f"data.sampling={asked}: a draw weight is negative, NaN or infinite. Give "
                "numbers of zero or more."
            )
        if not bool(weights.any()):
            raise DataError(
                f"data.sampling={asked}: no example can be drawn, {missing}. Give one a "
                "weight above zero, or set data.sampling=null."
            )
        return weights

    def evaluation(
        self, split: str, *, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> EvalLoader:
        """Return the unaugmented batches of a split. Raises UserError if it does not exist."""
        found = dict(self.source.items()).get(split)
        if found is None:
            raise UserError(
                f"split={split} does not exist in this data. It has {', '.join(self.num_examples)}."
                + did_you_mean(split, self.num_examples)
            )
        size = self.eval_batch_size * world_size
        windows = Windows(len(found), size, False, rank, world_size)
        order = found.file_order(windows) if hasattr(found, "file_order") else None
        return EvalLoader(self._feed(split, False, device), windows, order)

    def ids(self, name: str) -> Sequence[int | str]:
        """Return what names each example of a split in its source: a line, a file or a number."""
        split = dict(self.source.items())[name]
        found: Sequence[int | str] | None = getattr(split, "ids", None)
        return range(len(split)) if found is None else found

    def sample_inputs(self) -> Tensor:
        """Return about 1,024 training inputs, or all, spread over the split, and normalised.

        (N, …) on the CPU, not augmented, the same in every process. Raises UserError for inputs of
        several tensors.
        """
        count = self._num_trained_on()
        num_chosen = min(count, NUM_SAMPLED)
        chosen = torch.arange(num_chosen) * count // num_chosen
        train, limited = self.source.train, self._chosen()
        if limited is not None:
            chosen = limited[chosen]
        if isinstance(train, ShardItems):  # from few blocks
            chosen = torch.tensor(train.sample(NUM_SAMPLED, count))
        if isinstance(train, Examples):
            found = [Normalizer(self.preprocessing)(train.inputs[chosen])]
        elif isinstance(train, Tokens):  # whose feed reads no further than as many windows reach
            found = [train.windows(train.tensor(), chosen)[0]]
        else:
            feed = self._new_feed("train", False, torch.device("cpu"))
            assert isinstance(feed, FileFeed)
            windows = Windows(len(chosen), self.eval_batch_size, False, 0, 1)
            with contextlib.closing(feed):
                found = [batch.inputs for batch in feed.read(windows, chosen, 0, 0)]
        tensors = [inputs for inputs in found if isinstance(inputs, Tensor)]
        if len(tensors) < len(found):
            raise UserError(
                "model: this one starts from training inputs of one tensor, and an example of this "
                "data has several. Use another model."
            )
        return torch.cat(tensors)

    def raw_inputs(self, split: str) -> Iterator[Inputs]:
        """Yield a split's inputs in order, as they are before the normalisation, on the CPU."""
        found, size = dict(self.source.items())[split], self.eval_batch_size
        if isinstance(found, Examples):
            yield from torch.split(found.inputs, size)
            return
        cpu = torch.device("cpu")
        if isinstance(found, Tokens):  # which are not normalised
            yield from (batch.inputs for batch in self.evaluation(split, device=cpu))
            return
        feed = self._new_feed(split, False, cpu)
        assert isinstance(feed, FileFeed)
        feed.normalize = lambda inputs: inputs
        windows = Windows(len(found), size, False, 0, 1)
        with contextlib.closing(feed):
            for batch in feed.read(windows, torch.arange(len(found)), 0, 0):
                yield batch.inputs

    def input_names(self) -> list[str] | None:
        """Return the inputs' names, or positions from 0, if an example has several; else None."""
        train = self.source.train
        if isinstance(train, Examples | Tokens) or self.source.reads_images:
            return None
        return input_names(train, self.source.collate, self.seed)

    def _num_trained_on(self) -> int:
        count = len(self.source.train)
        return count if self.limit_train is None else min(count, self.limit_train)

    def _chosen(self) -> Tensor | None:
        """Return the numbers of the `limit_train` examples, (N,), rising; None: the first ones.

        They are the first N of one random order, the same for every seed: a folder is sorted by
        class, and a larger N adds to the examples of a smaller one.
        """
        train, count = self.source.train, self._num_trained_on()
        in_order = isinstance(train, Tokens) or order_of(train) is not None
        if count == len(train) or self.limit_by == "first" or in_order:
            return None
        return torch.randperm(len(train), generator=generator(0, "limit"))[:count].sort().values

    def in_units(self, values: Tensor) -> Tensor:
        """Return standardised regression targets or outputs, (N,) or (N, K), in their own units."""
        return in_units(values, self.target_mean, self.target_std)

    @property
    def target_names(self) -> list[str] | None:
        """The names of regression targets, such as a table's columns."""
        return self.source.target_names

    def as_pixels(self, inputs: Tensor) -> Tensor:
        """Return model inputs (B, C, H, W) as uint8 images, without the normalisation."""
        how = self.preprocessing
        if how.kind != "image" and how.mean is None:
            return by_range(inputs)
        per_channel = (1, -1, 1, 1)
        mean, std = (
            torch.tensor(it).view(per_channel) for it in (how.mean or [0.0], how.std or [1.0])
        )
        shown = inputs.float().cpu() * std + mean
        return (shown * 255).round().clamp(0, 255).to(torch.uint8)

    def fingerprint(self, *names: str) -> dict[str, Any]:
        """Return count and SHA-256 of the splits, over contents of tensors, files or some items."""
        found, unknown = {}, {}
        for name, split in self.source.items():
            if names and name not in names:
                continue
            try:
                digest = identity.of_split(split, self.identity)
            except identity.Unknown as error:
                digest, unknown[name] = identity.of_length(split), str(error)
            found[name] = {"examples": len(split), "sha256": digest}
        if unknown:
            name, reason = next(iter(unknown.items()))
            log.warning(
                "%s: %s. A resume can compare only type and length of %s. Give the data set a "
                "method fingerprint() that returns a text, such as a hash of its files.",
                *(name, reason, " and ".join(unknown)),
            )
        return found

    def close(self) -> None:
        """Stop the workers and free device memory."""
        for feed in self._feeds.values():
            if isinstance(feed, FileFeed):
                feed.close()
        self._feeds.clear()
        self._epochs = Epochs()

    def _feed(self, name: str, augmented: bool, device: torch.device) -> Feed:
        place = (name, augmented, device)
        if place not in self._feeds:
            self._feeds[place] = self._new_feed(name, augmented, device)
        return self._feeds[place]

    def _new_feed(self, name: str, augmented: bool, device: torch.device) -> Feed:
        split: Any = dict(self.source.items())[name]
        normalizer = Normalizer(self.preprocessing)
        augmentation: Any = self.augmentation
        one_by_one = augmented and bool(self.transforms)
        if isinstance(split, Examples) and not one_by_one:
            images, border = split.inputs, None
            if augmented and self.target_kind == "segmentation":
                border = self.ignore_index or 0
                masks = split.targets.to(torch.uint8) - border  # modulo 256: 0 is the border
                images = torch.cat([images, masks.unsqueeze(1)], 1)
            store = augmentation.store(images.to(device)) if augmented else None
            feed = (self._standardised(split), normalizer, device)
            return MemoryFeed(*feed, store=store, seed=self.seed, border=border)
        if isinstance(split, Tokens):
            return TokenFeed(
                split, device, seed=self.seed, rotates=augmented, pin_memory=self.pin_memory
            )
        if isinstance(split, Examples):
            store = None if augmentation is None else augmentation.store(split.inputs)
            split = FromMemory(self._standardised(split), store, self.seed)
        elif augmented and augmentation is not None:
            split = split.augmented(augmentation)
        if one_by_one:
            split = Transformed(split, self.transforms, self.source.input_max)
        return FileFeed(
            split,
            normalizer,
            device,
            name=name,
            seed=self.seed,
            num_classes=self.num_classes if self.target_kind in OF_CLASSES else None,
            ignore_index=self.ignore_index,
            heads=self.target_kind is None,
            collate=self.source.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            epochs=self._epochs,
            counted=functools.partial(counted, self._as_decoded()),
        )

    def _as_decoded(self) -> Splits:
        """Return the source; its training images are decoded as the augmentation takes them."""
        train = self.source.train
        if isinstance(train, ImageFiles) and self.augmentation is not None:
            train = train.augmented(self.augmentation)
        return dataclasses.replace(self.source, train=train)

    def _standardised(self, split: Examples) -> Examples:
        targets = standardised(
            split.targets, self.target_mean, self.target_std, getattr(torch, self.target_dtype)
        )
        return Examples(split.inputs, targets, split.weights)

    def far_targets(self) -> str | None:
        """Return a warning if regression targets are far from 0, where models start, else None."""
        return self._checks().far_targets(self.preprocessing)

    def _checks(self) -> DataChecks:
        return DataChecks(
            self.source,
            target_kind=self.target_kind,
            num_classes=self.num_classes,
            num_outputs=self.num_outputs,
            ignore_index=self.ignore_index,
            input_shape=self.input_shape,
        )

    def _check(self, augmentation: Any, normalize_targets: bool) -> None:
        checks = self._checks()
        if self.target_kind == "multiclass" and self.num_classes == 1:
            raise UserError("data.num_classes=1: a classifier needs at least two classes.")
        for name, split in self.source.items():
            if len(split) == 0:
                raise DataError(
                    f"split {name} is empty. Give it examples, or null for no such split."
                )
            if isinstance(split, Examples):
                checks.check_examples(name, split)
        names = self.class_names
        if names is not None and self.num_classes is not None and len(names) != self.num_classes:
            raise UserError(
                f"data.class_names has {len(names)} names for data.num_classes={self.num_classes}."
            )
        if normalize_targets and self.target_kind != "regression":
            raise UserError(
                f"data.normalize_targets=true is for regression, not {self.target_kind}. Set false."
            )
        if self.transforms:
            checks.check_transforms(self.transforms, augmentation)
        elif self.augmentation is not None:
            checks.check_augmentation(self.augmentation)
        checks.refuse_other_order(self.sampling, self.mixing)

    def _final(self, named: list[str]) -> list[str]:
        """Return the sets that are measured once, in their order."""
        sets = [name for name in self.num_examples if name != "train"]
        for name in named:
            if name not in sets:
                raise UserError(
                    f"data.final_sets={named}: there is no set {name}.{did_you_mean(name, sets)} "
                    f"The data has {', '.join(sets) or 'none'}."
                )
        return [name for name in sets if name in ("test", *named)]
