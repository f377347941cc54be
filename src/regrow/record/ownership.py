"""Track which folders of runs and sweeps are this user's own.

Resuming a folder executes what lies in it: a sweep's frozen code and commands, a run's loggers. So
each new folder is entered in a list that only its user can write, `$XDG_STATE_HOME/regrow/folders`:
an id, the SHA-256 of a sweep's code, and a key. The folder holds the id, and a seal over what
resuming would use: an HMAC with that key. A copy with different code or commands is not the user's,
whatever its id. A folder may be moved or renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from regrow.errors import UserError
from regrow.record import locks
from regrow.record.manifest import ORIGIN
from regrow.record.records import read_json, refuse_links, write_bytes, write_json

log = logging.getLogger("regrow")

SWEEP, CODE = "sweep.json", "code"
OWNER = Path(".hydra", "owner.json")  # in a run's folder
LIST, LOCK = "folders", ".lock"
NO_CODE = "-"
MOST_BYTES = 4_000_000  # some 30,000 folders; a longer list loses its older half
DIGITS = 12
UNSEALED = ("seal", "complete")  # a job that ends on another machine changes "complete"


class ListedFolder(NamedTuple):
    """One line of the list."""

    id: str
    code: str  # SHA-256 of a sweep's frozen code, or NO_CODE
    key: str


# -- the list --------------------------------------------------------------------------------------


def state_folder() -> Path:
    """Return the folder of the list. Raises OSError if the environment names none."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not named.is_absolute():  # the specification says to ignore a relative path
        named = Path(os.path.expanduser("~/.local/state"))  # noqa: PTH111  it never raises
    if not named.is_absolute():
        raise OSError("neither HOME nor XDG_STATE_HOME is set")
    return named / "regrow"


def enter(code: str = NO_CODE) -> ListedFolder:
    """Add a new entry to the list. Raises OSError if the list cannot be written."""
    entry = ListedFolder(secrets.token_hex(16), code, secrets.token_hex(32))
    folder = _usable(state_folder(), make=True)
    with _alone(folder):
        path = folder / LIST
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
            line = f"{' '.join(entry)}\n".encode()
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line  # a full disk has torn the last entry
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if os.fstat(descriptor).st_size > MOST_BYTES:
                _forget_the_oldest(path)
        finally:
            os.close(descriptor)
    return entry


def reason_of(error: OSError) -> str:
    """Return in a few words why the list cannot be written."""
    return f"{error.filename or 'the list of your folders'}: {error.strerror or error}"


def entries() -> list[ListedFolder]:
    """Return all entries; none if the list cannot be read, or if others may write it."""
    try:
        text = (_usable(state_folder()) / LIST).read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    lines = (line.split(" ") for line in text.splitlines())
    return [ListedFolder(*line) for line in lines if len(line) == 3]


def find(identity: object) -> ListedFolder | None:
    """Return the entry for an id that a folder holds, or None."""
    return next((entry for entry in reversed(entries()) if entry.id == identity), None)


def _usable(folder: Path, *, make: bool = False) -> Path:
    """Return the state folder if nobody else may write there. Raises OSError."""
    if make:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    status = folder.stat()
    if status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
    if status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "others may write there", str(folder))
    if make and status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the list's lock, if the file system has locks: each line is a single write anyway."""
    with open(folder / LOCK, "ab", opener=lambda name, flags: os.open(name, flags, 0o600)) as lock:
        with contextlib.suppress(OSError):
            locks.wait_for(lock.fileno(), f"{folder / LOCK}")
        yield


