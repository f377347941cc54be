"""Checkpoints: folders that are complete or absent, verified when read, rotated when written.

A checkpoint is written under a temporary name and its files are synced; a manifest with the size
and SHA-256 of each file is written last, and the folder is renamed. So once the first checkpoint is
written, at least one complete checkpoint exists at any time. `torch.load` silently accepts a
flipped bit; the manifest check does not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import torch
from torch import Tensor

from regrow.distributed import sharding
from regrow.errors import UserError, brief
from regrow.phases import phased

if TYPE_CHECKING:
    from regrow.checkpoint.sharded import Writers

log = logging.getLogger(__name__)

Parts = dict[str, dict[str, Any]]
Shards = dict[str, tuple[Tensor, Any]]  # this process's part of a sharded tensor, and the tensor
T = TypeVar("T")
MANIFEST = "manifest.json"
SHARDS = "shards"  # a checkpoint's folder of sharded tensors
PAGE_BYTES = 4096  # the smallest page size of kernels
SMALL_BYTES = 1 << 20  # of weights: for less, make_room does not start a thread
SERIAL_ELEMENTS = 1 << 14  # above this, a second thread would start its own team of threads
# The errors of a block that the disk cannot read, or that fails a checksum of the file system.
UNREADABLE = {getattr(errno, name, errno.EIO) for name in ("EIO", "EBADMSG", "EUCLEAN")}
FORMAT = 1  # of the folder; readers refuse newer formats


class DamagedCheckpoint(Exception):
    """Raised for a damaged checkpoint; the message names the file and the fault in one line."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    save_every_epochs: int | None
    save_every_steps: int | None
    keep_last: int
    keep_best: int
    milestones_every_epochs: int | None
    background: bool


@dataclass(frozen=True)
class CheckpointFacts:
    """The facts in a checkpoint's manifest, besides its files."""

    step: int
    epoch: int
    value: float | None  # the monitored value, if this step was evaluated
    milestone: bool
    metrics_bytes: int  # size of metrics.jsonl at this step


class CheckpointWriter:
    """Saves in the background: the loop waits for a copy of the state, never for the disk.

    The memory of the copy is kept and reused. At most one write runs at a time; a failed write is
    reported at the next step, and older checkpoints stay.
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        mode: str | None,  # max or min of the values is best; None: the newest is best
        written: Callable[[int], None] = lambda step: None,
        *,
        is_main: bool = True,
        writers: Writers | None = None,
    ) -> None:
        self.folder, self.options, self.mode = folder, options, mode
        self.written = written  # called with the step of each complete checkpoint
        self.writes = is_main or writers is not None
        self.writers = writers  # every process writes its part of a sharded model
        self.saved: tuple[int, bool] | None = None  # (step, True if it was evaluated)
        self._copies: dict[str, Tensor] = {}
        self._room_is_settled = False
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        if is_main:
            folder.mkdir(exist_ok=True)
            _clear_up(folder)

    @phased("checkpoint")
    def make_room(self, parts: Callable[[], Parts]) -> None:
        """Allocate, once, the memory that `parts()` will be copied to, in the background.

        The kernel provides memory at the first touch, which takes far longer than a copy. For a
        small state that costs less than a thread. Only the call of `parts` blocks.
        """
        if self._room_is_settled or not self.writes:
            return
        self._room_is_settled = True
        outline = parts()
        models = [content for part, content in outline.items() if is_model(part)]
        weights = [v for model in models for v in model.values() if isinstance(v, Tensor)]
        if sum(weight.nbytes for weight in weights) < SMALL_BYTES:
            return

        def touch() -> None:
            with contextlib.suppress(RuntimeError):  # out of memory: save reports it
                for _, target in self._laid_out(outline)[2]:
                    pages = target.flatten()[:: PAGE_BYTES // target.element_size()]
                    for some in torch.split(pages, SERIAL_ELEMENTS):
                        some.zero_()

        self._thread = threading.Thread(target=touch, name="room for a checkpoint")
        self._thread.start()

    @phased("checkpoint")
    def save(self, parts: Parts, facts: CheckpointFacts, sync: Callable[[int], None]) -> None:
        """Copy `parts` and write them in the background.

        `sync` makes the metrics durable up to `facts.metrics_bytes`, or raises OSError: a
        checkpoint is never ahead of its record.
        """
        self.wait()
        self._room_is_settled = True
        snapshot, shards = self._copy(parts)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, shards, facts, sync), name="checkpoint"
        )
        self._thread.start()
        if not self.options.background:
            self.wait()

    @phased("checkpoint")
    def poll(self) -> None:
        """Report a write that has failed, without waiting.

        If several processes write, each would notice after another step, so they report in `wait`.
        """
        if self._failure is not None and self.writers is None:
            self.wait()

    def newest_until(self, step: int) -> str | None:
        """Return the name of the newest complete checkpoint up to and including `step`, if any."""
        self.wait()
        found = complete(self.folder).items()
        names = [path.name for path, facts in found if facts["step"] <= step]
        return names[-1] if names else None

    @phased("checkpoint")
    def wait(self) -> bool:
        """Wait for the current write. Returns True if it succeeded, else logs a warning."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is None:
            return True
        log.warning(
            "checkpoint not saved: %s. The run continues; earlier checkpoints are untouched.",
            str(self._failure) or type(self._failure).__name__,
        )
        self._failure = self.saved = None  # so that this step can be saved again
        return False

    def _copy(self, parts: Parts) -> tuple[Parts, Shards]:
        snapshot, shards, pairs = self._laid_out(parts)
        with torch.no_grad(), _one_thread():
            for source, target in pairs:
                target.copy_(source, non_blocking=source.is_cuda)
        if any(source.device.type == "cuda" for source, _ in pairs):
            torch.cuda.synchronize()
        return snapshot, shards

    def _laid_out(self, parts: Parts) -> tuple[Parts, Shards, list[tuple[Tensor, Tensor]]]:
        """Return `parts` with tensors replaced by kept memory, its shards, and pairs to copy."""
        pairs: list[tuple[Tensor, Tensor]] = []
        shards: Shards = {}

        def keep(path: str, tensor: Tensor) -> Tensor:
            own = sharding.local([tensor])[0]
            copy = self._memory(path, own)
            pairs.append((own.detach(), copy))
            if own is tensor:
                return copy
            shards[path] = copy, tensor
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

        return {name: _mapped(part, name, keep) for name, part in parts.items()}, shards, pairs

    def _memory(self, path: str, tensor: Tensor) -> Tensor:
        """Return the memory on the CPU that is kept for the tensor at `path`."""
        kept = self._copies.get(path)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            is_cuda = tensor.device.type == "cuda"
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
            self._copies[path] = kept
        return kept

    def _write(
        self, parts: Parts, shards: Shards, facts: CheckpointFacts, sync: Callable[[int], None]
    ) -> None:
        def finish() -> None:
            rotate(self.folder, self.options, self.mode, written=facts.step)
            self.written(facts.step)

        on_main = alone if self.writers is None else self.writers.on_main
        try:
            on_main(lambda: sync(facts.metrics_bytes))
            write(self.folder, parts, facts, shards, self.writers)
            on_main(finish)
        except Exception as error:  # the thread would swallow any exception
            self._failure = error


