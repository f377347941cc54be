"""A fault of the machine is one line with the fix, exit code 1; the rest is in train.log."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import forked
import numpy as np
import pytest
from running import TINY, launched
from waiting import until

from regrow.errors import MachineFault, SlicesTooLarge, UserError, in_a_line, machine_fault
from regrow.feeding.decoding import load_image
from regrow.feeding.files import _Memory
from regrow.processes import ranks
from regrow.project import CONF
from regrow.record.records import read_json

TRAIN = CONF.parent / "scripts" / "train.py"
SAID = {
    "[Errno 24] Too many open files: 'a.png'": "ulimit -n 4096",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory.": "data.num_workers=0 or a smaller data.batch_size",
    "unable to write to file </torch_7_1_0>: No space left on device (28)": "/dev/shm",
    "DataLoader worker (pid 7) is killed by signal: Killed. ": "killed by signal 9, most often",
    "DataLoader worker (pid 7) is killed by signal: Segmentation fault. ": "(segmentation fault)",
    "DataLoader worker (pid(s) 7, 8) exited unexpectedly": "ended without an error message",
    "can't start new thread": "ulimit -u",
    "[Errno 12] Cannot allocate memory": "no memory left",
    "[a.cc:78] Timed out waiting 8000ms for recv": "trainer.timeout_seconds (8): it hangs",
    "Unable to find interface for: [eth9]": "GLOO_SOCKET_IFNAME",
    "[Errno 28] No space left on device: '/d/a'": "/d/a: No space left on device. Make room",
    "[Errno 122] Disk quota exceeded: '/d/a'": "/d/a: Disk quota exceeded. Make room",
    "[Errno 122] Disk quota exceeded": "Disk quota exceeded",
    "[Errno 30] Read-only file system: 'outputs'": "outputs: Read-only file system. Make room",
    "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to": "ulimit -v is",
    "[Errno 2] No usable temporary directory found in ['/tmp']": "Set TMPDIR to a folder that has",
    "std::bad_alloc": "no memory left",
}


@pytest.mark.parametrize("text", SAID)
def test_a_limit_of_the_machine_is_named_with_the_fix(text: str) -> None:
    fault = machine_fault(RuntimeError(text))
    assert isinstance(fault, MachineFault) and SAID[text] in str(fault)
    wrapped = KeyError("of something else")
    wrapped.__cause__ = OSError(text)
    assert str(machine_fault(wrapped)) == str(fault)


def test_other_errors_are_not_blamed_on_the_machine() -> None:
    for error in (ValueError("Too many open files"), RuntimeError("shapes differ"), KeyError("a")):
        assert machine_fault(error) is None
    assert "no memory left" in str(machine_fault(MemoryError()))
    assert machine_fault(SlicesTooLarge("out of memory with 8 examples", 1)) is None
    assert "ulimit -v" in str(machine_fault(ImportError("libtorch.so: failed to map segment")))
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__context__ = other, one  # as when an error is raised again elsewhere
    assert machine_fault(one) is None
    hidden = ValueError("the data's own")
    hidden.__context__, hidden.__suppress_context__ = OSError(24, "Too many open files"), True
    assert machine_fault(hidden) is None
    torchs = RuntimeError("the store is gone\nException raised from f at a.cpp:1\nframe #0")
    assert in_a_line(torchs) == "the store is gone"


def test_too_many_open_files_are_not_blamed_on_the_data(
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
    """Run the command in a shell with limited resources."""
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
    assert "a data worker was killed by signal 9, most often because memory ran out" in said
    assert "Traceback" not in said and len(said.splitlines()) <= 4
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()
    assert "data.num_workers" in read_json(tmp_path / "run" / "status.json")["error"]


# -- folders that cannot be written ----------------------------------------------------------------

IN_A_SMALL_MACHINE = """
import ctypes, os, runpy, subprocess, sys, tempfile
shell, script, *sys.argv[1:] = sys.argv[1:]
ctypes.CDLL(None).unshare(0x00020000)  # CLONE_NEWNS: mounts are for this process alone
subprocess.run(["sh", "-ec", "mount --make-rprivate /; " + shell], check=True)
os.chdir(os.getcwd())
tempfile.tempdir = None
sys.path[0], sys.argv[0] = os.path.dirname(script), script
runpy.run_path(script, run_name="__main__")
"""
READ_ONLY = "mount --bind . . && mount -o remount,bind,ro ."
needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="needs root, to mount a read-only folder"
)


def in_a_small_machine(
    shell: str, folder: Path, *overrides: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-c", IN_A_SMALL_MACHINE, shell, str(TRAIN), *TINY, *overrides],
        cwd=folder, capture_output=True, text=True, timeout=200,
        env={**os.environ, **environment},
    )  # fmt: skip


def said_once(done: subprocess.CompletedProcess[str]) -> str:
    """Return the single line that the command printed."""
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@needs_mounts
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ((), "hydra.run.dir=outputs cannot be written: Read-only file system."),
        (("hydra.run.dir=a",), "hydra.run.dir=a: a: Read-only file system."),
        (
            ("-m", "seed=0,1"),
            "hydra.sweep.dir=outputs: the folder cannot be written: Read-only file system.",
        ),
        (
            ("-m", "hydra.sweep.dir=a"),
            "hydra.sweep.dir=a: the folder cannot be written: Read-only file",
        ),
    ],
)
def test_a_read_only_current_folder_is_one_line(
    overrides: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    done = in_a_small_machine(f"{READ_ONLY}; cd .", tmp_path, *overrides)
    assert done.returncode == 2
    assert said_once(done).startswith(f"error: {says}")
    assert list(tmp_path.iterdir()) == []


@needs_mounts
@pytest.mark.slow
def test_a_read_only_home_is_one_warning_and_the_run_completes(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    names = ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")
    done = in_a_small_machine(
        "mount -t tmpfs -o ro tmpfs home", tmp_path, "hydra.run.dir=run", "trainer.max_epochs=1",
        **dict.fromkeys(names, str(home)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said_once(done).startswith("warning: this run could not be listed as yours (")


@needs_mounts
@pytest.mark.slow
def test_ranks_without_room_for_temporary_files_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    done = in_a_small_machine(
        "mount -t tmpfs -o nr_inodes=2 tmpfs temporary", tmp_path,
        "hydra.run.dir=run", "trainer=ddp", "trainer.devices=2", TMPDIR=str(folder),
    )  # fmt: skip
    assert done.returncode == 1
    assert said_once(done) == (
        f"error: {folder}: No space left on device. Set TMPDIR to a folder that has room."
    )
    assert not (tmp_path / "run").exists()


def test_a_quota_that_is_used_up_names_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: str) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    with pytest.raises(MachineFault, match=r"Disk quota exceeded\. Set TMPDIR"):
        ranks.private_folder().__enter__()


# -- a user's own code -----------------------------------------------------------------------------

READ = """
import sys
import torch
from regrow.feeding.feeds import FileFeed
from regrow.feeding.sampling import Windows

