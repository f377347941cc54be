"""comparison.html and sweep.html: one page of several runs, the best setting first."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrow.record import pages, plots
from regrow.record.comparison import (
    REPEATS,
    UNKNOWN,
    Comparison,
    Row,
    interval,
    label_of,
    shown,
    spread,
    table_of,
    verdict,
)
from regrow.record.importances import Importance, of_table
from regrow.record.plots import COLOURS, Line, Panel
from regrow.record.report import MISSING, Run, differing_keys, flatten, references

DRAWN_RUNS = 40  # in a plot without scripts
MOST_RUNS = 200  # in one with scripts; the table holds all runs
MOST_PARAMETERS = 9  # with a plot each
WIDE, SOME, DOUBLE = 30, 8, 2  # ratios of a parameter's largest to its smallest value
RATES = ("lr", "learning_rate", "weight_decay", "eps")  # or the end of a name: max_lr
HEIGHT = (44, 296)  # of an axis of the parallel coordinates, from its top


def write_page(
    comparison: Comparison, output: Path, title: str = "", importance: Importance | None = None
) -> Path:
    """Write one page: the best setting, parameters, failed jobs, curves and runs side by side."""
    rows = [row for row in comparison.rows if row.run is not None]
    runs = [row.run for row in rows if row.run is not None]
    keys = [*dict.fromkeys(key for row in comparison.rows for key in row.swept)] or differing_keys(
        [run.config for run in runs], references([run.folder for run in runs])
    )
    short = pages.short_names(keys)
    varied = [key for key in keys if key not in REPEATS]
    counted = {row.job for row in comparison.counted}
    done = [row for row in comparison.rows if row.job in counted]  # in the order of the jobs
    texts = _setting_texts(comparison.rows, short)
    settings = None
    if comparison.settings:
        header, cells = table_of(comparison)
        names = [texts[its.rows[0].job] or its.label for its in comparison.settings]
        cells = [[name, *row[1:]] for name, row in zip(names, cells, strict=True)]
        settings = {"header": header, "rows": cells}
    remarked = [row for row in comparison.rows if row.reason]
    columns = _metric_columns(runs)
    numbers = [*(f"{split}/{name}" for split, name in columns), "steps", "time"]
    labels = dict(zip((row.job for row in rows), _labels(rows, short), strict=True))
    pages.write(
        output,
        "wide",
        title=title or f"{len(runs)} runs",
        states=_summary_of_states([row.state for row in comparison.rows]),
        best=_best(comparison, texts, labels, output.parent) if comparison.settings else None,
        settings=settings,
        names={key: name for key, name in short.items() if key != name},
        remarked=remarked
        and {
            "header": ["job", "setting", "status", "reason", "log"],
            "rows": [[r.job, r.label, r.state, r.reason or "", r.log or ""] for r in remarked],
        },
        parameters=_scatter(comparison, done, varied, short, labels),
        importance=importance
        or (of_table(comparison, short) if varied and len(keys) > 1 else None),
        parallel=_parallel(comparison, done, varied, short, labels),
        curves=_curves(comparison, rows, labels, texts),
        header=["run", "status", *numbers, *short.values()],
        columns=2 + len(numbers),
        rows=[_cells(row, labels[row.job], columns, keys, output.parent) for row in rows],
        note="" if keys or not runs else "Their configs do not differ.",
    )
    return output


def _cells(
    row: Row, label: str, columns: Sequence[tuple[str, str]], keys: Sequence[str], start: Path
) -> dict[str, Any]:
    run = row.run
    assert run is not None
    flat = flatten(run.config)
    values = [row.swept[key] if key in row.swept else flat.get(key, MISSING) for key in keys]
    return {
        "label": label,
        "href": _href(run, start),
        "state": row.state,
        "numbers": [
            *(run.metrics(split).get(name) for split, name in columns),
            run.steps,
            pages.duration(run.summary.get("seconds")),
        ],
        "swept": [
            (key, pages.NOTHING if value is MISSING else pages.value(value, key))
            for key, value in zip(keys, values, strict=True)
        ],
    }


def _href(run: Run, start: Path) -> str:
    page = run.folder / "report.html"
    return pages.link(page if page.exists() else run.folder, start)


def _texts(swept: Sequence[Mapping[str, str]], short: Mapping[str, str]) -> list[str]:
    """Return what is swept, by short names; with long values shortened if all stay different."""
    exact = [label_of({short[key]: value for key, value in its.items()}) for its in swept]
    brief = [
        label_of({short[key]: pages.brief(value, key) for key, value in its.items()})
        for its in swept
    ]
    return brief if len({*brief}) == len({*exact}) else exact


def _setting_texts(rows: Sequence[Row], short: Mapping[str, str]) -> dict[str, str]:
    """Return the setting of each job."""
    swept = [{k: v for k, v in row.swept.items() if k not in REPEATS} for row in rows]
    return dict(zip((row.job for row in rows), _texts(swept, short), strict=True))


def _best(
    comparison: Comparison, texts: Mapping[str, str], labels: Mapping[str, str], start: Path
) -> dict[str, Any]:
    """Return the best setting, by its mean over seeds or folds, and how sure that is."""
    setting = comparison.settings[0]
    found, rows = setting.monitored, setting.rows
    mean = f"mean {comparison.metric}" if found.count > 1 else comparison.metric
    figures = {mean: spread(found)}
    if reach := interval(found):
        figures["95% interval"] = reach
    for name, its in zip(comparison.others, setting.others, strict=True):
        figures[name] = spread(its)
    run = rows[0].run
    if run is not None and (count := run.summary.get("parameters")) is not None:
        figures["parameters"] = pages.number(count)
    verdicts = [verdict(its, False) for its in comparison.settings[1:]]
    close = verdicts.count("within the noise")
    note = f"Mean of {found.count} runs" if found.count > 1 else "One run"
    if not verdicts:
        note += "; it is the only setting."
    elif {*verdicts} == {UNKNOWN}:
        note += ": too few seeds to tell it from the other settings."
    else:
        note += f"; {close} of the {len(verdicts)} other settings {'is' if close == 1 else 'are'} "
        note += "within the noise of it."
    repeats = {
        row.job: label_of({k: row.swept[k] for k in REPEATS if k in row.swept}) for row in rows
    }
    runs = [
        (
            f"{repeats[row.job] or labels[row.job]} ({shown(comparison.values[row.job])})",
            _href(row.run, start),
        )
        for row in rows
        if row.run is not None
    ]
    return {
        "setting": texts[rows[0].job] or setting.label,
        "figures": figures,
        "note": note,
        "runs": runs,
        "overrides": setting.label if texts[rows[0].job] else "",
    }


# -- parameters ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """The places of a parameter's values: as numbers, or of categories at 0, 1, …"""

    places: Sequence[float]
    names: Sequence[str]  # of the categories; empty for numbers
    is_log: bool

    def share(self, place: float) -> float:
        """Return a place as a share of the axis, 0 to 1."""
        low, high = min(self.places), max(self.places)
        if self.is_log:
            low, high, place = math.log(low), math.log(high), math.log(place)
        return (place - low) / (high - low) if high > low else 0.5


