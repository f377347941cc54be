"""Tar shards with an index, in a folder or behind a URL, as a data set with numbered items."""

from __future__ import annotations

import bisect
import dataclasses
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import DataError, UserError, brief, did_you_mean, listed
from regrow.feeding import shard_identity, shard_index
from regrow.feeding.block_cache import cache_of
from regrow.feeding.block_order import BlockOrder, FileOrder
from regrow.feeding.block_reader import Access, Reader
from regrow.feeding.decoding import (
    augmented_by,
    converted,
    fit,
    formats_for,
    load,
    opened,
    pixels_of,
    to_tensor,
)
from regrow.feeding.images import check_size
from regrow.feeding.remote import Folder, Remote, folder_of
from regrow.feeding.sampling import Windows
from regrow.feeding.shard_index import UNIT, Index
from regrow.feeding.shard_items import File, as_item, decoded
from regrow.feeding.splits import NAMES, Reading, Splits, text_names

if TYPE_CHECKING:
    from PIL.Image import Image

UNREADABLE = (  # what json, zip, numpy and torch raise on corrupt bytes
    *(ValueError, KeyError, TypeError, OSError, EOFError, RecursionError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
NOT_COMPARED = (
    "the sets of these shards were not found to be disjoint when they were made: an example may be "
    "in two of them"
)
SPREAD_BLOCKS = 64  # blocks that a sample is drawn from
# Memory bound in pools: the current one (up to 1.5 times) plus the part of the next that is read
# ahead.
HELD = 2.0


@dataclass(frozen=True)
class ShardItems:
    """A set of the shards as a map-style data set.

    Of images, item i is a uint8 image (C, H, W) and its class. Other items are as they were
    written: (inputs, targets), with weights or without, or a mapping of fields.
    """

    access: Access
    index: Index
    name: str
    identity: str
    lanes: int
    pool_bytes: int
    size: list[int] | None = None  # (H, W) of images
    channels: int = 3
    resize: int | None = None
    exif_orientation: bool = True
    decoder: str = "pillow"
    transform: Callable[[Any], Any] | None = None

    def __len__(self) -> int:
        return int(self.access.blocks.first[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name[0] != "_"}

    @property
    def draws(self) -> bool:
        """True if reading an item may draw random numbers, so it must be seeded."""
        return self.transform is not None

    def __getitem__(self, index: int) -> Any:
        reader = self._reader()
        first = reader.first
        if not 0 <= index < first[-1]:
            raise IndexError(index)
        block = bisect.bisect_right(first, index) - 1
        content, members = reader.block(block)
        fields: dict[str, Any] = {}
        name = ""
        try:
            for name, start, stop in members[index - first[block]]:
                field, value = decoded(name, content[start:stop])
                if isinstance(value, File):
                    value = self._image(field, value, _member(content, start))
                elif field == "inputs" and self.size is not None:
                    value = self._fitted(value)
                fields[field] = value
        except DataError as error:
            raise DataError(
                f"{self._where(block, index)}: {error} Then make the shards again."
            ) from None
        except UNREADABLE as error:
            raise DataError(
                f"{self._where(block, index)}: {name} cannot be read: {brief(error, 120)}."
            ) from None
        # Outside of `try`: an error of a transform does not lie in the shards.
        if self.transform is not None and "inputs" in fields:
            fields["inputs"] = augmented_by(self.transform, fields["inputs"])
        return as_item(fields)

    def _where(self, block: int, index: int) -> str:
        """Return the shard and the number of an example, for an error."""
        shard = self.access.names[self.access.blocks.shard[block]]
        return f"{self.access.place.place(shard)}, {self.name} example {index}"

    def _image(self, field: str, file: File, member: str) -> Image | Tensor:
        """Return an image: the inputs as `_as_input` does, and others in their own size.

        Raises DataError, which names the `member` of the tar file.
        """
        if field == "targets":  # a mask, whose values are classes
            from PIL import Image

            formats = formats_for(f".{file.suffix}")
            with opened(member), Image.open(io.BytesIO(file.content), formats=formats) as mask:
                return to_tensor(mask)
        how = {"exif_orientation": self.exif_orientation, "decoder": self._decoder}
        image = load(member, self.channels, content=file.content, **how)  # type: ignore[arg-type]
        return self._as_input(image) if field == "inputs" else to_tensor(image)

    @property
    def _decoder(self) -> str:
        """The decoder of images: a transform gets Pillow images unless it `takes` "pixels"."""
        takes_any = self.transform is None or getattr(self.transform, "takes", None) == "pixels"
        return self.decoder if takes_any else "pillow"

    def _as_input(self, image: Image | Tensor) -> Image | Tensor:
        """Return an image in the model's size; if there is a transform, as it is, for that."""
        if self.transform is not None:
            return image
        return to_tensor(image if self.size is None else fit(image, self.size, self.resize))

    def _fitted(self, pixels: Tensor) -> Image | Tensor:
        """Return an image that was written as an array, (C, H, W) uint8, like one in a file."""
        is_ready = [*pixels.shape] == [self.channels, *(self.size or [])] and self.resize is None
        if self.transform is None and is_ready:
            return pixels
        from PIL import Image

        rows = pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy()
        image = converted(Image.fromarray(rows), self.channels, exif_orientation=False)
        return self._as_input(image if self._decoder == "pillow" else pixels_of(image))

    def _reader(self) -> Reader:
        """Return the reader: one per process; a forked worker must not use its parent's."""
        own = self.__dict__
        if "_own_reader" not in own or own["_own_reader"].pid != os.getpid():
            own["_own_reader"] = Reader(self.access)
        reader: Reader = own["_own_reader"]
        return reader

    def ahead(self, blocks: Sequence[int]) -> None:
        """Fetch blocks in the background."""
        self._reader().ask(blocks)

    def release(self) -> None:
        """Let go of the blocks that this process holds, and of the threads that read them."""
        reader = self.__dict__.pop("_own_reader", None)
        if reader is not None and reader.pid == os.getpid():
            reader.close()

    def epoch_order(self, windows: Windows, seed: int, epoch: int) -> BlockOrder:
        """Return the order of an epoch's examples."""
        blocks = self.access.blocks
        mean = int(blocks.num_bytes.sum()) / len(self)
        pool = max(1, int(self.pool_bytes / mean))
        return BlockOrder(blocks.first, windows, seed, epoch, lanes=self.lanes, pool=pool,
                          is_shared=self.access.cache is not None)  # fmt: skip

    def file_order(self, windows: Windows) -> FileOrder:
        """Return the order of an evaluation, which reads its next blocks ahead."""
        return FileOrder(self.access.blocks.first, windows)

    def sample(self, count: int, below: int | None = None) -> list[int]:
        """Return about `count` indices of examples, from a few blocks that are spread evenly.

        Blocks share the count equally, rounded up: at most 63 more. `below`: only of the first so
        many examples.
        """
        below = len(self) if below is None else below
        if below <= count:
            return [*range(below)]
        first = self.access.blocks.first
        first = np.append(first[first < below], below)
        num_blocks = min(len(first) - 1, SPREAD_BLOCKS)
        chosen = [number * (len(first) - 1) // num_blocks for number in range(num_blocks)]
        self.ahead(chosen)
        indices: list[int] = []
        for block in chosen:
            in_block = int(first[block + 1] - first[block])
            taken = min(in_block, -(-count // num_blocks))
            indices += [int(first[block]) + at * in_block // taken for at in range(taken)]
        return indices

    def augmented(self, transform: Callable[[Image], Image]) -> ShardItems:
        """Return the same examples of images, with `transform` in place of Resize and crop."""
        if self.size is None:
            raise UserError(
                "data.augmentation is for images, and these shards hold other items. Set "
                "data.augmentation=null."
            )
        return dataclasses.replace(self, transform=transform)

    def keys(self) -> list[Hashable]:
        """Return no keys: whether the sets are disjoint was checked at writing (Facts.disjoint)."""
        return []

    def fingerprint(self) -> str:
        """Return a SHA-256 that is equal for equal contents, local or remote.

        Raises DataError for a shard that is not the one of the index: by its contents in a local
        folder, by its size and tag on a server. If the server's tag changed, the shard is read once
        to verify it.
        """
        shard_identity.check(
            self.access, self.index.sets[self.name], by_contents=self.identity == "contents"
        )
        return self.index.fingerprint(self.name)


def shards(
    *,
    root: str,
    cache: str | None,
    cache_gb: float,
    pool_mb: float,
    lanes: int,
    timeout_seconds: float,
    retries: int,
    input_shape: list[int] | None,
    resize: int | str | None,
    num_classes: int | None,
    class_names: list[str] | None,
    decoder: str,
    exif_orientation: bool,
    identity: str,
    sets: list[str] | None,
    collate: Callable[[list[Any]], Any] | None,
) -> Splits:
    """Return the sets of a folder of shards that `scripts/make_shards.py` wrote, or of its URL.

    Raises UserError, DataError.
    """
    if identity not in ("contents", "sizes"):
        raise UserError(f"data.source.identity={identity} is not one of contents, sizes.")
    require("data.source.decoder", decoder)
    place = folder_of(root, timeout_seconds=timeout_seconds, retries=retries)
    index = read_index(place)
    facts = index.facts
    if isinstance(place, Folder):
        _check_sizes(place, index)
    names = [*index.sets] if sets is None else [*sets, *(n for n in NAMES if n in index.sets)]
    if missing := [name for name in names if name not in index.sets]:
        raise UserError(
            f"data.source.sets={sets}: the shards hold no set {missing[0]}."
            f"{did_you_mean(missing[0], index.sets)} There are {', '.join(index.sets)}."
        )
    theirs = facts.class_names
    if theirs is not None and num_classes is not None and len(theirs) != num_classes:
        raise UserError(
            f"data.num_classes={num_classes}, but the shards hold {len(theirs)} classes: "
            f"{listed(theirs)}. Set data.num_classes={len(theirs)}."
        )
    class_names = text_names(class_names)
    if class_names is not None and theirs not in (None, class_names):
        raise UserError(
            f"data.class_names={class_names[:20]}: the shards number their classes as "
            f"{', '.join(theirs or [])[:200]}. Leave data.class_names out."
        )
    size, channels, side = None, 3, None
    if facts.kind == "images":
        if input_shape is None:
            raise UserError("data.input_shape=null: these shards hold images. Set their shape.")
        channels, size, side = check_size(input_shape, resize)
    pool_bytes = int(pool_mb * 1e6)
    blocks_kept = cache_of(cache, cache_gb, 2 * pool_bytes) if place.is_remote else None

    def of(name: str) -> ShardItems:
        blocks = index.blocks(name)
        # A pool begins and ends within a block of each lane, so beside its bytes it needs, on
        # average, one block per lane. The 2 are for a pool smaller than a block: the block in use
        # and the next one. With less room, windows would drop and reread each other's blocks.
        held = int(HELD * pool_bytes) + (lanes + 2) * int(blocks.num_bytes.max())
        access = Access(
            place, blocks_kept, f"{index.sha256[:32]}/{name}",
            [shard.name for shard in index.sets[name]], blocks, held,
        )  # fmt: skip
        return ShardItems(
            *(access, index, name, identity, lanes, pool_bytes, size, channels, side),
            exif_orientation=exif_orientation,
            decoder=decoder,
        )

    return Splits(
        of("train"),
        of("val") if "val" in names else None,
        of("test") if "test" in names else None,
        {name: of(name) for name in names if name not in NAMES},
        class_names=class_names or theirs,
        target_names=facts.target_names,
        input_max=facts.input_max,
        resize=side,
        reading=Reading(exif_orientation=exif_orientation, decoder=decoder),
        reads_images=facts.kind == "images",
        notes=[] if facts.disjoint or len(names) < 2 else [NOT_COMPARED],
        collate=collate,
    )


def read_index(place: Folder | Remote) -> Index:
    """Return the index of a folder of shards. Raises UserError, DataError."""
    where = place.place(shard_index.NAME)
    if isinstance(place, Folder) and not Path(place.root).is_dir():
        raise UserError(
            f"data.source.root={place.root}: not a folder. Set it to the folder of shards, or to "
            "its URL."
        )
    try:
        content = place.whole(shard_index.NAME)
    except FileNotFoundError:
        raise DataError(
            f"data.source.root={place.root}: there is no {shard_index.NAME}, which is written "
            "last. Make the shards with scripts/make_shards.py, or let it end."
        ) from None
    return shard_index.parsed(content, where)


def _member(content: bytes, start: int) -> str:
    """Return the name of the tar member whose content begins at `start`."""
    return content[start - UNIT : start - UNIT + 100].partition(b"\0")[0].decode(errors="replace")


def _check_sizes(place: Folder, index: Index) -> None:
    for shard in (each for several in index.sets.values() for each in several):
        size = place.stamp(shard.name).num_bytes
        if size != shard.num_bytes:
            what = "is truncated" if (size or 0) < shard.num_bytes else "was changed"
            raise DataError(
                f"{place.place(shard.name)} {what}: it has {size:,} bytes, and index.json says "
                f"{shard.num_bytes:,}. Restore the file, or make the shards again."
            )
