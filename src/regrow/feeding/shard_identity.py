"""Checks that shards are those of their index: by content, or by the size and tag of a server."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from regrow.errors import DataError
from regrow.feeding.block_cache import BlockCache
from regrow.feeding.block_reader import Access
from regrow.feeding.files import contents_of
from regrow.feeding.remote import Folder, Remote, Stamp
from regrow.feeding.shard_index import Shard

NUM_ASKED = 32  # files asked for their size at once


def check(access: Access, shards: Sequence[Shard], *, by_contents: bool) -> None:
    """Raise DataError for a shard that is not the one of the index.

    In a local folder the contents are compared, `by_contents`. On a server sizes are compared, and,
    `by_contents`, tags: a shard whose tag is new is read once.
    """
    place = access.place
    if isinstance(place, Remote):
        with ThreadPoolExecutor(NUM_ASKED) as pool:
            stamps = [*pool.map(place.stamp, [shard.name for shard in shards])]
        for shard, stamp in zip(shards, stamps, strict=True):
            if stamp.num_bytes not in (None, shard.num_bytes):
                why = f"it has {stamp.num_bytes:,} bytes instead of {shard.num_bytes:,}"
                raise _changed(place, shard, why)
        if by_contents and access.cache is not None:
            _check_tags(place, shards, stamps, access.cache, access.key)
    elif by_contents:
        found = contents_of([place.place(shard.name) for shard in shards], place.root)
        for shard, digest in zip(shards, found, strict=True):
            if digest.hex() != shard.sha256:
                raise _changed(place, shard, "its SHA-256 is another")


def _check_tags(
    place: Remote, shards: Sequence[Shard], stamps: Sequence[Stamp], cache: BlockCache, key: str
) -> None:
    """Compare the tags with those of the first time; read a shard whose tag is another."""
    where = hashlib.sha256(place.root.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    path = cache.folder / "tags" / f"{key.replace('/', '-')}-{where}"
    tags = [" ".join(stamp.tag.split()) for stamp in stamps]
    known = None
    with contextlib.suppress(OSError, UnicodeError):
        known = path.read_text(encoding="utf-8").splitlines()
    if known is not None and len(known) == len(tags):
        for shard, tag, before in zip(shards, tags, known, strict=True):
            if tag == before:
                continue
            digest = hashlib.sha256()
            for start in range(0, shard.num_bytes, 1 << 24):
                stop = min(start + (1 << 24), shard.num_bytes)
                digest.update(place.read(shard.name, start, stop))
            if digest.hexdigest() != shard.sha256:
                raise _changed(place, shard, "its SHA-256 is another")
    cache.write(path, "".join(f"{tag}\n" for tag in tags).encode())


def _changed(place: Folder | Remote, shard: Shard, why: str) -> DataError:
    return DataError(
        f"{place.place(shard.name)} is not the shard of index.json: {why}. Restore the file, or "
        "make the shards again."
    )
