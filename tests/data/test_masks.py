"""Images and masks, in memory and in files: they move together, and errors name the mask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from running import config_of
from torchvision import transforms
from torchvision.transforms import v2

from lab.data.augment import CropFlip
from lab.data.datasets import digit_scenes
from regrow.errors import DataError, UserError
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import Data
from regrow.feeding.masks import MaskFiles, as_written, load_mask
from regrow.feeding.splits import Examples, Splits
from regrow.feeding.writing_shards import of_data

Make = Callable[..., Data]
CPU = torch.device("cpu")
FILES = ("num_classes=5", "input_shape=[1,16,16]", "num_workers=0", "normalize=none")
# The image of class k is 40 k + 40, so that an image tells its mask.
SHADE = 40


def masks_of(count: int, *size: int) -> torch.Tensor:
    return torch.randint(5, (count, *size), generator=torch.Generator().manual_seed(0))


def in_memory(count: int = 40, *, ignore_index: int | None = 255, **changed: Any) -> Data:
    masks = masks_of(count, 7, 9)
    examples = Examples(((masks + 1) * SHADE).to(torch.uint8).unsqueeze(1), masks.to(torch.uint8))
    node = {**config_of("data=digit_scenes", "task=segmentation", "model=unet")["data"]}
    options = {"pad": 2, "flip": True, "padding_mode": "constant", "alternate_flips": False}
    node |= {"source": Splits(examples, examples, None), "input_shape": [1, 7, 9]}
    node |= {"num_classes": 5, "num_outputs": 5, "class_names": None, "batch_size": 16}
    node |= {"overlap": "ignore", "normalize": "none", "ignore_index": ignore_index}
    node |= {"augmentation": CropFlip(**options), **changed}  # type: ignore[arg-type]
    del node["_target_"]
    return Data(**node)


def pixels(batch: LoadedBatch) -> torch.Tensor:
    assert isinstance(batch.inputs, torch.Tensor)
    return (batch.inputs[:, 0] * 255).round().long()


def agrees(batch: LoadedBatch, border: int = 255) -> bool:
    """Return True if each pixel has the shade of its class, and is black on the border."""
    classes = batch.targets.long()
    return torch.equal(pixels(batch), ((classes + 1) * SHADE).where(classes != border, 0))


@pytest.mark.parametrize("ignore_index", [255, 7])
def test_masks_in_memory_move_with_their_images(ignore_index: int) -> None:
    data = in_memory(ignore_index=ignore_index)
    plain = torch.cat([batch.targets for batch in data.evaluation("val", device=CPU)])
    train, moved = data.train(device=CPU), []
    for epoch in range(2):
        batches = list(train.epoch(epoch))
        assert [len(batch.targets) for batch in batches] == [16, 16, 8]
        assert all(agrees(batch, ignore_index) for batch in batches)
        moved.append(torch.cat([batch.targets for batch in batches]))
        assert moved[-1].dtype == torch.uint8 and (moved[-1] == ignore_index).any()
    assert not torch.equal(*moved)
    rows = {tuple(mask.flatten().tolist()) for mask in moved[0]}
    unmoved = rows & {tuple(mask.flatten().tolist()) for mask in plain}
    assert len(unmoved) < 8 < len(rows)  # one in fifty, by chance
    batch = batches[0]
    batch.targets = batch.targets.roll(1, 0)  # the control: the masks of other images
    assert not agrees(batch, ignore_index)


def test_a_mirrored_border_needs_no_ignored_class(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    options = {"pad": 2, "flip": True, "padding_mode": "reflect", "alternate_flips": True}
    in_memory(ignore_index=None).train(device=CPU)
    assert "pad=2: what comes in from outside is class 0" in caplog.text
    caplog.clear()
    data = in_memory(ignore_index=None, augmentation=CropFlip(**options))  # type: ignore[arg-type]
    batches = list(data.train(device=CPU).epoch(0))
    assert all(agrees(batch) for batch in batches)
    assert all(int(batch.targets.max()) < 5 for batch in batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_augmented_masks_of_one(world_size: int) -> None:
    data = in_memory()
    whole = list(data.train(device=CPU).epoch(1))
    ranks = [
        list(data.train(device=CPU, rank=rank, world_size=world_size).epoch(1))
        for rank in range(world_size)
    ]
    for number, batch in enumerate(whole):
        parts = [its[number] for its in ranks]
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
        assert torch.equal(torch.cat([pixels(part) for part in parts]), pixels(batch))
    middle = list(data.train(device=CPU).epoch(1, start=2))
    assert torch.equal(middle[0].targets, whole[2].targets)


class Recoloured:
    def store(self, images: torch.Tensor) -> Any:
        raise AssertionError("never called")


NEGATIVE = Splits(  # as -100, which a loss of torch ignores
    Examples(torch.zeros(3, 1, 7, 9, dtype=torch.uint8), torch.full((3, 7, 9), -100)), None, None
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"augmentation": Recoloured()}, "Recoloured does not move masks with their images"),
        ({"ignore_index": -100}, "data.ignore_index=-100 .* augmented as bytes"),
        ({"num_classes": 300, "num_outputs": 300}, "data.num_classes=300: masks in memory"),
        ({"source": NEGATIVE}, "a mask holds a negative value, and masks in memory are augmented"),
        ({"num_classes": 3, "num_outputs": 3}, "example 0: class [34] is out of range"),
        ({"num_outputs": 4}, "data.num_outputs=4, but segmentation targets .* take 5"),
        ({"num_classes": None}, "data.num_classes=null, and segmentation targets need it"),
        (
            {"source": Splits(Examples(torch.zeros(3, 1, 7, 9), torch.zeros(3)), None, None)},
            r"float32 targets of shape \[3\] for inputs of shape \[3, 1, 7, 9\]. Segmentation",
        ),
    ],
)
def test_settings_that_do_not_fit_masks_in_memory_are_refused(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        in_memory(**changed)


# Scenes of digits


def scenes(**changed: Any) -> Splits:
    counts = {"num_train": 30, "num_val": 5, "num_test": 5, "size": 24, "most_digits": 3}
    return digit_scenes(
        **{
            **counts,
            "val_fraction": 0.1,
            "test_fraction": 0.2,
            "folds": None,
            "fold": 0,
            "seed": 0,
            **changed,
        }
    )


def test_scenes_of_digits_are_the_same_everywhere() -> None:
    splits = scenes()
    assert isinstance(splits.train, Examples) and splits.train.inputs.shape == (30, 1, 24, 24)
    again, others = scenes(), scenes(seed=1)
    assert isinstance(again.train, Examples) and isinstance(others.train, Examples)
    assert torch.equal(splits.train.inputs, again.train.inputs)
    assert not torch.equal(splits.train.inputs, others.train.inputs)
    # Integers alone are computed with: another machine, or number of threads, gives this sum too.
    assert (int(splits.train.inputs.sum()), int(splits.train.targets.sum())) == (1034813, 289935)


def test_the_ink_of_a_scene_is_brighter_than_its_texture() -> None:
    train = scenes(num_train=200).train
    assert isinstance(train, Examples)
    shades, classes = train.inputs[:, 0].float(), train.targets
    assert set(classes.unique().tolist()) == {*range(11), 255}
    means = {name: float(shades[classes == name].mean()) for name in (10, 255, 3)}
    assert means[10] < 60 < means[255] < 130 < means[3]
    assert 0.5 < float((classes == 10).float().mean()) < 0.95


def test_a_split_without_scenes_is_left_out() -> None:
    assert scenes(num_val=0).val is None and scenes(num_test=0).test is None
    with pytest.raises(UserError, match=r"data.source.num_train=0"):
        scenes(num_train=0)


# Files


def write(root: Path, name: str, mask: np.ndarray, image: np.ndarray | None = None) -> None:
    shades = ((mask.astype(int) + 1) * SHADE).clip(0, 255).astype(np.uint8)
    for kind, array in (("images", shades if image is None else image), ("masks", mask)):
        path = root / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, mask in enumerate(masks_of(30, 16, 20).numpy().astype(np.uint8)):
        write(tmp_path / "photos", f"{number % 3}/{number:02}", mask)
    return tmp_path / "photos"


def test_images_and_masks_of_one_name_are_paired_and_split(make_data: Make, folder: Path) -> None:
    data = make_data("mask_folder", f"root={folder}", *FILES, "augment=false")
    assert data.num_examples == {"train": 21, "val": 3, "test": 6}
    assert data.preprocessing.kind == "image" and data.input_names() is None
    for name, split in data.source.items():
        assert isinstance(split, MaskFiles)
        for file, mask in zip(split.files, split.masks, strict=True):
            assert mask == file.replace("/images/", "/masks/")
        batch = next(iter(data.evaluation(name, device=CPU)))
        first = np.array(Image.open(split.masks[0]).resize((16, 16), Image.Resampling.NEAREST))
        assert batch.targets.dtype == torch.uint8 and np.array_equal(batch.targets[0], first)
    assert data.fingerprint() == make_data("mask_folder", f"root={folder}", *FILES).fingerprint()
    mask = Path(data.source.train.masks[0])  # type: ignore[union-attr]
    Image.fromarray(np.zeros((16, 20), np.uint8)).save(mask)
    assert data.fingerprint()["train"] != data.fingerprint()["val"]
    again = make_data("mask_folder", f"root={folder}", *FILES).fingerprint()
    assert again["train"]["sha256"] == data.fingerprint()["train"]["sha256"]


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_in_files_move_with_their_images(make_data: Make, folder: Path, workers: int) -> None:
    data = make_data("mask_folder", f"root={folder}", *FILES, f"num_workers={workers}")
    data.augmentation = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop([16, 16])])
    batches = [list(data.train(device=CPU).epoch(epoch)) for epoch in (0, 1)]
    assert all(agrees(batch) for its in batches for batch in its)
    assert not torch.equal(batches[0][0].targets, batches[1][0].targets)
    data.close()


def test_the_default_augmentation_scales_a_mask_without_mixing_its_classes(
    make_data: Make, tmp_path: Path
) -> None:
    for number in range(20):
        mask = np.zeros((40, 60), np.uint8)
        mask[:, 30:] = 4  # the right half, so that the image tells where the mask must be
        write(tmp_path, f"{number}", mask, mask * 50 + np.uint8(number))
    for recolours in (0.0, 0.9):
        data = make_data(
            *("mask_folder", f"root={tmp_path}", *FILES, "input_shape=[1,24,24]"),
            *("augmentation.contrast=0", f"augmentation.brightness={recolours}"),
        )
        (batch,) = data.train(device=CPU).epoch(0)
        assert set(batch.targets.unique().tolist()) == {0, 4}
        sides = pixels(batch) > 100
        wrong = (sides != (batch.targets == 4)).float().mean()
        assert bool(wrong < 0.03) is (recolours == 0.0)  # brightness changes the image alone


def test_the_images_may_lie_deeper_and_what_lies_beside_them_is_named(
    make_data: Make, tmp_path: Path
) -> None:
    for number, mask in enumerate(masks_of(30, 16, 20).numpy().astype(np.uint8)):
        write(tmp_path / "train" / "scans", f"{number:02}", mask)
    (tmp_path / "train" / "scans" / "images" / "notes").mkdir()
    (tmp_path / "train" / "depth").mkdir()
    (tmp_path / "readme.md").touch()
    names = ("source.images_in=scans/images", "source.masks_in=scans/masks")
    data = make_data("mask_folder", f"root={tmp_path}", *FILES, *names)
    assert sum(data.num_examples.values()) == 30
    (note,) = data.notes
    assert "2 beside the images and masks (readme.md, train/depth)" in note


def test_no_image_is_named_beside_masks_that_lie_within_its_folder(
    make_data: Make, tmp_path: Path
) -> None:
    for number, mask in enumerate(masks_of(30, 16, 20).numpy().astype(np.uint8)):
        write(tmp_path, f"{number:02}", mask)
    (tmp_path / "masks").rename(tmp_path / "images" / "masks")
    names = ("source.masks_in=images/masks", "source.leave_out=[images/masks]")
    data = make_data("mask_folder", f"root={tmp_path}", *FILES, *names)
    assert sum(data.num_examples.values()) == 30
    assert all("beside the images" not in note for note in data.notes)


def test_folders_of_splits_are_found_in_both_layouts(make_data: Make, tmp_path: Path) -> None:
    arrays = iter(masks_of(40, 16, 16).numpy().astype(np.uint8))
    for layout in ("{split}/{kind}", "{kind}/{split}"):
        root = tmp_path / layout.replace("{", "").replace("}", "").replace("/", "_")
        for split, count in (("train", 8), ("val", 4), ("test", 2), ("night", 3)):
            for number in range(count):
                mask = next(arrays)
                for kind, array in (("images", (mask + 1) * SHADE), ("masks", mask)):
                    path = root / layout.format(split=split, kind=kind) / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array.astype(np.uint8)).save(path)
        data = make_data("mask_folder", f"root={root}", *FILES)
        assert data.num_examples == {"train": 8, "val": 4, "test": 2, "night": 3}
        few = make_data("mask_folder", f"root={root}", *FILES, "source.sets=[]")
        assert few.num_examples == {"train": 8, "val": 4, "test": 2}
        with pytest.raises(UserError, match=r"holds no images of fog beside train"):
            make_data("mask_folder", f"root={root}", *FILES, "source.sets=[fog]")
        with pytest.raises(UserError, match=r"has a test split of its own"):
            make_data("mask_folder", f"root={root}", *FILES, "folds=2")


def test_folds_and_groups_divide_masks_as_images(make_data: Make, folder: Path) -> None:
    grouped = ("mask_folder", f"root={folder}", *FILES, "folds=3", "source.group=1")
    tested: list[str] = []
    for fold in range(3):
        data = make_data(*grouped, f"fold={fold}", "source.val_fraction=0")
        parts = {name: {id.split("/")[1] for id in data.ids(name)} for name in ("train", "test")}
        assert not parts["train"] & parts["test"] and len(parts["test"]) == 1
        tested += data.ids("test")
    assert len(tested) == len({*tested}) == 30
    with pytest.raises(DataError, match=r"is in no folder of depth 2 below its class or split"):
        make_data(*grouped, "source.group=2")


def test_names_and_values_of_other_tools(make_data: Make, tmp_path: Path) -> None:
    """Folders of other names, masks with an ending, of 0 and 255, and palettes."""
    for number in range(10):
        mask = (masks_of(10, 16, 16)[number] > 2).numpy()
        (tmp_path / "imgs").mkdir(exist_ok=True)
        (tmp_path / "labels").mkdir(exist_ok=True)
        Image.fromarray(np.full((16, 16), number, np.uint8)).save(tmp_path / f"imgs/{number}.jpg")
        image = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
        if number % 2:
            image = image.convert("P")
        image.save(tmp_path / f"labels/{number}_mask.png")
    named = ("source.images_in=imgs", "source.masks_in=labels", "source.mask_suffix=_mask")
    binary = (*FILES, *named, "num_classes=2", f"root={tmp_path}", "ignore_index=255")
    noted = make_data("mask_folder", *binary)
    assert "set 'data.source.mask_values=[0,255]'" in noted.notes[0]
    data = make_data("mask_folder", *binary, "source.mask_values=[0,255]")
    assert not data.notes
    found = torch.cat([batch.targets for batch in data.evaluation("train", device=CPU)])
    assert set(found.unique().tolist()) == {0, 1}


def test_an_ignored_class_takes_no_other_value_beside_its_own(tmp_path: Path) -> None:
    def classes(values: list[int], ignore_index: int) -> list[int]:
        paths = ([f"{tmp_path}/image.png"], [f"{tmp_path}/mask.png"])
        rest = (str(tmp_path), True, len(values), ignore_index, values)
        found: list[int] = MaskFiles(*paths, [2, 2], 1, None, *rest)[0][1].flatten().tolist()
        return found

    Image.new("L", (2, 2)).save(tmp_path / "image.png")
    Image.fromarray(np.array([[0, 10], [20, 30]], np.uint8)).save(tmp_path / "mask.png")
    assert classes([0, 10, 20, 30], 0) == [0, 1, 2, 3]
    assert classes([10, 20, 30, 0], 255) == [3, 0, 1, 2]
    with pytest.raises(
        DataError, match=r"the value 0 .* \[10, 20, 30\]\. To ignore it, put 0 first"
    ):
        classes([10, 20, 30], 0)  # 0 was taken for the class of 10, which is ignored
    with pytest.raises(
        DataError, match=r"the value 0 .* or 255 \(ignored\)\. Set data\.num_classes"
    ):
        classes([10, 20, 30], 255)


def test_masks_of_sixteen_bits_hold_more_than_256_classes(make_data: Make, tmp_path: Path) -> None:
    for number in range(10):
        mask = np.full((16, 16), 290 + number, np.uint16)
        write(tmp_path, str(number), mask, np.full((16, 16), number, np.uint8))
    root = (f"root={tmp_path}", *FILES, "num_classes=300")
    data = make_data("mask_folder", *root, "augment=false", "source.val_fraction=0")
    (batch,) = data.evaluation("train", device=CPU)
    assert batch.targets.dtype == torch.int64 and batch.targets.min() >= 290
    written = as_written(batch.targets[0], None)
    written.save(tmp_path / "again.png")
    assert np.array_equal(np.array(load_mask(tmp_path / "again.png")), batch.targets[0])


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_beyond_sixteen_bits_are_not_taken_for_the_nearest_class(
    tmp_path: Path, value: int
) -> None:
    pixels = np.zeros((4, 4), np.int32)
    pixels[1, 2] = value
    Image.fromarray(pixels).save(tmp_path / "mask.tif")
    Image.new("L", (4, 4)).save(tmp_path / "image.png")
    paths = ([f"{tmp_path}/image.png"], [f"{tmp_path}/mask.tif"])
    files = MaskFiles(*paths, [4, 4], 1, None, str(tmp_path), True, 2, 65535, None)
    with pytest.raises(DataError, match=rf"mask.tif: the value {value} is not one of the classes"):
        files[0]


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (
            lambda root: (root / "masks/0/00.png").unlink(),
            (),
            r"images/0/00.png has no mask: .*\.\*",
        ),
        (
            lambda root: (root / "images/0/00.png").rename(root / "images/0/00.jpg"),
            ("source.extensions=[.jpg]",),  # of masks too
            r"00.jpg has no mask: .* Left out of .*: \d+ of suffix .png \(masks/",
        ),
        (lambda root: (root / "masks").rename(root / "m"), (), "masks: there is no such folder"),
        (
            lambda root: (root / "images").rename(root / "m"),
            (),
            "has no folder train/images, images",
        ),
        (lambda root: None, ("source.mask_values=[0,1]",), "must be 5 different values"),
        (lambda root: None, ("source.mask_values=[0,1,2,2,3]",), "must be 5 different values"),
        (lambda root: None, ("source.mask_values=[0,1,2,3,4,4]",), "must be 5 different values"),
        (lambda root: None, ("source.mask_values=[0,1,2,3,65536]",), "each an integer from 0 to"),
        (
            lambda root: [
                (root / kind / old).rename(root / kind / new)
                for kind in ("images", "masks")
                for old, new in (("0", "Train"), ("1", "Val"), ("2", "Test"))
            ],
            (),
            "images holds Test and Train and Val, but no folder train",
        ),
        (lambda root: None, ("input_shape=[5]",), "not an image's shape"),
        (
            lambda root: Image.new("L", (16, 20)).save(root / "masks/0/00.tif"),
            (),
            "mask one image. Remove one",
        ),
    ],
)
def test_a_folder_that_cannot_be_right_is_refused(
    make_data: Make, folder: Path, change: Any, overrides: tuple[str, ...], message: str
) -> None:
    change(folder)
    with pytest.raises(UserError, match=message):
        make_data("mask_folder", f"root={folder}", *FILES, *overrides)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (Image.new("L", (20, 15)), "has 20 x 16 pixels, and its mask .*00.png has 20 x 15"),
        (Image.new("RGB", (20, 16)), "its RGB pixels are colours"),
        (Image.new("L", (20, 16), 9), r"00.png: the value 9 is not one of the classes 0 … 4"),
        (None, "00.png is not a readable image"),
    ],
)
def test_a_broken_mask_is_named(
    make_data: Make, folder: Path, mask: Image.Image | None, message: str
) -> None:
    file = folder / "masks/0/00.png"
    if mask is None:
        file.write_bytes(b"nonsense")
    else:
        mask.save(file)
    splits = ("source.val_fraction=0", "source.test_fraction=0", "overlap=ignore")
    data = make_data("mask_folder", f"root={folder}", *FILES, *splits)
    with pytest.raises(DataError, match=message):
        list(data.train(device=CPU).epoch(0))


def test_a_transform_of_one_image_is_refused(make_data: Make, folder: Path) -> None:
    data = make_data("mask_folder", f"root={folder}", *FILES)
    data.augmentation = transforms.RandomVerticalFlip()
    with pytest.raises(DataError, match=r"RandomVerticalFlip: Type.*a PIL image and a Mask\. Use"):
        list(data.train(device=CPU).epoch(0))


def test_shards_of_masks_of_another_size_are_not_a_continuation(
    make_data: Make, folder: Path
) -> None:
    def plan(*overrides: str) -> str:
        sets, _ = of_data(make_data("mask_folder", f"root={folder}", *FILES, *overrides))
        return sets["train"].fingerprint()

    assert plan() == plan() != plan("input_shape=[1,8,8]")
    assert plan("source.resize=16") != plan("source.resize=20")


def test_masks_without_an_image_are_counted(make_data: Make, folder: Path) -> None:
    (folder / "images/0/00.png").unlink()
    data = make_data("mask_folder", f"root={folder}", *FILES)
    assert "1 masks without an image (masks/0/00.png)" in data.notes[0]
