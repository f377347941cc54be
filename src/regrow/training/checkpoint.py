"""Checkpoints: folders that are complete or absent, verified when read, rotated when written.

A checkpoint is written under a temporary name, its files are synced, a manifest with the size and
SHA-256 of each is written last, and the folder is renamed. So at every instant at least one
complete checkpoint exists once the first was written. `torch.load` accepts a flipped bit without a
word; the manifest does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.training import sharding
from regrow.training.options import CheckpointOptions

if TYPE_CHECKING:
    from regrow.training.sharded_checkpoint import Writers

log = logging.getLogger(__name__)

Parts = dict[str, dict[str, Any]]
Shards = dict[str, tuple[Tensor, Any]]  # this process's part of a sharded tensor, and the tensor
T = TypeVar("T")
MANIFEST = "manifest.json"
SHARDS = "shards"  # the folder of sharded tensors, in a checkpoint
PAGE_BYTES = 4096  # the smallest that kernels give
SMALL_BYTES = 1 << 20  # of weights: below it the first copy touches its memory itself
SERIAL_ELEMENTS = 1 << 14  # for more, a second thread would start a team of threads of its own
FORMAT = 1  # of the folder; a reader refuses one that is newer than itself


class DamagedCheckpoint(Exception):
    """Says in one line what is wrong with which file."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint's manifest says beside its files."""

    step: int
    epoch: int
    value: float | None  # the monitored value, if this step was evaluated
    milestone: bool
    metrics_bytes: int  # how much of metrics.jsonl belongs to this step


