"""Tar shards: one order for any workers, ranks and kills; changed or damaged bytes are found."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reading import Numbers, part, read_in_parts
from running import config_of
from served import faults, requests, served

from regrow.config.targets import allow, instantiate
from regrow.errors import DataError, UserError
from regrow.feeding import block_cache, block_reader, feeds, remote, shard_items, writing_shards
from regrow.feeding.block_order import BlockOrder
from regrow.feeding.loaders import Data
from regrow.feeding.remote import Folder
from regrow.feeding.sampling import Windows
from regrow.feeding.shard_index import Index, SourceFacts, parsed
from regrow.feeding.shards import read_index
from regrow.feeding.splits import Examples
from regrow.feeding.transforms import FailedTransform
from regrow.feeding.writing_shards import Layout, OfExamples, OfItems, write_shards

pytest.importorskip("aiohttp")
CPU = torch.device("cpu")
COUNT = 1100  # 17 windows of 64, and a last one of 12
SMALL = Layout(shard_bytes=60_000, block_bytes=17_000, shuffle=True, seed=0)
OVERRIDES = (
    *("data=shards", "data.target_kind=null", "data.num_classes=null", "data.num_outputs=null"),
    *("data.input_shape=null", "data.normalize=none", "data.augmentation=null"),
    *("+data.source.collate._target_=reading.collate", "+data.source.collate._partial_=true"),
    *("data.source.pool_mb=0.1", "data.source.cache_gb=0.0004", "data.source.retries=1"),
    *("data.num_workers=0", "data.batch_size=64", "data.source.timeout_seconds=5"),
)


def options(root: str, cache: Path, *overrides: str, seed: int = 0) -> dict[str, Any]:
    """Return the node of the data set as a run composes it."""
    node: dict[str, Any] = config_of(*OVERRIDES)["data"]
    node["seed"] = seed
    node["source"] |= {"root": root, "cache": str(cache)}
    for override in overrides:
        key, _, value = override.rpartition("=")
        place = node["source"] if key.startswith("source.") else node
        place[key.removeprefix("source.")] = json.loads(value)
    return node


def data_of(node: dict[str, Any]) -> Data:
    allow(node)
    found: Data = instantiate(node)
    return found


def numbers(folder: Path, count: int = COUNT, layout: Layout = SMALL) -> Index:
    return write_shards(
        folder,
        {"train": OfItems(Numbers(count), {})},
        SourceFacts("items"),
        layout,
        overwrite=False,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers") / "shards"
    numbers(folder)
    return folder


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    folder = tmp_path / "shards"
    shutil.copytree(written, folder)
    return folder


@pytest.fixture
def url(copied: Path) -> Iterator[str]:
    with served(copied) as address:
        yield address


def ids_of(data: Data, epoch: int = 0, start: int = 0, **share: int) -> list[list[int]]:
    batches = data.train(device=CPU, **share).epoch(epoch, start=start)
    found = [batch.inputs.flatten().tolist()[: batch.num_local] for batch in batches]
    data.close()
    return found


@functools.cache
def ids_in_file(root: str) -> list[int]:
    """Return the ids of all training examples in the order of the tars, as tarfile reads them."""
    found = []
    for shard in read_index(Folder(root)).sets["train"]:
        with tarfile.open(Path(root) / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found.append(int(np.load(io.BytesIO(file.read()))[0]))
    return found


def as_computed(config: dict[str, Any], epochs: int = 2) -> list[list[int]]:
    """Return the ids of all windows as the order and the tars give them, by another reader."""
    source: Any = data_of(config).source.train
    in_file = ids_in_file(config["source"]["root"])
    windows = Windows(len(in_file), config["batch_size"], False, 0, 1)
    found = []
    for epoch in range(epochs):
        order = source.epoch_order(windows, config["seed"], epoch)
        for window in range(len(windows)):
            share = windows.share(window)
            found.append([in_file[at] for at in order[share.start : share.stop].tolist()])
    return found


# Order


@pytest.mark.slow
def test_the_ids_are_the_same_for_any_workers_ranks_and_kills_over_http(
    copied: Path, url: str, tmp_path: Path
) -> None:
    """Killed at random instants; 0 and 2 workers; 1 and 2 processes; the cache is too small."""
    dice = random.Random(1)
    expected = as_computed(options(str(copied), tmp_path / "unused"))
    ways = ((0, 1), (2, 1), (0, 2), (2, 2))
    parts = [
        part(workers, ranks, dice.randint(1, 4), dice.random() / 40) for workers, ranks in ways
    ]
    config = options(url, tmp_path / "cache")
    found = read_in_parts(config, [*parts, part(2, 2, None)], tmp_path / "logs")
    assert found == expected
    assert sorted(itertools.chain(*found[: len(found) // 2])) == list(range(COUNT))
    other = as_computed(options(str(copied), tmp_path / "unused", seed=1))
    assert found != other  # the negative control
    assert found[: len(found) // 2] != found[len(found) // 2 :]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_million_small_examples_over_http_keep_their_order(tmp_path: Path) -> None:
    """As above with 10⁶ examples: 8 parts, each killed at a random instant, then to the end."""
    count, dice = 1_000_000, random.Random(2)
    layout = Layout(shard_bytes=64_000_000, block_bytes=1_000_000, shuffle=True, seed=0)
    numbers(tmp_path / "shards", count, layout)
    batch = ("batch_size=256", "source.pool_mb=32", "source.cache_gb=0.3")
    with served(tmp_path / "shards") as url:
        config = options(url, tmp_path / "cache", *batch)
        parts = [
            part(workers, ranks, dice.randint(1, 500), dice.random(), epochs=1)
            for _ in range(2)
            for workers, ranks in ((0, 1), (2, 1), (0, 2), (2, 2))
        ]
        found = read_in_parts(config, [*parts, part(2, 2, None, epochs=1)], tmp_path / "logs")
    local = options(str(tmp_path / "shards"), tmp_path / "cache", *batch)
    assert found == as_computed(local, 1)
    assert found != as_computed({**local, "seed": 1}, 1)
    shutil.rmtree(tmp_path / "shards")


def order_of(
    *counts: int, batch: int = 8, seed: int = 0, epoch: int = 0, rank: int = 0, ranks: int = 1,
    limit: int | None = None, lanes: int = 4, pool: int = 40,
    is_shared: bool = False, drop_last: bool = False,
) -> tuple[BlockOrder, Windows]:  # fmt: skip
    first = np.append(0, np.cumsum(counts))
    windows = Windows(limit or int(first[-1]), batch, drop_last, rank, ranks)
    how: Any = {"lanes": lanes, "pool": pool, "is_shared": is_shared}
    return BlockOrder(first, windows, seed, epoch, **how), windows


def listed(order: BlockOrder, windows: Windows) -> list[int]:
    shares = [windows.share(number) for number in range(len(windows))]
    return [index for share in shares for index in order[share.start : share.stop].tolist()]


@pytest.mark.parametrize("limit", [None, 97, 8, 5, 1])
@pytest.mark.parametrize("lanes", [1, 3, 8, 50])
def test_an_epoch_of_blocks_holds_each_example_once(limit: int | None, lanes: int) -> None:
    dice = random.Random(lanes)
    counts = [dice.randint(1, 9) for _ in range(40)]
    order, windows = order_of(*counts, limit=limit, lanes=lanes)
    found = listed(order, windows)
    assert sorted(found) == list(range(limit or sum(counts)))
    if len(found) > 20:
        again, other, later = (
            listed(*order_of(*counts, limit=limit, lanes=lanes, seed=seed, epoch=epoch))
            for seed, epoch in ((0, 0), (1, 0), (0, 1))
        )
        assert found == again
        assert found not in (other, later)
        next_epoch, _ = order_of(*counts, limit=limit, lanes=lanes, epoch=1)
        assert order.blocks.tolist() != next_epoch.blocks.tolist()


def test_a_rank_reads_blocks_of_its_own() -> None:
    """Two ranks both read few blocks: those that the border of two lanes cuts."""
    counts, read = [5] * 200, []
    for rank in range(2):
        order, windows = order_of(*counts, rank=rank, ranks=2, lanes=8, pool=100)
        read.append({index // 5 for index in listed(order, windows)})
    assert len(read[0] & read[1]) <= 2
    alone, windows = order_of(*counts, lanes=8, pool=100)
    assert {index // 5 for index in listed(alone, windows)} == read[0] | read[1] == {*range(200)}
    # The negative control: with one lane, both read nearly all blocks.
    mixed = []
    for rank in range(2):
        order, windows = order_of(*counts, rank=rank, ranks=2, lanes=1, pool=100)
        mixed.append({index // 5 for index in listed(order, windows)})
    assert len(mixed[0] & mixed[1]) > 100


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (2, 3)])
def test_every_block_is_announced_before_it_is_needed_and_once(rank: int, ranks: int) -> None:
    order, windows = order_of(*[5] * 200, rank=rank, ranks=ranks, lanes=6, pool=100, is_shared=True)
    announced: list[int] = []
    for start in (0, 37):
        announced = []
        for number in range(start, len(windows)):
            announced += order.ahead(number, start=start, num_workers=0)
            share = windows.share(number)
            needed = {index // 5 for index in order[share.start : share.stop].tolist()}
            assert needed <= {*announced}
    borders = order.num_pools * len(order.lanes)  # a border may cut a block
    assert len(announced) <= len({*announced}) + borders


@pytest.mark.parametrize("pool_mb", [0.02, 0.1])
def test_workers_prefetch_what_they_read_and_hold_no_more_than_their_bound(
    written: Path, tmp_path: Path, pool_mb: float
) -> None:
    """Each of four workers, as the DataLoader feeds it, over two epochs."""
    node = options(str(written), tmp_path / "cache", f"source.pool_mb={pool_mb}", "batch_size=16")
    source: Any = data_of(node).source.train
    windows = Windows(COUNT, 16, False, 0, 1)
    whole, fetched = int(source.access.blocks.num_bytes.sum()), 0
    for worker in range(4):
        reader = block_reader.Reader(source.access)
        for epoch in range(2):
            plan = feeds._Plan(4)
            plan.point_at(windows, source.epoch_order(windows, 0, epoch), epoch, 0, None, None)
            asked: set[int] = set()  # and not read yet
            for batch in itertools.islice(plan, worker, None, 4):
                blocks = batch[0][3] if len(batch[0]) > 2 else []
                reader.ask(blocks)
                asked |= {*reader.coming}
                fetched += len(reader.coming)
                for _, index, *_ in batch:
                    reader.block(number := bisect.bisect_right(reader.first, index) - 1)
                    asked.discard(number)
                    assert reader.num_bytes <= source.access.bytes_held < whole
                asked &= {*reader.coming}
                assert asked <= {*blocks}  # all that was asked for earlier is read
            assert not asked
            assert reader.bytes_coming == 0
        reader.close()
    assert fetched > 50  # the negative control: there was something to read


@pytest.mark.parametrize("pool_mb", [0.06, 0.1])
def test_a_pool_fits_the_bytes_held_so_that_blocks_are_read_once(
    written: Path, tmp_path: Path, pool_mb: float
) -> None:
    node = options(str(written), tmp_path / "cache", f"source.pool_mb={pool_mb}", "batch_size=16")
    source: Any = data_of(node).source.train
    order = source.epoch_order(Windows(COUNT, 16, False, 0, 1), 0, 0)
    reads = reads_of_an_epoch(source.access, order)
    borders = order.num_pools * len(order.lanes)  # a border may cut a block
    assert len({*reads}) == len(order.blocks)
    assert len(reads) <= len(order.blocks) + borders
    tight = dataclasses.replace(source.access, bytes_held=int(source.access.bytes_held / 2))
    assert len(reads_of_an_epoch(tight, order)) > 1.5 * len(reads)  # the negative control


@pytest.mark.parametrize("workers", [0, 3])
def test_an_evaluation_fetches_the_next_blocks_of_each_worker(
    written: Path, tmp_path: Path, workers: int
) -> None:
    source: Any = data_of(options(str(written), tmp_path / "cache")).source.train
    windows = Windows(COUNT, 64, False, 0, 1)
    order, first = source.file_order(windows), source.access.blocks.first.tolist()
    for number in range(len(windows)):
        share = windows.share(number)
        examples = order[share.start : share.stop].tolist()
        assert examples == [*range(share.start, share.stop)]
        needed = [*dict.fromkeys(bisect.bisect_right(first, index) - 1 for index in examples)]
        before = number - max(1, workers)
        if before >= 0:
            assert [*order.ahead(before, start=0, num_workers=workers)] == needed
    assert not order.ahead(len(windows) - 1, start=0, num_workers=workers)


def test_an_evaluation_asks_for_the_blocks_that_its_order_names(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(options(str(written), tmp_path / "cache", "eval_batch_size=64"))
    asked: list[int] = []
    ask = block_reader.Reader.ask
    monkeypatch.setattr(
        block_reader.Reader, "ask", lambda self, blocks: (asked.extend(blocks), ask(self, blocks))
    )
    batches = [*data.evaluation("train", device=CPU)]
    assert len(batches) == 18
    assert {*asked} >= {*range(5, len(data.source.train.access.blocks.num_bytes))}  # type: ignore[union-attr]


def reads_of_an_epoch(access: Any, order: Any) -> list[int]:
    reads: list[int] = []

    class Counted(block_reader.Access):
        def block(self, number: int) -> bytes:
            reads.append(number)
            return super().block(number)

    reader = block_reader.Reader(Counted(**vars(access)))
    for number in range(len(order.windows)):
        reader.ask(order.ahead(number, start=0, num_workers=0))
        share = order.windows.share(number)
        for index in order[share.start : share.stop].tolist():
            reader.block(bisect.bisect_right(reader.first, index) - 1)
    reader.close()
    return reads


def test_blocks_that_come_count_in_the_bytes_held(written: Path, tmp_path: Path) -> None:
    node = options(str(written), tmp_path / "cache", "source.pool_mb=0.05")
    source: Any = data_of(node).source.train
    bound, sizes = source.access.bytes_held, source.access.blocks.num_bytes.tolist()
    reader = block_reader.Reader(source.access)
    for number in range(len(sizes)):  # until it is full
        reader.block(number)
    assert bound - max(sizes) < sum(len(content) for content, _ in reader.held.values()) <= bound
    reader.ask(range(len(sizes)))
    coming = sum(sizes[number] for number in reader.coming)
    assert 0 < coming <= bound / 3  # not all that was asked for
    assert coming + sum(len(content) for content, _ in reader.held.values()) <= bound
    asked = [*reader.coming]
    reader.ask([])
    assert [*reader.coming] == asked
    reader.ask([])  # nobody read them
    assert not reader.coming
    reader.close()


def test_a_shared_cache_is_filled_and_no_bytes_of_it_are_kept(
    copied: Path, url: str, tmp_path: Path
) -> None:
    source: Any = data_of(options(url, tmp_path / "cache", "source.cache_gb=1")).source.train
    reader = block_reader.Reader(source.access)
    reader.ask(range(20))
    deadline = time.monotonic() + 10
    while not all(coming.content.done() for coming in [*reader.coming.values()]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(reader.coming) == 20
    assert reader.num_bytes == 0
    gets = requests(copied)
    for number in range(20):
        reader.block(number)
    assert requests(copied) == gets
    reader.ask([])
    assert not reader.coming
    threads = [*reader.threads]
    reader.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_dropped_last_window_names_no_blocks() -> None:
    for is_shared in (False, True):
        asked = []
        for drop_last in (False, True):
            order, windows = order_of(*[1] * 21, drop_last=drop_last, is_shared=is_shared, pool=8)
            ahead = [order.ahead(n, start=0, num_workers=1) for n in range(len(windows))]
            read = {*listed(order, windows)}
            asked.append({block for blocks in ahead for block in blocks})
            assert asked[-1] <= read
        assert len(asked[0]) > len(asked[1])


def test_a_pool_holds_few_blocks() -> None:
    order, _ = order_of(*[5] * 400, lanes=4, pool=100)
    for number in range(order.num_pools):
        blocks = {index // 5 for index in order.pool(number).examples.flatten().tolist()}
        assert len(blocks) <= 100 / 5 + 2 * 4 + 2


def test_an_epoch_that_is_entered_late_reads_no_earlier_block(
    copied: Path, url: str, tmp_path: Path
) -> None:
    # No sample is taken, and nothing else is read: only the blocks of the last windows.
    node = options(url, tmp_path / "cache", "source.pool_mb=0.02", "source.cache_gb=1")
    expected = ids_of(data_of(options(str(copied), tmp_path / "unused", "source.pool_mb=0.02")))
    assert ids_of(data_of(node), start=16) == expected[16:]
    gets = [line for line in requests(copied) if line.startswith("GET train")]
    blocks = data_of(node).source.train.access.blocks  # type: ignore[union-attr]
    assert 0 < len(gets) < len(blocks) / 2
    assert all("bytes=" in line for line in gets)


@pytest.mark.slow
def test_each_block_is_one_request_and_a_second_epoch_makes_none(
    copied: Path, url: str, tmp_path: Path
) -> None:
    node = options(url, tmp_path / "cache", "source.cache_gb=1")
    data = data_of(node)
    ids_of(data)
    gets = [line for line in requests(copied) if line.startswith("GET train")]
    num_blocks = len(data.source.train.access.blocks)  # type: ignore[union-attr]
    assert len(gets) == num_blocks == len({*gets})
    ids_of(data_of({**node, "num_workers": 2}), epoch=1)
    assert [line for line in requests(copied) if line.startswith("GET train")] == gets


# Identity and damage


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_a_local_copy_and_its_server_have_one_fingerprint(
    copied: Path, url: str, tmp_path: Path
) -> None:
    ours = data_of(options(str(copied), tmp_path / "cache")).fingerprint()
    assert data_of(options(url, tmp_path / "cache")).fingerprint() == ours
    numbers(tmp_path / "others", COUNT - 1)
    assert data_of(options(str(tmp_path / "others"), tmp_path / "cache")).fingerprint() != ours


def test_the_bounds_of_blocks_and_the_facts_are_part_of_a_fingerprint(written: Path) -> None:
    def digest(**facts: Any) -> str:
        content = json.dumps({**record, "facts": {**record["facts"], **facts}})
        return parsed(content.encode(), "index.json").fingerprint("train")

    record = json.loads((written / "index.json").read_bytes())
    found = [digest(), digest(kind="images"), digest(input_max=16.0)]
    assert digest() == found[0]
    shard = record["sets"]["train"][0]  # its first two blocks become one
    (size, count, _), (more, others, _) = shard["blocks"][:2]
    shard["blocks"][:2] = [[size + more, count + others, 0]]
    assert len({*found, digest()}) == 4


@pytest.mark.parametrize("block", [[1024, 1, 2**32], [2**40, 1, 0], [1024, 3, 0], [1024, -1, 0]])
def test_absurd_numbers_in_an_index_are_one_line(written: Path, block: list[int]) -> None:
    record = json.loads((written / "index.json").read_bytes())
    shard = record["sets"]["train"][0]
    shard |= {"blocks": [[1024, 2, 2**32 - 1]], "num_bytes": 2048}
    parsed(json.dumps(record).encode(), "index.json")
    shard |= {"blocks": [block], "num_bytes": block[0] + 1024}
    with pytest.raises(DataError, match=r"index.json is damaged: train/000000.tar has a block"):
        parsed(json.dumps(record).encode(), "index.json")
    with pytest.raises(DataError, match=r"index.json is damaged: maximum recursion"):
        parsed(b"[" * 100_000, "index.json")


def test_a_member_of_a_wrong_size_ends_the_search() -> None:
    block = bytearray(shard_items.encoded("1", (torch.ones(2), 1)))
    assert len(shard_items.members_in(bytes(block))) == 1
    for size in (b"-0000001000", b"00000100000"):
        block[124:135] = size
        with pytest.raises(ValueError, match="a member of"):
            shard_items.members_in(bytes(block))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("row.npz", b"PK"), ("row.npz", b""), ("row.npz", None), ("row.json", b"[" * 100_000)],
)
def test_an_example_of_wrong_bytes_names_its_shard(
    tmp_path: Path, suffix: str, content: bytes | None
) -> None:
    if content is None:  # a compressed part is damaged
        file = io.BytesIO()
        np.savez_compressed(file, a=np.arange(1000))
        content = file.getvalue()[:60] + b"???" + file.getvalue()[63:]
    item = {"raw": shard_items.File(content, suffix)}

    class Wrong(Numbers):
        def __getitem__(self, index: int) -> Any:
            return item

    numbers_of = {"train": OfItems(Wrong(2), {})}
    write_shards(tmp_path / "x", numbers_of, SourceFacts("items"), SMALL, overwrite=False)
    source: Any = data_of(options(str(tmp_path / "x"), tmp_path / "cache")).source.train
    with pytest.raises(DataError, match=rf"train example 0: raw.{suffix} cannot be read"):
        source[0]


def test_a_changed_shard_is_found_at_the_start(copied: Path, url: str, tmp_path: Path) -> None:
    local, there = options(str(copied), tmp_path / "cache"), options(url, tmp_path / "cache")
    data_of(local).fingerprint()
    data_of(there).fingerprint()
    os.utime(copied / "train" / "000003.tar")  # a new tag for the same bytes
    data_of(there).fingerprint()
    flipped(copied / "train" / "000003.tar", 700)
    for node in (local, there):
        with pytest.raises(DataError, match=r"train/000003.tar is not the shard of index.json"):
            data_of(node).fingerprint()
    with (copied / "train" / "000003.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"000003.tar was changed: it has [\d,]+ bytes, and"):
        data_of(local)
    with pytest.raises(DataError, match=r"it has [\d,]+ bytes instead of"):
        data_of(there).fingerprint()


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_bytes_are_found_where_they_are_read(
    copied: Path, url: str, tmp_path: Path, workers: int
) -> None:
    flipped(copied / "train" / "000002.tar", 700)
    for root in (str(copied), url):
        node = options(root, tmp_path / "cache", f"num_workers={workers}")
        with pytest.raises(DataError, match=r"train/000002.tar is damaged or was changed: bytes"):
            ids_of(data_of(node))


def test_a_truncated_shard_is_found(copied: Path, url: str, tmp_path: Path) -> None:
    path = copied / "train" / "000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train/000001.tar is truncated: it has 5,000 bytes"):
        data_of(options(str(copied), tmp_path / "cache"))
    with pytest.raises(DataError, match=r"train/000001.tar is truncated: bytes|cannot be read"):
        ids_of(data_of(options(url, tmp_path / "cache")))


def test_a_damaged_block_in_the_cache_is_read_again(copied: Path, url: str, tmp_path: Path) -> None:
    node = options(url, tmp_path / "cache", "source.cache_gb=1")
    expected = ids_of(data_of(node))
    kept = [path for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file()]
    for path in kept[:5]:
        flipped(path, 600)
    kept[5].write_bytes(b"")
    assert ids_of(data_of(node)) == expected


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, "is of version 2, and this code reads version 1"),
        ({"format": "?"}, "is damaged: it is not an index of tar shards"),
        ({"sets": {"train": []}}, "is damaged: a set holds no shards"),
        ({"facts": {"kind": "songs"}}, "is damaged: a fact is of a wrong type"),
        ({"sets": {"time": [1]}}, "is damaged|uses this name"),
    ],
)
def test_an_index_of_another_form_is_refused(
    written: Path, change: dict[str, Any], error: str
) -> None:
    record = json.loads((written / "index.json").read_bytes())
    with pytest.raises(UserError, match=error):
        parsed(json.dumps({**record, **change}).encode(), "index.json")


def test_an_index_from_elsewhere_names_no_path_outside(written: Path) -> None:
    record = json.loads((written / "index.json").read_bytes())
    for name in ("../../etc/000000.tar", "/etc/000000.tar", "train/../../000000.tar"):
        record["sets"]["train"][0]["name"] = name
        with pytest.raises(DataError, match="is not a shard's name"):
            parsed(json.dumps(record).encode(), "index.json")
    with pytest.raises(DataError, match=r"index.json is damaged"):
        parsed((written / "index.json").read_bytes()[:-100], "index.json")


def test_a_missing_index_or_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no index.json, which is written last"):
        data_of(options(str(tmp_path), tmp_path / "cache"))
    with pytest.raises(UserError, match=r"root=.*/none: not a folder"):
        data_of(options(str(tmp_path / "none"), tmp_path / "cache"))
    with served(tmp_path) as url, pytest.raises(UserError, match=r"there is no index.json"):
        data_of(options(url, tmp_path / "cache"))


# The server


@pytest.mark.slow
def test_faults_that_pass_are_tried_again(
    copied: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    expected = ids_of(data_of(options(str(copied), tmp_path / "unused")))
    faults(copied, **{"train/000000.tar": {"status": 503, "times": 2}})
    node = options(url, tmp_path / "cache", "source.retries=2")
    assert ids_of(data_of(node)) == expected
    digests = data_of(node).fingerprint()
    faults(copied, **{"train/000000.tar": {"status": 503, "times": 3}})  # HEAD, GET, HEAD
    assert data_of(node).fingerprint() == digests


def test_a_damaged_answer_is_asked_for_once_more(copied: Path, url: str, tmp_path: Path) -> None:
    expected = ids_of(data_of(options(str(copied), tmp_path / "unused")))
    node = options(url, tmp_path / "cache", "source.retries=0")
    faults(copied, **{"train/000000.tar": {"damaged": True, "times": 1}})
    assert ids_of(data_of(node)) == expected
    faults(copied, **{"train/000000.tar": {"damaged": True}})
    with pytest.raises(DataError, match=r"train/000000.tar is damaged or was changed"):
        ids_of(data_of(options(url, tmp_path / "another", "source.retries=0")))


def test_faults_of_s3_that_pass_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("botocore.exceptions")
    for error in (
        exceptions.EndpointConnectionError(endpoint_url="http://a"),
        exceptions.ReadTimeoutError(endpoint_url="http://a"),
    ):
        assert remote.may_pass(error)
    assert not remote.may_pass(exceptions.NoCredentialsError())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 503}, r"cannot be read: status 503.*in 2 tries"),
        ({"status": 404}, r"train/000000.tar is not there \(404\)"),
        ({"status": 403}, r"cannot be read: status 403 Forbidden\."),
        ({"hang": True}, r"cannot be read: no answer in time, in 2 tries"),
        ({"whole": True}, r"the server sends the whole file"),
    ],
)
@pytest.mark.slow
def test_faults_that_stay_are_one_line_after_a_bounded_time(
    copied: Path,
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    error: str,
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    faults(copied, **{"train/000000.tar": fault})
    limits = ("source.retries=1", "source.timeout_seconds=0.3")
    started = time.monotonic()
    with pytest.raises(DataError, match=error):
        ids_of(data_of(options(url, tmp_path / "cache", *limits)))
    if "whole" not in fault:
        with pytest.raises(DataError, match=error):
            data_of(options(url, tmp_path / "cache", *limits)).fingerprint()
    assert time.monotonic() - started < 10


def test_a_protocol_that_needs_a_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from regrow import extras

    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    for root, extra in (("https://a.example/b", "http"), ("s3://bucket/b", "s3")):
        with pytest.raises(UserError, match=rf"{root} needs .* pip install -e '.\[{extra}\]'"):
            remote.folder_of(root, timeout_seconds=1, retries=0)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"root=gopher://a: "):
        remote.opened("gopher://a", 1)


# The cache


def test_the_cache_stays_below_its_bound(copied: Path, url: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    node = options(url, cache)
    ids_of(data_of(node))
    kept = sum(path.stat().st_size for path in (cache / "blocks").rglob("*") if path.is_file())
    assert 100_000 < kept <= 400_000 < sum(p.stat().st_size for p in copied.rglob("*.tar"))
    assert int((cache / "used").read_text()) == kept


def test_a_cache_that_cannot_be_written_or_is_too_small_is_one_line(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data.source.cache=.*/file cannot be written"):
        data_of(options(url, tmp_path / "file"))
    with pytest.raises(UserError, match=r"cache_gb=0.0001 is less than two pools"):
        data_of(options(url, tmp_path / "cache", "source.cache_gb=0.0001"))

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    data = data_of(options(url, tmp_path / "cache"))
    monkeypatch.setattr(block_cache, "_write", full)
    with pytest.raises(DataError, match=r"cache cannot be written: No space left on device. Make"):
        ids_of(data)


# Writing


def test_the_shards_are_what_other_programs_read(written: Path) -> None:
    index = parsed((written / "index.json").read_bytes(), "")
    names = []
    for shard in index.sets["train"]:
        with tarfile.open(written / shard.name) as tar:
            names += tar.getnames()
    assert sorted(names) == [f"{number:09}.row.npy" for number in range(COUNT)]
    assert names != sorted(names)  # train is permuted


@pytest.mark.parametrize(
    "item",
    [
        (torch.arange(6).view(2, 3), 4),
        (torch.tensor([0.1], dtype=torch.float64), torch.tensor(1.5), torch.tensor(2.0)),
        ({"a": torch.ones(2), "b": torch.zeros(1, dtype=torch.int64)}, 3),
        ((torch.ones(2), torch.zeros(3)), 0),
        {"text": "naïve\n", "label": 1, "score": 0.1, "more": {"x": [1, None]}, "raw": b"\0\1"},
        (torch.zeros(0, 2), torch.zeros(3, 2, dtype=torch.bool)),
    ],
)
def test_an_item_comes_back_as_it_was(item: Any) -> None:
    block = shard_items.encoded("000000001", item)
    assert len(block) % 512 == 0
    (members,) = shard_items.members_in(block)
    fields = dict(shard_items.decoded(name, block[a:b]) for name, a, b in members)
    assert repr(shard_items.as_item(fields)) == repr(item)


def test_an_item_that_no_shard_can_hold_is_one_line() -> None:
    for item, error in (
        (3, r"an item is int. Shards take"),
        ({"a.b": 1}, r"a name may hold no dot"),
        ({"x": object()}, r"field 'x' is object"),
        ({"x": torch.ones(2, dtype=torch.bfloat16)}, r"field 'x' has arrays of torch.bfloat16"),
        ({"x": np.ones(2, np.longdouble)}, r"field 'x' has arrays of float128"),
        ({"x": {"a": np.array([None])}}, r"field 'x' has arrays of object"),
        ({"x": {"file": np.ones(2)}}, r"field 'x': its part 'file' needs another name"),
        ({"ü" * 60: 1}, r"such a name does not fit a tar file"),
        ({"a\0b": 1}, r"such a name does not fit a tar file"),
    ):
        with pytest.raises(DataError, match=error):
            shard_items.encoded("1", item)


def test_an_array_of_another_byte_order_comes_back() -> None:
    for value in (np.arange(3, dtype=">i4"), {"a": np.arange(3, dtype=">i4")}):
        block = shard_items.encoded("1", {"x": value})
        (((name, start, stop),),) = shard_items.members_in(block)
        _, back = shard_items.decoded(name, block[start:stop])
        assert (back["a"] if isinstance(back, dict) else back).tolist() == [0, 1, 2]


class Rows:
    """Rows by column, as Hugging Face's; one raises an error of its source."""

    def __init__(self, *inputs: Any) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self.inputs[index], OSError):
            raise self.inputs[index]
        return {"image": self.inputs[index], "label": index}

    def fingerprint(self) -> str:
        return str(len(self))


