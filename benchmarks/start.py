"""Start-up times: help, the composed config, a mistake in a config, the first step."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
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


BY_HAND = """
import hydra, torch
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
OmegaConf.register_new_resolver("options", str)  # conf/ asks for it in its help
@hydra.main(version_base=None, config_path={conf!r}, config_name="train")
def main(cfg):
    torch.set_num_threads(cfg.trainer.num_threads)
    digits = load_digits()
    x = torch.from_numpy(digits.images / 16).float()
    y = torch.from_numpy(digits.target).long()
    x, _, y, _ = train_test_split(x, y, test_size=0.3, stratify=y, random_state=cfg.seed)
    nn = torch.nn
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(),
        nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, fused=True)
    nn.functional.cross_entropy(model(x[:64]), y[:64]).backward()
    optimizer.step()
    open("stepped", "w").write("once")
main()
"""


def measure() -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        return [measure_start(Path(folder)), measure_first_step(Path(folder))]


def measure_first_step(folder: Path) -> Table:
    """Measure the time from the command to the end of the first optimizer step."""
    script = folder / "by_hand.py"
    script.write_text(BY_HAND.format(conf=str(ROOT / "conf")))

    def until(file: Path, *command: str) -> Callable[[], float]:
        def run() -> float:
            shutil.rmtree(folder / "run", ignore_errors=True)
            file.unlink(missing_ok=True)
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while not (file.exists() and file.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended before its first step")
                time.sleep(0.001)
            seconds = time.perf_counter() - started
            process.kill()
            process.wait()
            return seconds

        return run

    train = str(ROOT / "scripts" / "train.py")
    same = ("trainer.num_threads=1",)
    ours = (*same, "trainer.device=cpu", "trainer.log_every_steps=1", "hydra.run.dir=run")
    return Table(
        title="From the command to the first optimizer step",
        note="Digits, the default MLP. By hand: a script that imports torch, sklearn and Hydra, "
        "composes the same `conf/`, cuts the data, builds the model and takes a step. train.py has "
        "by then also checked its config, fingerprinted the data, tried a batch and written down "
        "code, versions and hardware.",
        unit="s",
        reference="by hand",
        seconds=in_turn(
            {
                "train.py": until(folder / "run" / "metrics.jsonl", train, *ours),
                "by hand": until(folder / "stepped", str(script), *same),
            },
            rounds=7,
        ),
    )


def measure_start(folder: Path) -> Table:
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
