"""Parameter groups, the update, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, _muon

from lab.several import by_name, full
from regrow.config.targets import call_failed
from regrow.distributed import sharding
from regrow.dotted import matches
from regrow.errors import UserError
from regrow.numerics.totals import Skipped, Totals, either_is_not_finite, numbers, times

log = logging.getLogger(__name__)

CLASS = "class"  # the key of the optimizer's class name in its part of a checkpoint

# Keys of a parameter group that are settings rather than state, besides its class's arguments.
SETTINGS = {
    *("base_lr", "lr_scale", "weight_decay", "momentum", "dampening", "nesterov", "betas", "eps"),
    *("alpha", "centered", "lr_decay", "momentum_decay", "ns_steps", "adjust_lr_fn"),
    *("fused", "foreach", "capturable"),
}
# Settings that need another tensor per parameter in the state, unless they are zero or false.
# SGD is not here: it creates a missing momentum itself.
NEED_MOMENTS: Mapping[str, type[Optimizer]] = {
    "momentum": torch.optim.RMSprop,
    "centered": torch.optim.RMSprop,
    "amsgrad": torch.optim.Adam,  # and AdamW
}
# The optimizers whose fused kernels accept sharded parameters.
_FUSED_ON_SHARDS = (torch.optim.Adam, torch.optim.AdamW)
# Those whose fused kernels take `found_inf`, and change neither weights nor moments where it is 1.
_SKIP_ON_DEVICE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def parameter_groups(
    model: nn.Module, *, lr_scale: Mapping[str, float] | None, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups that share a learning rate and a weight decay.

    `lr_scale` maps patterns of parameter or module names to factors of the learning rate; the first
    match counts. Vectors (norms, biases) get weight decay only with `decay_norms_and_biases`.
    Raises UserError for a pattern that matches nothing and for a model without trainable
    parameters.
    """
    lr_scale = lr_scale or {}
    groups: dict[tuple[float, bool], dict[str, Tensor]] = {}
    unused = set(lr_scale)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        for pattern, factor in lr_scale.items():
            if _matches(name, pattern):
                scale = factor
                unused.discard(pattern)
                break
        decays = decay_norms_and_biases or parameter.ndim > 1
        groups.setdefault((scale, decays), {})[name] = parameter
    if unused:
        names = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        raise UserError(
            f"param_groups.lr_scale={dict(lr_scale)}: no trainable parameter matches "
            f"{', '.join(sorted(unused))}, or earlier patterns, which win, match the same. The "
            f"model's parts are {', '.join(names)}."
        )
    if not groups:
        if any(True for _ in model.parameters()):
            raise UserError(
                "model: requires_grad is false for all parameters, which leaves nothing to train. "
                "Leave it true for some, or freeze fewer modules."
            )
        raise UserError(
            "model: it has no parameters, so there is nothing to train. Assign its layers to "
            "attributes, or use nn.ModuleList and nn.ParameterList."
        )
    return [
        {"params": [*parameters.values()], "param_names": [*parameters], "lr_scale": scale}
        | ({} if decays else {"weight_decay": 0.0})
        for (scale, decays), parameters in groups.items()
    ]


def scales_of(name: str, lr_scale: Mapping[str, float] | None) -> dict[str, float]:
    """Return the patterns of `lr_scale` for one of several models, without its name."""
    own = {}
    for pattern, factor in (lr_scale or {}).items():
        first, _, rest = pattern.partition(".")
        if first == name:
            own[rest or "*"] = factor
    return own


def _matches(name: str, pattern: str) -> bool:
    """Return True if `pattern` matches the parameter's name or that of a module around it."""
    return matches(name, [pattern, f"{pattern}.*"])


