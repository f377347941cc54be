"""Named evaluation sets: beside val and test, any number of files, folders or data sets."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from finished import finished, one_line_and_exit_code_2, script
from running import CPU, config_of, metrics_of, train

from lab import loop
from regrow.config.check import check
from regrow.errors import DataError, UserError
from regrow.feeding.splits import Examples, Splits, check_overlap
from regrow.project import ROOT
from regrow.record import comparison, plots, side_by_side
from regrow.record.records import read_json
from regrow.record.report import load
from regrow.runs import training
from regrow.runs.inference import evaluate
from regrow.runs.loaded import load_run
from regrow.sweep import search

TRAINER = ("trainer.max_epochs=3", "trainer.num_threads=1", "trainer.device=cpu")
# Averages, dropout and BatchNorm: whatever an evaluation could change.
ODD = ("trainer.ema_decay=0.9", "model.norm=batch", "model.dropout=0.3", "optimizer.lr=0.02")


def write_rows(path: Path, start: int, stop: int, shift: float = 0.0) -> None:
    """Write rows of three classes in two features; `shift` makes them harder."""
    random = np.random.default_rng(start)
    rows = [
        f"{'abc'[n % 3]},{n % 3 + shift + random.normal() / 3:.6f},{random.normal():.6f}"
        for n in range(start, stop)
    ]
    path.write_text("\n".join(["kind,x,y", *rows]) + "\n")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    write_rows(folder / "train.csv", 0, 90)
    write_rows(folder / "night.csv", 90, 121, shift=0.4)
    write_rows(folder / "ood.csv", 121, 140, shift=1.0)
    return folder


def csv(table: Path, *more: str) -> tuple[str, ...]:
    return (
        *("data=csv", f"data.root={table}", "data.source.train_file=train.csv"),
        *("data.source.target_columns=[kind]", "data.target_kind=multiclass"),
        *("data.num_classes=3", "data.num_outputs=3", "data.input_shape=[2]", "data.batch_size=16"),
        *("model.hidden=[12]", *TRAINER, *more),
    )


SETS = ("data.source.sets={night: night.csv, ood: ood.csv}", "data.final_sets=[ood]")


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "run"
    return finished(folder, *csv(table, *SETS), "trainer.max_steps=null", "optimizer.lr=0.02")


def test_sets_are_measured_with_val_and_the_final_ones_once(run: Path) -> None:
    lines = metrics_of(run)
    steps = {
        name: [line["step"] for line in lines if f"{name}/accuracy" in line]
        for name in ("val", "night", "ood", "test")
    }
    assert steps["val"] == steps["night"] == [4, 8, 12]
    assert steps["ood"] == steps["test"] == [12]
    summary = read_json(run / "summary.json")
    for name in steps:
        assert set(summary[name]) >= {f"{name}/loss", f"{name}/accuracy"}
        assert all(key.startswith(f"{name}/") for key in summary[name])
    best = summary["best"]["step"]
    (line,) = [line for line in lines if line["step"] == best and "night/loss" in line]
    assert summary["night"]["night/loss"] == line["night/loss"]  # as val, of the best weights
    assert {path.name for path in (run / "plots").iterdir()} == {"ood.json", "test.json"}


def test_every_set_is_evaluated_again_by_its_name(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("val", "night", "ood", "test"):
        script("evaluate").main([f"run={run}", f"split={name}"])
        assert "The run itself measured the same." in capsys.readouterr().out
        written = read_json(run / f"evaluation_{name}.json")
        assert written["values"] == read_json(run / "summary.json")[name]
    with one_line_and_exit_code_2(capsys, "split=day does not exist in this data. It has train,"):
        script("evaluate").main([f"run={run}", "split=day"])


def test_a_trained_run_is_evaluated_on_a_set_that_it_never_had(table: Path, run: Path) -> None:
    write_rows(table / "new.csv", 140, 160)
    loaded = load_run(run, data={"source.sets": {"new": "new.csv"}, "final_sets": []})
    assert evaluate(loaded, "new")["new/accuracy"] >= 0
    assert loaded.data.num_examples["new"] == 20


def test_reports_and_tables_show_every_set(run: Path, tmp_path: Path) -> None:
    page = load(run)
    assert [*page.sets] == ["val", "night", "ood", "test"]
    drawn = plots.figure_of(plots.curves(page.lines, page.final))
    assert drawn is not None
    assert drawn.axes[0].get_legend_handles_labels()[1] == ["train", "val", "night"]
    rows = comparison.rows_of([page])
    header, _ = comparison.table_of(comparison.compare(rows))
    assert header == ["setting", "runs", *(f"{it}/accuracy" for it in page.sets)]
    comparison.write_csv(rows, tmp_path / "results.csv")
    header = (tmp_path / "results.csv").read_text().splitlines()[0].split(",")
    assert {"val/loss", "night/loss", "ood/loss", "test/loss"} <= {*header}
    side_by_side.write_page(comparison.compare(rows), tmp_path / "page.html")
    assert "night/accuracy" in (tmp_path / "page.html").read_text()


def numbers(folder: Path, *prefixes: str) -> list[dict[str, Any]]:
    """Return what a run logged, without the metrics with these prefixes."""
    return [{k: v for k, v in line.items() if not k.startswith(prefixes)}
            for line in metrics_of(folder)]  # fmt: skip


def test_a_set_changes_no_bit_of_the_weights(table: Path, tmp_path: Path) -> None:
    """Invariant 32. The negative control trains on the rows of the set."""
    plain = train(tmp_path / "plain", *csv(table, *ODD))
    named = train(tmp_path / "named", *csv(table, *ODD, *SETS))
    assert named["weights_sha256"] == plain["weights_sha256"]
    assert named["best"] == plain["best"] and named["test"] == plain["test"]
    ours = [line for line in numbers(tmp_path / "named", "night/", "ood/") if len(line) > 2]
    assert repr(ours) == repr(numbers(tmp_path / "plain"))
    night = (table / "night.csv").read_text().partition("\n")[2]
    (tmp_path / "both.csv").write_text((table / "train.csv").read_text() + night)
    both = csv(table, *ODD, f"data.source.train_file={tmp_path / 'both.csv'}")
    assert train(tmp_path / "both", *both)["weights_sha256"] != plain["weights_sha256"]


def test_a_set_can_choose_the_weights_and_end_the_run(table: Path, tmp_path: Path) -> None:
    asked = csv(table, *SETS, "trainer.monitor=night/loss", "trainer.mode=max")
    summary = train(tmp_path / "max", *asked)  # the highest loss, that of the first evaluation
    assert summary["best"]["metric"] == "night/loss" and summary["best"]["step"] == 4
    values = [line["night/loss"] for line in metrics_of(tmp_path / "max") if "night/loss" in line]
    assert summary["best"]["value"] == max(values) == values[0]
    stopped = train(
        tmp_path / "stops",
        *(*asked, "trainer.max_epochs=9", "trainer.early_stopping.patience=1"),
        "scheduler=plateau",
    )
    assert stopped["stopped_early"] and stopped["epochs"] == 3


def test_a_set_takes_the_place_of_a_missing_val(table: Path, tmp_path: Path) -> None:
    without = csv(table, *SETS, "data.source.val_fraction=0")
    summary = train(tmp_path / "last", *without)
    assert summary["best"] == {"metric": None, "value": None, "step": summary["steps"]}
    assert "val" not in summary and summary["night"] and summary["test"]
    chosen = train(tmp_path / "night", *without, "trainer.monitor=night/accuracy")
    assert chosen["best"]["metric"] == "night/accuracy"
    counts = {line["step"]: line for line in metrics_of(tmp_path / "night")}
    assert not any(key.startswith("val/") for line in counts.values() for key in line)


class Killed(Exception):
    pass


def test_a_kill_between_two_sets_changes_nothing(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(*csv(table, *ODD, *SETS, "trainer.checkpoint.save_every_steps=1"))
    whole = training.train(
        training.build(config, CPU), config, made(tmp_path / "whole"), CPU, training.StopRequest()
    )
    for number, name in enumerate(("val", "night", "ood", "test")):
        cut = made(tmp_path / f"cut{number}")
        assert died_in(name, config, cut, monkeypatch)
        resumed = training.train(
            training.build(config, CPU), config, cut, CPU, training.StopRequest()
        )
        assert resumed["weights_sha256"] == whole["weights_sha256"]
        assert repr(metrics_of(cut)) == repr(metrics_of(tmp_path / "whole"))
        same = ("best", "val", "night", "ood", "test")
        assert [resumed[key] for key in same] == [whole[key] for key in same]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def died_in(
    name: str, config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Train in a forked process that kills itself as it evaluates the set for the second time.

    A final set is evaluated once, so that it dies there.
    """
    pid = os.fork()
    if pid == 0:
        try:
            in_training = name in ("val", "night")
            owner, function = (loop, "evaluate") if in_training else (training, "measure_once")
            measured, seen = getattr(owner, function), []

            def deadly(*given: Any, **named: Any) -> Any:
                seen.append(name in (*given, *named.values()))
                if seen[-1] and sum(seen) == 1 + in_training:
                    os.kill(os.getpid(), signal.SIGKILL)
                return measured(*given, **named)

            setattr(owner, function, deadly)
            torch.set_num_threads(1)
            training.train(training.build(config, CPU), config, folder, CPU, training.StopRequest())
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.slow
def test_two_processes_measure_the_sets_of_one(table: Path, run: Path, tmp_path: Path) -> None:
    """Here 31 and 19 examples are divided among two processes."""
    asked = csv(table, *SETS, "optimizer.lr=0.02", "trainer=ddp", "trainer.devices=2")
    forked.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *asked, "hydra.run.dir=two"],
        cwd=tmp_path, check=True, capture_output=True, timeout=200,
    )  # fmt: skip
    one, two = (read_json(folder / "summary.json") for folder in (run, tmp_path / "two"))
    for name in ("val", "night", "ood", "test"):
        assert one[name].keys() == two[name].keys()
        for key, value in one[name].items():
            assert two[name][key] == pytest.approx(value, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    "name", ["train", "time", "best", "seconds", "val", "test", "Test", "a b", "a/b"]
)
def test_a_name_that_the_record_or_a_split_uses_is_refused(name: str) -> None:
    some = Examples(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(UserError, match=f"the set '{name}'"):
        Splits(some, sets={name: some})
    assert [*dict(Splits(some, sets={"night-2": some}).items())] == ["train", "night-2"]


def test_a_summary_has_no_key_that_a_set_may_have(run: Path) -> None:
    summary, some = read_json(run / "summary.json"), Examples(torch.zeros(2, 3), torch.zeros(2))
    for key in summary.keys() - {"night", "ood"}:
        with pytest.raises(UserError):
            Splits(some, sets={key: some})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("trainer.monitor=test/accuracy",), "of a set that is measured during training"),
        (("trainer.monitor=ood/accuracy", *SETS), "of a set that is measured during training"),
        (("trainer.monitor=accuracy",), "Did you mean val/accuracy?"),
        (("data.source.sets=3",), "data.source.sets=3 must be a mapping to text, or a list"),
    ],
)
def test_an_impossible_set_is_refused_before_the_data_is_read(
    table: Path, overrides: tuple[str, ...], message: str
) -> None:
    from running import composed

    with pytest.raises(UserError) as error:
        check(composed(*csv(table, *overrides)), {"data": "csv"})
    assert message in str(error.value)


