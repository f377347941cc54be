"""Every program that reads with data workers ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from finished import SCRIPTS, finished
from waiting import alive, until

DEADLINE = 150  # seconds; a hang never ends, and a busy machine needs a long time

NOTEBOOK = """
import os, signal, sys, time
from pathlib import Path

import torch

from regrow.feeding.feeds import FileFeed
from regrow.feeding.sampling import Windows

class Numbers:
    def __len__(self):
        return 64

    def __getitem__(self, index):
        Path(sys.argv[1], str(os.getpid())).touch()
        if STUCK and index > 8:  # as in C code that does not come back
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
            time.sleep(600)
        return torch.zeros(1), 0

STUCK = ENDING == "stuck"
feed = FileFeed(
    Numbers(), lambda inputs: inputs, torch.device("cpu"), name="train", seed=0, num_classes=None,
    ignore_index=None, collate=None, num_workers=2, pin_memory=False, persistent_workers=PERSISTENT,
)
batches = feed.read(Windows(64, 4, False, 0, 1), torch.arange(64), 0, 0)
next(batches)
print("read")
if ENDING == "exit":
    sys.exit(3)
if ENDING == "error":
    raise ValueError("my own mistake")
if ENDING == "ctrl-c":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(600)
"""
CODES = {"end": 0, "exit": 3, "error": 1, "ctrl-c": -signal.SIGINT, "stuck": 0}


@pytest.mark.parametrize(
    ("ending", "persistent"),
    [
        ("ctrl-c", True),
        *(
            pytest.param(ending, True, marks=[pytest.mark.slow, *marks])
            for ending, marks in (
                *(("end", ()), ("stuck", ())),
                *(("exit", [pytest.mark.nightly]), ("error", [pytest.mark.nightly])),
            )
        ),
        pytest.param("end", False, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
@pytest.mark.slow
def test_a_program_that_reads_with_workers_ends(
    ending: str, persistent: bool, tmp_path: Path
) -> None:
    program = f"ENDING, PERSISTENT = {ending!r}, {persistent}\n{NOTEBOOK}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == CODES[ending], done.stderr
    assert done.stdout == "read\n"
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert len(workers) == 2
    until(lambda: not any(alive(worker) for worker in workers))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked on Linux")
@pytest.mark.slow
def test_a_start_of_workers_that_fails_half_way_leaves_none() -> None:
    program = NOTEBOOK.replace(
        "batches = ",
        "fork = os.fork\n"
        "def once():\n"
        "    os.fork = lambda: (_ for _ in ()).throw(OSError(11, 'no more processes'))\n"
        "    return fork()\n"
        "os.fork = once\n"
        "batches = ",
    )
    done = subprocess.run(
        [sys.executable, "-c", f"ENDING, PERSISTENT = 'end', True\n{program}", os.devnull],
        capture_output=True, text=True, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == 1 and "no more processes" in done.stderr


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The overrides for an image data set, read by two workers."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    draws = np.random.default_rng(0)
    for split, count in {"train": 12, "val": 4, "test": 4}.items():
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = draws.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return (
        *("data=image_folder", f"data.root={root}", "data.num_workers=2", "data.num_classes=2"),
        *("data.input_shape=[3,16,16]", "data.source.resize=18", "data.batch_size=8"),
        *("model=cnn", "model.channels=[4]", "trainer.max_epochs=1", "trainer.num_threads=1"),
        *("trainer.device=cpu",),
    )


@pytest.fixture(scope="module")
def trained(images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("outputs") / "run", *images)


def ended(folder: Path, command: list[str]) -> tuple[int, str]:
    """Return the exit code and the output of the command, which must end by itself."""
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=DEADLINE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


LOADS = """
import sys
from regrow.load import load_run
run = load_run(sys.argv[1])
next(iter(run.data.evaluation("val", device=run.device)))
"""


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    "ending", ["", "sys.exit(1)", "raise ValueError", "raise KeyboardInterrupt"]
)
def test_a_program_that_loads_a_run_ends(ending: str, trained: Path, tmp_path: Path) -> None:
    code, said = ended(tmp_path, ["-c", f"{LOADS}\n{ending}", str(trained)])
    assert code == (0 if not ending else -signal.SIGINT if "Key" in ending else 1), said


@pytest.mark.slow
@pytest.mark.nightly
def test_every_script_ends_that_reads_with_workers(
    images: tuple[str, ...], trained: Path, tmp_path: Path
) -> None:
    def script(name: str, *arguments: str) -> tuple[int, str]:
        return ended(tmp_path, [str(SCRIPTS / f"{name}.py"), *arguments])

    assert script("evaluate", f"run={trained}")[0] == 0
    code, said = script("evaluate", f"run={trained}", "output=no/such/folder.json")
    assert code == 2 and "output=" in said
    root = next(o for o in images if o.startswith("data.root=")).partition("=")[2]
    assert script("predict", f"run={trained}", f"input={root}/test/cat")[0] == 0
    code, said = script("find_lr", *images, "find_lr.num_steps=4")
    assert code in (0, 2) and "Traceback" not in said  # four steps may not find a learning rate
    # The run finds the error in its first batch, when the workers have already started.
    code, said = script("train", *images, "model.num_classes=3", "task.num_classes=2")
    assert code == 2 and "Traceback" not in said, said
    code, said = script("train", *images, "hydra.run.dir=done")
    assert code == 0, said
    code, said = script("train", "-m", *images, "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 0, said
