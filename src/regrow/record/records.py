"""A run's folder: created once, written by one process at a time, readable after any crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from regrow.errors import UserError, brief
from regrow.record import names
from regrow.record.output import whole_file
from regrow.record.redact import redact

log = logging.getLogger(__name__)

State = Literal["running", "completed", "interrupted", "failed"]
METRICS = "metrics.jsonl"
STATUS = "status.json"
SUMMARY = "summary.json"
IN_A_SUMMARY: dict[str, type | UnionType] = {
    **{"status": str, "steps": int, "epochs": int, "seconds": int | float},
    **{"best": dict, "evaluations_without_improvement": int},
}
# No evaluation set may have these names: prefixes of other metrics, and a summary's own keys.
NOT_SETS = (
    *("train", "time", "status", "steps", "epochs", "best", "pruned", "stopped_early"),
    *("evaluations_without_improvement", "skipped_steps", "empty_steps", "parameters"),
    *("weights_sha256", "seconds", "seconds_of_this_part"),
)
_SUFFIX = "abcdefghijkmnpqrstuvwxyz23456789"  # no l, o, 0, 1: easy to read aloud and to type


class FolderBusy(UserError):
    """Raised if another living process holds the folder."""


def create(outputs: Path, name: str, now: datetime | None = None) -> Path:
    """Create and return outputs/<name>/<date>_<time>-<suffix>, unique to this process."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
        raise UserError(
            f"name={name!r} cannot name a folder under {outputs}. Use letters, - and _."
        )
    parent = outputs.joinpath(*parts)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        stamp = f"{now or datetime.now():%Y-%m-%d_%H-%M-%S}"
        suffix = "".join(secrets.choice(_SUFFIX) for _ in range(4))
        folder = parent / f"{stamp}-{suffix}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()  # atomic; a check beforehand would race
            return folder


def link_latest(folder: Path, runs: Path) -> None:
    """Point <runs>/latest at `folder`, atomically.

    For a sweep's job, point <runs>/sweeps/latest at the sweep. `runs` is outputs/<name>. A folder
    elsewhere, or deeper, is not linked.
    """
    try:
        inside = folder.resolve().relative_to(runs.resolve())
    except ValueError:
        return
    if ".." in runs.parts:  # the name comes from a foreign folder
        return
    if inside.parts[:1] == ("sweeps",):
        runs, inside = runs / "sweeps", Path(*inside.parts[1:2])
    if len(inside.parts) != 1:
        return
    link = runs / "latest"
    if link.exists() and not link.is_symlink():
        log.warning("%s is not a link, left as it is", link)
        return
    if link.is_symlink() and len(link.readlink().parts) != 1:
        log.warning("%s names another place, left as it is", link)  # not written by a run
        return
    temporary = link.with_name(f".latest-{secrets.token_hex(8)}")
    try:
        temporary.symlink_to(inside, target_is_directory=True)
        temporary.replace(link)
    except OSError as error:  # the file system has no links: the run does not need one
        log.warning("%s was not updated: %s", link, error)
        temporary.unlink(missing_ok=True)


def linked_latest(runs: Path) -> Path | None:
    """Return the folder that <runs>/latest points at, or None."""
    link = runs / "latest"
    return link.resolve() if link.is_symlink() and link.is_dir() else None


def unlink_latest(folder: Path, runs: Path, before: Path | None) -> None:
    """Point <runs>/latest at the folder `before` again, or remove it, if it points at `folder`."""
    if linked_latest(runs) != folder.resolve():
        return
    if before is not None and before.is_dir():
        link_latest(before, runs)
    else:
        (runs / "latest").unlink(missing_ok=True)


