"""Plots of a run, from its folder's files alone. matplotlib is only imported to draw one."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.record import pictures
from regrow.record.records import by_set, read_json, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, distinguishable with any colour vision. A report replaces ink, muted and
# grid by the page's own colours, so that plots follow its light or dark mode.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#7f6a3f", "#e0567b")
INK, MUTED, GRID = "#24292f", "#656d76", "#d8dee4"
PANELS = 6
DETAILED_CLASSES = 20  # with more classes, numbers in the cells are unreadable
MAX_LABELS = 12
POINTS = 4000  # per line; more than a plot has pixel columns


def draw(folder: Path, drawn: Mapping[str, Figure] | None = None) -> list[Path]:
    """Write plots/*.png of the folder's content, or of the figures `drawn`. Returns their paths."""
    paths = []
    for name, figure in (figures(folder) if drawn is None else drawn).items():
        path = folder / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=130)
        paths.append(path)
    return paths


def figures(
    folder: Path, lines: Lines | None = None, final: Collection[str] = ("test",)
) -> dict[str, Figure]:
    """Return the folder's figures by name, in reading order; `lines` if they have been read.

    `final` are the sets that are measured once, and so have no curve.
    """
    lines = read_metrics(folder) if lines is None else lines
    found = {"learning_curves": curves(lines, final), "learning_rate": rates(lines)}
    for path in sorted((folder / "plots").glob("*.json")):
        try:
            details = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(details, dict) and details.get("confusion_matrix"):
            found[f"confusion_{path.stem}"] = confusion(
                details["confusion_matrix"], details.get("class_names")
            )
        elif isinstance(details, dict) and details.get("true"):
            names = details.get("target_names")
            found[f"predicted_{path.stem}"] = predicted(
                details["true"], details["predicted"], names
            )
        if isinstance(details, dict) and details.get("examples"):
            names = details["class_names"]
            found[f"examples_{path.stem}"] = pictures.figure(
                details["examples"], names, _colours(len(names))
            )
    there = {name: figure for name, figure in found.items() if figure is not None}
    for figure in there.values():  # lay out once, not for each file written
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return there


# -- curves ----------------------------------------------------------------------------------------


def series(lines: Lines, key: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of one key; for a step logged twice, the later value."""
    points = {
        line["step"]: float(line[key]) for line in lines if isinstance(line.get(key), int | float)
    }
    return list(points), list(points.values())


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """Return a long line's smallest and largest finite value per stretch, which looks the same.

    Closes gaps shorter than a stretch.
    """
    if len(steps) <= POINTS:
        return steps, values
    size = math.ceil(len(steps) / (POINTS // 2))
    kept: list[int] = []
    value = values.__getitem__
    for first in range(0, len(steps), size):
        stretch = range(first, min(first + size, len(steps)))
        finite = [place for place in stretch if math.isfinite(values[place])]
        kept += sorted({min(finite, key=value), max(finite, key=value)}) if finite else [first]
    return [steps[place] for place in kept], [values[place] for place in kept]


def measured(lines: Lines, final: Collection[str]) -> dict[str, list[str]]:
    """Return the metrics of each set that has a curve, by the name of the set."""
    keys = dict.fromkeys(key for line in lines for key in line)
    sets = by_set({key: None for key in keys if key.count("/") == 1})
    return {
        name: [key.partition("/")[2] for key in its]
        for name, its in sets.items()
        if name not in final
    }


def panel_names(lines: Lines, final: Collection[str]) -> list[str]:
    """Return the metrics to plot: the loss first, then those of the sets that have a curve."""
    names = dict.fromkeys(it for its in measured(lines, final).values() for it in its)
    kinds = ("train/loss", "train/epoch_loss")
    has_loss = "loss" in names or any(kind in line for line in lines for kind in kinds)
    return [*(["loss"] if has_loss else []), *(it for it in names if it != "loss")][:PANELS]


def curves(lines: Lines, final: Collection[str]) -> Figure | None:
    """Return one panel per metric, with train and each set together."""
    names = panel_names(lines, final)
    if not names:
        return None
    sets = [*measured(lines, final)]
    colours = dict(zip(("train", *sets), _colours(len(sets) + 1), strict=True))
    figure, axes = _panels(len(names))
    for name, axis in zip(names, axes, strict=True):
        steps, values = series(lines, f"train/{name}")
        epoch_steps, epoch_values = series(lines, f"train/epoch_{name}")
        if epoch_steps:
            axis.plot(*thinned(steps, values), color=colours["train"], linewidth=0.8, alpha=0.35)
            _line(axis, epoch_steps, epoch_values, colours["train"], "train")
        elif steps:
            _line(axis, steps, values, colours["train"], "train")
        everything = [*epoch_values]
        for its in sets:
            set_steps, set_values = series(lines, f"{its}/{name}")
            _line(axis, set_steps, set_values, colours[its], its)
            everything += set_values
        _finish(axis, name, everything or values)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def rates(lines: Lines) -> Figure | None:
    """Return a plot of each group's learning rate and, next to it, the gradient norm."""
    keys = dict.fromkeys(key for line in lines for key in line)
    rate_keys = [key for key in keys if re.fullmatch(r"train/lr(/.+)?", key)]
    if not rate_keys:
        return None
    has_norm = "train/grad_norm" in keys
    figure, axes = _panels(2 if has_norm else 1)
    for key, colour in zip(rate_keys, _colours(len(rate_keys)), strict=True):
        _line(axes[0], *series(lines, key), colour, key.removeprefix("train/"))
    if len(rate_keys) > 1:
        axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    _finish(axes[0], "learning rate", [])
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if has_norm:
        steps, values = series(lines, "train/grad_norm")
        _line(axes[1], steps, values, COLOURS[2], "grad_norm")
        _finish(axes[1], "gradient norm, before clipping", values)
    return figure


def overlay(
    runs: Mapping[str, Lines],
    names: Sequence[str],
    groups: Sequence[str] | None = None,
    sets: Sequence[str] = ("val",),
) -> Figure | None:
    """Return a panel per metric with all runs: of the first of `sets` that has it, else of train.

    `groups`, one per run, share a colour and a legend entry.
    """
    if not runs or not names:
        return None
    figure, axes = _panels(len(names))
    for name, axis in zip(names, axes, strict=True):
        everything: list[float] = []
        named = list(groups or runs)
        colours = dict(zip(dict.fromkeys(named), _colours(len({*named})), strict=True))
        told: set[str] = set()
        for name_of_group, lines in zip(named, runs.values(), strict=True):
            colour = colours[name_of_group]
            label = name_of_group if len(name_of_group) <= 100 else f"{name_of_group[:99]}…"
            label = f"_{label}" if name_of_group in told else label  # _ hides it in the legend
            told.add(name_of_group)
            found = (series(lines, f"{its}/{name}") for its in (*sets, "train"))
            steps, values = next((one for one in found if one[0]), ([], []))
            _line(axis, steps, values, colour, label, width=1.6 if len(runs) <= 8 else 1.0)
            everything += values
        _finish(axis, name, everything)
    labels = axes[0].get_legend_handles_labels()
    if 1 <= len(labels[1]) <= 8:
        figure.legend(
            *labels,
            loc="outside lower left",
            ncols=max(1, min(4, 130 // (max(map(len, labels[1])) + 6))),  # as many as fit
            frameon=False,
            fontsize=9,
            labelcolor=INK,
        )
    return figure


def _line(
    axis: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    colour: str,
    label: str,
    *,
    width: float = 1.6,
) -> None:
    if not steps:
        return
    # A single value, or one between two NaN, makes no line: it needs a dot.
    finite = [math.isfinite(value) for value in values]
    dots = len(steps) <= 30 or sum(finite) <= 30
    axis.plot(
        *thinned(steps, [v if good else math.nan for v, good in zip(values, finite, strict=True)]),
        color=colour,
        linewidth=width,
        marker="o" if dots else None,
        markersize=3,
        label=_plain(label),
    )
    if not all(finite):
        bad = [step for step, good in zip(steps, finite, strict=True) if not good]
        bad = bad[:: math.ceil(len(bad) / POINTS)]
        axis.plot(
            bad,
            [0.02] * len(bad),
            transform=axis.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=5,
            color=colour,
            label=_plain(f"{label}: not finite"),
        )


def _finish(axis: Axes, title: str, values: Sequence[float]) -> None:
    axis.set_title(_plain(title), loc="left", fontsize=11, color=INK)
    axis.set_xlabel("step", fontsize=9, color=MUTED)
    finite = sorted(value for value in values if math.isfinite(value))
    if len(finite) > 20 and finite[0] > 0 and finite[-1] > 100 * finite[len(finite) // 2]:
        axis.set_yscale("log")  # one spike would flatten the rest


def _plain(text: str) -> str:
    """Escape dollar signs: matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    rows = -(-count // columns)
    width = 6.4 if columns == 1 else 10.0
    figure = Figure(figsize=(width, 2.9 * rows + 0.3), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    for axis in axes[:count]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(colors=MUTED, labelsize=8.5, length=3)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[:count]


def _colours(count: int) -> list[str]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    import matplotlib
    from matplotlib.colors import to_hex

    shades = matplotlib.colormaps["viridis"]
    return [to_hex(shades(index / count)) for index in range(count)]


# -- results ---------------------------------------------------------------------------------------


def confusion(matrix: Sequence[Any], class_names: Sequence[str] | None) -> Figure:
    """Return plots of the counts and of each true class's shares; one per label for multilabel."""
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    if counts.ndim == 3:
        return _confusion_per_label(counts, class_names)
    names = _names(class_names, len(counts))
    detailed = len(names) <= DETAILED_CLASSES
    from matplotlib.figure import Figure

    side = min(6.4, 2.6 + 0.28 * len(names))
    figure = Figure(figsize=(2 * side + 0.4, side), layout="constrained")
    axes = figure.subplots(1, 2)
    shares = _shares(counts)
    titles = ("counts", "share of each true class, %")
    for axis, title, numbers in zip(axes, titles, (counts, 100 * shares), strict=True):
        _matrix(axis, shares, numbers if detailed else None, names, title)
    return figure


def _confusion_per_label(counts: Any, class_names: Sequence[str] | None) -> Figure:
    names = _names(class_names, len(counts))
    shown = min(len(names), MAX_LABELS)
    from matplotlib.figure import Figure

    columns = min(4, shown)
    rows = -(-shown // columns)
    figure = Figure(figsize=(2.5 * columns, 2.7 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[shown:]:
        axis.set_axis_off()
    for axis, name, matrix in zip(axes, names, counts, strict=False):
        _matrix(axis, _shares(matrix), matrix, ["no", "yes"], name)
    return figure


def _matrix(axis: Axes, shares: Any, numbers: Any, names: Sequence[str], title: str) -> None:
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_title(_plain(title), loc="left", fontsize=11, color=INK)
    axis.set_xlabel("predicted", fontsize=9, color=MUTED)
    axis.set_ylabel("true", fontsize=9, color=MUTED)
    axis.tick_params(colors=MUTED, labelsize=8.5, length=0)
    axis.spines[:].set_visible(False)
    every = max(1, len(names) // 25)
    ticks = list(range(0, len(names), every))
    shown = [_plain(names[tick][:18]) for tick in ticks]
    steep = max(map(len, shown)) > 3
    axis.set_xticks(ticks, shown, rotation=45 if steep else 0, ha="right" if steep else "center")
    axis.set_yticks(ticks, shown)
    if numbers is None:
        return
    size = 9 if len(names) <= 12 else 6.5
    for row in range(len(names)):
        for column in range(len(names)):
            if numbers[row][column]:
                axis.text(
                    column,
                    row,
                    f"{numbers[row][column]:.0f}",
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="#ffffff" if shares[row][column] > 0.5 else "#10233a",
                )


def _shares(counts: Any) -> Any:
    import numpy as np

    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)


def _names(class_names: Sequence[str] | None, count: int) -> list[str]:
    names = [str(name) for name in class_names or []]
    return names if len(names) == count else [str(index) for index in range(count)]


def predicted(
    true: Sequence[Any], values: Sequence[Any], target_names: Sequence[str] | None = None
) -> Figure | None:
    """Return a panel per target, with each example as a dot, on the diagonal if exact."""
    import numpy as np

    targets, outputs = (np.asarray(it, dtype=float) for it in (true, values))
    targets, outputs = (it.reshape(len(it), -1) for it in (targets, outputs))
    if targets.shape != outputs.shape or not targets.shape[1]:
        return None
    names = target_names or [f"output {index}" for index in range(targets.shape[1])]
    figure, axes = _panels(min(targets.shape[1], MAX_LABELS))
    if len(axes) == 1:
        figure.set_size_inches(4.8, 4.8)
    for index, axis in enumerate(axes):
        x, y = targets[:, index], outputs[:, index]
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = x[finite], y[finite]
        axis.plot(x, y, "o", color=COLOURS[0], markersize=4, alpha=0.55, markeredgewidth=0)
        if len(x):
            low, high = min(x.min(), y.min()), max(x.max(), y.max())
            axis.plot([low, high], [low, high], color=MUTED, linewidth=1, linestyle="--")
        title = "predicted against true" if len(axes) == 1 else names[index]
        _finish(axis, title, [])
        axis.set_xlabel("true", fontsize=9, color=MUTED)
        axis.set_ylabel("predicted", fontsize=9, color=MUTED)
        axis.set_aspect("equal", adjustable="box")
    return figure


# -- into a page -----------------------------------------------------------------------------------


def to_svg(figure: Figure) -> str:
    """Return an <svg> for a page: text stays text, ink and colours are the page's variables."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "regrow"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # several plots share one page
    size = f'style="max-width: {figure.get_figwidth() * 1.08:.2f}in" '
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', size, text, count=1)
    variables = {INK: "ink", MUTED: "muted", GRID: "line"}
    variables |= {colour: f"c{index}" for index, colour in enumerate(COLOURS)}
    return re.sub("|".join(variables), lambda match: f"var(--{variables[match[0]]})", text)
