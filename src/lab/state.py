"""Everything that changes during a run: exactly what a checkpoint holds."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lab import added, optim
from lab.options import TrainerOptions
from lab.schedules import Schedule, Stateful
from lab.several import by_name, full
from regrow.distributed import sharding
from regrow.errors import UserError, brief
from regrow.numerics.buffers import caches
from regrow.numerics.calls import say_if_out_of_memory
from regrow.numerics.precision import LossScale
from regrow.numerics.totals import Skipped, Totals, scalar, without_waiting


@dataclass
class Progress:
    """The plain values: counters, and the history behind decisions."""

    step: int = 0  # optimizer steps, including skipped ones: the run's position
    evaluated_step: int = -1  # the last evaluated step
    best_value: float | None = None
    best_step: int | None = None
    best_values: dict[str, float] = field(default_factory=dict)  # all metrics of that step
    evaluations_without_improvement: int = 0  # since early stopping's reference value
    reference_value: float | None = None  # what early stopping compares with
    pruned: bool = False  # stopped by a search because other trials were better
    num_micro_batches: int = 1  # use at least this many per step: fewer ran out of memory
    seconds: float = 0.0  # of training, over all resumes of the run
    train_means: dict[str, float] = field(default_factory=dict)  # of the last complete epoch
    latest: dict[str, float] = field(default_factory=dict)  # of the last evaluation


FOLLOWS = {"saved": False}  # marks a derived field, which no checkpoint holds


@dataclass
class TrainState:
    """The run's state. A field with a `state_dict` is saved as a part, any other in `progress`.

    A config may name several models, optimizers and schedules: see `several`. `model` is then a
    `Models` and the others are dicts, so `state.optimizer["generator"]` is one of them.
    """

    model: nn.Module
    optimizer: Optimizer | dict[str, Optimizer]
    schedule: Schedule | dict[str, Schedule]
    averaged: nn.Module | None  # the exponential moving average of the model
    loss_scale: LossScale | None  # for fp16
    sums: Totals  # since the epoch began
    skips: Tensor  # (2,) skipped steps: in total, and in the current streak
    steps_per_epoch: int = field(metadata=FOLLOWS)
    accumulation_steps: int = field(metadata=FOLLOWS)
    progress: Progress = field(default_factory=Progress)
    evaluates: str = field(default="", metadata=FOLLOWS)  # the evaluated one of several models
    empty_steps: Tensor = field(default_factory=lambda: torch.zeros(()))  # all weights were zero
    has_streak: bool = field(default=True, metadata=FOLLOWS)  # False only if skips[1] is zero

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def epoch(self) -> int:
        """The number of completed epochs, which is also the index of the next step's epoch."""
        return self.progress.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.progress.step % self.steps_per_epoch

    @property
    def num_micro_batches(self) -> int:
        """The micro-batches of a step: as many as asked for, or more if memory did not suffice."""
        return max(self.accumulation_steps, self.progress.num_micro_batches)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the average, if there is one."""
        models = by_name(self.model if self.averaged is None else self.averaged)
        evaluated: nn.Module = models[self.evaluates]
        return evaluated

    def set_rates(self) -> None:
        """Set the learning rates of the next update. They depend on the step alone."""
        schedules = by_name(self.schedule)
        for name, optimizer in by_name(self.optimizer).items():
            optim.set_lr(optimizer, schedules[name](self.step))

    def scaled(self, factor: float, like: Tensor) -> Tensor:
        """Return `factor` times the loss scale, if fp16 has one, as a () tensor like `like`."""
        scale = self.loss_scale
        return scalar(factor if scale is None else factor * scale.value, like)

    def unscaled(self, factor: float | Tensor) -> float | Tensor:
        """Return `factor` divided by the loss scale, to multiply scaled gradients by."""
        return factor if self.loss_scale is None else factor / self.loss_scale.value

    def update(
        self,
        name: str,
        gradients: list[Tensor],
        norm: float | Tensor,
        factor: float | Tensor,
        totals: Totals,
        clipping: optim.Clipping,
    ) -> Skipped:
        """Update the weights with `gradients * factor`, clipped, if norm and loss are finite.

        `name` is the optimizer's, empty for a single one. Raises UserError if no optimizer has this
        name, or if memory does not suffice.
        """
        optimizers = by_name(self.optimizer)
        if name not in optimizers:
            wanted, given = (
                ", ".join(filter(None, names)) or "a single one" for names in ([name], optimizers)
            )
            raise UserError(
                f"optimizer: the step needs {wanted}, and the config has {given}. Name those that "
                "the step needs, as in model, or choose another step."
            )
        try:
            return optim.update(
                optimizers[name], gradients, norm, factor=factor, clipping=clipping, totals=totals
            )
        except RuntimeError as error:
            say_if_out_of_memory(
                error,
                f"the update of step {self.step + 1}",
                "Use an optimizer with less state, a smaller model, trainer=fsdp or a larger "
                "device.",
            )
            raise

    def finish_step(
        self, totals: Totals, skipped: Skipped, step: int | Tensor, options: TrainerOptions
    ) -> None:
        """Update the average and the loss scale, and count the step."""
        if self.loss_scale is not None:
            self.loss_scale.update(*skipped)
        if self.averaged is not None:
            weight = average_weight(self, options, step)
            update_average(self.averaged, self.model, weight, skipped)
        self.sums.add_(totals, skipped)
        if self.has_streak or not skipped.did_update:  # else each step would touch two tensors
            skipped.count_in(self.skips, self.empty_steps)
            self.has_streak = not skipped.did_update

    def tensors(self) -> list[Tensor]:
        """Return all tensors that an update changes."""
        models = [self.model] if self.averaged is None else [self.model, self.averaged]
        found = [t for model in models for t in (*model.parameters(), *model.buffers())]
        for optimizer in by_name(self.optimizer).values():
            for part in getattr(optimizer, "parts", [optimizer]):
                found += [v for moments in part.state.values() for v in moments.values()]
        if self.loss_scale is not None:
            found += [self.loss_scale.value, self.loss_scale.good_steps]
        values: list[Any] = [*found, self.sums.values, self.skips, self.empty_steps]
        return [value for value in values if isinstance(value, Tensor)]

    def _fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the stateful parts and the plain values, by field.

        Omits absent parts, which are None, and schedules without state, which are functions.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata != FOLLOWS}
        del values["progress"]
        several = {"model", "averaged", "optimizer", "schedule"}
        parts, plain = {}, {}
        for field_name, value in values.items():
            named = by_name(value) if field_name in several else {"": value}
            for name, one in named.items():
                if isinstance(one, Stateful):
                    parts[full(field_name, name)] = one
                elif one is not None and not callable(one):
                    plain[full(field_name, name)] = one
        return parts, plain | {"sums": self.sums.saved()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return one entry per file of a checkpoint: tensors and plain containers only."""
        stateful, plain = self._fields()
        parts: dict[str, dict[str, Any]] = {k: v.state_dict() for k, v in stateful.items()}
        for name, optimizer in by_name(self.optimizer).items():
            part = full("optimizer", name)
            parts[part] = {**parts[part], optim.CLASS: type(optimizer).__qualname__}
        parts["progress"] = {**vars(self.progress), **plain}
        if self.averaged is None and optim.schedule_free(self.optimizer):
            with optim.evaluating(self.optimizer, self.model):  # its evaluation weights
                for name, model in by_name(self.model).items():
                    parts[full("averaged", name)] = {
                        k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v)
                        for k, v in model.state_dict().items()
                    }
        return parts

    def refuse_other(self, parts: dict[str, dict[str, Any]]) -> None:
        """Raise UserError if a checkpoint's parts, model or optimizers do not fit this state.

        Compares no values of tensors, so these may be on the meta device.
        """
        own = self.state_dict()
        if set(parts) != set(own):
            missing = ", ".join(sorted(set(own) - set(parts))) or "nothing"
            unexpected = ", ".join(sorted(set(parts) - set(own))) or "nothing"
            raise UserError(
                f"the checkpoint lacks {missing}; unexpected in it: {unexpected}. Leave what the "
                "run keeps (model, scheduler, trainer.ema_decay, trainer.precision) as it was, or "
                "start a new run with init_from=…"
            )
        models = [full("model", name) for name in by_name(self.model)]
        there, here = (
            {
                f"{model}.{name}": tuple(getattr(value, "shape", ()))
                for model in models
                for name, value in part[model].items()
            }
            for part in (parts, own)
        )
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"the checkpoint is of another model: {name} is {there.get(name, 'absent')} "
                    f"there and {here.get(name, 'absent')} here. Leave the model as it was, or "
                    "start a new run with init_from=…"
                )
        for name, optimizer in by_name(self.optimizer).items():
            optim.refuse_other(optimizer, parts[full("optimizer", name)])

    def load_state_dict(self, parts: dict[str, dict[str, Any]]) -> None:
        """Load a checkpoint.

        Raises UserError if a part is missing or unexpected, or belongs to another model.
        """
        self.refuse_other(parts)
        stateful, plain = self._fields()
        progress = added.progress_of(parts["progress"], self.accumulation_steps)
        if other := {*vars(self.progress), *plain} ^ set(progress):
            raise UserError(
                "the checkpoint was written by another version of this code: its progress differs "
                f"in {', '.join(sorted(other))}. If you added a field, give its earlier value in "
                f"{added.__name__}. Otherwise start a new run with init_from=…"
            )
        self.progress = Progress(**{name: progress[name] for name in vars(self.progress)})
        self.has_streak = True
        for name, own in plain.items():
            if name == "sums":
                self.sums.load_(progress[name])
            elif isinstance(own, Tensor):
                own.copy_(torch.as_tensor(progress[name], dtype=own.dtype))
            else:
                setattr(self, name, progress[name])
        for name, own in stateful.items():
            if isinstance(own, Optimizer):
                optim.load(own, parts[name])
            elif isinstance(own, nn.Module):
                own.load_state_dict(sharding.as_in(parts[name], own.state_dict()))
            else:
                own.load_state_dict(parts[name])


