"""Images of a folder, resized once into a file beside it, which all processes map into memory.

Each way to resize has two files: the pixels, one image after the other, and an index of records,
each with the SHA-256 of an image file's content and the place of its pixels. Both are only appended
to, under a lock, and pixels are synced before their records. So a kill loses the last images at
most, and a reader needs no lock. Both begin with the same random number, and new files get another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import mmap
import os
import secrets
import shutil
import struct
import time
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.feeding.decoding import scaled_size, size_of, to_tensor
from regrow.feeding.files import contents_of, unreadable
from regrow.feeding.images import ImageFiles
from regrow.record import locks
from regrow.record.manifest import cores
from regrow.record.records import sync_folder

RECORD = struct.Struct("<32sQII")  # SHA-256, the first byte, H, W; a CRC-32 of it follows
CHECKSUM = struct.Struct("<I")
TITLE = b"regrow: resized\n"
HEADER = 64  # bytes: the title, a random number, and zeros
SYNCED_BYTES, SYNCED_SECONDS = 1 << 28, 30.0  # a kill loses no more
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
ELSEWHERE = Path("outputs", ".cache")  # if the folder beside the data cannot be written

log = logging.getLogger("regrow.data")
T = TypeVar("T")
U = TypeVar("U")


class CachedImage(NamedTuple):
    """The place of an image's pixels (C, H, W) in the file."""

    start: int
    height: int
    width: int


class Pixels:
    """The file of pixels, mapped into memory by each process when it first reads."""

    def __init__(self, path: Path, number: bytes) -> None:
        self.path, self.number = path, number
        self._bytes: Tensor | None = None
        self._is_gone = False

    def __reduce__(self) -> tuple[type[Pixels], tuple[Path, bytes]]:
        return Pixels, (self.path, self.number)  # a worker opens its own map

    def read(self, start: int, shape: tuple[int, int, int]) -> Tensor | None:
        """Return a copy of an image's pixels, uint8 (C, H, W); None if the file was removed."""
        if self._bytes is None and not self._is_gone:
            self._bytes = self._mapped()
        if self._bytes is None:
            return None
        # A copy, since nobody may write to the map and a transform may work in place.
        return self._bytes[start : start + math.prod(shape)].view(shape).clone()

    def _mapped(self) -> Tensor | None:
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            if file.read(HEADER) == _header(self.number):
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # it cannot be written
                    return torch.frombuffer(found, dtype=torch.uint8)
        self._is_gone = True
        log.warning("%s is gone: images are decoded and resized again", self.path)
        return None


@dataclass(frozen=True, eq=False)
class Kept:
    """The resized images of a split; see `images.Resized`."""

    pixels: Pixels
    channels: int
    entries: npt.NDArray[np.int64]  # (N, 3): first byte, H, W; zeros: not there

    def read(self, index: int) -> Tensor | None:
        start, height, width = self.entries[index].tolist()
        return self.pixels.read(start, (self.channels, height, width)) if start else None

    def subset(self, indices: Sequence[int]) -> Kept:
        return replace(self, entries=self.entries[np.asarray(indices, np.int64)])


def keep_resized(
    splits: Sequence[ImageFiles], cache_root: str | None, max_gb: float
) -> list[ImageFiles]:
    """Return the splits of one image folder with their images resized, each only once.

    One process resizes those that are not there yet; others wait for it, and then read. Raises
    UserError if they take too much room, and DataError for an image that cannot be read.
    """
    how = splits[0]
    files = [file for split in splits for file in split.files]
    contents = contents_of(files, how.root)
    places = [
        CacheFiles(folder / _name(how), how.channels) for folder in _folders(how.root, cache_root)
    ]
    kept = next(filter(None, (place.all_of(contents) for place in places)), None)
    if kept is None:
        kept = _made(places, how, dict(zip(contents, files, strict=True)), cache_root, max_gb)
    found, first = [], 0
    for split in splits:
        chosen = kept.of(contents[first : first + len(split)])
        found.append(replace(split, resized=chosen))
        first += len(split)
    return found


def _folders(root: str, cache_root: str | None) -> list[Path]:
    """Return the folders in which to look and to write, in that order."""
    whole = Path(os.path.realpath(root))
    name = f"{whole.name}-{hashlib.sha256(os.fsencode(whole)).hexdigest()[:8]}"
    if cache_root is not None:
        return [Path(cache_root).absolute() / name]
    return [whole.with_name(f".{whole.name}.resized"), ELSEWHERE.absolute() / name]


