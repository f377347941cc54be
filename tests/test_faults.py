"""A fault of the machine is one line with the way out, exit code 1; the rest is in train.log."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from waiting import until

from regrow.config import CONF
from regrow.data.files import _Memory
from regrow.data.images import load_image
from regrow.errors import MachineFault, in_a_line, machine_fault
from regrow.record.folder import read_json

TRAIN = CONF.parent / "scripts" / "train.py"
SAID = {
    "[Errno 24] Too many open files: 'a.png'": "ulimit -n 4096",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": "data.num_workers=0 or a smaller data.batch_size",
    "unable to write to file </torch_7_1_0>: No space left on device (28)": "/dev/shm",
    "DataLoader worker (pid 7) is killed by signal: Killed. ": "killed by signal 9, most often for",
    "DataLoader worker (pid 7) is killed by signal: Segmentation fault. ": "(segmentation fault)",
    "DataLoader worker (pid(s) 7, 8) exited unexpectedly": "ended without a word",
    "can't start new thread": "ulimit -u",
    "[Errno 12] Cannot allocate memory": "no memory left",
    "[a.cc:78] Timed out waiting 8000ms for recv": "trainer.timeout_seconds (8): it hangs",
    "Unable to find interface for: [eth9]": "GLOO_SOCKET_IFNAME",
}


@pytest.mark.parametrize("text", SAID)
def test_what_the_machine_lacks_is_told_with_the_way_out(text: str) -> None:
    fault = machine_fault(RuntimeError(text))
    assert isinstance(fault, MachineFault) and SAID[text] in str(fault)
    wrapped = KeyError("of something else")
    wrapped.__cause__ = OSError(text)
    assert str(machine_fault(wrapped)) == str(fault)


def test_other_errors_are_no_fault_of_the_machine() -> None:
    for error in (ValueError("Too many open files"), RuntimeError("shapes differ"), KeyError("a")):
        assert machine_fault(error) is None
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one  # as where an error is raised again elsewhere
    assert machine_fault(one) is None
    hidden = ValueError("the data's own")
    hidden.__context__, hidden.__suppress_context__ = OSError(24, "Too many open files"), True
    assert machine_fault(hidden) is None
    torchs = RuntimeError("the store is gone\nException raised from f at a.cpp:1\nframe #0")
    assert in_a_line(torchs) == "the store is gone"


def test_a_file_that_the_machine_cannot_open_is_no_fault_of_the_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from PIL import Image

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files", "a.png")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="Too many") as raised:
        load_image(tmp_path / "a.png", 3, exif_orientation=True)
    assert "ulimit -n 4096" in str(machine_fault(raised.value))


def test_a_cache_without_a_home_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    assert not _Memory("/data").path.is_absolute() and _Memory("/data").known == {}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return (
        *("data=image_folder", f"data.root={root}", "data.num_workers=2", "data.num_classes=2"),
        *("data.input_shape=[3,448,448]", "data.source.resize=460", "data.batch_size=16"),
        *("model=cnn", "model.channels=[2]", "trainer.max_epochs=500", "trainer.num_threads=1"),
        *("trainer.device=cpu", "trainer.checkpoint.save_every_steps=1", "hydra.run.dir=run"),
    )


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def begins(shell: str, folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """The command in a shell that has made the machine small."""
    return subprocess.run(
        [*("unshare", "-m", "bash", "-c", f'{shell} && exec "$@"', "bash"),
         sys.executable, str(TRAIN), *overrides],
        cwd=folder, capture_output=True, text=True, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, to mount a small /dev/shm"
)
@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("mount -t tmpfs -o size=4m tmpfs /dev/shm", "/dev/shm (4 MiB) is full"),
        ("ulimit -n 32", "no more files can be opened (ulimit -n is 32)"),
        ("ulimit -n 28", "no more files can be opened (ulimit -n is 28)"),  # half the workers
    ],
)
def test_a_small_machine_is_one_line(
    shell: str, says: str, images: tuple[str, ...], tmp_path: Path
) -> None:
    done = begins(shell, tmp_path, *images, "trainer.max_epochs=3")
    assert done.returncode == 1, done.stderr
    assert says in errors_of(done)[0]
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_killed_data_worker_is_one_line_and_the_rest_in_the_log(
    images: tuple[str, ...], tmp_path: Path
) -> None:
    process = forked.popen(
        [sys.executable, str(TRAIN), *images], cwd=tmp_path, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        until((tmp_path / "run" / "checkpoints" / "last").exists, 150)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "a data worker was killed by signal 9, most often for want of memory" in said
    assert "Traceback" not in said and len(said.splitlines()) <= 4
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    assert "data.num_workers" in read_json(tmp_path / "run" / "status.json")["error"]
