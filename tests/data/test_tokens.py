"""Text as a split of tokens: the cut, the vocabulary, the token file and the windows."""

from __future__ import annotations

import gzip
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regrow.errors import DataError, UserError
from regrow.feeding import texts, tokens, vocabulary
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import Data
from regrow.feeding.tokens import IGNORED, Tokens

MakeData = Callable[..., Data]
CONTEXT = 8
WORDS = ("a cat", "naïve", "the end", "ß", "twice two")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of token files of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "regrow" / "tokens"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six documents of many lines, of which two are short."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, lines in enumerate((30, 1, 20, 40, 1, 25)):
        text = "".join(f"{WORDS[(i + number) % 5]} {number}.{i}\n" for i in range(lines))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def of(root: Path, make_data: MakeData) -> Callable[..., Data]:
    def make(*overrides: str, **options: Any) -> Data:
        small = ("batch_size=4", "eval_batch_size=3", "num_classes=1000")
        own = (f"root='{root}'", f"input_shape=[{CONTEXT}]", *small)
        return make_data("text", *own, *overrides, **options)

    return make


def split_of(data: Data, name: str) -> Tokens:
    split = dict(data.source.items())[name]
    assert isinstance(split, Tokens)
    return split


def words_of(data: Data) -> vocabulary.Vocabulary:
    record = data.preprocessing.vocabulary
    assert record is not None
    return vocabulary.from_record(record, "")


def text_of(data: Data, name: str) -> str:
    return words_of(data).decode(split_of(data, name).row.tolist())


def joined(batches: list[LoadedBatch]) -> torch.Tensor:
    return torch.cat([batch.inputs for batch in batches if batch.num_local])


def test_each_line_is_in_one_split_and_no_character_is_lost(root: Path, of: Any) -> None:
    data = of()
    everything = "".join(path.read_text() for path in root.iterdir())
    lines = [text_of(data, name).splitlines() for name in ("train", "val", "test")]
    assert sorted(line for its in lines for line in its) == sorted(everything.splitlines())
    sizes = [len("".join(its)) / len(everything) for its in lines]
    assert sizes[1] == pytest.approx(0.1, abs=0.02) and sizes[2] == pytest.approx(0.1, abs=0.02)
    other = of(seed=1)
    assert text_of(other, "test") != text_of(data, "test")
    assert text_of(of("source.val_fraction=0.3"), "test") == text_of(data, "test")


def test_one_file_is_a_text_whose_end_is_held_out(root: Path, of: Any) -> None:
    file = root / "3.txt"
    data = of(f"root='{file}'")
    parts = [text_of(data, name) for name in ("train", "val", "test")]
    assert "".join(parts) == file.read_text() and all(parts)
    assert [*dict(of(f"root='{file}'", "source.val_fraction=0").source.items())] == [
        "train",
        "test",
    ]


def test_each_line_is_tested_in_one_fold(root: Path, of: Any) -> None:
    everything = "".join(path.read_text() for path in root.iterdir())
    tested, sizes = [], []
    for fold in range(4):
        data = of("folds=4", f"fold={fold}")
        lines = [text_of(data, name).splitlines() for name in ("train", "val", "test")]
        assert sorted(line for its in lines for line in its) == sorted(everything.splitlines())
        tested += lines[2]
        sizes += [len("".join(its)) / len(everything) for its in lines[1:]]
    assert sorted(tested) == sorted(everything.splitlines())
    assert sizes[::2] == pytest.approx([0.1] * 4, abs=0.03)
    assert sizes[1::2] == pytest.approx([0.25] * 4, abs=0.03)
    other = of("folds=4", "fold=0", seed=1)
    assert text_of(other, "test") != text_of(of("folds=4", "fold=0"), "test")


