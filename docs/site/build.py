"""Build the site in build/site/html: python docs/site/build.py. Every warning is an error.

Called by `make site`, which puts zensical on the path. SITE_URL and REPO_URL, both optional, are
what the workflow knows that publishes the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pages

OUT = pages.ROOT / "build" / "site"
LOADS = re.compile(
    r'<(?:script|img|iframe)[^>]* src="?https?:|<link[^>]* rel="?stylesheet[^>]* href="?http'
)


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    mistakes = pages.write(OUT / "pages")
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
    (OUT / "zensical.toml").write_text(config, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=OUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    built = sorted((OUT / "html").rglob("*.html"))
    if done.returncode or len(built) < len(list((OUT / "pages").rglob("*.md"))):
        print(done.stdout, file=sys.stderr)
        return 1
    if loading := [path for path in built if LOADS.search(path.read_text(encoding="utf-8"))]:
        print(f"site: {loading[0].name} loads something from elsewhere", file=sys.stderr)
        return 1
    print(f"site: {len(built)} pages in {(OUT / 'html').relative_to(pages.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
