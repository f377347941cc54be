"""Metrics of torchmetrics that a config names: exact, or refused in one line."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from sklearn import metrics as sk
from test_metrics import KINDS, RNG, C, N, as_is, drawn
from torch import Tensor
from torchmetrics import Metric

from lab.tasks import metrics
from lab.tasks.metrics import Metrics, language_metrics, regression_metrics
from regrow.config.roles import check_roles
from regrow.config.targets import allow, instantiate
from regrow.errors import UserError
from regrow.feeding.tokens import IGNORED
from regrow.numerics import extra

torch.set_num_threads(1)
CPU = torch.device("cpu")


class MeanOfBatches(Metric):
    """A wrong metric: the mean of its updates, whatever their sizes."""

    higher_is_better = True
    total: Tensor
    updates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), "sum")
        self.add_state("updates", torch.zeros(()), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += (outputs.argmax(1) == targets).double().mean()
        self.updates += 1

    def compute(self) -> Tensor:
        return self.total / self.updates


class OfEachProcess(Metric):
    """A wrong metric: its sums have no dist_reduce_fx, so processes keep their own."""

    right: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(()))
        self.add_state("seen", torch.zeros(()))

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.right += (outputs.argmax(1) == targets).sum()
        self.seen += len(targets)

    def compute(self) -> Tensor:
        return self.right / self.seen


class MeanOfProcesses(MeanOfBatches):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("mean", torch.zeros(()), "mean")


# torchmetrics warns of the memory of those that keep all rows.
pytestmark = pytest.mark.filterwarnings("ignore:Metric `.*` will save all")
CLASSES: dict[str, Any] = {"task": "multiclass", "num_classes": C}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SPEARMAN = torchmetrics.SpearmanCorrCoef()
EXTRA: dict[str, dict[str, Metric]] = {
    "multiclass": {
        "kappa": torchmetrics.CohenKappa(**CLASSES),
        "mcc": torchmetrics.MatthewsCorrCoef(**CLASSES, sync_on_compute=False),
        "calibration": torchmetrics.CalibrationError(**CLASSES),
        "precision_curve": torchmetrics.AveragePrecision(**CLASSES),
    },
    "binary": {"ap": torchmetrics.AveragePrecision("binary")},
    "multilabel": {"hamming": torchmetrics.HammingDistance("multilabel", num_labels=C)},
    "regression": {
        "mape": torchmetrics.SymmetricMeanAbsolutePercentageError(),
        "spearman": SPEARMAN,
        "pearson": torchmetrics.PearsonCorrCoef(),
        "root": torchmetrics.MeanSquaredError() ** 0.5,
    },
    "regression_2": {"explained": torchmetrics.ExplainedVariance()},
    "segmentation": {"jaccard": torchmetrics.JaccardIndex(**CLASSES)},
}


def measured(kind: str, own: slice = slice(None), batch: int = 60) -> dict[str, float]:
    recipe, outputs, targets = KINDS[kind]
    metrics = Metrics(recipe, CPU, EXTRA[kind])
    for o, t in zip(outputs[own].split(batch), targets[own].split(batch), strict=True):
        if len(o):
            metrics.update(o, t)
    return metrics.scalars()


@pytest.mark.parametrize("kind", KINDS)
def test_extra_metrics_are_torchmetrics_own_for_any_batches(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "CHUNK_EXAMPLES", 50)
    recipe, outputs, targets = KINDS[kind]
    extended = Metrics(recipe, CPU, EXTRA[kind])
    assert extended.names == (*recipe.names, *EXTRA[kind])
    rows = recipe.finish(
        *recipe.flatten(outputs if kind == "segmentation" else outputs.double(), targets)
    )
    whole, by_30 = measured(kind, batch=N), measured(kind, batch=30)
    for count in (2, N):
        extended.rehearse(outputs[:count], targets[:count])
    for name, metric in EXTRA[kind].items():
        expected = metric.clone()
        expected.set_dtype(torch.float64)
        expected.update(*rows)
        assert whole[name] == pytest.approx(float(expected.compute()), abs=1e-6)
        assert by_30[name] == pytest.approx(whole[name], abs=1e-9)
        assert not math.isnan(whole[name])
    without = Metrics(recipe, CPU)
    without.update(outputs, targets)
    assert without.scalars() == {k: v for k, v in whole.items() if k in recipe.names}


def test_kappa_and_jaccard_are_scikit_learns() -> None:
    _, outputs, targets = KINDS["multiclass"]
    kappa = sk.cohen_kappa_score(targets, outputs.argmax(1))
    assert measured("multiclass")["kappa"] == pytest.approx(kappa, abs=1e-6)
    _, outputs, masks = KINDS["segmentation"]
    counted = masks != 255
    jaccard = sk.jaccard_score(masks[counted], outputs.argmax(1)[counted], average="macro")
    found = measured("segmentation")
    assert found["jaccard"] == pytest.approx(jaccard, abs=1e-6)
    assert found["iou"] == pytest.approx(jaccard, abs=1e-12)
    _, outputs, targets = KINDS["regression"]
    from scipy.stats import spearmanr

    expected = spearmanr(outputs[:, 0], targets).statistic
    assert measured("regression")["spearman"] == pytest.approx(expected, abs=1e-9)


def test_tokens_are_predicted_and_true_tokens() -> None:
    recipe = language_metrics(C, None)
    outputs, targets = drawn(9, 6, C), torch.randint(C, (9, 6), generator=RNG)
    targets[2, 3:] = IGNORED
    metrics = Metrics(recipe, CPU, {"kappa": torchmetrics.CohenKappa(**CLASSES)})
    metrics.rehearse(outputs, targets)
    metrics.update(outputs, targets)
    kept = targets != IGNORED
    expected = sk.cohen_kappa_score(targets[kept], outputs.argmax(-1)[kept])
    assert metrics.scalars()["kappa"] == pytest.approx(expected, abs=1e-6)
    right = float((targets == outputs.argmax(-1))[kept].double().mean())
    assert metrics.scalars()["accuracy"] == pytest.approx(right, abs=1e-12)


def test_weights_of_zero_and_nan_hold_for_extra_metrics_too() -> None:
    recipe, outputs, targets = KINDS["multiclass"]
    weights = (torch.arange(N) % 3 != 0).float()
    metrics = Metrics(recipe, CPU, EXTRA["multiclass"])
    metrics.update(outputs, targets, weights)
    kept = weights > 0
    few = Metrics(recipe, CPU, EXTRA["multiclass"])
    few.update(outputs[kept], targets[kept])
    assert metrics.scalars() == pytest.approx(few.scalars())
    assert metrics.scalars()["kappa"] != pytest.approx(measured("multiclass")["kappa"])
    for kind in ("multiclass", "segmentation"):
        recipe, outputs, targets = KINDS[kind]
        metrics = Metrics(recipe, CPU, EXTRA[kind])
        metrics.update(outputs.clone().index_fill_(0, torch.tensor([3]), math.nan), targets)
        assert all(math.isnan(value) for value in metrics.scalars().values())


def test_a_metric_says_whether_more_is_better() -> None:
    metrics = Metrics(KINDS["multiclass"][0], CPU, EXTRA["multiclass"])
    assert metrics.higher_is_better("val/kappa") is True
    assert metrics.higher_is_better("val/calibration") is False


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"accuracy": torchmetrics.CohenKappa(**CLASSES)}, "accuracy is measured already"),
        ({"loss": torchmetrics.CohenKappa(**CLASSES)}, "loss is measured already"),
        ({"a/b": torchmetrics.CohenKappa(**CLASSES)}, "a/b is not a plain name"),
        ({"mine": torch.nn.Linear(1, 1)}, "Linear is not a torchmetrics.Metric"),
        ({"mine": MeanOfProcesses()}, "the state mean of MeanOfProcesses is a mean over processes"),
        (
            {"mine": torchmetrics.wrappers.MinMaxMetric(torchmetrics.CohenKappa(**CLASSES))},
            "MinMaxMetric wraps another metric",
        ),
    ],
)
def test_a_metric_that_could_not_be_exact_is_refused_at_once(
    metrics: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^task.extra_metrics.\S+: .*{message}"):
        Metrics(KINDS["multiclass"][0], CPU, metrics)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MeanOfBatches(), "depends on how the examples are grouped"),
        (OfEachProcess(), "another value if processes share a batch. Give each add_state"),
        (
            torchmetrics.CohenKappa("multiclass", num_classes=2),
            r"does not take .* outputs \(float64",
        ),
        (torchmetrics.F1Score(**CLASSES, average="none"), "gives 4 numbers, and a metric is one"),
        (torchmetrics.ConfusionMatrix(**CLASSES), "gives 16 numbers"),
        (torchmetrics.MeanSquaredError(), "does not take"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused_with_the_first_batch(
    metric: Metric, message: str
) -> None:
    recipe, outputs, targets = KINDS["multiclass"]
    with pytest.raises(UserError, match=rf"^task.extra_metrics.mine: .*{message}"):
        Metrics(recipe, CPU, {"mine": metric}).rehearse(outputs[:60], targets[:60])


class OneStatePerRow(Metric):
    """A wrong metric: the shape of its state is that of its rows."""

    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("squares", torch.zeros(()), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        if len(outputs):
            self.squares = self.squares.reshape(-1)[:1] + (outputs.argmax(1) == targets).sum()

    def compute(self) -> Tensor:
        return self.squares.sum()


class RowsOfNone(Metric):
    """A wrong metric: it keeps rows, and raises if there are none."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], None)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.rows.append(outputs.amax(0, keepdim=True))

    def compute(self) -> Tensor:
        return torch.cat([row.reshape(-1, C) for row in self.rows]).amax()


