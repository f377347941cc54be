"""Build the site in build/site/html, or in html/ of another folder: python docs/site/build.py.

Every warning is an error. Called by `make site`, which puts zensical on the path. SITE_URL and
REPO_URL, both optional, are what the workflow knows that publishes the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pages

OUT = pages.ROOT / "build" / "site"
LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]* src="?https?:|<link[^>]* rel="?stylesheet[^>]* href="?http'
)
CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
CODE = re.compile(r"<code>(.*?)</code>", re.DOTALL)
SEPARATOR = re.compile(r"(?<=[A-Za-z_)\]}])([._/=,:@|]+)(?=[\w$({\[])(?![^<]*>)")


def wrappable(page: str) -> str:
    """Return a page whose code in tables wraps after its separators instead of within words."""
    return CELL.sub(
        lambda cell: CODE.sub(
            lambda code: "<code>" + SEPARATOR.sub(r"\1<wbr>", code[1]) + "</code>", cell[0]
        ),
        page,
    )


def main(out: Path = OUT) -> int:
    shutil.rmtree(out, ignore_errors=True)
    mistakes = pages.write(out / "pages")
    for line in mistakes:
        print(f"site: {line}", file=sys.stderr)
    if mistakes:
        return 1
    config = pages.CONFIG.read_text(encoding="utf-8")
    if address := os.environ.get("SITE_URL"):
        config = config.replace("[project]\n", f'[project]\nsite_url = "{address}"\n', 1)
    if address := os.environ.get("REPO_URL"):
        # Not as `repo_url`: each page would then ask GitHub for the number of stars.
        icon = "fontawesome/brands/github"
        config += f'\n[[project.extra.social]]\nicon = "{icon}"\nlink = "{address}"\n'
    (out / "zensical.toml").write_text(config, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    built = sorted((out / "html").rglob("*.html"))
    if done.returncode or len(built) < len(list((out / "pages").rglob("*.md"))):
        print(done.stdout, file=sys.stderr)
        return 1
    if loading := [path for path in built if LOADS.search(path.read_text(encoding="utf-8"))]:
        print(f"site: {loading[0].name} loads something from elsewhere", file=sys.stderr)
        return 1
    for path in built:
        text = path.read_text(encoding="utf-8")
        path.write_text(wrappable(text), encoding="utf-8")
    print(f"site: {len(built)} pages in {os.path.relpath(out / 'html', pages.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
