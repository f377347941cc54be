"""A model's buffers: those outside its state, and those that a skipped step restores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from regrow.numerics.sums import Skipped


def caches(model: nn.Module) -> list[str]:
    """Return the names of the non-persistent buffers, which are not part of the model's state."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    ]


class Buffers:
    """The model's buffers before a step, to restore them if the step is skipped.

    A forward pass updates BatchNorm's statistics before the step is known to be bad. Caches that it
    replaced with another shape stay: the model may have stored their size.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {
            id(buffer): (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel()
        }
        # Remember places, not just tensors: `self.count = self.count + 1` in forward makes a new
        # tensor.
        self.places = [*found.values()]
        self.caches = {
            (id(module._buffers), name)
            for module in model.modules()
            for name in module._non_persistent_buffers_set
        }
        self.buffers = self._now()
        self.before = [buffer.detach().clone() for buffer in self.buffers]

    def _now(self) -> list[Tensor]:
        return [buffers[name] for buffers, name in self.places]  # type: ignore[misc]

    def _leave_out_grown(self) -> None:
        """Forget the caches that are gone or have changed shape."""
        if not self.caches:
            return
        kept = []
        for index, (buffers, name) in enumerate(self.places):
            now = buffers.get(name)
            is_cache = (id(buffers), name) in self.caches
            if not is_cache or (now is not None and now.shape == self.before[index].shape):
                kept.append(index)
        self.places = [self.places[index] for index in kept]
        self.buffers = [self.buffers[index] for index in kept]
        self.before = [self.before[index] for index in kept]

    def remember(self) -> None:
        self._leave_out_grown()
        if self.places:
            self.buffers = self._now()
            with torch.no_grad():
                torch._foreach_copy_(self.before, self.buffers)

    def restore(self, skipped: Skipped) -> None:
        if skipped is not False:
            self._leave_out_grown()
            if self.places:
                self._put_back(skipped)

    @torch.no_grad()
    def _put_back(self, skipped: Skipped) -> None:
        if isinstance(skipped, Tensor):
            bad = skipped.bool()
            rows = zip(self.places, self._now(), self.buffers, self.before, strict=True)
            for (buffers, name), now, buffer, before in rows:
                chosen = torch.where(bad, before, now)
                buffers[name] = buffer.copy_(chosen) if now is buffer else chosen
        else:
            torch._foreach_copy_(self.buffers, self.before)
            for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
                buffers[name] = buffer
