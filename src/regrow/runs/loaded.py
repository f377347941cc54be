"""Load trained models from a run's folder, for the scripts and for notebooks.

from regrow.load import load_run
run = load_run("outputs/digits/latest")
found = run.predict("photo.png")  # or an array, a tensor, a folder, a table …
found.names, found.probabilities
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.checkpoint import writer
from regrow.config import older
from regrow.config.foreign import check_roles_of_run, downloads_elsewhere, refuse_remote
from regrow.config.own_modules import import_own_modules
from regrow.config.ranges import check_ranges
from regrow.config.recorded import recorded_config, refuse_other_folder
from regrow.config.rules import RULES, applies, require
from regrow.config.targets import allow, instantiate
from regrow.dotted import Config, leaves
from regrow.errors import UserError, brief, did_you_mean
from regrow.feeding.batch import each
from regrow.feeding.files import without_gone
from regrow.feeding.items import collated
from regrow.feeding.preprocess import Normalizer, Preprocessing, in_units
from regrow.feeding.splits import as_tensor
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast
from regrow.project import ROOT
from regrow.protocols import Inputs
from regrow.randomness import Draws, seed_data, states_kept
from regrow.record import manifest
from regrow.record.records import load_status, read_json
from regrow.runs import machine
from regrow.runs.other_code import naming_code
from regrow.runs.predictions import Predictions, columns_of, joined, kind_of, predictions_of

log = logging.getLogger("regrow")

PREPROCESSING = "preprocessing.json"
CLASS_WEIGHTS = "class_weights"
# Properties of the data that the model depends on. Other data must share them.
OF_THE_MODEL = ("target_kind", "num_classes", "num_outputs", "input_shape", "class_names")
PRECISIONS = ("fp32", "bf16", "fp16")
# Keys of the trainer that the outputs depend on.
OF_THE_TRAINER = (
    *("device", "precision", "channels_last", "num_threads", "tf32", "cudnn_benchmark"),
    "deterministic",
)


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run's model with the weights of one checkpoint, ready to use, and its other objects.

    `predict` takes raw inputs. `model` takes normalised ones, as `data` and `preprocessing` give
    them: called with raw inputs, it returns wrong numbers without an error. The first access to
    `data` reads the data. `preprocessing` and `class_names` need only the folder if the run
    recorded them.

    `config` is a plain dict, `run.config["model"]["hidden"]`: a DictConfig would resolve what a
    foreign folder's values say.
    """

    folder: Path  # resolved, if a link to it was given
    config: dict[str, Any]
    model: nn.Module  # in evaluation mode, on `device`
    task: Any
    checkpoint: str  # the checkpoint's own name, such as step_00000460
    step: int
    value: float | None  # of the monitored metric at that step, if it was measured
    device: torch.device
    precision: str
    recorded: Preprocessing | None  # None: the run did not record it
    class_names: list[str] | None
    target_names: list[str] | None  # of a regression with several targets
    input_names: list[str] | None  # None: an example is one tensor
    typed: list[str]  # the keys of the data that the caller gave

    def __repr__(self) -> str:
        score = (
            "" if self.value is None else f", {self.config['trainer']['monitor']} {self.value:.4g}"
        )
        return (
            f"<run {self.folder}: {type(self.model).__name__}, step {self.step}{score}, on "
            f"{self.device}. run.predict(inputs) predicts; also run.model, run.data, run.task, "
            "run.config>"
        )

    @cached_property
    def data(self) -> Any:
        """The run's data, normalised by the statistics of its training data."""
        data = _data_of(self.config, self.folder, self.typed)
        for note in data.notes:
            log.warning("%s", note)
        if self.recorded is not None:
            data.preprocessing = self.recorded
            data.target_mean = self.recorded.target_mean
            data.target_std = self.recorded.target_std
        return data

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """How raw examples become the model's inputs: as recorded, or else from the data."""
        if self.recorded is not None:
            return self.recorded
        how: Preprocessing = self.data.preprocessing
        return how

    def predict(self, inputs: Any, *, batch_size: int = 256) -> Predictions:
        """Return the predictions for raw `inputs`, after the preprocessing that the run recorded.

        `inputs` is one of: the path of an image, a folder of images, .npy or .csv; a Pillow image;
        an array or tensor of one example or of a batch (N, …), in the data's own raw units; a
        pandas DataFrame or Series with the columns that the run was trained on; a list of paths,
        images or arrays; a list of items, as your own data set gives them. For a model of several
        inputs also a mapping of their names to batches, or a tuple of batches. A forward pass takes
        `batch_size` examples. Raises UserError.
        """
        parts = [self.read_off(*batch) for batch in self.outputs(inputs, batch_size)]
        return joined(parts)

    def outputs(
        self, inputs: Any, batch_size: int, broken: list[str] | None = None
    ) -> Iterator[tuple[list[str], Any]]:
        """Yield names and the model's outputs, such as logits, batch by batch: see `predict`.

        With a list `broken`, images of a folder that cannot be read are left out and listed there.
        """
        draws = Draws(self.config["seed"], "prediction", self.step, 0)
        for number, (names, batch) in enumerate(self._batches(inputs, batch_size, broken)):
            with torch.no_grad(), autocast(self.device, self.precision), states_kept():
                draws.begin(number)
                outputs = call(self.model, each(batch, lambda part: part.to(self.device)))
            # Not inside: the caller's code would have no gradients, autocast and our seeds.
            yield names, outputs

    def _batches(
        self, inputs: Any, batch_size: int, broken: list[str] | None = None
    ) -> Iterator[tuple[list[str], Inputs]]:
        is_own = isinstance(inputs, list) and self.preprocessing.kind == "tensor"
        if is_own and inputs and isinstance(inputs[0], Mapping | tuple):
            yield from self._collated(inputs, batch_size)
            return
        if not self.input_names:
            yield from self.preprocessing.read(inputs, batch_size, broken)
            return
        if isinstance(inputs, Mapping):
            given = {str(name): value for name, value in inputs.items()}
        elif isinstance(inputs, tuple):
            given = {str(place): value for place, value in enumerate(inputs)}
        else:
            given = {}
        if {*given} != {*self.input_names}:
            raise UserError(
                f"inputs: the model takes {', '.join(self.input_names)}. Give a mapping of these "
                "names to batches, or a tuple of batches in this order if they are numbers."
            )
        by_place = self.input_names == [str(place) for place in range(len(given))]
        normalize = Normalizer(self.preprocessing)
        parts = {name: as_tensor(given[name], f"inputs: {name}") for name in self.input_names}
        count, *others = dict.fromkeys(len(part) for part in parts.values())
        if others:
            raise UserError(
                f"inputs: batches of {count} and {others[0]} examples. Give as many each."
            )
        if not count:
            raise UserError("inputs: batches of no examples. Give at least one.")
        for start in range(0, count, batch_size):
            chosen = {name: part[start : start + batch_size] for name, part in parts.items()}
            names = [str(row) for row in range(start, min(start + batch_size, count))]
            yield names, normalize(tuple(chosen.values()) if by_place else chosen)

    def _collated(self, items: list[Any], batch_size: int) -> Iterator[tuple[list[str], Inputs]]:
        """Yield batches of items as the run's own data set gives them, collated as in the run."""
        normalize = Normalizer(self.preprocessing)
        for start in range(0, len(items), batch_size):
            chosen = items[start : start + batch_size]
            names = [str(row) for row in range(start, start + len(chosen))]
            yield names, normalize(collated(chosen, self.data.source.collate))

    def read_off(self, names: list[str], outputs: Any) -> Predictions:
        """Return the predictions that the task reads off the model's `outputs` for a batch."""
        kind = kind_of(self.task)
        found = self.task.predict(outputs)
        if "prediction" not in found:
            raise UserError(
                f"predictions of a task of kind {kind} have no names. Use run.outputs(inputs, "
                "batch_size=256), which yields the model's own."
            )
        source = self.config["data"].get("source")
        columns = source.get("target_columns") if isinstance(source, dict) else None
        of_targets = self.target_names or columns  # earlier versions recorded no names
        classes = columns_of(self.task, found["prediction"], self.class_names, of_targets)
        return predictions_of(names, kind, classes, found)

    def close(self) -> None:
        """End the data's workers, if there are any; the program's exit does so too."""
        if "data" in self.__dict__:
            self.data.close()

    def in_units(self, values: Tensor) -> Tensor:
        """Convert regression outputs (N,) or (N, K) to the targets' own units, as float64."""
        return in_units(values, self.preprocessing.target_mean, self.preprocessing.target_std)


