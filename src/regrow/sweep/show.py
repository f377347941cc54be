"""Show a sweep's progress: a bar per job on a terminal, else a line as each starts and ends."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from regrow.record import records
from regrow.sweep import ledger
from regrow.sweep.planning import Planned

log = logging.getLogger("regrow")

EVERY = 1.0  # seconds between two reads of the jobs' metrics


class Show:
    """Shows `total` jobs, of which `done` were done before. A context manager, for its bars."""

    def __init__(self, folder: Path, total: int, done: int, jobs: int) -> None:
        self.folder, self.total, self.done = folder, total, done
        self.failed = 0
        self.is_live = sys.stderr.isatty()
        self._bars: list[Any] = []
        self._shown: dict[int, Any] = {}
        self._looked = 0.0
        self._jobs = jobs

    def __enter__(self) -> Show:
        if self.is_live:
            text = "{desc} {bar} {n_fmt}/{total_fmt} jobs  {elapsed}, {remaining} left{postfix}"
            self._bars = [
                tqdm(total=self.total, initial=self.done, bar_format=text, desc=self.folder.name)
            ]
            self._bars += [
                tqdm(total=1, position=slot + 1, bar_format="  {desc}", leave=False)
                for slot in range(self._jobs)
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for bar in reversed(self._bars):
            bar.close()

    def started(self, planned: Planned) -> None:
        if self.is_live:
            free = [bar for bar in self._bars[1:] if bar not in self._shown.values()]
            if free:
                self._shown[planned.number] = free[0]
        else:
            log.info("job %d started: %s", planned.number, planned.entry.label)

    def ended(self, planned: Planned, how: str) -> None:
        entry = planned.entry
        self.done += how in ledger.ENDED
        self.failed += how == "failed"
        text = f"job {entry.number} {how}: {entry.label}"
        if how == "completed":
            text += f"  {result_of(self.folder / entry.folder)}"
        elif how == "failed":
            text += f"  {ledger.state_of(self.folder, entry)[1]}"
            text += f" ({os.path.relpath(ledger.log_of(self.folder, entry.number))})"
        text += f"  [{self.done} of {self.total}]"
        log.log(logging.WARNING if how == "failed" else logging.INFO, "%s", text)
        if bar := self._shown.pop(entry.number, None):
            bar.set_description_str("")
        if self._bars:
            self._bars[0].update(how in ledger.ENDED)
            self._bars[0].set_postfix_str(f"{self.failed} failed" if self.failed else "")

    def tick(self, running: list[Planned]) -> None:
        """Update the bars of the running jobs, at most once every EVERY seconds."""
        if time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        for planned in running:
            if bar := self._shown.get(planned.number):
                width = max(20, bar.ncols or 100)
                bar.set_description_str(
                    f"{planned.number}: {progress_of(self.folder, planned)}"[:width]
                )


def progress_of(folder: Path, planned: Planned) -> str:
    """Return a job's progress as text, from the last line of its metrics."""
    line = last_line(folder / planned.entry.folder / records.METRICS)
    trainer = planned.job.config["trainer"]
    if not line:
        return f"{planned.entry.label}  starting"
    steps, epochs = trainer["max_steps"], trainer["max_epochs"]
    where = f"step {line['step']}/{steps}" if steps else f"epoch {line.get('epoch')}/{epochs}"
    values = [f"{k} {v:.4g}" for k, v in line.items() if k in ("train/loss", trainer["monitor"])]
    return "  ".join([planned.entry.label, where, *values])


def last_line(path: Path) -> dict[str, Any]:
    """Return the last complete line of a metrics.jsonl, reading only the end of the file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for text in reversed(lines):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            return line
    return {}


def result_of(run: Path) -> str:
    """Return a completed run's best monitored value as text, or "" without one."""
    try:
        best = records.read_json(run / records.SUMMARY)["best"]
        return f"{best['metric']} {best['value']:.4f}"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
