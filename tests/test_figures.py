"""Figures in texts match the benchmarks that they come from."""

from __future__ import annotations

import pkgutil
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benchmarks"

pytestmark = pytest.mark.skipif(not BENCHES.is_dir(), reason="a copy without benchmarks")


def ratio(title: str, row: str) -> float:
    """Return a row's median ratio in RESULTS.md. The table's title starts with `title`."""
    results = (BENCHES / "RESULTS.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^## {re.escape(title)}.*?(?=^## |\Z)", results, re.M | re.S)
    (found,) = re.findall(
        rf"^\| {re.escape(row)}(?: \(.*\))? \| .* \| (\S+) \| .* \|$", table, re.M
    )
    return float(found)


def trained(row: str) -> tuple[int, float, float]:
    """Return epochs, training seconds and accuracy of a row of the CIFAR-10 table in NOTES.md."""
    notes = (BENCHES / "NOTES.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^\| {row} \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$", notes, re.M)
    return int(found[0]), float(found[1].replace(",", "")), float(found[2])


def prose(name: str) -> str:
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def beside(seed: int) -> str:
    return "with pauses" if seed < 2 else "beside other work"


def test_figures_on_cifar10_are_those_of_the_notes() -> None:
    _, by_hand, _ = trained("by hand, seed 0")
    _, eight, _ = trained("train.py, seed 0, in one go with it")
    epochs, seconds, of_nine = trained("train.py, seed 0, alone")
    _, _, other_of_nine = trained("train.py, seed 100, beside other work")
    seeds = [trained(f"train.py, seed {n}, one thread, {beside(n)}") for n in range(5)]
    accuracies = [accuracy for _, _, accuracy in seeds]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    an_epoch = f"{seconds / epochs:.0f} s"
    readme, header = prose("README.md"), prose("conf/experiment/cifar10_fast.yaml")
    assert f"takes {an_epoch} an epoch on two cores" in readme
    assert f"eight epochs took {eight / by_hand:.2f} of" in readme
    assert f"{100 * mean:.2f} ± {100 * deviation:.2f} % of CIFAR-10's" in readme
    assert (
        f"five seeds reach {mean:.4f} on average, with a standard deviation of {deviation:.4f}"
        in prose("benchmarks/NOTES.md")
    )
    assert f"{an_epoch} of training an epoch on two CPU cores" in header
    assert f"test accuracy {mean:.4f} ± {deviation:.4f} (n=5, seeds 0 to 4)" in header
    assert f"after nine epochs {other_of_nine:.3f} and {of_nine:.3f}" in header
    assert {epochs for epochs, _, _ in seeds} == {10} and "max_epochs: 10" in header


def test_figures_on_a_step_are_those_of_the_results() -> None:
    default, small = "A training step of the default MLP", "A training step of a small MLP"
    least, most = (ratio(default, name) for name in ("Ignite", "Lightning, as its Hydra template"))
    readme = prose("README.md")
    assert f"({ratio(default, 'train.py'):.2f} on a quiet machine)" in readme
    assert f"In other engines, it takes {least:.1f} to {most:.1f} times" in readme
    slowest = ratio(small, "Lightning, as its Hydra template")
    assert f"with a smaller model up to {slowest:.1f}" in readme


def test_figures_on_switches_and_memory_are_those_of_the_results() -> None:
    digits = "Switches of the trainer, for a step of a small CNN on 8×8 digits"
    alone = ratio(digits, "trainer.channels_last=true")
    both = ratio(digits, "trainer.precision=bf16, channels_last")
    said = f"channels_last takes {alone:.2f} of a step's time, and {both:.2f} with bf16 too."
    assert said in prose("conf/experiment/digits_cnn.yaml")
    kept = "bare loop, freed memory kept"
    resnet = ratio("A training step of ResNet-18", kept)
    small = ratio("A training step of a small CNN", kept)
    said = f"steps of a ResNet-18 take {resnet:.2f} and of a small CNN {small:.2f} of the time"
    assert said in prose("docs/decisions.md")


def test_a_seeding_costs_what_the_decisions_say() -> None:
    title = "Seeding a micro-batch"
    assert 0.03 <= ratio(title, "seeding") <= 0.05
    assert "3 to 5 % of a small MLP's step" in prose("docs/decisions.md")


def test_the_benchmark_of_seeding_replaces_functions_that_are_there() -> None:
    from benchmarks import seeding

    for name in (seeding.KEY, seeding.SEED):
        assert callable(pkgutil.resolve_name(name))


def test_the_list_of_recipes_has_the_figures_of_the_page_on_rare_classes() -> None:
    rows = re.findall(
        r"^(\S+) +3 .*\] +(\d\.\d+) ±",
        (ROOT / "docs/recipes/rare_classes.md").read_text(encoding="utf-8"),
        re.M,
    )
    weighted, balanced, plain = (f"{float(accuracy):.3f}" for _, accuracy in rows)
    said = f"test accuracy: plain {plain}, balanced {balanced}, weighted loss {weighted} (n=3)"
    assert said in prose("docs/recipes/README.md")
