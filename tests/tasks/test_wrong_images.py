"""Wrong test images for the report, with truth and prediction."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import without_pictures
from PIL import Image
from running import TINY, as_hydra_has_it, composed, launched
from torch import Tensor

from regrow.distributed.parallel import World
from regrow.feeding.batch import LoadedBatch
from regrow.record import pages, pictures, report
from regrow.record.records import read_json
from regrow.runs import banner
from regrow.runs.launch import launch

NAMES = ["zero", "one", "two"]


def batch_of(inputs: Any, targets: Tensor, num_local: int | None = None) -> LoadedBatch:
    count = len(targets) if num_local is None else num_local
    return LoadedBatch(inputs, targets, None, count, count)


def decoded(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as file:
        return np.array(file)


def predict(logits: Tensor) -> dict[str, Tensor]:
    return {"prediction": logits.argmax(1), "probability": logits.double().softmax(1)}


def wrong_of(
    inputs: Any, targets: Tensor, outputs: Tensor, num_local: int | None = None, **more: Any
) -> dict[str, Any]:
    how = {"predict": predict, "class_names": NAMES, "as_pixels": None, **more}
    return pictures.of_wrong(batch_of(inputs, targets, num_local), outputs, **how)


def test_the_wrong_ones_are_chosen_in_order_with_their_pixels() -> None:
    inputs = torch.arange(5 * 4, dtype=torch.float32).view(5, 1, 2, 2) / 19
    targets = torch.tensor([0, 1, 2, -100, 1])  # the fourth is ignored
    logits = torch.eye(3)[torch.tensor([0, 2, 1, 0, 0])] * 3
    whole = wrong_of(inputs, targets, logits, as_pixels=lambda it: (it * 19).to(torch.uint8))
    wrong = whole["wrong"]
    assert wrong["true"] == ["one", "two", "one"] and wrong["predicted"] == ["two", "one", "zero"]
    for image, index in zip(wrong["image"], (1, 2, 4), strict=True):
        assert np.array_equal(decoded(image), np.arange(4 * index, 4 * index + 4).reshape(2, 2))
    assert wrong["probability"] == pytest.approx([float(logits[0].double().softmax(0)[0])] * 3)
    local = wrong_of(inputs, targets, logits, num_local=2)
    assert local["wrong"]["true"] == ["one"]  # padding does not count
    assert whole["images"] == 4 and local["images"] == 2
    assert wrong_of(inputs, logits.argmax(1), logits) == {"images": 5}
    for others in (inputs[:, 0, 0], (inputs, inputs), inputs.long()):
        assert wrong_of(others, targets, logits) == {}
    assert wrong_of(inputs, targets, logits[..., None]) == {}  # an output per place


def test_the_probability_of_a_binary_prediction_is_its_own() -> None:
    told = {"prediction": torch.tensor([1, 0]), "probability": torch.tensor([0.75, 0.25])}
    targets = torch.tensor([[0.0], [1.0]])
    inputs = torch.zeros(2, 3, 4, 4)
    how: Any = {"predict": lambda _: told, "class_names": NAMES[:2]}
    wrong = wrong_of(inputs, targets, torch.zeros(2), **how)["wrong"]
    assert wrong["probability"] == [0.75, 0.75] and wrong["true"] == ["zero", "one"]


def test_batches_add_up_until_there_are_enough() -> None:
    inputs, targets = torch.zeros(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    logits = torch.eye(3)[torch.ones(10, dtype=torch.int64)]
    examples: Any = {}
    for count in (10, 16):
        assert pictures.has_room(examples)
        examples = pictures.joined(examples, {})  # a batch without a wrong one
        more = wrong_of(inputs, targets, logits)
        examples = pictures.joined(examples, more)
        assert {len(column) for column in examples["wrong"].values()} == {count}
    assert examples["wrong"]["row"] == [*range(10), *range(6)]
    assert not pictures.has_room(examples)
    assert not pictures.has_room({"examples": {}})  # those of masks are of one batch


def test_a_run_of_images_keeps_its_wrong_ones_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = []
    for size in (10, 3):
        images = (*TINY, "data.input_shape=[1,6,6]", "trainer.max_epochs=1")
        launched(*images, f"data.eval_batch_size={size}", f"hydra.run.dir={size}")
        kept.append(read_json(tmp_path / f"{size}" / "plots" / "test.json")["wrong"])
    assert kept[0]["image"] == kept[1]["image"] and len(kept[0]["image"]) >= 1
    assert kept[0]["true"] == kept[1]["true"] and kept[0]["predicted"] == kept[1]["predicted"]
    summary = read_json(tmp_path / "10" / "summary.json")
    assert len(kept[0]["image"]) == round(10 * (1 - summary["test"]["test/accuracy"]))


@pytest.mark.slow
def test_a_wrong_image_from_a_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "regrow")
    draws = np.random.default_rng(0)
    for number, name in enumerate(("a & b", "c")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}{index:02}.png")
    run = tmp_path / "run"
    images = ("data=image_folder", f"data.root={tmp_path / 'photos'}", "data.num_classes=2",
              "data.input_shape=[3,8,8]", "data.source.resize=8", "data.source.test_fraction=0.5",
              "data.eval_batch_size=5", "data.normalize=none", "model.hidden=[4]",
              "trainer.max_steps=1", "trainer.device=cpu", "trainer.num_threads=1",
              f"hydra.run.dir={run}")  # fmt: skip
    with without_pictures():
        launch(as_hydra_has_it(composed(*images)))
    assert f"predict.py run={run} input=path/to/images" in caplog.text
    wrong = read_json(run / "plots" / "test.json")["wrong"]
    assert set(wrong) == {"image", "true", "predicted", "probability", "file"}
    assert wrong["file"] == sorted(wrong["file"]) and len(wrong["file"]) > 2
    for image, file, true in zip(wrong["image"], wrong["file"], wrong["true"], strict=True):
        assert np.array_equal(decoded(image), np.array(Image.open(tmp_path / "photos" / file)))
        assert file.startswith(f"{true}/")
    page = report.write(run).read_text()
    for file in wrong["file"]:
        escaped = file.replace("&", "&amp;")
        assert f'title="{escaped}"' in page and f'alt="{escaped}: true ' in page
        shown = escaped.replace(" ", " <wbr>").replace("/", "/<wbr>").replace(".png", ".<wbr>png")
        assert f'<span class=file title="{escaped}">{shown}</span>' in page
    assert "classified correctly" not in page


@pytest.mark.parametrize(
    ("source", "files"),
    [("image_folder", "path/to/images"), ("mask_folder", "path/to/images"),
     ("csv", "path/to/table.csv"), ("digits", ""), ("synthetic", "")],
)  # fmt: skip
def test_a_run_offers_to_predict_for_data_in_files(source: str, files: str) -> None:
    assert banner._new_files({"source": {"_target_": f"lab.data.datasets.{source}"}}) == files


def test_a_set_without_a_wrong_image_is_told_in_a_sentence(tmp_path: Path) -> None:
    inputs, targets = torch.zeros(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    right, false = torch.eye(3)[targets], torch.eye(3)[targets + 1]

    def page(name: str, *batches: Any, more: str = "[]") -> str:
        """Write a run whose last evaluation had these batches, here and in another process."""
        examples: Any = {}
        for number, (count, logits) in enumerate(batches):
            assert pictures.has_room(examples)
            found = wrong_of(inputs[:count], targets[:count], logits[:count])
            examples = pictures.joined(examples, found, number)

        def gather(text: str) -> list[str]:
            return [text] + [json.dumps({"images": 7, "wrong": {}})] * (more == "rank")

        details = pictures.in_the_set(
            examples, lambda number: 10 * number, lambda: range(30), gather
        )
        folder = tmp_path / name
        (folder / "plots").mkdir(parents=True)
        (folder / "status.json").write_text('{"state": "completed", "step": 1}')
        (folder / "plots" / f"{name}.json").write_text(json.dumps(details))
        return report.write(folder).read_text()

    assert "<p>All 15 test images were classified correctly.</p>" in page(
        "test", (10, right), (5, right)
    )
    told = page("night", (10, right), more="rank")
    assert "<p>All 17 images of night were classified correctly.</p>" in told
    assert "The only image of one was classified correctly." in page("one", (1, right))
    for name, batches in (
        ("mixed", [(10, right), (2, false)]),
        ("early", [(2, false), (9, right)]),
    ):
        told = page(name, *batches)
        assert "classified correctly" not in told and told.count("predicted <strong title=") == 2
    told = page("none")  # of data without images
    assert "classified correctly" not in told and "Wrong predictions" not in told


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat/IMG_0004.jpg", "cat/<wbr>IMG_<wbr>0004.<wbr>jpg"),
        ("cat/DSCF20240817T101502Z.jpg", "cat/<wbr>DSCF20…01502Z.<wbr>jpg"),
        ("<b>/a.png", "&lt;b&gt;/<wbr>a.<wbr>png"),
        ("short", "short"),
    ],
)
def test_a_long_name_wraps_at_its_separators(name: str, shown: str) -> None:
    assert pages.narrow(name) == shown


def test_a_very_long_name_keeps_its_beginning_and_end() -> None:
    shown = pages.narrow("/".join(f"folder{index:02}" for index in range(40))).replace("<wbr>", "")
    assert shown.startswith("folder00/") and shown.endswith("/folder39")
    assert shown.count("…") == 1 and len(shown) < 65


def test_without_a_batch_number_or_names_no_file_is_claimed() -> None:
    """As a project's own loop may call it, and as data in memory are."""
    inputs, targets = torch.zeros(10, 1, 2, 2), torch.zeros(10, dtype=torch.int64)
    found = wrong_of(inputs, targets, torch.eye(3)[torch.ones(10, dtype=torch.int64)])
    gather = World(device=torch.device("cpu")).gather_texts

    def columns(examples: Any, ids: Any) -> set[str]:
        how = (lambda number: 10 * number, lambda: ids, gather)
        return set(pictures.in_the_set({"other": 1, **examples}, *how)["wrong"])

    files, plain = [str(index) for index in range(10)], {"image", "true", "predicted"}
    plain |= {"probability"}
    assert columns(pictures.joined({}, found), files) == plain
    assert columns(pictures.joined({}, found, 0), range(10)) == plain
    assert columns(pictures.joined({}, found, 0), files) == {*plain, "file"}
    assert pictures.joined({"images": 1}, {}) == {"images": 1}
    assert pictures.in_the_set({"other": 1}, lambda number: 0, list, gather) == {"other": 1}
