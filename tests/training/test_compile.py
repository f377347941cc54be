"""`trainer.compile=true` on a CPU."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
from running import CPU, TINY, config_of, fingerprint, train

from regrow.errors import UserError
from regrow.runs import training


def test_a_missing_compiler_is_said_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    importlib.import_module("torch._inductor.config")  # reads CXX now, not the value set below
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"trainer.compile=true needs a C.. compiler.*no-such-comp"):
        training.build(config_of(*TINY, "trainer.compile=true"), CPU)
    training.build(config_of(*TINY), CPU)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # in the compiler's own code
def test_a_compiled_run_grows_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = (*TINY, "trainer.compile=true", "trainer.max_epochs=3")
    with caplog.at_level("INFO"):
        train(tmp_path / "whole", *options)
    assert "the first batches compile the model" in caplog.text
    train(tmp_path / "cut", *options, stop_at=5)
    train(tmp_path / "cut", *options)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
