"""Explain an error that the user's model, task or loss raises when it is first called."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from regrow.config.own_code import own_place, owner_of, places_of, shown
from regrow.config.targets import SHOWS_ALL, named_packages, typed_below
from regrow.distributed.parallel import lost_the_others
from regrow.errors import OwnCodeError, UserError, in_a_line, machine_fault
from regrow.feeding.batch import LoadedBatch
from regrow.numerics import calls
from regrow.numerics.calls import is_out_of_memory

MOST = 400  # characters of an error's text
MOST_CODE = 100  # of a line of code, or of a layer


@contextlib.contextmanager
def explained(is_first: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Raise OwnCodeError, of one line, for an error that the user's code raises inside.

    Adds no cost on success. Lets through errors of the engine and the machine, and every error once
    `is_first()` is False.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError | FloatingPointError) or not is_first():
            raise
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        if lost_the_others(error) or machine_fault(error) is not None:
            raise
        if (said := in_words(error)) is None:
            raise
        raise OwnCodeError(said) from error


def in_words(error: BaseException) -> str | None:
    """Return place, code, error and shapes in one line; None if the engine raised the error."""
    modules = _modules(error)
    if (own := own_place(error, named_packages())) is not None:
        layer = f" ({_layer(modules)})" if modules else ""
        where = f"{own}, in {own.name}{layer}: {_cut(own.text, MOST_CODE)}"
    elif modules and _deepest_of_ours(error) == calls.__file__:  # only library modules ran
        where = _class_of(modules) + (f": {_layer(modules)}" if len(modules) > 1 else "")
    else:
        return None
    text = _cut(in_a_line(error), MOST).rstrip(".")
    kind = type(error).__name__
    said = f"{kind}: {text}" if text else kind
    typed = typed_below("model", error)
    set_to = [f"Set by the command: {typed}."] if typed else []
    return " ".join([f"{where}: {said}.", *_shapes(error), SHOWS_ALL, *set_to])


def _deepest_of_ours(error: BaseException) -> str | None:
    return next((p.file for p in places_of(error) if owner_of(p.file) == "engine"), None)


def _modules(error: BaseException) -> list[nn.Module]:
    """Return the nn.Modules of the innermost run of library frames, outermost first.

    These are the layers that the deepest frame of the user's or the engine's was calling.
    """
    named, found = named_packages(), []
    for place in itertools.takewhile(
        lambda place: owner_of(place.file, named) == "library", places_of(error)
    ):
        module = place.frame.f_locals.get("self")
        if place.name == "_call_impl" and isinstance(module, nn.Module):
            found.append(module)
    return found[::-1]


def _layer(modules: Sequence[nn.Module]) -> str:
    """Return the last of `modules`, each inside the one before, and its name within the first."""
    inner = modules[-1]
    name = next((name for name, module in modules[0].named_modules() if module is inner), "")
    text = repr(inner)
    text = type(inner).__name__ if "\n" in text else _cut(text, MOST_CODE)
    return f"layer {name}, {text}" if name else text


def _class_of(modules: Sequence[nn.Module]) -> str:
    """Return the innermost class that the user wrote, with its file and line; "model" if none."""
    for module in reversed(modules):
        kind = type(module)
        with contextlib.suppress(OSError, TypeError):
            file = inspect.getsourcefile(kind)
            if file and owner_of(file, named_packages()) == "own":
                return f"{shown(file)}:{inspect.getsourcelines(kind)[1]}, {kind.__name__}"
    return "model"


def _shapes(error: BaseException) -> Iterator[str]:
    """Yield at most one sentence with the shapes.

    Those of the inputs if the model failed; of inputs, outputs and targets if the loss or task did.
    """
    outputs, named = "", named_packages()
    for place in places_of(error):
        if owner_of(place.file, named) == "library":
            continue
        found = place.frame.f_locals
        if place.file == calls.__file__ and "inputs" in found:
            yield f"The inputs had shape {_shape(found['inputs'])}."
            return
        # The frame of the batch comes last: a loss may have given the name to something else.
        outputs = _shape(found.get("outputs")) or outputs
        batch = next((v for v in found.values() if isinstance(v, LoadedBatch)), None)
        if batch is not None:
            parts = {"outputs": outputs, "targets": _shape(batch.targets)}
            more = "".join(f", the {name} {shape}" for name, shape in parts.items() if shape)
            yield f"The inputs had shape {_shape(batch.inputs)}{more}."
            return


def _shape(value: Any) -> str:
    """Return the shape of a tensor, or those of several; "" for anything else."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shape}" for name, v in value.items() if (shape := _shape(v)))
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(_shape, value)))
    return ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]} …"
