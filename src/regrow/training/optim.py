"""Parameter groups by rule, the update itself, and Muon for matrices with AdamW for the rest."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from regrow.dotted import matches
from regrow.errors import UserError
from regrow.training import sharding, sums

log = logging.getLogger(__name__)


def parameter_groups(
    model: nn.Module, *, lr_scale: Mapping[str, float] | None, decay_norms_and_biases: bool
) -> list[dict[str, Any]]:
    """The trainable parameters in groups that share a rate and a decay.

    `lr_scale` maps a pattern of parameter or module names to a factor of the rate; the first that
    matches counts. Vectors (norms, biases) get no weight decay unless `decay_norms_and_biases`.
    Raises UserError for a pattern that matches nothing and for a model with nothing to train.
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
            f"{', '.join(sorted(unused))}. The model's parts are {', '.join(names)}."
        )
    if not groups:
        if any(True for _ in model.parameters()):
            raise UserError("model.freeze leaves nothing to train. Freeze fewer modules.")
        raise UserError(
            "model: it has no parameters, so there is nothing to train. Assign its layers to "
            "attributes, or use nn.ModuleList and nn.ParameterList."
        )
    return [
        {"params": [*parameters.values()], "param_names": [*parameters], "lr_scale": scale}
        | ({} if decays else {"weight_decay": 0.0})
        for (scale, decays), parameters in groups.items()
    ]


def _matches(name: str, pattern: str) -> bool:
    """Return True if a pattern is for a parameter: its name, or that of a module around it."""
    return matches(name, [pattern, f"{pattern}.*"])


