"""The pages of the site as Markdown: docs/, and what its pages link to.

A page of docs/ may link to any file of the repository by its relative path, so that the links work
where the repository is browsed. On the site, Markdown and images that are reached in this way stand
under `repository/`, a wing or the Protocols lead to their page of the API reference, and any other
text file is shown as code. Needs nothing but the standard library.
"""

from __future__ import annotations

import posixpath
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import api

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("zensical.toml")
STYLE = Path(__file__).with_name("style.css")
FENCE = re.compile(r"^\s*(```+|~~~+)")
LINK = re.compile(
    r"(\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)(\))|`[^`]*`"
)  # or code, without groups
ITEM = re.compile(r"^(?:[-*]|\d+\.) ")
ELSEWHERE = re.compile(r"^(?:[a-z]+:|#)")
BESIDE = "repository/"
CODE = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".cff": "yaml"}
COPIED = (".svg", ".png")


def write(folder: Path) -> list[str]:
    """Write all pages into the new `folder`. Returns the mistakes, a line each."""
    mistakes: list[str] = []
    places = {path: place for place, (path, _) in api.pages().items()}
    places |= {f"{path}/__init__.py": place for path, place in places.items()}
    named = [*named_in(tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]["nav"])]
    own = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "docs").rglob("*"))
        if path.suffix in (".md", *COPIED) and path.parent != CONFIG.parent
    ]
    beside = [name.removeprefix(BESIDE) for name in named if name.startswith(BESIDE)]
    waiting, seen = [*own, *beside], {*own, *beside}
    while waiting:
        path = waiting.pop(0)
        place = place_of(path, places)
        if path.endswith(COPIED):
            put(folder / place, (ROOT / path).read_bytes())
            continue
        text = (ROOT / path).read_text(encoding="utf-8")
        if not path.endswith(".md"):
            put(folder / place, as_code(path, text))
            continue
        for link in links_of(text):
            if (target := target_of(path, link)) is None or target[0] in places:
                continue
            if target[0].startswith("../") or not (ROOT / target[0]).is_file():
                mistakes.append(f"{path}: {link} leads to no file of the repository")
            elif target[0] not in seen:
                waiting.append(target[0])
                seen.add(target[0])
        put(folder / place, rewritten(text, path, places))
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    mistakes += [f"{CONFIG.name}: nav names {name}" for name in named if name not in present]
    linked = {name for name in present if name.startswith(BESIDE)}  # need not be in the menu
    mistakes += [f"{CONFIG.name}: nav lacks {name}" for name in sorted(present - linked - {*named})]
    shutil.copy(STYLE, folder / STYLE.name)
    return mistakes


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def named_in(nav: list[object] | object) -> Iterator[str]:
    """Yield the files that the menu names."""
    if isinstance(nav, str):
        yield nav
        return
    for each in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from named_in(each)


def prose_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield (index, line) for the lines outside of blocks of code."""
    fence = ""
    for index, line in enumerate(text.split("\n")):
        found = FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence):
            fence = ""
        elif not fence:
            yield index, line


def links_of(text: str) -> Iterator[str]:
    for _, line in prose_lines(text):
        yield from (found[2] for found in LINK.finditer(line) if found[2])


def target_of(page: str, link: str) -> tuple[str, str] | None:
    """Return the repository's path that a link of `page` leads to, and the anchor there."""
    if ELSEWHERE.match(link):
        return None
    path, _, anchor = link.partition("#")
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path)), anchor


def place_of(path: str, places: dict[str, str]) -> str:
    """Return where a file of the repository stands on the site."""
    if path in places:
        return places[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return BESIDE + path + ("" if path.endswith((".md", *COPIED)) else ".md")


def rewritten(text: str, path: str, places: dict[str, str]) -> str:
    """Return the text of the page at `path` with links that lead within the site."""
    here = posixpath.dirname(place_of(path, places)) or "."

    def within(found: re.Match[str]) -> str:
        target = target_of(path, found[2]) if found[2] else None
        if target is None:
            return found[0]
        there = posixpath.relpath(place_of(target[0], places), here)
        return found[1] + there + (f"#{target[1]}" if target[1] else "") + found[3]

    lines = text.split("\n")
    for index, line in prose_lines(text):
        before = lines[index - 1] if index else ""
        # Python-Markdown, unlike GitHub, begins a list only after a blank line.
        begins = ITEM.match(line) and before.strip() and not re.match(r"[-* <]|\d+\. ", before)
        lines[index] = ("\n" if begins else "") + LINK.sub(within, line)
    return "\n".join(lines)


def as_code(path: str, text: str) -> str:
    language = CODE.get(Path(path).suffix, "text")
    return f"# {Path(path).name}\n\n`{path}`\n\n````{language}\n{text}````\n"
