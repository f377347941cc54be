"""Measure the house: `python -m benchmarks.house [checkout …]` prints a table with a column each.

The figures of docs/decisions.md, "Two storeys, in figures", of any commit that is checked out:
`git worktree add ../first 84831216df && python -m benchmarks.house ../first .`
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Container, Iterable
from pathlib import Path

OURS = ("lab", "regrow")
KEY = "clip_norm"  # whose way from the command line to its use is counted
STEPS = ("src/lab/step.py", "src/regrow/training/loop.py")  # the first of them that exists


def figures(root: Path) -> dict[str, str]:
    lab = [path for path in python(root, "src/lab") if "examples" not in path.parts]
    engine = [*python(root, "src/regrow"), *python(root, "src/hydra_plugins")]
    scripts = python(root, "scripts")
    modules = {name_of(path, root / "src"): path for path in [*lab, *engine]}
    graph = {name: imports(path, modules) - {name} for name, path in modules.items()}
    longest = max(modules.values(), key=lambda path: len(lines_of(path)))
    step = next(root / name for name in STEPS if (root / name).exists())
    naming = [path.stem for path in [*lab, *engine, *scripts] if names_key(path)]
    return {
        "lines of the lab, without its examples": f"{total(lab):,}",
        "lines of the engine": f"{total(engine):,}",
        "the same, without docstrings, comments and blank lines": f"{sum(map(code, engine)):,}",
        "lines of scripts": f"{total(scripts):,}",
        "modules in the root of regrow": str(len([*(root / "src/regrow").glob("*.py")])),
        "import cycles, lazy imports included": str(len(cycles(graph))),
        "longest file": f"{len(lines_of(longest))} ({longest.name})",
        f"modules whose code names {KEY}": f"{len(naming)} ({', '.join(sorted(naming))})",
        "the step: lines of its file": str(len(lines_of(step))),
        "the step: names that its file imports from others of ours": str(concepts(step)),
    }


def python(root: Path, folder: str) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def total(paths: Iterable[Path]) -> int:
    return sum(len(lines_of(path)) for path in paths)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code(path: Path) -> int:
    """Return the number of lines that hold more than a comment or a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    found: set[int] = set()
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)  # fmt: skip
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in blank:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - docstrings)


def name_of(path: Path, source: Path) -> str:
    return ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, modules: Container[str]) -> set[str]:
    """Return the `modules` that a file imports anywhere."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in modules else node.module for name in named)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name in modules}


def cycles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reached = {name: set(direct) for name, direct in graph.items()}
    for through in graph:
        for name in graph:
            if through in reached[name]:
                reached[name] |= reached[through]
    return {
        frozenset(other for other in graph if other in reached[name] and name in reached[other])
        for name in graph
        if name in reached[name]
    }


def names_key(path: Path) -> bool:
    """Return True if code names the key: an identifier, or a word of a text other than a docstring.

    Texts of several sentences, as messages and docstrings are, do not count.
    """
    for node in ast.walk(tree(path)):
        named = [getattr(node, field, None) for field in ("id", "attr", "arg")]
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and ". " not in text and not text.endswith("."):
            named += text.replace(".", " ").split()
        if KEY in named:
            return True
    return False


def concepts(path: Path) -> int:
    """Return how many names a file imports from other files of ours."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in OURS:
                found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(a.name for a in node.names if a.name.split(".")[0] in OURS)
    return len(found)


if __name__ == "__main__":
    columns = [figures(Path(name)) for name in sys.argv[1:] or ["."]]
    for row in columns[0]:
        print("|", row, "|", " | ".join(column[row] for column in columns), "|")