def alone(work: Callable[[], T]) -> T | None:
    return work()


def write(
    folder: Path,
    parts: Parts,
    facts: CheckpointFacts,
    shards: Shards | None = None,
    writers: Writers | None = None,
) -> Path:
    """Write one checkpoint, `folder/step_<8 digits>`, completely or not at all. Raises OSError.

    With `writers`, each of them writes its `shards` and the main one everything else.
    """
    target = folder / f"step_{facts.step:08d}"
    temporary = folder / f".tmp-{target.name}"
    on_main = alone if writers is None else writers.on_main

    def begin() -> dict[str, Any]:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return write_parts(temporary, parts)

    def end() -> None:
        content = {"format": FORMAT, **vars(facts), "files": files}
        with (temporary / MANIFEST).open("wb") as file:
            file.write(json.dumps({**content, "sha256": _digest(content)}, indent=1).encode())
            _sync(file)
        for each in (temporary, temporary / SHARDS):
            if each.is_dir():
                _sync_folder(each)
        put_in_place(temporary, target)

    try:
        files = on_main(begin) or {}
        if writers is not None and shards:
            files |= writers.write(temporary / SHARDS, shards)
        on_main(end)
    except OSError:
        on_main(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise
    return target


def write_parts(folder: Path, parts: Parts) -> dict[str, Any]:
    """Write a file for each part. Returns the size and SHA-256 of each. Raises OSError."""
    files = {}
    for name, part in parts.items():
        try:
            with (folder / f"{name}.pt").open("wb") as file:
                hashed = _HashingFile(file)
                torch.save(part, cast(BinaryIO, hashed))
                _sync(file)
        except RuntimeError as error:  # torch's zip writer hides why a write failed
            raise hashed.failure or OSError(str(error).splitlines()[0]) from error
        files[f"{name}.pt"] = {"bytes": hashed.size, "sha256": hashed.sha256.hexdigest()}
    return files


def put_in_place(temporary: Path, target: Path) -> None:
    """Rename a complete checkpoint to its final name."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():  # from before this run went back to an older checkpoint
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, options: CheckpointOptions, mode: str | None, *, written: int) -> None:
    """Delete all checkpoints except the newest, the best, milestones and the one just written.

    First updates `last` and `best`. Ignores incomplete folders and anything that is not a
    checkpoint of this folder.
    """
    manifests = complete(folder)
    newest_first = [*reversed(manifests)]
    sign = 1 if mode == "max" else -1
    values = {path: facts["value"] for path, facts in manifests.items()}
    ranked = sorted(
        (path for path, value in values.items() if value is not None and not math.isnan(value)),
        key=lambda path: (sign * values[path], manifests[path]["step"]),
        reverse=True,  # ties go to the latest, as in the loop
    )
    kept = {
        *newest_first[: max(1, options.keep_last)],
        *ranked[: max(1, options.keep_best)],
        *(path for path, facts in manifests.items() if facts["milestone"]),
        folder / f"step_{written:08d}",
    }
    _point(folder / "last", newest_first[0])
    if mode is None or ranked:
        _point(folder / "best", newest_first[0] if mode is None else ranked[0])
    for path in newest_first:
        if path not in kept:
            old = folder / f".old-{path.name}"
            path.rename(old)  # readers now ignore it
            shutil.rmtree(old, ignore_errors=True)


def folders_in(folder: Path, prefix: str = "") -> list[Path]:
    """Return the checkpoints' folders, oldest first.

    Names have nine digits from step 100,000,000 on, so they do not sort as text.
    """
    name = re.compile(rf"{re.escape(prefix)}step_([0-9]{{8}}|[1-9][0-9]{{8,}})")
    found = [path for path in folder.glob(f"{prefix}step_*") if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def complete(folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the checkpoints with a readable manifest, and the manifests, oldest first.

    Does not check their other files.
    """
    found = {}
    for path in folders_in(folder):
        with contextlib.suppress(DamagedCheckpoint):
            found[path] = read_manifest(path)
    return found


def named(folder: Path, name: str) -> Path:
    """Return the path of a checkpoint by name: `last`, `best` or its own. It may not exist."""
    path = folder / name
    return folder / path.read_text(encoding="utf-8").strip() if path.is_file() else path.resolve()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises DamagedCheckpoint, or UserError if its format is too new.
    """
    try:
        content: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("sha256")
        _ = content["step"], content["files"]
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST} cannot be read: {error}") from None
    if digest != _digest(content):
        raise DamagedCheckpoint(f"{path.name}/{MANIFEST} does not match its own SHA-256")
    if content["format"] > FORMAT:
        raise UserError(
            f"{path} has format {content['format']}, and this code reads up to {FORMAT}. Use "
            "the version that wrote it."
        )
    return content


def verify(path: Path) -> dict[str, Any]:
    """Return the manifest after checking every file against it. Raises DamagedCheckpoint."""
    content = read_manifest(path)
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{path.name}/{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{path.name}/{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            )
        try:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            if error.errno not in UNREADABLE:  # such as a missing permission
                raise
            raise DamagedCheckpoint(
                f"{path.name}/{name} cannot be read: {error.strerror}"
            ) from None
        if found != expected["sha256"]:
            raise DamagedCheckpoint(f"{path.name}/{name} does not match its SHA-256")
    return content


def load(path: Path) -> tuple[Parts, dict[str, Any]]:
    """Return a verified checkpoint's parts, on the CPU, and its manifest.

    Raises DamagedCheckpoint.
    """
    parts, content = read(path)
    return fill(parts, path), content


def read(path: Path) -> tuple[Parts, dict[str, Any]]:
    """Same as `load`, but sharded tensors stay empty, on the meta device: see `fill`."""
    content = verify(path)
    names = [name for name in content["files"] if "/" not in name]
    return {Path(name).stem: _read(path / name) for name in names}, content


def fill(parts: Parts, path: Path, mesh: Any = None) -> Parts:
    """Return the parts with the empty tensors filled.

    Without a `mesh` they are full tensors. With one they are sharded over its processes, all of
    which must call this together. Raises DamagedCheckpoint.
    """
    empty: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> None:
        if tensor.is_meta:
            empty[name] = tensor

    for name, part in parts.items():
        _mapped(part, name, note)
    if not empty:
        return parts
    from regrow.checkpoint import sharded  # importing takes a second

    try:
        content = sharded.read(path / SHARDS, empty, mesh)
    except sharded.ERRORS as error:
        reason = brief(error, 300)
        raise DamagedCheckpoint(f"{path.name}/{SHARDS} cannot be read: {reason}") from None
    return {name: _mapped(part, name, content.get) for name, part in parts.items()}


# Inside its callers, it would be part of a cycle, and keep the tensors, some on the device, until
# garbage is collected.
def _mapped(value: Any, path: str, change: Callable[[str, Tensor], Any]) -> Any:
    """Return a value with `change(path, tensor)` in place of each tensor in it."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, f"{path}/{key}", change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = enumerate(value)
        return type(value)(_mapped(item, f"{path}/{i}", change) for i, item in items)
    return value


def outline(folder: Path) -> Parts | None:
    """Return the parts of the newest readable checkpoint without their content, or None.

    All parts are empty but models and optimizers, whose tensors are on the meta device.
    """
    for path, facts in reversed(complete(folder).items()):
        with contextlib.suppress(DamagedCheckpoint):
            names = [Path(name).stem for name in facts["files"] if "/" not in name]
            read = [name for name in names if name.partition(".")[0] in ("model", "optimizer")]
            return {
                name: _read(path / f"{name}.pt", "meta") if name in read else {} for name in names
            }
    return None


def is_model(part: str) -> bool:
    """Return True for the part of the model, or of one of several: model.<name>."""
    return part == "model" or part.startswith("model.")


def evaluated_part(parts: Collection[str], name: str) -> str:
    """Return the part with a model's evaluated weights: the average, if it is saved.

    `name` is that of one of several models, or "" for a single one.
    """
    average, model = (f"{kind}.{name}" if name else kind for kind in ("averaged", "model"))
    return average if average in parts else model


def evaluated_weights(parts: Parts) -> dict[str, Any]:
    """Return the evaluated weights by name; those of several models as <model>.<name>."""
    names = [part.removeprefix("model").removeprefix(".") for part in parts if is_model(part)]
    return {
        f"{name}.{key}".lstrip("."): value
        for name in names
        for key, value in parts[evaluated_part(parts, name)].items()
    }


def _read(file: Path, device: str = "cpu") -> dict[str, Any]:
    name = f"{file.parent.name}/{file.name}"
    try:
        part: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # torch's message explains how to open the file anyway, which would run the code in it.
        raise DamagedCheckpoint(
            f"{name} holds more than tensors and plain values, and is not opened"
        ) from None
    except Exception as error:  # zip and pickle readers raise a dozen different errors
        reason = brief(error, 200)
        raise DamagedCheckpoint(f"{name} cannot be read: {reason}") from None
    if not isinstance(part, dict):
        raise DamagedCheckpoint(f"{name} holds a {type(part).__name__} instead of a dict")
    return part


def load_newest(
    folder: Path, load: Callable[[Path], tuple[Parts, dict[str, Any]]] = load
) -> tuple[Parts, dict[str, Any]] | None:
    """Return the newest checkpoint that `load` (or `read`) verifies; None if there never was one.

    Warns about each damaged one that it skipped, and renames it. Raises UserError if checkpoints
    exist and all are damaged: that must not look like a fresh start.
    """
    reasons = []
    there = folders_in(folder)
    for place, path in reversed([*enumerate(there)]):
        try:
            loaded = load(path)
        except DamagedCheckpoint as damage:
            reasons.append(str(damage))
            continue
        for reason in reasons:
            log.warning("checkpoint skipped: %s. Going back to %s.", reason, path.name)
        for newer in there[place + 1 :]:
            _set_aside(newer)
        return loaded
    if reasons:
        raise UserError(
            f"{folder}: every checkpoint is damaged ({'; '.join(reasons)}). All stay as they are. "
            "Restore one from a copy, or start a new run in another folder."
        )
    return None


def _set_aside(path: Path) -> None:
    for number in range(1000):
        aside = path.with_name(f"damaged_{path.name}" + (f"_{number}" if number else ""))
        if not aside.exists():
            path.rename(aside)
            return


def _clear_up(folder: Path) -> None:
    """Remove a killed process's leftovers, and restore a checkpoint that it had half replaced."""
    for old in folders_in(folder, ".old-"):
        target = folder / old.name.removeprefix(".old-")
        if not target.exists():
            with contextlib.suppress(DamagedCheckpoint):
                verify(old)  # including its files: a rotation may have deleted some
                old.rename(target)
    leftovers = [*folders_in(folder, ".tmp-"), *folders_in(folder, ".old-")]
    for leftover in (*leftovers, *folder.glob(".tmp-last"), *folder.glob(".tmp-best")):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: memory, not cores, limits a copy.

    On shared cores each of hundreds of tensors would wait for the slowest thread: ten times as long
    was measured.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _HashingFile:
    """A binary file that tracks the size and SHA-256 of its content."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # it syncs no folders, as SMB
            raise
    finally:
        os.close(descriptor)


def _point(link: Path, target: Path) -> None:
    """Point the symbolic link at `target`, atomically; see `named`."""
    temporary = link.with_name(f".tmp-{link.name}")
    if not link.is_symlink() and (link / MANIFEST).is_file():
        # A copy of the run was made that followed its links, as by `scp -r`.
        link.rename(temporary)
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:  # the file system has no links: write the name to a file
        temporary.write_text(target.name, encoding="utf-8")
    temporary.replace(link)
