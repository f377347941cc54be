"""What the tests of training share."""

from __future__ import annotations

import pytest

from regrow import run as runs


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as the runs here, and comes after all that is compared."""
    monkeypatch.setattr(runs, "draw", lambda folder: None)