def build(make: Callable[..., Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """Return the optimizer over `groups`. Each gets `base_lr`, which the schedule multiplies."""
    for group in groups:
        group["lr_scale"] = float(group["lr_scale"])
    try:
        optimizer = make(groups)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(call_failed("optimizer", make, error)) from error
    if hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free optimizers refuse to step otherwise
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"] * group["lr_scale"]
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            if sharding.is_sharded(group["params"][0]) and not isinstance(part, _FUSED_ON_SHARDS):
                group.update({"fused": False} if "fused" in group else {})
    device = optimizer.param_groups[0]["params"][0].device
    if skips_on_device(optimizer, device):  # its rate is then a tensor, which a CUDA graph reads
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
            group.update({"capturable": True} if "capturable" in group else {})
    return optimizer


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load moments and counters. Settings stay as configured, so a new learning rate takes effect.

    The moments of another class do not fit: then this optimizer warns and starts without moments.
    """
    refuse_other(optimizer, state)
    state = dict(state)
    before, now = state.pop(CLASS, None), type(optimizer).__qualname__
    if is_of_another(optimizer, state, before):
        log.warning(
            "optimizer: the checkpoint's moments belong to %s and do not carry over: %s starts "
            "without moments",
            *(before or "another optimizer", now),
        )
        return
    configured = [dict(group) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the checkpoint's optimizer does not fit: {' '.join(str(error).split())}. Leave "
            "optimizer and param_groups as they were, or start a new run with init_from=…"
        ) from error
    kind = type(optimizer)
    # A user's own class may change its arguments as it trains, which makes them state.
    is_known = kind.__module__.startswith(("torch.optim", __name__))
    arguments = inspect.signature(kind).parameters.keys() if is_known else set()
    names = (SETTINGS | arguments) - {"params", "lr"}
    for group, fresh in zip(optimizer.param_groups, configured, strict=True):
        group.update({name: fresh[name] for name in names & fresh.keys()})
        lr = group["lr"] = float(group["lr"])
        if _is_on_device(fresh["lr"]):
            group["lr"] = fresh["lr"].fill_(lr)
    # Checkpoints hold contiguous tensors, but fused kernels walk memory in the parameter's order.
    # torch leaves Adam's step on the host if the checkpoint was written without these kernels.
    for part in getattr(optimizer, "parts", [optimizer]):
        on_device = any(g.get("fused") or g.get("capturable") for g in part.param_groups)
        for parameter, moments in part.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    layout = torch.empty_like(parameter, dtype=value.dtype)
                    moments[name] = layout.copy_(sharding.part_like(value, parameter))
                elif name == "step" and on_device and isinstance(value, Tensor):
                    moments[name] = value.to(parameter.device)


def refuse_other(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise UserError if a checkpoint's optimizer has other groups, or lacks needed moments.

    Reads no tensors. The moments of another optimizer do not matter: see `load`.
    """
    parts = state.get("parts", [state])
    saved = [group for part in parts for group in part.get("param_groups", ())]
    if not saved or is_of_another(optimizer, state, state.get(CLASS)):
        return
    groups = (saved, optimizer.param_groups)
    there, here = ([len(its.get("params", ())) for its in side] for side in groups)
    if there != here:
        raise UserError(
            "the checkpoint's optimizer has other groups of parameters. Leave optimizer and "
            "param_groups as they were, or start a new run with init_from=…"
        )
    for before, now in zip(saved, optimizer.param_groups, strict=True):
        for name, kind in NEED_MOMENTS.items():
            if isinstance(optimizer, kind) and now.get(name) and not before.get(name):
                value, earlier = (str(its.get(name)).lower() for its in (now, before))
                raise UserError(
                    f"optimizer.{name}={value}: the checkpoint lacks the moments that this needs, "
                    f"as it was written with {earlier}. Use optimizer.{name}={earlier}, or start a "
                    "new run with init_from=…"
                )


def is_of_another(optimizer: Optimizer, state: Mapping[str, Any], before: str | None) -> bool:
    """Return True if a checkpoint's moments belong to another class than `optimizer`.

    Older records lack the class, so their settings decide: of two classes, each has some that the
    other lacks. If only one side has more, it may be the same class in another version of torch.
    """
    if before is not None:
        return before != type(optimizer).__qualname__
    if ("parts" in state) != hasattr(optimizer, "parts"):
        return True
    groups = state.get("param_groups")
    if not groups:
        return False
    there, here = {*groups[0]}, {*optimizer.param_groups[0]}
    return bool(there - here) and bool(here - there)


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate for the next update. It depends on the step alone."""
    for group in optimizer.param_groups:
        lr = group["base_lr"] * factor
        if _is_on_device(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _is_on_device(lr: float | Tensor) -> bool:
    return isinstance(lr, Tensor) and lr.is_cuda


def rates(optimizers: Optimizer | dict[str, Optimizer]) -> dict[str, float]:
    """Return `lr/x<scale>` for each scaled group, and `lr` of an unscaled or else the first group.

    Several optimizers have `lr/<name>` and `lr/<name>/x<scale>`.
    """
    return {
        full("lr", name, "/") + rate.removeprefix("lr"): lr
        for name, optimizer in by_name(optimizers).items()
        for rate, lr in _rates(optimizer).items()
    }


def _rates(optimizer: Optimizer) -> dict[str, float]:
    found = {group["lr_scale"]: float(group["lr"]) for group in optimizer.param_groups}
    scaled = {f"lr/x{scale:g}": lr for scale, lr in found.items() if scale != 1}
    first = optimizer.param_groups[0]["lr_scale"]
    return {"lr": found.get(1.0, found[first]), **scaled}


@dataclass(frozen=True)
class Clipping:
    norm: float | None
    value: float | None


@contextlib.contextmanager
def evaluating(optimizers: Optimizer | dict[str, Optimizer], model: nn.Module) -> Iterator[None]:
    """Switch schedule-free optimizers to their evaluation weights, then back.

    Such optimizers (Defazio et al., "The road less scheduled", 2024) train one point and evaluate
    another. Switching back is not bit-exact, so the weights are copied and restored.
    """
    switched: list[Any] = schedule_free(optimizers)
    if not switched:
        yield
        return
    parameters = sharding.local([p.data for p in model.parameters()])
    before = [p.clone() for p in parameters]
    for optimizer in switched:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switched:
            optimizer.train()
        torch._foreach_copy_(parameters, before)


def schedule_free(optimizers: Optimizer | dict[str, Optimizer]) -> list[Optimizer]:
    """Return the optimizers that evaluate different weights from those they train."""
    every = by_name(optimizers).values()
    return [each for each in every if hasattr(each, "eval") and hasattr(each, "train")]


def skips_on_device(optimizer: Optimizer | dict[str, Optimizer], device: torch.device) -> bool:
    """Return True if a bad step can be skipped without asking the device first.

    These are also the optimizers whose update a CUDA graph may hold: they read nothing on the host
    and keep no counter in Python.
    """
    if device.type != "cuda":
        return False
    if isinstance(optimizer, dict):
        return all(skips_on_device(each, device) for each in optimizer.values())
    if type(optimizer) is MuonWithAdamW:  # a subclass may count in Python
        is_sharded = any(
            sharding.is_sharded(p) for g in optimizer.param_groups for p in g["params"]
        )
        return not is_sharded
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return type(optimizer) in _SKIP_ON_DEVICE and is_fused


def settings(optimizers: Optimizer | dict[str, Optimizer]) -> Hashable:
    """Return the numbers, other than rates, that a schedule may change between updates."""
    groups = [group for each in by_name(optimizers).values() for group in each.param_groups]
    return tuple(
        (g.get("momentum"), *(g.get("betas") or ()), g.get("weight_decay")) for g in groups
    )


def _skips_now(optimizer: Optimizer, device: torch.device) -> bool:
    # SGD's first step allocates its momentum uninitialised, and fills it only if the step runs.
    is_first = bool(optimizer.defaults.get("momentum") and not optimizer.state)
    return skips_on_device(optimizer, device) and not is_first


def update(
    optimizer: Optimizer,
    gradients: list[Tensor],
    norm: Tensor | float,
    *,
    factor: float | Tensor,
    clipping: Clipping,
    totals: Totals,
) -> Skipped:
    """Update with `gradients * factor`, clipped; skip the update if it would not be finite.

    `norm` is the norm of `gradients` before the factor, a number or a () tensor; `totals` are the
    step's.
    """
    scale: float | Tensor
    skipped: bool | Tensor
    empty = totals.is_empty()
    if isinstance(norm, Tensor) and _skips_now(optimizer, norm.device):
        true_norm = times(norm, factor)
        assert isinstance(true_norm, Tensor)
        skipped = either_is_not_finite(true_norm, totals.loss)
        optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        scale = factor
        if clipping.norm is not None:
            scale = times((clipping.norm / (true_norm + 1e-6)).clamp(max=1.0), factor)
    else:
        # The only host synchronisation of this step.
        norm_read, loss, scale = numbers(norm, totals.loss, factor)
        if not (math.isfinite(norm_read * scale) and math.isfinite(loss)):
            return Skipped(True, empty)
        skipped = False
        if clipping.norm is not None:
            scale *= min(1.0, clipping.norm / (norm_read * scale + 1e-6))
    # Same as torch.nn.utils.clip_grad_norm_, with `factor` multiplied in, to save one pass.
    if not isinstance(scale, float) or scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    if clipping.value is not None:
        torch._foreach_clamp_min_(gradients, -clipping.value)
        torch._foreach_clamp_max_(gradients, clipping.value)
    optimizer.step()
    return Skipped(skipped, empty)


class MuonWithAdamW(Optimizer):
    """Muon for the matrices inside the network, AdamW for everything else, as one optimizer.

    Muon orthogonalises the momentum of a matrix (Jordan et al., "Muon", 2024). It is not meant for
    vectors, embeddings or output layers: parameters that match `adamw_modules` go to AdamW even if
    they are matrices. Convolution kernels also go to AdamW, unless `kernels` gives them to Muon as
    matrices with one row per filter.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        weight_decay: float,
        adjust_lr_fn: str,
        kernels: bool,
        adamw_modules: list[str],
        adamw_betas: tuple[float, float],
        adamw_eps: float,
    ) -> None:
        def is_for_muon(name: str, parameter: Tensor) -> bool:
            # A kernel with one row, such as a class token, is a vector.
            is_kernel = kernels and parameter.ndim > 2 and len(parameter) > 1
            outside = any(_matches(name, pattern) for pattern in adamw_modules)
            return (parameter.ndim == 2 or is_kernel) and not outside

        groups = [part for group in params for part in _split(group, is_for_muon)]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.kernels: list[tuple[Tensor, Tensor]] = []  # (kernel, the matrix that Muon updates)
        matrices = [g for g in self.param_groups if g["is_for_muon"]]
        for group in matrices:
            group["params"] = [self._as_matrix(parameter) for parameter in group["params"]]
        others = [g for g in self.param_groups if not g["is_for_muon"]]
        self.parts: list[Optimizer] = []
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    ns_steps=ns_steps,
                    adjust_lr_fn=adjust_lr_fn,
                )
            )
        if others:
            beta1, beta2 = adamw_betas
            self.parts.append(
                torch.optim.AdamW(others, lr=lr, betas=(beta1, beta2), eps=adamw_eps, fused=True)
            )
        # The parts hold the groups and moments; this object presents them as one.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def _as_matrix(self, parameter: Tensor) -> Tensor:
        """Return a kernel as a matrix copy: its columns need not match its memory layout."""
        if parameter.ndim == 2:
            return parameter
        matrix = parameter.detach().flatten(1).clone(memory_format=torch.contiguous_format)
        self.kernels.append((parameter, matrix))
        return matrix

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for kernel, matrix in self.kernels:
            matrix.view_as(kernel).copy_(kernel)
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        skipped = getattr(self, "found_inf", None)
        for part in self.parts:
            if skipped is None:
                part.step()
            elif isinstance(part, torch.optim.Muon):
                muon_on_device(part, skipped)
            else:
                part.found_inf = skipped  # type: ignore[attr-defined]
                part.step()
        for kernel, matrix in self.kernels:
            kernel.copy_(matrix.view_as(kernel))
            matrix.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)
        for kernel, _ in self.kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


