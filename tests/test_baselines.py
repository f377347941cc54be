"""Each task beats a linear model from scikit-learn on the same splits, averaged over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import CPU, config_of, train_config

from regrow.runs import training

SEEDS = (0, 1, 2, 3, 4)


def table(split: Any) -> tuple[np.ndarray, np.ndarray]:
    return split.inputs.flatten(1).double().numpy(), split.targets.double().numpy()


def logistic(train: Any, test: Any) -> float:
    """Return the accuracy. Cross-validation on train chooses the regularisation strength."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    grid = {"logisticregression__C": [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
    search = GridSearchCV(model, grid, cv=4).fit(*train)
    return float(search.score(*test))


def logistic_per_label(train: Any, test: Any) -> float:
    """Return F1, averaged over the labels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for label in range(train[1].shape[1]):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000))
        model.fit(train[0], train[1][:, label])
        scores.append(f1_score(test[1][:, label], model.predict(test[0])))
    return statistics.mean(scores)


def ridge(train: Any, test: Any) -> float:
    """Return minus the root mean squared error."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-1, 3, 20)))
    model.fit(train[0], train[1].ravel())
    return -float(np.sqrt(np.mean((model.predict(test[0]) - test[1].ravel()) ** 2)))


def spread(values: list[float]) -> str:
    mean = abs(statistics.mean(values))
    return f"{mean:.4f} ± {statistics.stdev(values):.4f} (n={len(values)})"


CASES: dict[str, tuple[str, Callable[[Any, Any], float], float]] = {
    "digits_mlp": ("test/accuracy", logistic, 1),
    "digits_attributes": ("test/f1", logistic_per_label, 1),
    "breast_cancer": ("test/accuracy", logistic, 1),
    "diabetes": ("test/rmse", ridge, -1),
}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*is_sparse.*")
@pytest.mark.parametrize("experiment", CASES)
def test_an_experiment_beats_its_linear_baseline(
    experiment: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    metric, baseline, sign = CASES[experiment]
    ours, theirs = [], []
    for seed in SEEDS:
        config = config_of(
            *(f"experiment={experiment}", f"seed={seed}", "trainer.num_threads=1"),
            *("trainer.device=cpu", "task.auroc=false")[: 2 if experiment != "diabetes" else 1],
        )
        summary = train_config(tmp_path / str(seed), config)
        ours.append(sign * summary["test"][metric])
        source = training.build(config, CPU).data.source
        theirs.append(baseline(table(source.train), table(source.test)))
    mine, other = statistics.mean(ours), statistics.mean(theirs)
    record_property(f"{experiment}, {metric}", spread(ours))
    record_property(f"{experiment}, its linear baseline", spread(theirs))
    assert mine > other


@pytest.mark.slow
@pytest.mark.nightly
def test_the_defaults_reach_98_percent_on_digits(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found, seconds = [], []
    for seed in SEEDS:
        config = config_of(f"seed={seed}", "trainer.num_threads=1", "trainer.device=cpu")
        summary = train_config(tmp_path / str(seed), config)
        found.append(summary["test"]["test/accuracy"])
        seconds.append(summary["seconds"])
    record_property("digits with defaults, test/accuracy", spread(found))
    record_property("digits with defaults, seconds of training", spread(seconds))
    assert statistics.mean(found) >= 0.98
