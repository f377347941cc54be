"""The list of `make mutate` matches the code, and the script detects a surviving mutation."""

from __future__ import annotations

from pathlib import Path

import mutate
import pytest

LISTED = mutate.mutations()


@pytest.mark.parametrize("mutation", LISTED, ids=lambda mutation: mutation.promise)
def test_each_mutation_applies_to_the_code_and_names_tests_that_exist(
    mutation: mutate.Mutation,
) -> None:
    text = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.find) == 1
    assert mutation.find != mutation.replace
    for test in mutation.tests:
        file, _, name = test.partition("::")
        content = (mutate.ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in content


def test_promises_are_named_once() -> None:
    assert len({mutation.promise for mutation in LISTED}) == len(LISTED)


def made(root: Path, find: str) -> mutate.Mutation:
    (root / "code.py").write_text("answer = 42\n", encoding="utf-8")
    (root / "test_code.py").write_text(
        "from code_here import answer\n\ndef test_it():\n    assert answer > 40\n", encoding="utf-8"
    )
    (root / "code.py").rename(root / "code_here.py")
    return mutate.Mutation(
        promise="it", file="code_here.py", find=find, replace="7", tests=["test_code.py"]
    )


@pytest.mark.slow
def test_a_killed_mutation_a_survivor_and_one_that_no_longer_applies_differ(tmp_path: Path) -> None:
    killed = made(tmp_path, "42")
    assert mutate.verdict(killed, tmp_path) == "killed"
    survivor = mutate.Mutation(**{**vars(killed), "replace": "41"})
    assert mutate.verdict(survivor, tmp_path) == "SURVIVED"
    gone = mutate.Mutation(**{**vars(killed), "find": "43"})
    assert mutate.verdict(gone, tmp_path).startswith("does not apply")
    no_tests = mutate.Mutation(**{**vars(killed), "tests": ["test_absent.py"]})
    assert "could not run" in mutate.verdict(no_tests, tmp_path)
    assert (tmp_path / "code_here.py").read_text(encoding="utf-8") == "answer = 42\n"