def test_a_set_that_the_data_lacks_is_named(table: Path) -> None:
    for overrides, message in (
        (("trainer.monitor=night/loss",), "trainer.monitor=night/loss is not measured"),
        ((*SETS, "data.final_sets=[nigth]"), "no set nigth. Did you mean night?"),
        (("data.source.sets={time: night.csv}",), "the set 'time'"),
        (("data.source.sets=[night.csv]",), "must name each file, such as {night: n.csv}"),
        (("data.source.sets={val: night.csv}",), "the source gives val by itself"),
    ):
        with pytest.raises(UserError) as error:
            training.build(config_of(*csv(table, *overrides)), CPU)
        assert message in str(error.value)


def test_an_example_of_a_set_may_not_be_trained_on(table: Path, tmp_path: Path) -> None:
    shutil.copytree(table, tmp_path / "table")
    first = (table / "train.csv").read_text().splitlines()[1]
    with (tmp_path / "table" / "night.csv").open("a") as file:
        file.write(f"{first}\n")
    with pytest.raises(DataError, match=r"1 of the 32 night examples are in (train|val|test)"):
        training.build(config_of(*csv(tmp_path / "table", *SETS)), CPU)


def test_only_what_would_flatter_a_number_counts_as_an_overlap() -> None:
    """A set within val is another view of it. One within test would choose by what is tested."""
    rows = torch.arange(24.0).view(8, 3)
    train, val, test = (Examples(rows[a:b], rows[a:b, 0]) for a, b in ((0, 4), (4, 6), (6, 8)))
    assert check_overlap(Splits(train, val, test, {"hard": val}), "refuse") == {}
    splits = Splits(train, val, test, {"hard": test})
    assert check_overlap(splits, "refuse", ("hard", "test")) == {}
    with pytest.raises(DataError, match="2 of the 2 test examples are in hard too"):
        check_overlap(splits, "refuse")


