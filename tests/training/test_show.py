"""The output of a run while it trains, on a terminal and elsewhere."""

from __future__ import annotations

import functools
import os
import re
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from running import TINY, metrics_of, train

from lab import evaluate, optim, progress, step
from regrow.distributed import parallel
from regrow.numerics.totals import Totals


class Terminal:
    """A real terminal, whose output is collected; standard error is connected to it."""

    def __init__(self) -> None:
        self.end, other = os.openpty()
        termios.tcsetwinsize(other, (40, 200))
        self.file = os.fdopen(other, "w")
        self.pieces: list[bytes] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self.end, 65536):
                self.pieces.append(piece)
        except OSError:  # on Linux: the other end was closed
            pass

    def text(self) -> str:
        self.file.close()
        self.reader.join()
        os.close(self.end)
        return b"".join(self.pieces).decode()


@pytest.fixture
def drawn_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the bars of a run of milliseconds, which would otherwise not appear."""
    monkeypatch.setattr(progress, "tqdm", functools.partial(progress.tqdm, mininterval=0))


RUN = (*TINY, "data.eval_batch_size=8")


def test_both_bars_show_running_means_rate_and_time_left_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_each_time: None
) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal.file)
        train(tmp_path / "shown", *RUN)
    text = terminal.text()
    means = r"\[\d\d:\d\d<\d\d:\d\d, .*%s.*, loss=[\d.]+, accuracy=[\d.]+, examples/s=[\d,]+\]"
    assert re.search(r"epoch 2: .*" + means % "step", text)
    assert re.search(r"val: .*" + means % "batch", text)
    assert re.search(r"test: .*" + means % "batch", text)
    lines = [line for line in metrics_of(tmp_path / "shown") if "val/accuracy" in line]
    assert f"accuracy={lines[0]['val/accuracy']:.3g}" in text


@pytest.mark.parametrize("batch_size", [16, 50])
def test_seconds_of_training_are_all_but_those_of_evaluations(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if an epoch is one step; work after the sums were sent is included."""
    now = [0.0]

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            now[0] += seconds
            return function(*args, **named)

        return timed

    monkeypatch.setattr(parallel, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(step, "forward", taking(1, step.forward))
    monkeypatch.setattr(optim, "update", taking(10, optim.update))
    monkeypatch.setattr(evaluate, "measure", taking(1000, evaluate.measure))
    summary = train(tmp_path, *TINY, f"data.batch_size={batch_size}")
    # Only the time between the last sums and the end is missing.
    assert summary["seconds"] == 11 * summary["steps"] - 10


def test_without_a_terminal_nothing_is_drawn_and_no_mean_is_read_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_each_time: None
) -> None:
    reads = []
    means = Totals.means
    monkeypatch.setattr(Totals, "means", lambda *given: reads.append(given) or means(*given))
    terminal = Terminal()
    for name, file in (("quiet", (tmp_path / "stderr").open("w")), ("shown", terminal.file)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            train(tmp_path / name, *RUN)
        file.close()
        logged = sum(
            "train/loss" in x or "train/epoch_loss" in x for x in metrics_of(tmp_path / name)
        )
        assert (len(reads) == logged) == (name == "quiet")
        reads.clear()
    assert terminal.text() and not (tmp_path / "stderr").read_text()
    assert metrics_of(tmp_path / "quiet") == metrics_of(tmp_path / "shown")
