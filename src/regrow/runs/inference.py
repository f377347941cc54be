"""Use a trained model: evaluate it exactly on a split, and predict for new inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regrow.config.changed_data import change_of_split
from regrow.config.recorded import recorded_config
from regrow.distributed.parallel import World
from regrow.dotted import Config
from regrow.errors import UserError
from regrow.feeding.decoding import fit, size_of
from regrow.feeding.loaders import Data
from regrow.feeding.masks import as_written
from regrow.processes.interrupt import StopRequest
from regrow.randomness import Draws, states_kept
from regrow.record.records import load_status
from regrow.runs.lab import lab
from regrow.runs.loaded import LoadedRun
from regrow.runs.predictions import kind_of

if TYPE_CHECKING:
    from PIL.Image import Image

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


def changed_split(run: LoadedRun, split: str) -> str:
    """Return how a split differs from the one that the run recorded; "" if it does not.

    Reads the split's contents again. Where items cannot be compared, their type and number are.
    Returns "" also for data that are not `regrow.feeding.loaders.Data`.
    """
    if not isinstance(run.data, Data) or split not in run.data.num_examples:
        return ""
    return change_of_split(run.folder, split, run.data.fingerprint(split)[split])


def draws_of(run: LoadedRun, split: str) -> Draws:
    """Return the seeds of the run's own evaluation of these weights; they record any draw."""
    return Draws(run.config["seed"], split, run.step, 0, watch=True)


def other_draws(run: LoadedRun, swapped: Mapping[str, Config]) -> list[str]:
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
    same = {"eval_batch_size", "num_workers", "pin_memory", "cache", "cache_root", "cache_max_gb"}
    if others := sorted({*swapped} - same):
        reasons.append(f"{', '.join(f'data.{key}' for key in others)} may change the batches")
    return reasons


def predict(
    run: LoadedRun, path: Path, batch_size: int, broken: list[str] | None = None
) -> Iterator[dict[str, str]]:
    """Yield the rows of `Predictions` for what is at `path`: an image, a folder, .npy or .csv.

    With a list `broken`, images of a folder that cannot be read are left out and listed there.
    Raises UserError or DataError.
    """
    if kind_of(run.task) == "language":
        raise UserError(
            f"run={run.folder}: a language model continues a text, and a table has one row per "
            f"example. Use scripts/generate.py run={run.folder} prompt=…"
        )
    _refuse_several_inputs(run)
    for names, outputs in run.outputs(path, batch_size, broken):
        _refuse_other_outputs(run, outputs)
        yield from run.read_off(names, outputs).rows()


def predict_masks(
    run: LoadedRun, path: Path, batch_size: int, broken: list[str] | None = None
) -> Iterator[tuple[str, Image]]:
    """Yield a name and a mask, as a PIL image, per example in `path`, for a segmentation.

    A pixel has the value that its class has in the run's own masks. A mask is as large as its image
    file; if the run crops its images (`data.source.resize`), as large as the crop. Names are
    relative to a folder `path`. `broken`: see `predict`.
    """
    _refuse_several_inputs(run)
    how = run.preprocessing
    values = (run.config["data"].get("source") or {}).get("mask_values")
    of_files = path.suffix.lower() != ".npy"
    for names, outputs in run.outputs(path, batch_size, broken):
        _refuse_other_outputs(run, outputs)
        masks = run.task.predict(outputs)["prediction"].cpu()
        for name, classes in zip(names, masks, strict=True):
            mask = as_written(classes, values)
            if of_files and how.resize is None:
                mask = fit(
                    mask, size_of(name, exif_orientation=how.exif_orientation), None, nearest=True
                )
            if of_files:
                name = str(Path(name).relative_to(path if path.is_dir() else path.parent))
            yield name, mask


def gives_rows(task: Any, outputs: Any) -> bool:
    """Return True if each example's output is one row of a table."""
    dimensions = DIMENSIONS.get(kind_of(task), ())
    return isinstance(outputs, Tensor) and outputs.ndim in dimensions


def _refuse_other_outputs(run: LoadedRun, outputs: Any) -> None:
    """Raise UserError for outputs that do not fit one row per example."""
    is_known = kind_of(run.task) in DIMENSIONS
    has_masks = kind_of(run.task) == "segmentation"
    if has_masks and isinstance(outputs, Tensor) and outputs.ndim == 4:
        return
    if gives_rows(run.task, outputs) or not (is_known or has_masks):
        return
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise UserError(
        f"run={run.folder}: the model gives {shape} for a batch, such as a class per "
        "token, and a table has one row per example. Predict in Python: "
        "regrow.load.load_run(run).predict(inputs)."
    )


def _refuse_several_inputs(run: LoadedRun) -> None:
    """Raise UserError for a model with several input tensors: a file holds one array."""
    if run.input_names:
        raise UserError(
            f"run={run.folder}: the model takes several inputs ({', '.join(run.input_names)}), and "
            "input= names one array. Predict in Python: "
            f"regrow.load.load_run(run).predict({{{run.input_names[0]!r}: …}})."
        )
