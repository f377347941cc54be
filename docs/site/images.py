"""Draw the diagrams of the pages: python docs/site/images.py writes docs/images/*.svg.

All text stands on a filled box, so that it is legible on a light and on a dark page. The diagrams
are 480 wide and tall rather than wide, so that a phone shows them without scrolling. Needs nothing
but the standard library.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "images"
WIDTH = 480
PANEL, INK, QUIET, LINE = "#f6f8f7", "#17231f", "#4a5853", "#5d6d67"
LAB, ENGINE, NEUTRAL, WRONG = "#fde6bd", "#cfe8df", "#e3e8f4", "#f8d5d1"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'Liberation Mono', monospace"
# The widest letters that these fonts have on average, in units of the size.
EM = {SANS: 0.53, MONO: 0.61}
SIZE = 14


class Drawing:
    """An SVG of `height` on a panel. Coordinates are in pixels from the top left corner."""

    def __init__(self, title: str, height: int) -> None:
        self.height = height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            f'width="{WIDTH}" height="{height}" role="img" font-family="{escape(SANS)}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker></defs>',
        ]
        self.box(0.5, 0.5, WIDTH - 1, height - 1, PANEL, radius=10)

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, radius: int = 6
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
            f'fill="{fill}" stroke="{LINE}" stroke-opacity="0.45"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        room: float = 0,
        size: int = SIZE,
        bold: bool = False,
        mono: bool = False,
        quiet: bool = False,
        anchor: str = "start",
    ) -> None:
        """Write `words` at the baseline `y`. Raises ValueError if they need more than `room`."""
        needed = len(words) * size * EM[MONO if mono else SANS] * (1.06 if bold else 1)
        if room and needed > room:
            raise ValueError(f"{words!r} needs {needed:.0f} pixels and has {room:.0f}")
        style = f' font-family="{escape(MONO)}"' if mono else ""
        style += ' font-weight="600"' if bold else ""
        style += f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{QUIET if quiet else INK}"{style}>'
            f"{escape(words)}</text>"
        )

    def card(
        self,
        x: float,
        y: float,
        width: float,
        fill: str,
        name: str,
        lines: Sequence[str] = (),
        *,
        mono: bool = True,
    ) -> float:
        """Draw a box with a name and lines below it. Returns the y of its lower edge."""
        height = 30 + 18 * len(lines)
        self.box(x, y, width, height, fill)
        self.text(x + 10, y + 20, name, room=width - 14, bold=True, mono=mono, size=13)
        for index, line in enumerate(lines):
            self.text(x + 10, y + 39 + 18 * index, line, room=width - 14, size=13)
        return y + height

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.6"{dash} '
            'marker-end="url(#head)"/>'
        )

    def dot(self, x: float, y: float, fill: str, words: str = "") -> None:
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="11" fill="{fill}" stroke="{LINE}"/>')
        if words:
            self.text(x, y + 4, words, size=11, anchor="middle")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def two_storeys() -> str:
    to = Drawing("The two storeys: the lab, which is yours, over the engine", 650)
    y = to.card(
        20,
        18,
        440,
        NEUTRAL,
        "python scripts/train.py optimizer=sgd",
        ["Hydra composes the config from conf/"],
    )
    top = y + 20
    to.box(20, top, 418, 194, "#fff7e6", radius=8)
    to.text(34, top + 24, "src/lab", bold=True, mono=True)
    to.text(424, top + 24, "yours to read and change", quiet=True, anchor="end", size=13)
    to.card(34, top + 36, 190, LAB, "build.py", ["makes the objects"])
    to.card(234, top + 36, 190, LAB, "loop.py", ["every event, in order"])
    to.card(34, top + 92, 190, LAB, "state.py", ["all that changes in a run"])
    to.card(234, top + 92, 190, LAB, "step.py, evaluate.py", ["one update, one measure"])
    to.card(34, top + 148, 390, LAB, "tasks/ models/ data/ optim.py schedules.py")
    between = top + 194
    to.card(
        96, between + 18, 288, NEUTRAL, "protocols.py", ["the only way from the engine to the lab"]
    )
    to.arrow((240, between + 18), (240, between + 2))
    to.arrow((60, between), (60, between + 82), dashed=True)
    to.text(68, between + 14, "imports", size=11, quiet=True)
    to.arrow((449, y), (449, between + 82))
    low = between + 84
    to.arrow((240, low), (240, between + 67))
    to.box(20, low, 440, 200, "#edf7f3", radius=8)
    to.text(34, low + 24, "src/regrow", bold=True, mono=True)
    to.text(440, low + 24, "the engine: an update replaces it", quiet=True, anchor="end", size=13)
    to.box(34, low + 36, 412, 24, ENGINE)
    to.text(42, low + 52, "cli", bold=True, mono=True, size=12)
    to.text(76, low + 52, "what scripts and notebooks call", size=12)
    wings = [
        ("config", "checks"),
        ("processes", "ranks, signals"),
        ("feeding", "batches"),
        ("distributed", "DDP, FSDP"),
        ("numerics", "exact sums"),
        ("checkpoint", "whole or absent"),
        ("record", "a run's folder"),
        ("runs", "one run"),
        ("sweep", "many runs"),
    ]
    for index, (name, what) in enumerate(wings):
        x, y = 34 + 139 * (index % 3), low + 64 + 42 * (index // 3)
        to.box(x, y, 134, 38, ENGINE)
        to.text(x + 8, y + 16, name, room=126, bold=True, mono=True, size=12)
        to.text(x + 8, y + 32, what, room=126, size=12)
    to.arrow((240, low + 200), (240, low + 218))
    last = to.card(
        20,
        low + 220,
        440,
        NEUTRAL,
        "outputs/digits/<date>_<time>-<suffix>/",
        ["config, metrics, checkpoints, manifest, report"],
    )
    assert last == to.height - 18, last
    return to.svg()


def one_step() -> str:
    to = Drawing("One optimizer step, from its number to the checkpoint", 618)
    x, width = 44, 416
    y = 18.0
    steps = [
        (
            NEUTRAL,
            "step n",
            ["(seed, n) gives epoch, position, learning rate,", "order, augmentation and dropout"],
            True,
        ),
        (
            ENGINE,
            "batch: 64 = 2 ranks × 4 micro-batches × 8",
            ["data.batch_size is global; hardware only splits it"],
            False,
        ),
        (
            LAB,
            "forward and backward, per micro-batch",
            ["the loss gives values and weights;", "gradients of the sum accumulate"],
            False,
        ),
        (
            ENGINE,
            "one exchange between the ranks",
            ["gradients, and sums of losses, weights, examples"],
            False,
        ),
        (
            LAB,
            "divide once by the global weight",
            ["this is the gradient of the weighted mean"],
            False,
        ),
    ]
    for fill, name, lines, mono in steps:
        low = to.card(x, y, width, fill, name, lines, mono=mono)
        to.arrow((252, low), (252, low + 16))
        y = low + 18
    half = 200
    to.card(x, y, half, LAB, "finite: update", ["clip, optimizer, average"], mono=False)
    low = to.card(
        x + width - half, y, half, WRONG, "not finite: skip", ["only counters change"], mono=False
    )
    to.arrow((144, low), (144, low + 16))
    to.arrow((360, low), (360, low + 16))
    y = low + 18
    low = to.card(
        x,
        y,
        width,
        LAB,
        "n + 1, then what is due",
        [
            "log · evaluate: each example once, exact means",
            "checkpoint, in the background · stop, if a signal came",
        ],
        mono=False,
    )
    last = to.card(
        x,
        low + 18,
        width,
        NEUTRAL,
        "a kill loses nothing",
        [
            "The resumed run loads the newest whole checkpoint",
            "and repeats the steps after it, with the same bits.",
        ],
        mono=False,
    )
    to.arrow((x, y + 20), (22, y + 20), (22, 40), (x - 2, 40))
    assert last == to.height - 18, last
    return to.svg()


def kill_and_resume() -> str:
    to = Drawing("A run that is killed and resumed ends with the bits of one that is not", 246)
    gap, left = 37, 34
    for row, (title, last) in enumerate(
        [("not interrupted", 12), ("killed in step 8 …", 7), ("… and resumed", 12)]
    ):
        y = 30 + 66 * row
        to.text(22, y, title, bold=True, size=13)
        first = 7 if row == 2 else 1
        for step in range(first, last + 1):
            to.dot(left + gap * (step - 1), y + 22, LAB if step != 6 else ENGINE, str(step))
        if row == 1:
            to.box(left + gap * 7 - 13, y + 9, 60, 26, WRONG)
            to.text(left + gap * 7 + 17, y + 26, "killed", size=12, anchor="middle")
        if row == 2:
            to.box(left - 12, y + 9, 194, 26, ENGINE)
            to.text(left - 4, y + 26, "the checkpoint of step 6", size=12)
    to.text(22, 232, "Steps 7 to 12 give the same bits: weights and metrics.", size=13, room=440)
    return to.svg()


def sprout() -> str:
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">\n'
        '<rect width="24" height="24" rx="5" fill="#0f766e"/>\n'
        '<path d="M12 20v-8M12 13c0-4-3-6-7-6 0 4 3 6 7 6zM12 11c0-4 3-6 7-6 0 4-3 6-7 6z" '
        'fill="none" stroke="#fff" stroke-width="1.8" stroke-linejoin="round"/>\n</svg>\n'
    )


IMAGES = {
    "kill_and_resume.svg": kill_and_resume,
    "one_step.svg": one_step,
    "sprout.svg": sprout,
    "two_storeys.svg": two_storeys,
}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in IMAGES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