# Sources.


def images(folder: Path, start: int, stop: int) -> None:
    from PIL import Image

    for number in range(start, stop):
        file = folder / "ab"[number % 2] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)


@pytest.mark.slow
def test_folders_beside_train_are_sets(tmp_path: Path) -> None:
    images(tmp_path / "train", 0, 24)
    images(tmp_path / "night", 24, 32)
    (tmp_path / "masks" / "other").mkdir(parents=True)
    shape = ("data.num_classes=2", "data.input_shape=[3,8,8]", "data.source.resize=8")
    asked = ("data=image_folder", f"data.root={tmp_path}", *shape, "data.num_workers=0")
    data = training.build(config_of(*asked, *TRAINER), CPU).data
    assert data.num_examples == {"train": 17, "val": 2, "night": 8, "test": 5}
    assert "1 beside train and the sets (masks)" in data.notes[0]
    older = training.build(config_of(*asked, *TRAINER, "data.source.sets=[]"), CPU).data
    assert "night" not in older.num_examples  # a run from before there were sets
    assert "2 beside train and the sets (masks, night)" in older.notes[0]
    with pytest.raises(UserError, match="holds no folder dusk beside a folder train"):
        training.build(config_of(*asked, *TRAINER, "data.source.sets=[dusk]"), CPU)
    summary = train(tmp_path / "run", *asked, *TRAINER, "trainer.monitor=night/accuracy")
    assert summary["best"]["metric"] == "night/accuracy" and summary["night"]


