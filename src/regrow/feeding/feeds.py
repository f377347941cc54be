"""Two feeds from positions in an order to batches on the device, with the same interface."""

from __future__ import annotations

import functools
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from multiprocessing import util
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from regrow.errors import DataError
from regrow.feeding.batch import LoadedBatch, each, parts_of, sent
from regrow.feeding.block_order import BlockOrder, FileOrder
from regrow.feeding.decoding import BrokenImage
from regrow.feeding.items import BrokenItem, Collate, SeededItems
from regrow.feeding.mixing import Pairs, one_tensor
from regrow.feeding.preprocess import Normalizer, rounding, single
from regrow.feeding.sampling import Windows, rows_of
from regrow.feeding.splits import Examples, MapStyle
from regrow.feeding.transforms import Epochs, again
from regrow.feeding.workers import (
    begin_worker,
    end_workers,
    no_advice_on_workers,
    none_left_behind,
    signals_held,
    stop,
)
from regrow.processes.interrupt import Interrupted
from regrow.protocols import Inputs, Store
from regrow.randomness import generator

log = logging.getLogger("regrow.data")

# An epoch's examples; a part of one window is read at a time.
Order = Tensor | BlockOrder | FileOrder

CHUNK_BYTES = 1 << 20  # of float inputs gathered at once: about a core's second-level cache
RESIDENT_BYTES = 1 << 28  # up to this size a split is kept normalised in float32


