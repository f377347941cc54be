"""task=language: losses and metrics over tokens, however a batch is split."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from running import Bench, batch_of
from torch import Tensor

from lab.models.gpt import GPT
from lab.tasks import metrics
from lab.tasks.losses import CrossEntropy, LossOutput
from lab.tasks.metrics import Metrics
from lab.tasks.tasks import Language
from regrow.errors import UserError
from regrow.feeding.tokens import IGNORED

CPU = torch.device("cpu")
TOKENS, LENGTH = 11, 6
PLAIN = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)


def task(loss: object = PLAIN) -> Language:
    made = Language(num_classes=TOKENS, monitor="val/loss", extra_metrics=None, loss=loss)  # type: ignore[arg-type]
    made.vocabulary = {"kind": "characters", "content": "abcdefghiß"}
    return made


def model(**changes: int | bool) -> GPT:
    torch.manual_seed(0)
    shape = {"layers": 2, "heads": 2, "width": 8, "bias": True, **changes}
    return GPT(input_shape=[LENGTH], num_outputs=TOKENS, dropout=0.0, freeze=[], **shape)  # type: ignore[arg-type]


def examples(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Windows of which some end early, as the last one of a text does."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(TOKENS, (count, LENGTH + 1), generator=random)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].clone()
    for index in range(0, count, 3):
        targets[index, 1 + index % LENGTH :] = IGNORED
    return inputs, targets


def parts(count: int, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, targets = examples(count)
    yield from zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True)


def one_step(slices: int, loss: object = PLAIN) -> tuple[dict[str, float], dict[str, Tensor]]:
    bench = Bench(
        model(), task(loss), lambda groups: torch.optim.SGD(groups, lr=0.5), slices=slices
    )
    line = bench.step(batch_of(*examples(7)))
    return line, bench.state.model.state_dict()


def test_a_step_in_micro_batches_is_the_mean_over_tokens() -> None:
    inputs, targets = examples(7)
    expected = F.cross_entropy(model()(inputs).flatten(0, 1), targets.flatten())
    whole, weights = one_step(1)
    assert whole["train/loss"] == pytest.approx(expected.item(), abs=1e-6)
    for slices in (2, 3, 7, 9):
        line, same = one_step(slices)
        assert line["train/loss"] == pytest.approx(expected.item(), abs=1e-6)
        assert line["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], abs=1e-6)
        for name, tensor in weights.items():
            assert torch.allclose(same[name], tensor, atol=1e-6), name


def test_a_mean_of_the_examples_means_would_be_found() -> None:
    """The negative control: windows that end early would count like whole ones."""
    inputs, targets = examples(7)
    outputs = model()(inputs).detach()
    each = [F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)]
    assert abs(float(torch.stack(each).mean()) - one_step(1)[0]["train/loss"]) > 1e-3


def test_a_loss_of_ones_own_never_sees_an_ignored_target() -> None:
    def own(outputs: Tensor, targets: Tensor) -> LossOutput:
        assert outputs.shape == (len(targets), TOKENS) and int(targets.min()) >= 0
        values = F.cross_entropy(outputs, targets, reduction="none")
        return LossOutput(2 * values, components={"plain": values})

    line = one_step(3, own)[0]
    assert line["train/loss"] == pytest.approx(2 * one_step(1)[0]["train/loss"], abs=1e-6)
    assert line["train/loss_plain"] == pytest.approx(line["train/loss"] / 2, abs=1e-6)


@pytest.mark.parametrize("sizes", [(8,), (1, 7), (3, 0, 4, 1)])
def test_metrics_are_over_tokens_for_any_batches(sizes: tuple[int, ...]) -> None:
    net, made = model(), task()
    found = made.metrics(CPU)
    for inputs, targets in parts(8, sizes):
        found.update(net(inputs).detach(), targets, None)
    inputs, targets = examples(8)
    outputs, kept = net(inputs).detach().double(), targets != IGNORED
    losses = F.cross_entropy(outputs[kept], targets[kept], reduction="none")
    num_bytes = torch.tensor([0, *[1] * 9, 2])[targets[kept]].sum()
    values = found.scalars()
    assert tuple(values) == found.names == ("perplexity", "accuracy", "bits_per_byte")
    assert values["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert values["bits_per_byte"] == pytest.approx(
        float(losses.sum() / math.log(2) / num_bytes), rel=1e-6
    )
    right = (outputs.argmax(-1) == targets)[kept].double().mean()
    assert values["accuracy"] == pytest.approx(float(right), abs=1e-12)
    assert found.details() == {}
    # The control: a mean over windows is another number.
    each = [F.cross_entropy(o, t) for o, t in zip(outputs, targets, strict=True)]
    assert values["perplexity"] != pytest.approx(math.exp(torch.stack(each).mean()), rel=1e-4)


def test_smoothed_labels_do_not_change_the_metrics() -> None:
    smooth = CrossEntropy(label_smoothing=0.2, class_weights=None, ignore_index=None)
    inputs, targets = examples(4)
    outputs, values = model()(inputs).detach(), []
    for loss in (PLAIN, smooth):
        found = task(loss).metrics(CPU)
        found.update(outputs, targets, None)
        values.append(found.scalars())
    assert values[0] == values[1]
    lossy = [task(loss).loss(outputs, targets, None) for loss in (PLAIN, smooth)]
    assert not torch.equal(lossy[0].values, lossy[1].values)


def test_the_ignored_token_of_the_loss_does_not_count_in_the_metrics() -> None:
    inputs, targets = examples(4)
    ignored = int(targets[targets != IGNORED][0])
    outputs, values = model()(inputs).detach(), []
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=ignored)
    without = targets.where(targets != ignored, IGNORED)
    for made, its in ((task(loss), targets), (task(), without), (task(), targets)):
        found = made.metrics(CPU)
        found.update(outputs, its, None)
        values.append(found.scalars())
    assert values[0] == values[1] != values[2]


def test_without_a_vocabulary_bytes_are_unknown() -> None:
    made = task()
    made.vocabulary = None
    assert made.metrics(CPU).names == ("perplexity", "accuracy")
    assert set(made.metrics(CPU).scalars()) == {"perplexity", "accuracy"}


def test_fifty_thousand_tokens_need_no_table() -> None:
    made = Language(num_classes=50_000, monitor="val/loss", extra_metrics=None, loss=PLAIN)
    found = made.metrics(CPU)
    outputs = torch.zeros(2, 8, 50_000)
    found.update(outputs, torch.arange(16).view(2, 8), None)
    assert found.scalars()["perplexity"] == pytest.approx(50_000, rel=1e-5)
    held = [v for m in (found._metrics or {}).values() for v in m.metric_state.values()]
    assert sum(value.numel() for value in held) < 10


def test_many_classes_are_counted_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(40, 5, generator=random)
    targets = torch.randint(5, (40,), generator=random)
    values = []
    for most in (5, 4):
        monkeypatch.setattr(metrics, "MAX_CONFUSION", most)
        recipe = metrics.multiclass_metrics(list("abcde"), None, per_class=True, auroc=True)
        found = Metrics(recipe, CPU)
        for index in range(4):
            found.update(outputs[index::4], targets[index::4])
        values.append(found.scalars())
        assert ("confusion_matrix" in found.details()) is (most == 5)
    assert values[0] == values[1] and len(values[0]) == 30


def test_the_model_sees_no_later_token() -> None:
    net = model().eval()
    inputs, _ = examples(2)
    later = inputs.clone()
    later[:, 4:] = (later[:, 4:] + 1) % TOKENS
    one, other = net(inputs), net(later)
    assert torch.equal(one[:, :4], other[:, :4]) and not torch.allclose(one[:, 4:], other[:, 4:])
    assert torch.allclose(net(inputs[:, :3]), one[:, :3], atol=1e-6)  # a shorter text


def test_the_defaults_have_eight_hundred_thousand_parameters_and_tied_weights() -> None:
    shape = {"layers": 4, "heads": 4, "width": 128, "dropout": 0.0, "bias": True}
    net = GPT(input_shape=[64], num_outputs=76, freeze=[], **shape)  # type: ignore[arg-type]
    assert sum(p.numel() for p in net.parameters()) == 811_264
    assert len(net.state_dict()) == 2 + 4 * 12 + 2
    net(torch.zeros(1, 3, dtype=torch.int64))[..., 5].sum().backward()
    gradient = net.token_embedding.weight.grad
    assert gradient is not None and bool(gradient[5].any()) and not bool(gradient[6].any())
    ends = net.blocks[0].mlp.project.weight.std().item()  # type: ignore[union-attr]
    assert ends == pytest.approx(0.02 / math.sqrt(8), rel=0.05)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (
            torch.zeros(2, 3, 5),
            torch.zeros(2, 3, dtype=torch.int64),
            r"\(B, T, 11\), got \(B, 3, 5\)\. Give the model 11 outputs\. A model that takes",
        ),
        (torch.zeros(2, 3, 11), torch.zeros(2, dtype=torch.int64), r"per place, \(2, 3\)"),
        (torch.zeros(2, 3, 11), torch.zeros(2, 3), "torch.float32 of shape"),
        (torch.zeros(2, 3, 11), torch.zeros(2, 3).int(), r"torch.int32 .* give targets.long\(\)"),
        (torch.zeros(1, 1, 11), torch.tensor([[11]]), "got token 11 with data.num_classes=11"),
        (torch.zeros(1, 1, 11), torch.tensor([[-1]]), "got token -1"),
    ],
)
def test_a_batch_that_does_not_fit_is_one_line(
    outputs: Tensor, targets: Tensor, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        task().check(outputs, targets)


def test_a_model_of_tokens_refuses_images_and_heads_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="this model needs tokens"):
        GPT(
            **{"input_shape": [1, 8, 8], "num_outputs": 10, "layers": 1, "heads": 1, "width": 4},
            **{"dropout": 0.0, "bias": True, "freeze": []},
        )  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.heads=3 does not divide model\.width=8"):
        model(heads=3)
