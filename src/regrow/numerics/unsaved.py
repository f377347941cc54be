"""Name what training changes and no checkpoint holds: a resume would begin with its first value."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)

OF_TORCH = vars(nn.Module())
LIBRARIES = ("torch.", "torchmetrics.")  # whose modules keep nothing that a later step reads
MOST_NAMED = 4
Found = dict[tuple[str, int], object]


class Owner(NamedTuple):
    prefix: str  # of the names
    values: Mapping[str, Any]
    types: tuple[type, ...]  # of the plain values that count
    are_state: bool = False  # parameters or buffers of a module outside the model


class Unsaved:
    """The plain attributes of a run's objects, and their tensors, that a checkpoint lacks.

    A checkpoint holds a model's parameters and buffers. A counter in a Python number, or centres of
    classes in a loss, would begin again after a resume, without an error.
    """

    def __init__(self, model: nn.Module | None = None, **others: Any) -> None:
        """`others` are objects outside the model, by the names under which a user knows them."""
        self.model, self.owners = model, list[Owner]()
        self.before: Found | None = None
        self.is_over = model is None
        try:
            self.owners = [*_all_owners(model, others)]
        except Exception as error:  # attributes of any class may raise anything
            self._give_up(error)

    def look(self) -> None:
        """Warn, once in a process, of values that have changed. Call it at each checkpoint.

        The first call only remembers: what changes before it alone is most likely a cache, such as
        a size that forward keeps.
        """
        if self.is_over:
            return
        try:
            now = self._values()
            before = self.before = now if self.before is None else self.before
            changed = [
                *{key[0]: None for key in now if _differs(before.get(key, now[key]), now[key])}
            ]
        except Exception as error:
            self._give_up(error)
            return
        if changed:
            self.is_over = True
            more = f" and {len(changed) - MOST_NAMED} more" if len(changed) > MOST_NAMED else ""
            log.warning(
                "training changes %s%s, which no checkpoint holds: a resumed run starts from the "
                "initial value. If later steps read it, register it as a buffer of the model, or "
                "compute it from state.step.",
                ", ".join(changed[:MOST_NAMED]),
                more,
            )

    def _give_up(self, error: Exception) -> None:
        self.is_over = True
        log.debug("what no checkpoint holds is not looked for: %r", error)

    def _values(self) -> Found:
        """Return plain values by name. Of a tensor, how often it has been changed in place.

        Another tensor under the same name may be a result that forward keeps to be looked at.
        """
        assert self.model is not None
        saved = {
            id(each) for each in itertools.chain(self.model.parameters(), self.model.buffers())
        }
        found: Found = {}
        for prefix, values, types, are_state in self.owners:
            for name, value in values.items():
                if isinstance(value, Tensor):
                    if id(value) in saved or value.is_inference():
                        continue
                    if are_state:
                        found[f"{prefix}.{name}", 0] = id(value), value._version
                    elif name not in OF_TORCH:
                        found[f"{prefix}.{name}", id(value)] = value._version
                elif type(value) in types and name not in OF_TORCH:
                    found[f"{prefix}.{name}", 0] = value
        return found


def _differs(one: object, other: object) -> bool:
    return one != other and (one == one or other == other)  # NaN has not changed


def _all_owners(model: nn.Module | None, others: Mapping[str, Any]) -> Iterator[Owner]:
    # The check of the first batch notices a number of the model that its outputs depend on. A float
    # is mostly one of the last call, kept to be logged.
    if model is not None:
        yield from _owners_in("model", model, (bool, int))
    for name, outer in others.items():
        outer = outer.func if isinstance(outer, functools.partial) else outer
        parts = outer if isinstance(outer, dict) else getattr(outer, "__dict__", {})
        for key, inner in {"": outer, **parts}.items():
            yield from _owners_of(f"{name}.{key}".rstrip("."), inner)


def _owners_in(prefix: str, model: nn.Module, types: tuple[type, ...]) -> Iterator[Owner]:
    """Yield the modules with a class of one's own that save nothing else."""
    for name, module in model.named_modules():
        kind = type(module)
        saves_more = (
            kind.get_extra_state is not nn.Module.get_extra_state
            or kind._save_to_state_dict is not nn.Module._save_to_state_dict
        )
        if not _is_of_a_library(kind) and not saves_more:
            yield Owner(f"{prefix}.{name}".rstrip("."), vars(module), types)


def _owners_of(prefix: str, owner: Any) -> Iterator[Owner]:
    """Yield an object outside the model, whose parameters and buffers are not saved either."""
    types = (bool, int, float, str)
    if isinstance(owner, nn.Module):
        yield from _owners_in(prefix, owner, types)
        for name, module in owner.named_modules():
            if not type(module).__module__.startswith("torchmetrics."):
                for its in (module._parameters, module._buffers):
                    yield Owner(f"{prefix}.{name}".rstrip("."), its, types, are_state=True)
    elif isinstance(owner, Optimizer) and type(owner).state_dict is not Optimizer.state_dict:
        return  # it may save its attributes
    elif not isinstance(owner, type) and isinstance(its := getattr(owner, "__dict__", None), dict):
        yield Owner(prefix, its, types)


def _is_of_a_library(kind: type) -> bool:
    """Return True if no class of one's own is among the bases: FSDP and others derive from it."""
    modules = [base for base in kind.__mro__ if issubclass(base, nn.Module)]
    return all(base.__module__.startswith(LIBRARIES) for base in modules)
