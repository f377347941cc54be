"""Count the broken images of a data set once one is met, and say how to leave them out."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from regrow.config.command_line import quoted
from regrow.errors import DataError
from regrow.feeding.decoding import BrokenImage
from regrow.feeding.files import NUM_NAMES, shown
from regrow.feeding.images import ImageFiles
from regrow.feeding.masks import MaskFiles
from regrow.feeding.splits import GIVEN, Splits
from regrow.record.manifest import cores

SECONDS = 20.0  # for decoding the others: 300 photos of 12 megapixels on two cores
PASTED = 20  # files that a command names; the log names more
LOGGED = 1000

log = logging.getLogger("regrow.data")


class BrokenImages(DataError):
    """Images that cannot be read, of a source whose val or test `is_cut` from train.

    what: the message without a way out; `them` are the files. leave_out: the override that skips
    them; "" if too long.
    """

    def __init__(
        self, message: str, what: str = "", them: str = "", leave_out: str = "", is_cut: bool = True
    ) -> None:
        super().__init__(message)
        self.what, self.them, self.leave_out, self.is_cut = what, them, leave_out, is_cut


def counted(source: Splits, first: BrokenImage, seconds: float = SECONDS) -> DataError:
    """Return `first` with the number and names of all images of the source that cannot be read.

    Decodes the other files as the run does, for at most `seconds`. For a data set other than an
    image folder or a mask folder, returns `first` itself. A broken mask is left out by its image.
    """
    splits = [split for _, split in source.items() if isinstance(split, ImageFiles | MaskFiles)]
    files = {file: split for split in splits for file in split.files}
    with_masks = [split for split in splits if isinstance(split, MaskFiles)]
    image_of = {mask: image for split in with_masks for mask, image in split.image_of.items()}
    files |= {mask: split for split in with_masks for mask in split.masks}
    kind = "images and masks" if with_masks else "images"
    if first.file not in files:
        return first
    order = sorted(files, key=lambda file: (file != first.file, file))
    broken, looked_at = [first.file], 1
    for file, is_broken in _looked_at({file: files[file] for file in order[1:]}, seconds):
        looked_at += 1
        broken += [file] if is_broken else []
    several, rest = len(broken) > 1, len(files) - looked_at
    where = f"{len(files):,} {kind}" if not rest else (
        f"the {looked_at:,} {kind} looked at in {seconds:g} s, of {len(files):,}"
    )  # fmt: skip
    names = ", ".join(shown(file) for file in broken[:NUM_NAMES])
    more = ", …" if len(broken) > NUM_NAMES else ""
    told = f"{len(broken):,} of {where} cannot be read"
    told = f". {told}: {names}{more}" if several else f" (the only one of {where})"
    what, them = f"{first.what}{told}", "them" if several else "it"
    origins = source.origins.items()
    is_cut = any(how != GIVEN for name, how in origins if getattr(source, name) is not None)
    override = ""
    if len(broken) <= PASTED and all(map(str.isprintable, broken)):
        named = {image_of.get(file, file) for file in broken}
        override = leaving_out(source.reading.leave_out, named, files[first.file].root)
        way_out = f"leave {them} out: {shlex.quote(override)}"
    else:
        for file in broken[:LOGGED]:
            log.warning("not readable: %s", shown(file))
        way_out = "name their paths below data.root in data.source.leave_out. The log names them"
    message = f"{what}. Fix or remove {them}, or {way_out}"
    return BrokenImages(message, what, them, override, is_cut)


def leaving_out(before: Sequence[str], files: Iterable[str], root: str) -> str:
    """Return the override of `data.source.leave_out` that skips the files too."""
    names = [*before, *sorted(os.path.relpath(file, root) for file in files)]
    return f"data.source.leave_out=[{','.join(map(quoted, names))}]"


def _looked_at(
    splits: Mapping[str, ImageFiles | MaskFiles], seconds: float
) -> Iterator[tuple[str, bool]]:
    """Yield each file and True if its split cannot decode it, in their order, until time is up."""
    end = time.monotonic() + seconds

    def is_broken(file: str) -> bool | None:
        if time.monotonic() > end:
            return None
        try:
            splits[file].decoded(file)
        except BrokenImage:
            return True
        except DataError:  # unreadable, or removed meanwhile
            return Path(file).is_file()
        except OSError:  # a fault of the machine
            return False
        return False

    files, size = [*splits], 64 * cores()
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(files), size):
            some = files[start : start + size]
            for file, found in zip(some, pool.map(is_broken, some), strict=True):
                if found is None:
                    return
                yield file, found