def _name(how: ImageFiles) -> str:
    """Return the files' name, which differs for each way to get other bytes."""
    packages = ("pillow", "torch", "torchvision") if how.decoder == "torchvision" else ("pillow",)
    versions = " ".join(f"{name}={metadata.version(name)}" for name in packages)
    colours = {1: "grey", 3: "rgb"}[how.channels]
    turned = "upright" if how.exif_orientation else "stored"
    digest = hashlib.sha256(versions.encode()).hexdigest()[:8]
    return f"{how.resize}-{colours}-{turned}-{how.decoder}-{digest}"


class CachedRecords(NamedTuple):
    """The valid records of an index."""

    pixels: Pixels
    channels: int
    entries: Mapping[bytes, CachedImage]

    @property
    def end(self) -> int:
        """The first byte behind all images."""
        return max((entry.start + self.size_of(entry) for entry in self.entries.values()),
                   default=HEADER)  # fmt: skip

    def size_of(self, entry: CachedImage) -> int:
        return self.channels * entry.height * entry.width

    def of(self, contents: Sequence[bytes]) -> Kept:
        """Return the images with these contents; a content that is not there has no place."""
        absent = CachedImage(0, 0, 0)
        entries = [self.entries.get(content, absent) for content in contents]
        return Kept(self.pixels, self.channels, np.array(entries, np.int64).reshape(-1, 3))