def test_own_data_sets_have_names_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "spectra.py").write_text(
        "import torch\n"
        "class Spectra(torch.utils.data.Dataset):\n"
        "    def __init__(self, start, count):\n"
        "        self.start, self.count = start, count\n"
        "    def __len__(self):\n"
        "        return self.count\n"
        "    def __getitem__(self, index):\n"
        "        return torch.randn(4), index % 3\n"
    )
    config = config_of(*TINY_OWN)
    own = {"_target_": "spectra.Spectra"}
    config["data"]["source"] = {
        "_target_": "lab.data.datasets.from_datasets",
        **{"train": {**own, "start": 0, "count": 20}, "val": None, "test": None, "collate": None},
        "sets": {"night": {**own, "start": 20, "count": 7}},
    }
    from running import train_config

    summary = train_config(tmp_path / "run", config)
    assert summary["night"]["night/loss"] > 0 and summary["best"]["metric"] is None


TINY_OWN = (
    *("data=synthetic", "data.num_classes=3", "data.num_outputs=3", "data.input_shape=[4]"),
    *("data.normalize=none", "model.hidden=[4]", *TRAINER),
)


# Sweeps.


def test_a_search_may_look_for_the_best_of_any_set(
    table: Path, run: Path, make_options: Callable[..., Any]
) -> None:
    config = config_of(*csv(table, *SETS))
    metrics, directions = search.objectives(make_options("night/accuracy"), config)
    assert (metrics, directions) == (["night/accuracy"], ["maximize"])
    summary = read_json(run / "summary.json")
    assert search.values_of(run, ["night/accuracy", "val/accuracy", "parameters"]) == [
        summary["night"]["night/accuracy"],
        summary["best"]["value"],
        summary["parameters"],
    ]
    for metric in ("test/accuracy", "ood/accuracy", "accuracy"):
        with pytest.raises(UserError, match="of a set that is measured during training"):
            search.objectives(make_options(metric), config)


@pytest.fixture
def make_options() -> Callable[..., Any]:
    from types import SimpleNamespace

    return lambda metric: SimpleNamespace(metric=metric, direction=None, pruner="none")
