"""The data that a config names, without a run: for scripts that only read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from regrow.cli.notebook import composed
from regrow.config.check import check_data
from regrow.config.command_line import paths_as_typed, quoted, read, shell
from regrow.config.hydra_access import plain
from regrow.config.targets import allow, instantiate
from regrow.errors import UserError
from regrow.randomness import seed_data

if TYPE_CHECKING:
    from regrow.feeding.loaders import Data


def data_of(overrides: Sequence[str]) -> Data:
    """Return the data of `data=…` and `data.<key>=…`, not augmented and not normalised.

    Raises UserError with one line for a mistake.
    """
    raw = ["data.normalize=none", "data.augment=false", "data.num_workers=0"]
    with composed("train", [*overrides, *raw]) as config:
        for key in config.data:
            if OmegaConf.is_missing(config.data, key):
                raise UserError(f"data.{key} must be given: add data.{key}=…")
        node, seed = plain(config.data), int(config.seed)  # that of a run, not data.seed
    source = node.get("source")
    if isinstance(source, dict) and source.get("root", "") is None:
        raise UserError("data.root must be given: add data.root=…")
    check_data(node)
    allow(node)
    seed_data(seed)
    found: Data = instantiate(node)
    return found


def datasets_of(overrides: Sequence[str], seed: int) -> dict[str, Any]:
    """Return the data sets of `data.<set>._target_=…` or of `data._target_=…`, by their names.

    What they draw as they are made follows from `seed`.
    Raises UserError unless they have numbered items.
    """
    node: dict[str, Any] = {}
    for override in paths_as_typed(overrides, multirun=False):
        value = read(override)
        key, _, text = override.partition("=")
        if value is ... or hasattr(value, "is_sweep_override"):  # an error, or several values
            typed = shell([f"{key}={quoted(text)}"])
            raise UserError(
                f"{override} is not one value. Text with special characters needs quotes: {typed}"
            )
        *parents, last = key.split(".")[1:]
        place = node
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    allow(node)
    seed_data(seed)
    if "_target_" in node:
        made = instantiate(node)
    else:
        for name, each in node.items():
            if not isinstance(each, dict) or "_target_" not in each:
                raise UserError(
                    f"data.{name}: without data=… or folder=…, it must name a data set. Add "
                    f"data.{name}._target_=…"
                )
        made = {name: instantiate(each) for name, each in node.items()}
    if not hasattr(made, "keys"):
        made = {"train": made}
    for name in made.keys():  # noqa: SIM118  not every mapping of data sets can be iterated
        if not hasattr(type(made[name]), "__len__") or not hasattr(type(made[name]), "__getitem__"):
            raise UserError(
                f"data.{name}: {type(made[name]).__name__} has no length or no numbered items. "
                "Give a map-style data set."
            )
    return {str(name): made[name] for name in made.keys()}  # noqa: SIM118