class CacheFiles:
    """The files of one way to resize: path.pixels, path.index and path.lock."""

    def __init__(self, path: Path, channels: int) -> None:
        self.pixels, self.index, self.lock = (
            path.with_name(f"{path.name}.{kind}") for kind in ("pixels", "index", "lock")
        )
        self.channels = channels

    def read(self) -> CachedRecords | None:
        """Return what is there; None without a pair of files that belong together."""
        try:
            content = self.index.read_bytes()
            with self.pixels.open("rb") as file:
                header, num_bytes = file.read(HEADER), os.fstat(file.fileno()).st_size
        except OSError:
            return None
        if not header.startswith(TITLE) or len(header) < HEADER or content[:HEADER] != header:
            return None
        entries, size = {}, RECORD.size + CHECKSUM.size
        for at in range(HEADER, len(content) - size + 1, size):
            body = content[at : at + RECORD.size]
            if CHECKSUM.unpack_from(content, at + RECORD.size)[0] != zlib.crc32(body):
                continue
            sha256, *entry = RECORD.unpack(body)
            if entry[0] + self.channels * entry[1] * entry[2] <= num_bytes:
                entries[sha256] = CachedImage(*entry)
        number = header[len(TITLE) : len(TITLE) + 16]
        return CachedRecords(Pixels(self.pixels, number), self.channels, entries)

    def all_of(self, contents: Sequence[bytes]) -> CachedRecords | None:
        """Return what is there if it has all the contents."""
        found = self.read()
        complete = found is not None and all(content in found.entries for content in contents)
        return found if complete else None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock over all processes. Raises OSError if the folder cannot be written."""
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locks.wait_for(descriptor, f"the resized images in {self.lock.parent}")
            yield
        finally:
            os.close(descriptor)

    def renew(self) -> CachedRecords:
        """Return a new, empty pair of files. Processes that read the old ones still have them."""
        for path in (self.index, self.pixels):
            path.unlink(missing_ok=True)
        number = secrets.token_bytes(16)
        for path in (self.pixels, self.index):
            with path.open("xb") as file:
                file.write(_header(number))
                os.fsync(file.fileno())
        sync_folder(self.index.parent)
        return CachedRecords(Pixels(self.pixels, number), self.channels, {})


def _made(
    places: Sequence[CacheFiles],
    how: ImageFiles,
    wanted: Mapping[bytes, str],
    cache_root: str | None,
    max_gb: float,
) -> CachedRecords:
    """Return the images of the `wanted` files, by content, in the first place to be written."""
    for place in places:
        try:
            with place.locked():
                # Another process may have made them while this one waited.
                return place.all_of([*wanted]) or _add(place, how, wanted, max_gb)
        except OSError as error:
            if error.errno in NOT_WRITABLE and place is not places[-1]:
                continue
            key = f"data.cache_root={cache_root or 'null'}"
            raise UserError(
                f"{key}: {place.lock.parent} cannot be written: {error.strerror or error}. Make "
                "room there, set data.cache_root to another folder, or data.cache=null."
            ) from None
    raise AssertionError("unreachable")


def _add(
    place: CacheFiles, how: ImageFiles, wanted: Mapping[bytes, str], max_gb: float
) -> CachedRecords:
    """Resize the files that are not there yet. Raises UserError, DataError, OSError."""
    assert how.resize is not None
    resize = how.resize
    found = place.read() or place.renew()
    missing = {content: file for content, file in wanted.items() if content not in found.entries}
    with ThreadPoolExecutor(cores()) as pool:

        def size(file: str) -> int:
            sides = size_of(file, exif_orientation=how.exif_orientation)
            return how.channels * math.prod(scaled_size(*sides, resize))

        needed = sum(_in_order(pool, size, missing.values()))
        used = sum(found.size_of(found.entries[one]) for one in wanted if one in found.entries)
        _refuse_too_large(how, place, used, needed, max_gb)
        if found.end + needed > max_gb * 1e9:  # what is no longer in the data takes the room
            found, missing, needed = place.renew(), dict(wanted), used + needed
        log.info(
            "data.cache=resized: resizing %s images into %s: %s",
            *(f"{len(missing):,}", place.pixels, _gigabytes(needed)),
        )
        _write(pool, place, found, how, missing)
    made = place.read()
    if made is None:
        raise OSError(errno.EIO, "the files were removed while they were written")
    return made


def _refuse_too_large(
    how: ImageFiles, place: CacheFiles, used: int, needed: int, max_gb: float
) -> None:
    if used + needed > max_gb * 1e9:
        raise UserError(
            f"data.cache_max_gb={max_gb:g}: the resized images take {_gigabytes(used + needed)}. "
            f"Set it to {math.ceil((used + needed) / 1e9)} or more, lower data.source.resize="
            f"{how.resize}, or use data.cache=null."
        )
    free = shutil.disk_usage(place.lock.parent).free
    if needed > free:
        raise UserError(
            f"data.cache=resized: the resized images take {_gigabytes(needed)}, and "
            f"{place.lock.parent} has {_gigabytes(free)} of room. Make room, set data.cache_root "
            "to another folder, or use data.cache=null."
        )


def _write(
    pool: ThreadPoolExecutor,
    place: CacheFiles,
    found: CachedRecords,
    how: ImageFiles,
    missing: Mapping[bytes, str],
) -> None:
    """Append the missing images, in their order."""

    def resize(file: str) -> tuple[bytes, Tensor]:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise unreadable(file, error) from None
        # The hash is of the bytes that are decoded: the file may have changed since it was known.
        return hashlib.sha256(content).digest(), to_tensor(how.resized_file(file, content))

    with place.pixels.open("r+b", buffering=0) as pixels, place.index.open("r+b") as index:
        end = found.end
        os.truncate(place.pixels, end)  # images without a record, after a kill
        size = RECORD.size + CHECKSUM.size
        whole = os.fstat(index.fileno()).st_size - HEADER
        os.truncate(place.index, HEADER + whole // size * size)
        pixels.seek(end)
        index.seek(0, os.SEEK_END)
        records: list[bytes] = []
        synced, since, done = end, time.monotonic(), 0

        def sync() -> None:
            os.fsync(pixels.fileno())
            index.write(b"".join(records))
            index.flush()
            os.fsync(index.fileno())
            records.clear()

        try:
            for sha256, image in _in_order(pool, resize, missing.values()):
                _write_all(pixels, image.numpy().data.cast("B"))
                body = RECORD.pack(sha256, end, *image.shape[1:])
                records.append(body + CHECKSUM.pack(zlib.crc32(body)))
                end, done = end + image.numel(), done + 1
                late = time.monotonic() - since > SYNCED_SECONDS
                if end - synced >= SYNCED_BYTES or late:
                    sync()
                    if late:
                        log.info("resized %s of %s images", f"{done:,}", f"{len(missing):,}")
                        since = time.monotonic()
                    synced = end
        finally:
            sync()


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[T], U], items: Iterable[T]
) -> Iterator[U]:
    """Yield the results in the order of the items, and compute only a few ahead."""
    ahead: deque[Future[U]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 8 * cores():
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for future in ahead:
            future.cancel()


def _write_all(file: Any, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]


def _header(number: bytes) -> bytes:
    return (TITLE + number).ljust(HEADER, b"\0")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"
