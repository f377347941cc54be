"""Two feeds from positions in an order to batches on the device, with the same interface."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing import connection, resource_sharer, util
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter

from regrow.errors import DataError, brief, machine_fault
from regrow.feeding.batch import LoadedBatch, described, each, parts_of, sent, tensors_of
from regrow.feeding.block_order import BlockOrder, FileOrder
from regrow.feeding.decoding import BrokenImage
from regrow.feeding.mixing import Pairs
from regrow.feeding.mixing import single as alone
from regrow.feeding.preprocess import Normalizer, rounding, single
from regrow.feeding.sampling import Windows, rows_of
from regrow.feeding.shards import ShardItems
from regrow.feeding.splits import Examples, MapStyle
from regrow.feeding.streams import Stream
from regrow.feeding.transforms import Epochs, FailedTransform, Transformed, again, with_epochs
from regrow.processes import begin
from regrow.processes.interrupt import Interrupted
from regrow.processes.parent import die_with_parent
from regrow.protocols import Inputs, Store
from regrow.randomness import generator, key, seed_step, states_kept

log = logging.getLogger("regrow.data")

Order = (
    Tensor | BlockOrder | FileOrder
)  # an epoch's examples; a part of one window is read at a time

CHUNK_BYTES = 1 << 20  # of float inputs gathered at once: about a core's second-level cache
RESIDENT_BYTES = 1 << 28  # up to this size a split is kept normalised in float32
# Ctrl-C and most schedulers signal every process, but only the run decides how to react.
FOR_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TO_A_WORKER = signal.SIGUSR2  # the run's signal to its workers to exit
END_SECONDS = 3.0  # after this a worker is killed, e.g. if stuck in C code


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
        self.items = _Seeded(dataset, name, seed, num_classes, ignore_index, epochs)
        self.is_checked = False
        self.plan = _Plan(num_workers)
        self._seen: object = None  # persistent workers that already have a finalizer
        with _no_advice_on_workers():
            self.loader: DataLoader[Any] = DataLoader(
                self.items,  # type: ignore[arg-type]
                batch_sampler=self.plan,
                num_workers=num_workers,
                collate_fn=_Collate(collate, name, num_classes, ignore_index, heads=heads),
                pin_memory=pin_memory and device.type == "cuda",
                persistent_workers=persistent_workers and num_workers > 0,
                worker_init_fn=functools.partial(_begin_worker, os.getpid()),
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
            with _no_advice_on_workers(), _signals_held(), _none_left_behind():
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
            util.Finalize(items, _stop, args=(items._workers,), exitpriority=1)  # type: ignore[attr-defined]
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
                _end_workers(items)

    def close(self) -> None:
        """Stop persistent workers; the next `read` starts new ones."""
        _end_workers(self.loader._iterator)
        self.loader._iterator = self._seen = None
        self.items.release()

    def _batch(self, item: Any, windows: Windows, number: int, pairs: Pairs | None) -> LoadedBatch:
        if isinstance(item, _Broken):
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
        pixels, soft, weights = alone(batch.inputs), alone(batch.targets), batch.weights
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

    def __len__(self) -> int:
        return len(self.windows) - self.start


class _Broken:
    """A broken example, returned by a worker as a value: torch would wrap an exception."""

    def __init__(
        self,
        message: str,
        image: tuple[str, str] | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """`image`: the file and `what` of a BrokenImage. `cause`: the error of the user's code."""
        self.message, self.image = message, image
        self.trace = "" if cause is None else "".join(traceback.format_exception(cause))

    def error(self) -> DataError:
        if self.image:
            return BrokenImage(self.message, *self.image)
        error = DataError(self.message)
        if self.trace:  # HYDRA_FULL_ERROR=1 shows it
            error.__cause__ = RuntimeError(f"in the data set:\n{self.trace}")
        return error