def axis_of(values: Sequence[str | None], key: str = "") -> Axis:
    """Return numbers as they are, logarithmic over a wide range; anything else as categories.

    From `SOME` on, an axis is logarithmic if that spreads the values at least as evenly; from
    `DOUBLE` on, if `key` names a rate, which acts by its ratio.
    """
    try:
        places = [float(str(value)) for value in values]
    except ValueError:
        places = [math.nan]
    if all(math.isfinite(place) for place in places):
        low, high = min(places), max(places)
        ratio = high / low if low > 0 else 0.0
        name = key.rpartition(".")[2]
        is_rate = ratio >= DOUBLE and (name in RATES or name.endswith("_lr"))
        is_wide = ratio >= WIDE or (ratio >= SOME and _is_evener_by_ratio(places))
        return Axis(places, (), is_rate or is_wide)
    names = [*dict.fromkeys("–" if value is None else value for value in values)]
    places = [float(names.index("–" if value is None else value)) for value in values]
    return Axis(places, [pages.brief(name, key) for name in names], False)


def _is_evener_by_ratio(places: Sequence[float]) -> bool:
    """Return True if the ratios of neighbours vary no more than their differences."""
    values = sorted({*places})

    def unevenness(values: Sequence[float]) -> float:
        gaps = [b - a for a, b in itertools.pairwise(values)]
        return statistics.pstdev(gaps) / statistics.fmean(gaps)

    by_ratio = unevenness([math.log(value) for value in values])
    return by_ratio <= unevenness(values) + 1e-9  # of two values, both are 0


