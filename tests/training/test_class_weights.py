"""Class weights by name and by counting, in training, after a resume and in an evaluation."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from running import TINY, config_of, launched, train
from sklearn.utils.class_weight import compute_class_weight

from lab.tasks.losses import CrossEntropy
from regrow.config.targets import allow, instantiate
from regrow.errors import UserError
from regrow.feeding.sampling import balanced_weights, per_example
from regrow.load import load_run
from regrow.record.records import read_json, write_json
from regrow.runs.inference import evaluate


class Split:
    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)


def data_of(classes: list[int], num_classes: int, **more: Any) -> Any:
    """Return a stand-in for the data whose training split has these classes."""
    data = SimpleNamespace(
        target_kind="multiclass", ignore_index=None, num_classes=num_classes, sampling=None,
        source=SimpleNamespace(train=Split(torch.tensor(classes))),
    )  # fmt: skip
    vars(data).update(more)
    data.of_training_examples = lambda name: per_example(data.source.train, name)
    return data


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    classes = np.random.default_rng(0).choice(4, 97, p=[0.6, 0.25, 0.1, 0.05])
    data = data_of(classes.tolist(), 4)
    expected = compute_class_weight("balanced", classes=np.unique(classes), y=classes)
    assert balanced_weights(data) == pytest.approx(expected.tolist(), rel=1e-12)
    fewer = balanced_weights(data_of(classes[:40].tolist(), 4))
    assert fewer != pytest.approx(expected.tolist())  # the control


def test_balanced_weights_count_neither_ignored_targets_nor_absent_classes() -> None:
    data = data_of([0, 0, 0, 2, 255, 255], 3, ignore_index=255)
    expected = compute_class_weight("balanced", classes=np.array([0, 2]), y=[0, 0, 0, 2])
    assert balanced_weights(data) == [expected[0], 1.0, expected[1]]
    with pytest.raises(UserError, match=r"^loss.class_weights=balanced: .* a list with a weight"):
        balanced_weights(data_of([0, 1], 2, target_kind="segmentation"))
    with pytest.raises(UserError, match=r"does not give its classes\. Give a list"):
        balanced_weights(data_of([0, 1], 2, source=SimpleNamespace(train=[3, 4])))


@pytest.mark.parametrize("ignore_index", [None, -1, -100])
def test_classes_in_one_byte_are_all_counted(ignore_index: int | None) -> None:
    """In uint8, 256 is 0, -1 is 255 and -100 is 156."""
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(256), np.arange(256) + 1))
    narrow = data_of([], 256, ignore_index=ignore_index)
    narrow.source.train = Split(torch.from_numpy(classes.astype(np.uint8)))
    expected = compute_class_weight("balanced", classes=np.arange(256), y=classes)
    assert balanced_weights(narrow) == pytest.approx(expected.tolist(), rel=1e-12)


def test_counting_rare_classes_twice_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("regrow")
    log.addHandler(caplog.handler)
    try:
        balanced_weights(data_of([0, 0, 1], 2))
        assert not caplog.messages
        balanced_weights(data_of([0, 0, 1], 2, sampling="balanced"))
    finally:
        log.removeHandler(caplog.handler)
    assert set(caplog.messages) == {
        "loss.class_weights=balanced and data.sampling=balanced count rare classes twice. Leave "
        "one out."
    }


RUN = (*TINY, "loss.label_smoothing=0.1")
BALANCED = (*RUN, "loss.class_weights=balanced")


def weights_of(folder: Path, *overrides: str, **more: Any) -> str:
    found: str = train(folder, *overrides, **more)["weights_sha256"]
    return found


def test_weights_by_name_or_counted_train_what_a_list_does(tmp_path: Path) -> None:
    listed = weights_of(tmp_path / "list", *RUN, "loss.class_weights=[2,1,0.5]")
    assert listed == weights_of(tmp_path / "name", *RUN, "loss.class_weights={0: 2, 2: 0.5}")
    assert listed != weights_of(tmp_path / "none", *RUN)
    config = config_of(*RUN)
    allow(config)
    targets = instantiate(config["data"]).source.train.targets.numpy()
    counted = compute_class_weight("balanced", classes=np.arange(3), y=targets).tolist()
    same = weights_of(tmp_path / "counted", *RUN, f"loss.class_weights={counted}")
    assert weights_of(tmp_path / "balanced", *BALANCED) == same != listed


def test_a_run_with_counted_weights_resumes_with_the_same(tmp_path: Path) -> None:
    whole = weights_of(tmp_path / "whole", *BALANCED)
    weights_of(tmp_path / "parts", *BALANCED, stop_at=5)
    assert weights_of(tmp_path / "parts", *BALANCED) == whole


def test_an_evaluation_has_the_weights_that_training_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched("loss.class_weights=balanced", "hydra.run.dir=run")
    run = load_run("run")
    values = evaluate(run, "test")
    assert values["test/loss"] == read_json(Path("run/summary.json"))["test"]["test/loss"]
    record = read_json(Path("run/preprocessing.json"))
    assert run.task.loss_fn.class_weights == record["class_weights"] != [1.0, 1.0, 1.0]
    for wrong in (None, [{"_target_": "builtins.print"}] * 3):
        write_json(Path("run/preprocessing.json"), {**record, "class_weights": wrong})
        with pytest.raises(UserError, match=r"lacks the class_weights of loss.class_weights=bal"):
            load_run("run")


def test_an_unknown_name_and_weights_that_nothing_counted_are_refused() -> None:
    fields: dict[str, Any] = {"label_smoothing": 0.0, "ignore_index": None}
    with pytest.raises(UserError, match=r"^loss.class_weights=balanced: outside a run"):
        CrossEntropy(class_weights="balanced", **fields)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^loss.class_weights=\[-1\] holds a negative number"):
        CrossEntropy(class_weights={"cat": -1}, **fields)
    config = config_of(*TINY, "task.class_names=[cat,dog,cow]", "loss.class_weights={cats: 3}")
    loss = instantiate(config["loss"])
    with pytest.raises(UserError, match=r"there is no class cats\. Did you mean cat\? The classes"):
        instantiate(config["task"], loss=loss)