class _Seeded:
    """Seeds torch, numpy and `random` for each example from (seed, epoch, index)."""

    def __init__(
        self,
        dataset: MapStyle,
        name: str,
        seed: int,
        num_classes: int | None,
        ignore_index: int | None,
        epochs: Epochs | None = None,
    ) -> None:
        self.dataset, self.name, self.seed, self.num_classes = dataset, name, seed, num_classes
        self.ignore_index = ignore_index
        self.draws = getattr(dataset, "draws", True)  # else items need no seed
        self.epochs, self.with_epochs = epochs or Epochs(), with_epochs(dataset)
        inner = dataset.dataset if isinstance(dataset, Transformed) else dataset
        self.shards = inner if isinstance(inner, ShardItems) else None

    def begin(self, epoch: int) -> None:
        """Tell the data set of the epoch, in this process. Does nothing if it knows."""
        self.epochs.set(self.with_epochs, epoch)

    def release(self) -> None:
        """Let go of the blocks of shards that this process holds."""
        if self.shards is not None:
            self.shards.release()

    def __getitem__(self, place: tuple[Any, ...]) -> Any:
        epoch, index = place[:2]
        again = place[2] if len(place) > 2 else 0
        blocks = place[3] if len(place) > 3 else ()
        try:
            self.begin(epoch)
            if self.shards is not None and blocks:
                self.shards.ahead(blocks)
            item = self._item(epoch, index, again)
            self._check(item, index)
            return item
        except BrokenImage as error:
            return _Broken(str(error), (error.file, error.what))
        except FailedTransform as error:
            return _Broken(str(error), cause=error.__cause__)
        except DataError as error:
            return _Broken(str(error))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            reason = brief(error)
            return _Broken(
                f"{self.name} example {index} cannot be read: {reason}. The files under data.root "
                "must stay as they are while a run needs them. Put it back and resume."
            )
        except Exception as error:
            raise _sendable(error) from error

    def _item(self, epoch: int, index: int, again: int) -> Any:
        if not self.draws:
            return self.dataset[index]
        if isinstance(self.dataset, Stream):
            return self.dataset.at(epoch, index, self._seeded)
        with self._seeded(epoch, index, *([again] if again else ())):
            if again and isinstance(self.dataset, Transformed):
                return self.dataset.drawn(index, again)
            return self.dataset[index]

    def _seeded(self, *place: int) -> contextlib.AbstractContextManager[None]:
        return seeded(key(self.seed, "example", self.name, *place))

    def _check(self, item: Any, index: int) -> None:
        """Raise DataError for a class index out of range; a custom collate is checked later."""
        if self.num_classes is None:
            return
        # The usual case; a tensor would cost 30 µs.
        is_pair = type(item) is tuple and len(item) > 1
        if is_pair and type(item[1]) is int and 0 <= item[1] < self.num_classes:
            return
        if isinstance(item, Mapping):
            targets = item.get("targets")
        else:
            targets = item[1] if isinstance(item, list | tuple) and len(item) > 1 else None
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            return
        wrong = outside(targets, self.num_classes, self.ignore_index)
        if wrong is not None:
            files = getattr(self.dataset, "files", None)
            where = f" ({files[index]})" if files is not None else ""
            raise DataError(
                f"{self.name} example {index}{where}: {out_of_range(wrong, self.num_classes)}"
            )


def _sendable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its text if its class cannot be pickled.

    Torch sends the class to the run. A class defined in a function would never arrive, and the run
    would wait forever.
    """
    try:
        pickle.dumps(type(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


class _Collate:
    """Collates items to (inputs, targets, weights); a class, because closures cannot be pickled."""

    def __init__(
        self,
        collate: Callable[[list[Any]], Any] | None,
        name: str,
        num_classes: int | None,
        ignore_index: int | None,
        *,
        heads: bool = False,
    ) -> None:
        self.collate, self.name = collate, name
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.heads = heads

    def __call__(self, items: list[Any]) -> Any:
        for item in items:
            if isinstance(item, _Broken):
                return item
        if self.collate is not None:
            try:
                batch = self.collate(items)
            except DataError as error:
                return _Broken(str(error))
            except Exception as error:
                raise _sendable(error) from error
        else:
            try:
                batch = default_collate(items)
            except (TypeError, RuntimeError, KeyError) as error:
                if machine_fault(error):  # e.g. a full /dev/shm
                    raise
                reason = brief(error, 200)
                return _Broken(
                    f"{self.name}: items of the data set do not make a batch: {reason}. Give items "
                    "of tensors of one shape, or a collate function: data.source.collate."
                )
        try:
            found = tensors_of(batch)
        except TypeError as error:
            return _Broken(
                f"{self.name}: a batch of the data set is {error}. It must be (inputs, targets) or "
                "a mapping with inputs, targets and, if wanted, weights. Let data.source.collate "
                "give that."
            )
        if not isinstance(found[1], Tensor):
            if not self.heads:
                return _Broken(
                    f"{self.name}: a batch of the data set is a pair whose targets are "
                    f"{described(found[1])}, and data.target_kind names a kind of one tensor. For "
                    "several heads set data.target_kind=null, and a task that takes them; else let "
                    "data.source.collate give one tensor."
                )
        elif self.collate is not None and self.num_classes is not None:
            wrong = outside(found[1], self.num_classes, self.ignore_index)
            if wrong is not None:
                return _Broken(f"{self.name}, in a batch: {out_of_range(wrong, self.num_classes)}")
        inputs, targets, weights = found
        # A worker cannot send a tensor with a graph.
        inputs, targets = each(inputs, Tensor.detach), each(targets, Tensor.detach)
        return inputs, targets, None if weights is None else weights.detach()


def collated(items: list[Any], collate: Callable[[list[Any]], Any] | None) -> Inputs:
    """Return the inputs of a batch of items, as a run collates them. Raises DataError."""
    found = _Collate(collate, "inputs", None, None, heads=True)(items)
    if isinstance(found, _Broken):
        raise DataError(found.message)
    inputs: Inputs = found[0]
    return inputs


def input_names(
    dataset: MapStyle, collate: Callable[[list[Any]], Any] | None, seed: int
) -> list[str] | None:
    """Return the inputs' names, or positions from 0, if an example has several; else None."""
    item = _Seeded(dataset, "train", seed, None, None)[(0, 0)]
    if isinstance(item, _Broken):
        raise DataError(item.message)
    inputs = collated([item], collate)
    if isinstance(inputs, Tensor):
        return None
    return [str(name) for name in (inputs if isinstance(inputs, Mapping) else range(len(inputs)))]


