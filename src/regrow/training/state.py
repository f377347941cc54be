"""All that changes during a run, and so exactly what a checkpoint holds."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow import older
from regrow.errors import UserError
from regrow.training import optim, sharding
from regrow.training import sums as step_sums
from regrow.training.options import TrainerOptions
from regrow.training.precision import LossScale
from regrow.training.schedules import Schedule, Stateful
from regrow.training.sums import Sums


@dataclass
class Progress:
    """The plain values: counters, and the history that decisions were taken from."""

    step: int = 0  # optimizer steps, skipped ones too: the run's position
    evaluated_step: int = -1  # the last step whose evaluation is done
    best_value: float | None = None
    best_step: int | None = None
    best_values: dict[str, float] = field(default_factory=dict)  # all that was measured there
    evaluations_without_improvement: int = 0  # of early stopping's own reference
    reference_value: float | None = None  # what early stopping compares with
    pruned: bool = False  # ended by a search, as others did better
    halvings: int = 0  # of the slices, each after an out-of-memory
    seconds: float = 0.0  # of training, over all parts of the run
    train_means: dict[str, float] = field(default_factory=dict)  # of the last whole epoch
    latest: dict[str, float] = field(default_factory=dict)  # of the last evaluation


FOLLOWS = {"saved": False}  # marks a field that follows from others, so no checkpoint holds it


@dataclass
class TrainState:
    """Every field is saved: with a `state_dict` as a part of its own, else in `progress`."""

    model: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    averaged: nn.Module | None  # the exponential moving average of the model
    loss_scale: LossScale | None  # of fp16
    sums: Sums  # since the epoch began
    skips: Tensor  # (2,) steps skipped, in all and the last ones in a row
    steps_per_epoch: int = field(metadata=FOLLOWS)
    progress: Progress = field(default_factory=Progress)
    empty_steps: Tensor = field(default_factory=lambda: torch.zeros(()))  # all weights were zero
    # Whether the host knows that skips[1] is zero.
    no_streak: bool = field(default=False, metadata=FOLLOWS)

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def epoch(self) -> int:
        """Epochs completed, and so the number of the epoch that the next step is in."""
        return self.progress.step // self.steps_per_epoch

    @property
    def step_in_epoch(self) -> int:
        return self.progress.step % self.steps_per_epoch

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one, if there is one."""
        return self.averaged if self.averaged is not None else self.model

    def _fields(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state's parts and its plain values, by field. An absent part is None, and a schedule
        without state a function."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata != FOLLOWS}
        del values["progress"]
        parts = {name: value for name, value in values.items() if isinstance(value, Stateful)}
        plain = {k: v for k, v in values.items() if not (k in parts or v is None or callable(v))}
        return parts, plain

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """One entry for each file of a checkpoint. Tensors and plain containers only."""
        stateful, plain = self._fields()
        parts: dict[str, dict[str, Any]] = {k: v.state_dict() for k, v in stateful.items()}
        parts["optimizer"] = {**parts["optimizer"], optim.CLASS: type(self.optimizer).__qualname__}
        parts["progress"] = {**vars(self.progress), **plain}
        if self.averaged is None and hasattr(self.optimizer, "eval"):
            with optim.evaluating(self.optimizer, self.model):  # the weights it stands for
                parts["averaged"] = {
                    k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v)
                    for k, v in self.model.state_dict().items()
                }
        return parts

    def refuse_other(self, parts: dict[str, dict[str, Any]]) -> None:
        """Raise UserError if a checkpoint's parts are not this state's, or the model another one.

        Looks at names and shapes only, so the tensors may be on the meta device.
        """
        own = self.state_dict()
        if set(parts) != set(own):
            missing = ", ".join(sorted(set(own) - set(parts))) or "nothing"
            unexpected = ", ".join(sorted(set(parts) - set(own))) or "nothing"
            raise UserError(
                f"the checkpoint lacks {missing} and has {unexpected} too many. Leave what the run "
                "keeps (model, scheduler, trainer.ema_decay, trainer.precision) as it was, or "
                "start a new run with init_from=…"
            )
        there, here = (
            {name: tuple(getattr(value, "shape", ())) for name, value in part["model"].items()}
            for part in (parts, own)
        )
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                raise UserError(
                    f"the checkpoint is of another model: {name} is {there.get(name, 'not')} there "
                    f"and {here.get(name, 'not')} here. Leave the model as it was, or start a new "
                    "run with init_from=…"
                )

    def load_state_dict(self, parts: dict[str, dict[str, Any]]) -> None:
        """Take up a checkpoint's state, whole. Raises UserError for a part too many or too few, and
        for one of another model."""
        self.refuse_other(parts)
        stateful, plain = self._fields()
        progress = {**older.ADDED_PROGRESS, **parts["progress"]}
        if other := {*vars(self.progress), *plain} ^ set(progress):
            raise UserError(
                "the checkpoint was written by another version of this code: its progress differs "
                f"in {', '.join(sorted(other))}. Start a new run with init_from=…"
            )
        self.progress = Progress(**{name: progress[name] for name in vars(self.progress)})
        for name, own in plain.items():
            if isinstance(own, Tensor):
                own.copy_(torch.as_tensor(progress[name], dtype=own.dtype))
            else:  # sums may have been a tensor, on a device or in an older record
                value = progress[name]
                setattr(self, name, [*map(float, value)] if isinstance(own, list) else value)
        self.no_streak = False
        for name, own in stateful.items():
            if isinstance(own, Optimizer):
                optim.load(own, parts[name])
            elif isinstance(own, nn.Module):
                own.load_state_dict(sharding.as_in(parts[name], own.state_dict()))
            else:
                own.load_state_dict(parts[name])


