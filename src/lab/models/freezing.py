"""Freeze parts of a model by the names of its modules."""

from __future__ import annotations

from types import MethodType

from torch import nn

from regrow.dotted import matches
from regrow.errors import UserError, did_you_mean


def freeze(model: nn.Module, patterns: list[str]) -> list[str]:
    """Freeze all modules whose names match a pattern such as `layer[12].*`, with their children.

    Norms with running statistics stay in evaluation mode even after `model.train()`: otherwise
    their statistics would keep changing. Returns the names of the frozen parameters. Raises
    `UserError` for a pattern that matches nothing, and if nothing is left to train.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        matching = [module for name, module in modules.items() if matches(name, [pattern])]
        if not matching:
            children = ", ".join(name for name, _ in model.named_children())
            hint = did_you_mean(pattern, modules) or f" Its top modules are {children}."
            raise UserError(f"model.freeze={pattern} matches no module of the model.{hint}")
        for module in matching:
            module.requires_grad_(False)
            for part in module.modules():
                if getattr(part, "running_mean", None) is not None:
                    part.eval()
                    # Bound to the instance, so that the loop need not know and a deep copy keeps
                    # it.
                    part.train = MethodType(_stay_in_evaluation, part)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if patterns and len(frozen) == len(list(model.parameters())):
        raise UserError(f"model.freeze={patterns} leaves nothing to train. Remove a pattern.")
    return frozen


def _stay_in_evaluation(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
