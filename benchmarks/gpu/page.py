"""The stored results of `make bench-gpu`, and docs/gpu.md, which is written from them."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import loops
from benchmarks.measure import Table
from regrow.numerics.flops import peak_of_card
from regrow.record.records import read_json, write_text

KEPT = "## Checks"  # from here on, the page is written by hand
HEAD = """# On GPUs

`make bench-gpu` writes this page down to *Checks*, from results that it stores part by part.
A ratio is the median over rounds in which each loop ran in turn, with the least and the most.
"""


def machine(device: torch.device, commit: str) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    return {
        "date": f"{date.today():%Y-%m-%d}",
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or said("git", "rev-parse", "--short", "HEAD"),
    }


def said(*command: str) -> str:
    """Return the first line that a command says, or nothing if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def load(folder: Path, part: str) -> dict[str, Any]:
    path = folder / f"{part}.json"
    return read_json(path) if path.exists() else {}


def store(folder: Path, part: str, name: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**load(folder, part), name: result}, indent=1)
    write_text(folder / f"{part}.json", content + "\n")  # whole, also where a lease ends


def write(path: Path, folder: Path, parts: Sequence[str]) -> None:
    results = {part: load(folder, part) for part in parts}
    missing = [part for part in parts if not results[part]]
    lines = [HEAD]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.\n")
    for rows in results.values():
        lines += [f"{text(name, row)}\n{where(row)}\n" for name, row in rows.items()]
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, kept = before.partition(KEPT)
    write_text(path, "\n".join(lines) + ("\n" + mark + kept if mark else ""))


def where(row: dict[str, str]) -> str:
    """Return the date, the card and the versions of a result."""
    driver = f", driver {row['driver']}" if row["driver"] else ""
    commit = f", at {row['commit']}" if row["commit"] else ""
    return (
        f"({row['date']}, {row['device']}{driver}, torch {row['torch']}, "
        f"Python {row['python']}{commit})"
    )


def text(name: str, row: dict[str, Any]) -> str:
    if "table" not in row:
        ran = row["tests"] - row["skipped"]
        said = f"{ran} tests ran, {row['skipped']} were skipped, {len(row['failed'])} failed."
        lines = [f"## {name}", "", said]
        return "\n".join(lines + [f"- {each}" for each in row["failed"]]) + "\n"
    table = Table(**row["table"])
    return table.text() + "".join(f"\n{line}\n" for line in remarks(table, row))


def remarks(table: Table, row: dict[str, Any]) -> list[str]:
    """Return what follows from a table of loops: use of the card, waiting and memory."""
    found = []
    medians = {name: statistics.median(each) / table.per for name, each in table.seconds.items()}
    peak = peak_of_card(row.get("device", ""))
    if row.get("flops") and peak and "bf16" in table.title:
        shares = (f"{n} {row['flops'] / s / peak:.1%}" for n, s in medians.items())
        found.append(
            f"A step is {row['flops'] / 1e12:.2f} Tflop. MFU, of {peak / 1e12:.0f} Tflop/s: "
            f"{', '.join(shares)}."
        )
    if loops.FIXED in medians:
        waits = 1 - medians[loops.FIXED] / medians[loops.OURS]
        found.append(f"Share of a step that data cost: {waits:.1%}.")
    if "with a save" in medians:
        more = {n: 1e3 * (s - medians[table.reference]) for n, s in medians.items()}
        found.append(
            f"A save delays the loop by {more['with a save']:.1f} ms, torch.save by "
            f"{more['with torch.save']:.0f} ms."
        )
    if any(row.get("memory", {}).values()):
        held = (f"{name} {mib:,.0f}" for name, mib in row["memory"].items())
        found.append(f"MiB of the card's memory held at most: {', '.join(held)}.")
    return found
