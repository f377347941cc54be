"""torchvision decodes only kinds of file of which it gives the bytes that Pillow gives."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms import v2

from regrow.config import older
from regrow.errors import DataError
from regrow.feeding import decoding
from regrow.feeding.decoding import (
    TURNED,
    fit,
    load,
    load_image,
    pixels_of,
    scaled,
    size_of,
    turned,
)
from regrow.feeding.loaders import Data
from regrow.feeding.preprocess import Preprocessing

Make = Callable[..., Data]


def photo(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Noise on coarse patches, in which every step of a decoder shows."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height)), float)
    noisy = (smooth + random.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def turned_by(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def damaged_exif() -> bytes:
    return encoded(photo(40, 50), exif=turned_by(6).tobytes()[:-3] + b"\xff\xff\xff")


def several_frames() -> bytes:
    more = [photo(30, 40, seed=1)]
    return encoded(photo(30, 40), "MPO", save_all=True, append_images=more)


COLOURS: dict[str, bytes] = {
    **{f"quality {quality}": encoded(photo(61, 83), quality=quality) for quality in (5, 75, 100)},
    **{f"4:{s}": encoded(photo(61, 83), subsampling=f"4:{s}") for s in ("4:4", "2:2", "2:0")},
    **{f"{h} x {w}": encoded(photo(h, w)) for h, w in ((1, 1), (3, 17), (16, 16), (129, 7))},
    **{f"orientation {n}": encoded(photo(40, 50), exif=turned_by(n)) for n in range(10)},
    "damaged EXIF data": damaged_exif(),
    "progressive": encoded(photo(61, 83), progressive=True),
    "optimised": encoded(photo(61, 83), optimize=True),
    "restart markers": encoded(photo(61, 83), restart_marker_rows=1),
    "not YCbCr": encoded(photo(61, 83), keep_rgb=True),
    "a comment and a profile": encoded(photo(61, 83), comment=b"-" * 999, icc_profile=b"-" * 999),
    "several frames": several_frames(),
    "bytes behind the end": encoded(photo(61, 83)) + b"\0" * 1000,
}
GREY: dict[str, bytes] = {
    "grey": encoded(photo(61, 83, "L")),
    "grey, progressive": encoded(photo(61, 83, "L"), progressive=True),
    "grey, turned": encoded(photo(40, 50, "L"), exif=turned_by(8)),
}
OTHERS: dict[str, bytes] = {
    "CMYK": encoded(photo(61, 83, "CMYK")),
    "PNG": encoded(photo(61, 83), "PNG"),
    "PNG with a palette": encoded(photo(61, 83).quantize(16), "PNG"),
    "PNG with transparency": encoded(photo(61, 83, "RGBA"), "PNG"),
    "PNG of grey and alpha": encoded(photo(61, 83, "LA"), "PNG"),
    "PNG, turned": encoded(photo(61, 83), "PNG", exif=turned_by(5)),
    "WebP": encoded(photo(61, 83), "WEBP"),
    "TIFF": encoded(photo(61, 83), "TIFF"),
    "TIFF with JPEG inside": encoded(photo(61, 83), "TIFF", compression="jpeg"),
    "GIF": encoded(photo(61, 83), "GIF"),
    "BMP": encoded(photo(61, 83), "BMP"),
}


def both(content: bytes, channels: int, upright: bool = True) -> list[torch.Tensor | str]:
    """Return the pixels, or the error, of the two decoders."""
    found: list[torch.Tensor | str] = []
    for decoder in ("pillow", "torchvision"):
        try:
            image = load(
                *("a/b.jpg", channels),
                exif_orientation=upright,
                decoder=decoder,
                content=content,
            )
            found.append(image if isinstance(image, torch.Tensor) else pixels_of(image))
        except DataError as error:
            found.append(str(error))
    return found


def are_equal(content: bytes, channels: int, upright: bool = True) -> bool:
    ours, theirs = both(content, channels, upright)
    if isinstance(ours, str) or isinstance(theirs, str):
        return isinstance(ours, str) and ours == theirs
    return torch.equal(ours, theirs)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images that torchvision decodes, and invert them: a negative control."""
    counted: list[int] = []
    decode = decoding.jpeg_decoder()
    assert decode is not None

    def inverted(*args: Any) -> torch.Tensor:
        pixels = decode(*args)
        counted.append(len(pixels))
        return 255 - pixels

    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: inverted)
    return counted


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("kind", COLOURS)
def test_a_jpeg_has_the_same_bytes(kind: str, upright: bool) -> None:
    assert are_equal(COLOURS[kind], 3, upright)
    assert are_equal(COLOURS[kind], 1, upright)


