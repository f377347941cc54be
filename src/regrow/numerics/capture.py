"""Record the pieces of a step in CUDA graphs and replay them, if the results stay the same.

A step has one piece per micro-batch (forward and backward) and one for the update. A graph replays
the kernels and their arguments, and nothing of what Python did in between: a counter, an annealed
float or a draw from numpy would silently keep its first value. So a piece is recorded only if it
changed no attribute of model or task and no random state of the host. Comparisons with uncaptured
steps find what else differs: bit for bit, or within `NOISE` where kernels are not deterministic.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from regrow.errors import brief
from regrow.numerics.calls import is_out_of_memory
from regrow.randomness import drawn_on_host, seed_step

log = logging.getLogger(__name__)

LEAST_STEPS = 50  # a shorter run does not earn back what recording and comparing cost
WARM_UP = 3  # steps of a shape before it is recorded: moments, kernels and caches then exist
MOST_SHAPES = 4  # recorded; each keeps its own gradients
MOST_SEEN = 100  # distinct shapes, after which no shape is expected to repeat
COMPARED = {1, 2, 3, 10, 100, 1_000, 10_000, 100_000}  # replays of a shape, from 1
LATER_EPOCHS = 2  # the first replay in this many later epochs is compared
NOISE = 4.0  # a difference may be this many times that between two uncaptured steps
ALIGNMENT = 256  # bytes
EAGER, RECORD, COMPARE, REPLAY = "eager", "record", "compare", "replay"

T = TypeVar("T")
R = TypeVar("R")


class Eager:
    """Runs the pieces of a step as they are."""

    def begin(self, micro_batches: Sequence[Any], epoch: int) -> None:
        """Announce a step of these micro-batches."""

    def number(self, value: int) -> int | Tensor:
        """Return a number that changes at each step in the form that a piece takes it."""
        return value

    def run(self, piece: Callable[[T], R], given: T, seed: int | None = None) -> R:
        """Run `piece(given)`. A micro-batch passes its seed; the update passes None."""
        if seed is not None:
            seed_step(seed)
        return piece(given)

    def release(self) -> bool:
        """Free all graphs after running out of memory. Returns True if there were any."""
        return False

    def close(self) -> None:
        """Free the memory of all graphs. Later steps run as they are."""


class Recorded:
    """A piece as a CUDA graph, with the memory that it reads from and writes to."""

    def __init__(
        self,
        piece: Callable[[Any], Any],
        given: Any,
        parameters: Sequence[Tensor],
        pool: Any,
    ) -> None:
        self.parameters = parameters
        self.given = mapped(given, torch.empty_like)
        self.inputs = tensors_in(self.given)
        self.before = [parameter.grad for parameter in parameters]
        self.graph = torch.cuda.CUDAGraph()
        # Other threads copy batches and checkpoints meanwhile.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.outputs = piece(self.given)
        self.after = [parameter.grad for parameter in parameters]

    def replay(self, given: Any, seed: int | None) -> Any:
        torch._foreach_copy_(self.inputs, tensors_in(given))
        for parameter, gradient in zip(self.parameters, self.before, strict=True):
            made = parameter.grad  # by an uncaptured piece, if it is not the graph's own
            if gradient is not None and made is not None and made is not gradient:
                gradient.copy_(made)
        if seed is not None:  # the graph's random states start from the generator's at replay
            torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
        self.graph.replay()
        _set_gradients(self.parameters, self.after)
        return self.outputs


class Recording:
    """The graphs of a step's pieces, in order, for micro-batches of one shape."""

    def __init__(self, attributes: Mapping[str, object], epoch: int) -> None:
        self.pieces: list[Recorded] = []
        self.attributes, self.epoch = attributes, epoch
        self.replays = self.later_epochs = 0

    def count_replay(self, epoch: int) -> bool:
        """Count a replay of a step in `epoch`. Returns True if it must be compared."""
        self.replays += 1
        is_first = epoch > self.epoch and self.later_epochs < LATER_EPOCHS
        if is_first:
            self.epoch, self.later_epochs = epoch, self.later_epochs + 1
        return is_first or self.replays in COMPARED


