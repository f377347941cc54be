"""Print a version's section of CHANGELOG.md as release notes: python .github/notes.py 1.0.0

Each paragraph and each item of a list is put on one line, because a release shows line breaks as
they are. Exit code 1 if the CHANGELOG has no such version.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"
BEGINS = re.compile(r"\s*(?:[-*] |\d+\. |\||#|```)")  # a line that continues no other


def notes(changelog: str, version: str) -> str | None:
    """Return the section of `version`, without its heading; None if there is none."""
    heading = rf"^## \[{re.escape(version)}\][^\n]*\n"
    found = re.search(heading + r"(.*?)(?=^## |^\[[^\]]+\]: |\Z)", changelog, re.M | re.S)
    return unwrapped(found[1].strip()) + "\n" if found else None


def unwrapped(text: str) -> str:
    lines: list[str] = []
    is_code = False
    for line in text.split("\n"):
        is_code ^= line.lstrip().startswith("```")
        before = lines[-1] if lines else ""
        joins = before.strip() and line.strip() and not is_code and not BEGINS.match(line)
        if joins and not before.lstrip().startswith(("|", "#", "```")):
            lines[-1] = f"{before} {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)


def main() -> int:
    (version,) = sys.argv[1:]
    text = notes(CHANGELOG.read_text(encoding="utf-8"), version)
    if text is None:
        print(f"notes: CHANGELOG.md has no section [{version}]. Add it.", file=sys.stderr)
        return 1
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