def preprocessing_record(data: Any) -> dict[str, Any]:
    """Return the content of preprocessing.json: what prediction needs of the data."""
    names = {name: getattr(data, name) for name in ("class_names", "target_names")}
    counted = getattr(data, CLASS_WEIGHTS, None)
    more = {} if counted is None else {CLASS_WEIGHTS: counted}
    return {**data.preprocessing.to_dict(), **names, "input_names": data.input_names(), **more}


def load_run(
    folder: str | Path,
    *,
    which: str = "best",
    device: str | None = None,
    data: Mapping[str, Config] | None = None,
) -> LoadedRun:
    """Return the run in `folder`, loaded from the folder alone. The data need not exist.

    `which` names a checkpoint: "best", "last" or a folder such as "step_00000460". If the run
    averaged its weights, the model gets the average. `device` is auto, cpu, cuda or mps; None
    takes the run's own, or the CPU if that is missing. `data` replaces keys of the data, such as
    {"batch_size": 1} or {"source.test_file": "new.csv"}. `close` ends the data's workers. Raises
    UserError for a folder without a run, a missing or damaged checkpoint, or a config with a
    target that does not belong in its place.
    """
    given, folder = Path(folder), Path(folder).resolve()
    config = _config(folder, given)
    if added := older.complete(config):
        log.info("%s", older.line(f"run={given}", added))
    recorded, class_names, target_names, input_names = _recorded(folder, given)
    try:
        class_names = class_names or _names(config["data"].get("class_names"))
    except TypeError as error:
        raise UserError(
            f"run={given}: its config.yaml has data.class_names, and {error}. It is not used."
        ) from None
    if changes := manifest.code_changes(folder, ROOT):
        log.warning("run=%s: %s Its weights run in the code as it is now.", given, changes)
    import_own_modules()
    # `LoadedRun.data` checks the data node: predicting does not read it.
    made = ("model", "task", "loss")
    with naming_code(folder):
        check_roles_of_run(config, made, folder, f"run={given}")
    allow({group: config[group] for group in made})
    swap(config["data"], data or {})
    if downloads_elsewhere(folder, config, data or {}):
        config["data"]["source"]["download"] = False
    if class_names is None and config["task"].get("class_names", ...) is None:
        class_names = _names_in(config, folder, data or {})  # the run did not record them
    if data:
        columns = recorded.columns if recorded is not None else None
        _pin(config["data"], class_names=class_names, feature_columns=columns)
    source = config["data"].get("source")
    if recorded is not None and recorded.vocabulary is not None and isinstance(source, dict):
        source["vocabulary"] = str(folder)  # that of another text would number its tokens otherwise
    path, parts, facts = _checkpoint(folder / "checkpoints", which)
    chosen = _device(device, config["trainer"]["device"])
    model = _model_of(config, parts, folder, which)
    model.to(chosen).eval()
    if config["trainer"]["channels_last"]:
        model.to(memory_format=torch.channels_last)
    task = dict(config["task"])
    if task.get("class_names", ...) is None:
        task["class_names"] = class_names  # the run took them from its data
    if task.get("target_names", ...) is None:
        task["target_names"] = target_names
    with naming_code(folder):
        its_task = instantiate(task, loss=instantiate(_loss_of(config, folder, given)))
    run = LoadedRun(
        folder=folder,
        config=config,
        model=model,
        task=its_task,
        checkpoint=path.name,
        step=facts["step"],
        value=facts.get("value"),
        device=chosen,
        precision=_precision(config["trainer"]["precision"], chosen),
        recorded=recorded,
        class_names=None if class_names is None else [str(name) for name in class_names],
        target_names=task.get("target_names"),
        input_names=input_names,
        typed=[*(data or {})],
    )
    run.task.in_units = run.in_units
    run.task.vocabulary = None if recorded is None else recorded.vocabulary
    return run


