"""A model's buffers: those outside its state, and those that a skipped step restores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from regrow.numerics.totals import Skipped

SKIPPED = Skipped(True)
ALONE = 2  # references to a storage that one tensor uses: the tensor's and ours
ALIGNMENT = 64  # bytes: a vector of any CPU, and more than a GPU's kernels ask for


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
    operation for all of them. Caches that forward replaces with another shape are left out: the
    model may have stored their size.
    """

    def __init__(self, model: nn.Module, *, flat: bool = False) -> None:
        found = {
            id(buffer): (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel()
        }
        caches = {
            (id(module._buffers), name)
            for module in model.modules()
            for name in module._non_persistent_buffers_set
        }
        # Remember places, not just tensors: `self.count = self.count + 1` in forward makes a new
        # tensor.
        self.caches = [place for place in found.values() if (id(place[0]), place[1]) in caches]
        self.places = [place for place in found.values() if (id(place[0]), place[1]) not in caches]
        self.buffers = [_at(place) for place in self.places]
        movable = {id(buffer) for buffer in self.buffers if flat and _owns_its_memory(buffer)}
        self.now = [buffer for buffer in self.buffers if id(buffer) not in movable]
        self.now += _flat([buffer for buffer in self.buffers if id(buffer) in movable])
        self.before = [buffer.detach().clone() for buffer in self.now]
        self.caches_before = [_at(place).detach().clone() for place in self.caches]

    def _take_in(self) -> None:
        """Put the values of buffers that forward replaced into the buffers that it replaced."""
        for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
            if (now := buffers[name]) is not buffer and now is not None:
                buffers[name] = buffer.copy_(now)

    def _leave_out_grown(self) -> None:
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
            self._take_in()
            _copy(self.before, self.now)
            if self.caches:
                self._leave_out_grown()
                _copy(self.caches_before, [_at(place) for place in self.caches])

    def restore(self, skipped: Skipped = SKIPPED) -> None:
        """Restore the buffers, or do so on the device if it finds that the step was skipped."""
        if skipped.update is False:
            return
        if skipped.is_known:
            for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
                buffers[name] = buffer
        with torch.no_grad():
            if not skipped.is_known:
                self._take_in()
            self._leave_out_grown()
            pairs = [*zip(self.now, self.before, strict=True)]
            pairs += [
                (_at(p), before) for p, before in zip(self.caches, self.caches_before, strict=True)
            ]
            for now, before in pairs:
                skipped.restore_(now, before)


def _at(place: tuple[dict[str, Tensor | None], str]) -> Tensor:
    buffer = place[0][place[1]]
    assert buffer is not None
    return buffer


def _owns_its_memory(buffer: Tensor) -> bool:
    """Return True if no other tensor, such as a view that the model keeps, shares the memory."""
    return (
        type(buffer) is Tensor
        and buffer.layout == torch.strided
        and buffer.is_contiguous()
        and torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) == ALONE
    )


def _flat(buffers: list[Tensor]) -> Iterator[Tensor]:
    """Move the buffers of each dtype into one tensor, as its views, and yield these tensors."""
    for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
        group = [buffer for buffer in buffers if buffer.dtype == dtype]
        unit = ALIGNMENT // dtype.itemsize
        starts = [0, *itertools.accumulate(-(-b.numel() // unit) * unit for b in group)]
        flat = torch.zeros(starts[-1], dtype=dtype, device=group[0].device)
        for start, buffer in zip(starts, group, strict=False):
            view = flat[start : start + buffer.numel()].view(buffer.shape)
            buffer.data = view.copy_(buffer)
        yield flat


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