class Graphs(Eager):
    """Replays the pieces of a step as CUDA graphs, one per micro-batch and one for the update.

    `state` returns the tensors that an update changes. `objects` are the Python objects that a
    piece may change: model and task. `settings` returns the numbers that an update takes from the
    optimizer. A `reason` turns capture off; it is logged unless it is empty.
    """

    def __init__(
        self,
        device: torch.device,
        parameters: Sequence[Tensor],
        state: Callable[[], list[Tensor]],
        objects: Sequence[object],
        settings: Callable[[], Hashable],
        *,
        update: bool,
        deterministic: bool,
        reason: str | None,
    ) -> None:
        self.device, self.parameters, self.state, self.objects = device, parameters, state, objects
        self.settings, self.update, self.deterministic = settings, update, deterministic
        self.recordings: dict[Hashable, Recording] = {}
        self.pool: Any = None  # of memory, shared by all graphs: no two of them run at once
        self.seen: Counter[Hashable] = Counter()
        self.mode, self.at, self.host_reads, self.compiled = EAGER, 0, 0, 0
        self.is_on = reason is None
        if reason:
            log.info("trainer.capture: the steps run uncaptured, because %s", reason)

    def begin(self, micro_batches: Sequence[Any], epoch: int) -> None:
        self.mode, self.at = EAGER, 0
        if not self.is_on:
            return
        if (compiled := _graphs_compiled()) != self.compiled:  # graphs hold the old kernels
            self.compiled = compiled
            self.recordings.clear()
            self.seen.clear()
        self.shape = (self.settings(), *(_shape_of(batch) for batch in micro_batches))
        if self.shape in self.recordings:
            self.recording = self.recordings[self.shape]
            self.mode = COMPARE if self.recording.count_replay(epoch) else REPLAY
            return
        self.seen[self.shape] += 1
        if self.seen[self.shape] > WARM_UP and len(self.recordings) < MOST_SHAPES:
            self.recording = Recording(attributes_of(self.objects), epoch)
            self.mode = RECORD
        elif len(self.seen) > MOST_SEEN:
            self.seen.clear()
            if not self.recordings:
                self._stop("shapes of inputs or settings of the optimizer change at every step")

    def number(self, value: int) -> Tensor:
        return torch.full((), value, device=self.device)

    def run(self, piece: Callable[[T], R], given: T, seed: int | None = None) -> R:
        at, self.at = self.at, self.at + 1
        given = mapped(given, _aligned)
        is_update = seed is None
        mode = EAGER if is_update and not self.update else self.mode
        if mode == REPLAY:
            result: R = self.recording.pieces[at].replay(given, seed)
        elif mode == COMPARE:
            result = self._compare(self.recording.pieces[at], piece, given, seed)
        elif mode == RECORD:
            result = self._record(piece, given, seed)
        else:
            result = super().run(piece, given, seed)
        if is_update and self.mode == RECORD:
            self._keep()
        return result

    def release(self) -> bool:
        had_any = bool(self.recordings) or self.mode == RECORD
        if had_any:
            self._stop("their graphs leave too little memory")
        return had_any

    def close(self) -> None:
        self.is_on, self.mode = False, EAGER
        self.recordings.clear()
        self.recording = Recording({}, 0)

    def _stop(self, reason: str) -> None:
        log.log(
            logging.WARNING if self.recordings else logging.INFO,
            "trainer.capture: the steps run uncaptured from here on, because %s",
            reason,
        )
        self.close()
        torch.cuda.empty_cache()

    def _record(self, piece: Callable[[T], R], given: T, seed: int | None) -> R:
        with host_reads() as reads:
            result, reason = watched(piece, given, seed, self.objects)
        if reason is None and reads:  # another thread, such as a checkpoint's, may wait: allow two
            self.host_reads += 1
            self.mode = EAGER
            reason = f"a step waits for the device ({reads[0]})" if self.host_reads == 3 else None
        if reason is not None:
            self._stop(reason)
        if self.mode == EAGER:
            return result
        gradients, stream = [p.grad for p in self.parameters], torch.cuda.current_stream()
        pieces = self.recording.pieces
        if pieces:
            _set_gradients(self.parameters, pieces[-1].after)
        else:
            if not self.recordings:  # a pool is freed with its last graph
                self.pool = torch.cuda.graph_pool_handle()
            _set_gradients(self.parameters, [None] * len(self.parameters))
        try:
            pieces.append(Recorded(piece, given, self.parameters, self.pool))
        except Exception as error:  # from the model, its compiler or CUDA
            self._recover(stream)
            self._stop(f"a step cannot be recorded ({brief(error.__context__ or error, 200)})")
        finally:
            _set_gradients(self.parameters, gradients)
        return result

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Undo what a failed recording leaves behind: see the comments of CUDAGraph::reset."""
        index = torch.cuda.current_device()
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError):  # if the allocator already left the pool
            torch._C._cuda_endAllocateToPool(index, self.pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())  # else it still expects a recording

    def _keep(self) -> None:
        self.recordings[self.shape] = self.recording
        self.mode, self.host_reads = EAGER, 0
        torch.cuda.empty_cache()
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        own = [s for s in segments if tuple(s["segment_pool_id"]) == tuple(self.pool)]
        extra = sum(segment["total_size"] for segment in own)
        if torch.cuda.mem_get_info()[0] < extra:
            self.release()
            return
        if len(self.recordings) > 1:
            return
        log.info(
            "trainer.capture: the steps are replayed as CUDA graphs, which take %d MiB more memory"
            "%s. The first %d steps of every other window size run uncaptured",
            *(extra >> 20, "" if self.update else "; the optimizer's update is not captured"),
            WARM_UP,
        )

    def _compare(
        self, recorded: Recorded, piece: Callable[[T], R], given: T, seed: int | None
    ) -> R:
        """Run a piece both ways from the same state. Returns the uncaptured result."""
        changed = differing(self.recording.attributes, attributes_of(self.objects))
        gradients = [parameter.grad for parameter in self.parameters]
        tensors = self.state() if seed is None else attribute_tensors(self.objects)
        kept = [*tensors, *(gradient for gradient in gradients if gradient is not None)]
        saved: list[Tensor] = []

        @torch.no_grad()
        def restore() -> None:
            for tensor, copy in zip(kept, saved, strict=False):
                tensor.copy_(copy)
            _set_gradients(self.parameters, gradients)

        def left_by(outputs: object) -> list[Tensor]:
            now = [p.grad for p in self.parameters if p.grad is not None]
            return [*tensors, *now, *tensors_in(outputs)]

        def both_ways() -> tuple[R, str | None]:
            saved.extend(_copies(kept))
            replayed = _copies(left_by(recorded.replay(given, seed)))
            restore()
            result, reason = watched(piece, given, seed, self.objects)
            if reason is None and changed:
                reason = f"{changed} was changed since they were recorded"
            if reason is not None or same(replayed, left_by(result)):
                return result, reason
            noise = 0.0
            if not self.deterministic:
                uncaptured = _copies(left_by(result))
                restore()
                result, _ = watched(piece, given, seed, self.objects)
                noise = distance(uncaptured, left_by(result))
            if distance(replayed, left_by(result)) <= NOISE * noise:
                return result, None
            return result, (
                f"replay {self.recording.replays} differs from the step itself. Those since the "
                "last comparison may differ as well"
            )

        try:
            result, reason = both_ways()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            if reason is not None:
                self._stop(reason)
            return result
        restore()
        saved.clear()
        self.release()
        return super().run(piece, given, seed)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch, or a tuple of values, with `function` applied to its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value.map(function) if hasattr(value, "map") else value


def tensors_in(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, add)
    return found


def watched(
    piece: Callable[[T], R], given: T, seed: int | None, objects: Sequence[object]
) -> tuple[R, str | None]:
    """Run a piece. Returns its result, and the reason why it cannot be captured, or None."""
    before = attributes_of(objects)
    if seed is not None:
        seed_step(seed)
    draws = drawn_on_host()
    result = piece(given)
    drew = drawn_on_host() != draws
    if changed := differing(before, attributes_of(objects)):
        return result, f"a step changes {changed}, which a graph would not"
    drawn = "a step draws from numpy, `random` or torch's generator of the CPU"
    return result, drawn if drew else None


class _Pickler(pickle.Pickler):
    """Writes what an attribute holds. Tensors and modules are compared by identity."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # without it, equal values differ by what else refers to them
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return "tensor", id(value), value._version if value.device.type == "cpu" else 0
        if isinstance(value, nn.Module):
            self.modules.append(value)
            return "module", id(value)
        if isinstance(value, torch.Generator):
            return "generator", value.get_state().numpy().tobytes()
        # A method's object may hold anything, such as the data.
        return ("method", id(value)) if isinstance(value, MethodType) else None