def refuse_links(folder: Path, named: str, part: str = "", way_out: str = "") -> None:
    """Raise UserError for a link in the folder, or in a part of it, that leads out of the folder.

    Writing would follow the link, so call this before writing into a folder from elsewhere. wandb's
    folder is exempt: it links to its own logs, and wandb creates a new folder at each start.
    """
    inside, below = folder.resolve(), [folder / part] if part else []
    for root, folders, files in os.walk(folder / part):
        below += [Path(root, name) for name in (*folders, *files)]
        if Path(root) == folder:
            folders[:] = [name for name in folders if name != "wandb"]
    for path in below:
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise UserError(
                f"{named}: {path} is a link that leads out of the folder, and what is written "
                f"would follow it. Remove the link, or put in its place what it leads to.{way_out}"
            )


def remove_unused(folder: Path) -> None:
    """Remove a folder that holds only this process's lock; of the current one, only the lock."""
    if folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:
        (folder / ".lock").unlink()
        if folder.resolve() != Path.cwd():
            folder.rmdir()


def remove_start(folder: Path) -> None:
    """Remove what a run wrote before its first step, and the folder if nothing else is in it.

    Only call this for a folder that held nothing but the lock when the run began.
    """
    for path in folder.iterdir():
        if path.name == names.LOCK or not names.is_of_a_run(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    remove_unused(folder)


# -- one writer ------------------------------------------------------------------------------------

_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """An exclusive lock on a folder; the kernel releases it when its holder dies.

    Use `with Lock(folder):` or acquire() and release(). Raises FolderBusy if another process holds
    it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor: int | None = None

    def acquire(self) -> Lock:
        if self.descriptor is not None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)  # its last holder may have removed it
        try:
            descriptor = os.open(
                self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
            )
        except FileNotFoundError:
            return self.acquire()
        for attempt in range(6):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(descriptor)
                    raise
                if attempt == 5:  # after 0.25 s it is not just a check by is_locked()
                    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                    os.close(descriptor)
                    raise FolderBusy(
                        f"{self.folder} is in use by {holder or 'another process'}. "
                        "Wait for it, stop it, or use another folder."
                    ) from None
                time.sleep(0.05)
        if not self._is_in_place(descriptor):
            os.close(descriptor)
            return self.acquire()
        with contextlib.suppress(OSError):  # the lock works even on a full disk
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        self.descriptor = descriptor
        _held.add(self)
        for leftover in self.folder.glob(".*.tmp"):  # left by a killed writer
            if names.is_temporary(leftover.name) and leftover.is_file():
                leftover.unlink(missing_ok=True)
        return self

    @classmethod
    def taken_over(cls, folder: Path, descriptor: int) -> Lock:
        """Return the lock on `folder` that this process held before it replaced its program."""
        os.set_inheritable(descriptor, False)
        lock = cls(folder)
        lock.descriptor = descriptor
        _held.add(lock)
        return lock

    def _is_in_place(self, descriptor: int) -> bool:
        """Return True if the lock file still exists: its last holder may have removed it."""
        try:
            return os.path.samestat(os.fstat(descriptor), (self.folder / ".lock").stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None
            _held.discard(self)

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _let_go_in_a_fork() -> None:
    # A forked data worker that outlives its killed parent would hold the lock for seconds.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_a_fork)


def is_locked(folder: Path) -> bool:
    """Return True if a living process, including this one, holds the folder's lock."""
    try:
        descriptor = os.open(folder / ".lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


# -- files -----------------------------------------------------------------------------------------


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace the file atomically: after a crash it holds the complete old or new text.

    A `private` file is readable by this user only. Bytes of file names that are not UTF-8 are
    written as \\udcXX, which JSON and YAML read back as Python's form of that byte.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), private=private)


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Like write_text, for bytes."""
    refuse_special(path)
    with whole_file(path, mode=0o600 if private else 0o666) as file:
        file.write(content)
    sync_folder(path.parent)


def refuse_special(path: Path) -> None:
    """Raise FileExistsError for a folder, device, pipe or socket, which a rename would replace.

    A link itself is replaced: its target does not change.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it exists and is not a regular file", str(path))


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, like write_text. NaN is written as NaN, which Python's json reads."""
    write_text(path, as_json(value))


def as_json(value: Any) -> str:
    """Return `value` as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n"


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, or ValueError if it is damaged."""
    return _parsed(path.read_text(encoding="utf-8"))


def _parsed(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_damaged(
    path: Path, types: Mapping[str, type | UnionType], *, whole: bool = True
) -> dict[str, Any]:
    """Return the mapping in a JSON file; if it is damaged or has other types, warn and return {}.

    A missing file gives {} too. Unless `whole`, keys may be missing.
    """
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        for key, kind in types.items():
            if key not in content and not whole:
                continue
            if not isinstance(content[key], kind):
                raise TypeError(f"its {key} is {str(content[key])[:40]!r}")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        reason = brief(error, 200)
    except LookupError as error:
        reason = f"it lacks {error}"
    log.warning("%s is damaged and not used: %s", path, reason)
    return {}


def load_summary(folder: Path, *, whole: bool = True) -> dict[str, Any]:
    """Return the content of summary.json; empty if it is missing or damaged.

    If `whole`, every key that a resume needs must be there.
    """
    summary = read_damaged(folder / SUMMARY, IN_A_SUMMARY, whole=whole)
    best = summary.get("best", {"value": None})
    if not isinstance(best.get("value"), int | float | None):
        log.warning("%s is damaged and not used: its best is %s", folder / SUMMARY, best)
        return {}
    return summary


def by_set(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return metrics such as night/accuracy by the name of their set, in the order of `values`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        name = key.partition("/")[0]
        if "/" in key and name not in NOT_SETS:
            found.setdefault(name, {})[key] = value
    return found


def sets_of(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the metrics of each set that a summary holds, by name; keys are night/accuracy."""
    return {k: v for k, v in summary.items() if k not in NOT_SETS and isinstance(v, dict)}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy's and torch's numbers and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def dump_line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, default=_plain) + "\n").encode()


def whole_lines(path: Path) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            cut = file.read(end - start).rfind(b"\n")
            if cut >= 0:
                return start + cut + 1
            end = start
    return 0


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without torn ones; empty if there is no file."""
    return list(iterate_metrics(folder))


def iterate_metrics(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / METRICS
    if not path.exists():
        return
    broken = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = _parsed(line)
            except ValueError:
                values = None
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                yield values
            elif line.endswith(b"\n"):  # the last line may be incomplete
                broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (" …" if len(broken) > 5 else "")
        log.warning("%s: left out what is not a line of a run: line %s", path, shown)


# -- status ----------------------------------------------------------------------------------------


def set_status(
    folder: Path,
    state: State,
    *,
    step: int,
    pids: Sequence[int],
    error: str | None = None,
    **more: Any,
) -> None:
    """Write status.json. On a full disk the run continues, with a warning."""
    if error is not None:
        error = redact(re.sub(r"\s+", " ", error).strip())
    status = {"state": state, "step": step, "pids": list(pids), "error": error, **more}
    status["updated"] = datetime.now().astimezone().isoformat(timespec="seconds")
    try:
        write_json(folder / STATUS, status)
    except OSError as failure:
        log.warning("%s was not written: %s", folder / STATUS, failure)


def set_step(folder: Path, step: int) -> None:
    """Record the step in status.json; after a kill it is the only trace of progress."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        set_status(folder, **{**read_json(folder / STATUS), "step": step})


def load_status(folder: Path) -> dict[str, Any] | None:
    """Return the content of status.json or None; `running` without a lock becomes `interrupted`."""
    status = read_damaged(folder / STATUS, {"state": str, "step": int}, whole=False)
    if not isinstance(status.get("state"), str):
        return None
    if status.get("state") == "running" and not is_locked(folder):
        status["state"] = "interrupted"
        status["error"] = status.get("error") or "its process ended without an error message"
    return status
