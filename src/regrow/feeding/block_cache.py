"""Blocks of remote shards in a folder of this machine, shared by all processes, and bounded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from regrow.errors import DataError, UserError
from regrow.feeding.files import cache_folder
from regrow.record import locks

SLOTS = 256  # locks of blocks; two blocks rarely share one
KEPT_SHARE = 0.9  # of the bound stays when room is made, so that it is seldom made
IN_USE_SHARE = 0.25  # the newest blocks are of pools in use
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class BlockCache:
    """Keeps at most `bound` bytes in `folder`. Safe for many processes and threads."""

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound

    def get(self, name: str, fetch: Callable[[], bytes], fits: Callable[[bytes], bool]) -> bytes:
        """Return a block: the kept one if it `fits`, or else what `fetch` returns, which is kept.

        One process fetches it; the others wait for it. Raises DataError if the folder cannot be
        written.
        """
        path = self.folder / "blocks" / name
        if (found := _read(path)) is not None and fits(found):
            return found
        slot = zlib.crc32(name.encode()) % SLOTS
        with contextlib.ExitStack() as stack:
            with self._told():
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._alone(f"block-{slot}"))
            if (found := _read(path)) is not None and fits(found):
                return found
            content = fetch()
            with self._told():
                self._keep(path, content)
        return content

    def write(self, path: Path, content: bytes) -> None:
        """Write a small file in the folder. Raises DataError."""
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, content)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Raise DataError, which names the folder, if it cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"data.source.cache={self.folder} cannot be written: {error.strerror or error}. "
                "Make room there, or choose another folder."
            ) from None

    def check(self) -> None:
        """Raise DataError unless the folder can be written."""
        with self._told(), self._alone("used"):
            (self.folder / "blocks").mkdir(exist_ok=True)

    def _keep(self, path: Path, content: bytes) -> None:
        """Write a block, and first remove others if it would not fit. One writes at a time."""
        with self._alone("used"):
            used = self._used()
            if used + len(content) > self.bound:
                used = self._make_room(int(self.bound * KEPT_SHARE) - len(content))
            self._count(used + len(content))  # before it is there: a kill may only count too much
            try:
                _write(path, content)
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                used = self._make_room(used // 2)  # the disk is smaller than the bound
                _write(path, content)
                self._count(used + len(content))

    def _used(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "used").read_bytes())
        return self.bound  # unknown: look

    def _count(self, used: int) -> None:
        (self.folder / "used").write_bytes(str(max(0, used)).encode())

    def _make_room(self, keep: int) -> int:
        """Remove blocks until at most `keep` bytes are left. Returns how many are.

        An epoch uses each block once, so that removing the oldest would remove what comes next. Any
        block may go but the newest ones.
        """
        files = []
        for place, _, names in os.walk(self.folder / "blocks"):
            for name in names:
                with contextlib.suppress(OSError):
                    status = os.stat(os.path.join(place, name))  # noqa: PTH116, PTH118
                    files.append((status.st_mtime_ns, status.st_size, Path(place, name)))
        files.sort(key=lambda file: file[0])
        used = sum(size for _, size, _ in files)
        in_use = files[int(len(files) * (1 - IN_USE_SHARE)) :]
        others = files[: len(files) - len(in_use)]
        random.Random().shuffle(others)
        for _, size, path in (*others, *in_use):
            if used <= keep:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Hold a lock over all processes and threads: each call has its own open file."""
        place = self.folder / "locks"
        place.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if name == "used":  # held for a write of one block: waiting in the kernel is faster
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            else:
                locks.wait_for(descriptor, f"a block of {self.folder}")
            yield
        finally:
            os.close(descriptor)


def cache_of(folder: str | None, gigabytes: float, needed: int) -> BlockCache:
    """Return the cache in `folder`, or in the user's cache folder. Raises UserError."""
    home = cache_folder()
    if folder is None and home is None:
        raise UserError("data.source.cache=null: there is no home folder. Name a folder.")
    bound = int(gigabytes * 1e9)
    if bound < needed:
        raise UserError(
            f"data.source.cache_gb={gigabytes:g} is less than two pools of blocks, "
            f"{needed / 1e9:.3g} GB. Raise it, or lower data.source.pool_mb."
        )
    cache = BlockCache(Path(folder) if folder is not None else (home or Path()) / "shards", bound)
    cache.check()
    return cache


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # it is in use
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    """Write a block under its name at once. It is not synced: a reader checks its CRC."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
