"""Write docs/reference/, the API reference, from the source: python docs/site/api.py.

Nothing is imported. A wing's page has the names that the docstring of its `__init__` lists, a page
of the lab all names that have a docstring. A signature is printed as it stands in the source.
"""

from __future__ import annotations

import ast
import html
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
DOCS = ROOT / "docs"
FOLDER = "reference"
LISTED = re.compile(r"^(\w+)(?:: (.+(?:\n    .+)*))?$", re.MULTILINE)  # module: name, name
SHOWN_VALUE = 3  # lines; of a longer constant, only the name is shown
SPECIAL = ("__init__", "__call__", "__iter__", "__len__", "__getitem__")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class NotFound(Exception):
    """A name that a wing lists, and its module lacks."""


def pages() -> dict[str, tuple[str, str]]:
    """Return (path of the source, Markdown) for each page, by its path in docs/."""
    engine = SOURCE / "regrow"
    wings = sorted(path.parent for path in engine.glob("*/__init__.py"))
    found = {
        f"{FOLDER}/{wing.name}.md": (f"src/regrow/{wing.name}", page_of_wing(wing))
        for wing in wings
    }
    entries = {
        "regrow": ["compose", "build"],
        "regrow.load": None,
        "regrow.errors": None,
        "regrow.randomness": None,
    }
    text = "# regrow\n\nThe names that a notebook or a project uses most.\n\n"
    text += "\n".join(
        imported(name) if name == "regrow.load" else section(name, names)
        for name, names in entries.items()
    )
    found[f"{FOLDER}/regrow.md"] = ("src/regrow", text)
    own = definitions(parse(engine / "protocols.py"))
    names = [name for name, node in own if not isinstance(node, ast.ImportFrom)]
    protocols = section("regrow.protocols", names).replace("## ", "# ", 1)
    found[f"{FOLDER}/protocols.md"] = ("src/regrow/protocols.py", protocols)
    found[f"{FOLDER}/lab.md"] = ("src/lab", page_of_lab())
    return {
        place: (path, re.sub(r"\n{3,}", "\n\n", with_unique_headings(text)).rstrip("\n") + "\n")
        for place, (path, text) in found.items()
    }


def with_unique_headings(page: str) -> str:
    """Return the page with the module before each name that stands there several times.

    Anchors are in lower case: `Origins` beside `origins` of one module gets its kind too.
    """
    names = Counter(name.lower() for name in re.findall(r"^### (\w+)$", page, re.MULTILINE))
    module, lines, taken = "", [], set[str]()
    for line in page.split("\n"):
        if line.startswith("## "):
            module = line.rpartition(".")[2]
        name = line.removeprefix("### ")
        if name != line and names[name.lower()] > 1:
            line = f"### {module}.{name}"
            if line.lower() in taken:
                kind = "constant" if name.isupper() else "function" if name.islower() else "class"
                line += f" ({kind})"
            taken.add(line.lower())
        lines.append(line)
    return "\n".join(lines)


def page_of_wing(wing: Path) -> str:
    about, _, listed = docstring(parse(wing / "__init__.py")).partition("\n\nPublic")
    parts = [f"# regrow.{wing.name}\n\n{prose(about)}\n"]
    for module, names in LISTED.findall(listed.partition("\n\n")[2]):
        wanted = [name for name in re.split(r",\s+", names) if name]
        parts.append(section(f"regrow.{wing.name}.{module}", wanted))
    return "\n".join(parts)


def page_of_lab() -> str:
    lab = SOURCE / "lab"
    parts = [f"# lab\n\n{prose(docstring(parse(lab / '__init__.py')))}\n"]
    for path in sorted(lab.rglob("*.py")):
        if path.name != "__init__.py" and "examples" not in path.parts:
            parts.append(section(".".join(path.relative_to(SOURCE).with_suffix("").parts), None))
    return "\n".join(parts)


