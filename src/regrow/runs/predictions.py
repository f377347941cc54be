"""predictions_<set>.csv: what a run predicts for the examples of a set, beside the truth."""

from __future__ import annotations

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


def write(
    folder: Path,
    config: Mapping[str, Any],
    objects: Objects,
    name: str,
    world: World,
    stop: StopRequest,
    draws: Draws,
) -> bool:
    """Write a row per example: its name in the source, targets, and `inference.predict`'s columns.

    Every process predicts its share. Returns False, and writes nothing, if the outputs are not one
    row per example.
    """
    data: Any = objects.data
    parts = _predicted(objects, name, world, stop, draws)
    if parts and world.is_main:
        rows = _rows(config, objects, data.ids(name), parts, folder)
        output.write_csv(rows, folder / f"predictions_{name}.csv", overwrite=True)
    return bool(parts)


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


def _rows(
    config: Mapping[str, Any],
    objects: Objects,
    ids: Any,
    parts: Mapping[str, Tensor],
    folder: Path,
) -> Iterator[dict[str, str]]:
    task: Any = objects.task
    names, source = objects.data.class_names, config["data"].get("source")
    predicted = inference.columns_of(task, names, source, folder)
    for index, name in enumerate(ids):
        one = {part: values[index] for part, values in parts.items()}
        yield {"example": str(name), **_target(task, one, names, source), **predicted(one)}


def _target(
    task: Any, one: Mapping[str, Tensor], names: list[str] | None, source: Any
) -> dict[str, str]:
    values = one["target"]
    if task.kind == "regression" or (values.ndim and task.kind == "multiclass"):  # soft targets
        return inference.values_of("target", values, source)
    if task.kind == "multilabel":
        named = names or [str(index) for index in range(len(values))]
        return {f"target/{n}": str(int(v)) for n, v in zip(named, values.tolist(), strict=True)}
    index = int(values)
    return {"target": names[index] if names and 0 <= index < len(names) else str(index)}
