"""What one waits for before anything runs: help, the composed config, a mistake in a config."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Table, in_turn

ROOT = Path(__file__).resolve().parents[1]
EMPTY = """
import hydra
from omegaconf import OmegaConf
OmegaConf.register_new_resolver("options", str)  # conf/ asks for it in its help
@hydra.main(version_base=None, config_path={conf!r}, config_name="train")
def main(cfg): pass
main()
"""


def measure() -> Table:
    folder = Path(tempfile.mkdtemp())
    empty = folder / "empty.py"
    empty.write_text(EMPTY.format(conf=str(ROOT / "conf")))
    train = ROOT / "scripts" / "train.py"

    def command(*arguments: str) -> Callable[[], None]:
        def run() -> None:
            subprocess.run(
                [sys.executable, *arguments], cwd=folder, capture_output=True, check=False
            )

        return run

    return Table(
        title="Start",
        note="Whole processes. The empty Hydra app composes the same `conf/` and does nothing.",
        unit="s",
        reference="empty app --help",
        against={
            "train.py --cfg job": "empty app --cfg job",
            "train.py optimizer.lr=-1": "empty app --cfg job",
            "train.py optimizer.lrr=1": "empty app --cfg job",
        },
        seconds=in_turn(
            {
                "empty app --help": command(str(empty), "--help"),
                "train.py --help": command(str(train), "--help"),
                "empty app --cfg job": command(str(empty), "--cfg", "job"),
                "train.py --cfg job": command(str(train), "--cfg", "job"),
                "train.py optimizer.lr=-1": command(str(train), "optimizer.lr=-1"),
                "train.py optimizer.lrr=1": command(str(train), "optimizer.lrr=1"),
            },
            rounds=9,
        ),
    )
