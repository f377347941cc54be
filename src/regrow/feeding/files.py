"""Find files below a folder, report those left out and why, and detect copies."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import time
import zlib
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from regrow.config.class_folders import is_hidden
from regrow.dotted import Config
from regrow.errors import DataError, UserError, brief, machine_fault

OF_SUFFIX = "of suffix "
KINDS_LEFT_OUT = ("hidden", "empty")  # words of data.source.leave_out; others are paths
NAMED = "named in data.source.leave_out"
NUM_NAMES = 3  # names shown per reason to leave files out
NUM_SUFFIXES = 8  # suffixes named; the others are counted
END = 4096  # bytes at each end of a file, compared before its contents
CHUNK = 1 << 20
NUM_READERS = 4  # threads that read contents; hashing releases the GIL
ANNOUNCED_BYTES = 1 << 30  # log before reading more than this, which takes seconds
YOUNG_NS = 2_000_000_000  # a file changed more recently may change again in the same clock tick
COMPRESSED = {  # first bytes
    "gzip": re.compile(rb"\x1f\x8b"),
    "zip": re.compile(rb"PK\x03\x04"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
}

log = logging.getLogger("regrow.data")


@dataclass
class LeftOut:
    """Counts of the files and folders that a walk leaves out, with a few names, by reason."""

    root: Path
    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)  # paths of `leave_out` that a walk met

    def check_named(self, leave_out: Iterable[str]) -> None:
        """Raise UserError for a path in `leave_out` that no walk met: it would have no effect."""
        for path in named_in(leave_out, self.root):
            if path not in self.named:
                name = shown(os.path.relpath(path, self.root))
                raise UserError(
                    f"data.source.leave_out: {name} is not among the images below data.root="
                    f"{shown(self.root)}. Correct the path, or remove it from the list."
                )

    def add(self, reason: str, path: str | Path) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < NUM_NAMES:
            names.append(shown(os.path.relpath(path, self.root)))

    def __str__(self) -> str:
        """Return one line without a full stop, or "" if nothing was left out."""
        parts, num_suffixes, rest = [], 0, 0
        for reason, count in self.counts.most_common():
            num_suffixes += reason.startswith(OF_SUFFIX)
            if reason.startswith(OF_SUFFIX) and num_suffixes > NUM_SUFFIXES:
                rest += count
                continue
            more = ", …" if count > len(self.names[reason]) else ""
            parts.append(f"{count:,} {reason} ({', '.join(self.names[reason])}{more})")
        if rest:
            parts.append(f"{rest:,} of other suffixes")
        return f"left out of {shown(self.root)}: {'; '.join(parts)}" if parts else ""

    def sentence(self) -> str:
        """Return the line as a sentence to append to another, or ""."""
        line = str(self)
        return f" {line[0].upper()}{line[1:]}." if line else ""


def named_in(leave_out: Iterable[str], root: Path) -> list[str]:
    """Return the paths among `leave_out`, below `root`, as os.scandir gives them."""
    names = [os.path.normpath(name) for name in leave_out if name not in KINDS_LEFT_OUT]
    return [os.fspath(root / name) for name in names]


def without_gone(
    data: Mapping[str, Config], folder: Path, *, tells: bool = True
) -> Mapping[str, Config]:
    """Return a data node to build: without paths of `source.leave_out` that are recorded and gone.

    `folder` is the run's, whose config.yaml keeps them. Such a file was deleted since, or is not
    below another `data.root`. Logs one line if it `tells`. A path that was typed since stays, so
    that the source refuses it if it names nothing; a path that is there stays left out.
    """
    source = data.get("source")
    if not isinstance(source, Mapping) or not (folder / "config.yaml").is_file():
        return data
    listed, root = source.get("leave_out"), source.get("root")
    if not isinstance(listed, list) or not isinstance(root, str) or not is_folder(Path(root)):
        return data  # the source reports a missing root
    gone = [it for it in listed if any(not os.path.lexists(p) for p in named_in([it], Path(root)))]
    if not gone:
        return data
    from regrow.config.recorded import recorded_config  # imports OmegaConf

    recorded = recorded_config(folder, str(folder))["data"].get("source") or {}
    gone = [it for it in gone if it in (recorded.get("leave_out") or ())]
    if gone and tells:
        more = f" and {len(gone) - 1:,} more" if gone[1:] else ""
        log.info(
            "data.source.leave_out: ignored what is recorded but not below data.root=%s: %s%s",
            *(shown(root), shown(gone[0]), more),
        )
    return {**data, "source": {**source, "leave_out": [it for it in listed if it not in gone]}}


def shown(path: str | Path) -> str:
    """Return the path on one line, even if its bytes are not UTF-8 or it contains a newline."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return text if text.isprintable() else repr(text)[1:-1]


