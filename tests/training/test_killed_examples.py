"""A run of each kind of task, killed anywhere, ends like the uninterrupted run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from running import train
from test_kill import POINTS, differing, instants, killed, not_reached

from lab import examples

EXAMPLES = Path(examples.__file__).parent
CPU = ("trainer.device=cpu", "trainer.num_threads=1", "trainer.log_every_steps=1")
SAVES = ("trainer.checkpoint.save_every_steps=3",)
RUNS = {
    "gan": (
        *("experiment=gan_ring", "data.source.num_train=50", "data.source.num_val=20"),
        *("data.source.num_test=20", "data.batch_size=16", "model.generator.hidden=[8]"),
        *("model.discriminator.hidden=[8]", "trainer.max_epochs=2", *CPU),
    ),
    "contrastive": (
        *("experiment=contrastive_digits", "data.batch_size=300", "model.channels=[4]"),
        *("model.num_outputs=8", "trainer.max_epochs=2", "trainer.eval_every_epochs=1", *CPU),
    ),
    "thaw": (
        *("experiment=thaw_digits", "data.batch_size=300", "model.channels=[4]"),
        *("trainer.max_epochs=2", "step.until_step=4", *CPU),
    ),
    "segmentation": (
        *("experiment=digit_scenes", "data.source.num_train=40", "data.source.num_val=10"),
        *("data.source.num_test=10", "data.batch_size=8", "model.channels=[4,8]"),
        *("trainer.max_epochs=2", *CPU),
    ),
    "language": (
        *("experiment=persuasion", "model.layers=1", "model.heads=2", "model.width=16"),
        *("trainer.max_epochs=null", "trainer.max_steps=12", "trainer.eval_every_steps=5", *CPU),
    ),
    "targets": ("data=diabetes", "task=regression", "trainer.max_epochs=2", *CPU),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [it if it == "gan" else pytest.param(it, marks=pytest.mark.nightly) for it in RUNS]
)
def test_a_killed_run_of_any_task_ends_the_same(kind: str, tmp_path: Path) -> None:
    path = (f"hydra.searchpath=[file://{EXAMPLES / kind / 'conf'}]",)
    run = (*(path if (EXAMPLES / kind).is_dir() else ()), *RUNS[kind], *SAVES)
    train(tmp_path / "whole", *run)
    drawn = random.Random(kind)
    named = [[[point, "before", 0.5]] for point in drawn.sample(POINTS, 5) if point != "rewind"]
    broken = {"mistake": "without_rewind", "kills": [["report", "after", 0.7]]}
    jobs = [{"kills": kills} for kills in [*instants(4, 2, seed=3), *named]]
    answers = killed(tmp_path, [*jobs, broken], seconds=600, run=run)
    assert not_reached(answers) == []
    assert sum(step is not None for answer in answers for step in answer["killed"]) >= 6
    assert differing(answers[:-1], tmp_path / "whole") == []
    assert differing(answers[-1:], tmp_path / "whole")  # the control
