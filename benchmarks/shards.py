"""Training examples per second from tar shards: shuffled by blocks, against the same decoder that
reads the same tars in file order with as many workers, which is how a stream of tars is read.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.measure import Table, in_turn
from regrow.config.targets import allow, instantiate
from regrow.feeding.loaders import Data
from regrow.feeding.preprocess import Normalizer
from regrow.feeding.shard_index import SourceFacts
from regrow.feeding.shard_items import File, as_item, decoded, members_in
from regrow.feeding.shards import ShardItems
from regrow.feeding.writing_shards import Layout, OfItems, write_shards

BATCH = 256
LAYOUT = Layout(shard_bytes=32_000_000, block_bytes=1_000_000, shuffle=True, seed=0)
ROUNDS = 9


class Photos:
    """Noisy JPEG files of 160×120 pixels, some 11 kB each, with a class."""

    size, count = [96, 96], 8_000

    def __init__(self) -> None:
        from PIL import Image

        random = np.random.default_rng(0)
        self.files = []
        for _ in range(64):
            rough = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            written = io.BytesIO()
            Image.fromarray(rough).resize((160, 120)).save(written, "JPEG", quality=90)
            self.files.append(File(written.getvalue(), "jpg"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.files[index % len(self.files)], index % 10


class Rows:
    """Arrays of 64 numbers with a class: small examples, of which reading is most of the work."""

    size, count = None, 100_000

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return torch.full((64,), float(index)), index % 10


class InFileOrder(IterableDataset[Any]):
    """The examples of the tars, one tar after the other; worker i of n takes every n-th tar."""

    def __init__(self, items: ShardItems, *, by_tarfile: bool) -> None:
        self.items, self.by_tarfile = items, by_tarfile

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        names = self.items.access.names[first::step]
        for name in names:
            path = Path(self.items.access.place.root, name)
            yield from self._by_tarfile(path) if self.by_tarfile else self._by_block(path, name)

    def _by_block(self, path: Path, name: str) -> Iterator[Any]:
        blocks = next(s for s in self.items.index.sets["train"] if s.name == name).blocks
        with path.open("rb", buffering=0) as file:
            for num_bytes, _, _ in blocks:
                content = file.read(num_bytes)
                for members in members_in(content):
                    yield self._item((suffix, content[a:b]) for suffix, a, b in members)

    def _by_tarfile(self, path: Path) -> Iterator[Any]:
        last = ""
        parts: list[tuple[str, bytes]] = []
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if parts and key != last:
                    yield self._item(parts)
                    parts = []
                last = key
                file = tar.extractfile(member)
                assert file is not None
                parts.append((suffix, file.read()))
        yield self._item(parts)

    def _item(self, parts: Any) -> Any:
        fields = dict(decoded(suffix, content) for suffix, content in parts)
        for field, value in fields.items():
            if isinstance(value, File):
                fields[field] = self.items._image(field, value, "")
        return as_item(fields)


def measure() -> list[Table]:
    torch.set_num_threads(1)
    tables = []
    for what, source in (("JPEG files of 160×120 pixels", Photos()), ("arrays of 64", Rows())):
        with tempfile.TemporaryDirectory() as folder:
            is_photo = isinstance(source, Photos)
            facts = SourceFacts("images" if is_photo else "items")
            sets = {"train": OfItems(source, {})}
            write_shards(Path(folder, "shards"), sets, facts, LAYOUT, overwrite=False)
            for workers in (0, 2):
                tables.append(compared(f"{folder}/shards", what, source, workers))
    return tables


def compared(root: str, what: str, source: Photos | Rows, workers: int) -> Table:
    data = data_of(root, source.size, workers)
    items: Any = data.source.train
    epochs = iter(range(1_000_000))
    train = data.train(device=torch.device("cpu"))

    def ours() -> float:
        return seconds_of(lambda: train.epoch(next(epochs)), source.count)

    def by(*, by_tarfile: bool) -> Callable[[], float]:
        loader = DataLoader(
            InFileOrder(items, by_tarfile=by_tarfile), BATCH, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        normalize = Normalizer(data.preprocessing)
        return lambda: seconds_of(
            lambda: ((normalize(inputs), targets) for inputs, targets in loader), source.count
        )

    seconds = in_turn(
        {
            "in file order, a block at once": by(by_tarfile=False),
            "in file order, by tarfile": by(by_tarfile=True),
            "data=shards": ours,
        },
        rounds=ROUNDS,
    )
    data.close()
    pairs = zip(seconds["in file order, a block at once"], seconds["data=shards"], strict=True)
    ratios = [theirs / mine for theirs, mine in pairs]
    return Table(
        title=f"Shards: {what}, {workers} workers",
        note=f"{source.count:,} examples from a warm disk, batches of {BATCH}, decoded and "
        "normalised alike. data=shards permutes them by blocks and checks a CRC of every byte; the "
        "others read one tar after the other. The throughput of data=shards is "
        f"{statistics.median(ratios):.2f} times that of file order, a block at once "
        f"({min(ratios):.2f} to {max(ratios):.2f}).",
        unit="µs an example",
        reference="in file order, a block at once",
        seconds=seconds,
        per=source.count,
        scale=1e6,
    )


def data_of(root: str, size: list[int] | None, workers: int) -> Data:
    """Return the data as conf/data/shards.yaml has it, without augmentation."""
    from benchmarks.configured import config_of

    config = config_of(
        *("data=shards", f"data.source.root={root}", "data.num_classes=10", "data.augment=false"),
        *(f"data.num_workers={workers}", f"data.batch_size={BATCH}", "data.normalize=none"),
        f"data.input_shape=[{'3,96,96' if size else '64'}]",
    )
    allow(config["data"])
    found: Data = instantiate(config["data"])
    assert isinstance(found.source.train, ShardItems)
    return found


def seconds_of(batches: Callable[[], Any], count: int) -> float:
    started, found = time.perf_counter(), 0
    for batch in batches():
        found += len(batch.targets if hasattr(batch, "targets") else batch[1])
    assert found == count
    return time.perf_counter() - started