def not_utf8(path: Path, where: str, reason: str, fix: str) -> DataError:
    """Return the error for a file that is not UTF-8 at the place `where`, or is compressed."""
    with path.open("rb") as file:
        start = file.read(10)
    for name, first in COMPRESSED.items():
        if first.match(start):
            return DataError(f"{shown(path)}: compressed ({name}). Unpack it.")
    return DataError(f"{shown(path)}, {where}: not UTF-8 ({reason}). {fix}")


def unreadable(path: str | Path, error: OSError) -> DataError | OSError:
    """Return the error to raise for an unreadable file: `error` itself for a fault of the machine.

    Errors of data workers arrive as text, in which `machine_fault` recognises it again.
    """
    if machine_fault(error):
        return error
    reason = error.strerror or brief(error)
    is_gone = error.errno == errno.ENOENT
    way_out = "Put it back." if is_gone else "Make it readable, or move it out of data.root."
    return DataError(f"{shown(path)} cannot be read: {reason}. {way_out}")


def is_folder(path: Path) -> bool:
    """Return True if `path` is a folder. Raises DataError without permission to check."""
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from None


def find_files(
    folder: Path, suffixes: Collection[str], leave_out: Collection[str], left_out: LeftOut
) -> list[Path]:
    """Return the files below the folder with one of the suffixes, sorted by path.

    `leave_out` may contain "hidden" (names that begin with a dot, and system folders), "empty"
    (files of zero bytes), and paths below the root of `left_out`. These, linked folders, and
    everything that is not a readable regular file are added to `left_out`. Raises DataError for a
    folder that cannot be read.
    """
    named = frozenset(named_in(leave_out, left_out.root))
    found: list[Path] = []
    pending = [os.fspath(folder)]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    is_named = entry.path in named
                    reason = NAMED if is_named else _reason(entry, suffixes, leave_out)
                    if is_named:
                        left_out.named.add(entry.path)
                    if reason is not None:
                        left_out.add(reason, entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        found.append(Path(entry.path))
        except OSError as error:
            raise unreadable(error.filename or current, error) from None
    return sorted(found)


def _reason(
    entry: os.DirEntry[str], suffixes: Collection[str], leave_out: Collection[str]
) -> str | None:
    """Return the reason to leave the entry out, or None."""
    if "hidden" in leave_out and is_hidden(entry.name):
        return "hidden"
    if entry.is_dir(follow_symlinks=False):
        return None
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP) and entry.is_symlink():
            return "links that lead nowhere"
        raise
    if stat.S_ISDIR(status.st_mode):
        return "linked folders"
    suffix = Path(entry.name).suffix
    if suffix.lower() not in suffixes:
        return f"{OF_SUFFIX}{shown(suffix)}" if suffix else "without a suffix"
    if not stat.S_ISREG(status.st_mode):
        return "not regular files"
    return "empty" if status.st_size == 0 and "empty" in leave_out else None


def keys_of_copies(files: Sequence[str], root: str) -> list[Hashable]:
    """Return one key per file. Two keys are equal if and only if the files' contents are.

    Compares sizes first, then the ends of files of equal size, and reads contents only if these
    agree too. So keys are only comparable within one call.
    """
    keys: list[Hashable] = [_status(file).st_size for file in files]
    for refine in (_ends_of, lambda chosen: contents_of(chosen, root)):
        counts = Counter(keys)
        # The two ends cover all of a small file.
        again = [at for at, key in enumerate(keys) if counts[key] > 1 and not _is_whole(key)]
        for at, more in zip(again, refine([files[at] for at in again]), strict=True):
            old = keys[at]
            keys[at] = (*old, more) if isinstance(old, tuple) else (old, more)
    return keys


def of_two_classes(labels: Sequence[tuple[str, str]], keys: Sequence[Hashable]) -> str:
    """Return a warning about copies that lie in folders of different classes; "" if there are none.

    `labels` are each file and its class, and `keys` those of `keys_of_copies`, or none.
    """
    first: dict[Hashable, tuple[str, str]] = {}
    pairs: dict[Hashable, tuple[str, str]] = {}  # with one example of each content
    for (file, label), key in zip(labels, keys, strict=False):
        other, its = first.setdefault(key, (file, label))
        if label != its:
            pairs.setdefault(key, (other, file))
    if not pairs:
        return ""
    one, two = map(shown, next(iter(pairs.values())))
    what = "1 image has" if len(pairs) == 1 else f"{len(pairs):,} images have"
    return (
        f"{what} copies of the same bytes in folders of different classes, such as {one} and {two}."
        " A model cannot learn both: delete the copies in the wrong folders"
    )


def _is_whole(key: Hashable) -> bool:
    return isinstance(key, tuple) and key[0] <= 2 * END


