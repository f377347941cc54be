"""A model's buffers: those outside its state, and those that a skipped step restores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from regrow.errors import UserError
from regrow.numerics.totals import Skipped

SKIPPED = Skipped(True)
OURS = 1  # reference to a storage, held by the count of its references
ALIGNMENT = 64  # bytes: a vector of any CPU, and more than a GPU's kernels ask for
Place = tuple[dict[str, Tensor | None], str]  # a module's buffers, and a name


def caches(model: nn.Module) -> list[str]:
    """Return the names of the non-persistent buffers, which are not part of the model's state."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    ]


class Buffers:
    """The model's buffers before a step, to restore them if the step is skipped.

    A forward pass updates BatchNorm's statistics before the step is known to be bad. With `flat`,
    buffers of one dtype become views of one tensor, so that saving and restoring takes one
    operation for all of them. Caches (non-persistent buffers) are restored too, except one that
    forward replaces with another shape: the model may have stored its size. A buffer that two
    modules register stays one buffer if forward rebinds it in one of them.
    """

    def __init__(self, model: nn.Module, *, flat: bool = False) -> None:
        # Keep (module's dict, name), not only the tensor: forward may rebind the name, as
        # `self.count = self.count + 1` does.
        self.places: list[Place] = []
        self.caches: list[Place] = []
        self.names: list[str] = []  # of `places`
        for prefix, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if name not in module._non_persistent_buffers_set:
                    self.places.append((module._buffers, name))
                    self.names.append(f"{prefix}.{name}".lstrip("."))
                elif buffer.numel():
                    self.caches.append((module._buffers, name))
        self.buffers = [_at(place) for place in self.places]
        distinct = {id(buffer): buffer for buffer in self.buffers if buffer.numel()}
        movable = {id(buffer) for buffer in _movable(distinct.values())} if flat else set()
        self.now = [buffer for key, buffer in distinct.items() if key not in movable]
        self.now += _flat([buffer for key, buffer in distinct.items() if key in movable])
        self.before = [buffer.detach().clone() for buffer in self.now]
        self.caches_before = [_at(place).detach().clone() for place in self.caches]

    def check_shapes(self) -> None:
        """Raise UserError if forward changed a shape: a resume could not load the checkpoint.

        `remember` and `restore` look too, but the last step before a checkpoint has no next one.
        """
        for (buffers, name), buffer, full in zip(
            self.places, self.buffers, self.names, strict=True
        ):
            if (now := buffers.get(name)) is not None and now.shape != buffer.shape:
                raise UserError(
                    f"model: forward changed the buffer {full} from shape {list(buffer.shape)} to "
                    f"{list(now.shape)}, so that a checkpoint could not be loaded. Register it in "
                    "its final shape, or with persistent=False."
                )

    def _keep_tensors(self) -> None:
        """Where forward rebound a buffer, copy the new value into the original and rebind to it.

        Raises UserError for a new shape.
        """
        for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
            if (now := buffers.get(name)) is not buffer and now is not None:
                if now.shape != buffer.shape:
                    self.check_shapes()
                buffers[name] = buffer.copy_(now)

    def _leave_out_changed(self) -> None:
        """Forget the caches that are gone or have changed shape."""
        kept = [
            (place, before)
            for place, before in zip(self.caches, self.caches_before, strict=True)
            if (now := place[0].get(place[1])) is not None and now.shape == before.shape
        ]
        self.caches = [place for place, _ in kept]
        self.caches_before = [before for _, before in kept]

    def remember(self) -> None:
        if not self.places and not self.caches:
            return
        with torch.no_grad():
            self._keep_tensors()
            _copy(self.before, self.now)
            if self.caches:
                self._leave_out_changed()
                _copy(self.caches_before, [_at(place) for place in self.caches])

    def restore(self, skipped: Skipped = SKIPPED) -> None:
        """Restore the buffers.

        If only the device knows whether the step was skipped, it selects old or new values.
        """
        if skipped.update is False:
            return
        if skipped.is_known:
            for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
                buffers[name] = buffer
        with torch.no_grad():
            if not skipped.is_known:
                self._keep_tensors()
            self._leave_out_changed()
            pairs = [*zip(self.now, self.before, strict=True)]
            pairs += [
                (_at(p), before) for p, before in zip(self.caches, self.caches_before, strict=True)
            ]
            for now, before in pairs:
                skipped.restore_(now, before)


def _at(place: Place) -> Tensor:
    buffer = place[0][place[1]]
    assert buffer is not None
    return buffer


def _movable(buffers: Iterable[Tensor]) -> list[Tensor]:
    """Return those whose memory no other tensor shares, such as a view that the model keeps.

    Several may be parts of one memory, as they are after an earlier `Buffers` of the same model.
    """
    sharing: dict[int, list[Tensor]] = {}
    for buffer in buffers:
        if type(buffer) is Tensor and buffer.layout == torch.strided and buffer.is_contiguous():
            sharing.setdefault(buffer.untyped_storage()._cdata, []).append(buffer)
    return [
        buffer
        for memory, parts in sharing.items()
        if torch._C._storage_Use_Count(memory) == len(parts) + OURS and not _overlap(parts)
        for buffer in parts
    ]


def _overlap(parts: list[Tensor]) -> bool:
    """Return True if two contiguous parts of one memory have a byte in common."""
    ends = sorted((part.data_ptr(), part.data_ptr() + part.nbytes) for part in parts)
    return any(end > start for (_, end), (start, _) in itertools.pairwise(ends))


def _flat(buffers: list[Tensor]) -> Iterator[Tensor]:
    """Make the buffers of each dtype and device views of one flat tensor; yield these tensors."""
    for dtype, device in dict.fromkeys((buffer.dtype, buffer.device) for buffer in buffers):
        group = [buffer for buffer in buffers if (buffer.dtype, buffer.device) == (dtype, device)]
        unit = ALIGNMENT // dtype.itemsize
        starts = [0, *itertools.accumulate(-(-b.numel() // unit) * unit for b in group)]
        flat = torch.zeros(starts[-1], dtype=dtype, device=device)
        for start, buffer in zip(starts, group, strict=False):
            view = flat[start : start + buffer.numel()].view(buffer.shape)
            buffer.data = view.copy_(buffer)
        yield flat


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
