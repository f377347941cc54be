"""Pages that need no other file: jinja2's template, and how values look in it."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from regrow.record import plots
from regrow.record.plots import Panel
from regrow.record.records import write_text
from regrow.record.redact import redact, redact_all

NOTHING = Markup("<span class=muted>&ndash;</span>")
LONG = 40  # characters of a value in a table
MOST_BYTES = 1_000_000  # of a run's page, whatever its config and its table per class add
MOST_OF_TEXT = 100_000  # bytes of config.yaml, and of manifest.json, in a run's page
MOST_OF_WORDS = 10_000  # of its notes, its tags, its error and each fact
NARROW, NARROW_NAME = 13, 60  # characters of a line and of a name below a small picture


def write(path: Path, kind: str, **content: Any) -> None:
    """Write a page of the template's block `kind`. Text is escaped, secrets are masked."""
    write_text(path, render(kind, **content))


def render(kind: str, **content: Any) -> str:
    """Return the page that `write` writes."""
    script = _file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    given = {"script": Markup(script), "digest": Markup(digest), **content}
    return str(_template().render(kind=kind, **given))


@functools.cache
def _template() -> Any:
    import jinja2  # reading a record does not need it

    environment = jinja2.Environment(
        autoescape=True,
        finalize=_shown,
        loader=jinja2.FunctionLoader(lambda name: _file(f"report.{name}")),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters |= {"number": number, "duration": duration, "value": value, "code": code}
    environment.filters |= {"narrow": narrow, "brief": brief_words}
    return environment.get_template("template.html")


def _file(name: str) -> str:
    return resources.files("regrow.record").joinpath(name).read_text(encoding="utf-8")


def _shown(content: Any) -> Any:
    if isinstance(content, Markup):
        return content
    return "" if content is None else redact(str(content))


def chart(
    name: str, figure: Any, panels: Sequence[Panel], count: int, caption: str = ""
) -> dict[str, Any]:
    """Return what the template draws of a figure: the plot as it is and, of `panels`, the data.

    `count` is the number of lines in the page, which share its points.
    """
    points = max(20, min(plots.POINTS, plots.PAGE_POINTS // max(1, count)))
    shown = [panel.as_json(points) for panel in panels]
    steps: dict[tuple[float, ...], int] = {}  # lines of a run, and runs of a sweep, share them
    for line in (line for panel in shown for line in panel["lines"]):
        line["x"] = steps.setdefault(tuple(line["x"]), len(steps))
    label = Markup.escape(name.replace("_", " "))
    svg = plots.to_svg(figure).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    data = redact_all({"xs": [[*it] for it in steps], "panels": shown}) if shown else None
    return {"name": name, "svg": Markup(svg), "data": data, "caption": caption, "still": ""}


def link(path: Path, start: Path) -> str:
    """Return a relative link, quoted: a folder's name may look like a scheme or a query."""
    return quote(os.fsencode(os.path.relpath(path, start)))


def code(content: Any) -> str:
    return Markup("<code>{}</code>").format(brief_words(content)) if content else ""


def clipped(text: str, most: int) -> tuple[str, str]:
    """Return the first lines that take at most `most` bytes of a page, and a sentence if not all.

    If the first line alone is longer, returns its beginning.
    """
    whole, found = len(text), text
    while (size := len(Markup.escape(found).encode("utf-8", "backslashreplace"))) > most:
        found = found[: min(len(found) - 1, len(found) * most // size)]
    if len(found) == whole:
        return text, ""
    found = found[: found.rfind("\n") + 1] or found
    return found, f"Shown: the first {len(found):,} of {whole:,} characters."


def brief_words(content: Any) -> Any:
    """Return the user's text, cut to 10,000 bytes."""
    if content is None or isinstance(content, Markup):
        return content
    words, said = clipped(redact(str(content)), MOST_OF_WORDS)
    return f"{words}… ({said})" if said else words


def number(content: Any) -> Any:
    if content is None:
        return NOTHING
    if isinstance(content, bool) or not isinstance(content, int | float):
        return content
    if isinstance(content, int):
        return f"{content:,}".replace(",", "\u202f")
    if not math.isfinite(content):
        return Markup("<strong>{}</strong>").format(
            "NaN" if math.isnan(content) else f"{content:+}"
        )
    small = 1e-3 <= abs(content) < 1e4 or content == 0
    short = f"{content:.4f}" if small else f"{content:.4g}"
    if 1e4 <= abs(content) < 1e9:
        short = f"{content:,.0f}".replace(",", "\u202f")
    return Markup('<span title="{!r}">{}</span>').format(content, short)


def value(content: Any, key: str = "") -> Any:
    """Return a config's value as it is typed, shortened if it is long."""
    if content is None or isinstance(content, bool):
        return "null" if content is None else str(content).lower()
    text = redact(str(content))
    short = text.rpartition(".")[2] if key.endswith("_target_") else text
    short = plots.elided(short, LONG)
    return text if short == text else Markup('<span title="{}">{}</span>').format(text, short)


def narrow(content: Any) -> Any:
    """Return a name that wraps at its separators; longer parts have an ellipsis in their middle."""
    text = redact(str(content))
    if len(text) > NARROW_NAME:
        text = f"{text[: NARROW_NAME // 3]}…{text[-2 * NARROW_NAME // 3 :]}"
    parts = re.findall(r"[^/_. -]*[/_. -]?", text)
    short = (
        it if len(it) <= NARROW else f"{it[: NARROW // 2]}…{it[-NARROW // 2 :]}" for it in parts
    )
    return Markup("<wbr>").join(part for part in short if part)


def brief(content: str, key: str = "") -> str:
    """Return a swept value for a label: a class by its name alone, a long number rounded."""
    if key.endswith("_target_"):
        return content.rpartition(".")[2]
    try:
        return f"{float(content):.4g}" if len(content) > 7 else content
    except ValueError:
        return plots.elided(content, LONG)


def duration(seconds: Any) -> Any:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING if seconds is not None else ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def short_names(keys: Sequence[str]) -> Mapping[str, str]:
    """Return the shortest endings that tell the keys apart: lr for optimizer.lr."""
    plain = {key: key.lstrip("+~").removesuffix("._target_") for key in keys}
    found = {}
    for key, name in plain.items():
        parts = name.split(".")
        endings = (".".join(parts[-depth:]) for depth in range(1, len(parts) + 1))
        others = [one for other, one in plain.items() if other != key]
        found[key] = next(
            (it for it in endings if not any(f".{one}".endswith(f".{it}") for one in others)), key
        )
    return found
