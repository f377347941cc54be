"""`python -m benchmarks.picture`: draw results.svg of the steps in RESULTS.md."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOWN = ("A training step of the default MLP", "A training step of a small MLP")
TABLE = re.compile(r"^## (?P<title>[^\n]+)\n.*?\| over (?P<reference>[^|]+) \|.*?\n\n", re.M | re.S)
ROW = re.compile(
    r"^\| (?P<name>[^|]+) \| [\d.]+ \| [\d.]+ \| (?P<ratio>[\d.]+) "
    r"\| (?P<least>[\d.]+) to (?P<most>[\d.]+) \|$",
    re.M,
)
OURS = "train.py"


def draw(text: str, path: Path) -> None:
    """The median ratios as bars, the range over the rounds as a line on each."""
    import matplotlib
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
    with matplotlib.rc_context({"svg.hashsalt": "regrow", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    draw((HERE / "RESULTS.md").read_text(), HERE / "results.svg")


if __name__ == "__main__":
    main()
