"""How the lab and the engine meet. The engine calls the lab through these Protocols alone.

Shapes: B examples of a batch, N examples of a split. Errors: any of these may raise UserError, in
one line that names the key, the value and the fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.dotted import Config as Config

if TYPE_CHECKING:
    from regrow.checkpoint.writer import CheckpointOptions, CheckpointWriter
    from regrow.config.older import AddedKey, EarlierDefault
    from regrow.distributed.parallel import World
    from regrow.processes.interrupt import StopRequest
    from regrow.randomness import Draws

# A lab for version n works with every engine of version n; `make update` refuses others. Raise it
# when a lab must change, and say how in docs/migrations.md.
VERSION = 1

Inputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # (B, …): a model's arguments
# (B, …); for several heads, one tensor each, by name or by position
Targets: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Outputs: TypeAlias = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # what a model returns
Parts: TypeAlias = dict[str, dict[str, object]]  # of a checkpoint: tensors and plain containers


class Store(Protocol):
    def table(self, seed: int, epoch: int) -> Tensor:
        """Return an epoch's random choices, (N, …) on the CPU, row i for example i.

        Called with further seeds if an epoch draws an example several times.
        """
        ...

    def gather(self, indices: Tensor, table: Tensor) -> Tensor:
        """Return augmented examples at `indices` (B,), given the table's rows at `indices`."""
        ...


class Augmentation(Protocol):
    """An augmentation in memory.

    An attribute `only_moves_pixels = True` promises that it treats all channels alike and fills
    gaps with zeros. Then masks may be an extra channel, and move with their images.
    """

    def store(self, images: Tensor) -> Store:
        """Return a store of `images`, (N, C, H, W) uint8."""
        ...


class Batch(Protocol):
    """This process's share of one optimizer step, on the device."""

    inputs: Inputs
    targets: Targets
    weights: Tensor | None  # (B,), per example; None: all one
    num_local: int  # examples in this share; an empty share holds one example of weight zero
    num_global: int  # examples in the step, over all processes
    first: int  # the position of this share's first example among them

    def split(self, slices: int) -> Sequence[Batch]:
        """Return at most `slices` micro-batches of nearly equal size, in order."""
        ...


class TrainBatches(Protocol):
    """This process's share of the training split."""

    num_examples: int  # of the split, over all processes
    steps_per_epoch: int  # optimizer steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch, a function of (seed, epoch), from step `start` on."""
        ...


class EvalBatches(Protocol):
    """This process's share of an evaluation split, each example once."""

    num_examples: int  # of the split, over all processes

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int:
        """Return the number of batches of this process."""
        ...

    def start_of(self, number: int) -> int:
        """Return the position in the split of this process's first example in batch `number`."""
        ...


class MetricsLike(Protocol):
    names: tuple[str, ...]

    def update(self, outputs: Outputs, targets: Targets, weights: Tensor | None) -> None:
        """Count a batch: the model's outputs (B, …), targets (B, …) and weights (B,)."""
        ...

    def scalars(self) -> dict[str, float]:
        """Return each metric by name, over the examples of all processes."""
        ...

    def details(self) -> Mapping[str, Config]:
        """Return what plots need, as plain values for JSON."""
        ...


class Loss(Protocol):
    """The losses of a batch before they are summed: the gradient is their weighted mean."""

    @property
    def values(self) -> Tensor:
        """Return the losses, (B,), or (B, …) for tokens or pixels."""
        ...

    @property
    def weights(self) -> Tensor | None:
        """Return a weight for each value; None: all one."""
        ...

    @property
    def components(self) -> Mapping[str, Tensor]:
        """Return named parts of the values, each shaped like them, for the log."""
        ...


class Task(Protocol):
    """The meaning of the outputs.

    An attribute `kind` says what the predictions are. For multiclass, binary, multilabel and
    regression they are a table: see `regrow.runs.predictions`. Otherwise they are arrays.
    """

    running_name: str | None  # the name of the score that `running` returns
    sums_over_examples: bool  # False: the loss of a batch is not a sum, so it cannot be split

    def loss(self, outputs: Outputs, targets: Targets, weights: Tensor | None) -> Loss:
        """Return the losses of the model's outputs; `weights` are those of the examples, (B,)."""
        ...

    def check(self, outputs: Outputs, targets: Targets) -> None:
        """Raise UserError if outputs and targets of a first batch do not fit this task.

        Called with gradients enabled if possible: the outputs' graph identifies a sigmoid reliably;
        their values do not.
        """
        ...

    def predict(self, outputs: Outputs) -> Mapping[str, Tensor]:
        """Return `prediction`, and `probability` if any, of each example.

        Probabilities should be float64: float32 gives ties.
        """
        ...

    def running(self, outputs: Outputs, targets: Targets) -> Tensor | None:
        """Return a cheap score per example, (B,), for the log of training; None without one.

        Must not wait for the device. Called with gradients enabled; the caller detaches the result.
        """
        ...

    def metrics(self, device: torch.device) -> MetricsLike:
        """Return new metrics for an evaluation."""
        ...