def out_of_range(wrong: int, num_classes: int) -> str:
    """Return an error's words for what `outside` found, with the way out."""
    return (
        f"class {wrong} is out of range for data.num_classes={num_classes}: 0 … {num_classes - 1}. "
        "Number the classes from 0, or set data.num_classes and data.num_outputs to their number."
    )


def outside(targets: Tensor, num_classes: int, ignore_index: int | None) -> int | None:
    """Return the first class index that is out of range and not ignored by the loss, else None.

    -100 is accepted as well: torch's losses ignore it.
    """
    if targets.is_floating_point() or targets.is_complex():
        return None
    targets = targets.long()  # a narrow type would wrap the other number of a comparison around
    wrong = ((targets < 0) & (targets != -100)) | (targets >= num_classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    return int(targets[wrong].flatten()[0]) if bool(wrong.any()) else None


@contextlib.contextmanager
def seeded(value: int) -> Iterator[None]:
    """Seed the global random states from `value`, then restore them for the loop."""
    with states_kept(on_device=False):  # a worker must not touch the device
        seed_step(value, on_device=False)
        yield


@contextlib.contextmanager
def _no_advice_on_workers() -> Iterator[None]:
    """Hide torch's warning about more workers than cores: that is the user's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


def _end_workers(items: object) -> None:
    """Stop the workers now; the garbage collector may wait five seconds for each.

    A worker that is busy with an example is stopped too: an interrupted run cannot wait for it.
    """
    workers = getattr(items, "_workers", ())
    if getattr(items, "_worker_pids_set", False):  # else torch raises for a killed worker
        torch._C._remove_worker_pids(id(items))
        items._worker_pids_set = False  # type: ignore[attr-defined]
    _stop(workers)
    end = getattr(items, "_shutdown_workers", None)
    if end is not None:
        if workers:  # one may have ended with the lock of torch's event, which `end` would wait for
            items._workers_done_event = multiprocessing.Event()  # type: ignore[attr-defined]
        end()


def _stop(workers: Iterable[BaseProcess]) -> None:
    """Tell workers to exit, and kill those that do not.

    At interpreter exit nothing else would stop them: multiprocessing sends one SIGTERM, which a
    worker takes for the run's, and joins without a timeout.
    """
    there = [worker for worker in workers if worker.is_alive()]
    for worker in there:
        _send(worker, TO_A_WORKER)
    deadline = time.monotonic() + END_SECONDS
    while there and (left := deadline - time.monotonic()) > 0:
        connection.wait([worker.sentinel for worker in there], timeout=left)
        there = [worker for worker in there if worker.is_alive()]
    for worker in there:
        _send(worker, signal.SIGKILL)


def _send(worker: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid or 0, number)


@contextlib.contextmanager
def _none_left_behind() -> Iterator[None]:
    """If starting workers fails halfway, stop those started: nothing else refers to them."""
    before = {*multiprocessing.active_children()}
    try:
        yield
    except BaseException as error:
        _stop(child for child in multiprocessing.active_children() if child not in before)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half_made = frame.f_locals.get("self")
            if isinstance(half_made, _BaseDataLoaderIter):
                half_made._shutdown = True  # type: ignore[attr-defined]  # else its __del__ raises
        raise


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Block signals, so that none reaches a new worker while it has the run's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FOR_THE_RUN, TO_A_WORKER})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(run: int, worker: int) -> None:
    """Set up a new worker of the process `run`, whose signals are blocked: see `_signals_held`."""
    # Torch's own watchdog watches the current parent, and so waits forever for a killed run.
    die_with_parent(run)
    begin.data_worker(FOR_THE_RUN, TO_A_WORKER)
    sys.excepthook = functools.partial(_print_unless_lost, sys.excepthook)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FOR_THE_RUN, TO_A_WORKER})


def _print_unless_lost(
    printer: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Print an error of a worker's threads, unless the run stopped in the middle of reading.

    A thread of multiprocessing's hands tensors over. It prints an error if the run closes the
    connection, as a signal that interrupts the run's wait does.
    """
    place = None if trace is None else trace.tb_frame.f_code.co_filename
    is_lost = issubclass(kind, ConnectionError | EOFError)
    if not (is_lost and place == resource_sharer.__file__):
        printer(kind, error, trace)