def _forget_the_oldest(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    write_bytes(path, b"".join(lines[len(lines) // 2 :]), private=True)


# -- seals and digits ------------------------------------------------------------------------------


def seal_of(entry: ListedFolder, content: Any) -> str:
    return hmac.new(bytes.fromhex(entry.key), _bytes(content), hashlib.sha256).hexdigest()


def _is_sealed(entry: ListedFolder, content: Any, seal: object) -> bool:
    with contextlib.suppress(ValueError, TypeError):  # key not hexadecimal, seal not ASCII
        return hmac.compare_digest(seal_of(entry, content), str(seal))
    return False


def _bytes(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=True, default=str).encode()


_trusted: set[str] = set()


def take_trust(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without `trust=…`, which this process remembers. Raises UserError."""
    for argument in arguments:
        if argument.startswith("trust="):
            digits = argument.removeprefix("trust=").strip("'\"").lower()
            if not re.fullmatch(rf"[0-9a-f]{{{DIGITS},64}}", digits):
                raise UserError(
                    f"{argument}: give the {DIGITS} digits that the refusal of a folder names, "
                    "such as trust=0123456789ab."
                )
            _trusted.add(digits)
    return [argument for argument in arguments if not argument.startswith("trust=")]


def _is_trusted(digest: str) -> bool:
    return any(digest.startswith(digits) for digits in _trusted)


# -- a run's folder --------------------------------------------------------------------------------


def owner_of_job(entry: ListedFolder, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content of a run's owner.json. Call it where the user's list is."""
    return {"id": entry.id, "seals": [seal_of(entry, ["run", *overrides])]}


def enter_run(folder: Path, overrides: Sequence[str], owner: Mapping[str, Any] | None) -> None:
    """Write owner.json for a run that is about to record these overrides.

    `owner` is its content if it was made before. Logs a warning if the list cannot be written. Call
    it before the overrides are written: a run killed in between keeps the earlier seal, too.
    """
    before = _mapping(folder / OWNER)
    if owner is None:
        try:
            owner = owner_of_job(find(before.get("id")) or enter(), overrides)
        except OSError as error:
            log.warning(
                "this run could not be listed as yours (%s). It runs anyway; resuming it by name "
                "with its loggers will need trust=%s",
                reason_of(error),
                digest_of_run(overrides)[:DIGITS],
            )
            return
    kept = before.get("seals") if before.get("id") == owner["id"] else None
    kept = kept[:1] if isinstance(kept, list) else []
    write_json(folder / OWNER, {**owner, "seals": [*dict.fromkeys([*owner["seals"], *kept])]})


def is_own_run(folder: Path, overrides: Sequence[str]) -> bool:
    """Return True if this user's run in `folder` recorded these overrides, or they are trusted."""
    if _is_trusted(digest_of_run(overrides)):
        return True
    held = _mapping(folder / OWNER)
    entry, seals = find(held.get("id")), held.get("seals")
    if entry is None or not isinstance(seals, list):
        return False
    return any(_is_sealed(entry, ["run", *overrides], seal) for seal in seals)


def digest_of_run(overrides: Sequence[str]) -> str:
    return hashlib.sha256(_bytes(["run", *overrides])).hexdigest()


# -- a sweep's folder ------------------------------------------------------------------------------


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a sweep.json, with its seal if the list has its id."""
    if (entry := find(content.get("id"))) is not None:
        content["seal"] = seal_of(entry, _kept(content))
    return content


def _kept(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in UNSEALED}


def check_sweep(folder: Path, named: str) -> ListedFolder | None:
    """Return the entry of the sweep in `folder`, or None if it is trusted by its digits.

    Raises UserError, which begins with `named`, for a sweep that is neither, and for one whose code
    is missing or holds links or special files. Python's caches do not count and are not used: see
    `remove_caches`.
    """
    content = _content(folder, named)
    if not (folder / CODE / ORIGIN).is_file() or (folder / CODE).is_symlink():
        raise UserError(
            f"{named} holds a sweep without its own code, and other code never takes its place. "
            f"Put the folder {CODE} back, or start another sweep: resume=never, or another "
            "hydra.sweep.dir."
        )
    code = digest_of_code(folder / CODE, named)
    if content is None:  # killed before it planned a job: resuming uses only the code
        own = next((entry for entry in reversed(entries()) if entry.code == code), None)
    else:
        own = _entered(code, content)
    if own is not None:
        if content is None:  # someone else may have copied this user's code there
            refuse_links(folder, named)
        return own
    digest = _digest_of_sweep(code, content)
    if _is_trusted(digest):
        refuse_links(folder, named)
        return None
    others = ", nor is it what trust=… names" if _trusted else ""
    raise UserError(
        f"{named} holds a sweep that is not listed as yours{others}, and to resume it is to run "
        f"the code and commands in it. If you trust them, add trust={digest[:DIGITS]}"
    )


def _entered(code: str, content: Mapping[str, Any]) -> ListedFolder | None:
    """Return the entry of a sweep with this code and an intact seal, or None."""
    entry = find(content.get("id"))
    if entry is None or entry.code != code:
        return None
    return entry if _is_sealed(entry, _kept(content), content.get("seal")) else None


def trust_of(folder: Path) -> list[str]:
    """Return `trust=…` if the command that resumes the sweep needs it; else no argument."""
    content = _content(folder, str(folder))
    code = digest_of_code(folder / CODE, str(folder))
    if content is not None and _entered(code, content):
        return []
    return [f"trust={_digest_of_sweep(code, content)[:DIGITS]}"]


def _digest_of_sweep(code: str, content: Mapping[str, Any] | None) -> str:
    """Return the SHA-256 of what resuming uses: not a search's list of jobs, which grows."""
    aside = ("id", "jobs") if content and content.get("kind") == "search" else ("id",)
    followed = {key: its for key, its in _kept(content or {}).items() if key not in aside}
    return hashlib.sha256(_bytes([code, followed])).hexdigest()


def _content(folder: Path, named: str) -> dict[str, Any] | None:
    """Return the content of sweep.json, or None if there is none. Raises UserError."""
    try:
        content = read_json(folder / SWEEP)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{named}: {folder / SWEEP} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{named}: {folder / SWEEP} is not a sweep's: a mapping is expected.")
    return content


def digest_of_code(code: Path, named: str) -> str:
    """Return the SHA-256 of the names and bytes of all files, except Python's caches.

    Raises UserError for links and special files.
    """
    digest = hashlib.sha256()

    def look(folder: Path) -> None:
        for item in sorted(os.scandir(folder), key=lambda item: os.fsencode(item.name)):
            name = os.fsencode(os.path.relpath(item.path, code))
            if item.is_dir(follow_symlinks=False):
                if item.name != "__pycache__":
                    digest.update(b"folder\0" + name + b"\0")
                    look(Path(item.path))
            elif item.is_file(follow_symlinks=False):
                content = Path(item.path).read_bytes()
                digest.update(b"file\0%s\0%d\0" % (name, len(content)) + content)
            else:
                shown = os.path.relpath(item.path, code.parent)
                raise UserError(
                    f"{named}: {shown} is a link or a special file, which a frozen copy never "
                    "holds. It is not run."
                )

    try:
        look(code)
    except OSError as error:
        raise UserError(f"{named}: its code cannot be read: {error}") from None
    return digest.hexdigest()


def remove_caches(code: Path) -> None:
    """Remove Python's caches from a copy: the seal does not cover them, but Python runs them."""
    for root, folders, _ in os.walk(code):
        if "__pycache__" in folders:
            folders.remove("__pycache__")
            shutil.rmtree(Path(root, "__pycache__"))


def _mapping(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}
