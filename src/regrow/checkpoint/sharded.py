"""The sharded tensors of a checkpoint, with a file for each process's part.

torch.distributed.checkpoint writes and reads them, for any number of processes. In the checkpoint's
other files a tensor on the meta device marks each one's place. Reading executes nothing: the reader
accepts only the classes of an index, and tensors.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_sharded

T = TypeVar("T")
ERRORS = (Exception, CheckpointException)  # not a subclass of Exception


class Writers:
    """The processes that write a checkpoint together, in the background of their loops.

    They use their own process group, so that their messages do not mix with those of the loops.
    """

    def __init__(self, timeout: timedelta) -> None:
        group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self.group = group
        self.mesh = DeviceMesh.from_group(self.group, "cpu")  # the copies are on the CPU
        self.is_main = dist.get_rank() == 0

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on the main process. Raises OSError on all processes if it failed there."""
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as failure:
                error = str(failure) or type(failure).__name__
        said = [error]
        dist.broadcast_object_list(said, 0, group=self.group)
        if said[0] is not None:
            raise OSError(said[0])
        return result

    def write(self, folder: Path, tensors: Mapping[str, tuple[Tensor, Any]]) -> dict[str, Any]:
        """Write each process's parts. Returns the size and SHA-256 of every file, by name.

        `tensors` holds pairs of this process's part and the sharded tensor. Raises OSError on all
        processes if one failed.
        """
        sharded = {
            path: DTensor.from_local(
                part, self.mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
            )
            for path, (part, of) in tensors.items()
        }
        writer = FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=True)
        try:
            save(sharded, storage_writer=writer, process_group=self.group)
        except CheckpointException as error:  # holds each process's reason, on every process
            reasons = [str(reason[0]) for reason in error.failures.values()]
            raise OSError("; ".join(reasons)) from None
        rank = dist.get_rank()
        own = [*folder.glob(f"__{rank}_*.distcp"), *([folder / ".metadata"] if rank == 0 else [])]
        try:
            said: Any = {f.name: _facts(f) for f in own}
        except OSError as error:  # all must learn of it, or the others would wait
            said = str(error)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, said, group=self.group)
        for part in gathered:
            if isinstance(part, str):
                raise OSError(part)
        return {f"{folder.name}/{name}": facts for part in gathered for name, facts in part.items()}


def read(folder: Path, empty: Mapping[str, Tensor], mesh: Any = None) -> dict[str, Any]:
    """Return the content of the tensors in `empty`.

    Without a `mesh` they are full tensors on the CPU, read by this process alone. With one they are
    sharded over its processes, all of which must call this together.
    """
    targets: dict[str, Any] = {}
    for path, tensor in empty.items():
        if mesh is None:
            targets[path] = torch.empty(tensor.shape, dtype=tensor.dtype)
        else:
            targets[path] = empty_sharded(
                *tensor.shape, dtype=tensor.dtype, device_mesh=mesh, placements=[Shard(0)]
            )
    with warnings.catch_warnings(action="ignore"):  # warns that this process reads alone
        load(targets, storage_reader=_Reader(folder), no_dist=mesh is None)
    return targets


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):  # would be unpickled
                raise pickle.UnpicklingError(f"{name} is not a tensor")
        for stored in metadata.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise pickle.UnpicklingError(f"{stored.relative_path} is another folder's")
        return metadata


def _member(kind: Any, name: str) -> Any:
    """Return an enum's member: Python 3.11.0 to 3.11.3 pickle it as `getattr(kind, name)`."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError("builtins.getattr has no place in an index")
    return _MEM_FORMAT_ENCODING[name]


class _IndexUnpickler(pickle._Unpickler):
    """Unpickles descriptions of tensors and their locations; refuses any other class.

    The Python implementation is used because its `load_build` can be overridden to refuse changes
    to a class.
    """

    CLASSES: ClassVar = {
        "torch.distributed.checkpoint.metadata": {
            *("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"),
            *("ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(str(v).removeprefix("torch.") for v in vars(torch).values()
                            if isinstance(v, torch.dtype))},
        "pathlib": {"PosixPath"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in self.CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an index")
        return super().find_class(module, name)

    def load_build(self) -> None:
        if callable(self.stack[-2]):  # type: ignore[attr-defined]
            raise pickle.UnpicklingError("an index changes no class")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}  # type: ignore[dict-item]


def _facts(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