_OF_MODULES = {"_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"}


def _walk(objects: Sequence[object]) -> Iterator[tuple[str, object, list[Tensor]]]:
    """Yield every attribute of the objects and of all modules in them: name, content, tensors."""
    open_, known = [(type(each).__name__, each) for each in objects], {id(each) for each in objects}

    def add(path: str, module: nn.Module) -> None:
        if id(module) not in known:
            known.add(id(module))
            open_.append((path, module))

    while open_:
        path, each = open_.pop()
        if isinstance(each, nn.Module):
            for name, child in each.named_children():
                add(f"{path}.{name}", child)
            for name, buffer in each._buffers.items():
                yield f"{path}.{name}", id(buffer), [] if buffer is None else [buffer]
        for name, value in vars(each).items():
            if isinstance(each, nn.Module) and name in _OF_MODULES:
                continue
            file = io.BytesIO()
            pickler = _Pickler(file)
            content: object = id(value)
            with contextlib.suppress(Exception):  # a lock, a closure, a cycle: anything may raise
                pickler.dump(value)
                content = file.getvalue()
            for module in pickler.modules:
                add(f"{path}.{name}", module)
            yield f"{path}.{name}", content, pickler.tensors


def attributes_of(objects: Sequence[object]) -> dict[str, object]:
    """Return what the attributes of the objects and their modules hold, by name."""
    return {name: content for name, content, _ in _walk(objects)}


