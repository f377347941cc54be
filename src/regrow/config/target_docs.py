"""The docstrings of a config's targets, read from their source: nothing is imported."""

from __future__ import annotations

import ast
import contextlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from regrow.errors import printable
from regrow.project import ROOT


def said_by_target(target: str) -> str:
    """Return the first paragraph of a class's or function's docstring in one line; "" without one.

    `target` is its dotted name. Modules may lie in the repository's root. A name that its module
    imports from elsewhere has no docstring there.
    """
    module, _, name = target.rpartition(".")
    with contextlib.suppress(OSError, SyntaxError, ValueError, ImportError):
        for file in _files(module):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                kinds = (ast.ClassDef, ast.FunctionDef)
                if isinstance(node, kinds) and node.name == name:
                    said = (ast.get_docstring(node) or "").partition("\n\n")[0]
                    return printable(" ".join(said.split()))
    return ""


def _files(module: str) -> Iterator[Path]:
    """Yield the source of a dotted module, found as an import would find it."""
    places: list[str] | None = [*sys.path, str(ROOT)]
    found: ModuleSpec | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        found = PathFinder.find_spec(name, places)
        if found is None:
            return
        places = [*(found.submodule_search_locations or ())]
    if found is not None and found.origin and found.origin.endswith(".py"):
        yield Path(found.origin)
