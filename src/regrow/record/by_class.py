"""A table of each class's metrics, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST = 10  # classes
WIDEST = 24  # characters of a class's name
RANKS = ("f1", "iou")  # the worst classes are those of the lowest


def table(values: Mapping[str, Any], of: str, where: str) -> list[str]:
    """Return a table of the metrics of each class of the set `of`; empty if it has none.

    `values` holds test/f1 and test/f1/cat. Shows at most ten classes: of more, those with the worst
    F1 or IoU, and `where` all are. Leaves out accuracy where it repeats recall, as a class's does.
    """
    columns: dict[str, dict[str, float]] = {}
    for key, value in values.items():
        its, _, rest = key.partition("/")
        metric, _, name = rest.partition("/")
        if its == of and name and f"{of}/{metric}" in values and isinstance(value, int | float):
            columns.setdefault(metric, {})[name] = value
    if repr(columns.get("accuracy")) == repr(columns.get("recall")):  # NaN is equal to NaN here
        columns.pop("accuracy", None)
    if not columns:
        return []
    rank = next((it for it in RANKS if it in columns), next(iter(columns)))
    names = [*dict.fromkeys(name for column in columns.values() for name in column)]
    title = f"{of}, by class"
    if len(names) > MOST:
        worst = [name for name in names if not math.isnan(columns[rank].get(name, math.nan))]
        worst.sort(key=lambda name: columns[rank][name])
        title = f"{of}, the worst {len(worst[:MOST])} of {len(names)} classes by {rank}"
        title, names = f"{title} (all: {where})", worst[:MOST]
    short = [name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…" for name in names]
    width = max(len(name) for name in short)
    rows = [" ".join([" " * width, *(f"{it:>9}" for it in columns)])]
    for name, shown in zip(names, short, strict=True):
        cells = (columns[it].get(name, math.nan) for it in columns)
        rows.append(" ".join([shown.ljust(width), *(f"{cell:>9.4g}" for cell in cells)]))
    return [title, *(f"  {row}" for row in rows)]
