"""Metrics of torchmetrics that a config names: exact over batches and processes, or refused.

A metric is exact if its state is a sum, a maximum or a minimum, or a list of all rows, which
torchmetrics gathers. Importing torchmetrics takes a second, so import this module only when there
is such a metric.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_mean
from torchmetrics.wrappers.abstract import WrapperMetric

from regrow.errors import UserError, brief

KEY = "task.extra_metrics"


def check(metrics: Mapping[str, Any], taken: Collection[str]) -> None:
    """Raise UserError for a name that is `taken`, and for a metric that would not be exact."""
    for name, metric in metrics.items():
        where = f"{KEY}.{name}"
        if name in (*taken, "loss") or not name.isidentifier():
            why = "is measured already" if name in (*taken, "loss") else "is not a plain name"
            raise UserError(f"{where}: {name} {why}. Choose another name, such as my_{name}.")
        if not isinstance(metric, Metric):
            raise UserError(
                f"{where}: {type(metric).__name__} is not a torchmetrics.Metric. Name a class of "
                "torchmetrics, or a subclass of torchmetrics.Metric of your own."
            )
        if isinstance(metric, WrapperMetric):
            raise UserError(
                f"{where}: {type(metric).__name__} wraps another metric, and depends on how the "
                "examples are grouped. Use the metric itself."
            )
        for state, reduction in metric._reductions.items():  # torchmetrics has no public name
            if reduction is dim_zero_mean:
                raise UserError(
                    f"{where}: the state {state} of {type(metric).__name__} is a mean over "
                    "processes, which unequal shares make wrong. Use a metric of sums or lists."
                )


def fresh(metric: Metric, device: torch.device, *, syncs: bool = True) -> Metric:
    """Return an empty copy on the device, with float64 instead of other floating-point sums.

    Its `compute` gathers the states of all processes, unless `syncs` is false.
    """
    copied = metric.clone()
    copied.reset()
    for each in _parts(copied):
        each._to_sync = syncs  # what `compute` reads; sync_on_compute sets it in __init__ alone
        states = each.metric_state.values()
        if any(isinstance(state, Tensor) and state.is_floating_point() for state in states):
            each.set_dtype(torch.float64)
    return copied.to(device)


def _parts(metric: Metric) -> list[Metric]:
    """Return the metric and those that it is computed from, as in `MeanSquaredError() ** 0.5`."""
    return [each for each in metric.modules() if isinstance(each, Metric)]


def update(metric: Metric, outputs: Tensor, targets: Tensor) -> None:
    """Update the metric with rows, of which there may be none."""
    if len(outputs):
        metric.update(outputs, targets)
    elif not metric.update_called:
        _take_no_rows(metric, outputs, targets)


def _take_no_rows(metric: Metric, outputs: Tensor, targets: Tensor) -> None:
    """Give an empty metric's states the form that rows would give them.

    `outputs` and `targets` hold no rows. Some metrics extend a scalar state to one number per
    target with their first rows. Processes gather states of equal shapes only: without this, a
    process that has no rows would make all of them wait forever.
    """
    trial = metric.clone()
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # of many classes
        warnings.simplefilter("ignore")
        trial.update(outputs, targets)
    for part, tried in zip(_parts(metric), _parts(trial), strict=True):
        for name, state in tried.metric_state.items():
            own = part.metric_state[name]
            if isinstance(state, list):
                setattr(part, name, state)  # of an empty tensor, which has the rows' type
            elif isinstance(own, Tensor) and own.shape != state.shape:
                setattr(part, name, own.expand(state.shape).clone())


def rehearse(metrics: Mapping[str, Metric], outputs: Tensor, targets: Tensor) -> None:
    """Raise UserError for a metric that fails on these rows, or does not give one exact number.

    `outputs` and `targets` are rows as the metric is updated with. Needs no other process.
    """
    cut = max(1, len(outputs) // 3)  # the mean of two equal parts would be that of the batch
    pairs = [(outputs[:cut], targets[:cut]), (outputs[cut:], targets[cut:])]
    parts = [it for it in pairs if len(it[0])]
    for name, metric in metrics.items():
        kind = type(metric).__name__
        try:
            whole = _value(name, _fed(metric, [(outputs, targets)]))
            updates = _value(name, _fed(metric, parts))
            shares = _computed(_gathered([_fed(metric, [part]) for part in parts]))
        except UserError:
            raise
        except Exception as error:  # torchmetrics raises errors of many classes
            raise UserError(
                f"{KEY}.{name}: {kind} does not take this task's outputs {_shown(outputs)} and "
                f"targets {_shown(targets)}: {brief(error, 200)}. Fix its arguments, or remove it."
            ) from None
        if _forms(metric, outputs, targets) != _forms(metric, outputs[:0], targets[:0]):
            raise UserError(
                f"{KEY}.{name}: {kind} keeps states whose shapes depend on its rows, so processes "
                "without rows could not join the others. Use another metric."
            )
        if not _alike(whole, updates):
            raise UserError(
                f"{KEY}.{name}: {kind} gives {whole:g} for a batch and {updates:g} for its parts "
                "together, so it depends on how the examples are grouped. Use another metric."
            )
        is_known = len(outputs) > 2  # a correlation over shares of one row each is NaN
        if not _is_number(shares) or (is_known and not _alike(whole, float(shares))):
            raise UserError(
                f"{KEY}.{name}: {kind} gives another value if processes share a batch. Give each "
                "add_state in its __init__ a dist_reduce_fx, such as sum, or use another metric."
            )


def _alike(one: float, other: float) -> bool:
    return math.isnan(one) or math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)


def _forms(metric: Metric, outputs: Tensor, targets: Tensor) -> list[Any]:
    """Return each state's type and shape after one update, in the parts that processes compare.

    The length of a list's rows may differ between processes; torchmetrics pads them.
    """
    copied = fresh(metric, outputs.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update(copied, outputs, targets)
    forms: list[Any] = []
    for state in (state for each in _parts(copied) for state in each.metric_state.values()):
        if isinstance(state, list):
            forms.append([(part.dtype, part.ndim, part.shape[1:]) for part in state])
        else:
            forms.append((state.dtype, state.shape))
    return forms


def _fed(metric: Metric, batches: list[tuple[Tensor, Tensor]]) -> Metric:
    """Return a copy that has been updated with the batches, and gathers nothing."""
    copied = fresh(metric, batches[0][0].device, syncs=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # a batch may lack a class
        for outputs, targets in batches:
            copied.update(outputs, targets)
    return copied


def _gathered(shares: list[Metric]) -> Metric:
    """Return the first one, with the states of all, as torchmetrics gathers those of processes."""
    for first, *others in zip(*map(_parts, shares), strict=True):
        reductions: Mapping[str, Any] = first._reductions
        for name, reduction in reductions.items():
            states: list[Any] = [each.metric_state[name] for each in (first, *others)]
            if isinstance(states[0], list):
                joined: Any = [part for state in states for part in state]
            else:
                joined = torch.stack(states)
                joined = joined if reduction is None else reduction(joined)
            setattr(first, name, joined)
    return shares[0]


def _computed(metric: Metric) -> Any:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return metric.compute()


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _value(name: str, metric: Metric) -> float:
    value = _computed(metric)
    if not _is_number(value):
        given = f"{value.numel()} numbers" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{KEY}.{name}: {type(metric).__name__} gives {given}, and a metric is one number. "
            "Choose an average, such as average: macro."
        )
    return float(value)


def _shown(rows: Tensor) -> str:
    return f"({str(rows.dtype).removeprefix('torch.')} {list(rows.shape)})"