def _model_of(
    config: Mapping[str, Any], parts: writer.Parts, folder: Path, which: str
) -> nn.Module:
    """Return the evaluated model with the weights in `parts`, of the checkpoint `which`."""
    node, name = config["model"], ""
    if "_target_" not in node:  # several by name, of which the task evaluates one
        name = str(config["task"].get("evaluates"))
        node = node[name]
    _without_downloads(node)
    # A step may load a frozen model: what is drawn for weights that are replaced must not change
    # what the step draws next.
    with naming_code(folder), states_kept():
        model: nn.Module = instantiate(node)
        _load(model, parts.get(writer.evaluated_part(parts, name), {}), which)
    return model


def _load(model: nn.Module, weights: Mapping[str, Any], which: str) -> None:
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        said = brief(error).partition("state_dict for ")[2] or brief(error)
        reason = said if len(said) <= 200 else f"{said[:198]} …"
        raise UserError(
            f"checkpoint={which}: its weights are not those of the model in config.yaml. {reason}"
        ) from None


def set_numerics(run: LoadedRun) -> None:
    """Set this process's threads and kernels as in the run, whose exact results depend on them.

    For scripts; a notebook keeps its own settings.
    """
    of_training = {"detect_anomaly": False, "compile": False}  # nothing here is compiled
    options = {**run.config["trainer"], "precision": run.precision, **of_training}
    machine.set_numerics(options, run.device)