@runtime_checkable
class ShowsExamples(Protocol):
    """A task whose evaluation also gives a few examples for plots."""

    def examples(self, batch: Batch, outputs: Tensor) -> Mapping[str, Config]:
        """Return a batch's examples, as plain values for JSON; empty if it has none to show.

        Called for each batch of a final evaluation until there are enough: see `pictures.has_room`.
        """
        ...


class Record(Protocol):
    """The destination of the logged values."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None: ...
    def image(self, name: str, image: object, *, step: int) -> None:
        """Write a figure of matplotlib or a tensor as a PNG file, once for a name and a step.

        Loggers that take images get it too. A tensor is (H, W), (C, H, W) or (B, C, H, W) with C =
        1 or 3, of uint8 or of numbers from 0 to 1. Raises UserError for anything else.
        """
        ...

    def position(self) -> int:
        """Return the size of metrics.jsonl in bytes so far, which a checkpoint records."""
        ...

    def sync(self, position: int) -> None:
        """Make the first `position` bytes durable."""
        ...

    def close(self, exit_code: int = 0) -> None: ...


class Trial(Protocol):
    """A search of which this run is one trial."""

    def report(self, step: int, values: Mapping[str, float]) -> bool:
        """Report an evaluation. Returns True if the search ends the run here."""
        ...


class Settings(Protocol):
    """The settings of the trainer that the engine reads, from the config's node `trainer`."""

    @property
    def device(self) -> str: ...
    @property
    def accumulation_steps(self) -> int: ...
    @property
    def precision(self) -> str: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def profile(self) -> bool: ...
    @property
    def progress_bar(self) -> bool: ...
    @property
    def monitor(self) -> str | None: ...
    @property
    def mode(self) -> str | None:
        """Return "max" or "min"; None without a monitor."""
        ...

    @property
    def checkpoint(self) -> CheckpointOptions: ...


class Position(Protocol):
    """The counters of a state that the engine reads."""

    step: int  # optimizer steps so far
    seconds: float  # of training, over all resumes of the run
    num_micro_batches: int  # use at least this many: fewer ran out of memory
    evaluated_step: int  # the last evaluated step; -1: none
    best_step: int | None
    pruned: bool  # stopped by a search


