"""Runs of segmentation, of several targets and of extra metrics, from a command line to masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import finished, one_line_and_exit_code_2, process, script
from PIL import Image
from running import fingerprint, metrics_of, train
from sklearn.metrics import cohen_kappa_score, jaccard_score, mean_squared_error

from regrow.errors import UserError
from regrow.load import load_run
from regrow.record import plots, report
from regrow.record.output import write_images

predict = script("predict").main
KAPPA = (
    "task.extra_metrics={kappa: {_target_: torchmetrics.CohenKappa, task: multiclass, "
    "num_classes: %s}}"
)
SCENES = (
    *("data=digit_scenes", "task=segmentation", "model=unet", "model.channels=[4,6]"),
    *("model.norm=group", "data.source.num_train=40", "data.source.num_val=20"),
    *("data.source.num_test=20", "data.source.size=16", "data.input_shape=[1,16,16]"),
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    return finished(folder / "run", *SCENES, KAPPA % 11, "trainer.monitor=val/kappa")


@pytest.mark.slow
def test_a_run_measures_what_its_model_predicts(scenes: Path) -> None:
    run = load_run(scenes)
    with torch.no_grad():
        (batch,) = run.data.evaluation("test", device=run.device)
        predicted = run.model(batch.inputs).argmax(1)
    counted = batch.targets != 255
    y, p = batch.targets[counted], predicted[counted]
    told = json.loads((scenes / "summary.json").read_text())
    iou = jaccard_score(y, p, average="macro")
    assert told["test"]["test/iou"] == pytest.approx(iou, abs=1e-12)
    assert told["test"]["test/kappa"] == pytest.approx(cohen_kappa_score(y, p), abs=1e-6)
    assert told["best"]["metric"] == "val/kappa"
    run.close()


def test_the_page_shows_input_truth_and_prediction(scenes: Path) -> None:
    details = json.loads((scenes / "plots" / "test.json").read_text())
    assert [*details["examples"]] == ["input", "true", "predicted"]
    assert len(details["examples"]["input"]) == 4 and len(details["confusion_matrix"]) == 11
    assert "examples_test" in plots.figures(scenes)
    page = report.write(scenes).read_text()
    assert 'aria-label="examples test"' in page and page.count("data:image/png;base64") > 12


def test_predicted_masks_are_those_of_an_evaluation(scenes: Path, tmp_path: Path) -> None:
    run = load_run(scenes)
    images, folder = run.data.source.test.inputs, tmp_path / "images"
    np.save(tmp_path / "images.npy", images.numpy())
    for number, image in enumerate(images):
        path = folder / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)
    with torch.no_grad():
        (batch,) = run.data.evaluation("test", device=run.device)
        expected = run.model(batch.inputs).argmax(1)
    for source, output in (("images.npy", "from_array"), ("images", "from_files")):
        predict([f"run={scenes}", f"input={tmp_path / source}", f"output={tmp_path / output}"])
    for number, classes in enumerate(expected):
        for file in (f"from_array/{number}.png", f"from_files/{number % 2}/{number}.png"):
            with Image.open(tmp_path / file) as mask:
                assert mask.mode == "L" and np.array_equal(np.array(mask), classes)
    assert len({classes.numpy().tobytes() for classes in expected}) > 1
    run.close()


def test_a_mask_is_as_large_as_its_image(scenes: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored sideways
    Image.new("L", (40, 30), 90).save(tmp_path / "wide.png")
    Image.new("L", (40, 30), 90).save(tmp_path / "turned.jpg", exif=exif)
    for name, size in (("wide.png", (40, 30)), ("turned.jpg", (30, 40))):
        predict([f"run={scenes}", f"input={tmp_path / name}", f"output={tmp_path / str(size[0])}"])
        with Image.open(tmp_path / str(size[0]) / f"{Path(name).stem}.png") as mask:
            assert mask.size == size


def test_an_output_folder_is_whole_or_absent_and_nothing_in_it_is_removed(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    arguments = [f"run={scenes}", f"input={tmp_path / 'a.png'}", f"output={tmp_path / 'out'}"]
    predict(arguments)
    (tmp_path / "out" / "kept.txt").write_text("mine")
    with one_line_and_exit_code_2(capsys, "exists already. Choose another name, or add overwrite"):
        predict(arguments)
    predict([*arguments, "overwrite=true"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "kept.txt"]
    with one_line_and_exit_code_2(capsys, "is not a folder, and masks are written to one"):
        predict([*arguments[:2], f"output={tmp_path / 'a.png'}".replace("a.png", "out/kept.txt")])

    def breaks() -> object:
        yield "one.png", Image.new("L", (2, 2))
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        write_images(breaks(), tmp_path / "half", overwrite=False)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out"]


def test_two_images_of_one_stem_get_two_masks(tmp_path: Path) -> None:
    images = [(name, Image.new("L", (2, 2))) for name in ("a.jpg", "a.png", "b/a.png")]
    assert write_images(iter(images), tmp_path / "out", overwrite=False) == 3
    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.png"))
    assert found == [Path("a.png"), Path("a.png.png"), Path("b/a.png")]


@pytest.mark.slow
def test_a_stopped_segmentation_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = (*SCENES, "trainer.max_epochs=2", "trainer.num_threads=1", "data.batch_size=16")
    whole = train(tmp_path / "whole", *options)
    assert train(tmp_path / "cut", *options, stop_at=4)["status"] == "interrupted"
    assert train(tmp_path / "cut", *options)["weights_sha256"] == whole["weights_sha256"]
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    split = train(tmp_path / "split", *options, "trainer.accumulation_steps=3")
    assert split["val"]["val/loss"] == pytest.approx(whole["val"]["val/loss"], abs=1e-5)
    assert split["weights_sha256"] != whole["weights_sha256"]  # but for rounding
    other = train(tmp_path / "other", *options, "data.augment=false")
    assert abs(other["val"]["val/loss"] - whole["val"]["val/loss"]) > 1e-4


@pytest.mark.slow
def test_an_extra_metric_changes_no_bit_of_the_weights(tmp_path: Path) -> None:
    options = ("trainer.max_steps=3", "trainer.num_threads=1", "trainer.device=cpu")
    plain = train(tmp_path / "plain", *options)
    more = train(tmp_path / "more", *options, KAPPA % 10)
    assert more["weights_sha256"] == plain["weights_sha256"]
    assert more["val"].keys() - plain["val"].keys() == {"val/kappa"}
    other = train(tmp_path / "other", *options, "seed=1")
    assert other["weights_sha256"] != plain["weights_sha256"]


def table(path: Path) -> Path:
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 3))
    y = np.stack([x[:, 0] * 900 + 5000, x[:, 1] - x[:, 2]], 1)
    rows = np.concatenate([x, y + random.normal(size=y.shape) * 0.1], 1)
    header = "width,depth,age,price,area"
    np.savetxt(path, rows, delimiter=",", header=header, comments="")
    return path


def test_each_of_several_targets_is_measured_monitored_and_drawn(tmp_path: Path) -> None:
    run = finished(
        *(tmp_path / "run", "data=csv", f"data.source.train_file={table(tmp_path / 'houses.csv')}"),
        *("data.source.target_columns=[price,area]", "data.target_kind=regression"),
        *("data.num_classes=null", "data.num_outputs=2", "data.input_shape=[3]", "task=regression"),
        *("data.normalize_targets=true", "trainer.monitor=val/rmse/area", "trainer.max_steps=30"),
    )
    told = json.loads((run / "summary.json").read_text())
    assert told["best"]["metric"] == "val/rmse/area"
    loaded = load_run(run)
    (batch,) = loaded.data.evaluation("test", device=loaded.device)
    with torch.no_grad():
        outputs = loaded.in_units(loaded.model(batch.inputs)).numpy()
    targets = loaded.in_units(batch.targets).numpy()
    for index, name in enumerate(("price", "area")):
        rmse = mean_squared_error(targets[:, index], outputs[:, index]) ** 0.5
        assert told["test"][f"test/rmse/{name}"] == pytest.approx(rmse, rel=1e-6)
    both = mean_squared_error(targets, outputs) ** 0.5
    assert told["test"]["test/rmse"] == pytest.approx(both, rel=1e-6)
    assert told["test"]["test/rmse/area"] < both / 10  # the largest target hides the others
    titles = [axis.get_title(loc="left") for axis in plots.figures(run)["predicted_test"].axes]
    assert titles[:2] == ["price", "area"]
    predict([f"run={run}", f"input={tmp_path / 'houses.csv'}", f"output={tmp_path / 'p.csv'}"])
    header = (tmp_path / "p.csv").read_text().splitlines()[0]
    assert header == "input,prediction/price,prediction/area"
    loaded.close()


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("devices", [2, 3])
def test_several_processes_segment_as_one(devices: int, tmp_path: Path) -> None:
    """With uneven shares, ignored pixels, an extra metric and pictures."""
    options = (*SCENES, KAPPA % 11, "trainer.max_steps=5", "trainer.device=cpu")
    options += ("data.batch_size=7", "data.eval_batch_size=8", "trainer.num_threads=1")
    one, several = (
        process("train", *options, *more, f"hydra.run.dir={name}", folder=tmp_path)
        for name, more in (("one", ()), ("several", ("trainer=ddp", f"trainer.devices={devices}")))
    )
    assert (one.returncode, several.returncode) == (0, 0), one.stderr + several.stderr
    told = [json.loads((tmp_path / it / "summary.json").read_text()) for it in ("one", "several")]
    for name in ("val", "test"):
        assert told[1][name] == pytest.approx(told[0][name], abs=2e-3, nan_ok=True)
    assert told[1]["test"]["test/loss"] == pytest.approx(told[0]["test"]["test/loss"], abs=1e-5)
    trained = [metrics_of(tmp_path / it)[-1]["test/loss"] for it in ("one", "several")]
    assert trained[0] == pytest.approx(trained[1], abs=1e-5)
    details = [
        json.loads((tmp_path / it / "plots" / "test.json").read_text()) for it in ("one", "several")
    ]
    assert details[0]["examples"]["true"][:2] == details[1]["examples"]["true"][:2]
