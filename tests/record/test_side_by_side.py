"""The page of several runs: the best setting, and what each parameter does."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_comparison import grid, row
from test_pages import Page

from regrow.record import comparison, importances, pages, plots, side_by_side
from regrow.runs.trial import STORAGE, STUDY, open_storage
from regrow.sweep import results


def page_of(rows: Any, folder: Path) -> Page:
    return Page(side_by_side.write_page(comparison.compare(rows), folder / "page.html"))


def test_the_page_begins_with_the_best_setting_by_its_mean(tmp_path: Path) -> None:
    """Not with the setting of the best run."""
    page = page_of(grid({"1": [0.95, 0.60, 0.61], "2": [0.80, 0.81, 0.82]}), tmp_path)
    text = page.text[page.text.index("Best setting") :]
    assert text.startswith("Best setting lr=2 mean val/accuracy 0.8100 ± 0.0100 95% interval")
    assert "Mean of 3 runs; 1 of the 1 other settings is within the noise of it." in text
    assert "seed=0 (0.8000) , seed=1 (0.8100) , seed=2 (0.8200)" in text


def test_one_run_each_is_not_called_a_finding(tmp_path: Path) -> None:
    text = page_of(grid({"1": [0.5], "2": [0.9]}), tmp_path).text
    assert "One run: too few seeds to tell it from the other settings." in text
    assert "it is the only setting" in page_of(grid({"1": [0.5]}), tmp_path).text


def test_a_page_without_a_result_has_no_best_setting(tmp_path: Path) -> None:
    text = page_of(grid({"1": [None]}), tmp_path).text
    assert "Best setting" not in text and "it broke" in text


def swept(values: dict[tuple[str, str, str], float]) -> comparison.Comparison:
    keys = ("optimizer.lr", "model.dropout", "seed")
    jobs = enumerate(values.items())
    return comparison.compare([row(i, dict(zip(keys, k, strict=True)), v) for i, (k, v) in jobs])


def test_the_effects_of_a_grid_are_shares_of_the_variance() -> None:
    """The first parameter adds 0.2 or nothing, the second 0.1; by definition, 4 to 1."""
    noise = {"0": 0.0, "1": 0.01}
    values = {
        (lr, drop, seed): 0.5 + (lr == "1") * 0.2 + (drop == "0") * 0.1 + noise[seed]
        for lr, drop, seed in itertools.product("12", "05", "01")
    }
    short = {"optimizer.lr": "lr", "model.dropout": "dropout", "seed": "seed"}
    found = importances.effects(swept(values), short)
    total = 0.2**2 + 0.1**2 + 0.01**2  # the variance, but for a common factor
    assert found.shares["lr"] == pytest.approx(0.2**2 / total)
    assert found.shares["dropout"] == pytest.approx(0.1**2 / total)
    assert found.shares["interactions and seeds"] == pytest.approx(0.01**2 / total)
    values.pop(("1", "0", "1"))
    found = importances.effects(swept(values), short)
    assert found.shares == {} and "not each combination" in found.note


def test_a_number_that_is_spelled_in_two_ways_is_one_level() -> None:
    def found(*lrs: str) -> list[importances.Importance]:
        values = {
            (lr, drop, seed): 0.5 + (number > 0) * 0.2 + (drop == "0") * 0.1 + int(seed) / 100
            for drop, seed in itertools.product("05", "012")
            for number, lr in enumerate(lrs if drop == "0" else ("1e-3", "1e-2"))
        }
        return [how(swept(values), {}) for how in (importances.effects, importances.of_table)]

    assert found("0.001", "0.01") == found("1e-3", "1e-2")
    assert all(it.shares["optimizer.lr"] > 0.5 for it in found("0.001", "0.01"))


def test_optunas_importances_of_a_grid_are_those_of_a_known_function() -> None:
    """Without interactions and noise, they are the main effects: of 0.2 and 0.1, 4 to 1."""
    short = {"optimizer.lr": "lr", "model.dropout": "dropout", "seed": "seed"}
    values = {
        (lr, drop, seed): 0.5 + (lr == "1") * 0.2 + (drop == "0") * 0.1
        for lr, drop, seed in itertools.product("12", "05", "0123")
    }
    found = importances.of_table(swept(values), short)
    assert found.shares == pytest.approx({"lr": 0.8, "dropout": 0.2}, abs=0.05)
    assert "Optuna's functional ANOVA over 16 runs" in found.note
    assert found == importances.of_table(swept(values), short)
    other = {(drop, lr, seed): value for (lr, drop, seed), value in values.items()}  # the control
    turned = importances.of_table(swept(other), short)
    assert turned.shares == pytest.approx({"lr": 0.2, "dropout": 0.8}, abs=0.05)
    same = importances.of_table(swept(dict.fromkeys(values, 0.5)), short)
    assert same.shares == {} and same.note == "Not computed: val/accuracy does not vary."


def test_main_effects_stand_in_for_optunas_importances_with_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise ImportError("no module named optuna")

    values = {(lr, drop, "0"): float(lr) + float(drop) for lr in "123" for drop in "0579"}
    found = importances.of_table(swept(values), {})
    monkeypatch.setattr(importances, "of_study", fail)
    instead = importances.of_table(swept(values), {})
    effects = importances.effects(swept(values), {})
    assert instead.shares == effects.shares != found.shares
    assert instead.note == f"{effects.note} Optuna's failed: no module named optuna"
    few = swept({key: value for key, value in values.items() if key[0] != "3"})
    shown = importances.of_table(few, {})
    assert shown.shares == importances.effects(few, {}).shares
    assert shown.note.endswith("(main effects of the grid). Optuna's importances need 10 runs.")


def test_optuna_tells_how_much_a_searched_parameter_matters(tmp_path: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=open_storage(tmp_path), study_name=STUDY)
    metric: Any = SimpleNamespace(metric="val/loss")
    assert "Not computed" in results.importance_of(tmp_path, metric).note
    for number in range(30):
        trial = study.ask()
        x = trial.suggest_float("optimizer.lr", 0, 1)
        trial.suggest_float("+model.dropout", 0, 1)
        study.tell(trial, x**2 + 1e-3 * (number % 2))
    assert (tmp_path / STORAGE).is_file()
    found = results.importance_of(tmp_path, metric)
    assert found.shares["lr"] > 0.8 > 0.2 > found.shares["dropout"]
    assert "30 complete trials" in found.note
    assert found == results.importance_of(tmp_path, metric)


def test_keys_are_shortened_as_far_as_they_stay_different() -> None:
    keys = ["optimizer.lr", "+model.hidden", "a.b.lr", "seed", "loss._target_"]
    assert pages.short_names(keys) == {
        "optimizer.lr": "optimizer.lr", "+model.hidden": "hidden", "a.b.lr": "b.lr",
        "seed": "seed", "loss._target_": "loss",
    }  # fmt: skip


def test_long_numbers_are_rounded_only_if_the_labels_stay_different(tmp_path: Path) -> None:
    near, far = ["0.10000000001", "0.10000000002"], ["0.12345678901", "0.9"]
    page = page_of(grid({lr: [0.5] for lr in far}), tmp_path)
    assert {"lr=0.1235", "lr=0.9", "lr=0.1235 seed=0"} <= {*page.words}
    page = page_of(grid({lr: [0.5] for lr in near}), tmp_path)
    assert {*(f"lr={lr}" for lr in near), *(f"lr={lr} seed=0" for lr in near)} <= {*page.words}


@pytest.mark.parametrize(
    ("values", "is_log", "names"),
    [
        (["1e-4", "1e-2"], True, ()),
        (["1e-3", "1e-2"], True, ()),
        (["0.012", "0.29", "0.05", "0.11", "0.021"], True, ()),  # drawn between 0.01 and 0.3
        (["1", "2", "3", "5", "8", "9", "10"], False, ()),
        (["0.02", "0.18", "0.3", "0.41", "0.11"], False, ()),  # drawn between 0 and 0.5
        (["1", "2"], False, ()),
        (["0", "100"], False, ()),
        (["[32]", "[64]", "[32]"], False, ("[32]", "[64]")),
        (["1", None], False, ("1", "–")),
        (["nan", "1"], False, ("nan", "1")),
    ],
)
def test_an_axis_fits_its_values(
    values: list[str | None], is_log: bool, names: tuple[str, ...]
) -> None:
    axis = side_by_side.axis_of(values)
    assert axis.is_log == is_log and tuple(axis.names) == names
    assert all(0 <= axis.share(place) <= 1 for place in axis.places)


@pytest.mark.parametrize(
    ("key", "values", "is_log"),
    [
        ("optimizer.lr", ["0.001", "0.003"], True),
        ("scheduler.max_lr", ["0.001", "0.002", "0.004"], True),
        ("optimizer.weight_decay", ["0", "0.05", "0.1"], False),
        ("optimizer.lr", ["0.001", "0.0015"], False),
        ("model.dropout", ["0.1", "0.3"], False),
    ],
)
def test_the_axis_of_a_rate_is_logarithmic_from_a_factor_of_two(
    key: str, values: list[str | None], is_log: bool
) -> None:
    assert side_by_side.axis_of(values, key).is_log == is_log


def test_each_parameter_has_a_plot_with_a_dot_for_each_run(tmp_path: Path) -> None:
    rows = grid({"1e-4": [0.5, 0.6], "1e-2": [0.7, 0.8]})
    (chart,) = page_of(rows, tmp_path).data
    (panel,) = chart["panels"]
    (dots,) = panel["lines"]
    assert panel["logX"] and dots["scatter"] and chart["xs"][dots["x"]] == [1e-4, 1e-4, 1e-2, 1e-2]
    assert dots["y"] == [0.5, 0.6, 0.7, 0.8] and dots["labels"][3] == "lr=1e-2 seed=1"


def test_lines_run_through_all_parameters_to_the_metric(tmp_path: Path) -> None:
    values = {(lr, drop, "0"): 0.5 + 0.1 * float(lr) for lr in "123" for drop in "05"}
    page = side_by_side.write_page(swept(values), tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    assert Page(page).tags.count("g") >= 6 and text.count("<title>") == 1 + 6
    assert text.count("<g class=leading data-tip=") == 1
    assert "lr=3 dropout=0 seed=0: val/accuracy 0.8000" in text


def test_a_page_of_very_many_runs_draws_the_best_and_lists_all(tmp_path: Path) -> None:
    values = {(str(lr), drop, "0"): 1 / lr for lr in range(1, 151) for drop in "05"}
    path = side_by_side.write_page(swept(values), tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("data-tip=") == side_by_side.MOST_RUNS < len(values)
    assert "of the best 200" in text and 'data-tip="lr=100 dropout=5' in text
    assert 'data-tip="lr=101 ' not in text and "lr=150 dropout=5 seed=0</a>" in text


ODD = ("<b>&amp;\"'</b>", "größe ✓ 模型", "x" * 5000, "</script><img src=x>", "${a}", "\u202e")


def test_odd_names_break_no_page(tmp_path: Path) -> None:
    rows = [
        row(i, {name: other, f"a.{i}": "1"}, 0.1 * i)
        for i, (name, other) in enumerate(itertools.pairwise(ODD))
    ]
    page = page_of(rows, tmp_path)
    assert not {"b", "img"} & {*page.tags} and len(page.code) == 1
    assert ODD[0] in page.text and ODD[1] in page.text and "x" * 39 + "…" in page.text
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    comparison.write_csv(rows, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        csv.field_size_limit(10**6)
        assert len([*csv.DictReader(file)]) == len(rows)


def test_a_hundred_curves_share_the_points_of_a_page() -> None:
    long = [{"step": step, "val/loss": math.sin(step / 50)} for step in range(3000)]
    runs = [(f"{number}", f"{number // 2}", long) for number in range(100)]
    (panel,) = plots.overlay(runs, ["loss"])
    drawn = panel.as_json(plots.PAGE_POINTS // 100)
    assert sum(len(line["y"]) for line in drawn["lines"]) <= plots.PAGE_POINTS
    assert drawn["lines"][-1]["group"] == "0" and drawn["lines"][-1]["colour"] == "var(--c0)"
    assert drawn["lines"][0]["faint"] and drawn["lines"][0]["colour"] == "var(--muted)"