@pytest.mark.parametrize("metric", [OneStatePerRow(), RowsOfNone()])
def test_states_that_only_rows_shape_are_refused(metric: Metric) -> None:
    """A process without rows would wait forever for the others' states."""
    recipe, outputs, targets = KINDS["multiclass"]
    with pytest.raises(UserError, match=r"^task.extra_metrics.mine: .*processes without rows"):
        Metrics(recipe, CPU, {"mine": metric}).rehearse(outputs, targets)


def test_a_metric_without_rows_has_the_shapes_of_one_with_rows() -> None:
    recipe, outputs, targets = KINDS["regression_2"]
    empty, filled = (extra.fresh(EXTRA["regression_2"]["explained"], CPU) for _ in range(2))
    extra.update(empty, *recipe.finish(*recipe.no_rows))
    extra.update(filled, *recipe.finish(*recipe.flatten(outputs.double(), targets)))
    shapes = [{k: v.shape for k, v in it.metric_state.items()} for it in (empty, filled)]
    assert shapes[0] == shapes[1]
    assert not any(bool(state.any()) for state in empty.metric_state.values())


def test_a_rehearsal_leaves_no_trace() -> None:
    recipe, outputs, targets = KINDS["multiclass"]
    metrics = Metrics(recipe, CPU, EXTRA["multiclass"])
    metrics.rehearse(torch.randn(50, C, generator=RNG), targets[:50])
    metrics.update(outputs, targets)
    assert metrics.scalars() == pytest.approx(measured("multiclass"))


