"""scripts/generate.py: a text that follows a prompt, the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finished import finished, one_line_and_exit_code_2, script

from regrow.feeding.vocabulary import from_record
from regrow.load import load_run
from regrow.runs import generation
from regrow.runs.generation import drawn

main = script("generate").main
SMALL = ("model.layers=1", "model.heads=2", "model.width=16", "data.input_shape=[8]")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt one line."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    source = folder.parent / "song.txt"
    source.write_text("abcdefghijk\n" * 120)
    return finished(
        folder,
        *("task=language", "data=text", "model=gpt", f"data.root='{source}'", *SMALL),
        *("data.num_classes=20", "data.batch_size=32", "trainer.max_steps=60"),
        *("optimizer.lr=0.03", "trainer.max_epochs=null"),
    )


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main([*arguments])
    return capsys.readouterr().out


def test_a_prompt_is_continued(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, f"run={text}", "prompt=abc", "tokens=40", "temperature=0")
    assert found == ("abcdefghijk\n" * 4)[:43] + "\n"


def test_the_text_is_shown_while_it_is_drawn(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def pieces(*_: object, **settings: object) -> Iterator[str]:
        for piece in "xyz":
            shown.append(capsys.readouterr().out)
            yield piece

    monkeypatch.setattr(generation, "generate", pieces)
    main([f"run={text}", "prompt=abc"])
    assert shown == ["", "abcx", "y"]


def test_the_seed_decides_the_text(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = (f"run={text}", "tokens=60", "temperature=2")
    first = said(capsys, *run)
    torch.rand(3)  # draws from elsewhere do not matter
    assert said(capsys, *run) == first and len(first) > 20
    assert said(capsys, *run, "seed=1") != first
    assert said(capsys, *run, "temperature=5e-1") != first
    likely = said(capsys, *run, "top_k=1")
    assert likely == said(capsys, *run, "temperature=0")


def test_only_the_likeliest_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([drawn(logits, 0.5, 3, random) for _ in range(4000)]), minlength=4
    )
    expected = (logits[:3] / 0.5).softmax(0) * 4000
    assert counts[3] == 0
    assert float(((counts[:3] - expected) ** 2 / expected).sum()) < 13.8  # p = 0.001
    flat = logits[:3].softmax(0) * 4000  # the control: another temperature
    assert float(((counts[:3] - flat) ** 2 / flat).sum()) > 13.8


def test_a_text_of_byte_pairs_comes_out_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers")
    source = tmp_path / "song.txt"
    source.write_text("naïve 漢字\n" * 80, encoding="utf-8")
    run = finished(
        tmp_path / "run",
        *("task=language", "data=text", "model=gpt", f"data.root='{source}'", *SMALL),
        *("data.num_classes=300", "data.source.vocabulary=bpe"),
    )
    record = load_run(run).preprocessing.vocabulary
    assert record is not None
    words = from_record(record, "")
    found = said(capsys, f"run={run}", "prompt=naïve 漢", "tokens=50", "temperature=3")
    assert found.startswith("naïve 漢") and len(words.encode(found)) > 20
    found.encode("utf-8")


def test_a_token_with_half_a_character_before_the_end_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Words:
        end, size, pieces = 0, 2, (b"", b"ab\xc3")

        def encode(self, text: str) -> torch.Tensor:
            return torch.tensor([], dtype=torch.int64)

        def decode(self, tokens: list[int]) -> str:
            return b"".join(self.pieces[token] for token in tokens).decode("utf-8", "replace")

    class Model(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(1 - inputs, 2).float()  # the end follows 1

    monkeypatch.setattr(generation, "vocabulary_of", lambda run: Words())
    run: Any = SimpleNamespace(
        preprocessing=SimpleNamespace(input_shape=[8]),
        **{"device": torch.device("cpu"), "precision": "fp32", "model": Model()},
    )
    settings: Any = {"temperature": 0, "top_k": None, "seed": 0}
    assert [*generation.generate(run, "", tokens=9, **settings)] == ["ab\ufffd"]


def test_a_text_that_cannot_be_continued_is_an_error_of_one_line(
    text: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in {
        (f"run={digits}",): "not a language model of a text, but task=multiclass",
        (f"run={text}", "prompt=Ж"): "the character 'Ж' is not in this vocabulary",
        (f"run={text}", "temperature=-1"): "temperature=-1 must be a number of at least 0",
        (f"run={text}", "seed=x"): "seed=x must be an integer of at least 0",
        (f"run={text}", "top_k=0"): "top_k=0 must be an integer of at least 1",
    }.items():
        with one_line_and_exit_code_2(capsys, message):
            main([*arguments])


def test_a_table_of_predictions_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.npy").touch()
    with one_line_and_exit_code_2(capsys, f"Use scripts/generate.py run={text.resolve()} prompt="):
        script("predict").main(
            [f"run={text}", f"input={tmp_path / 'rows.npy'}", f"output={tmp_path / 'out.csv'}"]
        )
    assert not (tmp_path / "out.csv").exists()
