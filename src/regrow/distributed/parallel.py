"""The processes of a run: exact sums over them, and decisions that all of them must share."""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from regrow.errors import UserError
from regrow.numerics.buffers import caches
from regrow.numerics.totals import Totals, gradient_norm
from regrow.processes.interrupt import Interrupted, StopRequest


@dataclass(frozen=True, kw_only=True)
class DDPOptions:
    """Arguments of torch.nn.parallel.DistributedDataParallel, with the same names."""

    find_unused_parameters: bool
    gradient_as_bucket_view: bool
    static_graph: bool
    bucket_cap_mb: int


T = TypeVar("T")

ASK_EVERY_BATCHES = 8  # in an evaluation: each check sends a message to every process


def lost_the_others(error: BaseException) -> bool:
    """Return True if `error` is what a process sees when another one is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError)
        or "closed by peer" in str(error)
        or "reset by peer" in str(error)
    )


@dataclass(frozen=True)
class World:
    """This process and its place among the run's processes."""

    device: torch.device
    rank: int = 0
    size: int = 1
    store: Any = None  # dist.Store; None in a run of one process
    mesh: Any = None  # DeviceMesh of all processes, if the model is sharded

    @property
    def is_main(self) -> bool:
        """True if this process writes the record."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place, and return them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def norm(self, gradients: list[Tensor]) -> Tensor | float:
        """Return the () 2-norm of all gradients, of which this process may hold only a part.

        Raises UserError if there are none.
        """
        if not gradients:
            raise UserError(
                "step: no parameter has a gradient when the weights are updated. Call zero_grad() "
                "before the backward pass, not after it, and keep some gradients."
            )
        norm = gradient_norm(gradients)
        if self.mesh is None:
            return norm
        if isinstance(norm, float):
            norm = torch.tensor(norm, dtype=torch.float64)
        return self.sum_(norm.square()).sqrt()

    def gather_rows(self, rows: Tensor, num_global: int) -> Tensor:
        """Return the rows of the whole global batch, (N, …), from this process's share, (B, …).

        Differentiable: a gradient flows back to the process of each row, summed over the processes
        that used it.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, self, num_global)
        return gathered

    def gather(self, value: int) -> list[int]:
        """Return every process's value, by rank."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return [int(v) for v in self.sum_(values).tolist()]

    def from_main(self, text: str) -> str:
        """Return the main process's text, in every process."""
        if self.size == 1:
            return text
        # A folder's name may hold bytes that are not UTF-8.
        sent = text.encode("utf-8", "surrogateescape")
        content = torch.tensor([*sent], dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, 0)
        if not self.is_main:
            content = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode("utf-8", "surrogateescape")

    def gather_texts(self, text: str) -> list[str]:
        """Return every process's text, by rank."""
        if self.size == 1:
            return [text]
        content = torch.tensor([*text.encode()], dtype=torch.uint8, device=self.device)
        lengths = self.gather(len(content))
        texts = content.new_zeros(self.size, max(lengths))  # a sum with zeros is exact
        texts[self.rank, : len(content)] = content
        found = self.sum_(texts).tolist()
        return [bytes(row[:n]).decode() for row, n in zip(found, lengths, strict=True)]

    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the main process's buffers to every process: BatchNorm's statistics differ by rank.

        Skips caches if their sizes differ between processes.
        """
        if self.size == 1:
            return
        buffers = dict(model.named_buffers())
        shapes = {name: list(buffers[name].shape) for name in caches(model) if name in buffers}
        if caches(model):
            alike = self.from_main(json.dumps(shapes)) == json.dumps(shapes)
            if min(self.gather(int(alike))) == 0:
                buffers = {name: its for name, its in buffers.items() if name not in shapes}
        for buffer in buffers.values():
            sent = buffer.contiguous()  # gloo takes a view's elements for adjacent
            dist.broadcast(sent, 0)
            buffer.copy_(sent)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def claim_first(self, what: str) -> bool:
        """Claim `what` for this process. Returns True if no process has claimed it before."""
        return self.store is None or self.store.add(what, 1) == 1


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World, num_global: int) -> Tensor:
        size, extra = divmod(num_global, world.size)
        counts = [size + (rank < extra) for rank in range(world.size)]  # as the batch is shared
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        ctx.own = slice(sum(counts[: world.rank]), sum(counts[: world.rank + 1]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.own], None, None


class Exchange:
    """One sum over all processes per step: the step's metrics, and shared decisions.

    Each synchronised backward pass of a step has a name. Its sums are sent after its last forward
    pass and read once the gradients are there. DDP sends them together with its last bucket of
    gradients: on few cores a separate message cost a fifth of a step.

    A signal reaches one process, and every process has its own clock. So that all stop at the same
    step, the stop request and the main process's seconds are sent with the step's sums. On a GPU
    they are read one step late, because the host must not wait for the current step.
    """

    def __init__(self, world: World, stop: StopRequest) -> None:
        self.world, self.stop = world, stop
        self.seconds = 0.0  # since the previous exchange, by the main process's clock
        self._wished = False
        self.rides = False  # True if sent with the gradients
        # Sent in this step, by name: this process's own, and the message to the others, if there
        # are any. The first message also holds stop request and seconds.
        self._sent: dict[str, tuple[Totals, Tensor | None]] = {}
        self._boarding: Tensor | None = None  # leaves with the next last bucket of gradients
        self._work: list[Any] = []
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None
        self.start_clock()

    @property
    def stops(self) -> bool:
        """True if the run must stop after this step. The same in every process."""
        return self.stop.requested if self.world.size == 1 else self._wished

    def start_clock(self) -> None:
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude the time spent inside from the training time, unless the run ends there."""
        stopped = time.perf_counter()
        yield
        self._clock += time.perf_counter() - stopped

    def begin(self) -> None:
        """Begin a step, or repeat it in more micro-batches."""
        self._sent.clear()
        self._boarding = None

    def send(self, parts: list[Totals], name: str = "") -> None:
        """Start summing `parts`, those of the micro-batches, over all processes.

        Raises RuntimeError for a name that this step has used: its sums would be counted twice.
        """
        if name in self._sent:
            raise RuntimeError(
                f"this step has sent its sums{f' of {name}' if name else ''} already. Give each "
                "synchronised backward pass its own name: dataclasses.replace(plan, name=…)."
            )
        total = functools.reduce(Totals.plus, parts)
        is_first = not self._sent
        if is_first:
            now = time.perf_counter()
            seconds, self._clock = now - self._clock, now
        if self.world.size == 1:
            if is_first:
                self.seconds = seconds
            self._sent[name] = total, None
            return
        own: list[float] = []
        if is_first:
            own = [float(self.stop.requested), seconds if self.world.is_main else 0.0]
        message = total.message(own)
        self._sent[name] = total, message
        if self.rides:
            self._boarding = message
        else:
            self._work.append(dist.all_reduce(message, async_op=True))

    def with_gradients(self, bucket: Any) -> Any:
        """Sum a bucket of DDP's gradients over the processes; with the last one, the sent sums.

        Raises RuntimeError for a backward pass whose sums were not sent.
        """
        gradients: Tensor = bucket.buffer()
        tensors = [gradients]
        if bucket.is_last():
            if self._boarding is None:
                raise RuntimeError(
                    "a synchronised backward pass without sums of its own. Call exchange.send "
                    "under another name before it, or put all losses into one backward pass."
                )
            if self._boarding.dtype == gradients.dtype:
                tensors.append(self._boarding)
            else:
                self._work.append(dist.all_reduce(self._boarding, async_op=True))
            self._boarding = None

        def summed(future: Any) -> Tensor:
            future.value()  # raises if a process is gone
            return gradients

        group: Any = dist.group.WORLD
        return group.allreduce_coalesced(tensors).get_future().then(summed)

    def wait(self, name: str = "") -> Totals:
        """Return the sum of what all processes sent under the name."""
        own, message = self._sent[name]
        if message is None:
            return own
        while self._work:
            self._work.pop().wait()
        if name == next(iter(self._sent)):
            last = message[-2:]
            self._take(self._read_late(last) if message.is_cuda else tuple(last.tolist()))
            message = message[:-2]
        return own.received(message)

    def _take(self, common: tuple[float, float]) -> None:
        wishes, self.seconds = common
        self._wished = self._wished or wishes > 0

    def _read_late(self, common: Tensor) -> tuple[float, float]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        host = torch.empty(2, dtype=common.dtype, pin_memory=True)
        host.copy_(common, non_blocking=True)
        event.record()
        before, self._on_its_way = self._on_its_way, (host, event)
        if before is None:
            return 0.0, 0.0
        before[1].synchronize()
        wishes, seconds = before[0].tolist()
        return wishes, seconds