class State(Protocol):
    """Everything that changes during a run: what a checkpoint holds."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Callable[[int], float]  # the learning rate's factor at a step

    @property
    def progress(self) -> Position: ...
    @property
    def step(self) -> int:
        """Return the number of optimizer steps so far, skipped ones included."""
        ...

    @property
    def epoch(self) -> int: ...
    @property
    def step_in_epoch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def evaluates(self) -> str:
        """Return the name of the evaluated one of several models; empty for a single one."""
        ...

    @property
    def evaluated(self) -> nn.Module:
        """Return the model that is evaluated and kept."""
        ...

    def state_dict(self) -> Parts:
        """Return one entry per file of a checkpoint: tensors and plain containers only."""
        ...

    def load_state_dict(self, parts: Parts) -> None:
        """Load a checkpoint. Raises UserError if it has other parts or is of another model."""
        ...

    def refuse_other(self, parts: Parts) -> None:
        """Raise UserError where `load_state_dict` would; reads only names and shapes."""
        ...


class DataLike(Protocol):
    """A data set with its splits, as the engine uses it: see `regrow.feeding.loaders.Data`."""

    batch_size: int  # examples per step, over all processes
    folds: int | None  # one of them is the test split; None: no cross-validation
    class_names: list[str] | None

    @property
    def num_examples(self) -> Mapping[str, int]:
        """Return the size of each split by name; the names say which splits there are."""
        ...

    @property
    def final(self) -> Sequence[str]:
        """Return the names of the sets to measure once, at the end with the best weights."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """Return warnings for the start of the log, such as files that were left out."""
        ...

    def evaluation(
        self, split: str, *, device: torch.device, rank: int = 0, world_size: int = 1
    ) -> EvalBatches:
        """Return this process's share of a split, not augmented."""
        ...

    def in_units(self, values: Tensor) -> Tensor:
        """Return standardised regression targets in their own units; others unchanged."""
        ...

    def ids(self, name: str) -> Sequence[int | str]:
        """Return the name or number of each example of a split in its source."""
        ...

    def fingerprint(self) -> Mapping[str, Config]:
        """Return what identifies the contents of each split."""
        ...

    def check_cache(self) -> None:
        """Raise UserError if `data.cache` does not fit the data. Writes nothing."""
        ...

    def far_targets(self) -> str | None:
        """Return a warning about targets far from zero; None without one."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class Objects(Protocol):
    """The objects that a config describes."""

    @property
    def options(self) -> Settings: ...
    @property
    def data(self) -> DataLike: ...
    @property
    def task(self) -> Task: ...
    @property
    def state(self) -> State: ...
    @property
    def train(self) -> TrainBatches: ...
    @property
    def sets(self) -> Mapping[str, EvalBatches]:
        """Return the sets that are measured during training, by name."""
        ...

    @property
    def total_steps(self) -> int | None:
        """Return the optimizer steps of the whole run; None if only time limits it."""
        ...

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        ...

    @property
    def warmup_steps(self) -> int:
        """Return the steps of the schedule's warm-up; 0 without one."""
        ...

    @property
    def measured(self) -> list[str]:
        """Return the names of what is measured during training, such as val/accuracy."""
        ...

    def remarks(self, world: World) -> list[tuple[int, str]]:
        """Return lines for the start of the log, each with its level of `logging`."""
        ...


class StepTotals(Protocol):
    def read(self) -> list[float]:
        """Return the sums of loss, score, weight and examples, then of the loss's components."""
        ...


class StepResultLike(Protocol):
    @property
    def totals(self) -> StepTotals:
        """Return the step's totals over all processes."""
        ...


class Plan(Protocol):
    """Everything that stays the same during a run. The engine reads only its step."""

    @property
    def train_step(self) -> Callable[[State, Batch, object], StepResultLike]:
        """Return the function that updates the weights once, from (state, batch, `step`)."""
        ...

    @property
    def step(self) -> object: ...


class Added(Protocol):
    """The lab's module `added`: what older records lack or hold in another form.

    `regrow.config.older` reads it, and nothing else of the lab, before torch is imported.
    """

    ADDED_KEYS: tuple[AddedKey, ...]  # keys that an older record lacks
    EARLIER_DEFAULTS: tuple[EarlierDefault, ...]  # defaults that a record keeps
    REMOVED_KEYS: tuple[tuple[str, str], ...]  # (`_target_`, key) that the code no longer accepts


@runtime_checkable
class Lab(Protocol):
    """The functions of the package that the key `lab` names: see `regrow.runs.lab`."""

    def build(self, config: Mapping[str, Config], world: World) -> Objects:
        """Return all objects of a run. Writes nothing."""
        ...

    def check_first_batch(self, objects: Objects, world: World) -> None:
        """Raise UserError if model, task and data do not fit together. Changes nothing."""
        ...

    def plan_of(
        self,
        objects: Objects,
        seed: int,
        world: World,
        stop: StopRequest,
        *,
        record: Record,
        checkpoints: CheckpointWriter,
        trial: Trial | None,
    ) -> Plan:
        """Return everything that stays the same during a run."""
        ...

    def fit(self, state: State, plan: Plan) -> str:
        """Train from `state` to the end. Returns "completed" or "interrupted".

        Raises OSError if the last checkpoint could not be written, and FloatingPointError after too
        many steps in a row without a finite gradient.
        """
        ...

    def summary(self, state: State, options: Settings) -> dict[str, Config]:
        """Return what `summary.json` says about the state: steps, best, each set and counters."""
        ...

    def measure_split(
        self,
        model: nn.Module,
        task: Task,
        batches: EvalBatches,
        world: World,
        precision: str,
        draws: Draws,
        *,
        stop: StopRequest,
        bar: str | None,
    ) -> tuple[dict[str, float], Mapping[str, Config]]:
        """Return the exact loss and metrics over all batches, and details for plots.

        `bar` names the progress bar; None shows none. Raises Interrupted on a stop.
        """
        ...
