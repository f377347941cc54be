"""`python -m benchmarks.picture`: draw the plots in RESULTS.md from its tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import per_second

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SHOWN = ("A training step of the default MLP", "A training step of a small MLP")
TABLE = re.compile(r"^## (?P<title>[^\n]+)\n.*?\| over (?P<reference>[^|]+) \|.*?\n\n", re.M | re.S)
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| [^|]+ \| [^|]+ \| (?P<ratio>[\d.]+) "
    r"\| (?P<least>[\d.]+) to (?P<most>[\d.]+) \|$",
    re.M,
)
GROWTH = re.compile(
    r"^## (?P<title>Growth [^\n]+)\n.*?^\| (?P<header>[^\n]+) \|\n[^\n]+\n"
    r"(?P<rows>.*?)^\| exponent \| (?P<exponents>[^\n]+) \|\n\n!\[[^\]]*\]\((?P<file>[^)]+)\)",
    re.M | re.S,
)
OURS = "train.py"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#7f6a3f")


def draw(text: str, path: Path) -> None:
    """Draw the median ratios as bars, and the range over the rounds as a line on each."""
    from matplotlib.figure import Figure

    tables = [t for t in TABLE.finditer(text) if t["title"].startswith(SHOWN)]
    figure = Figure(figsize=(10, 0.36 * 12 + 0.6), layout="constrained")
    for axis, table in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        rows = sorted(ROW.finditer(table[0]), key=lambda row: float(row["ratio"]), reverse=True)
        names = [row["name"] for row in rows]
        ratios = [float(row["ratio"]) for row in rows]
        below = [ratio - float(row["least"]) for ratio, row in zip(ratios, rows, strict=True)]
        above = [float(row["most"]) - ratio for ratio, row in zip(ratios, rows, strict=True)]
        colours = ["#d55e00" if name == OURS else "#8c96a0" for name in names]
        axis.barh(names, ratios, xerr=[below, above], color=colours, ecolor="#24292f", height=0.7)
        what = table["title"].removeprefix("A training step of ").rstrip(")").replace(" (", "\n")
        axis.set_title(what, fontsize=10, loc="left")
        axis.axvline(1, color="#24292f", linewidth=0.8, linestyle=":")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"time of a step over {tables[0]['reference']}", fontsize=10)
    save(figure, path)


def draw_growth(table: re.Match[str], path: Path) -> None:
    """Draw each column by size, on logarithmic axes, with its exponent."""
    from matplotlib.figure import Figure

    of, *names = table["header"].split(" | ")
    rows = [line.strip("| ").split(" |") for line in table["rows"].splitlines()]
    sizes = [int(row[0].replace(",", "")) for row in rows]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axis = figure.subplots()
    exponents = table["exponents"].split(" | ")
    colours = COLOURS[: len(names)]
    for column, (name, exponent, colour) in enumerate(
        zip(names, exponents, colours, strict=True), start=1
    ):
        points = [
            (size, float(row[column]) / per_second(name))
            for size, row in zip(sizes, rows, strict=True)
            if column < len(row) and row[column].strip()
        ]
        label = f"{name.rpartition(', ')[0]}: {exponent}"
        axis.loglog(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    figure.legend(
        loc="outside right upper", frameon=False, fontsize=8, title="exponent", title_fontsize=8
    )
    axis.set_xlabel(of, fontsize=9)
    axis.set_ylabel("seconds", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(table["title"], fontsize=10, loc="left")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "regrow", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    text = (HERE / "RESULTS.md").read_text(encoding="utf-8")
    draw(text, HERE / "results.svg")
    for table in GROWTH.finditer(text):
        draw_growth(table, HERE / table["file"])


if __name__ == "__main__":
    main()
