"""Name what training changes and no checkpoint holds: a resume would begin with its first value."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

log = logging.getLogger(__name__)

OF_TORCH = {*vars(nn.Module()), "training"}
LIBRARIES = ("torch.", "torchmetrics.")  # whose modules keep nothing that a later step reads
Owner = tuple[
    str, Mapping[str, Any], bool
]  # a prefix of names, values, and whether all are buffers


class Unsaved:
    """The plain attributes of a run's objects, and their tensors, that a checkpoint lacks.

    A checkpoint holds a model's parameters and buffers. A counter in a Python number, or centres of
    classes in a loss, would begin again after a resume, without an error.
    """

    def __init__(self, model: nn.Module | None = None, **others: Any) -> None:
        """`others` are objects outside the model, by the names under which a user knows them."""
        self.owners = [] if model is None else [*_owners_in("model", model)]
        for name, outer in others.items():
            outer = outer.func if isinstance(outer, functools.partial) else outer
            parts = outer if isinstance(outer, dict) else getattr(outer, "__dict__", {})
            for key, inner in {"": outer, **parts}.items():
                self.owners += _owners_of(f"{name}.{key}".rstrip("."), inner)
        self.before: dict[tuple[str, int], object] | None = None
        self.has_told = False

    def look(self) -> None:
        """Warn, once in a process, of values that have changed. Call it at each checkpoint.

        The first call only remembers: what changes before it alone is most likely a cache, such as
        a size that forward keeps.
        """
        if self.has_told:
            return
        now = self._values()
        if self.before is None:
            self.before = now
        before = self.before
        if changed := {key[0]: None for key in now if before.get(key, now[key]) != now[key]}:
            self.has_told = True
            log.warning(
                "%s: training changes it, and no checkpoint holds it, so a resumed run would begin "
                "with its first value. Make it a buffer of the model, or compute it from the step.",
                ", ".join([*changed][:4]),
            )

    def _values(self) -> dict[tuple[str, int], object]:
        """Return plain values by name. Of a tensor, how often it has been changed in place.

        Another tensor under the same name may be a result that forward keeps to be looked at.
        """
        found: dict[tuple[str, int], object] = {}
        for prefix, values, are_buffers in self.owners:
            for name, value in values.items():
                if are_buffers:
                    found[f"{prefix}.{name}", 0] = id(value), getattr(value, "_version", 0)
                elif name in OF_TORCH:
                    continue
                elif isinstance(value, (bool, int, float, str)):
                    found[f"{prefix}.{name}", 0] = value
                elif isinstance(value, Tensor) and not value.is_inference():
                    found[f"{prefix}.{name}", id(value)] = value._version
        return found


def _owners_in(prefix: str, model: nn.Module) -> Iterator[Owner]:
    """Yield the modules with a class of one's own that save no extra state."""
    for name, module in model.named_modules():
        kind = type(module)
        saves_more = kind.get_extra_state is not nn.Module.get_extra_state
        if not kind.__module__.startswith(LIBRARIES) and not saves_more:
            yield f"{prefix}.{name}".rstrip("."), vars(module), False


def _owners_of(prefix: str, owner: Any) -> Iterator[Owner]:
    """Yield an object outside the model, whose parameters and buffers are not saved either."""
    if not isinstance(owner, nn.Module):
        if not isinstance(owner, type) and (values := getattr(owner, "__dict__", None)):
            yield prefix, values, False
        return
    yield from _owners_in(prefix, owner)
    for name, module in owner.named_modules():
        if not type(module).__module__.startswith(LIBRARIES):
            yield f"{prefix}.{name}".rstrip("."), module._buffers, True