@pytest.mark.parametrize("kind", GREY)
def test_a_grey_jpeg_has_the_same_bytes(kind: str) -> None:
    assert are_equal(GREY[kind], 1) and are_equal(GREY[kind], 3)


@pytest.mark.parametrize("kind", OTHERS)
def test_pillow_decodes_other_kinds(kind: str, decoded: list[int]) -> None:
    assert are_equal(OTHERS[kind], 3) and are_equal(OTHERS[kind], 1)
    assert not decoded


def test_torchvision_decodes_jpegs_and_no_colours_to_grey(decoded: list[int]) -> None:
    for content in (*COLOURS.values(), *GREY.values()):
        assert not are_equal(content, 3)
    assert len(decoded) == len(COLOURS) + len(GREY)
    decoded.clear()
    assert all(are_equal(content, 1) for content in COLOURS.values())
    assert not decoded
    assert not any(are_equal(content, 1) for content in GREY.values())


def test_the_y_of_a_jpeg_is_not_pillows_grey() -> None:
    """The reason why torchvision does not decode colours to grey."""
    content = COLOURS["quality 75"]
    decode = decoding.jpeg_decoder()
    assert decode is not None and torchvision.io.ImageReadMode.UNCHANGED.value == decoding.UNCHANGED
    grey_mode = torchvision.io.ImageReadMode.GRAY.value
    as_y = decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), grey_mode, False)
    grey = load("b.jpg", 1, exif_orientation=True, decoder="pillow", content=content)
    assert not torch.equal(as_y, pixels_of(grey))  # type: ignore[arg-type]


def test_without_torchvision_pillow_decodes(
    monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: None)
    assert all(are_equal(content, 3) for content in COLOURS.values()) and not decoded


def test_a_damaged_jpeg_has_the_same_bytes_or_the_same_error() -> None:
    random = np.random.default_rng(0)
    content = COLOURS["quality 75"]
    outcomes = {True: 0, False: 0}
    for number in range(300):
        damaged = bytearray(content)
        if number % 3 == 0:
            del damaged[int(random.integers(2, len(damaged))) :]
        else:
            for place in random.integers(2, len(damaged), 1 + number % 4):
                damaged[place] = int(random.integers(0, 256))
        assert are_equal(bytes(damaged), 3), number
        outcomes[isinstance(both(bytes(damaged), 3)[0], str)] += 1
    assert min(outcomes.values()) > 30, outcomes


