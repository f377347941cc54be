"""A part of the model is frozen until a given step, and the run resumes exactly."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from growing import assert_grows_back, distance
from running import before_each_step, train
from test_gan import finished

from lab.examples.thaw import step
from regrow.errors import UserError
from regrow.project import CONF

EXAMPLE = Path(step.__file__).parent / "conf"
RUN = (
    *(f"hydra.searchpath=[file://{EXAMPLE}]", "experiment=thaw_digits", "data.batch_size=400"),
    *("model.channels=[4]", "trainer.max_epochs=2", "step.until_step=4", "trainer.device=cpu"),
    *("trainer.num_threads=1", "trainer.log_every_steps=1"),
)


def test_frozen_weights_move_from_the_given_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def look(state: Any, plan: Any) -> None:
        seen.append({name: p.detach().clone() for name, p in state.model.named_parameters()})

    before_each_step(monkeypatch, look)
    train(tmp_path, *RUN)
    moved = [
        {name for name in later if not torch.equal(earlier[name], later[name])}
        for earlier, later in itertools.pairwise(seen)
    ]
    assert len(moved) == 7
    assert all(names == {"head.weight", "head.bias"} for names in moved[:4])
    assert all(any(name.startswith("body.") for name in names) for names in moved[4:])


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"step.frozen=\['bdy.\*'\]: .* parts are body, dropout, head"
    ):
        train(tmp_path, *RUN, "step.frozen=[bdy.*]")


@pytest.mark.slow
def test_stops_at_each_step_in_turn_change_no_bit(tmp_path: Path) -> None:
    assert_grows_back(tmp_path, RUN, 7, "step.until_step=5")


@pytest.mark.slow
@pytest.mark.nightly
def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    def start(folder: str, *arguments: str) -> None:
        script = CONF.parent / "scripts" / "train.py"
        call = [sys.executable, str(script), "--config-dir", str(EXAMPLE), *RUN[1:], *arguments]
        call += ["model.norm=none", f"hydra.run.dir={folder}"]  # statistics are a batch's own
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        finished(forked.popen(call, cwd=tmp_path, **pipes, text=True))

    start("one")
    start("two", "trainer=ddp", "trainer.devices=2")
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    start("never", "step.until_step=100")  # the control
    assert distance(tmp_path / "one", tmp_path / "never") > 1e-4