def key_of_ends(file: str) -> tuple[int, bytes]:
    """Return the size and a hash of the first and last 4 KiB: different files may share it."""
    try:
        size = Path(file).stat().st_size
        digest = hashlib.blake2b(digest_size=16)
        with Path(file).open("rb") as opened:
            digest.update(opened.read(END))
            opened.seek(max(0, size - END))
            digest.update(opened.read(END))
        return size, digest.digest()
    except OSError as error:
        raise unreadable(file, error) from None


def _ends_of(files: Sequence[str]) -> list[bytes]:
    return [key_of_ends(file)[1] for file in files]


def _status(file: str) -> os.stat_result:
    try:
        return Path(file).stat()
    except OSError as error:
        raise unreadable(file, error) from None


def contents_of(files: Sequence[str], root: str) -> list[bytes]:
    """Return the SHA-256 of each file's contents.

    A file is read once: its hash is cached in the user's cache folder while its path, size, inode
    and change times stay the same. The kernel sets the ctime at every write, and no program can set
    it back.
    """
    memory = _Memory(root)
    stamps = [_stamp(file, _status(file)) for file in files]
    unknown = [at for at, stamp in enumerate(stamps) if stamp not in memory.known]
    if unknown:
        num_bytes = sum(_status(files[at]).st_size for at in unknown)
        if num_bytes >= ANNOUNCED_BYTES:
            log.info(
                "reading the contents of %s files (%.1f GB) once, to know copies and changes",
                *(f"{len(unknown):,}", num_bytes / 1e9),
            )
        with ThreadPoolExecutor(NUM_READERS) as pool, memory:
            hashes = pool.map(_hash, [files[at] for at in unknown])
            for at, (stamp, digest, is_settled) in zip(unknown, hashes, strict=True):
                stamps[at] = stamp
                memory.add(stamp, digest, keep=is_settled)
    return [memory.known[stamp] for stamp in stamps]


def _hash(file: str) -> tuple[bytes, bytes, bool]:
    """Return a file's stamp and SHA-256, and True if any later change must change the stamp."""
    try:
        with Path(file).open("rb") as opened:
            status = os.fstat(opened.fileno())
            digest = hashlib.sha256()
            while chunk := opened.read(CHUNK):
                digest.update(chunk)
        stamp = _stamp(file, status)
        is_settled = (
            stamp == _stamp(file, Path(file).stat())
            and max(status.st_mtime_ns, status.st_ctime_ns) < time.time_ns() - YOUNG_NS
        )
        return stamp, digest.digest(), is_settled
    except OSError as error:
        raise unreadable(file, error) from None


def _stamp(file: str, status: os.stat_result) -> bytes:
    facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    name = os.fsencode(Path(file).absolute())
    return hashlib.blake2b(name + repr(facts).encode(), digest_size=16).digest()


def cache_folder() -> Path | None:
    """Return the user's cache folder for this program, which may not exist; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not Path(base).is_absolute():  # the specification ignores relative paths
        base = os.path.expanduser("~/.cache")  # noqa: PTH111  it never raises
    return Path(base) / "regrow" if Path(base).is_absolute() else None


class _Memory:
    """Known hashes of the files below one root, in an append-only file.

    A record is a stamp (16 bytes), a SHA-256 (32) and a checksum of both (4). A damaged record is
    ignored, so its file is read again. Without a cache folder nothing is stored.
    """

    RECORD = 52
    BATCH = 1000  # records per write, so that a kill loses little

    def __init__(self, root: str) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32]
        self.path = (cache_folder() or Path()) / "contents" / name
        self.known: dict[bytes, bytes] = {}
        self.new: list[bytes] = []
        self.is_usable = self.path.is_absolute()
        if not self.is_usable:
            return
        with contextlib.suppress(OSError):
            self._read(self.path.read_bytes())

    def _read(self, content: bytes) -> None:
        at = 0
        while at + self.RECORD <= len(content):
            stamp, digest = content[at : at + 16], content[at + 16 : at + 48]
            if _checksum(stamp, digest) == content[at + 48 : at + self.RECORD]:
                self.known[stamp] = digest
                at += self.RECORD
            else:  # an incomplete record, after a kill or on a full disk
                at += 1

    def add(self, stamp: bytes, digest: bytes, *, keep: bool) -> None:
        self.known[stamp] = digest
        if keep and self.is_usable:
            self.new.append(stamp + digest + _checksum(stamp, digest))
            if len(self.new) >= self.BATCH:
                self._write()

    def _write(self) -> None:
        if not self.is_usable:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A single appending write: other processes may append to the same file.
            with self.path.open("ab", buffering=0) as file:
                file.write(b"".join(self.new))
        self.new.clear()

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()


def _checksum(stamp: bytes, digest: bytes) -> bytes:
    return zlib.crc32(stamp + digest).to_bytes(4, "little")
