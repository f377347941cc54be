"""Plots of a run, from its folder's files alone. matplotlib is only imported to draw one."""

from __future__ import annotations

import colorsys
import contextlib
import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
INK, MUTED, GRID = pictures.INK, "#656d76", "#d8dee4"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line"}
VARIABLES |= {colour: f"c{index}" for index, colour in enumerate(COLOURS)}
PANELS = 6
DETAILED_CLASSES = 20  # with more classes, numbers in the cells are unreadable
MAX_LABELS = 12
# In all lines of a figure and of a page: a page of a hundred runs stays below 1 MB.
STATIC_POINTS, PAGE_POINTS = 12_000, 24_000
POINTS = 2000  # per line of a page
FEWEST_POINTS = 3  # that a learning rate, a norm or single steps are drawn of


def draw(folder: Path, drawn: Mapping[str, Figure] | None = None) -> list[Path]:
    """Write plots/*.png of the folder's content, or of the figures `drawn`. Returns their paths."""
    paths = []
    for name, figure in (figures(folder) if drawn is None else drawn).items():
        path = folder / "plots" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=130)
        paths.append(path)
    return paths


def panels_of(
    lines: Lines, final: Collection[str], best: Mapping[str, Any] | None
) -> dict[str, list[Panel]]:
    """Return a run's curves by the name of the figure.

    `final` are the sets that are measured once, and so have no curve. `best` is a summary's. Rates
    that were logged at too few steps are left out: see `too_short`.
    """
    drawn = [panel for panel in rates(lines) if not is_short(panel)]
    return {"learning_curves": curves(lines, final, best), "learning_rate": drawn}


def too_short(lines: Lines) -> list[str]:
    """Return the titles of the panels that `panels_of` leaves out, as a dot or two show nothing."""
    return [panel.title for panel in rates(lines) if is_short(panel)]


def is_short(panel: Panel) -> bool:
    return all(len(line.steps) < FEWEST_POINTS for line in panel.lines)


def figures(folder: Path, panels: Mapping[str, Sequence[Panel]] | None = None) -> dict[str, Figure]:
    """Return the folder's figures by name, in reading order; `panels` if they are known."""
    if panels is None:
        panels = panels_of(read_metrics(folder), ("test",), None)
    found = {name: figure_of(its) for name, its in panels.items()}
    for path in sorted((folder / "plots").glob("*.json")):
        try:
            details = read_json(path)
        except (OSError, ValueError):
            continue
        if not isinstance(details, dict):
            continue
        if details.get("confusion_matrix"):
            found[f"confusion_{path.stem}"] = confusion(
                details["confusion_matrix"], details.get("class_names")
            )
        elif details.get("true"):
            found[f"predicted_{path.stem}"] = predicted(
                details["true"], details["predicted"], details.get("target_names")
            )
        if details.get("examples"):
            names = details["class_names"]
            found[f"examples_{path.stem}"] = pictures.figure(
                details["examples"], names, colours_of(len(names))
            )
    there = {name: figure for name, figure in found.items() if figure is not None}
    for figure in there.values():  # lay out once, not for each file written
        if (engine := figure.get_layout_engine()) is not None:
            with _any_glyph():
                engine.execute(figure)
            figure.set_layout_engine(None)  # "none" would draw each once more before it is written
    return there