class Listed(list[Any]):
    def fingerprint(self) -> str:
        return ""


FIELDS = {"inputs": "image", "targets": "label"}


def test_images_that_hugging_face_does_not_decode_are_images(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (9, 9, 9)).save(file, "JPEG")
    for path in ("a.jpg", None):
        rows = Rows({"bytes": file.getvalue(), "path": path})
        sets, facts = writing_shards.of_datasets({"train": rows}, FIELDS)
        assert facts.kind == "images"
        index = write_shards(tmp_path / f"{path}", sets, facts, SMALL, overwrite=False)
        assert index.sets["train"][0].num_examples == 1
    for other in ({"bytes": b"RIFF", "path": "a.wav"}, np.ones(3)):
        assert writing_shards.of_datasets({"train": Rows(other)}, FIELDS)[1].kind == "items"


def test_an_image_of_a_mode_that_png_lacks_is_written_as_rgb() -> None:
    for mode in ("CMYK", "YCbCr", "HSV", "L"):
        file = shard_items.file_of(Image.new(mode, (3, 2)))
        assert file is not None
        assert Image.open(io.BytesIO(file.content)).mode == ("L" if mode == "L" else "RGB")
    for mode in ("F", "I"):
        with pytest.raises(DataError, match=rf"is of 32 bits \(mode {mode}\)"):
            shard_items.file_of(Image.new(mode, (3, 2)))


