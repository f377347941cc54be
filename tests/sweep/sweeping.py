"""Sweeps for tests: the real command, each in its own folder."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
from running import TINY

from regrow.config.yaml_files import read_yaml
from regrow.project import CONF, ROOT
from regrow.record import manifest, ownership
from regrow.record.records import read_json
from regrow.sweep import ledger

SMALL = tuple(o for o in TINY if not o.startswith("trainer.num_threads"))
# Long enough to be interrupted, with a checkpoint every few steps.
LONG = (*SMALL, "trainer.max_epochs=150", "trainer.eval_every_epochs=50",
        "trainer.checkpoint.save_every_steps=20", "trainer.log_every_steps=50")  # fmt: skip


def begun(folder: Path, overrides: list[str], **facts: Any) -> None:
    """Make the minimum of a sweep of this user's in `folder`."""
    (folder / "code").mkdir(parents=True)
    manifest.write_origin(folder / "code", folder)
    entry = ownership.enter(ownership.digest_of_code(folder / "code", ""))
    ledger.write(folder, [], id=entry.id, overrides=overrides, complete=False, **facts)


def without_options(model: str) -> tuple[str, ...]:
    """Use this model, without the arguments of the default one."""
    keys = [key for key in read_yaml(CONF / "model" / "mlp.yaml") if key != "_target_"]
    return (f"model._target_={model}", *(f"~model.{key}" for key in keys))


def command(*arguments: str, root: Path = ROOT) -> list[str]:
    return [sys.executable, str(root / "scripts" / "train.py"), "-m", *arguments]


def environment(**more: str) -> dict[str, str]:
    tests = str(Path(__file__).resolve().parents[1])
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    own = more.pop("PYTHONPATH", None)
    return {**kept, **more, "PYTHONPATH": forked.python_path(*filter(None, [own, tests]))}


def sweep(
    folder: Path, *arguments: str, root: Path = ROOT, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a sweep to its end, from `folder`."""
    folder.mkdir(exist_ok=True)
    return forked.run(
        command(*arguments, root=root), cwd=folder, env=environment(**more),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@contextlib.contextmanager
def under_way(folder: Path, *arguments: str, root: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A started sweep, which ends with the block at the latest."""
    folder.mkdir(exist_ok=True)
    process = forked.popen(
        command(*arguments, root=root), cwd=folder, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


def table(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def weights(sweep: Path) -> dict[str, str]:
    return {row["job"]: row["weights_sha256"] for row in table(sweep)}


def pids_of(sweep: Path) -> list[int]:
    """Return the processes of the running jobs."""
    found: list[int] = []
    for status in sweep.glob("*/status.json"):
        with contextlib.suppress(ValueError):
            content = read_json(status)
            found += content["pids"] if content["state"] == "running" else []
    return found