def section(module: str, names: list[str] | None) -> str:
    """Return what a module's docstring and `names` say; with None, all that have a docstring."""
    text = source_of(module).read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    defined = dict(definitions(tree))
    if names is None:
        names = [
            name
            for name, node in defined.items()
            if not name.startswith("_") and isinstance(node, Definition) and docstring(node)
        ]
    parts = [f"## {module}\n\n{prose(docstring(tree))}\n"]
    for name in names:
        if name not in defined:
            raise NotFound(f"{module} has no {name}: see the docstring of its wing")
        parts.append(entry(name, defined[name], lines))
    return "\n".join(parts)


def imported(module: str) -> str:
    """Return what `section` does for a module whose names are all imported, as regrow.load's."""
    tree = parse(source_of(module))
    parts = [f"## {module}\n\n{prose(docstring(tree))}\n"]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [each.name for each in node.names]
            parts.append(section(node.module, names).partition("\n### ")[2])
    return "\n### ".join(parts)


def source_of(module: str) -> Path:
    place = SOURCE.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    for node in tree.body:
        if isinstance(node, Definition):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            named = (each for target in node.targets for each in ast.walk(target))
            yield from ((each.id, node) for each in named if isinstance(each, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, node
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, node) for alias in node.names)


def entry(name: str, node: ast.stmt, lines: list[str]) -> str:
    heading = f"### {name}\n\n"
    if isinstance(node, ast.ClassDef):
        return heading + code(stub(node, lines)) + prose(docstring(node)) + methods(node) + "\n"
    if isinstance(node, Definition):
        return heading + code(signature(node, lines)) + prose(docstring(node)) + "\n"
    shown = lines[node.lineno - 1 : node.end_lineno]
    return heading + (code(shown) if len(shown) <= SHOWN_VALUE else "A constant.\n")


def signature(node: Definition, lines: list[str]) -> list[str]:
    """Return the lines of a `def` or `class` with its decorators, as they stand in the source."""
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    body = node.body[0]
    if body.lineno == node.lineno:  # on one line
        return [line[: body.col_offset].rstrip() for line in lines[first - 1 : body.lineno]]
    last = body.lineno - 1
    while not lines[last - 1].split("#")[0].rstrip().endswith(":"):  # comments above the body
        last -= 1
    return lines[first - 1 : last]


def stub(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """Return a class's signature, fields and the signatures of its public methods."""
    found = signature(node, lines)
    for child in node.body:
        if isinstance(child, ast.AnnAssign):
            if not ast.unparse(child.target).startswith("_"):
                found += lines[child.lineno - 1 : child.end_lineno]
        elif isinstance(child, ast.FunctionDef) and is_public(child.name):
            found += signature(child, lines)
    return found


def is_public(name: str) -> bool:
    return not name.startswith("_") or name in SPECIAL


def methods(node: ast.ClassDef) -> str:
    """Return the docstrings of the public methods as a list."""
    found = [
        f"- `{child.name}`: {prose(docstring(child))}".replace("\n\n", "\n\n    ")
        for child in node.body
        if isinstance(child, ast.FunctionDef) and is_public(child.name) and docstring(child)
    ]
    return "\n" + "\n".join(found) if found else ""


def code(lines: list[str]) -> str:
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(["```python", *(line[indent:] for line in lines), "```", "", ""])


def prose(text: str) -> str:
    """Escape what Markdown would take for HTML, outside of code."""
    parts = re.split(r"(`[^`]+`)", text)
    escaped = (p if p.startswith("`") else html.escape(p, quote=False) for p in parts)
    return "".join(escaped) + "\n"


def docstring(node: ast.Module | ast.stmt) -> str:
    return (ast.get_docstring(node) if isinstance(node, ast.Module | Definition) else "") or ""


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def main() -> int:
    (DOCS / FOLDER).mkdir(exist_ok=True)
    wanted = pages()
    for path in sorted((DOCS / FOLDER).glob("*.md")):
        if path.relative_to(DOCS).as_posix() not in wanted:
            path.unlink()
    for place, (_, text) in wanted.items():
        (DOCS / place).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
