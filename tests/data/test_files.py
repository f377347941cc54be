from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from waiting import alive, until

from lab.data.augment import Photo
from lab.data.datasets import from_datasets
from regrow.config.targets import instantiate
from regrow.errors import DataError, UserError
from regrow.feeding import items
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.decoding import load_image
from regrow.feeding.loaders import Data
from regrow.processes.interrupt import Interrupted, StopRequest

Make = Callable[..., Data]
Same = Callable[[list[LoadedBatch], list[LoadedBatch]], bool]
CPU = torch.device("cpu")
SMALL = ("num_classes=2", "input_shape=[3,16,16]", "source.resize=18", "batch_size=5")


class Noisy:
    """A custom data set whose transform draws from all three ambient random generators."""

    def __init__(self, count: int, offset: int) -> None:
        self.count, self.offset = count, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        noise = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return torch.tensor([self.offset + index, *noise]), index % 3


class Mapped:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = {"tokens": torch.full((4,), index), "length": torch.tensor(4)}
        return {"inputs": text, "targets": float(index), "weights": index / 8}


def of_ones_own(train: Any, val: Any = None, **changes: Any) -> Data:
    """As in a user's YAML; objects replace the `_target_` paths of this file."""
    node = {
        "_target_": "regrow.feeding.loaders.Data",
        "seed": 0, "root": ".", "target_kind": "multiclass", "num_classes": 3, "num_outputs": 3,
        "input_shape": [4], "class_names": None, "batch_size": 4, "eval_batch_size": 4,
        "num_workers": 0, "pin_memory": True, "persistent_workers": True,
        "drop_last": False, "limit_train": None, "limit_by": "random",
        "augment": True, "augmentation": None, "sampling": None, "transforms": [],
        "cache": None, "cache_root": None, "cache_max_gb": 20,
        "normalize": "none", "normalize_targets": False,
        "target_dtype": "float64", "integers": "int64", "ignore_index": None,
        "changed": "refuse", "identity": "contents", "overlap": "refuse",
        "final_sets": [], "folds": None, "fold": 0,
    } | changes  # fmt: skip
    source = from_datasets(train=train, val=val, test=None, collate=None)
    mixing = node.pop("mixing", None)  # Hydra would make a dict of a dataclass
    data = instantiate(node, source=source, mixing=mixing)
    assert isinstance(data, Data)
    return data


def test_a_model_that_starts_from_data_sees_the_same_files_with_any_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("regrow.feeding.loaders.NUM_SAMPLED", 7)
    found = [of_ones_own(Noisy(30, 0), num_workers=n).sample_inputs() for n in (0, 2)]
    assert found[0][:, 0].tolist() == [0, 4, 8, 12, 17, 21, 25]
    assert torch.equal(found[0], found[1])
    until(lambda: not multiprocessing.active_children())
    other = of_ones_own(Noisy(30, 0), seed=1).sample_inputs()
    assert not torch.equal(found[0], other)


def test_a_model_that_starts_from_data_needs_inputs_of_one_tensor() -> None:
    data = of_ones_own(Mapped(), target_kind="regression", num_classes=None, num_outputs=1)
    with pytest.raises(UserError, match="starts from training inputs of one tensor"):
        data.sample_inputs()


def two_epochs(data: Data, start: int = 0) -> tuple[list[LoadedBatch], list[LoadedBatch]]:
    train = data.train(device=CPU)
    return list(train.epoch(0, start)), list(train.epoch(1, start))


