"""Files that a script writes where the user says: never half, and never over another unasked."""

from __future__ import annotations

import contextlib
import csv
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from regrow.errors import UserError

# A spreadsheet takes a cell that begins so for a formula: the last four are full-width signs.
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def harmless(text: str) -> str:
    """The text of a cell, with an apostrophe before it if a spreadsheet would compute it.

    Every table that anybody may open in a spreadsheet goes through here. A negative number stays
    one.
    """
    if not text.lstrip(" ").startswith(FORMULA_SIGNS):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def write_csv(rows: Iterable[Mapping[str, str]], target: Path, *, overwrite: bool) -> int:
    """Write rows, whole or not at all, and return their number.

    Text that a spreadsheet would take for a formula gets an apostrophe before it. Raises UserError
    where `target` exists, unless it may be overwritten.
    """
    count = 0
    # Names of files can be bytes that are no text.
    with _new_file(target, overwrite) as file:
        for row in rows:
            if count == 0:
                csv.writer(file).writerow([harmless(key) for key in row])
            csv.writer(file).writerow([harmless(value) for value in row.values()])
            count += 1
    return count


def write_text(text: str, target: Path, *, overwrite: bool) -> None:
    """Write a text file that the user named, whole or not at all. Raises UserError."""
    with _new_file(target, overwrite) as file:
        file.write(text)


def open_new(path: Path, mode: int = 0o666) -> int:
    """A descriptor of a new file. A link that somebody put there is removed, and not followed."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


@contextlib.contextmanager
def whole_file(
    path: Path,
    how: str = "wb",
    *,
    mode: int = 0o666,
    publish: Callable[[Path, Path], object] = Path.replace,
    **text: Any,
) -> Iterator[IO[Any]]:
    """A file that takes the name `path` once it is whole and synced; one that fails is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(open_new(temporary, mode), how, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _new_file(target: Path, overwrite: bool) -> Iterator[IO[str]]:
    """A file that takes the name `target` once it is whole. Raises UserError."""
    text: Mapping[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    publish = _over_a_file if overwrite else _where_nothing_is
    try:
        with whole_file(target, "w", publish=publish, **text) as file:
            yield file
    except OSError as error:
        raise UserError(f"output={target} cannot be written: {error.strerror or error}.") from None


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise UserError for an output that cannot be written, before any work is done.

    A file that exists needs `overwrite`. A folder, link, device or pipe is never replaced.
    """
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"output={target} cannot be written: {error.strerror or error}.") from None
    else:
        if stat.S_ISREG(mode) and not overwrite:
            raise UserError(
                f"output={target} exists already. Choose another name, or add overwrite=true."
            )
    if stat.S_ISLNK(mode):
        raise UserError(f"output={target} is a link. Name the file itself.")
    if stat.S_ISDIR(mode):
        raise UserError(f"output={target} is a folder. Name a file, such as {target / 'out.csv'}.")
    if not stat.S_ISREG(mode):
        raise UserError(f"output={target} is not a regular file. Choose another name.")
    if not target.parent.is_dir():
        raise UserError(f"output={target}: there is no folder {target.parent}. Make it first.")


def _over_a_file(temporary: Path, target: Path) -> None:
    refuse_existing(target, overwrite=True)  # it may have come to be there in the meantime
    temporary.replace(target)


def _where_nothing_is(temporary: Path, target: Path) -> None:
    refuse_existing(target, overwrite=False)  # likewise
    try:
        os.link(temporary, target)  # unlike a rename, this fails where there is a file by now
    except FileExistsError:
        refuse_existing(target, overwrite=False)
    except OSError:  # a file system without links
        refuse_existing(target, overwrite=False)
        temporary.replace(target)
    temporary.unlink(missing_ok=True)