def test_a_file_and_its_content_are_read_alike(tmp_path: Path) -> None:
    for name, content in {**COLOURS, **OTHERS}.items():
        path = tmp_path / "file.png"  # its suffix may be wrong
        path.write_bytes(content)
        found = [
            load(path, 3, exif_orientation=True, decoder="torchvision", content=given)
            for given in (None, content)
        ]
        assert torch.equal(found[0], found[1]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("upright", [True, False])
def test_the_size_of_an_image_is_known_before_it_is_decoded(upright: bool, tmp_path: Path) -> None:
    """A predicted mask gets it, and the cache of resized images plans its room with it."""
    damaged = PngInfo()
    damaged.add_text("Raw profile type exif", "\nexif\n3\nno hexadecimal digits")
    contents = {
        **COLOURS,
        **{f"TIFF {n}": encoded(photo(40, 50), "TIFF", tiffinfo={0x0112: n}) for n in TURNED},
        "PNG, damaged EXIF data": encoded(photo(40, 50), "PNG", pnginfo=damaged),
    }
    for name, content in contents.items():
        path = tmp_path / f"file.{'tif' if name.startswith('TIFF') else 'png'}"
        path.write_bytes(content)
        image = load_image(path, 3, exif_orientation=upright)
        assert size_of(path, exif_orientation=upright) == (image.height, image.width), name


def test_an_error_names_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.jpg"
    path.write_bytes(COLOURS["progressive"][:500])
    with pytest.raises(DataError, match=r"/file.jpg is not a readable image: [^<]*\. Fix"):
        load(path, 3, exif_orientation=True, decoder="torchvision")
    with pytest.raises(DataError, match=r"cannot identify image file\. Fix"):
        load(path, 3, exif_orientation=True, decoder="torchvision", content=b"\xff\xd8nothing")


@pytest.mark.parametrize("method", TURNED.values())
def test_pixels_are_turned_like_an_image(method: str) -> None:
    image = photo(5, 7)
    expected = pixels_of(image.transpose(Image.Transpose[method]))
    assert torch.equal(turned(pixels_of(image), method), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sides", [(61, 83), (40, 40), (16, 300)])
def test_pixels_are_scaled_like_v2s_resize(sides: tuple[int, int], channels: int) -> None:
    image = photo(*sides, "L" if channels == 1 else "RGB")
    pixels = pixels_of(image)
    ours = fit(pixels, (16, 16), 20)
    assert torch.equal(ours, fit(pixels.contiguous(), (16, 16), 20))  # whatever the layout
    theirs = v2.Compose([v2.Resize(20), v2.CenterCrop(16)])(pixels)
    if "AVX" in torch.backends.cpu.get_cpu_capability():  # else v2 computes in float32
        assert torch.equal(ours, theirs)
    pillows = pixels_of(fit(image, (16, 16), 20)).int()
    assert 0 < (pillows - ours).abs().amax() <= 1 or torch.equal(pillows, ours.int())
    assert scaled(pixels, sides) is pixels


def test_a_run_records_its_decoder(image_root: Path, make_data: Make, tmp_path: Path) -> None:
    for number, file in enumerate(sorted(image_root.rglob("*.png"))):
        photo(61, 83, seed=number).save(file.with_suffix(".jpg"))
        file.unlink()
    small = (f"root={image_root}", "num_classes=2", "input_shape=[3,16,16]", "source.resize=18")
    file = next(image_root.rglob("*.jpg"))
    found = {}
    for decoder in ("pillow", "torchvision"):
        data = make_data("image_folder", *small, f"source.decoder={decoder}", "num_workers=0")
        record = json.loads(json.dumps(data.preprocessing.to_dict()))
        assert record["decoder"] == decoder
        if decoder == "pillow":
            del record["decoder"]  # as an older run's
        how = Preprocessing.from_dict(record)
        assert how == data.preprocessing
        (batch,) = data.evaluation("test", device=torch.device("cpu"))
        names = [str(image_root / name) for name in data.ids("test")]
        ((_, predicted),) = how.read([*names], len(names))
        assert torch.equal(predicted, batch.inputs)
        ((_, given),) = how.read([Image.open(name) for name in names], len(names))
        assert torch.equal(given, batch.inputs)
        found[decoder] = how.read(file, 1).__next__()[1]
    assert not torch.equal(found["pillow"], found["torchvision"])  # the negative control


def test_an_older_record_decodes_with_pillow() -> None:
    config = {"data": {"source": {"_target_": "lab.data.datasets.image_folder"}}}
    assert older.complete(config)["data.source.decoder"] == "pillow"


def test_an_own_transform_gets_an_image_of_pillow(image_root: Path, make_data: Make) -> None:
    small = (f"root={image_root}", "num_classes=2", "input_shape=[3,16,16]", "source.resize=18")
    data = make_data("image_folder", *small, "num_workers=0", "normalize=none")
    train: Any = data.source.train
    seen: list[Any] = []

    def transform(image: Any) -> Any:
        seen.append(image)
        return image

    train.augmented(transform)[0]
    transform.takes = "pixels"  # type: ignore[attr-defined]
    train.augmented(transform)[0]
    assert isinstance(seen[0], Image.Image) and isinstance(seen[1], torch.Tensor)
    expected = load_image(train.files[0], 3, exif_orientation=True)
    assert np.array_equal(seen[0], expected)
    assert torch.equal(seen[1], pixels_of(expected))
