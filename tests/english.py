"""Find wording that this project avoids: python tests/english.py [FILE …].

Reads the Python, Markdown, YAML and TOML files that git tracks, or the files named. Prints a line
`path:line: 'wording': advice` for each hit, and exits with 1 if there are any. The name of a test
or of its file is read as a sentence, with a space for each `_`. Needs nothing but the standard
library. The rules are those of AGENTS.md.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENDINGS = {".py", ".md", ".yaml", ".yml", ".toml"}
NAMES = {"Makefile", ".ci/run"}
# Read these where git lists nothing, as in an unpacked archive.
FOLDERS = (".ci", ".github", "benchmarks", "conf", "docs", "scripts", "src", "tests")

LEFT_OUT = {
    "tests/older/": "runs recorded by earlier versions: they stay as they were written",
    "benchmarks/RESULTS.md": "`make bench` writes it",
    "docs/reference/": "`make reference` writes it: see the docstrings",
    "tests/english.py": "holds the patterns",
    "tests/test_english.py": "holds sentences that must be found",
}

# A space or a line break, with the sign of a comment or the quotes between two parts of a string.
GAP = r"""(?:[ ]?["']?\n[ \t]*(?:\#[ ]?|f?["'])?|[ ])"""
WORDS = r"\b(?P<hit>{})\b"
DOCSTRING = r'^[ \t]*[rR]?"""(?P<hit>{})[ ]'
# A comment may be a question, as in the first line of an experiment.
COMMENT = r"(?:^|(?<=\s))\#[ ](?P<hit>{})[ ](?!.*\?$)"

TEST = re.compile(r"^[ \t]*def test_(?P<name>\w+)", re.MULTILINE)
# A fenced block, or code in backticks, which Markdown may break over a line.
CODE = re.compile(r"^ *```.*?^ *```|`[^`]+`", re.MULTILINE | re.DOTALL)
YAML_COMMENT = re.compile(r"(?:^|\s)# .*")
SPEAK = ("src/", "scripts/")  # folders whose strings of several words are messages


class Rule(NamedTuple):
    """A pattern in verbose syntax, whose group `hit` is reported, and what to write instead.

    It applies to all text and to names of tests; or to `names` alone; or to `prose`: names,
    messages, comments in YAML, and Markdown without its code.
    """

    pattern: str
    advice: str
    flags: re.RegexFlag = re.IGNORECASE
    in_markdown: bool = True
    where: Literal["text", "names", "prose"] = "text"


RULES = (
    Rule(
        DOCSTRING.format("What|Whether|Of|The[ ]same"),
        "start with what it returns, does or is: 'Return …'.",
        re.NOFLAG,
    ),
    Rule(
        COMMENT.format("Of|What|Nor"),  # in Markdown these are headings
        "put the subject first.",
        re.NOFLAG,
        in_markdown=False,
    ),
    # 'there is no …' and 'is no longer …' are common English.
    Rule(
        rf"(?:\bthere{GAP})?" + WORDS.format(rf"(?:is|are){GAP}no") + rf"(?!{GAP}longer\b)",
        "write 'is not a …' or 'has no …'.",
    ),
    Rule(WORDS.format(rf"ha(?:s|ve){GAP}to{GAP}be"), "write 'must be'."),
    Rule(
        WORDS.format(rf"goes{GAP}on|go{GAP}on{GAP}with|going{GAP}on"),
        "write 'resume' or 'continue'.",
    ),
    Rule(WORDS.format("mend|mends|mended"), "write 'fix' or 'repair'."),
    Rule(WORDS.format("anew"), "write 'again' or 'from scratch'."),
    Rule(WORDS.format("whoever|whosoever"), "name the person or the program."),
    Rule(
        r"\A(?P<hit>what|of|nor|who|whether)\b",
        "put the subject first: 'a wrong key is named'.",
        where="names",
    ),
    Rule(
        WORDS.format("cut|cuts|cutting"),
        "write 'split', 'interrupted', 'limited' or 'removed'.",
        where="prose",
    ),
    Rule(WORDS.format("slice|slices|sliced"), "write 'micro-batch' or 'part'.", where="prose"),
    Rule(WORDS.format("picture|pictures"), "write 'plot' or 'image'.", where="prose"),
)
PATTERNS = [(re.compile(rule.pattern, rule.flags | re.X | re.M), rule) for rule in RULES]


def words_of(name: str) -> str:
    """Return the sentence that the name of a test is, without `test_`."""
    return name.removeprefix("test_").replace("_", " ")


def messages(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the content of each string of several words that is not a docstring."""
    nodes = list(ast.walk(ast.parse(text)))
    left = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        strings = [
            each for each in parts if isinstance(each, ast.Constant) and id(each) not in left
        ]
        words = [(each.lineno, each.value) for each in strings if isinstance(each.value, str)]
        if " " in "".join(each for _, each in words).strip():
            yield from words
        left |= {id(each) for each in strings}


def prose(text: str, name: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the words of the prose in the file `name`, without names of tests."""
    ending = Path(name).suffix
    if ending == ".md":
        yield 1, CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    elif ending in {".yaml", ".yml"}:
        for number, line in enumerate(text.splitlines(), start=1):
            if comment := YAML_COMMENT.search(line):
                yield number, comment[0]
    elif ending == ".py" and name.startswith(SPEAK):
        yield from messages(text)


def hits(text: str, name: str = "code.py") -> list[tuple[int, str, str]]:
    """Return the line, the wording and the advice of each hit in `text`, from the file `name`."""
    markdown = name.endswith(".md")
    read = [("text", 1, text), *(("prose", *each) for each in prose(text, name))]
    if name.endswith(".py"):
        read += [
            ("names", text.count("\n", 0, test.start("name")) + 1, words_of(test["name"]))
            for test in TEST.finditer(text)
        ]
        if Path(name).name.startswith("test_"):
            read.append(("names", 1, words_of(Path(name).stem)))
    found = []
    for where, line, words in read:
        for pattern, rule in PATTERNS:
            if where not in {rule.where, "names"} or (markdown and not rule.in_markdown):
                continue
            for match in pattern.finditer(words):
                if match.start() < match.start("hit") and match[0][:5].lower() == "there":
                    continue
                wording = re.sub(GAP, " ", match["hit"], flags=re.X)
                place = line + words.count("\n", 0, match.start("hit"))
                found.append((place, wording, rule.advice))
    return sorted(found)


def is_read(name: str) -> bool:
    """Return True if this script reads the file `name`, a path below the root with slashes."""
    return (name in NAMES or Path(name).suffix in ENDINGS) and not name.startswith(tuple(LEFT_OUT))


def tracked() -> list[str]:
    """Return the names of all files that git tracks; without git, of those in the usual folders."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=False
        )
        names = [name for name in os.fsdecode(done.stdout).split("\0") if name]
    except OSError:
        names = []
    if names:
        return names
    folders = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return [path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*"), *folders)]


def check(names: Iterable[str]) -> list[str]:
    """Return a line for each hit in the files that are read, ordered by name and line."""
    lines = []
    for name in sorted(filter(is_read, names)):
        if (path := ROOT / name).is_file():  # deleted, but tracked
            text = path.read_text(encoding="utf-8")
            lines += [
                f"{name}:{line}: {wording!r}: {advice}"
                for line, wording, advice in hits(text, name)
            ]
    return lines


def main(arguments: list[str]) -> int:
    named = [Path(os.path.relpath(name, ROOT)).as_posix() for name in arguments]
    lines = check(named or tracked())
    print("\n".join(lines), end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
