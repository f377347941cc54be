"""Realistic image folders: rotated, odd, duplicated, linked, hidden and broken files."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import finished
from PIL import Image, ImageOps
from running import config_of

from regrow.config import older
from regrow.config.class_folders import NOT_READ, contents_in_words, count_images, formats_by_suffix
from regrow.errors import DataError, UserError
from regrow.feeding import files
from regrow.feeding.decoding import load_image
from regrow.feeding.files import contents_of, keys_of_copies
from regrow.feeding.loaders import Data
from regrow.feeding.preprocess import Preprocessing

Make = Callable[..., Data]
CPU = torch.device("cpu")
SMALL = ("num_classes=2", "input_shape=[3,16,16]", "source.resize=18", "num_workers=0")
# `STORED[n](upright)`, stored with orientation n, is upright again after the rotation.
STORED = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}


def noise(seed: int, height: int = 20, width: int = 26) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stored(upright: Image.Image, orientation: int, path: Path, **options: Any) -> None:
    """Save the image as a camera held in that orientation would."""
    method = STORED[orientation]
    turned = upright if method is None else upright.transpose(Image.Transpose(method))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(path, exif=exif, **options)


def framed(seed: int, size: int = 128, border: int = 24) -> Image.Image:
    """A scan: noise inside a black border."""
    pixels = np.zeros((size, size, 3), np.uint8)
    inside = np.random.default_rng(seed).integers(0, 256, (size - 2 * border,) * 2 + (3,))
    pixels[border:-border, border:-border] = inside
    return Image.fromarray(pixels)


def scans(root: Path, suffix: str, count: int = 60) -> Path:
    for number in range(count):
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        framed(number).save(folder / f"{number:03}{suffix}")
    return root


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "options"),
    [(".png", {}), (".webp", {"lossless": True}), (".tif", {}), (".jpg", {"quality": 100})],
)
def test_a_photo_is_turned_upright(
    tmp_path: Path, orientation: int, suffix: str, options: dict[str, Any]
) -> None:
    upright = noise(1).resize((6, 4)).resize((48, 32))
    file = tmp_path / f"photo{suffix}"
    stored(upright, orientation, file, **options)
    tolerance = 4 if suffix == ".jpg" else 0
    loaded = load_image(file, 3, exif_orientation=True)
    assert loaded.size == upright.size
    difference = np.abs(np.asarray(loaded, int) - np.asarray(upright, int))
    assert difference.mean() <= tolerance
    with Image.open(file) as opened:
        assert np.array_equal(loaded, ImageOps.exif_transpose(opened).convert("RGB"))
    if suffix != ".tif" and orientation != 1:  # Pillow rotates a TIFF itself
        as_stored = load_image(file, 3, exif_orientation=False)
        assert as_stored.size != upright.size or not np.array_equal(as_stored, loaded)


def test_damaged_exif_data_costs_no_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    noise(1).save(buffer, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffnonsense")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert load_image(tmp_path / "a.png", 3, exif_orientation=True).size == (26, 20)


def test_the_key_and_the_record_decide_on_orientation(make_data: Make, tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / "images" / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        stored(noise(number), 6, folder / f"{number:02}.png")
    arguments = ("image_folder", f"root={tmp_path / 'images'}", *SMALL)
    turned = make_data(*arguments)
    plain = make_data(*arguments, "source.exif_orientation=false")
    for data, upright in ((turned, True), (plain, False)):
        file = data.source.test.files[0]
        raw = data.source.test[0][0]
        reference = load_image(file, 3, exif_orientation=upright)
        assert (reference.size == (26, 20)) is upright
        record = json.loads(json.dumps(data.preprocessing.to_dict()))
        assert record["exif_orientation"] is upright
        batch = next(iter(data.evaluation("test", device=CPU)))
        _, predicted = next(Preprocessing.from_dict(record).read(Path(file), 4))
        assert torch.equal(predicted[0], batch.inputs[0]) and raw.shape == (3, 16, 16)
        del record["exif_orientation"], record["extensions"], record["leave_out"]  # as of 8483121
        _, early = next(Preprocessing.from_dict(record).read(Path(file), 4))
        assert torch.equal(early, predicted) is not upright


@pytest.mark.slow  # two runs
def test_photos_turned_by_exif_are_learnt(tmp_path: Path) -> None:
    """The class is the bright side, which cannot be known without the orientation."""
    random = np.random.default_rng(0)
    sides = (np.s_[:8], np.s_[-8:], np.s_[:, :10], np.s_[:, -10:])
    for number in range(120):
        pixels = random.integers(0, 90, (24, 32, 3), dtype=np.uint8)
        pixels[sides[number % 4]] += 150
        folder = tmp_path / "photos" / "abcd"[number % 4]
        folder.mkdir(parents=True, exist_ok=True)
        orientation = int(random.integers(1, 9))
        stored(Image.fromarray(pixels), orientation, folder / f"{number}.jpg", quality=95)

    def accuracy(name: str, *overrides: str) -> float:
        folder = finished(
            *(tmp_path / name, "data=image_folder", f"data.root={tmp_path / 'photos'}"),
            *("data.num_classes=4", "data.input_shape=[3,16,16]", "data.source.resize=16"),
            *("data.augment=false", "data.num_workers=0", "data.batch_size=20"),
            *("trainer.max_steps=100", *overrides),
        )
        return float(json.loads((folder / "summary.json").read_text())["test"]["test/accuracy"])

    assert accuracy("upright") == 1.0
    assert accuracy("stored", "data.source.exif_orientation=false") < 0.7  # the negative control


# Copies and changes


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".ppm"])
def test_scans_with_a_black_frame_are_not_copies(
    make_data: Make, tmp_path: Path, suffix: str
) -> None:
    arguments = ("image_folder", f"root={scans(tmp_path, suffix)}", *SMALL)
    assert make_data(*arguments).num_examples == {"train": 42, "val": 6, "test": 12}
    split = tmp_path / "split"
    for number, file in enumerate(sorted(tmp_path.glob("[ab]/*"))):
        target = split / ("val" if number % 3 == 0 else "train") / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    arguments = ("image_folder", f"root={split}", "source.test_fraction=0", *SMALL)
    assert make_data(*arguments).num_overlapping == {}
    # The negative controls: a real copy is found, and the ends alone would match all of them.
    copied = next((split / "train" / "a").iterdir())
    shutil.copy(copied, split / "val" / "b" / f"other{suffix}")
    with pytest.raises(DataError, match=r"1 of the 21 val examples are in train too.*other"):
        make_data(*arguments)
    with pytest.raises(DataError, match="21 of the 21 val examples are in train too"):
        make_data(*arguments, "source.identity=ends")


def test_evaluation_sees_seven_eighths_of_the_shorter_side_by_default(
    make_data: Make, tmp_path: Path
) -> None:
    """As ImageNet's 224 of 256."""
    root = scans(tmp_path, ".png", 20)
    few = ("image_folder", f"root={root}", *(a for a in SMALL if "resize" not in a))

    def images(*more: str) -> torch.Tensor:
        data = make_data(*few, *more)
        (batch, *_) = data.evaluation("test", device=CPU)
        return batch.inputs

    assert torch.equal(images(), images("source.resize=18"))
    assert not torch.equal(images(), images("source.resize=19"))
    assert (
        config_of("data=image_folder", "data.num_classes=2")["data"]["source"]["resize"] == "auto"
    )
    tall = ("input_shape=[3,32,224]", "normalize=none")
    assert torch.equal(images(*tall), images(*tall, "source.resize=256"))


