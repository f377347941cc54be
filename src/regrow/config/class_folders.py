"""A folder of classes with images: which files count, and what it holds, in words.

Without torch, as a config is checked before torch is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from regrow.config.command_line import shell
from regrow.errors import UserError

# Folders that systems and archivers create. Some contain images, such as thumbnails.
OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SHOWN = 20  # folders
# Formats that Pillow registers but that are not read: they need another program, are only
# identified, or may contain a file of any format, including one that another program would run.
NOT_READ = {
    "EPS": "goes to Ghostscript, which runs it as a program",
    "WMF": "needs Windows",
    "BUFR": "is identified only",
    "GRIB": "is identified only",
    "HDF5": "is identified only",
    "MPEG": "is a video, identified only",
    "IPTC": "may contain any other format, EPS too",
    "FPX": "needs the package olefile",
    "MIC": "needs the package olefile",
}
# Formats that another format's decoder opens.
OPENED_AS = {"MPO": "JPEG"}


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in OF_SYSTEMS


@functools.cache
def formats_by_suffix() -> dict[str, str]:
    """Return the raster formats that Pillow decodes by itself, by lower-case suffix."""
    from PIL import Image

    found = Image.registered_extensions()
    return {
        suffix: name
        for suffix, name in sorted(found.items())
        if OPENED_AS.get(name, name) in Image.OPEN and name not in NOT_READ
    }


def suffixes_of(extensions: Sequence[str] | None) -> frozenset[str]:
    """Return the suffixes to read; None: all that Pillow decodes by itself. Raises UserError."""
    known = formats_by_suffix()
    if extensions is None:
        return frozenset(known)
    chosen = frozenset(f".{extension.lower().lstrip('.')}" for extension in extensions)
    if unknown := sorted(chosen - known.keys()):
        raise UserError(
            f"data.source.extensions: Pillow does not decode {unknown[0]} by itself. Convert these "
            f"files, or choose from {', '.join(sorted(known))}."
        )
    return chosen


def contents_in_words(
    root: Path, extensions: Sequence[str] | None, leave_out: Collection[str]
) -> str:
    """Return what `root`, or its folder train, holds, and the number of classes to type.

    Returns nothing if it has no folders. Raises OSError, and UserError for an unknown extension.
    """
    suffixes = suffixes_of(extensions)

    def folders(folder: Path) -> list[str]:
        names = sorted(each.name for each in folder.iterdir() if each.is_dir())
        return [it for it in names if not ("hidden" in leave_out and is_hidden(it))]

    def count(folder: Path) -> int:
        return count_images(folder, root, suffixes, leave_out)

    where = root / "train" if (root / "train").is_dir() else root
    names = folders(where)
    return f"{where} holds {classes_in_words(where, names, None, folders, count)}" if names else ""


def count_images(
    folder: Path, root: Path, suffixes: Collection[str], leave_out: Collection[str]
) -> int:
    """Return the number of files that `files.find_files` finds, without keeping their names.

    Paths in `leave_out` are below `root`. Passes over folders that cannot be read.
    """
    named = {root / os.path.normpath(it) for it in leave_out if it not in ("hidden", "empty")}

    def is_left_out(path: Path) -> bool:
        return path in named or ("hidden" in leave_out and is_hidden(path.name))

    found = 0
    for inside, below, names in os.walk(folder):
        below[:] = [name for name in below if not is_left_out(Path(inside, name))]
        files = [Path(inside, name) for name in names if Path(name).suffix.lower() in suffixes]
        files = [file for file in files if not is_left_out(file) and file.is_file()]
        found += sum("empty" not in leave_out or file.stat().st_size > 0 for file in files)
    return found


def classes_in_words(
    folder: Path,
    found: Sequence[str],
    num_classes: int | None,
    folders: Callable[[Path], list[str]],
    count: Callable[[Path], int],
) -> str:
    """Return the folders of classes with their images in words, and the likely correction.

    `num_classes` is the number that was given; None: it is missing. `folders` returns the names of
    the folders in a folder, and `count` the number of images below one.
    """
    if len(found) == 1:
        inside = folder / found[0]
        inner, of_classes = folders(inside), inside
        if "train" in inner:
            inner, of_classes = folders(inside / "train"), inside / "train"
        if len(inner) > 1:
            listed = ", ".join(f"{name} {count(of_classes / name)}" for name in inner[:SHOWN])
            number = [f"data.num_classes={len(inner)}"] * (len(inner) != num_classes)
            return (
                f"one folder, {found[0]}, with these folders and images in it: {listed}. If these "
                f"are the classes, set {shell([f'data.root={inside}', *number])}."
            )
    counts = {name: count(folder / name) for name in found[:SHOWN]}
    listed = ", ".join(f"{name} {number}" for name, number in counts.items())
    more = ", …" if len(found) > len(counts) else ""
    said = f"{len(found)} class folders (images): {listed}{more}."
    if empty := [name for name, number in counts.items() if number == 0]:
        *others, last = empty
        those = f"folders {', '.join(others)} and {last} hold" if others else f"folder {last} holds"
        said += f" The {those} no images"
        if len(found) - len(empty) == num_classes:
            return f"{said}: add some, or remove the folder{'s' * bool(others)}."
        if num_classes is None and len(found) - len(empty) > 1:
            images = f"images to {'them' if others else 'it'}"
            few = f"data.num_classes={len(found) - len(empty)}"
            return f"{said}: remove the folder{'s' * bool(others)} and set {few}, or add {images}."
        said += "."
    if len(found) == 1:
        said = said.replace("1 class folders", "one class folder")
        return f"{said} A classifier needs at least two: add a folder for each other class."
    if len(found) == num_classes:
        return f"{said} Set data.class_names to the names of these folders, in quotes."
    return f"{said} Set data.num_classes={len(found)}."
