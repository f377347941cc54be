"""Make .venv complete: build it, repair a half-made one, or bring it up to date. Called by make.

Needs nothing but the standard library of Python 3.11 or newer. A stamp, put in place last by one
rename, says that .venv is complete and from what it was made; as long as it holds, a call costs a
few hundredths of a second. Without a stamp everything is made again, so a set-up may be killed at
any moment. Set-ups of one folder wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".set-up-complete"
UNFINISHED = VENV / ".set-up-unfinished"
LOCK_FILE = ROOT / ".venv.lock"
PINNED = "requirements.lock"
RANGES = "requirements-dev.txt"  # includes requirements.txt
MADE_FROM = (PINNED, RANGES, "requirements.txt")
TELL_SECONDS = 15.0
# Sizes of the lock on Linux: mostly PyTorch with its CUDA libraries.
FETCHED_MB, INSTALLED_MB = 3_000, 6_300
STEPS = ("step 1 of 3: an empty .venv", "step 2 of 3: packages", "step 3 of 3: this project")
WITHOUT_LOCK = "make setup LOCK=no"
ERROR = re.compile(r"\s*(error\b|×)", re.IGNORECASE)  # starts uv's and pip's failure messages
# pip prints it for each package and each place of its configuration that lacks the package.
IGNORED = re.compile(r"WARNING: Location '.*' is ignored: ")
# Matches uv's and pip's message for a file whose SHA-256 is not in the lock, and the file's name.
MISMATCH = re.compile(
    r"hash mismatch for [`'\"]?(?P<uv>[^\s`'\"]+)|"
    r"do not match the hashes.*?(?:someone may have tampered with them\.)\s+(?P<pip>\S+)",
    re.IGNORECASE,
)


def say(line: str) -> None:
    print(f"set-up: {line}", file=sys.stderr, flush=True)


def wanted() -> dict[str, str]:
    """Return the facts that .venv depends on: the requirements, the interpreter, the place.

    The place counts because scripts in .venv and the editable install hold absolute paths.
    """
    digest = hashlib.sha256()
    for name in MADE_FROM:
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return {
        "requirements": digest.hexdigest(),
        "python": ".".join(map(str, sys.version_info[:2])),
        "place": str(ROOT),
    }


def read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def asked_for() -> str:
    """Return "yes" or "no" from the argument lock=…; "" without one, to keep .venv's own choice."""
    key, _, lock = "".join(sys.argv[1:]).partition("=")
    if key not in ("", "lock") or lock not in ("", "yes", "no"):
        sys.exit(f"set-up: LOCK={lock} must be yes or no. {WITHOUT_LOCK} installs the ranges.")
    return lock


def is_complete() -> bool:
    stamp = read(STAMP)
    if asked_for() not in ("", stamp.get("lock", "yes")):
        return False
    return PYTHON.exists() and all(stamp.get(key) == value for key, value in wanted().items())


@contextlib.contextmanager
def alone() -> Iterator[int | None]:
    """Hold the lock of this folder; yields its descriptor.

    Installers inherit the descriptor, so that the lock is held as long as one of them writes, even
    if this process has ended.
    """
    with LOCK_FILE.open("ab") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("waiting for another set-up of this folder")
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # the file system has no locks
            yield None
            return
        yield file.fileno()


