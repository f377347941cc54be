"""Metrics: equal to scikit-learn, equal in chunks, and explicit where they are undefined."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor

from lab.tasks import metrics
from lab.tasks.metrics import (
    Metrics,
    Recipe,
    binary_metrics,
    multiclass_metrics,
    multilabel_metrics,
    regression_metrics,
    segmentation_metrics,
)


def as_is(values: Tensor) -> Tensor:
    return values


torch.set_num_threads(1)
CPU = torch.device("cpu")
N, C = 203, 4
NAMES = ["cat", "dog", "owl", "eel"]
RNG = torch.Generator().manual_seed(0)


def multiclass(ignore_index: int | None = None, per_class: bool = True) -> Recipe:
    return multiclass_metrics(NAMES, ignore_index, per_class=per_class, auroc=True)


def binary() -> Recipe:
    return binary_metrics(["no", "yes"], 0.3, auroc=True)


def multilabel() -> Recipe:
    return multilabel_metrics(NAMES, 0.4, per_class=True, auroc=True)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RNG)


def indices(*shape: int, high: int = C) -> Tensor:
    return torch.randint(high, shape, generator=RNG)


KINDS: dict[str, tuple[Recipe, Tensor, Tensor]] = {
    "multiclass": (multiclass(), drawn(N, C) * 2, indices(N)),
    "binary": (binary(), drawn(N, 1), indices(N, high=2)),
    "multilabel": (multilabel(), drawn(N, C), indices(N, C, high=2).float()),
    "regression": (regression_metrics(1, as_is), drawn(N, 1), drawn(N)),
    "regression_2": (
        regression_metrics(2, as_is, ["price", "area"]),
        drawn(N, 2),
        drawn(N, 2) + 2000,
    ),
    "segmentation": (
        segmentation_metrics(NAMES, 255, per_class=True),
        drawn(N, C, 3, 5),
        indices(N, 3, 5).where(drawn(N, 3, 5) < 1, 255).to(torch.uint8),
    ),
}


def measured(
    recipe: Recipe, outputs: Tensor, targets: Tensor, weights: Tensor | None = None, batch: int = N
) -> Metrics:
    metrics = Metrics(recipe, CPU)
    for start in range(0, len(outputs), batch):
        part = slice(start, start + batch)
        metrics.update(outputs[part], targets[part], None if weights is None else weights[part])
    return metrics


def near(found: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 50])
def test_chunks_give_what_one_update_gives(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(*KINDS[kind])
    expected, details = whole.scalars(), whole.details()
    assert tuple(sorted(expected)) == tuple(sorted(whole.names))
    assert not any(math.isnan(value) for value in expected.values())
    monkeypatch.setattr(metrics, "CHUNK_EXAMPLES", chunk)
    sliced = measured(*KINDS[kind], batch=30)
    assert sliced.scalars() == pytest.approx(expected, rel=1e-8)
    json.dumps(details, allow_nan=False)
    if kind.startswith("regression"):
        assert sliced.details() == details
    else:
        assert sliced.details()["confusion_matrix"] == details["confusion_matrix"]
        assert "." not in json.dumps(details["confusion_matrix"])  # counts
    recipe, outputs, targets = KINDS[kind]
    parts = zip(outputs.split(50), targets.split(50), strict=True)
    batches = [measured(recipe, o, t).scalars() for o, t in parts]
    name = {"regression": "r2", "regression_2": "r2", "segmentation": "iou"}.get(kind, "f1")
    mean = np.nanmean([values[name] for values in batches])
    assert abs(mean - expected[name]) > 1e-4  # a mean over batches differs


def test_multiclass_is_scikit_learns() -> None:
    recipe, outputs, targets = KINDS["multiclass"]
    found = measured(recipe, outputs, targets)
    y, p = targets.numpy(), outputs.double().softmax(1).numpy()
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, p.argmax(1))
    near(
        found.scalars(),
        {
            "accuracy": sk.accuracy_score(y, p.argmax(1)),
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": f1.mean(),
            "auroc": sk.roc_auc_score(y, p, multi_class="ovr"),
            **{f"precision/{n}": precision[i] for i, n in enumerate(NAMES)},
            **{f"recall/{n}": recall[i] for i, n in enumerate(NAMES)},
            **{f"accuracy/{n}": recall[i] for i, n in enumerate(NAMES)},
            **{f"f1/{n}": f1[i] for i, n in enumerate(NAMES)},
            **{f"auroc/{n}": sk.roc_auc_score(y == i, p[:, i]) for i, n in enumerate(NAMES)},
        },
    )
    matrix = sk.confusion_matrix(y, p.argmax(1)).tolist()
    assert found.details() == {"confusion_matrix": matrix, "class_names": NAMES}


def test_binary_is_scikit_learns() -> None:
    recipe, outputs, targets = KINDS["binary"]
    found = measured(recipe, outputs, targets)
    y, p = targets.numpy(), outputs[:, 0].double().sigmoid().numpy()
    near(
        found.scalars(),
        {
            "accuracy": sk.accuracy_score(y, p > 0.3),
            "precision": sk.precision_score(y, p > 0.3),
            "recall": sk.recall_score(y, p > 0.3),
            "f1": sk.f1_score(y, p > 0.3),
            "auroc": sk.roc_auc_score(y, p),
        },
    )
    assert found.details()["confusion_matrix"] == sk.confusion_matrix(y, p > 0.3).tolist()


def test_multilabel_is_scikit_learns() -> None:
    recipe, outputs, targets = KINDS["multilabel"]
    found = measured(recipe, outputs, targets)
    y, p = targets.numpy(), outputs.double().sigmoid().numpy()
    precision, recall, f1, _ = sk.precision_recall_fscore_support(y, p > 0.4)
    near(
        found.scalars(),
        {
            "accuracy": float(((p > 0.4) == y).mean()),
            "exact_match": sk.accuracy_score(y, p > 0.4),
            "precision": precision.mean(),
            "recall": recall.mean(),
            "f1": f1.mean(),
            "auroc": sk.roc_auc_score(y, p),
            **{f"f1/{n}": f1[i] for i, n in enumerate(NAMES)},
            **{f"accuracy/{n}": ((p > 0.4) == y)[:, i].mean() for i, n in enumerate(NAMES)},
            **{f"auroc/{n}": sk.roc_auc_score(y[:, i], p[:, i]) for i, n in enumerate(NAMES)},
        },
    )
    matrices = sk.multilabel_confusion_matrix(y, p > 0.4).tolist()
    assert found.details() == {"confusion_matrix": matrices, "class_names": NAMES}


@pytest.mark.parametrize("kind", ["regression", "regression_2"])
def test_regression_is_scikit_learns(kind: str) -> None:
    recipe, outputs, targets = KINDS[kind]
    y, p = targets.double().numpy(), outputs.double().numpy().reshape(targets.shape)
    expected = {
        "mae": sk.mean_absolute_error(y, p),
        "rmse": math.sqrt(sk.mean_squared_error(y, p)),
        "r2": sk.r2_score(y, p),
    }
    for index, name in enumerate(["price", "area"] if y.ndim == 2 else []):
        one = (y[:, index], p[:, index])
        expected[f"mae/{name}"] = sk.mean_absolute_error(*one)
        expected[f"rmse/{name}"] = math.sqrt(sk.mean_squared_error(*one))
        expected[f"r2/{name}"] = sk.r2_score(*one)
    found = measured(recipe, outputs, targets)
    assert found.scalars() == pytest.approx(expected, rel=1e-9)
    pairs = found.details()
    assert pairs["true"] == y.tolist() and pairs["predicted"] == p.tolist()
    assert pairs.get("target_names") == (["price", "area"] if y.ndim == 2 else None)


def test_segmentation_is_scikit_learns() -> None:
    recipe, outputs, masks = KINDS["segmentation"]
    found = measured(recipe, outputs, masks, batch=20).scalars()
    counted = masks != 255
    y, p = masks[counted].numpy(), outputs.argmax(1)[counted].numpy()
    iou, dice = sk.jaccard_score(y, p, average=None), sk.f1_score(y, p, average=None)
    expected = {
        "pixel_accuracy": sk.accuracy_score(y, p),
        "iou": iou.mean(),
        "dice": dice.mean(),
        **{f"iou/{n}": iou[i] for i, n in enumerate(NAMES)},
        **{f"dice/{n}": dice[i] for i, n in enumerate(NAMES)},
    }
    near(found, expected)
    assert found.keys() == expected.keys()
    images = zip(outputs.split(1), masks.split(1), strict=True)
    mean = np.nanmean([measured(recipe, *image).scalars()["iou"] for image in images])
    assert abs(mean - found["iou"]) > 1e-3  # a mean over images differs
    as_a_class = segmentation_metrics([*NAMES, "border"], None, per_class=False)
    marked = masks.where(counted, C)
    padded = torch.nn.functional.pad(outputs, (0, 0, 0, 0, 0, 1), value=-9.0)
    assert measured(as_a_class, padded, marked).scalars()["iou"] < found["iou"] - 0.01


def test_a_class_that_no_pixel_has_is_left_out_of_the_mean_iou() -> None:
    recipe = segmentation_metrics(NAMES, 255, per_class=True)
    outputs, masks = drawn(9, C, 4, 4), indices(9, 4, 4, high=2)
    outputs[:, 3] = -100  # eel: never a target, never predicted
    outputs[:, 1] = -100  # dog: never predicted
    found = measured(recipe, outputs, masks).scalars()
    y, p = masks.numpy().reshape(-1), outputs.argmax(1).numpy().reshape(-1)
    assert math.isnan(found["iou/eel"]) and found["iou/owl"] == 0
    near(found, {"iou": sk.jaccard_score(y, p, average="macro")})


def test_r_squared_does_not_depend_on_the_unit() -> None:
    _, outputs, targets = KINDS["regression"]
    expected = measured(regression_metrics(1, as_is), outputs, targets).scalars()["r2"]
    outputs, targets = outputs.double() * 1e-6, targets.double() * 1e-6
    found = measured(regression_metrics(1, as_is), outputs, targets).scalars()["r2"]
    assert found == pytest.approx(expected)
    from torchmetrics.functional import r2_score  # its own value, as the control

    assert abs(float(r2_score(outputs[:, 0], targets)) - expected) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_examples_of_weight_zero_are_left_out_and_other_weights_count_as_one(kind: str) -> None:
    recipe, outputs, targets = KINDS[kind]
    weights = torch.rand(N, generator=RNG) * (torch.arange(N) % 3 != 0)
    kept = weights > 0
    expected = measured(recipe, outputs[kept], targets[kept]).scalars()
    assert measured(recipe, outputs, targets, weights, batch=10).scalars() == pytest.approx(
        expected
    )
    assert measured(recipe, outputs, targets).scalars() != pytest.approx(expected)
    more = measured(recipe, outputs, targets)  # whose batches have no weights
    more.update(outputs[:1], targets[:1], torch.zeros(1))  # as of a process without examples
    assert more.scalars() == pytest.approx(measured(recipe, outputs, targets).scalars())


def test_ignored_targets_are_left_out() -> None:
    _, outputs, targets = KINDS["multiclass"]
    ignored = torch.arange(N) % 3 == 0
    expected = measured(multiclass(), outputs[~ignored], targets[~ignored]).scalars()
    marked = targets.where(~ignored, -7)
    assert measured(multiclass(-7), outputs, marked).scalars() == pytest.approx(expected)


def test_tokens_and_soft_targets_count_one_by_one() -> None:
    outputs, targets = drawn(6, C, 5), indices(6, 5)
    flat = outputs.transpose(1, 2).reshape(-1, C)
    expected = measured(multiclass(), flat, targets.reshape(-1)).scalars()
    assert measured(multiclass(), outputs, targets, batch=2).scalars() == pytest.approx(expected)
    soft = torch.nn.functional.one_hot(targets, C).transpose(1, 2) * 0.9 + 0.025
    assert measured(multiclass(), outputs, soft, batch=2).scalars() == pytest.approx(expected)
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    kept = weights > 0
    expected = measured(multiclass(), outputs[kept], targets[kept]).scalars()
    assert measured(multiclass(), outputs, targets, weights).scalars() == pytest.approx(expected)


def test_an_absent_class_is_nan_and_left_out_of_the_averages() -> None:
    outputs, targets = drawn(60, C), indices(60, high=2)
    outputs[:, 3] = -100  # eel: never a target, never predicted
    outputs[:, 1] = -100  # dog: never predicted
    found = measured(multiclass(), outputs, targets).scalars()
    predicted = outputs.argmax(1).numpy()
    assert math.isnan(found["f1/eel"]) and math.isnan(found["auroc/eel"])
    assert found["f1/owl"] == 0 and math.isnan(found["auroc/owl"])  # predicted, but never a target
    near(
        found,
        {
            "precision": sk.precision_score(targets, predicted, average="macro", zero_division=0),
            "recall": sk.recall_score(targets, predicted, average="macro", zero_division=0),
            "f1": sk.f1_score(targets, predicted, average="macro"),
            "auroc": (found["auroc/cat"] + found["auroc/dog"]) / 2,
        },
    )


def test_one_label_is_what_two_classes_are() -> None:
    outputs, targets = drawn(N, 1), indices(N, 1, high=2)
    label = multilabel_metrics(["yes"], 0.3, per_class=True, auroc=True)
    found = measured(label, outputs, targets.float()).scalars()
    near(found, measured(binary(), outputs, targets).scalars())
    assert found["auroc/yes"] == found["auroc"]


def test_one_class_alone_has_no_auroc() -> None:
    for recipe, outputs, targets in (
        (multiclass(), drawn(9, C), torch.zeros(9, dtype=torch.int64)),
        (binary(), drawn(9, 1), torch.ones(9)),
        (multilabel(), drawn(9, C), torch.zeros(9, C)),
    ):
        found = measured(recipe, outputs, targets).scalars()
        assert math.isnan(found["auroc"]) and not math.isnan(found["accuracy"])
    never = measured(binary(), torch.full((9,), -9.0), torch.zeros(9)).scalars()
    assert never["accuracy"] == 1 and math.isnan(never["f1"]) and math.isnan(never["precision"])


def test_r_squared_of_one_example_or_of_constant_targets_is_nan() -> None:
    found = measured(regression_metrics(1, as_is), torch.ones(1), torch.zeros(1)).scalars()
    assert (found["mae"], found["rmse"]) == (1, 1) and math.isnan(found["r2"])
    constant = torch.full((50,), 0.1)
    assert math.isnan(measured(regression_metrics(1, as_is), drawn(50), constant).scalars()["r2"])


@pytest.mark.parametrize("kind", KINDS)
def test_no_examples_give_nan(kind: str) -> None:
    metrics = Metrics(KINDS[kind][0], CPU)
    assert set(metrics.scalars()) == set(metrics.names)
    assert all(math.isnan(value) for value in metrics.scalars().values())
    assert metrics.details() == {}
    nothing = measured(*KINDS[kind], weights=torch.zeros(N))
    assert all(math.isnan(value) for value in nothing.scalars().values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_among_the_outputs_shows_in_every_metric(kind: str) -> None:
    recipe, outputs, targets = KINDS[kind]
    outputs = outputs.clone()
    outputs[5] = torch.nan
    found = measured(recipe, outputs, targets).scalars()
    assert found and all(math.isnan(value) for value in found.values())


def test_logits_between_zero_and_one_are_still_logits() -> None:
    """torchmetrics takes such a chunk for probabilities unless told otherwise."""
    outputs, targets = torch.rand(40, generator=RNG) * 0.2 - 0.05, indices(40, high=2)
    found = measured(binary_metrics(["no", "yes"], 0.51, auroc=True), outputs, targets).scalars()
    predicted = outputs.double().sigmoid() > 0.51
    assert found["accuracy"] == pytest.approx((predicted == targets).double().mean().item())


def test_auroc_tells_confident_logits_apart() -> None:
    """Sigmoid in float32 rounds them all to one."""
    outputs, targets = torch.linspace(18, 30, 40), torch.arange(40) // 20
    assert measured(binary(), outputs, targets).scalars()["auroc"] == 1


def test_per_class_values_and_auroc_can_be_left_out() -> None:
    _, outputs, targets = KINDS["multiclass"]
    recipe = multiclass_metrics(NAMES, None, per_class=False, auroc=False)
    found = measured(recipe, outputs, targets).scalars()
    assert set(found) == {"accuracy", "precision", "recall", "f1"}


def test_pairs_for_the_plot_are_capped() -> None:
    found = measured(regression_metrics(1, as_is), drawn(5000), drawn(5000)).details()
    assert len(found["true"]) == len(found["predicted"]) == metrics.MAX_PAIRS
    three = measured(regression_metrics(3, as_is), drawn(5000, 3), drawn(5000, 3)).details()
    assert np.shape(three["true"]) == np.shape(three["predicted"]) == (metrics.MAX_PAIRS // 3, 3)


def test_metrics_can_be_updated_after_they_were_read() -> None:
    recipe, outputs, targets = KINDS["multiclass"]
    metrics = measured(recipe, outputs[:100], targets[:100])
    first = metrics.scalars()
    metrics.update(outputs[100:], targets[100:], None)
    assert metrics.scalars() == pytest.approx(measured(recipe, outputs, targets).scalars())
    assert metrics.scalars() != pytest.approx(first)


COUNTS = [[100, 103], [0, N], [N, 0], [0, 0]]


def _rank(rank: int, world_size: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    results = []
    for counts in COUNTS:
        for recipe, outputs, targets in KINDS.values():
            own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            metrics = measured(recipe, outputs[own], targets[own], batch=60)
            scalars = metrics.scalars()
            # Details are local: this does not wait for the other process.
            results.append((scalars, metrics.details() if rank == 0 else None))
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)  # as real runs end: the threads of a process group may crash at exit


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    import torch.multiprocessing as mp

    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    cases = [(counts, kind) for counts in COUNTS for kind in KINDS.values()]
    for (counts, (recipe, outputs, targets)), *ranks in zip(cases, *found, strict=True):
        whole = measured(recipe, outputs[: sum(counts)], targets[: sum(counts)])
        for scalars, details in ranks:
            assert scalars == pytest.approx(whole.scalars(), rel=1e-8, nan_ok=True)
            assert details in (None, whole.details())


def test_a_regression_is_measured_in_the_targets_own_units() -> None:
    outputs, targets = drawn(50), drawn(50)
    standardised = regression_metrics(1, lambda values: values * 20 + 3)
    found = measured(standardised, outputs, targets)
    plain = measured(regression_metrics(1, as_is), outputs, targets)
    assert found.scalars()["rmse"] == pytest.approx(20 * plain.scalars()["rmse"])
    assert found.scalars()["r2"] == pytest.approx(plain.scalars()["r2"])
    assert found.details()["true"] == pytest.approx([20 * v + 3 for v in plain.details()["true"]])
