"""Items in any form: the files of own_items.md and several_heads.md, trained and resumed."""

from __future__ import annotations

import importlib.util
import sys
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import without_pictures
from running import CPU, config_of, fingerprint
from running import train as trained
from test_recipes import RECIPES, blocks
from torch import Tensor

from lab.data.datasets import from_datasets
from regrow.checkpoint import writer
from regrow.errors import DataError, UserError
from regrow.feeding.batch import LoadedBatch, parts_of, tensors_of
from regrow.feeding.loaders import Data
from regrow.numerics.calls import call
from regrow.runs.training import build

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
QUICK = ("trainer.num_threads=1", "trainer.device=cpu", "trainer.max_steps=12")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The pages' files, their modules on Python's path. Yields the argument that finds conf/."""
    root = tmp_path_factory.mktemp("own")
    pages = [(RECIPES / f"{name}.md").read_text("utf-8") for name in ("own_items", "several_heads")]
    for file, content in blocks("\n".join(pages)):
        if file is not None:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text(content, encoding="utf-8")
    sys.path.append(str(root))
    yield f"hydra.searchpath=[file://{root / 'conf'}]"
    sys.path.remove(str(root))
    for name in ("heads", "rows"):
        sys.modules.pop(name, None)


def train(folder: Path, *overrides: str, stop_at: int | None = None) -> dict[str, Any]:
    with without_pictures():
        return trained(folder, *overrides, stop_at=stop_at)


def weights_of(folder: Path) -> dict[str, Any]:
    parts, _ = writer.load((folder / "checkpoints" / "last").resolve())
    return dict(parts["model"])


def close(one: Path, other: Path) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in ours)


@pytest.mark.slow
def test_two_heads_stopped_and_resumed_end_with_the_same_bits(page: str, tmp_path: Path) -> None:
    arguments = (page, "experiment=heads", *QUICK)
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "stopped", *arguments, stop_at=7)
    summary = train(tmp_path / "stopped", *arguments)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    assert {"test/digit_accuracy", "test/even_auroc", "test/loss"} <= {*summary["test"]}
    train(tmp_path / "slices", *arguments, "trainer.accumulation_steps=3")
    assert close(tmp_path / "slices", tmp_path / "whole")
    train(tmp_path / "other", *arguments, "optimizer.lr=0.002")
    assert not close(tmp_path / "other", tmp_path / "whole")  # the control


@pytest.mark.slow
def test_the_loss_of_two_heads_is_the_sum_of_theirs(page: str) -> None:
    objects = build(config_of(page, "experiment=heads", *QUICK), CPU)
    batch = next(iter(objects.data.evaluation("val", device=CPU.device)))
    assert {name: part.dtype for name, part in batch.targets.items()} == {
        "digit": torch.int64,
        "even": torch.float32,
    }
    assert batch.inputs.dtype == torch.float32  # the items are float64
    outputs = call(objects.state.model.eval(), batch.inputs)
    found = objects.task.loss(outputs, batch.targets, None)
    cross_entropy = torch.nn.functional.cross_entropy(
        outputs["digit"], batch.targets["digit"], reduction="none"
    )
    binary = torch.nn.functional.binary_cross_entropy_with_logits(
        outputs["even"].squeeze(1), batch.targets["even"], reduction="none"
    )
    assert torch.allclose(found.values, cross_entropy + binary)
    assert not torch.allclose(found.values, cross_entropy)  # the control
    assert {*found.components} == {"digit", "even"}


def test_the_class_weights_of_a_head_are_factors_of_its_loss(page: str) -> None:
    def parts(*overrides: str) -> tuple[Any, Tensor]:
        objects = build(config_of(page, "experiment=heads", *QUICK, *overrides), CPU)
        batch = next(iter(objects.data.evaluation("val", device=CPU.device)))
        outputs = call(objects.state.model.eval(), batch.inputs)
        return objects.task.loss(outputs, batch.targets, None).components, batch.targets["digit"]

    plain, digits = parts()
    weights = [float(digit) for digit in range(10)]
    weighed, _ = parts(f"task.tasks.digit.loss.class_weights={weights}")
    assert torch.allclose(weighed["digit"], plain["digit"] * digits)
    assert torch.equal(weighed["even"], plain["even"])  # the control


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="needs the extra lora")
def test_a_model_of_transformers_trains_on_rows_without_a_wrapper(
    page: str, tmp_path: Path
) -> None:
    still = ("+model.config.hidden_dropout_prob=0", "+model.config.attention_probs_dropout_prob=0")
    small = ("data.source.train.stop=200", "optimizer.lr=0.003", "trainer.max_steps=10")
    arguments = (page, "data=reviews", "model=tiny_bert", *QUICK, *small)
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "stopped", *arguments, stop_at=3)
    train(tmp_path / "stopped", *arguments)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    train(tmp_path / "still", *arguments, *still)
    # Micro-batches have their batch's padding. Dropout alone depends on them.
    train(tmp_path / "slices", *arguments, *still, "trainer.accumulation_steps=3")
    assert close(tmp_path / "slices", tmp_path / "still")
    assert not close(tmp_path / "whole", tmp_path / "still")  # the control


Item = dict[str, Any]


def ragged(items: list[Item]) -> tuple[Tensor, Tensor]:
    values = [item["values"] for item in items]
    padded = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
    return padded, torch.tensor([item["answer"] for item in items])


def data_of(train_items: Any, **options: Any) -> Any:
    node = {**config_of("data=synthetic", "data.source.num_val=0", *QUICK)["data"]}
    del node["_target_"], node["source"]
    own = {"normalize": "none", "augmentation": None, "batch_size": 4, "input_shape": None}
    collate = options.pop("collate", None)
    source = from_datasets(train=train_items, val=None, test=None, collate=collate)
    return Data(source=source, **{**node, **own, **options})


def first_batch(data: Any) -> LoadedBatch:
    batch: LoadedBatch = next(iter(data.train(device=CPU.device).epoch(0)))
    return batch


def test_ragged_rows_of_any_keys_become_batches_of_their_own_length() -> None:
    rows = [{"values": torch.arange(n % 5 + 1), "answer": n % 3, "id": f"{n}"} for n in range(12)]
    data = data_of(rows, collate=ragged, num_classes=3, num_outputs=3)
    lengths = set()
    for batch in data.train(device=CPU.device).epoch(0):
        assert batch.inputs.dtype == torch.int64 and len(batch.targets) == 4
        lengths.add(batch.inputs.shape[1])
    assert data.input_shape is None and data.preprocessing.input_shape is None
    assert lengths <= {1, 2, 3, 4, 5}
    with pytest.raises(DataError, match="items of the data set do not make a batch"):
        first_batch(data_of(rows, num_classes=3, num_outputs=3))


@pytest.mark.parametrize("targets", [{"a": 1.5, "b": 2}, (1.5, 2)])
def test_a_target_for_each_head_by_name_or_by_place(targets: Any) -> None:
    items = [(torch.full((3,), n, dtype=torch.float64), targets) for n in range(8)]
    batch = first_batch(data_of(items, target_kind=None, num_outputs=None, num_classes=None))
    one, other = parts_of(batch.targets)
    assert one.dtype == torch.float32 and other.dtype == torch.int64 and len(one) == 4
    assert isinstance(batch.targets, type(targets))
    halves = batch.split(2)
    assert [len(parts_of(half.targets)[1]) for half in halves] == [2, 2]
    (empty,) = batch.split(5)[4:]
    assert empty.num_local == 0 and empty.weights is not None and empty.weights.tolist() == [0]
    with pytest.raises(
        DataError, match=r"targets are .*, and data\.target_kind names a kind of one"
    ):
        first_batch(data_of(items, num_classes=3, num_outputs=3))


class Named(UserDict[str, Tensor]):
    """A mapping whose truth is not that of its length, as a TensorDict is."""

    def __bool__(self) -> bool:
        raise RuntimeError("converting it to a boolean value is not permitted")


def test_a_mapping_of_another_class_gives_several_inputs() -> None:
    inputs, _, _ = tensors_of((Named(a=torch.zeros(2)), torch.zeros(2)))
    assert type(inputs) is dict and [*inputs] == ["a"]


def test_a_head_with_another_number_of_targets_is_an_error() -> None:
    def short(items: list[Any]) -> Any:
        return torch.zeros(len(items), 2), {"a": torch.zeros(len(items)), "b": torch.zeros(1)}

    items = [{"row": n} for n in range(8)]
    with pytest.raises(DataError, match=r"a batch of 4 items has targets of shape \[1\]"):
        first_batch(data_of(items, collate=short, target_kind=None, num_outputs=None))
    for wrong in ((torch.zeros(2), {"a": 1}), (torch.zeros(2), ()), (torch.zeros(2), "b")):
        with pytest.raises(TypeError, match="a pair whose targets"):
            tensors_of(wrong)


def test_a_shape_is_needed_only_where_it_has_a_meaning() -> None:
    with pytest.raises(UserError, match=r"data\.input_shape=null: data\.normalize=imagenet needs"):
        data_of([(torch.zeros(2), 0)], normalize="imagenet", num_classes=3, num_outputs=3)
    assert data_of([(torch.zeros(2), 0)] * 4, num_classes=3, num_outputs=3).input_shape is None
