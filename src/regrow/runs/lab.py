"""The lab, as the engine calls it: see `regrow.protocols.Lab`."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import cast

from regrow.errors import UserError
from regrow.project import lab_name
from regrow.protocols import Lab


@functools.cache
def lab() -> Lab:
    """Return the functions of the package that the key `lab` names. Raises UserError without it."""
    name = lab_name()
    names = [f"{name}.{module}" for module in ("build", "evaluate", "loop")]
    try:
        build, evaluate, loop = map(importlib.import_module, names)
    except ModuleNotFoundError as error:
        if error.name not in (name, *names):
            raise
        raise UserError(
            f"lab={name}: the module {error.name} is missing. Set lab in conf/train.yaml to the "
            "package in src/ that builds and trains a run."
        ) from error
    functions = SimpleNamespace(
        build=build.build,
        check_first_batch=build.check_first_batch,
        plan_of=build.plan_of,
        fit=loop.fit,
        summary=loop.summary,
        measure_split=evaluate.measure_split,
    )
    return cast(Lab, functions)