def build(make: Callable[..., Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over `groups`, each with the rate that the schedule multiplies, `base_lr`."""
    for group in groups:
        group["lr_scale"] = float(group["lr_scale"])
    try:
        optimizer = make(groups)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"optimizer: {' '.join(str(error).split())}.") from error
    if hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free ones refuse to step otherwise
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"] * group["lr_scale"]
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            if sharding.is_sharded(group["params"][0]) and not isinstance(part, _FUSED_ON_SHARDS):
                group.update({"fused": False} if "fused" in group else {})
    return optimizer


def load(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Take up moments and counters. What the config sets stays, or a new rate would be lost.

    Those of another optimizer do not fit this one: it starts without moments, and one line says so.
    """
    state = dict(state)
    before, now = state.pop(CLASS, None), type(optimizer).__qualname__
    if is_of_another(optimizer, state, before):
        log.warning(
            "optimizer: the checkpoint's moments are of %s and do not carry over: %s starts "
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
    for group, fresh in zip(optimizer.param_groups, configured, strict=True):
        group.update({name: fresh[name] for name in SETTINGS & fresh.keys()})
    # A checkpoint holds contiguous tensors; fused kernels walk memory in the parameter's own order.
    for part in getattr(optimizer, "parts", [optimizer]):
        for parameter, moments in part.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    layout = torch.empty_like(parameter, dtype=value.dtype)
                    moments[name] = layout.copy_(sharding.part_like(value, parameter))


def is_of_another(optimizer: Optimizer, state: Mapping[str, Any], before: str | None) -> bool:
    """Return True if a checkpoint's moments are of another class than `optimizer`.

    A record from before the class was kept is told by its settings: each kind has some that the
    other lacks. One kind alone may have more of them in another version of torch.
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
    """The rate of every group for the next update. It follows from the step alone."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def rates(optimizer: Optimizer) -> dict[str, float]:
    """`lr/x<scale>` of each group with a scale, and `lr` of the others, else of the first."""
    found = {group["lr_scale"]: group["lr"] for group in optimizer.param_groups}
    scaled = {f"lr/x{scale:g}": lr for scale, lr in found.items() if scale != 1}
    return {"lr": found.get(1.0, optimizer.param_groups[0]["lr"]), **scaled}


# Whether a step was left out as not finite: known to the host, or () 1.0 or 0.0 on the device.
Skipped = bool | Tensor


CLASS = "class"  # of the optimizer, in its part of a checkpoint

# Of a parameter group, those that are no state of any optimizer.
SETTINGS = {
    *("base_lr", "lr_scale", "weight_decay", "momentum", "dampening", "nesterov", "betas", "eps"),
    *("alpha", "centered", "lr_decay", "momentum_decay", "ns_steps", "adjust_lr_fn"),
    *("fused", "foreach"),
}


@dataclass(frozen=True)
class Clipping:
    norm: float | None
    value: float | None


# The others' fused kernels take no sharded parameters.
_FUSED_ON_SHARDS = (torch.optim.Adam, torch.optim.AdamW)
# Their fused kernels take `found_inf` and leave weights and moments alone where it is 1.
_SKIP_ON_DEVICE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


@contextlib.contextmanager
def evaluating(optimizer: Optimizer, model: nn.Module) -> Iterator[None]:
    """Lets a schedule-free optimizer show the weights it stands for, and puts back the others.

    Such optimizers (Defazio et al., "The road less scheduled", 2024) train one point and evaluate
    another. Their own way back is not exact to the bit, so the weights are kept and copied back.
    """
    if not (hasattr(optimizer, "eval") and hasattr(optimizer, "train")):
        yield
        return
    parameters = sharding.local([p.data for p in model.parameters()])
    before = [p.clone() for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        torch._foreach_copy_(parameters, before)


def skips_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Return True if a bad step can be skipped without asking the device first."""
    if device.type != "cuda" or type(optimizer) not in _SKIP_ON_DEVICE:
        return False
    if not all(group.get("fused") for group in optimizer.param_groups):
        return False
    # SGD's first step makes its momentum from uninitialised memory and fills it only if it runs.
    return not (optimizer.defaults.get("momentum") and not optimizer.state)


def update(
    optimizer: Optimizer,
    gradients: list[Tensor],
    norm: Tensor | float,
    *,
    factor: float | Tensor,
    clipping: Clipping,
    valid: Tensor | float,
) -> Skipped:
    """One update with `gradients * factor`, clipped; nothing at all where it would not be finite.

    `norm` is the norm of `gradients` before the factor, `valid` is finite if the loss is; each is a
    number or a () tensor. Returns whether the update was skipped: as a bool if the host had to
    know, else as a () tensor of 1.0 or 0.0 that nobody has waited for.
    """
    scale: float | Tensor
    skipped: Skipped
    if isinstance(norm, Tensor) and skips_on_device(optimizer, norm.device):
        true_norm = norm * factor
        skipped = (true_norm + valid * 0).isfinite().logical_not().float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        scale = factor
        if clipping.norm is not None:
            scale = factor * (clipping.norm / (true_norm + 1e-6)).clamp(max=1.0)
    else:
        # The one synchronisation of such a step.
        norm_read, valid_read, scale = numbers(norm, valid, factor)
        if not (math.isfinite(norm_read * scale) and math.isfinite(valid_read)):
            return True
        skipped = False
        if clipping.norm is not None:
            scale *= min(1.0, clipping.norm / (norm_read * scale + 1e-6))
    # As torch.nn.utils.clip_grad_norm_, with the factor multiplied in: one pass for both.
    if not isinstance(scale, float) or scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    if clipping.value is not None:
        torch._foreach_clamp_min_(gradients, -clipping.value)
        torch._foreach_clamp_max_(gradients, clipping.value)
    optimizer.step()
    return skipped


def numbers(norm: Tensor | float, *others: Tensor | float) -> list[float]:
    """() tensors as floats, with one wait for the device; on a CPU there is none to save."""
    if isinstance(norm, float) or sums.on_host(norm.device):
        return [float(value) for value in (norm, *others)]
    tensors = [torch.as_tensor(value, device=norm.device) for value in (norm, *others)]
    found: list[float] = torch.stack(tensors).tolist()
    return found


class MuonWithAdamW(Optimizer):
    """Muon for the matrices inside the network, AdamW for everything else, as one optimizer.

    Muon orthogonalises the momentum of a matrix (Jordan et al., "Muon", 2024). It is not meant for
    vectors, nor for embeddings and output layers: `adamw_modules` are patterns of what AdamW takes,
    matrix or not. Convolution kernels are AdamW's too, unless `kernels` hands them to Muon as
    matrices with a row for each filter.
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
            # One row, as of a class token, is a vector.
            is_kernel = kernels and parameter.ndim > 2 and len(parameter) > 1
            outside = any(_matches(name, pattern) for pattern in adamw_modules)
            return (parameter.ndim == 2 or is_kernel) and not outside

        groups = [part for group in params for part in _split(group, is_for_muon)]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.kernels: list[tuple[Tensor, Tensor]] = []  # each with the matrix that Muon updates
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
        # The parts hold the groups and the moments; this object shows them as one.
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def _as_matrix(self, parameter: Tensor) -> Tensor:
        """A copy of a kernel: the order of its columns does not follow its layout in memory."""
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
        for part in self.parts:
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


def _split(
    group: dict[str, Any], is_for_muon: Callable[[str, Tensor], bool]
) -> Iterator[dict[str, Any]]:
    named = [*zip(group["param_names"], group["params"], strict=True)]
    for chosen in (True, False):
        part = {name: p for name, p in named if is_for_muon(name, p) is chosen}
        if part:
            names, params = [*part], [*part.values()]
            yield {**group, "params": params, "param_names": names, "is_for_muon": chosen}


def gradient_norm(gradients: list[Tensor]) -> Tensor | float:
    """() the global 2-norm; NaN or inf if any element is. On a CPU a number, as it is soon read."""
    half = any(gradient.dtype in (torch.float16, torch.bfloat16) for gradient in gradients)
    # float16 ends at 65,504, and a norm of inf would skip a good step.
    norms = torch._foreach_norm(gradients, 2, torch.float32 if half else None)
    if sums.on_host(norms[0].device):
        return math.hypot(*[norm.item() for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def first_non_finite(model: nn.Module) -> str | None:
    """The name of the first parameter whose gradient, or else value, is not finite.

    Of a sharded model all processes must ask.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not sharding.whole(parameter.grad).isfinite().all():
            return name
    for name, parameter in model.named_parameters():
        if not math.isfinite(sharding.whole(parameter).detach().float().sum().item()):
            return name
    return None
