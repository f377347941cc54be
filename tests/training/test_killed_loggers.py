"""Each logger's own reader finds each step exactly once, however often the run was killed."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from running import TINY
from test_kill import killed

from regrow.record.logged_images import logged

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
LOGGERS = "csv,tensorboard,wandb" + (",mlflow" if HAS_MLFLOW else "")
# A resumed run dies at its first call: whether later ones come depends on the checkpoint that it
# resumed from.
KILLS = [["report", "after", 0.4], ["evaluate", "after", 0.0], ["save", "before", 0.0]]
PICTURES = [(step, "batch/inputs") for step in range(2, 13, 2)] + [(6, "line")]
Found = Counter[tuple[int, str]]


def of_jsonl(folder: Path) -> Found:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Counter((line["step"], key) for line in lines for key in line)


def of_csv(folder: Path) -> Found:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    return Counter((int(row["step"]), key) for row in rows for key in row if row[key] != "")


def of_tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    found = Counter((e.step, tag) for tag in tags["scalars"] for e in events.Scalars(tag))
    return found + Counter((e.step, tag) for tag in tags["images"] for e in events.Images(tag))


def of_wandb(folder: Path) -> Found:
    (run,) = (folder / "wandb").glob("offline-run-*")
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [tool, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    keys = {item["_step"]: {key.removesuffix("._type") for key in item} for item in history}
    assert len(keys) == len(history)
    return Counter((step, key) for step, its in keys.items() for key in its)


def of_mlflow(folder: Path, address: str) -> Found:
    from mlflow import MlflowClient

    client = MlflowClient(address)
    run = client.get_run(json.loads((folder / "mlflow.json").read_text())["id"])
    assert run.info.status == "FINISHED"
    keys = [*run.data.metrics]
    histories = [client.get_metric_history(run.info.run_id, key) for key in keys]
    found = Counter((metric.step, metric.key) for history in histories for metric in history)
    for name in ("batch/inputs", "line"):
        for file in client.list_artifacts(run.info.run_id, f"images/{name}"):
            found[int(Path(file.path).stem.removeprefix("step_")), name] += 1
    return found


def metrics_in(found: Found) -> Found:
    """Return the metrics, without the clock and what a logger adds."""
    parts = ("train/", "val/", "test/")
    return Counter({each: count for each, count in found.items() if each[1].startswith(parts)})


@pytest.mark.slow
def test_each_reader_finds_each_step_and_image_once_after_three_kills(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    run = (
        *(*TINY, "task.per_class=false", "task.auroc=false", f"logger=[{LOGGERS}]"),
        *("logger.wandb.mode=offline", "trainer.checkpoint.save_every_steps=3"),
        "step._target_=picturing.picturing_step",
    )
    jobs: list[dict[str, Any]] = [{"kills": KILLS}, {"kills": KILLS, "mistake": "forgetful"}]
    if HAS_MLFLOW:
        run = (*run, f"logger.mlflow.tracking_uri={address}")
    answers = killed(tmp_path, jobs, seconds=240, run=run)
    assert [None in answer["killed"] for answer in answers] == [False] * len(jobs)
    whole, folder, broken = (tmp_path / name for name in ("undisturbed", "0", "1"))
    expected = metrics_in(of_jsonl(whole))
    assert {*expected.values()} == {1} and {step for step, _ in expected} == {*range(1, 13)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's and MLflow's own
        for read in (of_jsonl, of_csv, of_tensorboard, of_wandb):
            assert metrics_in(read(folder)) == expected, read
        for read in (of_tensorboard, of_wandb):
            found = read(folder)
            assert [found[each] for each in PICTURES] == [1] * len(PICTURES), read
        assert max(metrics_in(of_jsonl(broken)).values()) > 1  # negative control
        if HAS_MLFLOW:
            found = of_mlflow(folder, address)
            assert metrics_in(found) == expected
            assert [found[each] for each in PICTURES] == [1] * len(PICTURES)
            assert max(of_mlflow(broken, address).values()) > 1  # negative control
    images = logged(folder)
    assert sorted((image.step, image.name) for image in images) == sorted(PICTURES)
    same = [image.path.read_bytes() for image in images]
    assert same == [image.path.read_bytes() for image in logged(whole)]
