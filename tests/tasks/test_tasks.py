"""Checks of the first batch, predictions, and the cost of a step."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.tasks.losses import BCEWithLogits, CrossEntropy, Loss, mse
from lab.tasks.tasks import Binary, Multiclass, Multilabel, Regression
from regrow.errors import UserError
from regrow.protocols import Task

torch.set_num_threads(1)
CE = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)
BCE = BCEWithLogits(pos_weight=None)
SAME: dict[str, Any] = {"monitor": "val/accuracy"}


def multiclass(loss: Loss = CE, num_classes: int = 10) -> Multiclass:
    return Multiclass(
        num_classes=num_classes,
        class_names=None,
        per_class=True,
        auroc=True,
        extra_metrics=None,
        loss=loss,
        **SAME,
    )


def binary(loss: Loss = BCE, threshold: float = 0.5) -> Binary:
    return Binary(
        class_names=None, threshold=threshold, auroc=True, extra_metrics=None, loss=loss, **SAME
    )


def multilabel(loss: Loss = BCE, num_classes: int = 4) -> Multilabel:
    return Multilabel(
        num_classes=num_classes,
        class_names=None,
        threshold=0.5,
        per_class=True,
        auroc=True,
        extra_metrics=None,
        loss=loss,
        **SAME,
    )


def regression(loss: Loss = mse, num_outputs: int = 1) -> Regression:
    return Regression(
        num_outputs=num_outputs,
        monitor="val/rmse",
        target_names=None,
        per_target=True,
        extra_metrics=None,
        loss=loss,
    )


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2


GOOD: list[tuple[Task, Tensor, Tensor]] = [
    (multiclass(), logits(32, 10), ones(32)),
    (multiclass(), logits(32, 10), logits(32, 10).softmax(1)),
    (multiclass(), logits(32, 10, 5), ones(32, 5)),
    (multiclass(CrossEntropy(label_smoothing=0, class_weights=None, ignore_index=255)),
     logits(3, 10), torch.tensor([255, 1, 2])),
    (binary(), logits(32, 1), ones(32)),
    (binary(), logits(32), ones(32, 1).bool()),
    (binary(), logits(32, 1), ones(32).float()),
    (multilabel(), logits(32, 4), ones(32, 4)),
    (regression(), logits(32, 1), logits(32)),
    (regression(num_outputs=2), logits(32, 5, 2), logits(32, 5, 2)),  # two series of five steps
    (regression(), logits(32), logits(32, 1).double()),
    (regression(num_outputs=3), logits(32, 3), logits(32, 3)),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(GOOD)))
def test_a_batch_that_fits_passes_and_has_one_value_per_example(case: int) -> None:
    task, outputs, targets = GOOD[case]
    task.check(outputs, targets)
    values, weights, _ = task.loss(outputs, targets, None)
    assert values.shape[0] == outputs.shape[0] and values.isfinite().all()
    assert weights is None or weights.shape == values.shape
    score = task.running(outputs, targets)
    assert score is None or score.shape == (outputs.shape[0],)


BAD: list[tuple[Task, Tensor, Tensor, str]] = [
    (multilabel(), logits(32, 4), ones(32),
     r"task=multilabel needs targets of shape \(B, C\), got \(32,\). For class indices use "
     "task=multiclass."),
    (multilabel(), logits(32, 4), ones(32, 3), r"\(B, 4\), got \(32, 3\)"),
    (multilabel(), logits(32, 3), ones(32, 4), "model.num_outputs"),
    (multilabel(), logits(32, 4), 2 * ones(32, 4), "targets of 0 and 1, got 2 to 2"),
    (multiclass(), logits(32, 5), ones(32),
     r"outputs of shape \(B, 10\), got \(B, 5\)\. Give the model 10 outputs\. A model that takes "
     r"their number gets it by model.num_outputs=\$\{data.num_outputs\}\.$"),
    (multiclass(), logits(32, 10, 6, 5), ones(32),
     r"of shape \(B, 10\), got \(B, 10, 6, 5\)\. Pool over dimensions \(2, 3\) in forward: "
     r"outputs\.mean\(\(2, 3\)\)\.$"),
    (multiclass(), logits(32, 64, 6, 5), logits(32, 10).softmax(1),
     r"forward: outputs\.mean\(\(2, 3\)\), and end in 10 outputs\.$"),
    (multiclass(), logits(32, 10, 1, 1), ones(32), r"Flatten in forward: outputs\.flatten\(1\)\.$"),
    (multiclass(), logits(32, 7, 10), ones(32),
     r"got \(B, 7, 10\)\. Pool over the sequence in forward: outputs\.mean\(1\)\.$"),
    (multiclass(), logits(32, 7, 64), ones(32), r"mean\(1\) or \.mean\(2\), and end in 10 outputs"),
    (multiclass(), logits(32, 64, 6), ones(32, 6), r"\(B, 64, 6\)\. Give the model 10 outputs"),
    (binary(), logits(32, 1, 4, 4), ones(32), r"forward: outputs\.mean\(\(2, 3\)\)\.$"),
    (multilabel(), logits(32, 4, 6), ones(32, 4), r"Pool over dimension 2 .*mean\(2\)\.$"),
    (multiclass(), logits(32, 5), ones(31), r"outputs of shape \(B, 10\), got \(32, 5\)"),
    (multiclass(), logits(32), ones(32), "outputs of shape"),
    (multiclass(), logits(), ones(32), r"outputs of shape \(B, 10\), got \(\)\. Give the model 10"),
    (multiclass(), logits(32, 10), ones(32, 10), "use task=multilabel"),
    (multiclass(), logits(32, 10), ones(32, 1), r"class indices of shape \(32,\), got \(32, 1\)"),
    (multiclass(), logits(32, 10), ones(31), r"class indices of shape \(32,\), got \(31,\)"),
    (multiclass(), logits(32, 10), ones(32).float(), "use task=regression"),
    (multiclass(), logits(32, 10), ones(32).int(), "torch.int32"),
    (multiclass(), logits(32, 10), ones(32, 10).float(), "sum to one"),
    (multiclass(), logits(32, 10), 10 * ones(32), "class index 10 with data.num_classes=10"),
    (multiclass(), logits(32, 10), -ones(32), "class index -1.*loss.ignore_index"),
    (multiclass(), ones(32, 10), ones(32), "floating-point tensor, got torch.int64"),
    (binary(), logits(32, 2), ones(32), r"\(B, 1\), got \(B, 2\)\. Set data.num_outputs=1"),
    (binary(), logits(32, 1), ones(32, 2), "task=multilabel"),
    (binary(), logits(32, 1), ones(31), r"targets of shape \(B,\), got \(31,\)"),
    (binary(), logits(32, 1), 3 * ones(32), "task=multiclass"),
    (binary(), logits(32, 1), torch.full((32,), torch.nan), "targets of 0 and 1"),
    (regression(), logits(32, 1), ones(32), "task=multiclass"),
    (regression(), logits(32, 2), logits(32), "data.num_outputs"),
    (regression(num_outputs=2), logits(32, 4), logits(32, 4),
     r"outputs of shape \(B, …, 2\), got \(B, 4\)\. Make data\.num_outputs the size of the last"),
    (regression(num_outputs=2), logits(32), logits(32),
     r"outputs of shape \(B, …, 2\), got \(B,\)"),
    (regression(), logits(32, 1), torch.full((32,), torch.inf), "NaN or infinite"),
    (regression(lambda o, t: (o - t).square().mean()), logits(32), logits(32),
     r"^loss \(\w+\.<lambda>\): it returned values of shape"),
    (regression(lambda o, t: (o - t, torch.ones(3))), logits(32), logits(32), "weights of shape"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_a_batch_that_does_not_fit_is_named_with_a_way_out(case: int) -> None:
    task, outputs, targets, message = BAD[case]
    with pytest.raises(UserError, match=message) as error:
        task.check(outputs, targets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: regression(CE),
        lambda: multiclass(BCE),
        lambda: multiclass(
            CrossEntropy(label_smoothing=0, class_weights=[1, 2], ignore_index=None)
        ),
        lambda: multilabel(BCEWithLogits(pos_weight=[1.0, 2.0])),
        lambda: binary(threshold=1.0),
        lambda: Multiclass(
            num_classes=3,
            class_names=["a", "b"],
            per_class=True,
            auroc=True,
            extra_metrics=None,
            loss=CE,
            **SAME,
        ),
        lambda: Multiclass(
            num_classes=2,
            class_names=["a", "a"],
            per_class=True,
            auroc=True,
            extra_metrics=None,
            loss=CE,
            **SAME,
        ),
    ],
)
def test_a_task_that_cannot_be_is_refused_when_it_is_made(make: Any) -> None:
    with pytest.raises(UserError, match=r"(loss|task|data)[.=]"):
        make()


class Ending(nn.Module):
    """A fresh model with an output layer that it should not have."""

    def __init__(self, num_outputs: int, last: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, num_outputs), last, nn.Flatten()
        )

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


@pytest.mark.parametrize("size", [1, 2, 32])
@pytest.mark.parametrize("grad", [True, False])
def test_a_softmax_before_cross_entropy_is_found(size: int, grad: bool) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = torch.randn(size, 8)
        with torch.set_grad_enabled(grad), pytest.raises(UserError, match="ends in a softmax"):
            multiclass().check(Ending(10, nn.Softmax(1))(inputs), ones(size))
        with torch.set_grad_enabled(grad):  # accepted without a softmax
            for last in (nn.Identity(), nn.ReLU(), nn.LogSoftmax(1), nn.Sigmoid()):
                multiclass().check(Ending(10, last)(inputs), ones(size))


@pytest.mark.parametrize("task", [binary(), multilabel()])
@pytest.mark.parametrize("size", [2, 32])
@pytest.mark.parametrize("grad", [True, False])
def test_a_sigmoid_before_bce_with_logits_is_found(task: Task, size: int, grad: bool) -> None:
    num_outputs = 1 if task.kind == "binary" else 4
    targets = ones(size, num_outputs)
    for seed in range(20):
        torch.manual_seed(seed)
        with torch.set_grad_enabled(grad):
            outputs = Ending(num_outputs, nn.Sigmoid())(torch.randn(size, 8))
            with pytest.raises(UserError, match="ends in a sigmoid"):
                task.check(outputs, targets)
    surely = torch.tensor([[0.001], [0.999]]).expand(2, num_outputs)  # as from a trained model
    with pytest.raises(UserError, match="ends in a sigmoid"):
        task.check(surely, targets[:2])


def test_logits_are_not_taken_for_a_sigmoid() -> None:
    """Fresh models, whose logits are often on one side of zero, and outputs near [0, 1]."""
    wrong = 0
    for seed in range(200):
        torch.manual_seed(seed)
        for last in (nn.Identity(), nn.ReLU()):
            outputs = Ending(1, last)(torch.randn(64, 8))
            binary().check(outputs, ones(64))
            binary().check(outputs[:4], ones(4))  # the graph shows it
            try:
                binary().check(outputs.detach(), ones(64))
            except UserError:
                wrong += 1
    assert wrong <= 8  # of 400 narrow models without a graph
    binary().check(torch.zeros(4, 1), ones(4))  # a head that starts at zero
    binary().check(torch.linspace(0, 1.5, 8), ones(8))
    mse_on_probabilities = Binary(
        class_names=None, threshold=0.5, auroc=True, extra_metrics=None, loss=mse, **SAME
    )  # a loss that takes probabilities
    mse_on_probabilities.check(torch.rand(8), ones(8))


def test_predictions_have_the_shapes_scripts_rely_on() -> None:
    found = multiclass().predict(logits(6, 10))
    assert found["prediction"].shape == (6,) and found["probability"].shape == (6, 10)
    torch.testing.assert_close(found["probability"].sum(1), torch.ones(6).double())
    assert (found["probability"].argmax(1) == found["prediction"]).all()

    outputs = logits(6, 1)
    found = binary(threshold=0.8).predict(outputs)
    assert found["prediction"].shape == found["probability"].shape == (6,)
    assert (found["prediction"] == (found["probability"] > 0.8).long()).all()
    right = binary(threshold=0.8).running(outputs, found["prediction"])
    assert right is not None and right.all()

    found = multilabel().predict(logits(6, 4))
    assert found["prediction"].shape == found["probability"].shape == (6, 4)
    assert set(found["prediction"].flatten().tolist()) == {0, 1}

    assert regression().predict(logits(6, 1))["prediction"].shape == (6,)
    assert regression().predict(logits(6, 3))["prediction"].shape == (6, 3)


def test_sample_weights_and_class_weights_multiply() -> None:
    loss = CrossEntropy(label_smoothing=0, class_weights=[1.0, 2.0, 4.0], ignore_index=None)
    task = multiclass(loss, num_classes=3)
    output = task.loss(logits(3, 3), torch.arange(3), torch.tensor([1.0, 0.0, 0.5]))
    assert output.weights is not None and output.weights.tolist() == [1, 0, 2]
    output = multiclass().loss(logits(3, 10), ones(3), None)
    assert output.weights is None


def test_a_task_knows_whether_its_loss_sums_over_examples() -> None:
    def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, None] - outputs[None]).abs().mean()

    contrast.sums_over_examples = False  # type: ignore[attr-defined]
    task = regression(functools.partial(contrast))
    assert not task.sums_over_examples and regression().sums_over_examples
    outputs = logits(5, 1)
    task.check(outputs, logits(5))
    values = task.loss(outputs, logits(5), None).values
    torch.testing.assert_close(values.mean(), contrast(outputs.squeeze(1), outputs))


def test_running_accuracy_is_hidden_where_targets_are_ignored() -> None:
    task = multiclass(CrossEntropy(label_smoothing=0, class_weights=None, ignore_index=-1))
    assert task.running_name is None and task.running(logits(3, 10), ones(3)) is None
    assert multiclass().running_name == "accuracy"
    right = multiclass().running(torch.eye(10)[:3], torch.tensor([0, 5, 2]))
    assert right is not None and right.tolist() == [True, False, True]


def test_a_soft_target_counts_as_the_nearer_label() -> None:
    right = binary().running(torch.tensor([2.0, 2.0, -2.0]), torch.tensor([0.7, 0.3, 0.2]))
    assert right is not None and right.tolist() == [True, False, True]
    outputs, targets = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[0.7, 0.3, 0.2, 0.0]])
    labels = multilabel().running(outputs, targets)
    assert labels is not None and labels.tolist() == [0.75]
    right = multiclass().running(torch.eye(10)[:2], torch.eye(10)[:2].flip(0) * 0.4 + 0.06)
    assert right is not None and right.tolist() == [False, False]


def test_a_step_does_as_many_operations_as_its_bare_form() -> None:
    """Counted, since times vary: log-softmax and its pick for the loss, two for the score."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        names: list[str]

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    for task, outputs, targets, most in (
        (multiclass(), logits(64, 10), ones(64), 4),
        (binary(), logits(64, 1), ones(64).float(), 6),  # one more, as targets may be soft
        (regression(), logits(64, 1), logits(64), 2),
    ):
        with Count() as count:
            count.names = []
            task.loss(outputs, targets, None)
            task.running(outputs, targets)
        assert len(count.names) <= most, count.names


@pytest.mark.slow
def test_a_run_up_to_its_first_evaluation_imports_neither_torchmetrics_nor_torchvision() -> None:
    code = (
        f"import sys, torch; sys.path[:0] = {sys.path}; from test_tasks import *; t = multiclass();"
        "t.check(logits(8, 10), ones(8)); t.loss(logits(8, 10), ones(8), None);"
        "m = t.metrics(torch.device('cpu')); m.update(logits(8, 10), ones(8), None);"
        "print([n for n in ('torchmetrics', 'torchvision') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.stdout.strip() == "[]", done.stderr
