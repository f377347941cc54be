"""Images that a run logs: as PNG files, in the loggers and on the page."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regrow.errors import UserError
from regrow.record import fitting, logged_images, plots, report
from regrow.record.loggers import Csv, TensorBoard, open_loggers


def pixels_of(content: bytes) -> Any:
    with Image.open(io.BytesIO(content)) as file:
        return np.array(file)


def opened(folder: Path, resume_step: int | None, **nodes: Any) -> Any:
    given = {"resume_step": resume_step, "run_name": "x/y", "config": None}
    return open_loggers(folder, nodes, position=None, **given)


def test_tensors_and_figures_become_the_pixels_that_they_show() -> None:
    grey = torch.tensor([[0.0, 0.5], [1.0, 7.0]])
    assert pixels_of(logged_images.as_png(grey)).tolist() == [[0, 128], [255, 255]]
    colour = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    shown = pixels_of(logged_images.as_png(colour))
    assert torch.equal(torch.tensor(shown), colour.permute(1, 2, 0))
    batch = torch.ones(3, 1, 2, 2)
    shown = pixels_of(logged_images.as_png(batch))  # two columns and rows, 2 pixels between them
    assert shown.shape == (6, 6) and int((shown == 255).sum()) == 3 * 4
    assert (shown[:2, :2] == 255).all() and (shown[4:, 4:] == 0).all()
    nothing = torch.tensor([[float("nan")]])
    assert pixels_of(logged_images.as_png(nothing)).tolist() == [[0]]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 2))
    assert pixels_of(logged_images.as_png(figure)).shape[:2] == (200, 100)


NOT_IMAGES = {
    "ones": torch.ones(4),
    "two channels": torch.ones(2, 4, 4),
    "empty": torch.ones(0, 3),
    "empty batch": torch.ones(0, 3, 4, 4),
    "a name": "picture.png",
    "an object": object(),
    "int64": torch.full((2, 2), 200),
    "up to 255": torch.tensor([[0.0, 255.0]]),
}


@pytest.mark.parametrize("image", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_a_value_that_is_not_an_image_is_one_warning(
    image: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=r"^record\.image: .* is not an image\. Give [^\n]*$"):
        logged_images.as_png(image)
    loggers = opened(tmp_path, None)
    for step in (1, 2):
        loggers.image("samples", image, step=step)
    assert logged_images.logged(tmp_path) == []
    (warning,) = caplog.records
    assert "is not an image. Give" in warning.getMessage()
    loggers.image("samples", torch.ones(2, 2), step=3)
    assert [one.step for one in logged_images.logged(tmp_path)] == [3]
    loggers.close()


def test_a_mirrored_array_is_an_image() -> None:
    array = np.arange(8, dtype=np.uint8).reshape(4, 2)
    assert pixels_of(logged_images.as_png(array[::-1])).tolist() == array[::-1].tolist()
    assert pixels_of(logged_images.as_png(array[:1, ::-1])).tolist() == [[1, 0]]
    assert pixels_of(logged_images.as_png(array[:1][::-1])).tolist() == [[0, 1]]


def test_a_mask_and_values_near_0_to_1_are_images() -> None:
    assert pixels_of(logged_images.as_png(torch.tensor([[True, False]]))).tolist() == [[255, 0]]
    given = torch.tensor([[-3.0, 0.2, 10.0, float("inf")]])
    assert pixels_of(logged_images.as_png(given)).tolist() == [[0, 51, 255, 255]]
    assert pixels_of(logged_images.as_png(torch.full((1, 1), float("inf")))).tolist() == [[255]]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "a/../b",
        "/etc",
        "a//b",
        "a\nb",
        "a/ ",
        ".",
        "step_00000001.png",
        "a/step_000000012.png/b",
    ],
)
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a name of an image"):
        logged_images.place(tmp_path, name, 1)


def test_a_name_or_a_step_that_cannot_be_a_file_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = opened(tmp_path, None)
    for step in (1, 2):
        loggers.image("a" * 300, torch.ones(2, 2), step=step)
    for odd in (1.0, -1, "1", None):
        loggers.image("a", torch.ones(2, 2), step=odd)
    loggers.image("step_00000001.png", torch.ones(2, 2), step=1)
    assert logged_images.logged(tmp_path) == [] and len(caplog.records) == 1
    assert "is too long" in caplog.text
    for odd in (1.0, -1, "1", None):
        with pytest.raises(UserError, match=r"is not a step\. Give an integer of at least 0"):
            logged_images.place(tmp_path, "a", odd)  # type: ignore[arg-type]
    loggers.image("a" * 200, torch.ones(2, 2), step=np.int64(3))
    assert [(one.step, one.name) for one in logged_images.logged(tmp_path)] == [(3, "a" * 200)]
    loggers.close()


def test_a_folder_with_the_name_of_an_image_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "images" / "step_00000007.png").mkdir(parents=True)
    loggers = opened(tmp_path, 3)
    loggers.image("a", torch.ones(2, 2), step=4)
    loggers.close()
    assert [one.name for one in logged_images.logged(tmp_path)] == ["a"]
    assert list(logged_images.latest(tmp_path)) == ["a"]
    opened(tmp_path, None).close()


def test_the_page_holds_a_bounded_number_of_names(tmp_path: Path) -> None:
    loggers = opened(tmp_path, None)
    for step in range(1, 26):
        loggers.image(f"sample {step:02d}", torch.ones(2, 2), step=step)
    loggers.close()
    assert list(logged_images.latest(tmp_path)) == [f"sample {step:02d}" for step in range(6, 26)]


def test_an_image_is_written_once_and_a_resume_drops_the_later_ones(tmp_path: Path) -> None:
    loggers = opened(tmp_path, None)
    for step in (1, 2, 3):
        loggers.image("val/samples", torch.full((2, 2), step / 10), step=step)
    loggers.image("val/samples", torch.ones(2, 2), step=1)
    first = logged_images.logged(tmp_path)
    assert [(image.step, image.name) for image in first] == [(s, "val/samples") for s in (1, 2, 3)]
    assert pixels_of(first[0].path.read_bytes())[0, 0] == 26
    loggers.close()
    resumed = opened(tmp_path, 2)
    assert [image.step for image in logged_images.logged(tmp_path)] == [1, 2]
    resumed.image("val/samples", torch.full((2, 2), 0.9), step=3)
    assert pixels_of(logged_images.logged(tmp_path)[2].path.read_bytes())[0, 0] == 230
    resumed.close()
    opened(tmp_path, None).close()  # a run that begins again
    assert logged_images.logged(tmp_path) == []


class Taker:
    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def log(self, step: int, epoch: int, values: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self, exit_code: int = 0) -> None: ...
    def log_image(self, step: int, name: str, path: Path) -> None:
        assert path.is_file()
        self.seen.append((step, name))


def test_loggers_that_take_images_get_them_and_others_do_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()
    loggers = opened(tmp_path, None, taker=lambda: taker, csv=Csv)
    loggers.image("a", torch.ones(2, 2), step=1)
    loggers.close()
    assert taker.seen == [(1, "a")] and caplog.records == []


def test_tensorboard_shows_an_image_that_a_kill_lost_and_none_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def tensorboard(**given: Any) -> TensorBoard:
        return TensorBoard(flush_seconds=30, **given)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        first = opened(tmp_path, None, tensorboard=tensorboard)
        for step in (1, 2, 3):
            first.image("a", torch.full((4, 4), step / 10), step=step)
        first.trackers.clear()  # killed before it wrote
        second = opened(tmp_path, 2, tensorboard=tensorboard)
        second.image("a", torch.full((4, 4), 0.3), step=3)
        second.close()
        third = opened(tmp_path, 3, tensorboard=tensorboard)
        third.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
        events.Reload()
        images = events.Images("a")
    assert [event.step for event in images] == [1, 2, 3]
    shown = pixels_of(images[1].encoded_image_string)
    assert shown.shape == (4, 4, 3) and (shown == 51).all()


def test_the_page_of_a_run_shows_the_latest_images_of_each_name(tmp_path: Path) -> None:
    loggers = opened(tmp_path, None)
    loggers.log(1, 0, {"train/loss": 1.0})
    for step in range(1, 7):
        loggers.image("val/samples", torch.ones(2, 2), step=step)
    loggers.close()
    page = report.write(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == logged_images.NUM_SHOWN
    assert "val/samples" in page and "step 3" in page and "step 6" in page and "step 2" not in page


def noise(seed: int) -> bytes:
    """A grid of 16 images that no compression makes smaller: 200 kB."""
    pixels = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return logged_images.as_png(pixels)


def test_a_page_full_of_noise_stays_below_a_megabyte_and_tells_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "figures", lambda *_: {})
    loggers = opened(tmp_path, None)
    loggers.log(1, 0, {"train/loss": 1.0})
    loggers.close()
    contents = [noise(step) for step in range(4)]
    assert sum(map(fitting.in_base64, contents)) > 1_000_000  # as they are, they would not fit
    for index in range(logged_images.NUM_NAMES):
        for step, content in enumerate(contents):
            path = logged_images.place(tmp_path, f"name {index:02d}", step)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if index == 0:
            page = report.write(tmp_path).read_text()
            assert page.count("<img ") == 4 and 700_000 < len(page) < 1_000_000
            assert "Shown: 4 of 4 images, 4 with fewer pixels" in page
    page = report.write(tmp_path).read_text()
    shown = page.count("<img ")
    assert 800_000 < len(page.encode()) < 1_000_000 and 60 < shown <= 80
    assert f"Shown: {shown} of 80 images, {shown} with fewer pixels, as the page has" in page
    assert "All are in images/ of the run's folder." in page.replace("&#39;", "'")
    for index in range(logged_images.NUM_NAMES):  # the newest of each name comes first
        assert f'alt="name {index:02d}, step 3"' in page


def test_small_images_stay_as_they_are_and_leave_their_room_to_large_ones() -> None:
    small, large = logged_images.as_png(torch.rand(8, 8)), noise(0)
    whole = fitting.in_base64(small)
    assert fitting.fit([small, large], 10**6) == [
        base64.b64encode(it).decode() for it in (small, large)
    ]
    first, second, third = fitting.fit([large, small, large], 100_000)
    assert len(second) == whole and 40_000 < len(first) == len(third) <= (100_000 - whole) // 2
    shape = pixels_of(base64.b64decode(first)).shape
    assert shape[0] == shape[1] and 80 < shape[0] < 120
    found = fitting.fit([large] * 9 + [small], 3 * fitting.LEAST_BYTES)
    assert sum(map(bool, found[:9])) == 3 and sum(map(len, found)) <= 3 * fitting.LEAST_BYTES
    assert fitting.fit([large], 100) == fitting.fit([b"torn" * 99_999], 50_000) == [""]
    assert fitting.fit([], 0) == []
    parts = large.split(b"IDAT")
    assert len(parts) > 2  # so that reading meets the damage after it has opened the image
    assert fitting.fit([b"IDAT".join(parts[:2]) + b"\x00AT!" + parts[2]], 50_000) == [""]