@pytest.mark.parametrize("name", ["image_folder", "resized_folder"])
def test_copies_in_the_folders_of_two_classes_are_told_once(
    make_data: Make, image_root: Path, name: str
) -> None:
    arguments = (name, f"root={image_root}", *SMALL)
    shutil.copy(image_root / "cat" / "01.png", image_root / "cat" / "copy.png")  # of one class
    assert make_data(*arguments).notes == []
    shutil.copy(image_root / "cat" / "01.png", image_root / "dog" / "mine.png")
    (note,) = make_data(*arguments).notes
    assert note == (
        f"1 image has copies of the same bytes in folders of different classes, such as "
        f"{image_root}/cat/01.png and {image_root}/dog/mine.png. A model cannot learn both: delete "
        "the copies in the wrong folders"
    )
    shutil.copy(image_root / "dog" / "00.png", image_root / "cat" / "another.png")
    (note,) = make_data(*arguments).notes
    assert note.startswith("2 images have copies of the same bytes")
    # The ends do not prove that the whole files are equal.
    assert make_data(*arguments, "source.identity=ends").notes == []


def test_a_folder_without_class_folders_is_named(make_data: Make, image_root: Path) -> None:
    with pytest.raises(UserError, match="cat holds no folders of classes"):
        make_data("image_folder", f"root={image_root / 'cat'}", *SMALL)


