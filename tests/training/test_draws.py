"""Models that draw from torch, numpy or `random`: the same after a stop, and in a script."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finished import finished, script
from running import TINY, fingerprint, metrics_of, train

from lab import evaluate, loop
from lab.plan import StepPlan
from regrow import randomness
from regrow.config.yaml_files import read_yaml
from regrow.numerics import capture
from regrow.processes.interrupt import Interrupted
from regrow.project import CONF
from regrow.record.records import read_json

MLP = read_yaml(CONF / "model" / "mlp.yaml")
RUN = (
    *(option for option in TINY if not option.startswith("model.")),
    *("model._target_=blocks.Drawing", "+model.noise=0.3", "data.eval_batch_size=6"),
    *(f"~model.{key}" for key in MLP if key not in ("_target_", "input_shape", "num_outputs")),
    *("task.per_class=false", "task.auroc=false", "trainer.max_epochs=2"),
)
evaluate_script = script("evaluate").main


def in_parts(folder: Path, *stops: int) -> None:
    for stop in stops:
        ambient(stop)  # as in another process
        train(folder, *RUN, stop_at=stop)
    ambient(99)
    train(folder, *RUN)


def ambient(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def test_a_model_that_draws_trains_the_same_after_a_resume(tmp_path: Path) -> None:
    train(tmp_path / "whole", *RUN)
    in_parts(tmp_path / "parts", 1, 3, 4, 6)
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")


def test_a_seed_of_torch_alone_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = lambda value: torch.default_generator.manual_seed(value)  # noqa: E731
    monkeypatch.setattr(capture, "seed_step", seed)
    train(tmp_path / "whole", *RUN)
    in_parts(tmp_path / "parts", 3)
    assert fingerprint(tmp_path / "parts") != fingerprint(tmp_path / "whole")


def test_dropout_draws_from_the_key_of_its_step_as_it_always_did() -> None:
    randomness.seed_step(randomness.key(3, "model", 5, 0, 0))
    drawn = torch.rand(4)
    own = torch.Generator().manual_seed(randomness.key(3, "model", 5, 0, 0))
    assert torch.equal(drawn, torch.rand(4, generator=own))


def test_each_of_several_models_step_micro_batch_and_process_draws_its_own_numbers() -> None:
    def seed(name: str, step: int, micro_batch: int, rank: int) -> int:
        plan: Any = SimpleNamespace(seed=0, name=name, world=SimpleNamespace(rank=rank))
        return StepPlan.seed_of(plan, step, micro_batch)

    places = [*itertools.product(("", "critic", "generator"), range(3), range(3), range(3))]
    assert len({seed(*place) for place in places}) == len(places)
    assert seed("", 2, 1, 0) == randomness.key(0, "model", 2, 1, 0)


def test_an_evaluation_leaves_every_generator_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = loop.evaluate

    def states() -> list[Any]:
        numpys = np.random.get_state()[1].tolist()
        return [torch.get_rng_state().tolist(), numpys, random.getstate()]

    def watched(*args: Any, **more: Any) -> Any:
        before = states()
        found = measure(*args, **more)
        assert states() == before
        return found

    monkeypatch.setattr(loop, "evaluate", watched)
    often = ("trainer.eval_every_epochs=null", "trainer.checkpoint.save_every_epochs=null")
    found = [
        train(tmp_path / name, *RUN, *often, *more)["weights_sha256"]
        for name, more in (("never", ()), ("each", ("trainer.eval_every_steps=1",)))
    ]
    assert found[0] == found[1]
    ambient(7)
    before = [torch.rand(1).item(), np.random.rand(), random.random()]
    ambient(7)
    with randomness.states_kept():
        randomness.seed_step(1)
        _ = torch.rand(3), np.random.randn(), random.gauss(0, 1)
    assert [torch.rand(1).item(), np.random.rand(), random.random()] == before


def test_a_script_measures_what_the_run_did_with_a_model_that_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", *RUN)
    told = read_json(run / "summary.json")
    for split in ("test", "val"):
        for _ in range(2):
            ambient(int(torch.randint(1000, ()).item()))
            evaluate_script(
                [
                    f"run={run}",
                    f"split={split}",
                    f"output={tmp_path / 'out.json'}",
                    "overwrite=true",
                ]
            )
            measured = read_json(tmp_path / "out.json")
            assert measured["draws"] is True
            assert measured["values"] == told[split]
    assert "may differ" not in capsys.readouterr().out
    evaluate_script(
        [
            f"run={run}",
            "data.eval_batch_size=5",
            f"output={tmp_path / 'out.json'}",
            "overwrite=true",
        ]
    )
    said = capsys.readouterr().out
    assert "may differ from the run's own: data.eval_batch_size was 6 and is 5" in said
    assert read_json(tmp_path / "out.json")["values"] != told["test"]


def test_evaluations_that_are_not_seeded_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run", *RUN)
    monkeypatch.setattr(randomness.Draws, "begin", lambda self, number: None)
    ambient(1)
    evaluate_script([f"run={run}", f"output={tmp_path / 'out.json'}", "overwrite=true"])
    assert read_json(tmp_path / "out.json")["values"] != read_json(run / "summary.json")["test"]


def test_an_evaluation_does_not_warn_of_a_model_that_does_not_draw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", *TINY)
    output = f"output={tmp_path / 'out.json'}"
    evaluate_script([f"run={run}", "data.eval_batch_size=5", output])
    assert read_json(tmp_path / "out.json")["draws"] is False
    assert "may differ" not in capsys.readouterr().out


def test_a_stop_within_an_evaluation_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", *RUN)
    measure, stops = evaluate.measure, [True]
    save, in_training = loop.save, []

    def saved(state: Any, plan: Any) -> None:
        in_training.append(state.model.training)
        save(state, plan)

    monkeypatch.setattr(loop, "save", saved)

    def interrupted(model: Any, task: Any, batches: Any, *rest: Any) -> Any:
        if stops.pop():
            stops.append(False)

            def two() -> Any:
                for number, batch in enumerate(batches):
                    if number == 2:
                        raise Interrupted
                    yield batch

            return measure(model, task, two(), *rest)
        stops.append(False)
        return measure(model, task, batches, *rest)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    train(tmp_path / "parts", *RUN)
    assert not (tmp_path / "parts" / "summary.json").exists()
    assert in_training and all(in_training)
    train(tmp_path / "parts", *RUN)
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")