@torch.no_grad()
def muon_on_device(muon: torch.optim.Muon, skipped: Tensor) -> None:
    """Do Muon's step with the learning rate as a tensor; change nothing where `skipped` is 1.

    torch's own step reads the learning rate on the host.
    """
    bad = skipped.bool()
    for group in muon.param_groups:
        matrices: list[Tensor] = []
        gradients: list[Tensor] = []
        momenta: list[Tensor] = []
        muon._init_group(group, matrices, gradients, momenta)
        decay = 1 - group["lr"] * group["weight_decay"]
        for matrix, gradient, momentum in zip(matrices, gradients, momenta, strict=True):
            mean = momentum.lerp(gradient, 1 - group["momentum"])
            update = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
            update = _muon._zeropower_via_newtonschulz(
                update, group["ns_coefficients"], group["ns_steps"], group["eps"]
            )
            ratio = _muon._adjust_lr(1.0, group["adjust_lr_fn"], matrix.shape)
            moved = matrix * decay - update.to(matrix.dtype) * (group["lr"] * ratio)
            torch.where(bad, momentum, mean, out=momentum)
            torch.where(bad, matrix, moved, out=matrix)


def _split(
    group: dict[str, Any], is_for_muon: Callable[[str, Tensor], bool]
) -> Iterator[dict[str, Any]]:
    named = [*zip(group["param_names"], group["params"], strict=True)]
    for chosen in (True, False):
        part = {name: p for name, p in named if is_for_muon(name, p) is chosen}
        if part:
            names, params = [*part], [*part.values()]
            yield {**group, "params": params, "param_names": names, "is_for_muon": chosen}


def first_non_finite(model: nn.Module) -> str | None:
    """Return the first parameter with a non-finite gradient, or else value; None if all are finite.

    With a sharded model, all processes must call this together.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not sharding.whole(parameter.grad).isfinite().all():
            return name
    for name, parameter in model.named_parameters():
        if not math.isfinite(sharding.whole(parameter).detach().float().sum().item()):
            return name
    return None