def attribute_tensors(objects: Sequence[object]) -> list[Tensor]:
    """Return the tensors that a forward pass may change: buffers, and attributes of modules."""
    found = {id(tensor): tensor for *_, tensors in _walk(objects) for tensor in tensors}
    return [*found.values()]


def differing(before: Mapping[str, object], after: Mapping[str, object]) -> str:
    """Return the first name whose content differs, or "" if there is none."""
    names = {**before, **after}
    return next((name for name in names if before.get(name) != after.get(name)), "")


@contextlib.contextmanager
def host_reads() -> Iterator[list[str]]:
    """Collect where the host waits for the device."""
    found: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for each in caught:
        if "called a synchronizing CUDA operation" in str(each.message):
            found.append(f"{each.filename}:{each.lineno}")
        elif "Synchronization debug mode" not in str(each.message):
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


def same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return True if all tensors have the same bits."""
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        for a, b in zip(some, others, strict=True)
    )


def distance(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference between two lists of tensors, relative to each one's size."""
    if [a.shape for a in some] != [b.shape for b in others]:
        return float("inf")
    found = [0.0]
    for a, b in zip(some, others, strict=True):
        difference, size = (a.double() - b.double()).norm(), b.double().norm()
        found.append(float(difference / size.clamp(min=1e-30)))
    return max(found, key=lambda value: (value != value, value))  # NaN is the largest


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, cloned if misaligned: cuBLAS chooses kernels by the alignment."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _graphs_compiled() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    return compiler.counters["stats"]["unique_graphs"] if compiler else 0


def _shape_of(batch: Any) -> Hashable:
    shapes = [(t.shape, t.stride(), t.dtype) for t in tensors_in(batch)]
    return batch.num_local, batch.num_global, batch.weights is None, *shapes


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _set_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
