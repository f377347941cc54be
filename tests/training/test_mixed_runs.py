"""Runs that sample with replacement, mix examples and transform images: they resume and split."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import in_ranks
import pytest
import torch
from forked import without_pictures
from running import CPU, TINY, config_of, fingerprint
from running import train as trained

from regrow.checkpoint import writer
from regrow.config.targets import allow
from regrow.errors import UserError
from regrow.runs import training
from regrow.runs.lab import lab

MIXUP = "data.mixing={_target_: lab.data.augment.MixUp, alpha: 0.4}"
BOTH = (*TINY, MIXUP, "data.sampling=balanced", "optimizer=sgd", "optimizer.lr=0.3",
        "model.dropout=0")  # fmt: skip


def train(folder: Path, *overrides: str, stop_at: int | None = None) -> dict[str, Any]:
    with without_pictures():
        return trained(folder, *overrides, stop_at=stop_at)


def distance(one: Path, other: Path) -> float:
    ours, theirs = (writer.load((folder / "checkpoints" / "last").resolve())[0]["model"]
                    for folder in (one, other))  # fmt: skip
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def logged(folder: Path, name: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def test_a_run_that_samples_and_mixes_stops_resumes_and_splits(tmp_path: Path) -> None:
    train(tmp_path / "whole", *BOTH)
    train(tmp_path / "stopped", *BOTH, stop_at=6)  # in the middle of the second of three epochs
    train(tmp_path / "stopped", *BOTH)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    train(tmp_path / "slices", *BOTH, "trainer.accumulation_steps=3")
    assert distance(tmp_path / "slices", tmp_path / "whole") < 1e-5
    # The negative controls: without one of them, and with other draws.
    others = {
        "plain": "data.mixing=null",
        "once": "data.sampling=null",
        "other": "data.mixing.alpha=0.41",
        "seed": "data.seed=1",
    }
    for name, override in others.items():
        train(tmp_path / name, *BOTH, override, "trainer.max_epochs=1")
        assert distance(tmp_path / name, tmp_path / "whole") > 1e-3


@pytest.mark.slow
def test_processes_and_micro_batches_sample_and_mix_the_same(tmp_path: Path) -> None:
    config = config_of(*BOTH)
    torch.set_num_threads(1)
    one = in_ranks.trained(CPU, config, tmp_path)
    plain = in_ranks.trained(CPU, config_of(*BOTH, "data.seed=1"), tmp_path)
    for rank in in_ranks.together(2, config, tmp_path, ("trained", "trained_in_slices")):
        for way in rank.values():
            assert apart(way, one) < 1e-5
            assert apart(way, plain) > 1e-3  # the control
            for (loss, _, count), (loss_1, _, count_1) in zip(
                way["seen"], one["seen"], strict=True
            ):
                assert count == count_1 and loss == pytest.approx(loss_1, abs=1e-5)


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(
        float((one["weights"][name] - other["weights"][name]).abs().max())
        for name in one["weights"]
    )


@pytest.mark.parametrize(
    ("data", "task", "score"),
    [
        ("breast_cancer", "binary", "train/accuracy"),
        ("digits_attributes", "multilabel", "train/accuracy"),
        ("digits", "multiclass", "train/accuracy"),
        ("diabetes", "regression", None),
    ],
)
def test_each_kind_of_target_is_mixed_and_scored(
    data: str, task: str, score: str | None, tmp_path: Path
) -> None:
    options = ("trainer.max_steps=6", "trainer.log_every_steps=1", "trainer.num_threads=1",
               "trainer.device=cpu", "trainer.ema_decay=null")  # fmt: skip
    summary = train(tmp_path / "run", f"data={data}", f"task={task}", MIXUP, *options)
    losses = logged(tmp_path / "run", "train/loss")
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert math.isfinite(summary["val"]["val/loss"])
    if score is not None:  # against the nearer label; compared with soft ones it would be zero
        assert max(logged(tmp_path / "run", score)) > (0.3 if task != "multiclass" else 0.05)


def of_indices(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that takes class indices alone."""
    return torch.nn.functional.nll_loss(outputs.log_softmax(1), targets, reduction="none")


def test_a_loss_that_takes_no_soft_targets_is_found_before_the_run() -> None:
    for overrides, message in (((MIXUP,), "the loss does not take soft targets"), ((), None)):
        config = config_of(*TINY, *overrides)
        config["loss"] = {"_target_": "test_mixed_runs.of_indices", "_partial_": True}
        allow(config)
        objects = training.build(config, CPU)
        if message is None:
            lab().check_first_batch(objects, CPU)
            continue
        with pytest.raises(UserError, match=message) as found:
            lab().check_first_batch(objects, CPU)
        assert "\n" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_transformed_and_mixed_images_of_files_resume_with_the_same_bits(
    num_workers: int, image_files: Path, tmp_path: Path
) -> None:
    v2 = "torchvision.transforms.v2"
    given = (
        "data=image_folder", "model=cnn", f"data.root={image_files}", "data.num_classes=2",
        "data.input_shape=[3,16,16]", "data.source.resize=18", "data.batch_size=5",
        "data.sampling=balanced", "data.mixing={_target_: lab.data.augment.CutMix, alpha: 1.0}",
        f"data.transforms=[{{_target_: {v2}.RandAugment}},{{_target_: {v2}.RandomErasing}}]",
        "trainer.max_epochs=2", "trainer.num_threads=1", "trainer.device=cpu",
    )  # fmt: skip
    train(tmp_path / "whole", *given, "data.num_workers=0")
    workers = f"data.num_workers={num_workers}"
    train(tmp_path / "stopped", *given, workers, stop_at=5)
    train(tmp_path / "stopped", *given, workers)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    train(tmp_path / "other", *given, "data.num_workers=0", "data.transforms=[]")
    assert distance(tmp_path / "other", tmp_path / "whole") > 1e-5  # the control


@pytest.fixture
def image_files(tmp_path: Path) -> Path:
    from PIL import Image

    random = torch.Generator().manual_seed(0)
    for number in range(24):
        folder = tmp_path / "images" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (20, 26, 3), dtype=torch.uint8, generator=random)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    return tmp_path / "images"
