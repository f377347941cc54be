"""The lab, as the engine calls it: see `regrow.protocols.Lab`."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

from regrow.errors import UserError
from regrow.project import lab_name
from regrow.protocols import Lab

FUNCTIONS = {
    "build": ("build", "check_first_batch", "plan_of"),
    "evaluate": ("measure_split",),
    "loop": ("fit", "summary"),
}


@functools.cache
def lab() -> Lab:
    """Return the functions of the package that the key `lab` names. Raises UserError without it."""
    name = lab_name()
    names = [f"{name}.{module}" for module in FUNCTIONS]
    try:
        modules = [*map(importlib.import_module, names)]
    except ModuleNotFoundError as error:
        if error.name not in (name, *names):
            raise
        raise UserError(
            f"lab={name}: the module {error.name} is missing. Set lab in conf/train.yaml to the "
            "package in src/ that builds and trains a run."
        ) from error
    found = SimpleNamespace()
    lacking = []
    for module, functions in zip(modules, FUNCTIONS.values(), strict=True):
        for function in functions:
            if hasattr(module, function):
                setattr(found, function, getattr(module, function))
            else:
                lacking.append(f"{module.__name__}.{function}")
    if not isinstance(found, Lab):
        raise UserError(
            f"lab={name}: there is no {' and no '.join(lacking)}, which the engine calls. "
            "regrow.protocols.Lab says what it must do."
        )
    return found
