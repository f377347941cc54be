"""Use a trained model: evaluate it exactly on a split, and predict for new inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.config.recorded import recorded_config
from regrow.distributed.parallel import World
from regrow.errors import UserError
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast
from regrow.processes.interrupt import StopRequest
from regrow.randomness import Draws, states_kept
from regrow.record.records import load_status
from regrow.runs.lab import lab
from regrow.runs.loaded import LoadedRun

# The dimensions of a batch of outputs that has one row per example, by kind of task.
DIMENSIONS = {"multiclass": (2,), "multilabel": (2,), "binary": (1, 2), "regression": (1, 2)}


def evaluate(run: LoadedRun, split: str, draws: Draws | None = None) -> dict[str, float]:
    """Return the run's metrics over a split, such as "test/accuracy", without augmentation.

    A model that draws random numbers draws the same ones as in the run's own evaluation.
    """
    batches = run.data.evaluation(split, device=run.device)
    draws = draws or draws_of(run, split)
    with states_kept():
        values, _ = lab().measure_split(
            *(run.model, run.task, batches, World(run.device), run.precision, draws),
            stop=StopRequest(),
            bar=split,
        )
    return {f"{split}/{name}": value for name, value in values.items()}


def draws_of(run: LoadedRun, split: str) -> Draws:
    """Return the seeds of the run's own evaluation of these weights; they record any draw."""
    return Draws(run.config["seed"], split, run.step, 0, watch=True)


def other_draws(run: LoadedRun, swapped: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a model that draws may draw different numbers than in its run."""
    config = recorded_config(run.folder, str(run.folder))
    recorded = config["data"]
    reasons = []
    if "ema_warmup" not in config["trainer"]:  # added in the version that seeds evaluations
        reasons.append("the run is older than seeded evaluations")
    status = load_status(run.folder) or {}
    if (processes := len(status.get("pids", ()))) > 1:
        reasons.append(f"the run had {processes} processes and this is one")
    before, now = (node.get("eval_batch_size") for node in (recorded, run.config["data"]))
    if before != now:
        reasons.append(f"data.eval_batch_size was {before} and is {now}")
    if others := sorted({*swapped} - {"eval_batch_size", "num_workers", "pin_memory"}):
        reasons.append(f"{', '.join(f'data.{key}' for key in others)} may change the batches")
    return reasons


def predict(run: LoadedRun, path: Path, batch_size: int) -> Iterator[dict[str, str]]:
    """Yield a row of text per example in `path`: an image, a folder, .npy or .csv.

    The columns are `input`, then by task:
    multiclass: `prediction` (the name) and `probability/<class>`;
    binary: `prediction` and `probability` (of the second class);
    multilabel: `predicted/<label>` (1 or 0) and `probability/<label>`;
    regression: `prediction` in the targets' own units, or `prediction/<target>` for several.
    Numbers have all digits of a float64. Raises UserError or DataError.
    """
    _refuse_several_inputs(run)
    row = columns_of(run.task, run.class_names, run.config["data"].get("source"), run.folder)
    draws = Draws(run.config["seed"], "prediction", run.step, 0)
    for number, (names, inputs) in enumerate(run.preprocessing.read(path, batch_size)):
        with torch.no_grad(), autocast(run.device, run.precision), states_kept():
            draws.begin(number)
            outputs = call(run.model, inputs.to(run.device))
        _refuse_other_outputs(run, outputs)
        found = {key: value.cpu() for key, value in run.task.predict(outputs).items()}
        for index, name in enumerate(names):
            one = {key: value[index] for key, value in found.items()}
            yield {"input": name, **row(one)}


def gives_rows(task: Any, outputs: Any) -> bool:
    """Return True if each example's output is one row of a table."""
    dimensions = DIMENSIONS.get(getattr(task, "kind", ""), ())
    return isinstance(outputs, Tensor) and outputs.ndim in dimensions


def _refuse_other_outputs(run: LoadedRun, outputs: Any) -> None:
    """Raise UserError for outputs that do not fit one row per example."""
    if run.task.kind not in DIMENSIONS or gives_rows(run.task, outputs):
        return
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise UserError(
        f"run={run.folder}: the model gives {shape} for a batch, such as a class per pixel or "
        "token, and a table has one row per example. Use the model from Python: "
        "regrow.load.load_run(run).model(inputs)."
    )


def _refuse_several_inputs(run: LoadedRun) -> None:
    """Raise UserError for a model with several input tensors: a file holds one array."""
    if run.input_names:
        raise UserError(
            f"run={run.folder}: the model takes several inputs ({', '.join(run.input_names)}), and "
            "input= names one array. Use the model from Python: "
            "regrow.load.load_run(run).model(**inputs)."
        )


def columns_of(
    task: Any, class_names: list[str] | None, source: Any, folder: Path
) -> Callable[[dict[str, Tensor]], dict[str, str]]:
    """Return the function from one example's prediction to its columns, for the task of a run."""
    kind = task.kind
    if kind == "regression":
        return lambda one: values_of("prediction", one["prediction"], source)
    count = 2 if kind == "binary" else task.num_classes
    names = class_names or [str(index) for index in range(count)]

    def multiclass(one: dict[str, Tensor]) -> dict[str, str]:
        shares = zip(names, one["probability"].tolist(), strict=True)
        row = {f"probability/{name}": repr(share) for name, share in shares}
        return {"prediction": names[int(one["prediction"])], **row}

    def binary(one: dict[str, Tensor]) -> dict[str, str]:
        share = one["probability"].item()
        return {"prediction": names[int(one["prediction"])], "probability": repr(share)}

    def multilabel(one: dict[str, Tensor]) -> dict[str, str]:
        chosen = zip(names, one["prediction"].tolist(), strict=True)
        shares = zip(names, one["probability"].tolist(), strict=True)
        row = {f"predicted/{name}": str(int(value)) for name, value in chosen}
        return row | {f"probability/{name}": repr(share) for name, share in shares}

    kinds = {"multiclass": multiclass, "binary": binary, "multilabel": multilabel}
    if kind not in kinds:
        raise UserError(f"run={folder}: predictions of a task of kind {kind} have no columns.")
    return kinds[kind]


def values_of(what: str, numbers: Tensor, source: Any) -> dict[str, str]:
    """Return the cells of one example's numbers, named after the target's columns if several."""
    values = numbers.flatten().tolist()
    if len(values) == 1:
        return {what: repr(values[0])}
    columns = source.get("target_columns") if isinstance(source, dict) else None
    names = columns if columns and len(columns) == len(values) else range(len(values))
    return {f"{what}/{name}": repr(v) for name, v in zip(names, values, strict=True)}
