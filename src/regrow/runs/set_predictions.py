"""predictions_<set>.csv: what a run predicts for the examples of a set, beside the truth."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.distributed.parallel import World, stopping_together
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast
from regrow.processes.interrupt import StopRequest
from regrow.protocols import Objects
from regrow.randomness import Draws, states_kept
from regrow.record import output
from regrow.runs import inference
from regrow.runs.predictions import columns_of, predictions_of

log = logging.getLogger(__name__)


def write(
    folder: Path, objects: Objects, name: str, world: World, stop: StopRequest, draws: Draws
) -> None:
    """Write a row per example: its name in the source, targets, and the columns of predictions.

    Every process predicts its share. If the outputs are not one row per example, logs a warning
    and writes nothing.
    """
    parts = _predicted(objects, name, world, stop, draws)
    if not parts:
        log.warning(
            "no predictions are written: a table needs a row per example, of a task whose kind is "
            "multiclass, binary, multilabel or regression"
        )
    elif world.is_main:
        rows = _rows(objects, objects.data.ids(name), parts)
        output.write_csv(rows, folder / f"predictions_{name}.csv", overwrite=True)


@torch.no_grad()
def _predicted(
    objects: Objects, name: str, world: World, stop: StopRequest, draws: Draws
) -> dict[str, Tensor]:
    """Return targets and predictions of all examples, each (N, …) float64; empty if not rows."""
    data, task, model = objects.data, objects.task, objects.state.evaluated
    batches: Any = data.evaluation(
        name, device=world.device, rank=world.rank, world_size=world.size
    )
    parts: dict[str, Tensor] = {}
    model.eval()
    with states_kept():
        for number, batch in enumerate(stopping_together(batches, len(batches), stop, world)):
            draws.begin(number)
            with autocast(world.device, objects.options.precision):
                outputs = call(model, batch.inputs)
            if not inference.gives_rows(task, outputs):
                return {}
            found = {"target": data.in_units(batch.targets), **task.predict(outputs)}
            for part, values in found.items():
                shape = (batches.num_examples, *values.shape[1:])
                whole = parts.setdefault(part, torch.zeros(shape, dtype=torch.float64))
                start = batches.start_of(number)
                whole[start : start + batch.num_local] = values[: batch.num_local].cpu()
    if world.size > 1:  # the other processes' rows are zero here, so that the sum is exact
        parts = {part: world.sum_(its.to(world.device)).cpu() for part, its in parts.items()}
    return parts


def _rows(objects: Objects, ids: Any, parts: Mapping[str, Tensor]) -> Iterator[dict[str, str]]:
    data: Any = objects.data
    task: Any = objects.task
    of_targets = data.target_names
    if task.kind != "regression":
        parts = {**parts, "prediction": parts["prediction"].long()}
    classes = columns_of(task, parts["prediction"], data.class_names, of_targets)
    names = [str(name) for name in ids]
    rows = predictions_of(names, task.kind, classes, parts).rows()
    for row, target in zip(rows, parts["target"], strict=True):
        name = row.pop("input")
        yield {"example": name, **_target(task, target, classes), **row}


def _target(task: Any, target: Tensor, classes: list[str]) -> dict[str, str]:
    if not target.ndim and task.kind != "regression":
        index = int(target)
        return {"target": classes[index] if 0 <= index < len(classes) else str(index)}
    values = target.flatten().tolist()
    if len(values) == 1:
        return {"target": repr(values[0])}
    shown = (lambda value: str(int(value))) if task.kind == "multilabel" else repr
    return {f"target/{name}": shown(v) for name, v in zip(classes, values, strict=True)}
