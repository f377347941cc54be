from __future__ import annotations

import math

from regrow.record.by_class import MOST_CELLS, first_rows, of_page, table


def values(count: int) -> dict[str, float]:
    """Return the metrics of a set of `count` classes; class 7 is the worst, class 3 is absent."""
    recall = {f"c{n}": n / count for n in range(count)} | {"c7": 0.0, "c0": 0.5, "c3": math.nan}
    found = {"test/loss": 1.0, "test/accuracy": 0.5, "test/recall": 0.5, "test/f1": 0.6}
    for metric, shift in (("accuracy", 0.0), ("recall", 0.0), ("f1", 0.1)):
        found |= {f"test/{metric}/{name}": value + shift for name, value in recall.items()}
    return found


def test_a_few_classes_stand_in_their_order_without_a_metric_that_repeats_another() -> None:
    lines = table({**values(4), "test/top/5": 0.9, "val/f1/c0": 0.0}, "test", "summary.json")
    assert lines == [
        "test, by class",
        "        recall        f1",
        "  c0       0.5       0.6",
        "  c1      0.25      0.35",
        "  c2       0.5       0.6",
        "  c3       nan       nan",
        "  c7         0       0.1",
    ]
    others = {**values(4), "test/accuracy/c1": 0.3}  # now it repeats nothing
    assert table(others, "test", "summary.json")[1].split() == ["accuracy", "recall", "f1"]


def test_equal_metrics_stay_as_in_a_perfect_run() -> None:
    perfect = {f"test/{metric}{name}": 1.0 for metric in ("accuracy", "precision", "recall", "f1")
               for name in ("", "/a", "/b")}  # fmt: skip
    assert table(perfect, "test", "")[1].split() == ["precision", "recall", "f1"]


def test_a_table_of_many_classes_shows_the_ten_worst_and_names_the_file_of_all() -> None:
    lines = table(values(102), "test", "outputs/summary.json")
    assert lines[0] == "test, the worst 10 of 102 classes by f1 (all: outputs/summary.json)"
    assert [line.split()[0] for line in lines[2:]] == [
        *("c7", "c1", "c2", "c4", "c5", "c6", "c8", "c9", "c10", "c11")
    ]


def errors(count: int) -> dict[str, float]:
    """Return the metrics of the targets of a regression; the later ones are the worse ones."""
    found = {"test/mae": 1.0, "test/rmse": 2.0, "test/r2": 0.5}
    for number in range(count):
        found |= {f"test/mae/day{number}": number / 10, f"test/rmse/day{number}": number / 5}
        found[f"test/r2/day{number}"] = 1 - number / count
    return found


def test_the_worst_targets_of_a_regression_are_those_of_the_lowest_r2() -> None:
    assert table(errors(3), "test", "")[0] == "test, by target"
    lines = table(errors(14), "test", "summary.json")
    assert lines[0] == "test, the worst 10 of 14 targets by r2 (all: summary.json)"
    assert [line.split()[0] for line in lines[2:]] == [f"day{n}" for n in range(13, 3, -1)]


def test_the_worst_of_an_error_are_those_of_the_highest() -> None:
    own = {key: value for key, value in errors(60).items() if "r2" not in key}
    lines = table(own, "test", "summary.json")
    assert lines[0] == "test, the worst 10 of 60 classes by mae (all: summary.json)"
    assert [line.split()[0] for line in lines[2:]] == [f"day{n}" for n in range(59, 49, -1)]
    given = [[key.removeprefix("test/"), value] for key, value in own.items() if key.count("/") > 1]
    shown, said = of_page(given, ["test"], {"mae", "rmse"})
    assert said == "Shown: the 50 worst of 60 classes by test/mae."
    assert [row[0] for row in shown[:50]] == [f"mae/day{n}" for n in range(59, 9, -1)]


def test_a_set_without_metrics_of_classes_has_no_table() -> None:
    whole = {key: value for key, value in values(4).items() if key.count("/") == 1}
    assert table(whole, "test", "summary.json") == table(values(4), "val", "summary.json") == []


def test_many_classes_of_which_none_is_measured_have_no_table() -> None:
    unknown = dict.fromkeys(values(21), math.nan)
    assert table(unknown, "test", "summary.json") == []


def test_a_long_name_is_shortened_and_one_with_a_slash_is_whole() -> None:
    lines = table({"val/f1": 0.5, f"val/f1/{'x' * 99}": 0.1, "val/f1/a/b": 0.9}, "val", "")
    assert [line.split()[0] for line in lines[2:]] == ["x" * 23 + "…", "a/b"]


def rows(count: int) -> list[list[float | str | None]]:
    """Return the rows of two sets' classes; on the last set, the first of them are the best."""
    found: list[list[float | str | None]] = [["aux/note", 1.0, None]]
    for metric in ("recall", "f1"):
        found += [[f"{metric}/c{n}", n / count, 1 - n / count] for n in range(count)]
    return found


def test_a_page_has_all_of_fifty_classes_and_the_worst_fifty_of_more() -> None:
    few = rows(50)
    assert of_page(few, ["val", "test"], {"recall", "f1"}) == (few, "")
    many = rows(1000)
    many[-1][-1], many[-2][-1] = math.nan, None  # classes that the last set lacks
    shown, said = of_page(many, ["val", "test"], {"recall", "f1"})
    assert said == "Shown: the 50 worst of 1,000 classes by test/f1."
    names = [f"c{n}" for n in range(997, 947, -1)]
    assert [row[0] for row in shown] == [
        "aux/note", *(f"{metric}/{name}" for metric in ("recall", "f1") for name in names)
    ]  # fmt: skip
    unmeasured = [[name, value, None] for name, value, _ in many]
    assert of_page(unmeasured, ["val", "test"], {"recall", "f1"})[1].endswith("by val/f1.")


def test_many_sets_and_many_metrics_leave_fewer_rows() -> None:
    wide = [[f"f1/c{n}", *([n / 60] * 399)] for n in range(60)]
    shown, said = of_page(wide, [f"s{n}" for n in range(399)], {"f1"})
    assert len(shown) == 10 and said == "Shown: the 10 worst of 60 classes by s398/f1."
    long = [[f"metric {n}", 0.5] for n in range(MOST_CELLS)]
    assert first_rows(long, 2) == (long[:2000], "Shown: the first 2,000 of 4,000 rows.")
    assert first_rows(long[:2000], 2) == (long[:2000], "")
    metrics = [f"m{n}" for n in range(401)]
    many = [[f"{metric}/c{n}", *([n / 3] * 9)] for metric in metrics for n in range(3)]
    shown, said = of_page(many, [f"s{n}" for n in range(9)], metrics)
    assert [row[0] for row in shown[:2]] == ["m0/c0", "m1/c0"] and len(shown) == 401
    assert said == "Shown: the 1 worst of 3 classes by s8/m0."