def average_of(model: nn.Module) -> nn.Module:
    """A copy to hold the moving average: starts as the model, is never trained."""
    try:
        return copy.deepcopy(model).requires_grad_(False).eval()
    except Exception as error:  # whatever an attribute of any class raises
        raise UserError(
            "trainer.ema_decay: the model cannot be copied for its average "
            f"({' '.join(str(error).split())[:150]}). Keep no results of a forward pass, open "
            "files or locks as attributes (use torch.nn.utils.parametrizations.weight_norm in "
            "place of torch.nn.utils.weight_norm), or use trainer.ema_decay=null."
        ) from error


def average_weight(state: TrainState, options: TrainerOptions) -> float | Tensor:
    """The new weights' share of the average, `1 - decay`, for the update under way.

    With a warm-up the decay of update n (from 0) is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage: until it reaches `ema_decay` the average covers about the last tenth
    of the updates, and the initial weights soon count for nothing. n follows from the step and the
    steps without an update, so it is not state. On a device it is a () tensor that nobody reads.
    """
    assert options.ema_decay is not None
    least = 1 - options.ema_decay
    if not options.ema_warmup:
        return least
    updates = state.step - steps_without_update(state)
    if isinstance(updates, Tensor):
        return (9 / (10 + updates)).clamp(min=least)
    return max(least, 9 / (10 + updates))


