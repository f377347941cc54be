"""A table of the metrics of each class, or target, for the terminal and for a run's page."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from regrow.record import monitor

MOST, MOST_OF_PAGE = 10, 50  # classes
MOST_CELLS = 4_000  # of a page's table: some 300 kB
WIDEST = 24  # characters of a class's name
RANKS = ("f1", "iou", "r2")  # the worst classes, or targets, are those of the lowest


def table(values: Mapping[str, Any], of: str, where: str) -> list[str]:
    """Return a table of the metrics of each class or target of the set `of`; empty without any.

    `values` holds test/f1 and test/f1/cat. Shows at most ten classes: of more, those with the worst
    F1, IoU or R², and `where` all are. Leaves out accuracy where it repeats recall, as a class's
    does.
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
    rank = _rank(columns)
    names = [*dict.fromkeys(name for column in columns.values() for name in column)]
    title = f"{of}, by {unit_of(columns)}"
    if len(names) > MOST:
        worst = [name for name in names if not math.isnan(columns[rank].get(name, math.nan))]
        if not worst:  # as of a set whose pixels are all ignored
            return []
        sign = _sign(rank)
        worst.sort(key=lambda name: sign * columns[rank][name])
        title = f"{of}, the worst {len(worst[:MOST])} of {len(names)} {_plural(columns)} by {rank}"
        title, names = f"{title} (all: {where})", worst[:MOST]
    short = [name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}…" for name in names]
    width = max(len(name) for name in short)
    rows = [" ".join([" " * width, *(f"{it:>9}" for it in columns)])]
    for name, shown in zip(names, short, strict=True):
        cells = (columns[it].get(name, math.nan) for it in columns)
        rows.append(" ".join([shown.ljust(width), *(f"{cell:>9.4g}" for cell in cells)]))
    return [title, *(f"  {row}" for row in rows)]


def of_page(
    rows: Sequence[Sequence[Any]], sets: Sequence[str], metrics: Collection[str]
) -> tuple[list[Sequence[Any]], str]:
    """Return the rows of a page's table, and a sentence about those that it lacks; empty if none.

    A row is a name such as f1/cat, and a value for each of `sets`. If there are more than 50
    classes, or more cells than fit, returns those with the worst F1, IoU or R² on the last set,
    worst first. Rows whose name does not start with one of `metrics` belong to no class, and come
    before the others.
    """
    columns: dict[str, dict[str, Sequence[Any]]] = {}
    others: list[Sequence[Any]] = []
    for row in rows:
        metric, _, name = str(row[0]).partition("/")
        if metric in metrics:
            columns.setdefault(metric, {})[name] = row
        else:
            others.append(row)
    names = [*dict.fromkeys(name for column in columns.values() for name in column)]
    width = len(sets) + 1
    most = max(1, min(MOST_OF_PAGE, MOST_CELLS // width // max(1, len(columns))))
    others, left_out = first_rows(others, width)
    if len(names) <= most:
        return [*others, *(row for column in columns.values() for row in column.values())], left_out
    rank = _rank(columns)
    sign = _sign(rank)
    numbers = {
        name: [_number(value, sign) for value in row[1:]] for name, row in columns[rank].items()
    }
    measured = [index for its in numbers.values() for index, it in enumerate(its) if it < math.inf]
    last = max(measured, default=0)
    worst = sorted(names, key=lambda name: numbers[name][last] if name in numbers else math.inf)
    chosen = worst[:most]
    shown = [column[name] for column in columns.values() for name in chosen if name in column]
    said = f"Shown: the {most} worst of {len(names):,} {_plural(columns)} by {sets[last]}/{rank}."
    return [*others, *shown], f"{left_out} {said}".strip()


def first_rows(rows: Sequence[Sequence[Any]], width: int) -> tuple[list[Sequence[Any]], str]:
    """Return the first rows of `width` cells that fit a page, and a sentence if that is not all."""
    most = max(1, MOST_CELLS // width)
    said = f"Shown: the first {most:,} of {len(rows):,} rows." if len(rows) > most else ""
    return [*rows[:most]], said


def unit_of(metrics: Collection[str]) -> str:
    """Return what the metrics are measured of: the targets of a regression, or classes."""
    return "target" if "r2" in metrics else "class"


def _plural(metrics: Collection[str]) -> str:
    return {"class": "classes"}.get(unit_of(metrics), "targets")


def _rank(columns: Collection[str]) -> str:
    return next((it for it in RANKS if it in columns), next(iter(columns)))


def _sign(rank: str) -> int:
    """Return -1 for an error, of which the worst class has the highest; else 1."""
    return -1 if monitor.by_name(rank) == "min" else 1


def _number(value: Any, sign: int) -> float:
    """Return the value times `sign`; infinity for None and NaN, so that such a class is last."""
    is_number = isinstance(value, int | float) and not math.isnan(value)
    return sign * value if is_number else math.inf
