"""Every loss equals torch's, if torch has it, and is the same in micro-batches and as a whole."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.tasks.custom import mse_plus_mae
from lab.tasks.losses import (
    FEW_CLASSES,
    BCEWithLogits,
    CrossEntropy,
    LossOutput,
    huber,
    l1,
    mse,
    smooth_l1,
    weighted,
)
from regrow.errors import UserError

torch.set_num_threads(1)
B, C = 23, 5
CLASS_WEIGHTS = [0.2, 1.0, 3.0, 0.7, 2.0]


def cross_entropy(**changed: Any) -> CrossEntropy:
    return CrossEntropy(
        **{"label_smoothing": 0.0, "class_weights": None, "ignore_index": None} | changed
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def indices(*shape: int, high: int = C) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def sums(result: Any, weights: Tensor | None = None, size: int = B) -> Tensor:
    """Numerator and divisor, as the loop sums them."""
    values, weights, _ = weighted(result, weights, size)
    if weights is None:
        return torch.stack([values.sum(), torch.tensor(float(values.numel())).double()])
    return torch.stack([(values * weights).sum(), weights.sum()])


def mean(result: Any, size: int = B) -> Tensor:
    numerator, divisor = sums(result, size=size)
    return numerator / divisor


def ignoring(targets: Tensor, index: int) -> Tensor:
    return targets.where(torch.arange(targets.numel()).view(targets.shape) % 4 != 0, index)


SOFT = drawn(B, C, seed=3).softmax(1)
BITS = indices(B, C, high=2).double()
CASES: dict[str, tuple[Callable[..., Any], Tensor, Tensor]] = {
    "cross_entropy": (cross_entropy(), drawn(B, C), indices(B)),
    "smoothing": (cross_entropy(label_smoothing=0.1), drawn(B, C), indices(B)),
    "class_weights": (cross_entropy(class_weights=CLASS_WEIGHTS), drawn(B, C), indices(B)),
    "smoothing_and_class_weights": (
        cross_entropy(label_smoothing=0.1, class_weights=CLASS_WEIGHTS),
        drawn(B, C),
        indices(B),
    ),
    "ignored": (cross_entropy(ignore_index=255), drawn(B, C), ignoring(indices(B), 255)),
    "ignored_everything_else_on": (
        cross_entropy(ignore_index=2, label_smoothing=0.2, class_weights=CLASS_WEIGHTS),
        drawn(B, C),
        indices(B),
    ),
    "soft": (cross_entropy(label_smoothing=0.1), drawn(B, C), SOFT),
    "soft_class_weights": (cross_entropy(class_weights=CLASS_WEIGHTS), drawn(B, C), SOFT),
    "tokens": (
        cross_entropy(ignore_index=-1, class_weights=CLASS_WEIGHTS, label_smoothing=0.1),
        drawn(B, C, 7),
        ignoring(indices(B, 7), -1),
    ),
    "tokens_smoothed": (cross_entropy(label_smoothing=0.1), drawn(B, C, 7), indices(B, 7)),
    "tokens_plain": (cross_entropy(), drawn(B, C, 7), indices(B, 7)),
    "binary": (BCEWithLogits(pos_weight=3.0), drawn(B, 1), indices(B, high=2)),
    "multilabel": (BCEWithLogits(pos_weight=CLASS_WEIGHTS), drawn(B, C), BITS),
    "mse": (mse, drawn(B, 2), drawn(B, 2, seed=1)),
    "l1": (l1, drawn(B, 1), drawn(B, seed=1)),
    "smooth_l1": (functools.partial(smooth_l1, beta=0.3), drawn(B), drawn(B, 1, seed=1)),
    "huber": (functools.partial(huber, delta=0.4), drawn(B), drawn(B, seed=1)),
    "mse_plus_mae": (functools.partial(mse_plus_mae, mae_factor=0.1), drawn(B), drawn(B, seed=1)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_sample_weights", [False, True])
def test_micro_batches_added_and_divided_once_give_the_whole_batch(
    case: str, with_sample_weights: bool
) -> None:
    loss, outputs, targets = CASES[case]
    weights = drawn(B, seed=5).abs() if with_sample_weights else None
    whole_outputs = outputs.clone().requires_grad_()
    numerator, divisor = sums(loss(whole_outputs, targets), weights)
    whole = numerator / divisor
    whole.backward()

    sliced_outputs = outputs.clone().requires_grad_()
    total, means = torch.zeros(2, dtype=torch.float64), []
    for part in torch.arange(B).split(9):  # 9, 9 and 5
        result = loss(sliced_outputs[part], targets[part])
        part_sums = sums(result, None if weights is None else weights[part], len(part))
        total = total + part_sums
        means.append((part_sums[0] / part_sums[1]).detach())
    sliced = total[0] / total[1]
    sliced.backward()

    assert abs(sliced - whole) < 1e-12
    assert whole_outputs.grad is not None and sliced_outputs.grad is not None
    torch.testing.assert_close(sliced_outputs.grad, whole_outputs.grad, atol=1e-12, rtol=0)
    assert abs(torch.stack(means).mean() - whole) > 1e-6  # a common mistake


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
@pytest.mark.parametrize("ignore_index", [None, 2, -100, 255])
@pytest.mark.parametrize("shape", [(B,), (B, 7)])
def test_cross_entropy_is_torchs_mean(
    smoothing: float,
    class_weights: list[float] | None,
    ignore_index: int | None,
    shape: tuple[int, ...],
) -> None:
    outputs, targets = drawn(shape[0], C, *shape[1:]), indices(*shape)
    if ignore_index is not None:
        targets = ignoring(targets, ignore_index)
    ours = cross_entropy(
        label_smoothing=smoothing, class_weights=class_weights, ignore_index=ignore_index
    )
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    reference = F.cross_entropy(
        outputs,
        targets,
        weight=weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=smoothing,
    )
    assert abs(mean(ours(outputs, targets)) - reference) < 1e-12


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weights", [None, CLASS_WEIGHTS])
def test_cross_entropy_with_probabilities_is_torchs_mean(
    smoothing: float, class_weights: list[float] | None
) -> None:
    ours = cross_entropy(label_smoothing=smoothing, class_weights=class_weights)
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    reference = F.cross_entropy(drawn(B, C), SOFT, weight=weight, label_smoothing=smoothing)
    assert abs(mean(ours(drawn(B, C), SOFT)) - reference) < 1e-12


def test_a_class_of_weight_zero_adds_nothing() -> None:
    outputs, targets = drawn(B, C), indices(B)
    loss = cross_entropy(class_weights=[0.0, 1.0, 1.0, 1.0, 1.0])
    kept = targets != 0
    assert 0 < kept.sum() < B
    reference = F.cross_entropy(outputs[kept], targets[kept])
    assert abs(mean(loss(outputs, targets)) - reference) < 1e-12


def test_a_batch_of_ignored_targets_alone_has_weight_zero_and_finite_gradients() -> None:
    outputs = drawn(4, C).requires_grad_()
    result = cross_entropy(ignore_index=-1, class_weights=CLASS_WEIGHTS, label_smoothing=0.1)(
        outputs, torch.full((4,), -1)
    )
    numerator, divisor = sums(result, size=4)
    assert (numerator.item(), divisor.item()) == (0.0, 0.0)
    numerator.backward()
    assert outputs.grad is not None and (outputs.grad == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("target", [-100, -1, C])
def test_torchs_default_ignore_index_is_out_of_bounds(smoothing: float, target: int) -> None:
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        cross_entropy(label_smoothing=smoothing)(drawn(2, C), torch.tensor([1, target]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [indices(B - 1), indices(B, 2), indices(B).int()])
def test_targets_of_another_shape_or_type_are_refused(smoothing: float, targets: Tensor) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        cross_entropy(label_smoothing=smoothing)(drawn(B, C), targets)


@pytest.mark.parametrize("classes", [2, C, FEW_CLASSES, FEW_CLASSES + 1])
def test_smoothing_is_torchs_for_few_and_many_classes(classes: int) -> None:
    outputs, targets = drawn(B, classes), indices(B, high=classes)
    found = cross_entropy(label_smoothing=0.1)(outputs, targets).values
    torch.testing.assert_close(
        found, F.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)
    )


@pytest.mark.parametrize(
    ("case", "reference"),
    [
        ("mse", F.mse_loss),
        ("l1", lambda o, t: F.l1_loss(o[:, 0], t)),
        ("smooth_l1", lambda o, t: F.smooth_l1_loss(o, t[:, 0], beta=0.3)),
        ("huber", lambda o, t: F.huber_loss(o, t, delta=0.4)),
        (
            "binary",
            lambda o, t: F.binary_cross_entropy_with_logits(
                o[:, 0], t.double(), pos_weight=torch.tensor(3.0).double()
            ),
        ),
        (
            "multilabel",
            lambda o, t: F.binary_cross_entropy_with_logits(
                o, t, pos_weight=torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
            ),
        ),
        ("mse_plus_mae", lambda o, t: F.mse_loss(o, t) + 0.1 * F.l1_loss(o, t)),
    ],
)
def test_the_other_losses_are_torchs_means(
    case: str, reference: Callable[[Tensor, Tensor], Tensor]
) -> None:
    loss, outputs, targets = CASES[case]
    assert abs(mean(loss(outputs, targets)) - reference(outputs, targets)) < 1e-12


def test_the_custom_loss_logs_both_parts() -> None:
    loss, outputs, targets = CASES["mse_plus_mae"]
    output = loss(outputs, targets)
    assert set(output.components) == {"mse", "mae"}
    together = output.components["mse"] + 0.1 * output.components["mae"]
    torch.testing.assert_close(output.values, together)


@pytest.mark.parametrize("loss", [mse, l1, BCEWithLogits(pos_weight=None)])
@pytest.mark.parametrize("shapes", [((8, 2), (8,)), ((8,), (8, 2)), ((8, 1), (1, 8)), ((8,), (1,))])
def test_nothing_is_broadcast(
    loss: Callable[..., Any], shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    outputs, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(UserError, match="shape"):
        loss(outputs, targets)
    if loss is l1 and shapes == ((8, 1), (1, 8)):  # what torch does instead
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert F.l1_loss(outputs, targets, reduction="none").shape == (8, 8)


@pytest.mark.parametrize("case", ["cross_entropy", "smoothing", "soft", "multilabel", "mse", "l1"])
def test_weights_stay_none_where_all_are_one(case: str) -> None:
    loss, outputs, targets = CASES[case]
    assert weighted(loss(outputs, targets), None, B).weights is None


def test_half_precision_outputs_are_summed_in_float32() -> None:
    outputs = drawn(B, C).to(torch.bfloat16)
    assert cross_entropy()(outputs, indices(B)).values.dtype == torch.float32
    assert mse(outputs, drawn(B, C).float()).dtype == torch.float32


def test_a_first_call_in_inference_mode_leaves_training_possible() -> None:
    for loss, outputs, targets in (
        (cross_entropy(class_weights=[0.11, 0.22]), torch.randn(3, 2), torch.tensor([0, 1, 1])),
        (BCEWithLogits(pos_weight=0.33), torch.randn(3), torch.ones(3)),
    ):
        with torch.inference_mode():
            loss(outputs, targets)
        sums(loss(outputs.clone().requires_grad_(), targets), size=3)[0].backward()


def test_a_loss_may_return_values_or_a_pair_or_a_single_number() -> None:
    values, weights = torch.arange(4.0), torch.tensor([1.0, 0.0, 2.0, 1.0])
    assert weighted(values, None, 4).weights is None
    assert weighted((values, weights), weights, 4).weights is not None
    combined = weighted((values, weights), weights, 4).weights
    torch.testing.assert_close(combined, torch.tensor([1.0, 0.0, 4.0, 1.0]))
    single = weighted(LossOutput(torch.tensor(3.0), None, {"part": torch.tensor(1.0)}), None, 4)
    assert single.values.shape == (4,) and single.values.mean() == 3
    assert single.components["part"].sum() == 4  # the loop divides it by four
    tokens = weighted(LossOutput(torch.ones(4, 3)), weights, 4)
    assert tokens.weights is not None and tokens.weights.sum() == 12


def test_a_loss_over_pairs_is_the_mean_over_them() -> None:
    pairs = torch.arange(6.0)  # of four examples
    assert weighted(pairs, None, 4).weights is not None  # the loop divides by four without
    total, weight = sums(weighted(pairs, None, 4), size=4)
    assert total / weight == pairs.mean()
    with pytest.raises(UserError, match="6 values for 4 examples that have weights"):
        weighted(pairs, torch.ones(4), 4)
    assert weighted(pairs, torch.zeros(1), 1).weights is not None  # a share without examples


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: cross_entropy(label_smoothing=1.5), "loss.label_smoothing=1.5"),
        (lambda: cross_entropy(class_weights=[1.0, -1.0]), "loss.class_weights"),
        (lambda: cross_entropy(class_weights=[0.0, 0.0]), "loss.class_weights"),
        (lambda: cross_entropy(class_weights=[0.0, 1.0], label_smoothing=0.1), "ignore_index"),
        (lambda: BCEWithLogits(pos_weight=0.0), "loss.pos_weight=0.0"),
    ],
)
def test_options_out_of_range_are_named(make: Callable[[], object], key: str) -> None:
    with pytest.raises(UserError, match=key):
        make()


def test_torch_refuses_what_the_check_of_a_config_would() -> None:
    one = torch.zeros(1)
    for loss in (functools.partial(huber, delta=0.0), functools.partial(smooth_l1, beta=-1.0)):
        with pytest.raises(RuntimeError, match="does not support n"):
            loss(one, one)