def test_a_fault_of_the_source_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    lost = OSError(5, "Input/output error", "photo.jpg")
    sets, facts = writing_shards.of_datasets({"train": Rows(np.ones(3), lost)}, FIELDS)
    with pytest.raises(DataError, match=r"^train example 1 cannot be read: .*photo.jpg"):
        write_shards(tmp_path / "x", sets, facts, SMALL, overwrite=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^output=.*cannot be written"):
        write_shards(tmp_path / "file" / "x", sets, facts, SMALL, overwrite=False)


def test_an_empty_set_is_refused_before_the_work(tmp_path: Path) -> None:
    for name in ("train", "val"):
        datasets = {"train": Rows(np.ones(3)), "val": Rows(np.ones(3)), name: Rows()}
        sets = {set_: OfItems(rows, {}) for set_, rows in datasets.items()}
        with pytest.raises(UserError, match=f"the set {name} is empty"):
            write_shards(tmp_path / "x", sets, SourceFacts("items"), SMALL, overwrite=False)
        with pytest.raises(UserError, match=f"the set {name} is empty"):
            writing_shards.of_datasets(datasets, {})
    assert not any(tmp_path.iterdir())


def test_sets_that_were_not_compared_are_told_of(
    tmp_path: Path, make_data: Callable[..., Data], photo_shards: Path
) -> None:
    assert make_data("shards", f"root={photo_shards}", *PHOTO).notes == []
    for names in (("train",), ("train", "val")):
        datasets = {name: Numbers(3) for name in names}
        sets, facts = writing_shards.of_datasets(datasets, {})
        place = tmp_path / str(len(names))
        write_shards(place, sets, facts, SMALL, overwrite=False)
        notes = data_of(options(str(place), tmp_path / "cache")).notes
        assert [note for note in notes if "were not found to be disjoint" in note] == notes
        assert len(notes) == len(names) - 1


class Killed(BaseException):
    pass


def test_a_killed_command_continues_and_ends_with_the_same_bytes(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, asked = tmp_path / "shards", [0]
    real = Numbers.__getitem__

    def dies(numbers: Numbers, index: int) -> Any:
        asked[0] += 1
        if asked[0] % 317 == 0:
            raise Killed
        return real(numbers, index)

    monkeypatch.setattr(Numbers, "__getitem__", dies)
    attempts = 0
    while attempts < 20:
        try:
            numbers(output)
            break
        except Killed:
            attempts += 1
            assert not (output / "index.json").exists()
            with pytest.raises(UserError, match=r"there is no index\.json"):
                data_of(options(str(output), tmp_path / "cache"))
    assert 2 < attempts < 20  # a run that starts over never ends: 317 < 1100
    files = sorted(path.relative_to(output) for path in output.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    for file in files:
        assert (output / file).read_bytes() == (written / file).read_bytes(), file


def test_another_plan_starts_over_and_other_files_are_never_touched(tmp_path: Path) -> None:
    output = tmp_path / "shards"
    numbers(output)
    with pytest.raises(UserError, match=r"holds shards already.*overwrite=true"):
        numbers(output)
    (output / "train" / "mine.txt").touch()
    fewer = {"train": OfItems(Numbers(100), {})}
    index = write_shards(output, fewer, SourceFacts("items"), SMALL, overwrite=True)
    there = {path.name for path in (output / "train").iterdir()}
    assert there == {"mine.txt", *(Path(shard.name).name for shard in index.sets["train"])}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files"):
        numbers(tmp_path / "other")


def test_a_command_killed_while_it_removes_earlier_shards_is_continued(
    written: Path, tmp_path: Path
) -> None:
    fewer = {"train": OfItems(Numbers(100), {})}

    def write(output: Path) -> None:
        write_shards(output, fewer, SourceFacts("items"), SMALL, overwrite=True)

    def contents(folder: Path) -> dict[Path, bytes]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder): path.read_bytes() for path in files}

    write(tmp_path / "whole")
    real, killed = Path.unlink, 0
    for die_at in range(4):
        output, calls = tmp_path / f"killed{die_at}", itertools.count()
        shutil.copytree(written, output)

        def unlink(path: Path, *, missing_ok: bool = False, calls: Any = calls) -> None:
            if next(calls) == die_at:  # noqa: B023  called within this turn
                raise Killed
            real(path, missing_ok=missing_ok)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", unlink)
            write(output)
        killed += not (output / "index.json").exists()
        write(output)
        assert contents(output) == contents(tmp_path / "whole") != contents(written)
    assert killed >= 2  # others came before the index was removed


def test_other_fields_are_another_plan(tmp_path: Path) -> None:
    class Pairs(Numbers):
        def __getitem__(self, index: int) -> Any:
            if index == self.dies_at:
                raise Killed
            return {"a": np.zeros(2000), "b": np.ones(2000), "y": index}

        dies_at = -1

    rows, each = Pairs(6), Layout(shard_bytes=10_000, block_bytes=1, shuffle=False, seed=0)

    def write(place: str, inputs: str) -> Index:
        sets = {"train": OfItems(rows, {"inputs": inputs, "targets": "y"})}
        return write_shards(tmp_path / place, sets, SourceFacts("items"), each, overwrite=False)

    rows.dies_at = 3
    with pytest.raises(Killed):
        write("both", "a")
    assert (tmp_path / "both" / "train" / "000000.tar").exists()
    rows.dies_at = -1
    assert write("both", "b") == write("only", "b") != write("other", "a")


def test_files_of_the_user_beside_the_sets_are_kept(tmp_path: Path) -> None:
    output = tmp_path / "shards"
    sets: dict[str, Any] = {"train": OfItems(Numbers(9), {}), "val": OfItems(Numbers(3), {})}
    write_shards(output, sets, SourceFacts("items"), SMALL, overwrite=False)
    (output / "backup").mkdir()
    (output / "backup" / "000001.tar").touch()
    (output / "empty").mkdir()
    write_shards(output, {"train": sets["train"]}, SourceFacts("items"), SMALL, overwrite=True)
    there = {str(path.relative_to(output)) for path in output.rglob("*")}
    kept = {"backup", "backup/000001.tar", "empty"}
    assert there == {*kept, "index.json", "train", "train/000000.tar"}  # val is gone


def test_a_link_in_place_of_the_records_is_not_followed(tmp_path: Path) -> None:
    sets: dict[str, Any] = {"train": OfItems(Numbers(9), {})}
    for name, overwrite in (("new", False), ("old", True)):
        output, thesis = tmp_path / name, tmp_path / f"{name}_thesis"
        if overwrite:
            write_shards(output, sets, SourceFacts("items"), SMALL, overwrite=False)
        output.mkdir(exist_ok=True)
        thesis.mkdir()
        (thesis / "train-000001").write_text("chapter 1")
        (output / ".making").symlink_to(thesis)
        with pytest.raises(UserError, match="other files") if not overwrite else nullcontext():
            write_shards(output, sets, SourceFacts("items"), SMALL, overwrite=overwrite)
        assert [path.name for path in thesis.iterdir()] == ["train-000001"]


@pytest.mark.parametrize("features", [np.ones((2, 3)), torch.ones(2, 3), [1, 2], {"label": 1}])
def test_features_of_another_kind_hold_no_class_names(features: Any) -> None:
    rows = Rows(np.ones(3))
    rows.features = features  # type: ignore[attr-defined]
    assert writing_shards.of_datasets({"train": rows}, {})[1].class_names is None


def test_a_closed_pipe_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    def told(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    sets = {"train": OfItems(Numbers(9), {})}
    with pytest.raises(BrokenPipeError):
        write_shards(tmp_path / "x", sets, SourceFacts("items"), SMALL, overwrite=False, told=told)


# Images


@pytest.fixture
def photo_shards(image_root: Path, tmp_path: Path, make_data: Callable[..., Data]) -> Path:
    data = make_data("image_folder", f"root={image_root}", *PHOTO)
    sets, facts = writing_shards.of_data(data)
    write_shards(tmp_path / "photos", sets, facts, SMALL, overwrite=False)
    return tmp_path / "photos"


PHOTO = ("num_classes=2", "input_shape=[3,16,16]", "source.resize=18", "num_workers=0")


def test_images_in_shards_are_those_of_the_folder(
    image_root: Path, photo_shards: Path, make_data: Callable[..., Data]
) -> None:
    folder = make_data("image_folder", f"root={image_root}", *PHOTO)
    ours = make_data("shards", f"root={photo_shards}", *PHOTO)
    assert ours.class_names == folder.class_names == ["cat", "dog"]
    assert ours.num_examples == folder.num_examples
    for name in ("val", "test"):
        for one, other in zip(
            ours.evaluation(name, device=CPU), folder.evaluation(name, device=CPU), strict=True
        ):
            back = [each.as_pixels(batch.inputs) for each, batch in ((ours, one), (folder, other))]
            assert torch.equal(*back)
            assert torch.equal(one.targets, other.targets)
    seen = [batch.inputs for batch in ours.train(device=CPU).epoch(0)]
    again = [batch.inputs for batch in ours.train(device=CPU).epoch(0)]
    assert torch.equal(torch.cat(seen), torch.cat(again))  # augmented alike
    assert not torch.equal(torch.cat(seen), torch.cat([*_epoch(ours, 1)]))


def _epoch(data: Data, number: int) -> Iterator[torch.Tensor]:
    for batch in data.train(device=CPU).epoch(number):
        assert isinstance(batch.inputs, torch.Tensor)
        yield batch.inputs


def test_images_in_memory_become_shards_of_their_pixels(
    tmp_path: Path, make_data: Callable[..., Data]
) -> None:
    sets, facts = writing_shards.of_data(make_data("digits", "normalize=none", "augment=false"))
    write_shards(tmp_path / "digits", sets, facts, SMALL, overwrite=False)
    how = ("num_classes=10", "input_shape=[1,8,8]", "augment=false", "num_workers=0")
    ours = make_data("shards", f"root={tmp_path / 'digits'}", *how)
    theirs = make_data("digits", "augment=false")
    assert ours.preprocessing.input_max == 16.0
    pixels = {
        name: torch.cat([*data.raw_inputs("test")])
        for name, data in (("ours", ours), ("theirs", theirs))
    }
    assert torch.equal(pixels["ours"], pixels["theirs"])
    mean = torch.tensor([data.preprocessing.mean for data in (ours, theirs)])
    assert torch.allclose(mean[0], mean[1], atol=0.02)


def test_images_in_arrays_have_the_channels_that_are_asked_for(
    tmp_path: Path, make_data: Callable[..., Data]
) -> None:
    pixels = torch.arange(3 * 64, dtype=torch.uint8).view(3, 1, 8, 8)
    sets = {"train": OfExamples(Examples(pixels, torch.arange(3)), "grey")}
    write_shards(tmp_path / "grey", sets, SourceFacts("images"), SMALL, overwrite=False)
    how = ("num_classes=3", "normalize=none", "augment=false", "num_workers=0")
    for channels in (1, 3):
        shape = f"input_shape=[{channels},8,8]"
        data = make_data("shards", f"root={tmp_path / 'grey'}", *how, shape)
        source: Any = data.source.train
        image, target = source[0]
        assert torch.equal(image, pixels[target].expand(channels, 8, 8))
    larger = make_data("shards", f"root={tmp_path / 'grey'}", *how, "input_shape=[3,16,16]")
    assert larger.source.train[0][0].shape == (3, 16, 16)  # type: ignore[index]


def test_a_mask_in_shards_is_neither_scaled_nor_augmented(tmp_path: Path) -> None:
    photo, classes = Image.new("RGB", (12, 10), (9, 9, 9)), np.arange(120, dtype=np.uint8)
    mask = Image.fromarray(classes.reshape(10, 12))
    rows = {"inputs": photo, "targets": mask, "more": photo}
    write_shards(
        tmp_path / "masks",
        {"train": OfItems(Listed([rows]), {})},
        *(SourceFacts("images"), SMALL),
        overwrite=False,
    )
    node = options(str(tmp_path / "masks"), tmp_path / "cache", "source.input_shape=[3,4,4]")
    source: Any = data_of({**node, "input_shape": [3, 4, 4]}).source.train
    item = source.augmented(lambda image: image.resize((2, 2)))[0]
    assert item["inputs"].shape == (3, 2, 2)
    assert source[0]["inputs"].shape == (3, 4, 4)
    for read in (source[0], item):
        assert torch.equal(read["targets"][0], torch.from_numpy(classes).view(10, 12))
        assert read["more"].shape == (3, 10, 12)


def test_blocks_and_threads_are_released(
    written: Path, photo_shards: Path, make_data: Callable[..., Data], tmp_path: Path
) -> None:
    images: Any = make_data("shards", f"root={photo_shards}", *PHOTO).source.train
    assert "_own_reader" not in images.__dict__  # after the statistics
    data = data_of(options(str(written), tmp_path / "cache"))
    source: Any = data.source.train
    next(data.train(device=CPU).epoch(0))
    reader = source._reader()
    threads = [*reader.threads]
    assert reader.num_bytes > 0 and threads
    data.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert reader.num_bytes == 0
    assert "_own_reader" not in source.__dict__


def test_the_inputs_that_a_model_starts_from_come_from_few_blocks(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.feeding.loaders.NUM_SAMPLED", 40)
    monkeypatch.setattr("regrow.feeding.shards.SPREAD_BLOCKS", 5)
    real, read = block_reader.Access.block, set()

    def block(access: block_reader.Access, number: int) -> bytes:
        read.add(number)
        return real(access, number)

    monkeypatch.setattr(block_reader.Access, "block", block)
    node = options(str(written), tmp_path / "cache")
    assert len(data_of(node).sample_inputs()) == 40
    assert len(read) == 5
    source: Any = data_of(node).source.train
    assert max(source.sample(40, 300)) < 300
    assert source.sample(40, 30) == [*range(30)]
    assert len(source.sample(41)) == 45  # 9 of each of 5 blocks


def test_settings_that_do_not_fit_the_shards_are_one_line(
    photo_shards: Path, written: Path, make_data: Callable[..., Data], tmp_path: Path
) -> None:
    for overrides, error in (
        (("num_classes=3",), r"data.num_classes=3, but the shards hold 2 classes: cat, dog"),
        (
            ("+class_names=[dog,cat]",),
            r"class_names=\['dog', 'cat'\]: the shards number their classes as cat, dog\. Leave",
        ),
        (
            ("+class_names=[a,b,c]", "num_classes=3"),
            r"data.num_classes=3, but the shards hold 2 classes: cat, dog\.",
        ),
        (("source.sets=[night]",), r"hold no set night. There are train, val, test"),
        (("source.identity=ends",), r"identity=ends is not one of contents, sizes"),
    ):
        with pytest.raises(UserError, match=error):
            make_data("shards", f"root={photo_shards}", *PHOTO, *overrides)
    node = options(str(written), tmp_path / "cache")
    augmentation = {"_target_": "lab.data.augment.Photo", "input_shape": [1], "flip": True}
    augmentation |= {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    augmentation |= dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    with pytest.raises(UserError, match=r"is for images, and these shards hold other items"):
        ids_of(data_of({**node, "augmentation": augmentation}))


def test_a_named_set_is_evaluated_as_for_other_sources(
    tmp_path: Path, make_data: Callable[..., Data]
) -> None:
    def examples(count: int) -> OfExamples:
        inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
        return OfExamples(Examples(inputs, torch.arange(count) % 3), str(count))

    sets = {"train": examples(40), "val": examples(10), "night": examples(7)}
    write_shards(tmp_path / "rows", sets, SourceFacts("items", list("abc")), SMALL, overwrite=False)
    how = ("num_classes=3", "input_shape=[6]", "normalize=none", "augmentation=null")
    data = make_data("shards", f"root={tmp_path / 'rows'}", *how, "num_workers=0")
    assert data.num_examples == {"train": 40, "val": 10, "night": 7}
    assert data.measured_in_training == ["val", "night"]
    (batch,) = data.evaluation("night", device=CPU)
    assert torch.equal(batch.inputs, sets["night"].examples.inputs)
    assert torch.equal(batch.targets, sets["night"].examples.targets)


def test_the_shared_reader_is_not_inherited(written: Path, tmp_path: Path) -> None:
    """A worker that is forked after the run has read begins with a reader of its own."""
    data = data_of(options(str(written), tmp_path / "cache"))
    source: Any = data.source.train
    item = source[7]
    assert isinstance(source._reader(), block_reader.Reader)
    there = pickle.loads(pickle.dumps(source))
    assert "_own_reader" not in there.__dict__
    assert torch.equal(there[7]["row"], item["row"])
    with pytest.raises(IndexError):
        source[COUNT]


def test_a_broken_image_names_its_shard(tmp_path: Path, make_data: Callable[..., Data]) -> None:
    class Bad:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            good = Image.new("RGB", (16, 16))
            bad = shard_items.File(b"not an image", "jpg")
            return {"inputs": bad if index == 1 else good, "targets": index}

        def fingerprint(self) -> str:
            return ""

    write_shards(
        tmp_path / "bad",
        {"train": OfItems(Bad(), {})},
        SourceFacts("images"),
        SMALL,
        overwrite=False,
    )
    how = ("num_classes=3", "input_shape=[3,16,16]", "normalize=imagenet", "num_workers=0")
    data = make_data("shards", f"root={tmp_path / 'bad'}", *how)
    said = (
        r"bad/train/000000\.tar, train example \d: 000000001\.jpg is not a readable image: .*\. "
        r"Fix or remove the file\. Then make the shards again\."
    )
    with pytest.raises(DataError, match=said):
        ids_of(data)


@pytest.mark.parametrize("error", [KeyError("mean"), TypeError("no"), UserError("flip=2: no.")])
def test_an_error_of_a_transform_is_not_blamed_on_the_shard(
    error: Exception, photo_shards: Path, make_data: Callable[..., Data]
) -> None:
    def fails(image: Any) -> Any:
        raise error

    source: Any = make_data("shards", f"root={photo_shards}", *PHOTO).source.train
    with pytest.raises((FailedTransform, UserError)) as raised:
        source.augmented(fails)[0]
    if isinstance(error, UserError):
        assert raised.value is error
    else:
        assert raised.value.__cause__ is error
        assert str(raised.value).startswith("data.augmentation=fails (tests/data/test_shards.py:")


def test_threads_that_begin_together_share_one_connection(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = remote.opened, []

    def opened(root: str, timeout_seconds: float) -> Any:
        calls.append(root)
        time.sleep(0.05)
        return real(root, timeout_seconds)

    monkeypatch.setattr(remote, "opened", opened)
    place = remote.Remote(url, timeout_seconds=5, retries=0)
    with ThreadPoolExecutor(8) as pool:
        assert len({*pool.map(lambda _: id(place._files()), range(8))}) == 1
    assert len(calls) == 1
    assert len({id(pickle.loads(pickle.dumps(place))._files()), id(place._files())}) == 2
