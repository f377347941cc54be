"""The processes of a run: exact sums over them, and what all of them must decide alike."""

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
from regrow.training import sums
from regrow.training.interrupt import Interrupted, StopRequest
from regrow.training.optim import gradient_norm
from regrow.training.options import DDPOptions
from regrow.training.state import caches

T = TypeVar("T")

ASK_EVERY_BATCHES = 8  # of an evaluation: a question costs a message to every process


def lost_the_others(error: BaseException) -> bool:
    """Return True if this is what a process sees when another one is gone."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError)
        or "closed by peer" in str(error)
        or "reset by peer" in str(error)
    )


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1
    store: Any = None  # dist.Store; None in a run of one process
    mesh: Any = None  # DeviceMesh of all processes, where the model is sharded over them

    @property
    def is_main(self) -> bool:
        """Return True if this process writes the record."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def norm(self, gradients: list[Tensor]) -> Tensor | float:
        """() the 2-norm of all gradients, of which this process may hold a part of each."""
        norm = gradient_norm(gradients)
        if self.mesh is None:
            return norm
        if isinstance(norm, float):
            norm = torch.tensor(norm, dtype=torch.float64)
        return self.sum_(norm.square()).sqrt()

    def gather(self, value: int) -> list[int]:
        """Every process's value, by rank."""
        values = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        values[self.rank] = value
        return [int(v) for v in self.sum_(values).tolist()]

    def from_main(self, text: str) -> str:
        """The main process's text, in every process."""
        if self.size == 1:
            return text
        content = torch.tensor([*text.encode()], dtype=torch.uint8, device=self.device)
        length = torch.tensor(len(content), device=self.device)
        dist.broadcast(length, 0)
        if not self.is_main:
            content = torch.empty(int(length.item()), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()

    def copy_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers: BatchNorm's statistics follow the slices.

        But for caches that have grown to another size in one of them.
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
            dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def is_first(self, what: str) -> bool:
        """Return True if no other process has asked for `what` before."""
        return self.store is None or self.store.add(what, 1) == 1


class Exchange:
    """One sum over all processes for each step: what the step reports, and what must be decided.

    It is sent when the last forward pass is done and read when the gradients are there; DDP takes
    it along with the last of them, for on few cores a message of its own cost a fifth of a step.

    A signal reaches one process and every process has a clock of its own. So that all stop at the
    same step, the wish to stop and the main process's seconds travel along with the step's sums. On
    a GPU what came back is read one step late, for the host must not wait for the step under way.
    """

    def __init__(self, world: World, stop: StopRequest) -> None:
        self.world, self.stop = world, stop
        self.seconds = 0.0  # since the exchange before, by the main process's clock
        self._wished = False
        self.rides = False  # with the gradients
        self._sums: sums.Sums | None = None  # with the wish and the seconds, while they travel
        self._work: Any = None
        self._on_its_way: tuple[Tensor, torch.cuda.Event] | None = None
        self.start_clock()

    @property
    def stops(self) -> bool:
        """Whether to stop after this step. The same in every process."""
        return self.stop.requested if self.world.size == 1 else self._wished

    def start_clock(self) -> None:
        self._clock = time.perf_counter()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude the time spent inside from the training time, unless the run ends there."""
        stopped = time.perf_counter()
        yield
        self._clock += time.perf_counter() - stopped

    def send(self, parts: list[sums.Sums], dtype: torch.dtype) -> None:
        """Let the sum of `parts` be taken over all processes, too; between them in `dtype`."""
        total = functools.reduce(sums.added, parts)
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        if self.world.size == 1:
            self.seconds, self._sums = seconds, total
            return
        own = [float(self.stop.requested), seconds if self.world.is_main else 0.0]
        if isinstance(total, list):
            self._sums = torch.tensor([*total, *own], dtype=dtype)
        else:
            self._sums = torch.cat([total, torch.tensor(own, dtype=dtype).to(total.device)])
        if not self.rides:
            self._work = dist.all_reduce(self._sums, async_op=True)

    def with_gradients(self, bucket: Any) -> Any:
        """Sum a bucket of DDP's gradients over the processes; with the last one, what was sent."""
        gradients: Tensor = bucket.buffer()
        tensors = [gradients]
        if bucket.is_last() and isinstance(self._sums, Tensor):
            if self._sums.dtype == gradients.dtype:
                tensors.append(self._sums)
            else:
                self._work = dist.all_reduce(self._sums, async_op=True)

        def summed(future: Any) -> Tensor:
            future.value()  # raises if a process is gone
            return gradients

        group: Any = dist.group.WORLD
        return group.allreduce_coalesced(tensors).get_future().then(summed)

    def wait(self) -> sums.Sums:
        """The sum of what all processes sent."""
        assert self._sums is not None
        if not isinstance(self._sums, Tensor) or self.world.size == 1:
            return self._sums
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._sums.is_cuda:
            self._take(self._read_late(self._sums[-2:]))
            return self._sums[:-2]
        *total, wishes, seconds = self._sums.tolist()
        self._take((wishes, seconds))
        return total if sums.on_host(self._sums.device) else self._sums[:-2]

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
    """`batches`, `count` of them here, ended by Interrupted in all processes at the same place."""
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
    """The model as a step calls it: itself, or DDP around it, which sums the gradients."""
    if world.size == 1 or world.mesh is not None:  # a sharded one sums them itself
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    if names := caches(model):  # which may grow in one process and not in another
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)
    distributed = DistributedDataParallel(model, device_ids=devices, **vars(options))
    distributed.register_comm_hook(None, lambda _, bucket: exchange.with_gradients(bucket))
    exchange.rides = True
    return distributed


def synchronises(forward: Any, last_slice: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are summed over the processes once per step, in its last slice's backward pass."""
    # FSDP2. Asked of the class, for a module is slow to say that it lacks something.
    if hasattr(type(forward), "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(last_slice)
    if last_slice or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """BatchNorm over the slices of all processes. Raises UserError where torch has no kernel."""
    if device.type != "cuda":
        raise UserError(
            f"trainer.sync_batch_norm=true needs CUDA, and the device is {device.type}. "
            "Use trainer.sync_batch_norm=false."
        )
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    converted: nn.Module = convert(model)
    return converted