def test_uint8_images_of_ones_own_are_normalised_as_asked() -> None:
    pixels = [(torch.full((3, 2, 2), 10 * n, dtype=torch.uint8), n % 3) for n in range(4)]
    given = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    data = of_ones_own(pixels, input_shape=[3, 2, 2], normalize=given)
    batch = next(iter(data.evaluation("train", device=CPU)))
    raw = torch.stack([image for image, _ in pixels]) / 255
    mean, std = (torch.tensor(given[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(batch.inputs, (raw - mean) / std, atol=1e-6)
    floats = [(image.float(), target) for image, target in pixels]
    data = of_ones_own(floats, input_shape=[3, 2, 2], normalize=given)
    with pytest.raises(UserError, match="this data set gives float32"):
        next(iter(data.evaluation("train", device=CPU)))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(same: Same, num_workers: int) -> None:
    first, second = two_epochs(of_ones_own(Noisy(13, 0)))
    many = of_ones_own(Noisy(13, 0), num_workers=num_workers)
    ours, next_ours = two_epochs(many)
    assert same(first, ours) and same(second, next_ours)
    assert not same(first, second)
    # Persistent workers use the new epoch's noise, not only its order.
    noise = {row[0].item(): row[1:] for batch in ours for row in batch.inputs}
    later = {row[0].item(): row[1:] for batch in next_ours for row in batch.inputs}
    assert all((noise[index] != later[index]).all() for index in noise)
    many.close()
    assert not multiprocessing.active_children()


def test_without_a_seed_per_example_the_number_of_workers_would_show(
    same: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""
    import contextlib

    monkeypatch.setattr(items, "seeded", lambda value: contextlib.nullcontext())
    runs = [
        list(of_ones_own(Noisy(13, 0), num_workers=n).train(device=CPU).epoch(0)) for n in (0, 1)
    ]
    assert not same(*runs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_entered_in_its_middle_is_its_rest(same: Same, num_workers: int) -> None:
    whole, later = two_epochs(of_ones_own(Noisy(13, 0)))
    data = of_ones_own(Noisy(13, 0), num_workers=num_workers)
    rest, later_rest = two_epochs(data, start=2)
    assert same(rest, whole[2:]) and same(later_rest, later[2:]) and not same(rest, whole[:2])
    assert list(data.train(device=CPU).epoch(0, 4)) == []


def test_an_epoch_left_half_way_does_not_disturb_the_next(same: Same) -> None:
    _, second = two_epochs(of_ones_own(Noisy(13, 0)))
    train = of_ones_own(Noisy(13, 0), num_workers=2).train(device=CPU)
    iterator = train.epoch(0)
    next(iterator)
    del iterator
    assert same(list(train.epoch(1)), second)


def test_workers_that_are_not_persistent_end_with_the_epoch(same: Same) -> None:
    data = of_ones_own(Noisy(13, 0), num_workers=2, persistent_workers=False)
    assert same(list(data.train(device=CPU).epoch(0)), two_epochs(of_ones_own(Noisy(13, 0)))[0])
    assert not multiprocessing.active_children()


def test_a_worker_ignores_the_signals_of_the_run(same: Same) -> None:
    """Schedulers signal every process of a run, but only the run reacts."""
    first, second = two_epochs(of_ones_own(Noisy(13, 0)))
    data = of_ones_own(Noisy(13, 0), num_workers=1)
    train = data.train(device=CPU)
    batches = train.epoch(0)
    begun = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid or 0, number)
    assert same([*begun, *batches], first) and same(list(train.epoch(1)), second)
    assert multiprocessing.active_children() == [worker]
    data.close()


class Handing:
    """Its worker hands something over to any process that asks at the address in a file."""

    def __init__(self, file: Path, *, hides: bool) -> None:
        self.file, self.hides = file, hides

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not self.hides:
            sys.excepthook = sys.__excepthook__
        sharer = resource_sharer._resource_sharer  # type: ignore[attr-defined]
        self.file.write_bytes(pickle.dumps(sharer.register(lambda *_: None, lambda: None)))
        return torch.zeros(4), index % 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux")
@pytest.mark.parametrize("hides", [True, False], ids=["hidden", "the negative control"])
def test_a_worker_prints_nothing_if_the_run_stops_in_the_middle_of_reading(
    hides: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a signal does that interrupts the run's wait for a batch."""
    file = tmp_path / "address"
    data = of_ones_own(Handing(file, hides=hides), num_workers=1)
    next(data.train(device=CPU).epoch(0))
    ident = pickle.loads(file.read_bytes())
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as half_made:
            half_made.connect(ident[0])
    resource_sharer._resource_sharer.get_connection(ident).close()  # type: ignore[attr-defined]
    data.close()
    assert ("resource_sharer" in capfd.readouterr().err) is not hides


class Holding:
    """Its worker holds the lock of torch's event in the second batch, as it may in any moment."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        frame = sys._getframe()
        while self.file.exists() and "done_event" not in frame.f_locals:
            assert frame.f_back is not None
            frame = frame.f_back
        if self.file.exists():
            frame.f_locals["done_event"]._cond.acquire()
            self.file.with_suffix(".held").touch()
            time.sleep(60)
        return torch.zeros(4), index % 3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux")
def test_a_worker_that_ends_with_a_lock_does_not_hold_up_the_run(tmp_path: Path) -> None:
    file = tmp_path / "holds"
    data = of_ones_own(Holding(file), num_workers=1)
    train = data.train(device=CPU)
    assert len(list(train.epoch(0))) == 2
    file.touch()

    def read() -> None:
        with contextlib.suppress(Exception):  # its worker ends
            list(train.epoch(1))

    threading.Thread(target=read, daemon=True).start()
    until(file.with_suffix(".held").exists)
    ended = threading.Thread(target=data.close, daemon=True)
    ended.start()
    ended.join(20)
    assert not ended.is_alive()


KILLED_EARLY = """
import os, signal, sys, time
from pathlib import Path

import torch

from regrow.feeding.feeds import FileFeed
from regrow.feeding.sampling import Windows

def begins_late():
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(1)  # so that this worker looks for its parent when that has been killed

os.register_at_fork(after_in_child=begins_late)
feed = FileFeed(
    [(torch.zeros(1), 0)] * 8, lambda inputs: inputs, torch.device("cpu"), name="train", seed=0,
    num_classes=None, ignore_index=None, collate=None, num_workers=2, pin_memory=False,
    persistent_workers=True,
)
next(feed.read(Windows(8, 4, False, 0, 1), torch.arange(8), 0, 0))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux")
def test_workers_of_a_process_that_was_killed_as_they_began_end_too(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", KILLED_EARLY, str(tmp_path)])
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    run.kill()
    run.wait()
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert any(alive(worker) for worker in workers)
    try:
        until(lambda: not any(alive(worker) for worker in workers))
    finally:
        for worker in filter(alive, workers):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.usefixtures("global_state_unchanged")
def test_reading_draws_nothing_from_the_ambient_random_states(num_workers: int) -> None:
    states = random.getstate(), np.random.get_state()[1].copy()
    data = of_ones_own(Noisy(13, 0), Noisy(5, 100), num_workers=num_workers)
    two_epochs(data)
    list(data.evaluation("val", device=CPU))
    assert states[0] == random.getstate() and (states[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_shares_of_files_are_the_window(world_size: int) -> None:
    alone = list(of_ones_own(Noisy(13, 0)).train(device=CPU).epoch(0))
    data = of_ones_own(Noisy(13, 0))
    ranks = [
        list(data.train(device=CPU, rank=rank, world_size=world_size).epoch(0))
        for rank in range(world_size)
    ]
    for window, batch in enumerate(alone):
        shares = [batches[window] for batches in ranks]
        assert torch.equal(torch.cat([s.inputs[: s.num_local] for s in shares]), batch.inputs)
        assert all(s.weights is not None and not s.weights.any() for s in shares if not s.num_local)
    assert any(share.num_local == 0 for share in shares)  # the last window holds one example


def test_items_may_be_mappings_with_mappings_of_inputs_and_weights() -> None:
    data = of_ones_own(Mapped(), target_kind="regression", num_classes=None, num_outputs=1)
    for batch in data.train(device=CPU).epoch(0):
        assert batch.inputs.keys() == {"tokens", "length"} and batch.inputs["tokens"].shape == (
            4,
            4,
        )
        assert batch.targets.dtype == torch.float32
        assert batch.weights is not None and torch.allclose(batch.weights, batch.targets / 8)
        assert sum(part.num_local for part in batch.split(3)) == 4


def test_a_class_out_of_range_and_a_foreign_item_are_named() -> None:
    data = of_ones_own(Noisy(13, 0), num_classes=2, num_workers=1)
    with pytest.raises(DataError, match=r"train example \d+: class 2 is out of range.*0 … 1"):
        list(data.train(device=CPU).epoch(0))
    with pytest.raises(DataError, match="must be \\(inputs, targets\\)"):
        numbers = of_ones_own([torch.ones(2)] * 4, num_classes=None, target_kind="regression")
        list(numbers.train(device=CPU).epoch(0))


# Folders of images


def test_an_image_that_holds_a_program_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL passes PostScript of any name to Ghostscript unless the allowed formats are given."""
    from PIL import Image

    ghost = tmp_path / "gs"
    ghost.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    ghost.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    image = tmp_path / "a.png"
    image.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="is not a readable image"):
        load_image(image, 3, exif_orientation=True)
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(OSError), Image.open(image) as file:  # it would have been run
        file.load()
    assert (tmp_path / "ran").exists()


def test_an_image_folder_becomes_batches(make_data: Make, image_root: Path, same: Same) -> None:
    runs = []
    for workers in (0, 2):
        data = make_data("image_folder", f"root={image_root}", f"num_workers={workers}", *SMALL)
        assert data.class_names == ["cat", "dog"]
        assert data.num_examples == {"train": 17, "val": 2, "test": 5}
        runs.append(two_epochs(data))
        evaluated = list(data.evaluation("train", device=CPU))
        assert sum(batch.num_local for batch in evaluated) == 17
        plain = torch.cat([batch.inputs for batch in evaluated])
        assert plain.mean((0, 2, 3)).abs().max() < 1e-5 and plain.shape == (17, 3, 16, 16)
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1])
    assert not same(*runs[0])
    data = make_data("image_folder", f"root={image_root}", "num_workers=0", "augment=false", *SMALL)
    first, second = two_epochs(data)
    images = [sorted(x.sum().item() for b in run for x in b.inputs) for run in (first, second)]
    assert np.allclose(images[0], images[1])  # the same unmodified images in another order


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_evaluation_sees_torchvisions_resize_and_centre_crop(
    make_data: Make, image_root: Path, decoder: str
) -> None:
    from PIL import Image
    from torchvision.transforms import v2

    how = ("num_workers=0", "normalize=imagenet", f"source.decoder={decoder}")
    data = make_data("image_folder", f"root={image_root}", *how, *SMALL)
    steps = [v2.Resize(18), v2.CenterCrop(16), v2.PILToTensor()]
    theirs = v2.Compose([
        *(steps if decoder == "pillow" else [steps[2], *steps[:2]]),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ])  # fmt: skip
    files = data.source.test.files
    want = torch.stack([theirs(Image.open(file)) for file in files])
    got = torch.cat([batch.inputs for batch in data.evaluation("test", device=CPU)])
    assert torch.allclose(got, want, atol=1e-5)


def test_splits_may_have_folders_of_their_own_and_a_copy_in_two_is_refused(
    make_data: Make, image_root: Path
) -> None:
    root = image_root.parent / "split"
    for name in ("cat", "dog"):
        for number, file in enumerate(sorted((image_root / name).iterdir())):
            target = root / ("test" if number < 3 else "train") / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    arguments = ("image_folder", f"root={root}", "num_workers=0", *SMALL)
    assert make_data(*arguments).num_examples == {"train": 16, "val": 2, "test": 6}
    copied = next((root / "train" / "dog").iterdir())
    shutil.copy(copied, root / "test" / "cat" / "another_name.png")
    with pytest.raises(DataError, match=r"test examples are in (train|val) too.*another_name\.png"):
        make_data(*arguments)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named_in_one_line(
    make_data: Make, image_root: Path, num_workers: int, content: str
) -> None:
    data = make_data(
        "image_folder", f"root={image_root}", f"num_workers={num_workers}", "normalize=none", *SMALL
    )
    broken = Path(data.source.train.files[3])
    whole = broken.read_bytes()
    broken.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"no image", "empty": b""}[content]
    )
    with pytest.raises(DataError) as caught:
        list(data.train(device=CPU).epoch(0))
    assert str(broken) in str(caught.value) and "\n" not in str(caught.value)
    data.close()


@pytest.mark.parametrize("method", ["convert", "getexif"])
def test_a_stop_while_an_image_is_read_does_not_make_it_a_broken_one(
    method: str, make_data: Make, image_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    data = make_data("image_folder", f"root={image_root}", *SMALL, "num_workers=0")
    batches = data.train(device=CPU).epoch(0)
    monkeypatch.setattr(Image.Image, method, lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted), StopRequest() as stop:
        next(stop.while_waiting(batches))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_classes=3", "class folders (images): cat 12, dog 12. Set data.num_classes=2."),
        (
            "class_names=[cat,cow]",
            "dog 12. Set data.class_names to the names of these folders, in ",
        ),
        ("source.resize=8", "data.source.resize=8 is smaller than the crop 16 x 16"),
        ("root=/nowhere", "data.root=/nowhere: not a folder"),
        ("input_shape=[5]", "not an image's shape"),
        ("normalize=nonsense", "data.normalize=nonsense must be one of train"),
        ("normalize={mean:[0.5],std:[0.5]}", "it takes 3 means"),
    ],
)
def test_an_error_about_a_folder_says_what_it_holds_in_one_line(
    make_data: Make, image_root: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_data("image_folder", f"root={image_root}", *SMALL, override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_folders_without_images_beside_the_classes_are_named(
    make_data: Make, image_root: Path
) -> None:
    given = ("image_folder", f"root={image_root}", *SMALL)
    (image_root / "cow").mkdir()
    with pytest.raises(
        UserError, match=r" The folder cow holds no images: add some, or remove the folder\.$"
    ):
        make_data(*given, "class_names=[cat,dog]")  # whose quotes are not the problem
    (image_root / "bird").mkdir()
    said = r"\(images\): bird 0, cat 12, cow 0, dog 12\. The folders bird and cow hold no images"
    with pytest.raises(UserError, match=rf"{said}: add some, or remove the folders\.$"):
        make_data(*given)
    with pytest.raises(UserError, match=rf"{said}\. Set data\.num_classes=4\.$"):
        make_data(*given, "num_classes=3")


def test_a_class_without_images_is_an_empty_split(make_data: Make, image_root: Path) -> None:
    for file in (image_root / "cat").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="cat holds no images"):
        make_data("image_folder", f"root={image_root}", *SMALL)


def test_a_photo_is_a_pure_function_of_the_seed() -> None:
    from PIL import Image

    photo = Photo(
        input_shape=[3, 8, 8], crop_scale=[0.5, 1.0], crop_ratio=[0.75, 1.3], flip=True,
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
    )  # fmt: skip
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8))

    def seeded(value: int) -> bytes:
        with items.seeded(value):
            return photo(image).tobytes()

    assert seeded(1) == seeded(1) != seeded(2)