def stopping_together(
    batches: Iterable[T], count: int, stop: StopRequest, world: World
) -> Iterator[T]:
    """Yield `count` batches. A stop raises Interrupted in all processes at the same batch."""
    if world.size == 1:
        yield from stop.while_waiting(batches)
        return
    iterator = iter(batches)
    for number in range(max(world.gather(count))):
        if number % ASK_EVERY_BATCHES == 0 and any(world.gather(stop.requested)):
            raise Interrupted
        if number < count:
            yield next(iterator)


def distribute(
    model: nn.Module, options: DDPOptions, world: World, exchange: Exchange
) -> nn.Module:
    """Return the module that a step calls: the model, or DDP around it to sum the gradients."""
    if world.size == 1 or world.mesh is not None:  # a sharded model sums them itself
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    if names := caches(model):  # their sizes may differ between processes
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)
    distributed = DistributedDataParallel(model, device_ids=devices, **vars(options))
    distributed.register_comm_hook(None, lambda _, bucket: exchange.with_gradients(bucket))
    exchange.rides = True
    return distributed


def synchronises(forward: Any, last_slice: bool) -> contextlib.AbstractContextManager[Any]:
    """Return a context that sums gradients over processes in the last micro-batch only."""
    # FSDP2. Look at the class: on a module, a missing attribute is slow to look up.
    if hasattr(type(forward), "set_requires_gradient_sync"):
        return _with_gradient_sync(forward, last_slice)
    if last_slice or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


@contextlib.contextmanager
def _with_gradient_sync(forward: Any, last_slice: bool) -> Iterator[None]:
    """Set FSDP's flag, which holds until the next micro-batch sets it."""
    forward.set_requires_gradient_sync(last_slice)
    yield


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the model with BatchNorm synchronised over all processes, but for frozen norms.

    Raises UserError if the device is not CUDA.
    """
    if device.type != "cuda":
        raise UserError(
            f"trainer.sync_batch_norm=true needs CUDA, and the device is {device.type}. "
            "Use trainer.sync_batch_norm=false."
        )
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    # A frozen norm has its own `train`, which keeps it in evaluation mode. A new module would not.
    named = [*model.named_modules(remove_duplicate=False)]
    frozen = {name: module for name, module in named if name and "train" in vars(module)}
    converted: nn.Module = convert(model)
    for name, module in frozen.items():
        converted.set_submodule(name, module)
    return converted