COUNTS = [[100, 103], [0, N], [N, 0], [0, 0]]


def _rank(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    results = []
    for counts in COUNTS:
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        results.append([measured(kind, own) for kind in KINDS])
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # as real runs end: the threads of a process group may crash at exit


@pytest.mark.slow
def test_two_processes_measure_what_one_does_with_extra_metrics(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for counts, of_kinds in zip(COUNTS, found, strict=True):
            for kind, values in zip(KINDS, of_kinds, strict=True):
                whole = measured(kind, slice(sum(counts)))
                assert values == pytest.approx(whole, rel=1e-8, nan_ok=True), (counts, kind)


def test_the_mean_of_two_shares_is_another_number() -> None:
    """The control: what a mean over processes would report."""
    shares = [measured("multiclass", slice(0, 40)), measured("multiclass", slice(40, N))]
    mean = sum(share["kappa"] for share in shares) / 2
    assert abs(mean - measured("multiclass")["kappa"]) > 1e-3


def test_a_foreign_run_may_name_only_metrics_that_compute(tmp_path: Path) -> None:
    def check(target: str) -> None:
        task = {
            "_target_": "lab.tasks.tasks.Multiclass",
            "extra_metrics": {"m": {"_target_": target}},
        }
        check_roles({"task": task}, ("task",), tmp_path, "run=theirs")

    check("torchmetrics.CohenKappa")
    check("torchmetrics.classification.MulticlassF1Score")
    for target in ("torchmetrics.text.BLEUScore", "torchmetrics.MetricCollection", "os.system"):
        with pytest.raises(UserError, match=rf"m._target_={target}, which no file in conf/task"):
            check(target)


def test_a_metric_of_all_rows_is_made_without_a_warning() -> None:
    """The run prints none, and neither does a command that builds its task again."""
    node = {"_target_": "torchmetrics.SpearmanCorrCoef"}
    allow(node)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(instantiate(node), torchmetrics.SpearmanCorrCoef)
    with pytest.warns(UserWarning, match="will save all targets"):
        torchmetrics.SpearmanCorrCoef()
    other = {"_target_": "warnings.warn", "message": "Metric `a` will save all in the buffer"}
    allow(other)
    with pytest.warns(UserWarning, match="will save all"):  # only torchmetrics' own is dropped
        instantiate(other)


def test_a_constant_target_costs_no_error() -> None:
    metrics = Metrics(
        regression_metrics(1, as_is), CPU, {"pearson": torchmetrics.PearsonCorrCoef()}
    )
    metrics.rehearse(drawn(8), torch.ones(8))
    extra.check({}, ())