def _scatter(
    comparison: Comparison,
    done: Sequence[Row],
    varied: Sequence[str],
    short: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, Any] | None:
    """Return a plot per parameter, with a dot for each run."""
    if len(done) < 2:
        return None
    values = [comparison.values[row.job] for row in done]
    names = [labels[row.job] for row in done]
    panels = []
    for key in varied[:MOST_PARAMETERS]:
        axis = axis_of([row.swept.get(key) for row in done], key)
        dots = Line(
            comparison.metric, axis.places, values, COLOURS[0], is_scatter=True, labels=names
        )
        panels.append(
            Panel(short[key], [dots], x=short[key], ticks=axis.names, is_log_x=axis.is_log)
        )
    figure = plots.figure_of(panels)
    if figure is None:
        return None
    more = f"The first {MOST_PARAMETERS} of {len(varied)}. " if len(varied) > len(panels) else ""
    caption = f"{more}{comparison.metric} of each run over each parameter."
    return pages.chart("parameters", figure, panels, len(panels), caption)


def _parallel(
    comparison: Comparison,
    done: Sequence[Row],
    varied: Sequence[str],
    short: Mapping[str, str],
    labels: Mapping[str, str],
) -> dict[str, Any] | None:
    """Return a line per run through an axis per parameter and one for the metric."""
    if len(varied) < 2 or len(done) < 2:
        return None
    if len(done) > MOST_RUNS:
        done = comparison.counted[:MOST_RUNS]
    values = comparison.values
    axes = [axis_of([row.swept.get(key) for row in done], key) for key in varied]
    axes.append(Axis([values[row.job] for row in done], (), False))
    names = [*(short[key] for key in varied), comparison.metric]
    top, bottom = HEIGHT
    apart = max(150, min(380, 1100 // len(axes)))
    xs = [70 + apart * index for index in range(len(axes))]

    def y(axis: Axis, place: float) -> float:
        return round(bottom + (top - bottom) * axis.share(place), 1)

    best = {row.job for row in comparison.settings[0].rows}
    sign = 1 if comparison.mode == "max" else -1
    order = sorted(range(len(done)), key=lambda index: sign * values[done[index].job])  # best last
    runs = []
    for rank, index in enumerate(order):
        row = done[index]
        points = [f"{x},{y(axis, axis.places[index])}" for x, axis in zip(xs, axes, strict=True)]
        runs.append(
            {
                "path": f"M{'L'.join(points)}",
                "label": f"{labels[row.job]}: {comparison.metric} {shown(values[row.job])}",
                "colour": _between(rank / (len(done) - 1)),
                "leads": row.job in best,
            }
        )
    drawn = [
        {
            "x": x,
            "name": plots.elided(name, 20),
            "ticks": [(y(axis, place), text) for place, text in _ticks(axis)],
        }
        for x, name, axis in zip(xs, names, axes, strict=True)
    ]
    more = f" of the best {MOST_RUNS}" if len(done) == MOST_RUNS else ""
    return {"width": xs[-1] + 110, "axes": drawn, "runs": runs, "more": more}


def _ticks(axis: Axis) -> list[tuple[float, str]]:
    if axis.names:
        every = math.ceil(len(axis.names) / 16)
        return [
            (index, plots.elided(name, 18))
            for index, name in enumerate(axis.names)
            if index % every == 0
        ]
    places = sorted({*axis.places})
    if len(places) > 6:  # their range, in equal parts
        low, high = places[0], places[-1]
        parts = [part / 4 for part in range(5)]
        places = [
            low * (high / low) ** part if axis.is_log else low + (high - low) * part
            for part in parts
        ]
    return [(place, f"{place:.3g}") for place in places]


def _between(share: float) -> str:
    """Return a colour between blue and orange, readable on light and on dark."""
    blue, orange = (0x4A, 0x86, 0xC8), (0xE0, 0x7B, 0x28)
    return "#" + "".join(
        f"{round(a + share * (b - a)):02x}" for a, b in zip(blue, orange, strict=True)
    )


# -- runs ------------------------------------------------------------------------------------------


def _curves(
    comparison: Comparison,
    rows: Sequence[Row],
    labels: Mapping[str, str],
    texts: Mapping[str, str],
) -> dict[str, Any] | None:
    """Return the curves of all runs; those of a setting share a colour, in the settings' order."""
    rank = {row.job: index for index, its in enumerate(comparison.settings) for row in its.rows}
    named = {row.job: texts[row.job] or "all" for row in rows}
    total, rows = len(rows), sorted(rows, key=lambda row: rank.get(row.job, len(rank)))[:MOST_RUNS]
    runs = [row.run for row in rows if row.run is not None]
    names = [*dict.fromkeys(n for run in runs for n in plots.panel_names(run.lines, run.final))]
    chosen = [str(run.best.get("metric")).partition("/")[0] for run in runs]
    sets = [*dict.fromkeys([*chosen, *(it for r in runs for it in r.sets if it not in r.final)])]
    one_each = len({named[row.job] for row in rows}) == len(rows)
    drawn = [
        (labels[row.job], labels[row.job] if one_each else named[row.job], its)
        for row, its in zip(rows, (run.lines for run in runs), strict=True)
    ]
    panels = plots.overlay(drawn, names[: plots.PANELS], sets)
    few = plots.overlay(drawn[:DRAWN_RUNS], names[: plots.PANELS], sets)
    figure = plots.figure_of(few)
    if figure is None:
        return None
    count = sum(len(panel.lines) for panel in panels)
    caption = f"The first {MOST_RUNS} of {total} runs, the best first." if total > MOST_RUNS else ""
    still = f"The first {DRAWN_RUNS} of {total} runs; with scripts, more of them."
    found = pages.chart("validation curves", figure, panels, count, caption)
    return {**found, "still": still if total > DRAWN_RUNS else ""}


def _metric_columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return (set, name) of the metrics to compare, those of the final sets first.

    Of a set that chose the weights, only the monitored metric, unless there is no other set.
    Per-class metrics are only on the run's own page.
    """
    chosen = {str(run.best.get("metric")) for run in runs}
    choosing = {metric.partition("/")[0] for metric in chosen}
    sets = [*dict.fromkeys(name for run in runs for name in reversed([*run.sets]))]
    found: dict[tuple[str, str], None] = {}
    for split in sets:
        for name in (name for run in runs for name in run.metrics(split) if "/" not in name):
            if split not in choosing or f"{split}/{name}" in chosen or {*sets} <= choosing:
                found.setdefault((split, name))
    return list(found)[:12]


def _labels(rows: Sequence[Row], short: Mapping[str, str]) -> list[str]:
    """Return a label per run: what distinguishes it.

    Where labels are empty or equal, the shortest path endings that distinguish the runs are added.
    """
    labels = _texts([row.swept for row in rows], short)
    endings = _endings([row.run.folder for row in rows if row.run is not None])
    alike = Counter(labels)
    return [
        label if label and alike[label] == 1 else f"{label} {ending}".strip()
        for label, ending in zip(labels, endings, strict=True)
    ]


def _endings(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path} ({index})" for index, path in enumerate(folders)]


def _summary_of_states(states: Sequence[str]) -> str:
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
