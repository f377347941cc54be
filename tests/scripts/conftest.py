"""Runs that the tests of the scripts share."""

from __future__ import annotations

from pathlib import Path

import pytest
from finished import finished


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs on real digits, so that best and last differ."""
    folder = tmp_path_factory.mktemp("outputs") / "digits" / "run"
    return finished(folder, "trainer.max_steps=60", "optimizer.lr=0.01", "trainer.ema_decay=0.9")


@pytest.fixture(scope="session")
def diabetes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(
        tmp_path_factory.mktemp("outputs") / "run",
        *("data=diabetes", "task=regression", "trainer.max_steps=40", "optimizer.lr=0.01"),
    )


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a CSV with two features and three named classes. Returns the folder of both."""
    root = tmp_path_factory.mktemp("table")
    rows = [f"{'abc'[n % 3]},{n % 3 * 10 + n * 0.01},{100 - n}" for n in range(90)]
    (root / "rows.csv").write_text("\n".join(["label,x,y", *rows]))
    finished(
        root / "run",
        *("data=csv", f"data.root={root}", "data.source.train_file=rows.csv"),
        *("data.source.target_columns=[label]", "data.target_kind=multiclass"),
        *("data.num_classes=3", "data.num_outputs=3", "data.input_shape=[2]"),
    )
    return root
