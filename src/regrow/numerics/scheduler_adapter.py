"""Adapt schedulers with torch's (or timm's) interface, chosen by `_target_`, to a `Schedule`.

Each steps a stand-in optimizer with one group at `optimizer.lr`. The schedule returns the
stand-in's learning rate as a factor, so that `param_groups.lr_scale` keeps its meaning; its
momentum is copied.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.config.targets import place_in
from regrow.errors import UserError, brief

log = logging.getLogger(__name__)

MOMENTA = ("momentum", "betas")  # OneCycleLR and CyclicLR change these as well as the learning rate


class _StandIn(Optimizer):
    """One group with the real optimizer's settings, for a scheduler to step."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__([nn.Parameter(torch.zeros(()))], dict(settings))

    def step(self, closure: Any = None) -> Any:
        """Do nothing. A scheduler warns if its optimizer has never stepped."""


class SchedulerAdapter:
    """`step -> factor` of `optimizer.lr`, from a scheduler that counts its own steps.

    `make` takes an optimizer. The scheduler advances once per `interval`: per optimizer step or per
    epoch. `total_steps` is the run's length in optimizer steps, None if only time limits it. Raises
    UserError for options that the scheduler refuses, if possible before the first step.
    """

    def __init__(
        self,
        make: Any,
        optimizer: Optimizer,
        *,
        interval: str,
        steps_per_epoch: int,
        total_steps: int | None,
        name: str,
    ) -> None:
        self.make, self.optimizer, self.name = make, optimizer, name
        self.steps_per_count = 1 if interval == "step" else steps_per_epoch
        self.interval = interval
        self.settings = {k: v for k, v in optimizer.defaults.items() if not isinstance(v, Tensor)}
        self.settings["lr"] = self.base = float(optimizer.defaults["lr"])  # may be a tensor
        self._begin()
        self._check_length(total_steps)
        self._advance()  # detects wrong options before the run
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self.stand_in = _StandIn(self.settings)
        try:
            self.scheduler = self.make(self.stand_in)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            where = f", {place}" if (place := place_in(error)) else ""
            raise UserError(
                f"scheduler ({self.name}{where}): {brief(error).rstrip('.')}."
            ) from error
        self.by_time = hasattr(self.scheduler, "step_update")  # timm schedulers
        self.initial = _plain(self.scheduler.state_dict())
        self.moves = {key for key in MOMENTA if self.group.get(key) != self.settings.get(key)}

    def _check_length(self, total_steps: int | None) -> None:
        """Raise UserError before the run for a length that the scheduler would refuse during it."""
        if self.by_time and getattr(self.scheduler, "t_in_epochs", None) is (
            self.interval == "step"
        ):
            other = "epoch" if self.interval == "step" else "step"
            raise UserError(
                f"scheduler.interval={self.interval}: {self.name} counts in "
                f"{other}s (t_in_epochs={self.scheduler.t_in_epochs}). "
                f"Use scheduler.interval={other}, or change t_in_epochs."
            )
        limit = getattr(self.scheduler, "total_steps", None)
        if isinstance(limit, int) and total_steps is not None:
            needed = (total_steps - 1) // self.steps_per_count + 1
            if needed > limit:
                raise UserError(
                    f"scheduler.total_steps={limit}: the run steps {self.name} {needed} times "
                    f"(scheduler.interval={self.interval}). Set scheduler.total_steps={needed}."
                )

    @property
    def group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.stand_in.param_groups[0]
        return group

    def __call__(self, step: int) -> float:
        """Return the factor at `step`, and copy the momentum to the run's optimizer."""
        target = step // self.steps_per_count
        if target < self.count:
            self._begin()
        while self.count < target:
            self._advance()
        for key in self.moves:
            for group in self.optimizer.param_groups:
                if key in group:
                    group[key] = self.group[key]
        return float(self.group["lr"]) / self.base if self.base else 0.0

    def _advance(self) -> None:
        self.count += 1
        self.stand_in.step()
        try:
            if not self.by_time:
                self.scheduler.step()
            elif self.interval == "step":
                self.scheduler.step_update(self.count)
            else:
                self.scheduler.step(self.count)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UserError(
                f"scheduler._target_={self.name}: step {self.count} of the scheduler failed: "
                f"{' '.join(str(error).split())}. Correct its options, or end the run sooner."
            ) from error
        self.moves |= {key for key in MOMENTA if self.group.get(key) != self.settings.get(key)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "steps_per_count": self.steps_per_count,
            "initial": self.initial,
            "scheduler": _plain(self.scheduler.state_dict()),
            "group": _plain({k: v for k, v in self.group.items() if k != "params"}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a saved state; with other options, the scheduler replays its steps instead."""
        self._begin()
        if (self.initial, self.steps_per_count) == (state["initial"], state["steps_per_count"]):
            self.scheduler.load_state_dict(_joined(self.scheduler.state_dict(), state["scheduler"]))
            self.group.update(state["group"])
            self.count = state["count"]
            self.moves |= {k for k in MOMENTA if self.group.get(k) != self.settings.get(k)}
            return
        log.info("scheduler: its options differ from the checkpoint's; it replays the new ones")


def adapts(function: Any) -> bool:
    """Return True if a scheduler's target takes an optimizer, as torch's and timm's do."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return "optimizer" in parameters and "length" not in parameters


def refuse_metric(function: Any, name: str) -> None:
    """Raise UserError for a scheduler that is stepped with a metric."""
    step = getattr(function, "step", None)
    metric = (
        step is not None
        and inspect.isclass(function)
        and any(word in inspect.signature(step).parameters for word in ("metrics", "metric"))
        and "Plateau" in function.__name__
    )
    if metric:
        raise UserError(
            f"scheduler._target_={name}: it is stepped with a metric. Use scheduler=plateau, which "
            "follows trainer.monitor."
        )


def _joined(fresh: Any, saved: Any) -> Any:
    """Return the saved state, completed from `fresh`, a scheduler with equal options."""
    if isinstance(fresh, Counter):  # MultiStepLR's milestones: an option, so equal
        return fresh
    if isinstance(fresh, dict) and isinstance(saved, Mapping):
        return {**fresh, **{key: _joined(fresh.get(key), value) for key, value in saved.items()}}
    if isinstance(fresh, list) and isinstance(saved, list) and len(fresh) == len(saved):
        return [_joined(one, other) for one, other in zip(fresh, saved, strict=True)]
    return saved


def _plain(value: Any) -> Any:
    """Return the part of a state that checkpoints can hold: plain values, containers, tensors."""
    if isinstance(value, Mapping):
        kept = {key: _plain(item) for key, item in value.items()}
        return {
            key: item
            for key, item in kept.items()
            if item is not _LEFT_OUT and isinstance(key, str | int)
        }
    if isinstance(value, list | tuple):
        items = [_plain(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else type(value)(items)
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    return _LEFT_OUT


_LEFT_OUT = object()