class CheckpointWriter:
    """Saves beside the loop: the loop waits for a copy of the state, never for the disk.

    One copy of the state is kept in memory and used again. There is never more than one write under
    way; one that failed is reported at the next step, and the older checkpoints stay.
    """

    def __init__(
        self,
        folder: Path,
        options: CheckpointOptions,
        mode: str | None,  # max or min: which values are the best; None: the newest is the best
        written: Callable[[int], None] = lambda step: None,
        *,
        is_main: bool = True,
        writers: Writers | None = None,
    ) -> None:
        self.folder, self.options, self.mode = folder, options, mode
        self.written = written  # is told the step of each checkpoint that is complete
        self.writes = is_main or writers is not None
        self.writers = writers  # all processes, each its part, where the model is sharded
        self.saved: tuple[int, bool] | None = None  # step, and whether it was evaluated
        self._copies: dict[str, Tensor] = {}
        self._room_is_settled = False
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        if is_main:
            folder.mkdir(exist_ok=True)
            _clear_up(folder)

    def make_room(self, parts: Callable[[], Parts]) -> None:
        """Make, once, the memory that `parts()` will be copied into; only that call is waited for.

        The kernel gives memory at the first touch, and takes far longer for it than a copy does.
        For a small state that is less than what a thread costs.
        """
        if self._room_is_settled or not self.writes:
            return
        self._room_is_settled = True
        outline = parts()
        weights = [value for value in outline["model"].values() if isinstance(value, Tensor)]
        if sum(weight.nbytes for weight in weights) < SMALL_BYTES:
            return

        def touch() -> None:
            with contextlib.suppress(RuntimeError):  # too little of it: save will say so
                for _, target in self._laid_out(outline)[2]:
                    pages = target.flatten()[:: PAGE_BYTES // target.element_size()]
                    for some in torch.split(pages, SERIAL_ELEMENTS):
                        some.zero_()

        self._thread = threading.Thread(target=touch, name="room for a checkpoint")
        self._thread.start()

    def save(self, parts: Parts, facts: Facts, sync: Callable[[int], None]) -> None:
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

    def poll(self) -> None:
        """Report a write that has failed meanwhile. Waits for nothing.

        Where several write, each would hear of it after another step: they wait for `wait`.
        """
        if self._failure is not None and self.writers is None:
            self.wait()

    def newest_until(self, step: int) -> str | None:
        """The name of the newest complete checkpoint that is not of a later step."""
        self.wait()
        names = [
            path.name for path, facts in complete(self.folder).items() if facts["step"] <= step
        ]
        return names[-1] if names else None

    def wait(self) -> bool:
        """Wait for the write under way. Returns whether it went well; says so when it did not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is None:
            return True
        log.warning(
            "checkpoint not saved: %s. The run goes on; the checkpoints before it are untouched.",
            str(self._failure) or type(self._failure).__name__,
        )
        self._failure = self.saved = None  # so that this very step may be tried again
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
        """`parts` with the kept memory in place of its tensors; and which goes where."""
        pairs: list[tuple[Tensor, Tensor]] = []
        shards: Shards = {}

        def copied(value: Any, path: str) -> Any:
            if sharding.is_sharded(value):
                shards[path] = (copied(sharding.local([value])[0], path), value)
                return torch.empty(value.shape, dtype=value.dtype, device="meta")
            if isinstance(value, Tensor):
                copy = self._copies.get(path)
                if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
                    copy = torch.empty(
                        value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda"
                    )
                    self._copies[path] = copy
                pairs.append((value.detach(), copy))
                return copy
            if isinstance(value, Mapping):
                return {key: copied(item, f"{path}/{key}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(item, f"{path}/{i}") for i, item in enumerate(value))
            return value

        return {name: copied(part, name) for name, part in parts.items()}, shards, pairs

    def _write(
        self, parts: Parts, shards: Shards, facts: Facts, sync: Callable[[int], None]
    ) -> None:
        def finish() -> None:
            rotate(self.folder, self.options, self.mode, written=facts.step)
            self.written(facts.step)

        on_main = alone if self.writers is None else self.writers.on_main
        try:
            on_main(lambda: sync(facts.metrics_bytes))
            write(self.folder, parts, facts, shards, self.writers)
            on_main(finish)
        except Exception as error:  # whatever it is, a thread's end would hide it
            self._failure = error


def alone(work: Callable[[], T]) -> T | None:
    return work()


def write(
    folder: Path,
    parts: Parts,
    facts: Facts,
    shards: Shards | None = None,
    writers: Writers | None = None,
) -> Path:
    """One checkpoint, `folder/step_<8 digits>`, whole or not at all. Raises OSError.

    With `writers` all of them write their `shards`, and the main one all else.
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
    """A file for each part; the size and SHA-256 of each. Raises OSError."""
    files = {}
    for name, part in parts.items():
        try:
            with (folder / f"{name}.pt").open("wb") as file:
                hashed = _HashingFile(file)
                torch.save(part, cast(BinaryIO, hashed))
                _sync(file)
        except RuntimeError as error:  # torch's zip writer wraps a failed write
            raise OSError(str(error).splitlines()[0]) from error
        files[f"{name}.pt"] = {"bytes": hashed.size, "sha256": hashed.sha256.hexdigest()}
    return files


def put_in_place(temporary: Path, target: Path) -> None:
    """Give a checkpoint that is whole its name."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():  # of this run before it went back to an older one
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    temporary.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, options: CheckpointOptions, mode: str | None, *, written: int) -> None:
    """Delete what is neither newest, nor best, nor a milestone, nor just written.

    `last` and `best` are made to name theirs first. Incomplete folders do not count, and nothing
    but checkpoints of this folder is touched.
    """
    manifests = complete(folder)
    newest_first = sorted(manifests, reverse=True)
    sign = 1 if mode == "max" else -1
    ranked = sorted(
        (path for path, facts in manifests.items() if _is_number(facts["value"])),
        key=lambda path: (sign * manifests[path]["value"], manifests[path]["step"]),
        reverse=True,  # of equal ones the latest, as the loop has it
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
            path.rename(old)  # from here on it is incomplete for every reader
            shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints whose manifest can be read, and that, oldest first. Their files are not
    looked at."""
    found = {}
    for path in sorted(folder.glob("step_????????")):
        with contextlib.suppress(DamagedCheckpoint):
            found[path] = read_manifest(path)
    return found


def named(folder: Path, name: str) -> Path:
    """The checkpoint that `last`, `best` or its own name stands for; it may not be there."""
    path = folder / name
    return folder / path.read_text(encoding="utf-8").strip() if path.is_file() else path.resolve()


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises DamagedCheckpoint, and UserError where it is too new."""
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
            f"{path} has format {content['format']}, and this code reads up to {FORMAT}. Go on "
            "with the version that wrote it."
        )
    return content


def verify(path: Path) -> dict[str, Any]:
    """The manifest, once every file agrees with it. Raises DamagedCheckpoint."""
    content = read_manifest(path)
    for name, expected in content["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{path.name}/{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise DamagedCheckpoint(
                f"{path.name}/{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            )
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected["sha256"]:
                raise DamagedCheckpoint(f"{path.name}/{name} does not match its SHA-256")
    return content


def load(path: Path) -> tuple[Parts, dict[str, Any]]:
    """A verified checkpoint: its parts on the CPU, and its manifest. Raises DamagedCheckpoint."""
    parts, content = read(path)
    return fill(parts, path), content


def read(path: Path) -> tuple[Parts, dict[str, Any]]:
    """As `load`, with sharded tensors left empty, on the meta device: see `fill`."""
    content = verify(path)
    names = [name for name in content["files"] if "/" not in name]
    return {Path(name).stem: _read(path / name) for name in names}, content


def fill(parts: Parts, path: Path, mesh: Any = None) -> Parts:
    """The parts with the tensors that were left empty: whole, or sharded over a mesh's processes,
    which all processes must then call. Raises DamagedCheckpoint.
    """
    empty: dict[str, Tensor] = {}
    content: dict[str, Any] = {}

    def look(value: Any, name: str) -> None:
        if isinstance(value, Tensor) and value.is_meta:
            empty[name] = value
        for key, item in _items(value):
            look(item, f"{name}/{key}")

    def filled(value: Any, name: str) -> Any:
        if name in content:
            return content[name]
        if isinstance(value, dict):
            return {key: filled(item, f"{name}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(filled(item, f"{name}/{i}") for i, item in enumerate(value))
        return value

    for name, part in parts.items():
        look(part, name)
    if not empty:
        return parts
    from regrow.training import sharded_checkpoint  # a second of imports

    try:
        content |= sharded_checkpoint.read(path / SHARDS, empty, mesh)
    except sharded_checkpoint.ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DamagedCheckpoint(f"{path.name}/{SHARDS} cannot be read: {reason}") from None
    return {name: filled(part, name) for name, part in parts.items()}


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()


def outline(folder: Path) -> Parts | None:
    """What the newest checkpoint that can be read holds: its parts, all empty but the model, whose
    tensors are without content. None where there is none."""
    for path in reversed(complete(folder)):
        with contextlib.suppress(DamagedCheckpoint):
            files = read_manifest(path)["files"]
            names = [Path(name).stem for name in files if "/" not in name]
            return {name: {} for name in names} | {"model": _read(path / "model.pt", "meta")}
    return None


def _read(file: Path, device: str = "cpu") -> dict[str, Any]:
    name = f"{file.parent.name}/{file.name}"
    try:
        part: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:
        # torch's own words tell how to open it all the same, which would run what is in there.
        raise DamagedCheckpoint(
            f"{name} holds more than tensors and plain values, and is not opened"
        ) from None
    except Exception as error:  # the readers of zip and pickle raise a dozen different kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DamagedCheckpoint(f"{name} cannot be read: {reason}") from None
    if not isinstance(part, dict):
        raise DamagedCheckpoint(f"{name} holds a {type(part).__name__} instead of a dict")
    return part


def load_newest(
    folder: Path, load: Callable[[Path], tuple[Parts, dict[str, Any]]] = load
) -> tuple[Parts, dict[str, Any]] | None:
    """The newest checkpoint that verifies, by `load` or `read`; None where none was ever written.

    Says which it skipped and why, and renames those out of the way (they are kept). Raises
    UserError when there are some and all are damaged: that is never taken for a fresh start.
    """
    reasons = []
    for path in sorted(folder.glob("step_????????"), reverse=True):
        try:
            loaded = load(path)
        except DamagedCheckpoint as damage:
            reasons.append(str(damage))
            continue
        for reason in reasons:
            log.warning("checkpoint skipped: %s. Going back to %s.", reason, path.name)
        for newer in folder.glob("step_????????"):
            if newer.name > path.name:
                _set_aside(newer)
        return loaded
    if reasons:
        raise UserError(
            f"{folder}: every checkpoint is damaged ({'; '.join(reasons)}). All stay as they are. "
            "Restore one from a copy, or start anew in another folder."
        )
    return None


def _set_aside(path: Path) -> None:
    for number in range(1000):
        aside = path.with_name(f"damaged_{path.name}" + (f"_{number}" if number else ""))
        if not aside.exists():
            path.rename(aside)
            return


def _clear_up(folder: Path) -> None:
    """Remove what a killed process left half-done; put back what it had half replaced."""
    for old in folder.glob(".old-step_????????"):
        target = folder / old.name.removeprefix(".old-")
        if not target.exists():
            with contextlib.suppress(DamagedCheckpoint):
                verify(old)  # its files too: a rotation may have deleted some of them
                old.rename(target)
    leftovers = [*folder.glob(".tmp-step_????????"), *folder.glob(".old-step_????????")]
    for leftover in (*leftovers, *folder.glob(".tmp-last"), *folder.glob(".tmp-best")):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Memory, not cores, limits a copy; and where cores are shared, each of hundreds of tensors
    would wait for the slowest thread: ten times as long was measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _HashingFile:
    """A binary file that knows the size and SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_number(value: float | None) -> bool:
    return value is not None and value == value


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, target: Path) -> None:
    """Let the symbolic link name `target`, in one step; see `named`."""
    temporary = link.with_name(f".tmp-{link.name}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target.name)
    except OSError:  # a file system without links: a file that holds the name
        temporary.write_text(target.name, encoding="utf-8")
    temporary.replace(link)
