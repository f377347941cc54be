"""A harness that reads training examples in processes that are killed, and notes their ids.

`run` forks a process per rank and part. A part has a number of workers and ranks, and the windows
and seconds after which it is killed, or null. Each rank appends `[window, ids]` as a line to a file
of its own; the next part begins at the first window that some rank lacks.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import forked
import torch

from regrow.config.targets import allow, instantiate
from regrow.feeding.loaders import Data


class Numbers:
    """Numbers as items of one field: `{"row": n}`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"row": torch.tensor([index])}

    def fingerprint(self) -> str:
        return f"numbers {self.count}"


class NumbersInOrder(torch.utils.data.IterableDataset[Any]):
    """Numbers as a stream, with noise from torch's generator, and with the epoch."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        for index in range(self.count):
            drawn = int(torch.randint(1000, ()))
            yield {"row": torch.tensor([index * 1000 + drawn + self.epoch * 10**9])}


def collate(rows: list[dict[str, torch.Tensor]]) -> Any:
    ids = torch.stack([row["row"] for row in rows])
    return ids, torch.zeros(len(rows))


def read(config: dict[str, Any], rank: int, part: dict[str, Any], start: int, log: Path) -> None:
    """Append the ids of each window from `start`, counted over all epochs."""
    torch.set_num_threads(1)
    data: Data = instantiate({**config, "num_workers": part["workers"]})
    train = data.train(device=torch.device("cpu"), rank=rank, world_size=part["ranks"])
    per_epoch = train.steps_per_epoch
    with log.open("a") as file:
        for number in range(start // per_epoch, part["epochs"]):
            first = start - number * per_epoch if number == start // per_epoch else 0
            for window, batch in enumerate(train.epoch(number, start=first), first):
                ids = batch.inputs.flatten().tolist()[: batch.num_local]
                file.write(f"{json.dumps([number * per_epoch + window, ids])}\n")
                file.flush()
                time.sleep(0.01 if part["windows"] else 0)  # to be killed before the end
    data.close()


def main(request: dict[str, Any]) -> list[list[int]]:
    allow(request["config"])
    folder, windows, start = Path(request["folder"]), dict[int, list[int]](), 0
    for at, part in enumerate(request["parts"]):
        logs = [folder / f"{at}-{rank}" for rank in range(part["ranks"])]
        pids = [started(request["config"], rank, part, start, log) for rank, log in enumerate(logs)]
        codes: list[int] = []
        while pids:
            if part["windows"] is not None and len(lines_of(logs[-1])) >= part["windows"]:
                time.sleep(part["seconds"])
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            for pid in [*pids]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    pids.remove(pid)
                    codes.append(os.waitstatus_to_exitcode(status))
            time.sleep(0.002)
        assert all(code in (0, -signal.SIGKILL) for code in codes), codes
        print(part, "from window", start, codes)
        found = [lines_of(log) for log in logs]
        whole = [window for window in found[0] if all(window in rank for rank in found)]
        for window in whole:
            ids = [each for rank in found for each in rank[window]]
            assert windows.setdefault(window, ids) == ids, f"window {window} differs"
        start = max(whole, default=start - 1) + 1
    return [windows[window] for window in range(len(windows))]


def started(config: Any, rank: int, part: Any, start: int, log: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            read(config, rank, part, start, log)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def lines_of(log: Path) -> dict[int, list[int]]:
    """Return the ids by window; a line that a kill cut short is left out."""
    found: dict[int, list[int]] = {}
    if not log.exists():
        return found
    for line in log.read_text().split("\n")[:-1]:
        window, ids = json.loads(line)
        found[window] = ids
    return found


def run(request: str) -> None:
    """Read as the file `request` asks, and write the ids of each window to ids.json beside it."""
    asked = json.loads(Path(request).read_text())
    (Path(asked["folder"]) / "ids.json").write_text(json.dumps(main(asked)))


def read_in_parts(
    config: dict[str, Any], parts: list[dict[str, Any]], folder: Path
) -> list[list[int]]:
    """Return the ids that processes read which are killed in between: see `run`."""
    folder.mkdir()
    asked = folder / "request.json"
    asked.write_text(json.dumps({"config": config, "folder": str(folder), "parts": parts}))
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": forked.python_path(here.parents[1] / "src", here, here.parent),
    }
    done = forked.run(
        [sys.executable, "-c", f"import reading; reading.run({str(asked)!r})"], env=environment,
        cwd=folder, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Each part ends by a kill, of one rank at least: another may reach its end before.
    killed = sum("-9" in line for line in done.stdout.splitlines())
    assert killed >= sum(1 for part in parts if part["windows"]), done.stdout
    found: list[list[int]] = json.loads((folder / "ids.json").read_text())
    return found


def part(
    workers: int, ranks: int, windows: int | None, seconds: float = 0.0, epochs: int = 2
) -> dict[str, Any]:
    found = {"workers": workers, "ranks": ranks, "epochs": epochs}
    return {**found, "windows": windows, "seconds": seconds}