def too_short_for_average(options: TrainerOptions, total_steps: int | None) -> str | None:
    """One line about a run that ends before its average has reached `ema_decay`, else None."""
    decay = options.ema_decay
    if not decay or total_steps is None:
        return None
    needed = round(9 / (1 - decay)) - 10
    if options.ema_warmup and total_steps < needed:
        return (
            f"trainer.ema_decay={decay:g}: this run of {total_steps:,} steps is too short for it, "
            f"as its warm-up takes {needed:,} steps. The average is over about the last tenth "
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
    """How many of the steps so far left the weights alone. A () tensor on a device."""
    skipped, empty = state.skips[0], state.empty_steps
    if step_sums.on_host(skipped.device):
        return skipped.item() + empty.item()
    return skipped + empty


@torch.no_grad()
def update_average(
    averaged: nn.Module, model: nn.Module, weight: float | Tensor, skipped: optim.Skipped
) -> None:
    """`averaged += weight (model - averaged)`, unless the step was skipped.

    Buffers (BatchNorm's statistics) are taken over as they are, and parameters of whole numbers,
    which have no average.
    """
    if skipped is True:
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
    if isinstance(weight, float) and skipped is False:
        torch._foreach_lerp_(averages, parameters, weight)
    else:  # without asking the device whether it skipped
        differences = [*torch._foreach_sub(parameters, averages)]
        torch._foreach_mul_(differences, weight * (1 - skipped))
        torch._foreach_add_(averages, differences)
    buffers = dict(averaged.named_buffers())
    for name, source in model.named_buffers():
        # A cache may have grown in one of the two alone, and stays what it is.
        own = buffers.get(name)
        if (own is not None and own.shape == source.shape) or name not in caches(model):
            copies.append(buffers[name])
            sources.append(source)
    for copy_, source in zip(copies, sources, strict=True):
        copy_.copy_(source)


def caches(model: nn.Module) -> list[str]:
    """The names of the buffers that are not part of the model's state: non-persistent ones."""
    return [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set)
    ]


class Buffers:
    """The model's buffers before a step, to put back if the step is skipped.

    A forward pass moves BatchNorm's statistics before anybody knows that the step is bad. Caches
    that it replaced by others of another shape stay: the model may have noted their size.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {
            id(buffer): (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.numel()
        }
        # Places, not tensors alone: `self.count = self.count + 1` in forward makes a new tensor.
        self.places = [*found.values()]
        self.caches = {
            (id(module._buffers), name)
            for module in model.modules()
            for name in module._non_persistent_buffers_set
        }
        self.buffers = self._now()
        self.before = [buffer.detach().clone() for buffer in self.buffers]

    def _now(self) -> list[Tensor]:
        return [buffers[name] for buffers, name in self.places]  # type: ignore[misc]

    def _leave_out_grown(self) -> None:
        """Forget the caches that are gone, or of another shape than was remembered."""
        if not self.caches:
            return
        kept = []
        for index, (buffers, name) in enumerate(self.places):
            now = buffers.get(name)
            is_cache = (id(buffers), name) in self.caches
            if not is_cache or (now is not None and now.shape == self.before[index].shape):
                kept.append(index)
        self.places = [self.places[index] for index in kept]
        self.buffers = [self.buffers[index] for index in kept]
        self.before = [self.before[index] for index in kept]

    def remember(self) -> None:
        self._leave_out_grown()
        if self.places:
            self.buffers = self._now()
            with torch.no_grad():
                torch._foreach_copy_(self.before, self.buffers)

    def restore(self, skipped: optim.Skipped) -> None:
        if skipped is not False:
            self._leave_out_grown()
            if self.places:
                self._put_back(skipped)

    @torch.no_grad()
    def _put_back(self, skipped: optim.Skipped) -> None:
        if isinstance(skipped, Tensor):
            bad = skipped.bool()
            rows = zip(self.places, self._now(), self.buffers, self.before, strict=True)
            for (buffers, name), now, buffer, before in rows:
                chosen = torch.where(bad, before, now)
                buffers[name] = buffer.copy_(chosen) if now is buffer else chosen
        else:
            torch._foreach_copy_(self.buffers, self.before)
            for (buffers, name), buffer in zip(self.places, self.buffers, strict=True):
                buffers[name] = buffer


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every entry, in the order of the names.

    Of a sharded model all processes must ask.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        value = sharding.whole(value).detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict | list | tuple):  # of get_extra_state
        digest.update(f"{name} {type(value).__name__} {len(value)}".encode())
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _add(digest, f"{name}/{key!r}", item)
    else:
        digest.update(f"{name} {value!r}".encode())
