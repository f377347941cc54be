"""Find the user's own code in the traceback of an error."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple

from regrow.project import ROOT, lab_name

ENGINE = Path(__file__).resolve().parents[1]
OF_A_USER = ("models", "tasks", "data", "examples")  # folders of the lab; the rest is the loop
INSTALLED = ("site-packages", "dist-packages")

Owner = Literal["own", "engine", "library"]


class CodeLine(NamedTuple):
    """A line of code that an error passed through."""

    frame: FrameType
    file: str
    line: int
    last: int  # line of the expression

    @property
    def text(self) -> str:
        """The code in one line, without its indentation; "" if the file is gone."""
        lines = range(self.line, self.last + 1)
        code = (linecache.getline(self.file, line, self.frame.f_globals) for line in lines)
        return " ".join(filter(None, (line.strip() for line in code)))

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.frame.f_code.co_name

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}"


def places_of(error: BaseException) -> Iterator[CodeLine]:
    """Yield the places that an error passed through, the innermost first."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    summaries = traceback.extract_tb(error.__traceback__)
    for frame, summary in reversed([*zip(frames, summaries, strict=True)]):
        line = summary.lineno or 1
        yield CodeLine(frame, summary.filename, line, summary.end_lineno or line)


def own_place(error: BaseException, named: Collection[str] = ()) -> CodeLine | None:
    """Return the innermost place in the user's code; None if the engine raised the error.

    What libraries raise belongs to the code that called them. Code is the user's if it is neither
    the engine, the lab's loop nor installed; installed packages in `named` are the user's too.
    """
    for place in places_of(error):
        owner = owner_of(place.file, frozenset(named))
        if owner != "library":
            return place if owner == "own" else None
    return None


@functools.cache
def owner_of(file: str, named: frozenset[str] = frozenset()) -> Owner:
    """Return who wrote a file of code."""
    if file.startswith("<"):
        return "library"
    path = Path(os.path.abspath(file))  # noqa: PTH100  a link may lead elsewhere
    if path.is_relative_to(ENGINE):
        return "engine"
    if any(place in path.parts for place in INSTALLED):
        return "own" if any(_is_in(path, name) for name in named) else "library"
    lab = ROOT / "src" / lab_name()
    if path.is_relative_to(lab):
        return "own" if path.relative_to(lab).parts[0] in OF_A_USER else "engine"
    if path.is_relative_to(ROOT / "scripts"):
        return "engine"
    own = (sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib"))
    return "library" if any(map(path.is_relative_to, own)) else "own"


def _is_in(path: Path, name: str) -> bool:
    """Return True if a file belongs to the imported module or package of this name."""
    module = sys.modules.get(name)
    if folders := getattr(module, "__path__", None):
        return any(path.is_relative_to(folder) for folder in folders)
    file = getattr(module, "__file__", None)
    return file is not None and path == Path(file)


def shown(file: str | Path) -> str:
    """Return a file's path, relative to the root of the repository if it lies there."""
    path = Path(file)
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