def average_of(model: nn.Module) -> nn.Module:
    """Return a copy of the model to hold the moving average. It starts as the model."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:  # attributes of any class may raise anything
        raise UserError(
            "trainer.ema_decay: the model cannot be copied for its average "
            f"({brief(error, 150)}). Keep no results of a forward pass, open "
            "files or locks as attributes (use torch.nn.utils.parametrizations.weight_norm in "
            "place of torch.nn.utils.weight_norm), or use trainer.ema_decay=null."
        ) from error


def average_weight(
    state: TrainState, options: TrainerOptions, step: int | Tensor
) -> float | Tensor:
    """Return the new weights' share of the average, `1 - decay`, for the current update.

    With a warm-up, the decay of update n (from 0) is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage. Until the decay reaches `ema_decay`, the average covers about the last
    tenth of the updates, and the initial weights soon count for nothing. n follows from the step
    and the steps without an update, so it is not state. On a device, n is a () tensor that the host
    never reads; for a CUDA graph, so is the step.
    """
    assert options.ema_decay is not None
    least = 1 - options.ema_decay
    if not options.ema_warmup:
        return least
    updates = step - steps_without_update(state)
    if isinstance(updates, Tensor):
        return (9 / (10 + updates)).clamp(min=least)
    return max(least, 9 / (10 + updates))


def too_short_for_average(options: TrainerOptions, total_steps: int | None) -> str | None:
    """Return a warning if the run ends before its average has reached `ema_decay`, else None."""
    decay = options.ema_decay
    if not decay or total_steps is None:
        return None
    needed = round(9 / (1 - decay)) - 10
    if options.ema_warmup and total_steps < needed:
        return (
            f"trainer.ema_decay={decay:g}: this run of {total_steps:,} steps is too short for it, "
            f"as its warm-up takes {needed:,} steps. The average covers about the last tenth "
            "of the steps"
        )
    if not options.ema_warmup and decay**total_steps > 0.01:
        return (
            f"trainer.ema_decay={decay:g}: this run of {total_steps:,} steps is too short for it: "
            f"{decay**total_steps:.0%} of the average are the initial weights. Use "
            "trainer.ema_warmup=true or a smaller trainer.ema_decay"
        )
    return None


def steps_without_update(state: TrainState) -> float | Tensor:
    """Return the number of steps that did not change the weights; a () tensor on a device."""
    return without_waiting(state.skips[0]) + without_waiting(state.empty_steps)


@torch.no_grad()
def update_average(
    averaged: nn.Module, model: nn.Module, weight: float | Tensor, skipped: Skipped
) -> None:
    """Update `averaged += weight (model - averaged)`, unless the step was skipped.

    Buffers (BatchNorm's statistics) and integer parameters have no average and are copied.
    """
    if skipped.is_known:
        return
    averages: list[Tensor] = []
    parameters: list[Tensor] = []
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    pairs = zip(
        sharding.local([*averaged.parameters()]), sharding.local([*model.parameters()]), strict=True
    )
    for average, parameter in pairs:
        is_number = parameter.is_floating_point() or parameter.is_complex()
        (averages if is_number else copies).append(average)
        (parameters if is_number else sources).append(parameter)
    skipped.blend_(averages, parameters, weight)
    buffers = dict(averaged.named_buffers())
    for name, source in model.named_buffers():
        # A cache may have different shapes in the two; then it is left unchanged.
        own = buffers.get(name)
        if (own is not None and own.shape == source.shape) or name not in caches(model):
            copies.append(buffers[name])
            sources.append(source)
    for dtype in dict.fromkeys(copy_.dtype for copy_ in copies):  # one operation takes one dtype
        kept = [i for i, copy_ in enumerate(copies) if copy_.dtype == dtype]
        torch._foreach_copy_([copies[i] for i in kept], [sources[i] for i in kept])
