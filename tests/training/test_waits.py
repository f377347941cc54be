"""Tests, without a GPU, of how the GPU tests find waits."""

from __future__ import annotations

import warnings

import pytest
import torch
from waits import no_wait_for_the_gpu


def test_the_mode_is_set_in_spite_of_its_warning_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str | int] = [0]
    warned: list[bool] = []

    def set_mode(mode: str | int) -> None:
        modes.append(mode)
        if not warned:  # torch warns once
            warned.append(True)
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does", stacklevel=2
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[0])
    with pytest.raises(ValueError, match="by the test"), no_wait_for_the_gpu():
        assert modes[-1] == "error" and warned
        raise ValueError("by the test")
    assert modes == [0, "error", 0]
    # The control: with warnings as errors, the mode alone ends a test, and stays on.
    warned.clear()
    with pytest.raises(UserWarning):
        torch.cuda.set_sync_debug_mode("error")
    assert modes[-1] == "error"