def test_folds_are_refused_beside_a_folder_test(root: Path, of: Any) -> None:
    for name, number in {"train": 0, "test": 3}.items():
        (root / name).mkdir()
        (root / f"{number}.txt").rename(root / name / "text.txt")
    with pytest.raises(
        UserError, match=r"^data.folds=3: .* has a folder test. Use data.folds=null"
    ):
        of("folds=3")


def test_a_document_in_two_splits_is_counted_among_the_documents(root: Path, of: Any) -> None:
    for name, numbers in {"train": (0, 3), "val": (2, 5)}.items():
        (root / name).mkdir()
        for number in numbers:
            (root / f"{number}.txt").rename(root / name / f"{number}.txt")
    (root / "val" / "5.txt").write_bytes((root / "train" / "3.txt").read_bytes())
    with pytest.raises(
        DataError, match=r"^1 of the 2 val examples are in train too.* .*/val/5\.txt"
    ):
        of("source.test_fraction=0")


def test_a_part_of_a_document_in_two_splits_is_found(root: Path, of: Any) -> None:
    """The end of train is cut off for test, so that train and val share a part of the file."""
    for name in ("train", "val"):
        (root / name).mkdir()
        (root / name / "text.txt").write_bytes((root / "3.txt").read_bytes())
    with pytest.raises(DataError, match=r"^1 of the 2 val examples are in train too"):
        of()
    (root / "val" / "text.txt").write_bytes((root / "5.txt").read_bytes())
    assert of().num_overlapping == {}
    (root / "train" / "twice.txt").write_bytes((root / "3.txt").read_bytes())
    with pytest.raises(DataError, match=r"^1 of the 1 test examples are in train too"):
        of()


def test_folders_named_like_splits_are_not_taken_for_one_text(root: Path, of: Any) -> None:
    for name, number in {"Train": 0, "Test": 3}.items():
        (root / name).mkdir()
        (root / f"{number}.txt").rename(root / name / "text.txt")
    with pytest.raises(UserError, match=r"Test and Train, but no folder train\. Name the folders"):
        of()


def test_folders_of_the_splits_are_taken_as_they_are(root: Path, of: Any) -> None:
    for name, number in {"train": 0, "val": 2, "test": 3}.items():
        (root / name).mkdir()
        (root / f"{number}.txt").rename(root / name / "text.txt")
    (root / "old").mkdir()
    (root / "1.txt").rename(root / "old" / "1.txt")
    data = of()
    for name in ("val", "old"):
        (file,) = (root / name).iterdir()
        assert text_of(data, name) == file.read_text()
    assert [*dict(data.source.items())] == ["train", "val", "old", "test"]
    assert "2 beside train and the sets (4.txt, 5.txt)" in data.notes[0]
    assert "old" not in dict(of("source.sets=[]").source.items())
    with pytest.raises(UserError, match="holds no folder new beside a folder train"):
        of("source.sets=[new]")


def test_an_evaluation_predicts_every_token_but_the_first_once(of: Any, cpu: torch.device) -> None:
    data = of()
    for name in ("train", "val", "test"):
        split = split_of(data, name)
        batches = list(data.evaluation(name, device=cpu))
        raw = torch.cat([*data.raw_inputs(name)])  # which an export is compared on
        assert torch.equal(raw, joined(batches))
        targets = torch.cat([batch.targets.flatten() for batch in batches])
        assert targets[targets != IGNORED].tolist() == split.row[1:].tolist()
        assert (targets != IGNORED).sum() == len(split.row) - 1 > len(targets) - CONTEXT
        inputs, target = split[0]
        assert inputs.tolist() == split.row[:CONTEXT].tolist()
        assert target.tolist() == split.row[1 : CONTEXT + 1].tolist()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_windows_are_a_function_of_seed_and_epoch(
    size: int, of: Any, cpu: torch.device, same: Any
) -> None:
    data = of()
    whole = list(data.train(device=cpu).epoch(3))
    for start in (0, 2, len(whole)):
        assert same(list(of().train(device=cpu).epoch(3, start)), whole[start:])
    ranks = [data.train(device=cpu, rank=rank, world_size=size) for rank in range(size)]
    steps = zip(*(each.epoch(3) for each in ranks), strict=True)
    for batch, shares in zip(whole, steps, strict=True):
        assert torch.equal(batch.inputs, joined(list(shares)))
        assert sum(share.num_local for share in shares) == batch.num_global == batch.num_local
        places = [share.first + at for share in shares for at in range(share.num_local)]
        assert places == [*range(batch.num_global)]
    assert not same(list(data.train(device=cpu).epoch(2)), whole)
    other = Data.train(of(), device=cpu)
    other._seed = 1
    assert not same(list(other.epoch(3)), whole)