def megabytes(folder: Path) -> float:
    """Return the size of the files in a folder that another process may be changing."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += (Path(place) / name).lstat().st_size
    return size / 1e6


def progress(step: str, fetched: Path, *, pinned: bool) -> str:
    """Return the step of an installer and how far it is; "" for a step without a name.

    pip fetches into the folder `fetched`; uv fetches into its cache, which is not counted.
    """
    if step != STEPS[1]:  # the other steps fetch almost nothing
        return f" ({step})" if step else ""
    said = [step]
    for folder, most, done in ((fetched, FETCHED_MB, "fetched"), (VENV, INSTALLED_MB, "in .venv")):
        if size := megabytes(folder):
            about = f" of about {most:,}" if pinned and sys.platform == "linux" else ""
            said.append(f"{size:,.0f}{about} MB {done}")
    return f" ({', '.join(said)})"


@contextlib.contextmanager
def told_to_wait(progressed: Callable[[], str]) -> Iterator[None]:
    """Print a line every few seconds: without a terminal, installers are silent for minutes."""
    done, started = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(TELL_SECONDS):
            seconds = time.monotonic() - started
            say(f"still fetching and installing{progressed()}, {seconds:.0f} s so far")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def call(*command: str | Path, lock: int | None, step: str = "", pinned: bool = False) -> bool:
    """Run an installer and return True if it succeeded. Exits at a hash mismatch.

    The lines of progress name `step`. `pinned` is True if the packages are those of a lock file.
    """
    # Not removed if this process is stopped: the installer may still be working there.
    temporary = Path(tempfile.mkdtemp(prefix="set-up-"))
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        stderr=subprocess.PIPE,
        # uv's own certificates lack those that a company adds to the system's.
        env={"UV_SYSTEM_CERTS": "1"} | os.environ | {"TMPDIR": str(temporary)},
        pass_fds=() if lock is None else (lock,),
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    held, num_ignored = [], 0
    with process, told_to_wait(lambda: progress(step, temporary, pinned=pinned)):
        assert process.stderr is not None
        for line in process.stderr:
            if held or ERROR.match(line):  # a hash mismatch prints one line of our own instead
                held.append(line)
            elif IGNORED.match(line):
                num_ignored += 1
            else:
                print(line, end="", file=sys.stderr, flush=True)
    shutil.rmtree(temporary, ignore_errors=True)
    if num_ignored:
        say(f"pip ignored {num_ignored} locations of its configuration, which do not exist")
    if process.returncode and (file := mismatch("".join(held))):
        sys.exit(
            f"set-up: {file}: the fetched file is none of those whose SHA-256 is in {PINNED}. "
            "Nothing of it was installed. If you trust an index that builds its own files, use "
            f"the ranges of requirements.txt: {WITHOUT_LOCK}"
        )
    print("".join(held), end="", file=sys.stderr, flush=True)
    return process.returncode == 0


def mismatch(said: str) -> str | None:
    """Return the file whose hash an installer refused, or None if it failed for another reason."""
    found = MISMATCH.search(re.sub(r"[\s│╰─▶├×]+", " ", said))  # uv draws lines and wraps
    return None if found is None else (found["uv"] or found["pip"])


def refuse_without_hashes() -> None:
    """Exit if a line of the lock has no hash: it would be installed unchecked."""
    text = (ROOT / PINNED).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and "--hash=" not in line:
            sys.exit(f"set-up: {PINNED}: {line.split(';')[0].strip()} has no hash. Run make lock.")


def working_uv() -> str | None:
    """Return the path of a working uv (a version manager's shim may not work), else None."""
    uv = shutil.which("uv")
    if uv is None:
        return None
    tried = subprocess.run([uv, "--version"], capture_output=True, stdin=subprocess.DEVNULL)
    return uv if tried.returncode == 0 else None


def empty_venv() -> None:
    """Empty .venv, except the mark of an unfinished set-up.

    The folder itself stays, because it may be a link.
    """
    for path in VENV.iterdir():
        if path == UNFINISHED:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def mark(content: dict[str, str]) -> None:
    """Atomically replace the mark of an unfinished set-up, with facts for the next one."""
    temporary = VENV / ".set-up.tmp"
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(UNFINISHED)


def begin() -> bool:
    """Mark .venv as unfinished. Returns True if it must be built from scratch."""
    VENV.mkdir(exist_ok=True)
    target = wanted()
    if STAMP.exists():
        stamp = read(STAMP)
        STAMP.replace(UNFINISHED)
        same = all(stamp.get(key) == target[key] for key in ("python", "place"))
        if same and PYTHON.exists():
            is_new = stamp.get("requirements") != target["requirements"]
            other = RANGES if asked_for() == "no" else PINNED
            why = "requirements changed" if is_new else f"installing what {other} says"
            say(f"{why}, bringing .venv up to date")
            return False
        if stamp.get("adopted") != "yes":
            say("making .venv again: another Python, or the folder was moved")
            return True
    elif UNFINISHED.exists():
        adopted = read(UNFINISHED).get("adopted") == "yes"
        next_step = "resuming" if adopted else "making .venv from scratch"
        say(f"an earlier set-up was interrupted, {next_step}")
        return not adopted
    if any(VENV.iterdir()):
        # Created by hand: never emptied, only added to.
        version = "import sys; sys.exit(sys.version_info < (3, 11))"
        if not PYTHON.exists() or subprocess.run([PYTHON, "-c", version]).returncode:
            sys.exit("set-up: .venv has no Python >= 3.11. Move it away, then run this again.")
        say("installing into the .venv that is here")
        mark({"adopted": "yes"})
        return False
    fetched, on_disk = (round(size / 1000) for size in (FETCHED_MB, INSTALLED_MB))
    say(
        f"making .venv with Python {target['python']}; on Linux some {fetched} GB to fetch, "
        f"{on_disk} GB on disk"
    )
    mark({})
    return True


def create(uv: str | None, lock: int | None) -> None:
    empty_venv()
    base = getattr(sys, "_base_executable", None) or sys.executable  # .venv's own may be in use
    if importlib.util.find_spec("ensurepip"):
        made = call(base, "-m", "venv", VENV, lock=lock, step=STEPS[0])
    elif uv:
        # With pip, which `make extras` calls.
        empty = (uv, "venv", "-q", "--seed", "--allow-existing", "--python", base, VENV)
        made = call(*empty, lock=lock, step=STEPS[0])
    else:
        sys.exit(f"set-up: {base} cannot make environments; install its venv module, or uv")
    if not made:
        sys.exit("set-up: .venv could not be made (the message is above)")


def install(uv: str | None, lock: int | None, *, pinned: bool) -> str:
    """Install the pinned packages or, if they do not fit, the ranges. Returns the file used."""
    if pinned:
        refuse_without_hashes()
    # Compile bytecode now, as pip does: where Python cannot write, every start would recompile.
    to_venv = ["--compile-bytecode", "--python", str(PYTHON)]
    installers = [[uv, "pip", "install", *to_venv]] if uv else []
    if subprocess.run([PYTHON, "-c", "import pip"], capture_output=True).returncode == 0:
        pip = [str(PYTHON), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        installers.append(pip if sys.stderr.isatty() else [*pip, "--quiet"])
    for requirements in (PINNED, RANGES) if pinned else (RANGES,):
        if requirements == RANGES and pinned:
            say(f"{PINNED} could not be installed here; trying the ranges of requirements.txt")
        hashes = ["--require-hashes"] if requirements == PINNED else []
        for installer in installers:
            step, is_lock = STEPS[1], requirements == PINNED
            packages = (*installer, *hashes, "-r", requirements)
            if not call(*packages, lock=lock, step=step, pinned=is_lock):
                continue
            # The build tool is already installed, so nothing more is fetched.
            own = (*installer, "--no-deps", "--no-build-isolation", "-e", ".")
            if call(*own, lock=lock, step=STEPS[2]):
                return requirements
    sys.exit(
        "set-up: no installer succeeded (their messages are above); the same command tries again"
    )


def finish(installed_from: str) -> None:
    kept = {key: it for key, it in read(UNFINISHED).items() if key in ("adopted", "lock")}
    content = wanted() | {"installed_from": installed_from} | kept
    with UNFINISHED.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    UNFINISHED.replace(STAMP)


def main() -> None:
    if is_complete():
        if lock := asked_for():
            say(f"LOCK={lock}: .venv is complete and was made with it, so there is nothing to do")
        return
    with alone() as lock:
        if is_complete():  # the set-up that we waited for made it
            return
        before = read(STAMP) or read(UNFINISHED)
        pinned = (asked_for() or before.get("lock", "yes")) == "yes"
        from_nothing = begin()
        mark(read(UNFINISHED) | {"lock": "yes" if pinned else "no"})
        uv = working_uv()
        if from_nothing:
            create(uv, lock)
        finish(install(uv, lock, pinned=pinned))
    say("complete. To use it: source .venv/bin/activate")


def stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stopped)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("set-up: stopped. Run the same command to continue.")
    except OSError as error:
        sys.exit(f"set-up: {error}")