@dataclass(frozen=True)
class Line:
    """Points of one colour, joined unless they are a scatter; `group` is its entry in a legend."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    colour: str
    group: str = ""
    is_faint: bool = False
    is_scatter: bool = False
    labels: Sequence[str] = ()  # of each point of a scatter


@dataclass(frozen=True)
class Panel:
    """A plot of several lines, from which matplotlib and the page's script draw alike."""

    title: str
    lines: Sequence[Line]
    best: float | None = None  # a step to mark
    best_value: float | None = None  # of the curve that chose it
    x: str = "step"
    ticks: Sequence[str] = ()  # the names of x = 0, 1, …
    is_log_x: bool = False
    may_be_log: bool = True

    @property
    def is_log(self) -> bool:
        """Return True if one spike would flatten the rest."""
        main = [v for line in self.lines if not line.is_faint for v in line.values]
        values = sorted(value for value in main if math.isfinite(value))
        spikes = len(values) > 20 and values[0] > 0 and values[-1] > 100 * values[len(values) // 2]
        return self.may_be_log and spikes

    def as_json(self, points: int) -> dict[str, Any]:
        """Return what the page's script draws; values that are not finite are null."""
        lines = [line for line in self.lines if line.steps]
        found: dict[str, Any] = {"title": self.title, "x": self.x, "lines": []}
        for line in lines:
            one: dict[str, Any] = {"name": line.name, "colour": in_page(line.colour)}
            if line.is_scatter:
                steps, values = line.steps, line.values
                one |= {"scatter": True, "labels": [*line.labels]}
            else:
                steps, values = thinned(line.steps, line.values, points)
            one |= {"x": [*steps], "y": [_short(value) for value in values]}
            one |= {"group": line.group} if line.group else {}
            one |= {"faint": True} if line.is_faint else {}
            found["lines"].append(one)
        for key, value in (
            ("best", self.best), ("bestValue", self.best_value), ("ticks", [*self.ticks]),
            ("logX", self.is_log_x), ("log", self.is_log),
        ):  # fmt: skip
            found |= {key: value} if value or value == 0 else {}
        return found


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


# -- curves ----------------------------------------------------------------------------------------


def colours_of(count: int) -> list[str]:
    """Return different colours; beyond the eighth by hue, of a lightness for light and dark."""
    more = range(max(0, count - len(COLOURS)))
    rgb = (colorsys.hls_to_rgb(0.618 * index % 1, 0.5, 0.5) for index in more)
    by_hue = ["#" + "".join(f"{round(255 * part):02x}" for part in parts) for parts in rgb]
    return [*COLOURS[:count], *by_hue]


def series(lines: Lines, key: str) -> tuple[list[float], list[float]]:
    """Return the steps and values of one key; for a step logged twice, the later value."""
    points = {
        line["step"]: float(line[key]) for line in lines if isinstance(line.get(key), int | float)
    }
    return list(points), list(points.values())


def thinned(
    steps: Sequence[float], values: Sequence[float], points: int = POINTS
) -> tuple[Sequence[float], Sequence[float]]:
    """Return a long line's smallest and largest finite value per stretch, which looks the same.

    Closes gaps shorter than a stretch. Keeps the last point.
    """
    if len(steps) <= points:
        return steps, values
    size = math.ceil((len(steps) - 1) / (max(points - 1, 2) // 2))
    kept: list[int] = []
    value = values.__getitem__
    for first in range(0, len(steps) - 1, size):
        stretch = range(first, min(first + size, len(steps) - 1))
        finite = [place for place in stretch if math.isfinite(values[place])]
        kept += sorted({min(finite, key=value), max(finite, key=value)}) if finite else [first]
    kept.append(len(steps) - 1)
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


def curves(
    lines: Lines, final: Collection[str] = ("test",), best: Mapping[str, Any] | None = None
) -> list[Panel]:
    """Return one panel per metric, with train and each set together; `best` is a summary's."""
    names = panel_names(lines, final)
    sets = [*measured(lines, final)]
    colours = dict(zip(("train", *sets), colours_of(len(sets) + 1), strict=True))
    chosen = {key: it for key, it in (best or {}).items() if key == "metric" or _is_finite(it)}
    panels = []
    for name in names:
        steps, values = series(lines, f"train/{name}")
        epoch = series(lines, f"train/epoch_{name}")
        drawn = [Line("train", steps, values, colours["train"])]
        if epoch[0]:
            drawn = [Line("train", *epoch, colours["train"])]
            # A faint dot or two show nothing, and the legend would name them; a NaN is marked.
            if len(steps) >= FEWEST_POINTS or not all(map(math.isfinite, values)):
                of_steps = Line(
                    "train, single steps", steps, values, colours["train"], is_faint=True
                )
                drawn.insert(0, of_steps)
        drawn += [Line(its, *series(lines, f"{its}/{name}"), colours[its]) for its in sets]
        found = chosen.get("value") if str(chosen.get("metric")).partition("/")[2] == name else None
        panels.append(Panel(name, drawn, best=chosen.get("step"), best_value=found))
    return panels


def rates(lines: Lines) -> list[Panel]:
    """Return a panel of each group's learning rate and, next to it, the gradient norm."""
    keys = dict.fromkeys(key for line in lines for key in line)
    groups = [key for key in keys if re.fullmatch(r"train/lr(/.+)?", key)]
    if not groups:
        return []
    colours = colours_of(len(groups))
    drawn = [
        Line(key.removeprefix("train/"), *series(lines, key), colour)
        for key, colour in zip(groups, colours, strict=True)
    ]
    panels = [Panel("learning rate", drawn, may_be_log=False)]
    if "train/grad_norm" in keys:
        norms = series(lines, "train/grad_norm")
        drawn = [Line("grad_norm", *norms, COLOURS[2])]
        panels.append(Panel("gradient norm, before clipping", drawn))
    return panels


def overlay(
    runs: Sequence[tuple[str, str, Lines]], names: Sequence[str], sets: Sequence[str] = ("val",)
) -> list[Panel]:
    """Return a panel per metric with all runs: of the first of `sets` that has it, else of train.

    A run is its name, its group's and its lines. The runs of a group share a colour; groups after
    the eighth are grey.
    """
    groups = [*dict.fromkeys(group for _, group, _ in runs)]
    colours = {it: COLOURS[i] if i < len(COLOURS) else MUTED for i, it in enumerate(groups)}
    panels = []
    for name in names:
        drawn = []
        for run, group, lines in runs:
            found = (series(lines, f"{its}/{name}") for its in (*sets, "train"))
            steps, values = next((one for one in found if one[0]), ([], []))
            grey = colours[group] == MUTED
            drawn.append(Line(run, steps, values, colours[group], group=group, is_faint=grey))
        drawn.sort(key=lambda line: groups.index(line.group), reverse=True)  # the best on top
        panels.append(Panel(name, drawn))
    return panels


# -- drawn by matplotlib ---------------------------------------------------------------------------


def figure_of(panels: Sequence[Panel], points: int = STATIC_POINTS) -> Figure | None:
    """Return the panels side by side, with about as many `points` in all; None without any."""
    panels = [panel for panel in panels if any(line.steps for line in panel.lines)]
    if not panels:
        return None
    each = max(40, points // sum(len(panel.lines) for panel in panels))
    figure, axes = _panels(len(panels))
    for panel, axis in zip(panels, axes, strict=True):
        wide = len(panel.lines) <= 8
        for line in panel.lines:
            _line(axis, line, each, 1.6 if wide else 1.0, has_dots=wide)
        _name(axis, panel.title[:40], panel.x[:40])
        if panel.is_log:
            axis.set_yscale("log")
        else:
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if panel.is_log_x:
            axis.set_xscale("log")
        if panel.ticks:
            steep = max(map(len, panel.ticks)) * len(panel.ticks) > 40
            style: dict[str, Any] = {"rotation": 30, "ha": "right"} if steep else {}
            names = [_plain(elided(it, 18)) for it in panel.ticks]
            axis.set_xticks(range(len(names)), names, **style)
        if panel.best is not None:
            axis.axvline(panel.best, color=MUTED, linewidth=1, linestyle=(0, (2, 2)), zorder=0.9)
            if panel.best_value is not None:
                style = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.4}
                axis.plot(
                    [panel.best], [panel.best_value], "o", color=INK, label="best step", **style
                )
    shared = [*{tuple(line.group or line.name for line in panel.lines) for panel in panels}]
    if any(line.group for panel in panels for line in panel.lines):
        _legend(figure, axes[0])
    elif len(shared) > 1 or len(shared[0]) > 1:
        for axis in axes:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    """Write a legend of the groups below the panels, unless there are many."""
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    labels = [*reversed(found)]
    if not 1 <= len(labels) <= len(COLOURS) + 1:
        return
    figure.legend(
        [found[label] for label in labels],
        labels,
        loc="outside lower left",
        ncols=max(1, min(4, 130 // (max(map(len, labels)) + 6))),  # as many as fit
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def _line(axis: Axes, line: Line, points: int, width: float, *, has_dots: bool) -> None:
    if not line.steps:
        return
    # A single value, or one between two NaN, makes no line: it needs a dot.
    finite = [math.isfinite(value) for value in line.values]
    few = sum(finite) <= (30 if has_dots else 1)
    label = _plain(elided(line.group or line.name, 100))
    faint: dict[str, Any] = {"alpha": 0.35, "linewidth": 0.8} if line.is_faint else {}
    label = f"_{label}" if line.is_faint else label  # _ hides it in the legend
    values = [v if good else math.nan for v, good in zip(line.values, finite, strict=True)]
    axis.plot(
        *thinned(line.steps, values, points),
        **{"color": line.colour, "linewidth": width, "markersize": 3, "label": label, **faint},
        marker="o" if line.is_scatter or (few and not line.is_faint) else None,
        linestyle="none" if line.is_scatter else "-",
    )
    if not all(finite):
        bad = [step for step, good in zip(line.steps, finite, strict=True) if not good]
        bad = bad[:: math.ceil(len(bad) / points)]
        axis.plot(
            bad,
            [0.02] * len(bad),
            transform=axis.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            markersize=5,
            color=line.colour,
            label=f"{label}: not finite",
        )


def elided(text: str, most: int) -> str:
    """Return the text in at most `most` characters, with an ellipsis for the rest."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(text: str) -> str:
    """Escape dollar signs: matplotlib would read a formula."""
    return text.replace("$", r"\$")


def _name(axis: Axes, title: str, x: str, y: str = "") -> None:
    axis.set_title(_plain(title), loc="left", fontsize=11, color=INK)
    axis.set_xlabel(_plain(x), fontsize=9, color=MUTED)
    axis.set_ylabel(y, fontsize=9, color=MUTED)


def _grid(
    count: int, columns: int, width: float, height: float, more: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` axes, in rows of `height` inches and `more` for all."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows + more), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = 1 if count == 1 else 2 if count in (2, 4) else 3
    figure, axes = _grid(count, columns, 6.4 if columns == 1 else 10.0, 2.9, 0.3)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GRID)
        axis.tick_params(colors=MUTED, labelsize=8.5, length=3)
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


# -- results ---------------------------------------------------------------------------------------


def confusion(matrix: Sequence[Any], class_names: Sequence[str] | None) -> Figure:
    """Return plots of the counts and of each true class's shares; one per label for multilabel."""
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    if counts.ndim == 3:
        return _confusion_per_label(counts, class_names)
    names = _names(class_names, len(counts))
    detailed = len(names) <= DETAILED_CLASSES
    side = min(6.4, 2.6 + 0.28 * len(names))
    figure, axes = _grid(2, 2, 2 * side + 0.4, side)
    shares = _shares(counts)
    titles = ("counts", "share of each true class, %")
    for axis, title, numbers in zip(axes, titles, (counts, 100 * shares), strict=True):
        _matrix(axis, shares, numbers if detailed else None, names, title)
    return figure


def _confusion_per_label(counts: Any, class_names: Sequence[str] | None) -> Figure:
    names = _names(class_names, len(counts))
    shown = min(len(names), MAX_LABELS)
    columns = min(4, shown)
    figure, axes = _grid(shown, columns, 2.5 * columns, 2.7)
    for axis, name, matrix in zip(axes, names, counts, strict=False):
        _matrix(axis, _shares(matrix), matrix, ["no", "yes"], name)
    return figure


def _matrix(axis: Axes, shares: Any, numbers: Any, names: Sequence[str], title: str) -> None:
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    _name(axis, title, "predicted", "true")
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
        _name(axis, title, "true", "predicted")
        axis.set_aspect("equal", adjustable="box")
    return figure


# -- into a page -----------------------------------------------------------------------------------


def to_svg(figure: Figure) -> str:
    """Return an <svg> for a page: text stays text, ink and colours are the page's variables.

    Beside images the colours stay, as they are a key to those of the pixels.
    """
    import matplotlib

    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "regrow"}),
        _any_glyph(),
    ):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # several plots share one page
    size = f'style="max-width: {figure.get_figwidth() * 1.08:.2f}in" '
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', size, text, count=1)
    has_images = any(axis.images for axis in figure.axes)
    replaced = (INK, MUTED, GRID) if has_images else VARIABLES
    return re.sub("|".join(replaced), lambda match: in_page(match[0]), text)


@contextlib.contextmanager
def _any_glyph() -> Iterator[None]:
    """Allow text that matplotlib's font lacks: a page's browser has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def in_page(colour: str) -> str:
    """Return a colour as the page's variable, which is another one in its dark mode."""
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour
