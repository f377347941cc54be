"""Numbers that float32 would round: targets and inputs far from zero, probabilities, tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import as_hydra_has_it, composed

from lab.tasks.metrics import Metrics, regression_metrics
from regrow.errors import DataError
from regrow.feeding.loaders import Data
from regrow.feeding.preprocess import in_units, standardised
from regrow.feeding.splits import Examples, Splits
from regrow.load import load_run
from regrow.runs import training
from regrow.runs.inference import evaluate, predict
from regrow.runs.launch import launch

CPU = torch.device("cpu")
SECONDS = 1_764_180_000
CSV = (
    *("data=csv", "data.root=.", "task=regression", "data.source.target_columns=[y]"),
    *("data.target_kind=regression", "data.num_classes=null", "data.num_outputs=1"),
    *("data.input_shape=[2]", "data.normalize_targets=true", "data.eval_batch_size=256"),
    *("model.hidden=[32]", "trainer.device=cpu", "trainer.num_threads=1", "trainer.max_epochs=30"),
    *("optimizer.lr=0.01", "data.overlap=ignore"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)
    return tmp_path


def start(folder: str, *overrides: str) -> dict[str, Any]:
    launch(as_hydra_has_it(composed(*overrides, f"hydra.run.dir={folder}")))
    summary: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return summary


@pytest.mark.slow
def test_a_target_far_from_zero_is_learnt_as_the_same_without_its_offset(here: Path) -> None:
    """Unix seconds: float32 rounds them to two minutes."""
    random = np.random.default_rng(0)
    rows = [(a, b, int(60 * a + 30 * b)) for a, b in random.normal(0, 2, (400, 2)).round(3)]
    for name, offset in (("near", 0), ("far", SECONDS)):
        lines = [f"{a},{b},{y + offset}" for a, b, y in rows]
        Path(f"{name}.csv").write_text("\n".join(["a,b,y", *lines]) + "\n")
    near = start("near", *CSV, "data.source.train_file=near.csv")["test"]
    far = start("far", *CSV, "data.source.train_file=far.csv")["test"]
    for key in ("test/rmse", "test/mae", "test/r2"):
        assert far[key] == pytest.approx(near[key], rel=1e-3), key
    assert far["test/rmse"] < 20
    rounded = start("old", *CSV, "data.source.train_file=far.csv", "data.target_dtype=float32")
    assert rounded["test"]["test/rmse"] > far["test/rmse"] + 5  # the negative control

    run = load_run("far", device="cpu")
    found = list(predict(run, Path("far.csv"), 256))
    test = run.data.source.test
    places = {
        tuple(row): n
        for n, row in enumerate(np.loadtxt("far.csv", delimiter=",", skiprows=1)[:, :2].tolist())
    }
    values = torch.tensor(
        [float(found[places[tuple(row)]]["prediction"]) for row in test.inputs.tolist()],
        dtype=torch.float64,
    )
    error = (values - test.targets).square().mean().sqrt()
    assert float(error) == pytest.approx(far["test/rmse"], rel=1e-6)
    assert evaluate(run, "test")["test/rmse"] == pytest.approx(far["test/rmse"], rel=1e-9)


def test_standardising_and_back_keeps_the_digits() -> None:
    values = SECONDS + torch.arange(1000, dtype=torch.float64)
    mean, std = [values.mean().item()], [values.std().item()]
    near = standardised(values, mean, std)
    assert near.dtype == torch.float32
    assert (in_units(near, mean, std) - values).abs().max() < 1e-3
    assert (in_units(near.float(), mean, std).float().double() - values).abs().max() > 1  # control


def test_metrics_of_targets_far_from_zero_are_exact_over_several_chunks() -> None:
    random = torch.Generator().manual_seed(0)
    targets = torch.randn(3000, generator=random, dtype=torch.float64)
    outputs = targets + 0.3 * torch.randn(3000, generator=random, dtype=torch.float64)
    found = []
    for offset in (0.0, 1e9):
        metrics = Metrics(regression_metrics(1, lambda values: values.double()), CPU)
        for part in (slice(0, 7), slice(7, 2000), slice(2000, 3000)):
            metrics.update(outputs[part] + offset, targets[part] + offset)
            metrics._feed()
        found.append(metrics.scalars())
    from sklearn.metrics import r2_score

    assert found[0]["r2"] == pytest.approx(r2_score(targets, outputs), abs=1e-13)
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=1e-6), key


def test_features_far_from_zero_are_standardised_in_float64(
    make_data: Callable[..., Data], tmp_path: Path
) -> None:
    rows = [f"{SECONDS + n},{n}" for n in range(100)]
    (tmp_path / "rows.csv").write_text("\n".join(["a,y", *rows]) + "\n")
    data = make_data(
        *("csv", f"root={tmp_path}", "source.train_file=rows.csv", "source.target_columns=[y]"),
        *("target_kind=regression", "num_classes=null", "num_outputs=1", "input_shape=[1]"),
    )
    batch = next(iter(data.evaluation("test", device=CPU)))
    assert len(batch.inputs.unique()) == len(batch.inputs) and batch.inputs.dtype == torch.float32


def test_a_constant_is_shifted_and_not_scaled_by_its_rounding(
    make_data: Callable[..., Data], tmp_path: Path
) -> None:
    """The deviation of a thousand values 0.1 is computed as 3e-17, so 0.2 would become 4e15."""
    for name, value in (("train", 0.1), ("val", 0.2)):
        rows = [f"{value},0.7,{n}" for n in range(1000)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["a,y,n", *rows]) + "\n")
    assert torch.full((1000, 1), 0.1, dtype=torch.float64).std(0, correction=0) > 0
    data = make_data(
        *("csv", f"root={tmp_path}", "source.train_file=train.csv", "source.val_file=val.csv"),
        *("source.test_fraction=0", "source.target_columns=[y]", "source.feature_columns=[a]"),
        *("target_kind=regression", "num_classes=null", "num_outputs=1", "input_shape=[1]"),
        *("normalize_targets=true", "overlap=ignore"),
    )
    batch = next(iter(data.evaluation("val", device=CPU)))
    assert torch.allclose(batch.inputs, torch.tensor(0.1)) and data.target_std == [1.0]

    signals = torch.rand(50, 2, 4, dtype=torch.float64)
    signals[:, 1] = 0.1  # a channel
    own = data_of(Examples(signals, torch.arange(50) % 3), normalize="train", input_shape=[2, 4])
    assert own.preprocessing.std is not None and own.preprocessing.std[1] == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_without_a_value_is_named_before_it_spreads_to_all(value: float) -> None:
    inputs = torch.rand(8, 2, 3)
    inputs[5, 1, 2] = value
    train = Examples(inputs, torch.arange(8) % 3)
    with pytest.raises(DataError, match=r"split train, example 5: the input at \[1, 2\] is NaN or"):
        data_of(train, normalize="train", input_shape=[2, 3])
    data_of(train, normalize="none", input_shape=[2, 3])  # a model may take it for missing


def test_targets_of_any_layout_in_memory_are_standardised() -> None:
    targets = torch.rand(5, 6, 30).permute(2, 1, 0)
    own = {"target_kind": "regression", "num_classes": None, "num_outputs": 30}
    train = Examples(torch.rand(30, 4), targets)
    data = data_of(train, **own, normalize_targets=True)
    (batch,) = [*data.evaluation("val", device=CPU)][:1]
    units = data.in_units(batch.targets.flatten(1)).float()
    assert torch.allclose(units, targets[:8].reshape(8, -1), atol=1e-6)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (50.0, True)])
def test_targets_far_from_what_a_model_starts_with_are_said(scale: float, warns: bool) -> None:
    inputs = torch.rand(50, 2)
    regression = {"target_kind": "regression", "num_classes": None, "num_outputs": 1}
    train = Examples(inputs, scale * inputs[:, 0])
    said = data_of(train, input_shape=[2], **regression).far_targets()
    assert ("Set data.normalize_targets=true" in str(said)) is warns
    more = {"normalize_targets": True}
    assert data_of(train, input_shape=[2], **regression, **more).far_targets() is None


def data_of(train: Any, **changes: Any) -> Data:
    options: dict[str, Any] = {
        **{"source": Splits(train, train, None), "seed": 0, "root": ".", "overlap": "ignore"},
        **{"target_kind": "multiclass", "num_classes": 3, "ignore_index": None, "num_outputs": 3},
        **{"input_shape": [4], "class_names": None, "batch_size": 4, "eval_batch_size": 8},
        **{"num_workers": 0, "pin_memory": False, "persistent_workers": False, "drop_last": False},
        **{
            "limit_train": None,
            "limit_by": "random",
            "augment": False,
            "augmentation": None,
            "normalize": "none",
        },
        **{"sampling": None, "transforms": [], "mixing": None},
        **{"cache": None, "cache_root": None, "cache_max_gb": 20},
        **{
            "normalize_targets": False,
            "integers": "int64",
            "target_dtype": "float64",
            "changed": "refuse",
            **{"final_sets": [], "folds": None, "fold": 0},
            "identity": "contents",
        },
    }
    return Data(**{**options, **changes})


CLASSES = torch.tensor([0, 1, 2, 0])


def test_series_whose_small_features_are_flattened_are_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    random = torch.Generator().manual_seed(0)
    scales = torch.tensor([200.0, 0.5, 0.3])  # of sales, price and promotion
    series = torch.randn(40, 12, 3, generator=random) * scales  # (N, time, features)
    some = {"target_kind": "regression", "num_classes": None, "num_outputs": 1}

    def said(inputs: torch.Tensor, normalize: Any = "train") -> str:
        caplog.clear()
        how = {"input_shape": [*inputs.shape[1:]], "normalize": normalize, **some}
        data_of(Examples(inputs, torch.zeros(len(inputs))), **how).train(device=CPU)
        return caplog.text

    assert "data.normalize=train treats the first dimension of inputs [12, 3]" in said(series)
    assert "have standard deviations of 0.00" in caplog.text
    for fine in (
        series.transpose(1, 2),  # (N, features, time)
        torch.cat([series, series], 2),  # as likely channels, or an image
        series / scales,
        series[:, :, :1],
        torch.cat([series[:, :, :1], torch.ones(40, 12, 1)], 2),  # a constant one
    ):
        assert said(fine) == ""
    assert said(series, "none") == ""


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_tokens_in_memory_stay_integers(dtype: torch.dtype) -> None:
    tokens = torch.arange(16).view(4, 4).to(dtype)
    batch = next(iter(data_of(Examples(tokens, CLASSES)).evaluation("val", device=CPU)))
    assert batch.inputs.dtype == torch.int64 and torch.equal(batch.inputs, tokens.long())
    for changes in ({"integers": "float32"}, {"normalize": "train"}):
        batch = next(
            iter(data_of(Examples(tokens, CLASSES), **changes).evaluation("val", device=CPU))
        )
        assert batch.inputs.dtype == torch.float32 and batch.inputs.shape == (4, 4)


def test_bfloat16_in_memory_is_read_as_float32() -> None:
    rows = torch.randn(4, 4)
    data = data_of(Examples(rows.bfloat16(), CLASSES))
    batch = next(iter(data.evaluation("val", device=CPU)))
    assert torch.equal(batch.inputs, rows.bfloat16().float())
    assert data.fingerprint() == data_of(Examples(rows.bfloat16().float(), CLASSES)).fingerprint()


def test_predict_takes_integers_as_they_are(tmp_path: Path) -> None:
    how = data_of(Examples(torch.arange(16).view(4, 4), CLASSES)).preprocessing
    np.save(tmp_path / "tokens.npy", np.arange(8, dtype=np.int32).reshape(2, 4))
    ((_, inputs),) = how.read(tmp_path / "tokens.npy", 8)
    assert inputs.dtype == torch.int64
    np.save(tmp_path / "floats.npy", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="takes integers"):
        list(how.read(tmp_path / "floats.npy", 8))


@pytest.mark.parametrize("as_numpy", [False, True])
def test_float64_images_are_trained_on(as_numpy: bool) -> None:
    images: Any = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    images = images.numpy() if as_numpy else images
    for normalize in ("none", "train"):
        data = data_of(Examples(images, CLASSES), input_shape=[3, 5, 5], normalize=normalize)
        assert next(iter(data.evaluation("val", device=CPU))).inputs.dtype == torch.float32
    items = [(image, int(target)) for image, target in zip(images, CLASSES, strict=True)]
    batch = next(iter(data_of(items, input_shape=[3, 5, 5]).evaluation("val", device=CPU)))
    assert batch.inputs.dtype == torch.float32


def test_auroc_from_the_file_of_predictions_is_the_evaluations(here: Path) -> None:
    """Logits so large that float32 probabilities tie."""
    from sklearn.metrics import roc_auc_score

    start(
        "run",
        *("data=breast_cancer", "task=binary", "trainer.max_epochs=8", "trainer.device=cpu"),
        *("trainer.num_threads=1", "data.eval_batch_size=256", "optimizer.lr=0.05"),
    )
    run = load_run("run", which="last", device="cpu")
    last = run.model
    with torch.no_grad():
        for parameter in list(last.parameters())[-2:]:
            parameter.mul_(8.0)
    test = run.data.source.test
    np.save("rows.npy", test.inputs.numpy())
    found = [float(row["probability"]) for row in predict(run, Path("rows.npy"), 256)]
    exact = evaluate(run, "test")["test/auroc"]
    assert roc_auc_score(test.targets.numpy(), found) == pytest.approx(exact, abs=1e-12)
    rounded = np.array(found, np.float32)
    assert len(set(rounded.tolist())) < len(set(found))  # ties, caused by rounding to nine digits
