"""Runs of a language model: killed, resumed, in several processes, in a sweep, and used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import in_ranks
import pytest
import torch
from finished import finished, process
from running import CPU, config_of, fingerprint, metrics_of, train
from test_kill import differing, killed, points
from test_ranks import distance

from regrow.load import load_run
from regrow.record.records import read_json
from regrow.runs import training

# Steps of 12 windows do not divide an epoch, and the text ends in the middle of a window.
TEXT = "".join(f"Line {i % 7} of {i}, {'abc'[i % 3] * (i % 5)}.\n" for i in range(60))
SMALL = (
    *("task=language", "data=text", "model=gpt", "data.num_classes=64", "data.input_shape=[16]"),
    *("data.batch_size=12", "data.eval_batch_size=3", "model.layers=1", "model.heads=2"),
    *("model.width=16", "trainer.max_epochs=3", "trainer.num_threads=1", "trainer.device=cpu"),
    *("trainer.log_every_steps=1", "trainer.checkpoint.save_every_steps=2"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def run(root: Path) -> tuple[str, ...]:
    return (*SMALL, f"data.root='{root}'", "model.dropout=0.2", "trainer.accumulation_steps=2")


@pytest.fixture(scope="module")
def whole(run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    summary = train(folder, *run)
    assert summary["status"] == "completed" and summary["steps"] % 3 == 0
    return folder


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_an_epoch_ends_the_same(
    run: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    for step in (1, 5):
        folder = tmp_path / str(step)
        assert train(folder, *run, stop_at=step)["status"] == "interrupted"
        train(folder, *run)
        assert fingerprint(folder) == fingerprint(whole)
    train(tmp_path / "other", *run, "data.augment=false")
    assert fingerprint(tmp_path / "other") != fingerprint(whole)


@pytest.mark.slow
def test_a_run_killed_at_named_points_ends_the_same(
    run: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    kills = points((0.5,), seed=3)[::6]
    answers = killed(tmp_path, [{"kills": each} for each in kills], seconds=200, run=run)
    assert sum(step is not None for answer in answers for step in answer["killed"]) >= 6
    assert differing(answers, whole) == []


@pytest.mark.slow
def test_several_processes_compute_what_one_computes(
    root: Path, tmp_path: Path, record_property: Any
) -> None:
    uneven = ("data.batch_size=5", "data.augment=false")  # shares of 3 and 2, one of them padded
    options = (*SMALL, f"data.root='{root}'", *uneven, "optimizer=sgd", "optimizer.lr=0.3")
    config = config_of(*options, "trainer.clip_norm=0.5")
    torch.set_num_threads(1)
    one = in_ranks.trained(CPU, config, tmp_path)
    checks = ("trained", "trained_in_slices", "trained_as_if_alone")
    for rank in in_ranks.together(2, config, tmp_path, checks):
        for way in checks[:2]:
            assert distance(one, rank[way]) < 1e-5
            for seen, expected in zip(rank[way]["seen"], one["seen"], strict=True):
                assert seen == pytest.approx(expected, rel=1e-5)
        assert distance(one, rank["trained_as_if_alone"]) > 1e-4
    largest = max(distance(one, rank[way]) for way in checks[:2])
    record_property("largest difference of weights between 1 and 2 processes", f"{largest:.1e}")


@pytest.fixture(scope="module")
def complete(run: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that it leaves in its folder."""
    return finished(tmp_path_factory.mktemp("complete") / "run", *run)


def test_an_evaluation_after_the_run_gives_its_numbers(complete: Path, root: Path) -> None:
    told = read_json(complete / "summary.json")
    assert set(told["test"]) == {f"test/{name}" for name in
        ("loss", "perplexity", "accuracy", "bits_per_byte")}  # fmt: skip
    loss = told["test"]["test/loss"]
    assert told["test"]["test/perplexity"] == pytest.approx(
        torch.tensor(loss).exp().item(), rel=1e-5
    )
    loaded = load_run(complete)
    from regrow.runs.inference import evaluate

    for size in (1, 3, 64):
        values = evaluate(load_run(complete, data={"eval_batch_size": size}), "test")
        assert values == pytest.approx(told["test"], rel=1e-6)
    assert read_json(complete / "preprocessing.json")["vocabulary"]["content"] == "".join(
        sorted({*TEXT})
    )
    assert loaded.preprocessing.kind == "integer"


def test_another_text_is_read_with_the_vocabulary_of_the_run(
    complete: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Line 1 of 2.\n" * 40)  # of fewer characters: its own would number otherwise
    data = load_run(complete, data={"root": str(other)}).data
    assert data.preprocessing.vocabulary == load_run(complete).preprocessing.vocabulary
    assert data.source.vocabulary == data.preprocessing.vocabulary
    alone = training.instantiate(config_of(*SMALL, f"data.root='{other}'")["data"])
    assert alone.source.vocabulary != data.source.vocabulary


@pytest.mark.slow
@pytest.mark.nightly
def test_a_sweep_and_a_reproduction_work(run: tuple[str, ...], tmp_path: Path) -> None:
    done = process("train", "-m", *run, "seed=0,1", "trainer.max_steps=4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "val/loss" in done.stdout
    (sweep,) = (tmp_path / "outputs" / "text" / "sweeps").glob("2*")
    again = process("reproduce", f"run={sweep / '0'}", folder=tmp_path)
    assert again.returncode == 0 and "identical" in again.stdout, again.stdout + again.stderr
    page = process("report", str(sweep / "0"), folder=tmp_path)
    assert page.returncode == 0, page.stderr
    html = (sweep / "0" / "report.html").read_text(encoding="utf-8")
    assert "perplexity" in html and "bits_per_byte" in html


@pytest.mark.slow
@pytest.mark.nightly
def test_the_recipe_with_124_million_parameters_takes_two_steps(tmp_path: Path) -> None:
    few = ("data.source.vocabulary=characters", "data.input_shape=[32]", "data.batch_size=2")
    fewer = ("data.eval_batch_size=64", "data.source.val_fraction=0.01", "trainer.compile=false")
    cheap = ("trainer=cpu", "trainer.precision=fp32", "trainer.accumulation_steps=2")
    summary = train(
        tmp_path, "experiment=gpt2_124m", *few, *fewer, *cheap,
        *("data.source.test_fraction=0", "trainer.max_steps=2", "trainer.log_every_steps=1"),
        *("scheduler.warmup_steps=1", "trainer.checkpoint.save_every_steps=null"),
    )  # fmt: skip
    assert summary["steps"] == 2 and 123e6 < summary["parameters"] < 124.5e6
    losses = [line["train/loss"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert losses[0] == pytest.approx(10.8, abs=0.3)  # ln 50,304: all tokens alike
