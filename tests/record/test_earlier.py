"""An evaluation that is written over an earlier one, also by two processes at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from regrow.record import earlier
from regrow.record.records import Lock


def content(accuracy: float) -> dict[str, Any]:
    return {"step": 1, "values": {"test/accuracy": accuracy}}


def kept_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("evaluation_test*.json"))


@pytest.mark.parametrize("locks", [True, False])
def test_two_evaluations_at_once_lose_no_result(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control, on a file system without locks, loses one."""
    path = tmp_path / "evaluation_test.json"
    earlier.write_over(path, content(0.9))
    write_text = earlier.write_text
    other = threading.Thread(target=earlier.write_over, args=(path, content(0.7)))

    def overtaken(path: Path, text: str) -> None:
        monkeypatch.setattr(earlier, "write_text", write_text)
        other.start()
        other.join(timeout=1)  # the other one has compared and written, or waits
        write_text(path, text)

    def refused(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(earlier, "write_text", overtaken)
    if not locks:
        monkeypatch.setattr(earlier, "wait_for", refused)
    earlier.write_over(path, content(0.5))
    other.join()
    assert [str(number) in kept_in(tmp_path) for number in (0.9, 0.7, 0.5)] == [True, locks, True]


def test_a_run_that_trains_and_a_folder_without_rights_are_told_as_before(tmp_path: Path) -> None:
    with Lock(tmp_path):
        assert earlier.write_over(tmp_path / "evaluation_test.json", content(0.9)) == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "evaluation_test.json"]
    with pytest.raises(FileNotFoundError):
        earlier.write_over(tmp_path / "gone" / "evaluation_test.json", content(0.9))