def test_windows_begin_elsewhere_in_each_epoch_and_cover_the_text(
    of: Any, cpu: torch.device
) -> None:
    data = of()
    row = split_of(data, "train").row
    begins = set()
    for epoch in range(3):
        windows = torch.cat([b.inputs for b in data.train(device=cpu).epoch(epoch)])
        assert not (windows == IGNORED).any() and len(windows) == len(split_of(data, "train"))
        begins.add(frozenset(map(tuple, windows.tolist())))
        counts = np.bincount(windows.flatten().numpy(), minlength=80)
        # All tokens once, and less than a window of them twice.
        assert 0 <= (counts - np.bincount(row, minlength=80)).sum() < CONTEXT
    assert len(begins) == 3
    fixed = of("augment=false").train(device=cpu)
    first, second = ({tuple(w) for b in fixed.epoch(e) for w in b.inputs.tolist()} for e in (0, 1))
    assert first == second


def test_a_limit_trains_on_the_beginning_of_the_text_in_every_epoch(
    root: Path, of: Any, cpu: torch.device
) -> None:
    (root / "2.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 600))))
    given = (f"root='{root / '2.txt'}'", "source.val_fraction=0", "source.test_fraction=0")
    for rotates in ("true", "false"):
        limited = of(*given, "limit_train=10", f"augment={rotates}").train(device=cpu)
        for epoch in range(3):
            batches = list(limited.epoch(epoch))
            tokens = torch.cat([part.flatten() for b in batches for part in (b.inputs, b.targets)])
            # Each character is another token, in the order of the text.
            assert sum(len(b.inputs) for b in batches) == 10
            assert tokens.unique().tolist() == [*range(1, 10 * CONTEXT + 2)]


@pytest.mark.parametrize("limit", ["limit_train=null", "limit_train=40"])
def test_a_model_that_starts_from_data_sees_windows_of_the_whole_text(
    limit: str, of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.feeding.loaders.NUM_SAMPLED", 7)
    data = of(limit)
    split = split_of(data, "train")
    count = 40 if "40" in limit else len(split)
    assert len(split) > 80
    expected = [split[place * count // 7][0] for place in range(7)]
    assert torch.equal(data.sample_inputs(), torch.stack(expected))


def test_windows_of_a_text_too_large_for_a_gpu_are_sent_from_pinned_memory(
    of: Any, cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "RESIDENT_BYTES", 0)
    moved: list[tuple[torch.Tensor, bool]] = []
    pinned: list[torch.Tensor] = []

    def to(values: torch.Tensor, device: Any, non_blocking: bool = False) -> torch.Tensor:
        if device != cpu:  # the order of an epoch stays there
            moved.append((values, non_blocking))
        return values

    def pin_memory(values: torch.Tensor) -> torch.Tensor:
        pinned.append(values)
        return values

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    for pins in (True, False):
        moved.clear()
        pinned.clear()
        batches = [*of(f"pin_memory={pins}").train(device=torch.device("cuda", 0)).epoch(0)]
        assert len(moved) == 2 * len(batches) and all(waits_not for _, waits_not in moved)
        assert pinned == [values for values, _ in moved if pins]


def test_a_token_file_is_written_once_and_is_the_map_that_windows_come_from(
    of: Any, cache: Path, root: Path
) -> None:
    data = of()
    files = {path.name: path.stat().st_ino for path in cache.iterdir()}
    assert len([name for name in files if name.endswith(".bin")]) == 3
    assert isinstance(split_of(data, "train").row, np.memmap)
    again = of()
    assert {path.name: path.stat().st_ino for path in cache.iterdir()} == files
    assert again.fingerprint() == data.fingerprint()
    path = root / "0.txt"
    path.write_text(path.read_text().replace("cat", "dog"))
    changed = of()
    assert changed.fingerprint() != data.fingerprint()
    assert files.items() <= {path.name: path.stat().st_ino for path in cache.iterdir()}.items()


def test_a_damaged_token_file_is_made_again(
    of: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = of()
    expected = split_of(before, "train").row.tolist()
    (path,) = cache.glob(f"*-{split_of(before, 'train').sha256}.bin")
    content = bytearray(path.read_bytes())
    del before
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert split_of(of(), "train").row.tolist() == expected
    assert "is damaged: it is made again" in caplog.text
    assert path.read_bytes() != content


@pytest.mark.parametrize("step", ["_vocabulary", "_tokens"])
def test_a_text_that_changes_while_it_is_read_is_not_kept(
    step: str, of: Any, root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its tokens would be found by the contents that it had before."""
    path, read = root / "3.txt", getattr(texts, step)
    before = path.read_text()

    def changed(*given: Any) -> Any:
        path.write_text(before.replace("cat", "act"))
        return read(*given)

    monkeypatch.setattr(texts, step, changed)
    with pytest.raises(DataError, match=r"3\.txt was changed while it was read"):
        of("source.val_fraction=0", "source.test_fraction=0")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    path.write_text(before)
    assert before in text_of(of("source.val_fraction=0", "source.test_fraction=0"), "train")


def test_without_a_cache_the_tokens_stay_in_memory(
    of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: torch.device, same: Any
) -> None:
    before = of()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write anywhere else
    data = of()
    assert not isinstance(split_of(data, "train").row, np.memmap)
    assert data.fingerprint() == before.fingerprint()
    assert same(list(data.train(device=cpu).epoch(0)), list(before.train(device=cpu).epoch(0)))


def test_many_tokens_take_four_bytes_each(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    large = np.array([0, 65_535, 70_000, 2**31 + 5], np.uint32)
    split = Tokens(large, 3, "", [], [])
    inputs, targets = split[0]
    assert inputs.tolist() == large[:3].tolist() and targets.tolist() == large[1:].tolist()
    small = Tokens(large[:2].astype(np.uint16), 1, "", [], [])
    assert small[0][1].item() == 65_535
    assert tokens._unsigned(torch.tensor([-1], dtype=torch.int16)).item() == 65_535


def test_characters_come_back_and_others_are_named(of: Any, root: Path) -> None:
    words = words_of(of())
    text = "ß naïve\n"
    assert words.decode(words.encode(text).tolist()) == text
    assert sum(words.num_bytes()[token] for token in words.encode(text)) == len(text.encode())
    with pytest.raises(DataError, match="the character 'Ж' is not in this vocabulary"):
        words.encode("a Ж")
    assert vocabulary.Characters("").encode("").tolist() == []


BPE = ("source.vocabulary=bpe", "num_classes=300")


def test_byte_pairs_come_back_byte_for_byte(of: Any) -> None:
    pytest.importorskip("tokenizers")
    words = words_of(of(*BPE))
    lengths = words.num_bytes()
    assert 257 < words.size <= 300 and lengths[words.end] == 0
    for text in ("the end, naïve\n\n", "Ж \t漢", vocabulary.END_OF_TEXT, ""):
        found = words.encode(text)
        assert words.decode(found.tolist()) == text and words.end not in found.tolist()
        assert sum(lengths[token] for token in found) == len(text.encode())
    assert len(words.encode("the end")) < len("the end")
    assert words_of(of(*BPE)).record() == words.record()


def test_byte_pairs_are_learnt_from_the_training_text_alone(of: Any, root: Path) -> None:
    pytest.importorskip("tokenizers")
    (root / "train").mkdir()
    (root / "val").mkdir()
    (root / "0.txt").rename(root / "train" / "0.txt")
    (root / "2.txt").rename(root / "val" / "2.txt")
    record = words_of(of(*BPE)).record()
    (root / "val" / "2.txt").write_text("zebra zebra zebra\n" * 50)
    assert words_of(of(*BPE)).record() == record
    (root / "train" / "0.txt").write_text("giraffe giraffe\n" * 50)
    assert words_of(of(*BPE)).record() != record


def test_a_tokenizer_json_is_a_vocabulary(of: Any, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    words = words_of(of(*BPE))
    file = tmp_path / "tokenizer.json"
    file.write_text(words.record()["content"], encoding="utf-8")
    data = of(f"source.vocabulary='{file}'", "num_classes=512")
    assert words_of(data).record() == words.record()
    file.write_text(file.read_text().replace('"normalizer":null', '"normalizer":{"type":"NFC"}'))
    if "NFC" not in file.read_text():
        file.write_text(
            file.read_text().replace('"normalizer": null', '"normalizer": {"type": "NFC"}')
        )
    with pytest.raises(UserError, match="not byte-level BPE without a normalizer"):
        of(f"source.vocabulary='{file}'")


def test_a_missing_package_is_one_line(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    lacks = lambda name: None if name == "tokenizers" else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", lacks)
    with pytest.raises(UserError, match=r"vocabulary=bpe needs tokenizers, .*-e '\.\[text\]'"):
        of(*BPE)


@pytest.mark.parametrize(
    ("overrides", "message"),
    {
        ("num_classes=20",): "data.num_classes=20, but the vocabulary has",
        ("input_shape=[2,3]",): "a window of text has one length",
        ("root=nowhere",): "data.root=nowhere: there is no such file or folder",
        ("source.vocabulary=words.json",): "No such file or directory",
        ("source.vocabulary=bpe", "num_classes=100"): "Set 257 or more",
    }.items(),
)
def test_a_mistake_in_the_options_is_one_line(
    overrides: tuple[str, ...], message: str, of: Any
) -> None:
    if "source.vocabulary=bpe" in overrides:
        pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=message) as caught:
        of(*overrides)
    assert "\n" not in str(caught.value)


def test_broken_text_is_named(of: Any, root: Path) -> None:
    (root / "2.txt").write_bytes(b"good\nb\xe4d\n")
    with pytest.raises(DataError, match=r"2\.txt, byte 6: not UTF-8"):
        of()
    (root / "2.txt").write_bytes(gzip.compress(b"good"))
    with pytest.raises(DataError, match=r"2\.txt: compressed \(gzip\)\. Unpack it\."):
        of()
    (root / "2.txt").write_bytes((root / "0.txt").read_bytes())
    for path in root.glob("[1345].txt"):
        path.unlink()
    with pytest.raises(DataError, match=r"1 of the .* test examples are in train too"):
        of("source.test_fraction=0.5", "source.val_fraction=0")
    for path in root.iterdir():
        path.rename(path.with_suffix(".md"))
    with pytest.raises(
        DataError, match=r"holds no text \(\.txt\)\. Left out of .*2 of suffix \.md"
    ):
        of()


def test_the_shipped_text_is_what_its_note_says(make_data: MakeData) -> None:
    data = make_data("text")
    words = words_of(data)
    assert words.size == data.num_classes == 76
    lengths = np.array(words.num_bytes())
    rows = [split_of(data, name).row for name in ("train", "val", "test")]
    assert sum(int(lengths[row].sum()) for row in rows) == 215_440
    text = "".join(text_of(data, name) for name in ("train", "val", "test"))
    assert text.isascii() and text.count("Chapter ") == 12
