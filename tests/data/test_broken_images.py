"""Broken images in a folder: all are counted once one is met, and can be left out by name."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regrow.config import rules
from regrow.config.job import Job
from regrow.errors import DataError, UserError
from regrow.feeding import broken_images
from regrow.feeding.broken_images import BrokenImages, counted
from regrow.feeding.decoding import BrokenImage, load_image
from regrow.feeding.loaders import Data
from regrow.runs import session

Make = Callable[..., Data]
CPU = torch.device("cpu")
SMALL = ("num_classes=2", "input_shape=[3,16,16]", "source.resize=18", "num_workers=0")


def files_of(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def truncated(*files: Path) -> list[Path]:
    for file in files:
        file.write_bytes(file.read_bytes()[:-400])
    return list(files)


def told(make_data: Make, *arguments: str) -> str:
    with pytest.raises(BrokenImages) as caught:
        list(make_data("image_folder", *SMALL, *arguments).train(device=CPU).epoch(0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "how", [("normalize=train",), ("normalize=none",), ("normalize=none", "num_workers=2")],
    ids=["at the start", "in an epoch", "in a worker"],
)  # fmt: skip
def test_all_broken_images_are_counted_and_left_out_as_pasted(
    make_data: Make, image_root: Path, how: tuple[str, ...], tmp_path: Path
) -> None:
    whole = files_of(image_root)
    odd = whole[3].with_name("an odd, [name] 'x'.jpg")
    whole[3].rename(odd)
    broken = truncated(odd, *whole[8:14:2], whole[20])
    given = (f"root={image_root}", *how)
    said = told(make_data, *given)
    assert f"5 of {len(whole)} images cannot be read: " in said and ", …" in said
    assert sum(said.count(str(file)) for file in broken) == 4  # the first one met, and three
    (pasted,) = shlex.split(said.partition("leave them out: ")[2])
    data = make_data("image_folder", *SMALL, *given, pasted.removeprefix("data."))
    assert sum(data.num_examples.values()) == len(whole) - 5
    assert "5 named in data.source.leave_out (" in data.notes[0]
    assert len(list(data.train(device=CPU).epoch(0))) > 0
    data.close()
    # The same data as without the files, but for the key.
    for file in broken:
        file.unlink()
    assert make_data("image_folder", *SMALL, *given).fingerprint() == data.fingerprint()
    # Predictions apply the record to other folders, so it names no files.
    assert data.preprocessing.leave_out == ["hidden", "empty"]
    with pytest.raises(UserError, match=r"leave_out: \S.* is not among the images below"):
        make_data("image_folder", *SMALL, *given, pasted.removeprefix("data."))


def test_a_single_broken_image_is_said_to_be_the_only_one(
    make_data: Make, image_root: Path
) -> None:
    (broken,) = truncated(files_of(image_root)[5])
    said = told(make_data, f"root={image_root}")
    assert said.startswith(f"{broken} is not a readable image: ")
    of_all = f"(the only one of {len(files_of(image_root))} images)"
    name = broken.relative_to(image_root)
    skip = f"'data.source.leave_out=[hidden,empty,{name}]'"
    assert said.endswith(f" {of_all}. Fix or remove it, or leave it out: {skip}")
    # After a step, the files that are left decide what is cut from them.
    data = make_data("image_folder", *SMALL, f"root={image_root}", "normalize=none")
    with pytest.raises(BrokenImages) as caught:
        list(data.train(device=CPU).epoch(0))
    now = session.after_a_change(caught.value, Job({}, "run", [], {}, {}, []), Path("run"))
    assert now.endswith(f" {of_all}. Fix it, or start a new run with {skip}.")


def test_broken_images_and_masks_are_counted_and_left_out_with_their_pair(
    make_data: Make, tmp_path: Path
) -> None:
    for number in range(16):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            file = tmp_path / "pairs" / kind / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 2, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(file)
    root = tmp_path / "pairs"
    whole = files_of(root)
    for file in (whole[3], whole[7], whole[16 + 3], whole[16 + 5]):  # two images, then two masks
        file.write_bytes(file.read_bytes()[:40])
    given = ("mask_folder", *SMALL[:2], "num_workers=0", "normalize=none", f"root={root}",
             "augmentation=null", "source.val_fraction=0", "source.test_fraction=0")  # fmt: skip
    with pytest.raises(BrokenImages) as caught:
        list(make_data(*given).train(device=CPU).epoch(0))
    assert "4 of 32 images and masks cannot be read: " in str(caught.value)
    left_out = "[hidden,empty,images/03.png,images/05.png,images/07.png]"
    assert caught.value.leave_out == f"data.source.leave_out={left_out}"
    data = make_data(*given, caught.value.leave_out.removeprefix("data."))
    assert sum(data.num_examples.values()) == 13
    assert len(list(data.train(device=CPU).epoch(0))) > 0


def test_many_broken_images_are_named_in_the_log_and_time_bounds_the_search(
    make_data: Make,
    image_root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broken_images, "PASTED", 2)
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    whole = files_of(image_root)
    data = make_data("image_folder", *SMALL, f"root={image_root}", "normalize=none")
    broken = truncated(*whole[:3])
    with pytest.raises(BrokenImage) as caught:
        load_image(broken[1], 3, exif_orientation=True)
    found = counted(data.source, caught.value)
    assert str(found).endswith("or name their paths below data.root in data.source.leave_out. The "
                               "log names them")  # fmt: skip
    assert all(f"not readable: {file}" in caplog.text for file in broken)
    assert isinstance(found, BrokenImages) and found.leave_out == ""
    late = str(counted(data.source, caught.value, seconds=-1))
    assert f"the only one of the 1 images looked at in -1 s, of {len(whole)}" in late


class Taken:
    """Notes the type of the image that it gets, from the decoder that the run uses."""

    def __init__(self, takes: str | None) -> None:
        self.types: set[type] = set()
        if takes:
            self.takes = takes

    def __call__(self, image: Any) -> Any:
        self.types.add(type(image))
        return torch.zeros(3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize("takes", [None, "pixels"])
def test_the_search_for_broken_images_decodes_as_the_training_does(
    make_data: Make, image_root: Path, takes: str | None
) -> None:
    given = (*SMALL, "normalize=none", "source.decoder=torchvision", f"root={image_root}")
    data = make_data("image_folder", *given)
    data.augmentation = taken = Taken(takes)
    list(data.train(device=CPU).epoch(0))
    train, val = data._as_decoded().train, data._as_decoded().val
    assert {type(train.decoded(file)) for file in train.files} == taken.types
    assert taken.types == {torch.Tensor if takes else Image.Image}  # the control: they differ
    assert isinstance(val.decoded(val.files[0]), torch.Tensor)


def test_a_path_of_leave_out_that_is_nothing_and_a_misspelt_word_are_refused(
    make_data: Make, image_root: Path
) -> None:
    given = ("image_folder", *SMALL, f"root={image_root}")
    name = files_of(image_root)[0].relative_to(image_root)
    (image_root / "notes.txt").touch()
    for wrong in ("cat/nowhere.jpg", "cat/", "nowhere/", "notes.txt", f"../{name}"):
        with pytest.raises(UserError, match=r"leave_out: \S.* is not among the images below"):
            make_data(*given, f"source.leave_out=[hidden,{wrong}]")
    whole = make_data(*given)
    less = make_data(*given, f"source.leave_out=[{name}]")
    assert sum(less.num_examples.values()) == sum(whole.num_examples.values()) - 1
    assert less.fingerprint() != whole.fingerprint()
    for other in (f"./{name}", f"{name.parent}//{name.name}"):
        again = make_data(*given, f"source.leave_out=[{other}]")
        assert again.fingerprint() == less.fingerprint()
    schema = rules.RULES["data.source.leave_out"].schema
    assert rules.fits(["hidden", "cat/a.jpg"], schema) and not rules.fits(["hiden"], schema)


def test_an_error_of_other_data_stays_as_it_is(make_data: Make, image_root: Path) -> None:
    data = make_data("image_folder", *SMALL, f"root={image_root}")
    error = BrokenImage("elsewhere/a.jpg is broken", "elsewhere/a.jpg", "elsewhere/a.jpg is broken")
    assert counted(data.source, error) is error and isinstance(error, DataError)
