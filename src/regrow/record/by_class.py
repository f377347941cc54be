"""A table of the metrics of each class or target, for the terminal and for a run's page."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from regrow.record import monitor

MOST, MOST_OF_PAGE = 10, 50  # classes
MOST_CELLS = 4_000  # of a page's table: some 300 kB
WIDEST = 24  # characters of a class's name
RANKS = ("f1", "iou", "r2")  # the worst have the lowest; errors have the units of their targets


def table(values: Mapping[str, Any], of: str, where: str) -> list[str]:
    """Return a table of the metrics of each class of the set `of`; empty if it has none.

    `values` holds test/f1 and test/f1/cat. Shows at most ten classes: of more, those with the worst
    F1 or IoU, or targets with the worst R², and `where` all are. Leaves out accuracy where it
    repeats recall, as a class's does.
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
    title = f"{of}, by {noun(columns)}"
    if len(names) > MOST:
        worst = [name for name in names if not math.isnan(columns[rank].get(name, math.nan))]
        if not worst:  # such as a set whose pixels are all ignored
            return []
        worst.sort(key=lambda name: _sign(rank) * columns[rank][name])
        what = _several(columns)
        title = f"{of}, the worst {len(worst[:MOST])} of {len(names)} {what} by {rank}"
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
    classes, or more cells than fit, returns those with the worst F1 or IoU on the last set, worst
    first. Rows whose name does not start with one of `metrics` belong to no class and come first.
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
    numbers = {name: [_number(value) for value in row[1:]] for name, row in columns[rank].items()}
    measured = [index for its in numbers.values() for index, it in enumerate(its) if it < math.inf]
    last = max(measured, default=0)

    def order(name: str) -> float:
        value = numbers[name][last] if name in numbers else math.inf
        return _sign(rank) * value if value < math.inf else math.inf

    chosen = sorted(names, key=order)[:most]
    shown = [column[name] for column in columns.values() for name in chosen if name in column]
    what = _several(columns)
    said = f"Shown: the {most} worst of {len(names):,} {what} by {sets[last]}/{rank}."
    return [*others, *shown], f"{left_out} {said}".strip()


def first_rows(rows: Sequence[Sequence[Any]], width: int) -> tuple[list[Sequence[Any]], str]:
    """Return the first rows of `width` cells that fit a page, and a sentence if that is not all."""
    most = max(1, MOST_CELLS // width)
    said = f"Shown: the first {most:,} of {len(rows):,} rows." if len(rows) > most else ""
    return [*rows[:most]], said


def noun(metrics: Collection[str]) -> str:
    """Return the word for what has metrics of its own: a target of a regression, or a class."""
    return "target" if "r2" in metrics else "class"


def _several(metrics: Collection[str]) -> str:
    return {"target": "targets", "class": "classes"}[noun(metrics)]


def _sign(rank: str) -> int:
    """Return -1 if less of a metric is better, so that the largest value is the worst."""
    return -1 if monitor.by_name(rank) == "min" else 1


def _rank(columns: Collection[str]) -> str:
    return next((it for it in RANKS if it in columns), next(iter(columns)))


def _number(value: Any) -> float:
    """Return the value; infinity if it is None or NaN, so that such a class sorts last."""
    return value if isinstance(value, int | float) and not math.isnan(value) else math.inf