class MemoryFeed:
    """A split whose tensors live on the device; several windows are gathered at once.

    Chunks start at fixed positions of the epoch, so that a batch has the same memory alignment, and
    with it the same bits, whether the epoch is entered at its start or in the middle.
    """

    def __init__(
        self,
        examples: Examples,
        normalize: Normalizer,
        device: torch.device,
        *,
        store: Store | None,
        seed: int,
        border: int | None = None,
    ) -> None:
        """`border`: the masks are the store's last channel, where 0 means this class index."""
        self.border = border
        self.targets = examples.targets.to(device)
        self.weights = None if examples.weights is None else examples.weights.to(device)
        self.num_elements = examples.inputs[:1].numel()
        self.normalize, self.device, self.seed, self.store = normalize, device, seed, store
        self.inputs: Tensor | None = None
        small = 4 * examples.inputs.numel() <= RESIDENT_BYTES
        # MPS does not support float64, so normalise before the transfer, to float32.
        wide = device.type == "mps" and examples.inputs.dtype == torch.float64
        self.resident = store is None and (small or wide)
        if self.resident:
            normalized = normalize(examples.inputs)
            assert isinstance(normalized, Tensor)
            self.inputs = normalized.to(device)
        elif store is None:
            self.inputs = examples.inputs.to(device)

    def read(
        self,
        windows: Windows,
        order: Tensor,
        epoch: int,
        start: int,
        *,
        repeats: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Iterator[LoadedBatch]:
        """Yield the batches of an epoch's windows `start …`; its examples come in `order` (N,).

        `repeats` (N,) count the earlier draws of the same example; `pairs` mix it with a partner.
        """
        rows = None  # of random numbers, for each place of the order
        if (store := self.store) is not None:
            seed = self.seed
            rows = rows_of(lambda way: store.table(again(seed, way), epoch), order, repeats)
            rows = rows.to(self.device)
        order = order.to(self.device)
        if pairs is not None:
            partners, choices = pairs.partners.to(self.device), pairs.choices.to(self.device)
        per_chunk = max(1, CHUNK_BYTES // (4 * self.num_elements * windows.size))
        for first in range(start - start % per_chunk, len(windows), per_chunk):
            numbers = range(first, min(first + per_chunk, len(windows)))
            shares = [windows.share(number) for number in numbers]
            if windows.world_size == 1:
                places = [slice(shares[0].start, shares[-1].stop)]
            else:
                places = [slice(share.start, share.stop) for share in shares]
            sizes = [share.stop - share.start for share in shares]
            gathered = self._gather(_at(places, order), None if rows is None else _at(places, rows))
            if pairs is not None:
                others = _at(places, partners)
                chosen = order[others], None if rows is None else rows[others]
                gathered = pairs.mixed(_at(places, choices), gathered, self._gather(*chosen))
            inputs, targets = (torch.split(part, sizes) for part in gathered[:2])
            weights: Any = (None,) * len(shares)
            if gathered[2] is not None:
                weights = torch.split(gathered[2], sizes)
            for number, share, x, y, w in zip(
                numbers, shares, inputs, targets, weights, strict=True
            ):
                if number >= start:
                    if not share.num_local:
                        w = torch.zeros(1, device=self.device)
                    yield LoadedBatch(x, y, w, share.num_local, share.num_global, share.first)

    def _gather(self, indices: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs, targets and weights at `indices`, with the store's rows for them."""
        weights = None if self.weights is None else self.weights.index_select(0, indices)
        if self.store is not None and rows is not None:
            inputs = self.store.gather(indices, rows)
        else:
            assert self.inputs is not None
            inputs = self.inputs.index_select(0, indices)
        if self.border is None:
            targets = self.targets.index_select(0, indices)
        else:
            inputs, targets = inputs[:, :-1], inputs[:, -1] + self.border
        if self.resident:
            return inputs, targets, weights
        normalized = self.normalize(inputs)
        assert isinstance(normalized, Tensor)
        return normalized, targets, weights


def _at(places: list[slice], values: Tensor) -> Tensor:
    """Return the values at some places, without a copy if they are one range."""
    if len(places) == 1:
        return values[places[0]]
    return torch.cat([values[place] for place in places])


class FileFeed:
    """A map-style data set read by DataLoader workers; batches do not depend on their number."""

    def __init__(
        self,
        dataset: MapStyle,
        normalize: Callable[[Inputs], Inputs],
        device: torch.device,
        *,
        name: str,
        seed: int,
        num_classes: int | None,
        ignore_index: int | None,
        heads: bool = False,
        collate: Callable[[list[Any]], Any] | None,
        num_workers: int,
        pin_memory: bool,
        persistent_workers: bool,
        epochs: Epochs | None = None,
        counted: Callable[[BrokenImage], DataError] = lambda error: error,
    ) -> None:
        """`counted` returns the error to raise for a broken image."""
        self.counted = counted
        self.normalize, self.device, self.name = normalize, device, name
        self.items = SeededItems(dataset, name, seed, num_classes, ignore_index, epochs)
        self.is_checked = False
        self.plan = _Plan(num_workers)
        self._seen: object = None  # persistent workers that already have a finalizer
        with no_advice_on_workers():
            self.loader: DataLoader[Any] = DataLoader(
                self.items,  # type: ignore[arg-type]
                batch_sampler=self.plan,
                num_workers=num_workers,
                collate_fn=Collate(collate, name, num_classes, ignore_index, heads=heads),
                pin_memory=pin_memory and device.type == "cuda",
                persistent_workers=persistent_workers and num_workers > 0,
                worker_init_fn=functools.partial(begin_worker, os.getpid()),
                generator=generator(seed, "workers"),  # else each epoch draws from the global one
            )

    def read(
        self,
        windows: Windows,
        order: Order,
        epoch: int,
        start: int,
        *,
        repeats: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Iterator[LoadedBatch]:
        """Yield the batches of windows `start …`; the next one loads while one is in use.

        `repeats` (N,) count the earlier draws of the same example; `pairs` mix it with a partner.
        """
        self.plan.point_at(windows, order, epoch, start, repeats, pairs)
        self.items.begin(epoch)  # here too: workers that begin now inherit it
        try:
            with no_advice_on_workers(), signals_held(), none_left_behind():
                items = iter(self.loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            if "pickle" not in str(error):
                raise
            raise DataError(
                f"{self.name}: the data set or data.source.collate cannot be sent to data workers: "
                f"{error}. Define it at the top level of a module, or use data.num_workers=0."
            ) from error
        if getattr(items, "_workers", ()) and items is not self._seen:
            # Runs when `items` is collected or at interpreter exit, whichever comes first.
            util.Finalize(items, stop, args=(items._workers,), exitpriority=1)  # type: ignore[attr-defined]
            self._seen = items if self.loader.persistent_workers else None
        ready: LoadedBatch | None = None
        try:
            for number in range(start, len(windows)):
                coming = self._batch(next(items), windows, number, pairs)
                if ready is not None:
                    yield ready
                ready = coming
            if ready is not None:
                yield ready
        except (Exception, KeyboardInterrupt, Interrupted):
            self.close()
            raise
        finally:
            if not self.loader.persistent_workers:
                end_workers(items)

    def close(self) -> None:
        """Stop persistent workers; the next `read` starts new ones."""
        end_workers(self.loader._iterator)
        self.loader._iterator = self._seen = None
        self.items.release()

    def _batch(self, item: Any, windows: Windows, number: int, pairs: Pairs | None) -> LoadedBatch:
        if isinstance(item, BrokenItem):
            error = item.error()
            raise self.counted(error) if isinstance(error, BrokenImage) else error
        inputs, targets, weights = item
        share = windows.share(number)
        expected = max(1, share.num_local)
        if pairs is not None:
            read, slots = pairs.read_by(share)
            expected = len(read)
        parts = parts_of(targets)
        wrong = next((part for part in parts if part.shape[:1] != (expected,)), None)
        if wrong is not None or (weights is not None and len(weights) != expected):
            shape = list((parts[0] if wrong is None else wrong).shape)
            raise DataError(
                f"{self.name}: a batch of {expected} items has targets of shape {shape}. Let "
                "`collate` give as many targets, and weights, as items."
            )
        # The default collate turns Python numbers into float64.
        if not self.is_checked and (lost := max(rounding(part) for part in parts)) > 1e-3:
            log.warning(
                "the targets of %s are large against their spread: float32 rounds them by up to "
                "%.2g of it in the first batch. Subtract their mean in the data set.",
                *(self.name, lost),
            )
        targets = each(targets, single)
        self.is_checked = True
        if share.num_local == 0 and pairs is None:
            weights = torch.zeros(1)
        sizes = (share.num_local, share.num_global, share.first)
        batch = LoadedBatch(inputs, targets, weights, *sizes).to(self.device)
        batch.inputs = self.normalize(batch.inputs)
        if pairs is None:
            return batch
        size = share.stop - share.start
        pixels, soft, weights = one_tensor(batch.inputs), one_tensor(batch.targets), batch.weights
        slots = sent(slots, self.device)
        choices = sent(pairs.choices[share.start : share.stop], self.device)
        own = pixels[:size], soft[:size], None if weights is None else weights[:size]
        others = pixels[slots], soft[slots], None if weights is None else weights[slots]
        found = pairs.mixed(choices, own, others)
        if share.num_local == 0:
            found = *found[:2], torch.zeros(1, device=self.device)
        return LoadedBatch(*found, *sizes)


class _Plan:
    """The DataLoader's batch_sampler: lists of (epoch, index), so that workers know the epoch.

    The second and later draws of an example in an epoch are (epoch, index, number of earlier ones).
    With pairs, a batch's own examples come first, then the partners that are not among them. If the
    data has blocks, the first is (epoch, index, 0, blocks to fetch before they are needed).
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def point_at(
        self,
        windows: Windows,
        order: Order,
        epoch: int,
        start: int,
        repeats: Tensor | None,
        pairs: Pairs | None,
    ) -> None:
        self.windows, self.order, self.epoch, self.start = windows, order, epoch, start
        self.repeats, self.pairs = repeats, pairs

    def __iter__(self) -> Iterator[list[tuple[Any, ...]]]:
        windows, order, repeats = self.windows, self.order, self.repeats
        for number in range(self.start, len(windows)):
            share = windows.share(number)
            first = number * windows.size
            places = torch.arange(share.start, share.stop)
            if self.pairs is not None:
                places, _ = self.pairs.read_by(share)
            indices = order[first : first + windows.size][places - first].tolist()
            batch: list[tuple[Any, ...]] = [(self.epoch, index) for index in indices]
            if repeats is not None:
                drawn = zip(batch, repeats[places].tolist(), strict=True)
                batch = [(*place, again) if again else place for place, again in drawn]
            if not isinstance(order, Tensor):
                blocks = order.ahead(number, start=self.start, num_workers=self.num_workers)
                batch[0] = (*batch[0], 0, blocks)
            yield batch
