"""The blocks of tar shards that one process reads: checked, held up to a bound, and prefetched."""

from __future__ import annotations

import os
import queue
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from regrow.errors import DataError
from regrow.feeding.block_cache import BlockCache
from regrow.feeding.remote import Folder, Remote
from regrow.feeding.shard_index import Blocks
from regrow.feeding.shard_items import Member, members_in

NUM_FETCHERS = {False: 1, True: 16}  # threads that read ahead: of a disk, of a server
COMING_SHARE = 1 / 3  # of the bytes that a process holds may be blocks that come
ASKS = 2  # a block that was not read after so many windows of its process is dropped


@dataclass(frozen=True)
class Access:
    """Where the bytes of a set's blocks come from."""

    place: Folder | Remote
    cache: BlockCache | None
    key: str  # of the index and the set, in the cache
    names: list[str]  # of the shards
    blocks: Blocks
    bytes_held: int  # blocks that a process holds in memory

    def block(self, number: int) -> bytes:
        """Return a block's bytes, which fit the index. Raises DataError."""
        blocks = self.blocks
        start, size = int(blocks.offset[number]), int(blocks.num_bytes[number])
        crc = int(blocks.crc[number])
        name = self.names[blocks.shard[number]]

        def fits(content: bytes) -> bool:
            return len(content) == size and zlib.crc32(content) == crc

        def fetch() -> bytes:
            content = self.place.read(name, start, start + size)
            if self.place.is_remote and not fits(content):  # a transfer may break off
                content = self.place.read(name, start, start + size)
            if not fits(content):
                what = "is truncated" if len(content) < size else "is damaged or was changed"
                raise DataError(
                    f"{self.place.place(name)} {what}: bytes {start:,} to {start + size:,} are not "
                    "those of index.json. Restore the file, or make the shards again."
                )
            return content

        if self.cache is None:
            return fetch()
        return self.cache.get(f"{self.key}/{number}", fetch, fits)


@dataclass(frozen=True)
class Coming:
    """A block that a thread reads. With a cache, the thread only fills it, and gives b""."""

    content: Future[bytes]
    num_bytes: int  # that it holds in memory
    asked: int


class Reader:
    """The blocks that one process holds, with threads that fetch the next ones."""

    def __init__(self, access: Access) -> None:
        self.access, self.pid = access, os.getpid()
        self.first: list[int] = access.blocks.first.tolist()  # a list is searched faster
        self.held: OrderedDict[int, tuple[bytes, list[list[Member]]]] = OrderedDict()
        self.coming: dict[int, Coming] = {}  # oldest first
        self.bytes_read = self.bytes_coming = 0
        self.asks = 0
        self.asked: queue.SimpleQueue[tuple[int, Future[bytes]] | None] = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def ask(self, numbers: Iterable[int]) -> None:
        """Fetch blocks in the background: into the cache if there is one, or else into memory.

        Blocks that would exceed the bound are not fetched. An error appears where the block is
        needed.
        """
        self.asks += 1
        keeps = self.access.cache is None
        for number, coming in [*self.coming.items()]:
            if coming.asked <= self.asks - ASKS if keeps else coming.content.done():
                self._take(number)
        for number in numbers:
            if number in self.held or number in self.coming:
                continue
            size = int(self.access.blocks.num_bytes[number]) if keeps else 0
            if self.bytes_coming + size > COMING_SHARE * self.access.bytes_held:
                break
            self.coming[number] = Coming(Future(), size, self.asks)
            self.bytes_coming += size
            self.asked.put((number, self.coming[number].content))
        self._make_room()
        while len(self.threads) < min(len(self.coming), NUM_FETCHERS[self.access.place.is_remote]):
            # A daemon: a process must not wait for a server that does not answer.
            self.threads.append(threading.Thread(target=self._fetch, daemon=True))
            self.threads[-1].start()

    def _fetch(self) -> None:
        while (asked := self.asked.get()) is not None:
            number, future = asked
            if not future.set_running_or_notify_cancel():
                continue
            try:
                content = self.access.block(number)
                future.set_result(content if self.access.cache is None else b"")
                del content
            except BaseException as error:
                future.set_exception(error)
            del asked, future  # else a waiting thread keeps the last block

    def _take(self, number: int) -> Future[bytes] | None:
        """Forget a block that comes. Returns None unless a thread reads it, or has read it."""
        coming = self.coming.pop(number, None)
        if coming is None:
            return None
        self.bytes_coming -= coming.num_bytes
        return None if coming.content.cancel() else coming.content

    def block(self, number: int) -> tuple[bytes, list[list[Member]]]:
        """Return a block and the members of its examples. Raises DataError."""
        found = self.held.get(number)
        if found is not None:
            self.held.move_to_end(number)
            return found
        coming = self._take(number)
        content = b"" if coming is None else coming.result()
        content = content or self.access.block(number)
        try:
            members = members_in(content)
        except ValueError:
            members = []
        if len(members) != self.first[number + 1] - self.first[number]:
            name = self.access.names[self.access.blocks.shard[number]]
            raise DataError(
                f"{self.access.place.place(name)} holds other examples than index.json says. Make "
                "the shards again."
            )
        self.held[number] = content, members
        self.bytes_read += len(content)
        self._make_room()
        return self.held[number]

    def _make_room(self) -> None:
        """Drop the blocks that were used longest ago, except one, until the bound holds."""
        while self.num_bytes > self.access.bytes_held and len(self.held) > 1:
            self.bytes_read -= len(self.held.popitem(last=False)[1][0])

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks that are held or come."""
        return self.bytes_read + self.bytes_coming

    def close(self) -> None:
        """Let the threads end, and hold nothing. One that waits for a server ends after it."""
        for number in [*self.coming]:
            self._take(number)
        for _ in self.threads:
            self.asked.put(None)
        self.threads.clear()
        self.held.clear()
        self.bytes_read = 0
