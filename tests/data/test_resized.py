"""Images resized once into a file give the bytes of images resized each time they are read."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regrow.errors import DataError, UserError
from regrow.feeding import resized
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.images import ImageFiles
from regrow.feeding.loaders import Data

Make = Callable[..., Data]
CPU = torch.device("cpu")
SMALL = (
    *("num_classes=2", "input_shape=[3,16,16]", "source.resize=18", "num_workers=0"),
    *("batch_size=8", "eval_batch_size=8"),
)
CACHED, ON_THE_FLY = "cache=resized", "cache=null"
# (H, W) of files, among them odd ones, narrow ones, and one that is neither scaled nor cropped.
SIZES = ((20, 26), (41, 33), (19, 90), (90, 19), (18, 18), (16, 31), (64, 64), (23, 45))


def write(path: Path, number: int, **options: Any) -> None:
    height, width = SIZES[number % len(SIZES)]
    small = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height))
    path.parent.mkdir(parents=True, exist_ok=True)
    if number % 5 == 0:
        image = image.convert("L")
    if number % 3 == 0:
        exif = Image.Exif()
        exif[0x0112] = 2 + number % 7
        options["exif"] = exif
    image.save(path, **options)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """32 files of two classes: JPEG and PNG, RGB and grey, of eight sizes, some turned."""
    root = tmp_path / "photos"
    for number in range(32):
        suffix = ".png" if number % 4 == 0 else ".jpg"
        write(root / ("cat", "dog")[number // 2 % 2] / f"{number:02}{suffix}", number)
    return root


def batches(data: Data, epochs: Sequence[int] = (0, 1)) -> list[LoadedBatch]:
    train = data.train(device=CPU)
    found = [batch for epoch in epochs for batch in train.epoch(epoch)]
    sets = [name for name in data.num_examples if name != "train"]
    found += [batch for name in sets for batch in data.evaluation(name, device=CPU)]
    data.close()
    return found


def same(ours: Sequence[LoadedBatch], theirs: Sequence[LoadedBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        for a, b in zip(ours, theirs, strict=True)
    )


def in_place(root: Path) -> Path:
    """Return the file of pixels beside the data."""
    (found,) = root.with_name(f".{root.name}.resized").glob("*.pixels")
    return found


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_cached_images_give_the_same_bytes(
    photos: Path, make_data: Make, decoder: str, channels: int
) -> None:
    how = (f"root={photos}", *SMALL, f"source.decoder={decoder}", f"input_shape=[{channels},16,16]")
    on_the_fly = batches(make_data("resized_folder", *how, ON_THE_FLY))
    data = make_data("resized_folder", *how, CACHED)
    assert in_place(photos).stat().st_size > resized.HEADER
    assert same(batches(data), on_the_fly)
    train = data.source.train
    assert isinstance(train, ImageFiles) and train.resized is not None
    assert all(train.resized.read(index) is not None for index in range(len(train)))
    other = batches(make_data("resized_folder", *how, ON_THE_FLY, "source.resize=19"))
    assert not same(other, on_the_fly)  # the negative control
    other = batches(make_data("resized_folder", *how, ON_THE_FLY, "augmentation.flip=false"))
    assert not same(other, on_the_fly)


def test_cached_images_come_from_the_file(photos: Path, make_data: Make) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL, "normalize=none")
    before = batches(make_data(*how))
    content = bytearray(in_place(photos).read_bytes())
    content[resized.HEADER :] = bytes(255 - byte for byte in content[resized.HEADER :])
    in_place(photos).write_bytes(content)
    after = batches(make_data(*how))
    assert all(
        torch.allclose(1 - a.inputs, b.inputs, atol=1e-6)
        for a, b in zip(before, after, strict=True)
    )


@pytest.mark.parametrize("augmentation", ["augmentation=null", "augment=false"])
def test_an_unaugmented_run_is_cached_too(photos: Path, make_data: Make, augmentation: str) -> None:
    how = ("image_folder", f"root={photos}", *SMALL, augmentation)
    assert same(batches(make_data(*how, CACHED)), batches(make_data(*how)))


def test_workers_map_the_file_themselves(photos: Path, make_data: Make) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    data = make_data(*how, "num_workers=2")
    train = data.source.train
    assert isinstance(train, ImageFiles) and train.resized is not None
    train.resized.read(0)
    assert len(pickle.dumps(train.resized)) < in_place(photos).stat().st_size / 10
    again = pickle.loads(pickle.dumps(train.resized))
    assert torch.equal(again.read(0), train.resized.read(0))
    assert same(batches(data), batches(make_data(*how, ON_THE_FLY)))


def test_a_read_image_is_a_copy(photos: Path, make_data: Make) -> None:
    """A write to the map itself would end the process."""
    train: Any = make_data("resized_folder", f"root={photos}", *SMALL).source.train
    first, second = train.resized.read(0), train.resized.read(0)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    before = second.clone()
    first.zero_()
    assert torch.equal(train.resized.read(0), before)


def test_sampling_mixing_and_transforms_work_on_cached_images(
    photos: Path, make_data: Make
) -> None:
    how = (
        *("resized_folder", f"root={photos}", *SMALL, "sampling=balanced"),
        "transforms=[{_target_: torchvision.transforms.v2.RandAugment}]",
        "+mixing={_target_: lab.data.augment.MixUp, alpha: 0.4}",
    )
    assert same(batches(make_data(*how)), batches(make_data(*how, ON_THE_FLY)))


# Changes of the files


def test_an_image_is_resized_once(
    photos: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    resized_files: list[str] = []
    original = ImageFiles.resized_file

    def noted(self: ImageFiles, file: str, content: bytes | None = None) -> Any:
        resized_files.append(Path(file).name)
        return original(self, file, content)

    monkeypatch.setattr(ImageFiles, "resized_file", noted)
    how = ("resized_folder", f"root={photos}", *SMALL)
    batches(make_data(*how))
    assert len(resized_files) == len({*resized_files}) == 32

    def made() -> list[str]:
        resized_files.clear()
        make_data(*how)
        return sorted(resized_files)

    assert made() == []
    os.utime(photos / "cat" / "00.png")  # touched
    assert made() == []
    write(photos / "cat" / "00.png", 100)  # changed
    write(photos / "dog" / "new.jpg", 101)  # added
    (photos / "dog" / "02.jpg").rename(photos / "dog" / "moved.jpg")
    shutil.copy(photos / "cat" / "01.jpg", photos / "cat" / "copy.jpg")
    (photos / "dog" / "03.jpg").unlink()
    assert made() == ["00.png", "new.jpg"]
    assert same(batches(make_data(*how)), batches(make_data(*how, ON_THE_FLY)))


def test_other_ways_to_resize_have_files_of_their_own(photos: Path, make_data: Make) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    for override in (
        *("source.resize=20", "input_shape=[1,16,16]", "source.exif_orientation=false"),
        *("source.decoder=pillow",),
    ):
        assert same(
            batches(make_data(*how, override)), batches(make_data(*how, override, ON_THE_FLY))
        )
    assert len([*photos.with_name(".photos.resized").glob("*.pixels")]) == 4


@pytest.mark.parametrize("kind", ["index", "pixels", "all"])
def test_a_removed_file_is_made_again(photos: Path, make_data: Make, kind: str) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    expected = batches(make_data(*how))
    if kind == "all":
        shutil.rmtree(in_place(photos).parent)
    else:
        in_place(photos).with_suffix(f".{kind}").unlink()
    assert same(batches(make_data(*how)), expected)
    assert in_place(photos).exists()


def test_the_file_may_be_removed_during_a_run(
    photos: Path, make_data: Make, caplog: pytest.LogCaptureFixture
) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL, "normalize=none")
    expected = batches(make_data(*how))
    data = make_data(*how)  # nothing is mapped yet
    shutil.rmtree(in_place(photos).parent)
    with caplog.at_level(logging.WARNING):
        assert same(batches(data), expected)
    assert sum("is gone" in line for line in caplog.messages) == 1
    data = make_data(*how)
    data.source.train[0]  # mapped
    shutil.rmtree(in_place(photos).parent)
    assert same(batches(data), expected)


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    photos: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known_before(files: list[str], root: str) -> list[bytes]:
        known = contents_of(files, root)
        write(photos / "cat" / "01.jpg", 200)
        return known

    contents_of = resized.contents_of
    monkeypatch.setattr(resized, "contents_of", known_before)
    how = ("resized_folder", f"root={photos}", *SMALL)
    data = make_data(*how)
    monkeypatch.undo()
    assert same(batches(data), batches(make_data(*how, ON_THE_FLY)))
    kept = [split.resized for _, split in data.source.items()]  # type: ignore[union-attr]
    assert sum(int((each.entries[:, 0] == 0).sum()) for each in kept) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("cut", [1, 20, 60, 200])
def test_a_cache_that_a_kill_left_incomplete_is_completed(
    photos: Path, make_data: Make, cut: int
) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    expected = batches(make_data(*how))
    for kind in ("index", "pixels"):
        path = in_place(photos).with_suffix(f".{kind}")
        os.truncate(path, path.stat().st_size - cut)
        assert same(batches(make_data(*how)), expected)
        with path.open("ab") as file:
            file.write(b"\xff" * cut)  # written before its record, or half a record
        assert same(batches(make_data(*how)), expected)
    index = in_place(photos).with_suffix(".index")
    content = bytearray(index.read_bytes())
    content[resized.HEADER + 40] ^= 1  # of the first image's place
    index.write_bytes(content)
    assert same(batches(make_data(*how)), expected)


def test_images_without_a_record_leave_no_gap(photos: Path, make_data: Make) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    make_data(*how)
    size = in_place(photos).stat().st_size
    with in_place(photos).open("ab") as file:
        file.write(b"x" * 1_000_000)
    write(photos / "cat" / "new.jpg", 4)
    assert same(batches(make_data(*how)), batches(make_data(*how, ON_THE_FLY)))
    assert in_place(photos).stat().st_size < size + 10_000


# Limits and folders


def test_the_size_is_told_first(
    photos: Path, make_data: Make, caplog: pytest.LogCaptureFixture
) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    with caplog.at_level(logging.INFO):
        make_data(*how)
    (line,) = (line for line in caplog.messages if "resizing" in line)
    size = in_place(photos).stat().st_size - resized.HEADER
    assert line == (
        f"data.cache=resized: resizing 32 images into {in_place(photos)}: {size / 1e6:.3g} MB"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_data(*how)
    assert not any("resizing" in line for line in caplog.messages)


def test_too_much_is_refused_before_anything_is_resized(
    photos: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    with pytest.raises(UserError, match=r"^data.cache_max_gb=1e-05: the resized .* take .* Set"):
        make_data(*how, "cache_max_gb=1e-5")
    usage = shutil.disk_usage(photos)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"^data.cache=resized: .* has 0.001 MB of room\. Make"):
        make_data(*how)
    monkeypatch.undo()
    assert in_place(photos).stat().st_size == resized.HEADER
    assert same(batches(make_data(*how)), batches(make_data(*how, ON_THE_FLY)))


def test_a_disk_that_fills_up_is_one_line_and_loses_nothing(
    photos: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = resized._write_all, []

    def full(file: Any, content: memoryview) -> None:
        if len(written) == 20:
            original(file, content[:100])
            raise OSError(28, "No space left on device")
        written.append(len(content))
        original(file, content)

    monkeypatch.setattr(resized, "_write_all", full)
    how = ("resized_folder", f"root={photos}", *SMALL)
    with pytest.raises(UserError, match=r"^data.cache_root=null: .*No space left on device\. Make"):
        make_data(*how)
    monkeypatch.undo()
    place = resized.CacheFiles(in_place(photos).with_suffix(""), 3)
    found = place.read()
    assert found is not None and len(found.entries) == 20
    assert same(batches(make_data(*how)), batches(make_data(*how, ON_THE_FLY)))


def test_images_that_are_gone_make_room(photos: Path, make_data: Make) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    make_data(*how)
    size = in_place(photos).stat().st_size
    for number in range(32):
        for path in photos.rglob(f"{number:02}.*"):
            write(path, number + 1000)
    data = make_data(*how, f"cache_max_gb={size * 1.5 / 1e9}")
    assert in_place(photos).stat().st_size < size * 1.5
    assert same(batches(data), batches(make_data(*how, ON_THE_FLY)))


def test_a_broken_image_is_named_before_the_first_step(photos: Path, make_data: Make) -> None:
    file = photos / "cat" / "01.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"01\.jpg is not a readable image"):
        make_data("resized_folder", f"root={photos}", *SMALL)


def test_a_read_only_disk_is_left_alone(
    photos: Path,
    make_data: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    how = ("resized_folder", f"root={photos}", *SMALL)
    original = Path.mkdir

    def refused(self: Path, *args: Any, **options: Any) -> None:
        if photos.parent in self.parents:
            raise OSError(30, "Read-only file system")
        original(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    data = make_data(*how)
    (made,) = Path("outputs", ".cache").absolute().glob("photos-*/*.pixels")
    with pytest.raises(UserError, match=r"^data.cache_root=.*: Read-only file system\. Make room"):
        make_data(*how, f"cache_root={photos.parent / 'else'}")
    monkeypatch.undo()
    assert not photos.with_name(".photos.resized").exists()
    assert same(batches(data), batches(make_data(*how, ON_THE_FLY)))
    assert made.exists()


def test_a_complete_cache_on_a_read_only_disk_is_used(
    photos: Path, make_data: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL)
    expected = batches(make_data(*how))

    def refused(*_: Any) -> Any:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(resized.CacheFiles, "locked", refused)
    assert same(batches(make_data(*how)), expected)


def test_the_root_of_the_cache_is_chosen(photos: Path, make_data: Make, tmp_path: Path) -> None:
    how = ("resized_folder", f"root={photos}", *SMALL, f"cache_root={tmp_path / 'fast'}")
    data = make_data(*how)
    assert [*(tmp_path / "fast").glob("photos-*/*.pixels")]
    assert not photos.with_name(".photos.resized").exists()
    assert same(batches(data), batches(make_data(*how, ON_THE_FLY)))


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        ("image_folder", (), r"data.augmentation=Photo takes the original .*CropResized"),
        ("resized_folder", ("source.resize=null", "augmentation=null"), "Set data.source.resize"),
        ("resized_folder", ("source.resize=null", ON_THE_FLY), "with a data.source.resize"),
        ("digits", (), "keeps the resized images of data=image_folder, .* is Examples"),
    ],
)
def test_data_that_cannot_be_cached_is_an_error_of_one_line(
    photos: Path, make_data: Make, data: str, overrides: tuple[str, ...], message: str
) -> None:
    how = () if data == "digits" else (f"root={photos}", *SMALL)
    with pytest.raises(UserError, match=message) as error:
        make_data(data, *how, CACHED, *overrides)
    assert "\n" not in str(error.value)