def raises(items):
    class Local(Exception):
        pass
    raise Local("my own mistake")

def learns(items):
    inputs = torch.nn.Linear(1, 1)(torch.ones(len(items), 1))
    return inputs, torch.zeros(len(items), dtype=torch.long)

class Numbers:
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return raises([index]) if sys.argv[1] == "item" else index

feed = FileFeed(
    Numbers(), lambda inputs: inputs, torch.device("cpu"), name="train", seed=0, num_classes=None,
    ignore_index=None, collate={"raises": raises, "learns": learns}.get(sys.argv[1]),
    num_workers=1, pin_memory=False, persistent_workers=True,
)
batch = next(feed.read(Windows(8, 4, False, 0, 1), torch.arange(8), 0, 0))
feed.close()
print(batch.inputs.requires_grad)
"""


@pytest.mark.parametrize("which", ["raises", "item", "learns"])
def test_an_object_that_a_worker_cannot_send_does_not_hang(which: str) -> None:
    done = forked.run(
        [sys.executable, "-c", READ, which], capture_output=True, text=True, timeout=60
    )
    if which == "learns":
        assert done.stdout == "False\n", done.stderr
    else:
        assert done.returncode == 1
        assert "Local: my own mistake" in done.stderr


class Refuses:
    """A logger that fails late."""

    def __init__(self, folder: Path) -> None:
        (folder / "tensorboard").mkdir()
        raise UserError("logger.mine: there is no such account.")

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...


@pytest.mark.parametrize("folder", ["outputs", "mine/run"])
def test_a_logger_that_refuses_leaves_no_folder(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "digits").mkdir(parents=True)
    named = () if folder == "outputs" else (f"hydra.run.dir={folder}",)
    with pytest.raises(SystemExit) as end:
        launched("+logger.mine._target_=test_faults.Refuses", *named)
    assert end.value.code == 2
    assert "error: logger.mine: there is no such account." in capsys.readouterr().err
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left <= {"outputs", "outputs/digits", "mine"}


@pytest.mark.slow
def test_a_logger_that_refuses_leaves_a_run_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched("hydra.run.dir=run", "trainer.max_epochs=1")
    with pytest.raises(SystemExit):
        launched(
            "hydra.run.dir=run", "trainer.max_epochs=2", "+logger.mine._target_=test_faults.Refuses"
        )
    assert (tmp_path / "run" / "checkpoints" / "last").exists()
    assert (tmp_path / "run" / "summary.json").exists()
