"""Write output files that the user names: atomically, overwriting a file only if asked."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

from regrow.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
_unfinished: set[Path] = set()  # the temporary files of `whole_file` in this process
# A spreadsheet evaluates a cell that begins with one of these. The last four are full-width.
FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def harmless(cell: T) -> T | str:
    """Return a cell, with an apostrophe before text that a spreadsheet would evaluate.

    Use it for every table that may be opened in a spreadsheet. A negative number is unchanged.
    """
    if not isinstance(cell, str) or not cell.lstrip(" ").startswith(FORMULA_SIGNS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


def write_csv(rows: Iterable[Mapping[str, str]], target: Path, *, overwrite: bool) -> int:
    """Write rows atomically and return their number. Cells pass through `harmless`.

    Raises UserError if `target` exists, unless `overwrite`.
    """
    count = 0
    with _new_file(target, overwrite) as file:
        # The file escapes what UTF-8 cannot encode: file names may be arbitrary bytes.
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        writer = csv.writer(text)
        for count, row in enumerate(rows, 1):
            if count == 1:
                writer.writerow(map(harmless, row))
            writer.writerow(map(harmless, row.values()))
        text.flush()
        text.detach()  # the file is closed by its owner
    return count


def write_text(text: str, target: Path, *, overwrite: bool) -> None:
    """Write a text file that the user named, atomically. Raises UserError."""
    write_bytes(text.encode("utf-8", "backslashreplace"), target, overwrite=overwrite)


def write_bytes(content: bytes, target: Path, *, overwrite: bool) -> None:
    """Write a file that the user named, atomically. Raises UserError."""
    with _new_file(target, overwrite) as file:
        file.write(content)


def write_images(images: Iterable[tuple[str, Image]], folder: Path, *, overwrite: bool) -> int:
    """Write each image as <name>.png below `folder`, and return their number.

    A new folder is complete or absent. In an existing one, files of the same names are replaced.
    The suffix of a name is replaced too, unless that name is taken. Raises UserError.
    """
    refuse_existing_folder(folder, overwrite)
    is_new = not folder.exists()
    place = folder.with_name(f".{folder.name}.{os.getpid()}.tmp") if is_new else folder
    taken: set[Path] = set()
    try:
        with _told(folder):
            for name, image in images:
                file = Path(name).with_suffix(".png")
                file = file if file not in taken else Path(f"{name}.png")
                taken.add(file)
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                with whole_file(place / file) as opened:
                    image.save(opened, "PNG")
            if is_new:
                place.rename(folder)
    finally:
        if is_new:
            shutil.rmtree(place, ignore_errors=True)
    return len(taken)


def open_new(path: Path, mode: int = 0o666) -> int:
    """Return a descriptor of a new file. Removes what is at `path`; never follows a link there."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


@contextlib.contextmanager
def whole_file(
    path: Path,
    *,
    mode: int = 0o666,
    publish: Callable[[Path, Path], object] | None = None,
) -> Iterator[IO[bytes]]:
    """Yield a file that is renamed to `path` once it is complete and synced, or else removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _unfinished.add(temporary)
    try:
        with open(open_new(temporary, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (publish or Path.replace)(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        _unfinished.discard(temporary)


def remove_unfinished() -> None:
    """Remove what `whole_file` is writing, where a signal ends the process at once."""
    for temporary in [*_unfinished]:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_file(target: Path, overwrite: bool) -> Iterator[IO[bytes]]:
    """Yield a file that is renamed to `target` once it is complete. Raises UserError."""
    publish = _over_a_file if overwrite else _where_nothing_is
    with _told(target), whole_file(target, publish=publish) as file:
        yield file


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    """Raise UserError, which names `target`, if it cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output={target} cannot be written: {error.strerror or error}.") from None


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Raise UserError for an output that cannot be written. Call it before doing the work.

    An existing file needs `overwrite`. A folder, link, device or pipe is never replaced.
    """
    try:
        mode = target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    except OSError as error:  # name too long, or folder not readable
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


def refuse_existing_folder(target: Path, overwrite: bool) -> None:
    """Raise UserError for a folder that cannot be written to. Call it before doing the work.

    One that holds something needs `overwrite`; nothing in it is removed.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UserError(f"output={target} is not a folder, and masks are written to one.")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(
            f"output={target} exists already. Choose another name, or add overwrite=true."
        )
    if not target.parent.is_dir():
        raise UserError(f"output={target}: there is no folder {target.parent}. Make it first.")


def _over_a_file(temporary: Path, target: Path) -> None:
    refuse_existing(target, overwrite=True)  # it may have appeared in the meantime
    temporary.replace(target)


def _where_nothing_is(temporary: Path, target: Path) -> None:
    refuse_existing(target, overwrite=False)  # likewise
    try:
        os.link(temporary, target)  # unlike a rename, fails if a file has appeared
    except FileExistsError:
        refuse_existing(target, overwrite=False)
    except OSError:  # a file system without links
        refuse_existing(target, overwrite=False)
        temporary.replace(target)
    temporary.unlink(missing_ok=True)
