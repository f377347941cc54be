"""Parts of files by name, in a folder or behind a URL that `fsspec` opens. Errors are one line."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from regrow.errors import DataError, UserError, brief, machine_fault
from regrow.extras import require
from regrow.feeding.files import shown, unreadable

# Protocols that need a package: the extra that installs it, and the package.
EXTRAS = {"http": ("http", "aiohttp"), "https": ("http", "aiohttp"), "s3": ("s3", "s3fs"),
          "s3a": ("s3", "s3fs")}  # fmt: skip
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0  # between two tries; doubled each time
# Errors of the network, besides OSErrors.
PASSING = (("aiohttp", "ClientError"), ("botocore.exceptions", "ConnectionError"),
           ("botocore.exceptions", "HTTPClientError"))  # fmt: skip
LATER = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass

T = TypeVar("T")


@dataclass(frozen=True)
class Stamp:
    """A file's size and tag, as a server gives them. A tag changes with the content, or is ""."""

    num_bytes: int | None
    tag: str


class Folder:
    """A folder of this machine."""

    is_remote = False

    def __init__(self, root: str) -> None:
        self.root = root

    def place(self, name: str) -> str:
        return os.path.join(self.root, name)  # noqa: PTH118  a Path would cost more than the read

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop), fewer at the file's end. Raises DataError."""
        path = self.place(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(descriptor, stop - start, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(path, error) from None

    def whole(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError or DataError."""
        try:
            return Path(self.place(name)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(self.place(name)) from None
        except OSError as error:
            raise unreadable(self.place(name), error) from None

    def stamp(self, name: str) -> Stamp:
        try:
            return Stamp(Path(self.place(name)).stat().st_size, "")
        except OSError as error:
            raise unreadable(self.place(name), error) from None


class Remote:
    """A folder behind a URL. Each call is tried again `retries` times if the fault may pass."""

    is_remote = True

    def __init__(self, root: str, *, timeout_seconds: float, retries: int) -> None:
        self.root, self.timeout_seconds, self.retries = root.rstrip("/"), timeout_seconds, retries
        self._opened: tuple[int, Any] | None = None
        self._locks: dict[int, threading.Lock] = {}  # by process: a fork may copy a held one

    def __getstate__(self) -> dict[str, Any]:
        # A connection belongs to one process.
        return {**self.__dict__, "_opened": None, "_locks": {}}

    def place(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop). Raises DataError."""
        url = self.place(name)
        found: bytes = self._tried(url, lambda files: files.cat_file(url, start=start, end=stop))
        if len(found) > stop - start:
            raise DataError(
                f"{url}: the server sends the whole file where a part of it is asked for. Use one "
                "that serves ranges of bytes."
            )
        return found

    def whole(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError or DataError."""
        url = self.place(name)
        return self._tried(url, lambda files: bytes(files.cat_file(url)), may_lack=True)

    def stamp(self, name: str) -> Stamp:
        url = self.place(name)
        facts = self._tried(url, lambda files: files.info(url))
        tag = next((facts[k] for k in ("ETag", "Content-MD5", "Last-Modified") if k in facts), "")
        return Stamp(facts.get("size"), str(tag))

    def _files(self) -> Any:
        process = os.getpid()
        with self._locks.setdefault(process, threading.Lock()):
            if self._opened is None or self._opened[0] != process:
                self._opened = (process, opened(self.root, self.timeout_seconds))
            return self._opened[1]

    def _tried(self, url: str, call: Callable[[Any], T], *, may_lack: bool = False) -> T:
        files, wait = self._files(), FIRST_WAIT_SECONDS
        for again in range(self.retries, -1, -1):
            try:
                return call(files)
            except Exception as raised:
                error = _behind(raised)
                if isinstance(error, FileNotFoundError):
                    if may_lack:
                        raise error from None
                    raise DataError(f"{url} is not there (404). Put it back.") from None
                if machine_fault(error):
                    raise
                reason = _said(error)
                if not may_pass(error):
                    raise DataError(f"{url} cannot be read: {reason}.") from None
                if not again:
                    raise DataError(
                        f"{url} cannot be read: {reason}, in {self.retries + 1} tries "
                        "(data.source.retries, timeout_seconds). Is the server up? Then resume."
                    ) from None
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_SECONDS)
        raise AssertionError


def folder_of(root: str, *, timeout_seconds: float, retries: int) -> Folder | Remote:
    """Return access to the folder. Raises UserError for a protocol that is not installed."""
    if "://" not in root:
        return Folder(root)
    protocol = root.partition("://")[0].lower()
    if protocol in ("file", "local"):
        return Folder(root.partition("://")[2])
    if protocol in EXTRAS:
        require(f"data.source.root={root}", EXTRAS[protocol][0], EXTRAS[protocol][1])
    return Remote(root, timeout_seconds=timeout_seconds, retries=retries)


def opened(root: str, timeout_seconds: float) -> Any:
    """Return fsspec's file system of a URL, new in each process. Raises UserError."""
    import fsspec

    protocol = root.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=timeout_seconds)}
    elif protocol in ("s3", "s3a"):
        limits = {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        options["config_kwargs"] = limits
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"data.source.root={root}: {brief(error, 200)}") from None


def _behind(error: Exception) -> Exception:
    """Return the fault itself: fsspec's `info` turns every one over HTTP into FileNotFoundError."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    if _is_of(cause, "aiohttp", "ClientResponseError") and cause.status == 404:
        return error
    is_of_http = _is_of(cause, "aiohttp", "ClientError") or isinstance(cause, TimeoutError)
    return cause if is_of_http else error


def may_pass(error: Exception) -> bool:
    """Return True for a fault of the network or the server that may be gone at the next try."""
    if _is_of(error, "aiohttp", "ClientResponseError"):
        return bool(error.status in LATER)
    for package, name in PASSING:
        if _is_of(error, package, name):
            return True
    return isinstance(error, OSError) and not isinstance(error, PermissionError)


def _is_of(error: Exception, package: str, name: str) -> TypeGuard[Any]:
    """Return True for an error of this class of a package, which is not imported for it."""
    module = sys.modules.get(package)
    return module is not None and isinstance(error, getattr(module, name))


def _said(error: Exception) -> str:
    """Return the reason in words: a time-out has no text of its own, and a URL is said already."""
    if _is_of(error, "aiohttp", "ClientResponseError"):
        return f"status {error.status} {error.message}".strip()
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return shown(brief(error, 160)).rstrip(".")
