"""tests/english.py finds the wording that it names, and leaves common English alone."""

from __future__ import annotations

from pathlib import Path

import english
import pytest

BAD = {
    '"""What a step takes."""': "What",
    'def f():\n    """Whether a step is due."""': "Whether",
    '    r"""Of two runs the longer."""': "Of",
    '"""Whoever resumes first."""': "Whoever",
    '"""The same for a sweep."""': "The same",
    "# Of two runs, take the longer.": "Of",
    "lr: 0.1 # What the optimizer takes.": "What",
    "step()  # Nor does this save.": "Nor",
    "# a loss that is no sum": "is no",
    "# A launcher Is No part of a run.": "Is No",
    "# these are no keys": "are no",
    "# this is\n    # no sum": "is no",
    'f"root={root} is "\n    f"no folder"': "is no",
    "# The shape has to be known.": "has to be",
    "# The shapes have to\n# be known.": "have to be",
    "# the run goes on": "goes on",
    "# Go on with the other run.": "Go on with",
    "# while going on": "going on",
    "# mend it": "mend",
    "# it mends them": "mends",
    "# a mended file": "mended",
    "# start anew": "anew",
    "# whoever starts it": "whoever",
    "# whosoever starts it": "whosoever",
}
BAD_IN = {
    ("tests/test_a.py", "def test_what_is_wrong_is_named() -> None:"): "what",
    ("tests/test_a.py", "    def test_of_two_runs_the_longer_wins(self) -> None:"): "of",
    ("tests/test_a.py", "def test_a_torn_status_is_no_status() -> None:"): "is no",
    ("tests/test_a.py", "def test_the_record_goes_on() -> None:"): "goes on",
    ("tests/test_a.py", "def test_a_run_begins_anew() -> None:"): "anew",
    ("tests/test_a.py", "def test_a_run_is_cut(tmp_path: Path) -> None:"): "cut",
    ("src/a.py", 'f"{name}: in {count} slices"'): "slices",
    ("scripts/a.py", 'print("no pictures of " + name)'): "pictures",
    ("conf/a.yaml", "lr: 0.1 # takes a slice"): "slice",
    ("docs/a.md", "A run draws a picture."): "picture",
}
GOOD_IN = (
    ("tests/test_a.py", "def test_a_run_takes_what_is_left() -> None:"),
    ("tests/test_a.py", "def test_cutmix_takes_a_box() -> None:"),
    ("tests/test_a.py", "def of_cut(slices: int) -> None:"),
    ("tests/test_a.py", 'x = "a cut"'),
    ("src/a.py", 'cut = x[slice(3)] + y["picture"]  # a cut'),
    ("src/a.py", 'def f() -> None:\n    """Return a cut."""'),
    ("conf/a.yaml", "pictures: best # plots of a job"),
    ("docs/a.md", "The key `sweep.pictures`.\n\n```bash\nls a picture\n```"),
)
GOOD = (
    "# There is no run here, and there are no others.",
    "# where there is\n# no run",
    "# The loss is no longer finite.",
    '"""Return what a step takes; whether one is due."""',
    '"""The sameness of two runs."""',
    "# Return what comes of it.",
    "# What do convolutions add on 8×8 digits?",
    "# This is not a sum, and these are not keys. It is now known, is nothing new.",
    "# The run resumes. Go on. It must be amended; recommend a renewal.",
)


@pytest.mark.parametrize(("text", "wording"), BAD.items(), ids=BAD.values())
def test_avoided_wording_is_found(text: str, wording: str) -> None:
    lines = f"x = 1\n{text}\ny = 2\n"
    ((line, found, advice),) = english.hits(lines)
    assert found == wording and advice.endswith(".")
    first = wording.split()[0]
    assert line == 1 + next(i for i, each in enumerate(lines.splitlines()) if first in each)


@pytest.mark.parametrize("text", GOOD)
def test_common_english_is_left_alone(text: str) -> None:
    assert english.hits(f"x = 1\n{text}\n") == []


@pytest.mark.parametrize(("place", "wording"), BAD_IN.items(), ids=BAD_IN.values())
def test_names_of_tests_messages_and_prose_are_read(place: tuple[str, str], wording: str) -> None:
    name, text = place
    ((line, found, _),) = english.hits(f"\n{text}\n", name)
    assert (line, found) == (2, wording)


@pytest.mark.parametrize(("name", "text"), GOOD_IN)
def test_words_in_code_are_left_alone(name: str, text: str) -> None:
    assert english.hits(f"{text}\n", name) == []


def test_the_name_of_a_file_of_tests_is_read() -> None:
    assert [hit[:2] for hit in english.hits("", "tests/test_going_on.py")] == [(1, "going on")]
    assert english.hits("", "tests/test_resume.py") == english.hits("", "src/going_on.py") == []


@pytest.mark.parametrize("rule", range(len(english.PATTERNS)))
def test_no_rule_stands_in_for_another(rule: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without a rule, some of the bad sentences pass."""
    rest = [pattern for number, pattern in enumerate(english.PATTERNS) if number != rule]
    monkeypatch.setattr(english, "PATTERNS", rest)
    found = [*(english.hits(text) for text in BAD), *(english.hits(t, n) for n, t in BAD_IN)]
    assert not all(found)


def test_a_heading_in_markdown_may_begin_with_what() -> None:
    assert english.hits("# What a run promises", "page.md") == []
    assert english.hits("# What a run promises") != []


def test_hits_are_printed_and_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(english, "ROOT", tmp_path)  # git tracks nothing there
    (tmp_path / "tests" / "older").mkdir(parents=True)
    (tmp_path / "tests" / "older" / "run.py").write_text("# start anew\n")
    (tmp_path / "tests" / "good.py").write_text("# start again\n")
    (tmp_path / "image.png").write_bytes(b"\xff anew")
    assert english.main([]) == 0 and capsys.readouterr().out == ""
    (tmp_path / "tests" / "bad.py").write_text("\n# start anew\n")
    said = "tests/bad.py:2: 'anew': write 'again' or 'from scratch'.\n"
    assert english.main([]) == 1 and capsys.readouterr().out == said
    assert english.main([str(tmp_path / "tests" / "bad.py")]) == 1
    assert capsys.readouterr().out == said
    assert english.main([str(tmp_path / "tests" / "good.py")]) == 0
