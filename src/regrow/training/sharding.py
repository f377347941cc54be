"""FSDP2: each process holds a part of every parameter, its gradient, its moments and its average.

torch.distributed.fsdp.fully_shard does it. Here stands what the rest must know of sharded
tensors; all of it takes ordinary tensors too, and then does nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regrow.dotted import matches
from regrow.errors import UserError
from regrow.training.options import FSDPOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shard(model: nn.Module, options: FSDPOptions, mesh: Any) -> None:
    """Leave this process its part of each parameter; the others are gathered when needed.

    Raises UserError for a pattern that matches no module, and for a model that cannot be sharded.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[options.param_dtype] if options.param_dtype else None,
        reduce_dtype=DTYPES[options.reduce_dtype] if options.reduce_dtype else None,
        cast_forward_inputs=options.param_dtype is not None,
    )
    whole_model = dataclasses.replace(policy, output_dtype=torch.float32)  # for the loss
    for module in [*units(model, options.modules), model]:  # inner ones first
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
            module.set_gradient_divide_factor(1.0)  # the sum over processes, not the mean
            module.set_force_sum_reduction_for_comms(True)


def units(model: nn.Module, patterns: Sequence[str] | None) -> list[nn.Module]:
    """The modules that are gathered and freed as one, inner ones first, the model itself left out.

    Those whose names match, or, without patterns, the blocks: children of nn.Sequential and
    nn.ModuleList that have children themselves, outermost ones.
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
    """The outermost modules whose names match one of `patterns`, by name.

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
    for name, module in modules.items():  # a module comes before those in it
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and matches(name, patterns):
            found[name] = module
    return found


def is_sharded(tensor: Any) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose import would cost every start


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each, as a view."""
    if not (tensors and is_sharded(tensors[0])):
        return list(tensors)
    return [tensor.to_local() for tensor in tensors]  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, each of which must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_in(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, where `own` has a sharded tensor under the same name reduced to its part."""
    return {name: part_like(value, own.get(name)) for name, value in values.items()}


def part_like(value: Any, own: Any) -> Any:
    """A whole tensor as a sharded one like `own`; no process asks another."""
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = own.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, own.placements, src_data_rank=None)


def free(model: nn.Module) -> None:
    """Let go of what a forward pass without a backward pass has gathered."""
    module: Any
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()