def swap(data: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Replace keys of a recorded data node.

    Raises UserError for an unknown key, one that the model depends on, and a wrong type.
    """
    source = data.get("source")
    for name, value in new.items():
        *parents, leaf = name.split(".")
        node: Any = data
        for parent in parents:
            node = node.get(parent) if isinstance(node, Mapping) else None
        if not isinstance(node, dict) or leaf not in node or leaf.startswith("_"):
            there = {key: key.split(".")[-1] for key in leaves(data)}
            known = [
                f"data.{key}"
                for key, last in there.items()
                if last not in OF_THE_MODEL and not last.startswith("_")
            ]
            raise UserError(
                f"data.{name}: the run's data has no such key.{did_you_mean(f'data.{name}', known)}"
                f" It has {', '.join(known)}."
            )
        if leaf in OF_THE_MODEL:
            raise UserError(
                f"data.{name} belongs to the trained model and stays {node[leaf]}. "
                "Swap what is read, such as data.root."
            )
        if f"data.{name}" in RULES and applies(node.get("_target_")):
            require(f"data.{name}", value)
        else:
            _check_type(name, value, node[leaf])
        # conf/data interpolates one from the other, so replace both.
        if not parents and isinstance(source, dict) and source.get(leaf, ...) == node[leaf]:
            source[leaf] = value
        node[leaf] = value


def _pin(data: dict[str, Any], **found: Any) -> None:
    """Set null keys to what the run found in its training data, so that other data uses it too."""
    for node in (data, data.get("source")):
        for key, value in found.items():
            if isinstance(node, dict) and key in node and node[key] is None:
                node[key] = value


def _check_type(name: str, value: Any, old: Any) -> None:
    kinds = {bool: "true or false", int: "an integer", float: "a number"}
    kinds |= {str: "text", list: "a list"}
    kind = type(old)
    fits = type(value) in (int, float) if kind is float else type(value) is kind
    if kind in kinds and not fits:
        raise UserError(f"data.{name}={value} must be {kinds[kind]}.")


def _config(folder: Path, given: Path) -> dict[str, Any]:
    refuse_other_folder(folder, given)
    config = recorded_config(folder, f"run={given}")
    groups = ("data", "model", "task", "loss", "trainer")
    # With a custom task that brings its own loss, the node `loss` needs no target.
    needed = {**dict.fromkeys(groups, ("_target_",)), "loss": (), "trainer": OF_THE_TRAINER}
    if config["task"].get("evaluates") in config["model"]:  # one of several models
        needed["model"] = ()
    lost = [
        f"{group}.{key}" for group in groups for key in needed[group] if key not in config[group]
    ]
    if lost:
        raise UserError(f"run={given}: its config.yaml has no {', '.join(lost)}. Is it a run's?")
    if (precision := config["trainer"]["precision"]) not in PRECISIONS:
        raise UserError(
            f"run={given}: its config.yaml has trainer.precision={precision}. It must be one of "
            f"{', '.join(PRECISIONS)}."
        )
    return config


def _recorded(
    folder: Path, given: Path
) -> tuple[Preprocessing | None, list[str] | None, list[str] | None, list[str] | None]:
    """Return the preprocessing, and the names of classes, targets and inputs.

    None for each that is not recorded.
    """
    path = folder / PREPROCESSING
    if not path.is_file():
        return None, None, None, None
    try:
        content: dict[str, Any] = read_json(path)
        content.pop(CLASS_WEIGHTS, None)  # of the loss: see `_loss_of`
        keys = ("class_names", "target_names", "input_names")
        classes, targets, inputs = (_names(content.pop(key, None)) for key in keys)
        return Preprocessing.from_dict(content), classes, targets, inputs
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        log.warning(
            "run=%s: its %s cannot be read (%s): the same is looked for in the data",
            *(given, PREPROCESSING, brief(error, 200)),
        )
        return None, None, None, None


def _loss_of(config: Mapping[str, Any], folder: Path, given: Path) -> Mapping[str, Any]:
    """Return the node of the loss, with the class weights that the run counted in its data."""
    node: Mapping[str, Any] = config["loss"]
    if node.get(CLASS_WEIGHTS) != "balanced":
        return node
    found: Any = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = read_json(folder / PREPROCESSING).get(CLASS_WEIGHTS)
    if not isinstance(found, list) or not all(type(weight) is float for weight in found):
        raise UserError(
            f"run={given}: its {PREPROCESSING} lacks the {CLASS_WEIGHTS} of "
            "loss.class_weights=balanced. Copy the run's folder again."
        )
    return {**node, CLASS_WEIGHTS: found}


def _without_downloads(node: Any) -> None:
    """Set `pretrained` to false in a model's node, and below: the checkpoint has all weights."""
    if isinstance(node, dict):
        if "pretrained" in node:
            node["pretrained"] = False
        for value in node.values():
            _without_downloads(value)


def _names(value: Any) -> list[str] | None:
    """Return `value` if it is None or a list of plain names. Raises TypeError.

    The names become an argument of the task: Hydra would instantiate a node among them.
    """
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(name, str | int) for name in value):
        raise TypeError(f"{str(value)[:80]!r} is not a list of names")
    return value