def test_copies_have_equal_keys_whatever_their_size_and_name(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    contents = [random.bytes(size) for size in (0, 1, 1, 5000, 8192, 8193, 8193, 40_000, 40_000)]
    inside = bytearray(contents[-1])
    inside[20_000] ^= 1
    contents += [bytes(inside), *contents]
    paths = [str(tmp_path / f"{number}.png") for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    keys = keys_of_copies(paths, str(tmp_path))
    for one, key in zip(contents, keys, strict=True):
        for other, other_key in zip(contents, keys, strict=True):
            assert (one == other) is (key == other_key)


def test_no_contents_are_read_where_sizes_or_ends_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    ends, whole = files.key_of_ends, files._hash
    monkeypatch.setattr(files, "key_of_ends", lambda f: (opened.append(f"{f} ends"), ends(f))[1])
    monkeypatch.setattr(files, "_hash", lambda f: (opened.append(f"{f} whole"), whole(f))[1])
    sizes = {"a": 9000, "b": 9001, "c": 10_000, "d": 10_000}
    for number, (name, size) in enumerate(sizes.items()):
        (tmp_path / name).write_bytes(np.random.default_rng(number).bytes(size))
    keys_of_copies([str(tmp_path / name) for name in sizes], str(tmp_path))
    assert opened == [f"{tmp_path / name} ends" for name in "cd"]


def test_an_image_saved_in_two_formats_is_not_a_copy(make_data: Make, tmp_path: Path) -> None:
    for number in range(20):
        for split, suffix in (("train", ".png"), ("val", ".bmp")):
            folder = tmp_path / split / ("a", "b")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            noise(number).save(folder / f"{number}{suffix}")
    arguments = ("image_folder", f"root={tmp_path}", "source.test_fraction=0", *SMALL)
    assert make_data(*arguments).num_overlapping == {}


def test_a_fingerprint_sees_the_middle_of_a_file_and_not_its_name_or_time(
    make_data: Make, tmp_path: Path
) -> None:
    root = tmp_path / "scans"
    for number in range(20):
        (root / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        noise(number, 128, 128).save(root / "ab"[number % 2] / f"{number}.bmp")
    arguments = ("image_folder", *SMALL)
    data = make_data(*arguments, f"root={root}")
    before = data.fingerprint()
    early = make_data(*arguments, f"root={root}", "source.identity=ends").fingerprint()
    assert before.keys() == early.keys() and before != early
    moved = shutil.copytree(root, tmp_path / "moved")  # new ctime
    assert make_data(*arguments, f"root={moved}").fingerprint() == before
    file = Path(data.source.train.files[0])
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=times)  # a copying program may set this
    after = make_data(*arguments, f"root={root}").fingerprint()
    assert after["train"] != before["train"] and after["val"] == before["val"]
    same = make_data(*arguments, f"root={root}", "source.identity=ends").fingerprint()
    assert same == early  # the negative control: the comparison of 8483121


def test_contents_are_read_once_and_again_where_anything_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "YOUNG_NS", -(10**12))  # treat this test's files as old enough
    read: list[str] = []
    whole = files._hash
    monkeypatch.setattr(files, "_hash", lambda f: (read.append(f), whole(f))[1])
    paths = [str(tmp_path / f"{number}.png") for number in range(30)]
    for path in paths:
        Path(path).write_bytes(path.encode())
    first = contents_of(paths, str(tmp_path))
    assert sorted(read) == sorted(paths)
    assert contents_of(paths, str(tmp_path)) == first and len(read) == 30
    memory = next((tmp_path / "cache" / "regrow" / "contents").iterdir())
    content = bytearray(memory.read_bytes())
    content[60] ^= 1  # a flipped bit, and a truncated record
    memory.write_bytes(content[:-7])
    assert contents_of(paths, str(tmp_path)) == first and len(read) == 32
    assert contents_of(paths, str(tmp_path)) == first and len(read) == 32
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()  # no folder can be created there
    assert contents_of(paths, str(tmp_path)) == first and len(read) == 62


def test_a_file_that_was_just_written_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could change again within one tick of the file system's clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"1")
    contents_of([str(tmp_path / "a")], str(tmp_path))
    memory = list((tmp_path / "cache").rglob("contents/*"))
    assert [file.stat().st_size for file in memory] == [0]


# Which files are read


@pytest.mark.filterwarnings("ignore:.* image format is deprecated")
def test_every_raster_format_is_read_under_each_of_its_suffixes(tmp_path: Path) -> None:
    suffixes = formats_by_suffix()
    needed = ".jpg .jpeg .jpe .jfif .png .apng .gif .bmp .dib .tif .tiff .webp .avif .jp2 .ppm .pgm"
    assert set(needed.split()) <= suffixes.keys()
    foreign = ".eps .ps .wmf .emf .h5 .hdf .grib .bufr .mpg .mpeg .iim .pdf .txt .npy .csv"
    assert not set(foreign.split()) & suffixes.keys()
    assert not set(NOT_READ) & set(suffixes.values())
    written = []
    for suffix, name in suffixes.items():
        if name not in Image.SAVE or name in ("PALM", "XBM", "MSP", "BLP", "GBR"):
            continue
        image = noise(1, 1024, 1024) if name == "ICNS" else noise(1, 32, 32)
        file = tmp_path / f"image{suffix}"
        image.save(file, name)
        loaded = load_image(file, 3, exif_orientation=True)
        assert loaded.size == image.size and loaded.mode == "RGB", name
        written.append(suffix)
    assert len(written) > 25


def test_a_file_is_known_by_its_content_but_for_formats_without_a_mark(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "really.png", "JPEG")
    assert load_image(tmp_path / "really.png", 3, exif_orientation=True).size == (26, 20)
    noise(1).save(tmp_path / "really.tga", "TGA")
    shutil.copy(tmp_path / "really.tga", tmp_path / "broken.jpg")
    assert load_image(tmp_path / "really.tga", 3, exif_orientation=True).size == (26, 20)
    with pytest.raises(DataError, match=r"broken\.jpg is not a readable image"):
        load_image(tmp_path / "broken.jpg", 3, exif_orientation=True)


def crowded(root: Path) -> Path:
    """Two classes of six images, and other files that real folders contain."""
    for number in range(12):
        folder = root / ("a", "b")[number % 2] / ("" if number < 6 else "deep/er")
        folder.mkdir(parents=True, exist_ok=True)
        noise(number).save(folder / f"{number:02}{('.jfif', '.PNG', '.jpe')[number % 3]}", "PNG")
    a, b = root / "a", root / "b"
    (a / "notes.txt").write_text("x")
    (a / "README").write_text("x")
    (a / "photo.heic").write_bytes(b"x")
    (b / "Thumbs.db").write_bytes(b"x")
    (b / "failed.jpg").touch()
    (b / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (b / "round.jpg").symlink_to(b / "round.jpg")
    os.mkfifo(b / "pipe.jpg")
    (b / "loop").symlink_to(root, target_is_directory=True)
    for hidden in (root / ".ipynb_checkpoints", a / ".ipynb_checkpoints", root / "__MACOSX"):
        hidden.mkdir()
        noise(99).save(hidden / "checkpoint.png")
    (a / ".DS_Store").touch()
    (a / "._00.jpg").write_bytes(b"x")
    noise(98).save(root / "beside.png")
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_files_left_out_are_counted_and_named_by_reason(
    make_data: Make, tmp_path: Path, num_workers: int
) -> None:
    root = crowded(tmp_path / "images")
    data = make_data("image_folder", f"root={root}", *SMALL, f"num_workers={num_workers}")
    assert data.class_names == ["a", "b"] and sum(data.num_examples.values()) == 12
    line = data.notes[0]
    for said in (
        "5 hidden (", ".ipynb_checkpoints", "__MACOSX", "a/.DS_Store", "1 of suffix .heic (a/photo",
        "1 of suffix .txt", "1 of suffix .db (b/Thumbs.db)", "1 without a suffix (a/README)",
        "1 empty (b/failed.jpg)", "2 links that lead nowhere (b/gone.jpg, b/round.jpg)",
        "1 linked folders (b/loop)", "1 beside the class folders (beside.png)",
    ):  # fmt: skip
        assert said in line
    assert line.startswith(f"left out of {root}: ") and "\n" not in line
    assert "1 not regular files (b/pipe.jpg)" in line
    assert len(list(data.train(device=CPU).epoch(0))) > 0
    data.close()


def test_nothing_is_said_of_a_folder_that_is_read_whole(make_data: Make, image_root: Path) -> None:
    assert make_data("image_folder", f"root={image_root}", *SMALL).notes == []


def test_a_prediction_reads_a_folder_by_the_same_rules(
    make_data: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = crowded(tmp_path / "images")
    data = make_data("image_folder", f"root={root}", *SMALL)
    caplog.set_level(logging.WARNING, "regrow")
    logging.getLogger("regrow").propagate = True
    names = [name for part, _ in data.preprocessing.read(root, 5) for name in part]
    assert len(names) == 13 and "1 of suffix .heic (a/photo.heic)" in caplog.text
    (root / "only").mkdir()
    (root / "only" / "a.heic").touch()
    with pytest.raises(UserError, match=r"holds no images\. Left out of .*1 of suffix \.heic"):
        list(data.preprocessing.read(root / "only", 5))


def test_a_class_whose_files_are_not_read_says_why(make_data: Make, tmp_path: Path) -> None:
    for name, suffix in (("a", "png"), ("b", "heic")):
        (tmp_path / name).mkdir()
        noise(1).save(tmp_path / name / f"1.{suffix}", "PNG")
    with pytest.raises(DataError, match=r"b holds no images to train on\. .*1 of suffix \.heic"):
        make_data("image_folder", f"root={tmp_path}", *SMALL)


def test_folders_beside_train_are_named(make_data: Make, tmp_path: Path, image_root: Path) -> None:
    shutil.copytree(image_root, tmp_path / "split" / "train")
    shutil.copytree(image_root, tmp_path / "split" / "masks" / "all")
    (line,) = make_data("image_folder", f"root={tmp_path / 'split'}", *SMALL).notes
    assert "1 beside train and the sets (masks)" in line


def test_a_folder_with_val_and_without_train_says_so(make_data: Make, image_root: Path) -> None:
    classes = sorted(path.name for path in image_root.iterdir())
    for old, new in zip(classes, ("test", "val"), strict=True):
        (image_root / old).rename(image_root / new)
    arguments = ("image_folder", f"root={image_root}", *SMALL)
    with pytest.raises(UserError, match=r"holds val and test, but no folder train\. Add train/"):
        make_data(*arguments)
    (image_root / "test").rename(image_root / "dog")
    with pytest.raises(UserError, match=r"holds val, but no .* if val is a class, name all"):
        make_data(*arguments)
    data = make_data(*arguments, "class_names=[dog,val]")  # as the message advises
    assert data.class_names == ["dog", "val"]


def test_a_class_may_be_called_train(make_data: Make, image_root: Path) -> None:
    (image_root / "dog").rename(image_root / "train")
    arguments = ("image_folder", f"root={image_root}", *SMALL)
    with pytest.raises(UserError, match=r"train holds no folders .* if train is a class, name all"):
        make_data(*arguments)
    data = make_data(*arguments, "class_names=[cat,train]")  # as the message advises
    assert sum(data.num_examples.values()) == 24


def test_folders_named_like_splits_are_not_taken_for_classes(
    make_data: Make, image_root: Path, tmp_path: Path
) -> None:
    root = tmp_path / "both"
    for name in ("Train", "Test"):
        shutil.copytree(image_root, root / name)
    arguments = ("image_folder", f"root={root}", *SMALL, "overlap=ignore")
    with pytest.raises(UserError, match=r"Test and Train, but no folder train\. Rename them to"):
        make_data(*arguments)
    assert make_data(*arguments, "class_names=[Test,Train]").num_classes == 2  # as it advises
    for number, names in enumerate((("other", "testimony"), ("train_station", "valley"))):
        for old, new in zip(("Test", "Train"), names, strict=True):
            shutil.copytree(root / old, tmp_path / str(number) / new)
        data = make_data("image_folder", f"root={tmp_path / str(number)}", *arguments[2:])
        assert data.class_names == [*names]


def test_the_files_of_an_older_record_are_those_of_its_time(
    make_data: Make, tmp_path: Path
) -> None:
    root = crowded(tmp_path / "images")
    for name in ("failed.jpg", "round.jpg"):
        (root / "b" / name).unlink()
    (root / "a" / "._00.jpg").unlink()
    shutil.rmtree(root / ".ipynb_checkpoints")
    shutil.rmtree(root / "__MACOSX")
    recorded = config_of(
        "data=image_folder", f"data.root={root}", *(f"data.{key}" for key in SMALL)
    )  # fmt: skip
    for key in ("exif_orientation", "extensions", "leave_out", "identity"):
        del recorded["data"]["source"][key]
    added = older.complete(recorded)
    assert added["data.source.exif_orientation"] is False
    changes = [f"{key.removeprefix('data.')}={json.dumps(value)}" for key, value in added.items()]
    data = make_data("image_folder", f"root={root}", *SMALL, *changes)
    read = {Path(f).name for split in dict(data.source.items()).values() for f in split.files}
    assert read == {"01.PNG", "04.PNG", "07.PNG", "10.PNG", "checkpoint.png"}


def test_chosen_suffixes_are_read_alone(make_data: Make, tmp_path: Path) -> None:
    root = crowded(tmp_path / "images")
    data = make_data("image_folder", f"root={root}", *SMALL, "source.extensions=[PNG,jpe]")
    assert sum(data.num_examples.values()) == 8 and "of suffix .jfif" in data.notes[0]
    with pytest.raises(UserError, match=r"does not decode \.heic by itself"):
        make_data("image_folder", f"root={root}", *SMALL, "source.extensions=[.heic]")


def test_a_class_linked_to_a_folder_around_it_is_refused(make_data: Make, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    noise(1).save(tmp_path / "a" / "1.png")
    (tmp_path / "b").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(DataError, match=r"b is a link to a folder around it\. Remove the link"):
        make_data("image_folder", f"root={tmp_path}", *SMALL)


def test_a_linked_class_folder_and_linked_files_are_read(
    make_data: Make, tmp_path: Path, image_root: Path
) -> None:
    root = tmp_path / "links"
    root.mkdir()
    (root / "cat").symlink_to(image_root / "cat", target_is_directory=True)
    (root / "dog").mkdir()
    for file in (image_root / "dog").iterdir():
        (root / "dog" / file.name).symlink_to(file)
    data = make_data("image_folder", f"root={root}", *SMALL)
    assert sum(data.num_examples.values()) == 24 and data.notes == []


def test_a_folder_that_may_not_be_read_is_one_line(
    make_data: Make, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    (image_root / "cat" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=r"cat/deep cannot be read: Permission denied\. Make it"):
        make_data("image_folder", f"root={image_root}", *SMALL)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_vanishes_is_named_in_one_line(
    make_data: Make, image_root: Path, num_workers: int
) -> None:
    data = make_data("image_folder", f"root={image_root}", *SMALL, f"num_workers={num_workers}")
    gone = Path(data.source.train.files[3])
    gone.unlink()
    with pytest.raises(DataError, match=r"read: No such file or directory\. Put it back") as caught:
        list(data.train(device=CPU).epoch(0))
    assert str(gone) in str(caught.value) and "\n" not in str(caught.value)
    data.close()


# Pixels


def test_odd_pixels_are_read_right_or_refused(tmp_path: Path) -> None:
    def saved(image: Image.Image, name: str, **options: Any) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    def pixel(path: Path, channels: int = 3) -> Any:
        return load_image(path, channels, exif_orientation=True).getpixel((0, 0))

    cmyk = saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "cmyk.tif")
    assert pixel(cmyk) == (255, 0, 0) and pixel(cmyk, 1) == 76
    assert pixel(saved(Image.new("LA", (8, 8), (90, 10)), "la.png")) == (90, 90, 90)
    assert pixel(saved(Image.new("RGBA", (8, 8), (1, 2, 3, 0)), "rgba.png")) == (1, 2, 3)
    assert pixel(saved(Image.new("1", (8, 8), 1), "one.png")) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    clear = saved(palette, "clear.png", transparency=b"\x00\x80")
    assert pixel(clear) == (10, 200, 30)
    for number, image in enumerate((Image.new("I;16", (8, 8), 40_000), Image.new("F", (8, 8), 9))):
        deep = saved(image, f"deep{number}.tif")
        with pytest.raises(DataError, match="pixels have more than 8 bits; convert them to 8"):
            pixel(deep)
    with pytest.raises(DataError, match="more than 8 bits"):
        pixel(saved(Image.new("I;16", (8, 8), 40_000), "deep.png"))


def test_the_first_of_several_frames_is_read_and_said(make_data: Make, tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / ("a", "b")[number % 2]
        folder.mkdir(exist_ok=True)
        frames = [noise(number), noise(number + 100)] if number < 3 else [noise(number)]
        frames[0].save(folder / f"{number}.tif", save_all=True, append_images=frames[1:])
    data = make_data("image_folder", f"root={tmp_path}", *SMALL)
    (line,) = data.notes
    assert line.startswith("the first frame is read of files with several: 3 of 20 files")
    assert np.array_equal(load_image(tmp_path / "a" / "0.tif", 3, exif_orientation=True), noise(0))


@pytest.mark.parametrize("kind", [">f4", "<u2", ">i8", "longdouble", "uint64"])
def test_arrays_of_any_plain_numbers_are_read(make_data: Make, tmp_path: Path, kind: str) -> None:
    data = make_data("digits")
    images = data.source.test.inputs[:, 0].numpy()
    np.save(tmp_path / "plain.npy", images)
    np.save(tmp_path / "odd.npy", images.astype(kind))
    read = [
        torch.cat([part for _, part in data.preprocessing.read(tmp_path / f"{name}.npy", 50)])
        for name in ("plain", "odd")
    ]
    assert torch.equal(*read)


def test_images_of_four_channels_are_not_read_from_files(tmp_path: Path) -> None:
    noise(1).save(tmp_path / "a.png")
    how = Preprocessing.from_dict(
        dict.fromkeys(("mean", "std", "columns", "target_mean", "target_std"))
        | {"kind": "image", "input_shape": [4, 8, 8], "input_max": 255.0, "resize": None}
        | {"delimiter": ","}
    )
    with pytest.raises(UserError, match="takes images of 4 channels"):
        next(how.read(tmp_path / "a.png", 1))
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 9, 9), np.uint8))
    with pytest.raises(DataError, match=r"model takes images \(N, 4, 8, 8\)"):
        next(how.read(tmp_path / "a.npy", 1))


# Class names


def test_class_names_are_text(make_data: Make, tmp_path: Path) -> None:
    for number in range(24):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        noise(number).save(folder / f"{number}.png")
    arguments = ("image_folder", f"root={tmp_path}", *SMALL)
    assert make_data(*arguments, "class_names=[1,0]").class_names == ["1", "0"]
    with pytest.raises(UserError, match=r'=\[False, True\] must be .*quotes.*"no"'):
        make_data(*arguments, "class_names=[false,true]")
    with pytest.raises(UserError, match=r"=\[1\.5, 2\.5\] must be"):
        make_data("breast_cancer", "class_names=[1.5,2.5]")
    rows = [f"{n % 2},{n * 1.5}" for n in range(50)]
    (tmp_path / "rows.csv").write_text("\n".join(["label,x", *rows]))
    table = make_data(
        "csv", f"root={tmp_path}", "source.train_file=rows.csv", "source.target_columns=[label]",
        "target_kind=binary", "num_classes=2", "num_outputs=1", "input_shape=[1]",
        "class_names=[0,1]",
    )  # fmt: skip
    assert table.class_names == ["0", "1"]


def test_a_set_without_a_class_and_a_folder_of_one_class_are_named(
    make_data: Make, image_root: Path, tmp_path: Path
) -> None:
    whole, split = make_data("image_folder", f"root={image_root}", *SMALL), tmp_path / "split"
    assert not [note for note in whole.notes if "holds no example" in note]  # the control
    shutil.copytree(image_root, split / "train")
    shutil.copytree(image_root / "dog", split / "val" / "dog")
    data = make_data("image_folder", f"root={split}", *SMALL, "overlap=report")
    (note,) = [note for note in data.notes if "holds no example" in note]
    assert note.startswith("val holds no example of cat: ")
    (tmp_path / "one").mkdir()
    shutil.copytree(image_root / "cat", tmp_path / "one" / "cat")
    with pytest.raises(UserError, match=r"one class folder \(images\): cat 12\. A class"):
        make_data("image_folder", f"root={tmp_path / 'one'}", *SMALL)
    with pytest.raises(UserError, match=r"data\.num_classes=1: a classifier needs at least two"):
        make_data("image_folder", f"root={tmp_path / 'one'}", *SMALL, "num_classes=1")


def test_images_are_counted_without_torch_as_they_are_found(tmp_path: Path) -> None:
    root, cat = tmp_path / "photos", tmp_path / "photos" / "cat"
    for name in (
        "a.png",
        "B.PNG",
        "c.jpg",
        "d.txt",
        ".e.png",
        "in/f.png",
        ".in/g.png",
        "@eaDir/h.png",
    ):
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        (cat / name).write_bytes(b"x")
    (cat / "empty.png").touch()
    (cat / "folder.png").mkdir()
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "i.png").write_bytes(b"x")
    (cat / "linked").symlink_to(tmp_path / "far")
    (cat / "linked.png").symlink_to(tmp_path / "far" / "i.png")
    (cat / "dead.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(cat / "pipe.png")

    def counts(*leave_out: str) -> tuple[int, int]:
        left_out = files.LeftOut(root)
        found = files.find_files(cat, {".png"}, leave_out, left_out)
        return count_images(cat, root, {".png"}, leave_out), len(found)

    assert counts() == (8, 8)
    assert counts("hidden") == (5, 5)
    assert counts("empty") == (7, 7)
    assert counts("hidden", "empty", "cat/in", "./cat/a.png") == (2, 2)
    assert counts("in", "a.png") == (8, 8)  # paths are below the root
    assert len([*cat.rglob("*.png")]) not in (8, 5, 7, 2)  # a plain search differs
    (root / "dog").mkdir()
    said = contents_in_words(root, ["png"], ("hidden", "empty", "cat/in"))
    assert "2 class folders (images): cat 3, dog 0. The folder dog holds no images" in said
