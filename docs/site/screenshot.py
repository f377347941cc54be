"""Photograph a run's page for the README: python docs/site/screenshot.py

Trains on the bundled digits, opens the run's report.html in Chromium, which must be installed, and
writes docs/images/report.png.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "docs" / "images" / "report.png"
WIDTH, HEIGHT = 1180, 1010  # down to the end of the first plots
RUN = ("name=digits", "trainer.max_epochs=30", "trainer.log_every_steps=5")
COLOURS = 64


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("screenshot: Chromium is not installed", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = [sys.executable, str(ROOT / "scripts" / "train.py"), *RUN]
        subprocess.run([*train, f"hydra.run.dir={folder}/run"], cwd=folder, check=True)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}"]
        options += ["--force-device-scale-factor=1", f"--screenshot={folder}/page.png"]
        subprocess.run([browser, *options, f"file://{folder}/run/report.html"], check=True)
        with Image.open(folder / "page.png") as page:
            page.convert("RGB").quantize(COLOURS).save(IMAGE, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