def _names_in(config: Mapping[str, Any], folder: Path, typed: Iterable[str]) -> list[str] | None:
    try:  # a later use of the data tells of files that are gone
        names: list[str] | None = _data_of(config, folder, typed, tells=False).class_names
    except UserError:
        return None  # the data is missing or another's: classes go by their numbers
    return names


def _data_of(
    config: Mapping[str, Any], folder: Path, typed: Iterable[str], *, tells: bool = True
) -> Any:
    """Return the data, as the run made it. Leaves the global generators as they are."""
    where = f"run={folder}"
    check_roles_of_run(config, ("data",), folder, where)
    refuse_remote(folder, where, config, typed)
    check_ranges({"data": config["data"]})
    allow({"data": config["data"]})
    node = without_gone(config["data"], folder, tells=tells)
    with states_kept():
        seed_data(config["seed"])
        return instantiate(node)


def _device(name: str | None, recorded: str) -> torch.device:
    if name is not None:
        if name not in ("auto", "cpu", "cuda", "mps"):
            raise UserError(f"device={name} must be one of auto, cpu, cuda, mps.")
        try:
            return machine.resolve_device(name)
        except UserError as error:
            raise UserError(str(error).replace("trainer.device", "device")) from None
    try:
        return machine.resolve_device(recorded)
    except UserError:
        log.warning("the run's device, %s, is missing here: using the CPU", recorded)
        return torch.device("cpu")


def _precision(recorded: str, device: torch.device) -> str:
    if recorded == "fp16" and device.type != "cuda":
        log.warning("the run's precision, fp16, needs CUDA: using fp32 on the %s", device.type)
        return "fp32"
    return recorded


def _checkpoint(folder: Path, which: str) -> tuple[Path, writer.Parts, dict[str, Any]]:
    """Return the folder, parts and manifest of a checkpoint, even while a run is rotating them."""
    there = writer.complete(folder)
    names = [name for name in ("best", "last") if writer.named(folder, name).is_dir()]
    names += [path.name for path in there]
    if not names:
        status = load_status(folder.parent) or {"state": "interrupted"}
        raise UserError(
            f"{_shown(folder.parent)}: this run ({status['state']}) has no checkpoint yet. "
            f"Resume it with resume={_shown(folder.parent)}, or name another run."
        )
    if which not in names:
        raise UserError(
            f"checkpoint={which}: {_shown(folder)} has no such checkpoint. "
            f"There is {', '.join(names)}."
        )
    while True:
        path = writer.named(folder, which)
        try:
            return path, *writer.load(path)
        except (writer.DamagedCheckpoint, OSError) as damage:
            if writer.named(folder, which) != path:
                continue  # a newer one replaced it while it was read
            others = [p.name for p in there if p.name != path.name and _is_whole(p)]
            raise UserError(
                f"checkpoint={which}: {damage}. "
                + (f"Choose another: {', '.join(others)}." if others else "No other is whole.")
            ) from None


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(writer.DamagedCheckpoint, OSError):
        return bool(writer.verify(path))
    return False


def _shown(path: Path) -> str:
    here = Path(os.path.realpath(os.curdir))
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
