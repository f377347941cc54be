"""FSDP2: each process holds a part of every parameter, its gradient, its moments and its average.

torch.distributed.fsdp.fully_shard does the sharding. These helpers handle sharded tensors for the
other modules; given ordinary tensors, they return them unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regrow.dotted import matches
from regrow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FSDPOptions:
    """Arguments of torch.distributed.fsdp.fully_shard, and the modules to shard as units."""

    modules: list[str] | None
    reshard_after_forward: bool
    param_dtype: str | None
    reduce_dtype: str | None


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shard(model: nn.Module, options: FSDPOptions, mesh: Any) -> None:
    """Shard the model: each process keeps its part of a parameter and gathers the rest when needed.

    Raises UserError for a pattern that matches no module, and for a model that cannot be sharded.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[options.param_dtype] if options.param_dtype else None,
        reduce_dtype=DTYPES[options.reduce_dtype] if options.reduce_dtype else None,
        cast_forward_inputs=options.param_dtype is not None,
    )
    whole_model = dataclasses.replace(policy, output_dtype=torch.float32)  # for the loss
    for module in [*units(model, options.modules), model]:  # inner modules first
        try:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=whole_model if module is model else policy,
                reshard_after_forward=options.reshard_after_forward,
            )
        except ValueError as error:
            raise UserError(
                f"trainer.strategy=fsdp: {type(module).__name__} cannot be sharded: {error} "
                "Use trainer.fsdp.modules to name others, or trainer.strategy=ddp."
            ) from error
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sum over processes, not mean
            module.set_force_sum_reduction_for_comms(True)


def units(model: nn.Module, patterns: Sequence[str] | None) -> list[nn.Module]:
    """Return the modules to gather and free as units, inner ones first, without the model itself.

    They are the modules that match `patterns`. Without patterns they are the blocks: the outermost
    children of nn.Sequential and nn.ModuleList that have children themselves.
    """
    if patterns is not None:
        return list(matching(model, patterns, "trainer.fsdp.modules").values())
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            is_listed = isinstance(module, nn.Sequential | nn.ModuleList)
            if is_listed and any(True for _ in child.children()):
                found.append(child)
            else:
                look(child)

    look(model)
    return [module for module in found if any(True for _ in module.parameters())]


def matching(model: nn.Module, patterns: Sequence[str], key: str) -> dict[str, nn.Module]:
    """Return the outermost modules whose names match one of `patterns`, by name.

    Raises UserError for a pattern that matches none.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in modules):
            raise UserError(
                f"{key}={[*patterns]}: no module matches {pattern}. "
                f"The model's are {', '.join([*modules][:20])}."
            )
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():  # a module comes before its children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and matches(name, patterns):
            found[name] = module
    return found


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; importing the class takes long


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of this process's part of each tensor."""
    if not (tensors and is_sharded(tensors[0])):
        return list(tensors)
    return [tensor.to_local() for tensor in tensors]  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor. All processes must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_in(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, with each tensor that is sharded in `own` reduced to this process's part."""
    return {name: part_like(value, own.get(name)) for name, value in values.items()}


def part_like(value: Any, own: Any) -> Any:
    """Return a full tensor sharded like `own`, without communication."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = own.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, own.placements, src_data_rank=None)


def free(model: nn.Module) -> None:
    """Free the parameters that a forward pass without a backward pass has gathered."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
