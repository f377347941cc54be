"""Shared by all tests: one thread, no display, no environment of a cluster or tracker."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile

import pytest

os.environ["MPLBACKEND"] = "Agg"
# The list of the user's own folders (ownership), and the hashes of files (files).
for variable in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
    os.environ[variable] = tempfile.mkdtemp(prefix="regrow-")
    atexit.register(shutil.rmtree, os.environ[variable], ignore_errors=True)
# Set by torchrun, Slurm or a user's profile. A test that needs them sets them itself.
OUTSIDE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in list(os.environ):
    if name in OUTSIDE or name.startswith(("SLURM_", "WANDB_", "TORCHELASTIC_", "HYDRA_")):
        del os.environ[name]
# Started in the background by a script, this ignores Ctrl-C, and so would the programs of tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-of-each", action="store_true", help="of a parametrized test, its first case alone"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("one_of_each"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.partition("[")[0], item)
        config.hook.pytest_deselected(items=[i for i in items if i not in first.values()])
        items[:] = first.values()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that passing tests measured, which pytest would hide."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Use one thread, since bits depend on it. Import torch only in tests that need it."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
