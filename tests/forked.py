"""`run` and `Popen` of subprocess for this repository's commands, without the time to import.

Importing torch, torchmetrics and matplotlib takes ten times as long as a test's run. So a server
that has only imported them forks a process for each command, which runs the script as Python
would. Tests of the start itself use subprocess (see test_imports), as do tests of other projects'
scripts and of files that Python reads as it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, SOURCE = ROOT / "scripts", str(ROOT / "src")
# Python, its libraries and the C library read these once, at their start.
AT_THE_START = ("PYTHON", "LC_", "LANG", "OMP_", "MKL_", "OPENBLAS_", "MALLOC_", "LD_", "GLIBC_")
TAKEN = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONHASHSEED")


def python_path(*folders: str | Path) -> str:
    """Return a PYTHONPATH of these folders and of those where this process finds packages."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = [path for path in given if path and not Path(path, "regrow").is_dir()]
    return os.pathsep.join([*map(str, folders), *packages])


class Popen:
    """A command in its own process, like subprocess.Popen; output goes through files."""

    def __init__(
        self, args: Sequence[str], *, cwd: Any = None, env: Mapping[str, str] | None = None,
        stdout: int | None = None, stderr: int | None = None, text: bool = False,
        encoding: str | None = None, errors: str | None = None, start_new_session: bool = False,
        draws: bool = False,
    ) -> None:  # fmt: skip
        self.args, self.returncode = [str(word) for word in args], None
        self.encoding, self.errors = encoding or ("utf-8" if text else None), errors
        self.files: list[Any] = []
        self._out, out = self._file(stdout, 1)
        self._err, err = (self._out, out) if stderr == subprocess.STDOUT else self._file(stderr, 2)
        self.pid: int = _asked(
            args=self.args[1:],
            cwd=str(cwd or Path.cwd()),
            env=dict(os.environ if env is None else env),
            out=out,
            err=err,
            session=start_new_session,
            draws=draws,
        )

    def _file(self, asked: int | None, descriptor: int) -> tuple[Any, str]:
        if asked is None:  # pytest's own capture
            return None, f"/proc/{os.getpid()}/fd/{descriptor}"
        if asked == subprocess.DEVNULL:
            return None, os.devnull
        assert asked == subprocess.PIPE
        self.files.append(tempfile.NamedTemporaryFile(prefix="said-"))  # noqa: SIM115
        return self.files[-1], self.files[-1].name

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _asked(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, float(timeout or 0))
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        self.wait(timeout)
        out = self._said(self._out)
        err = None if self._err is self._out else self._said(self._err)
        return out, err

    def _said(self, file: Any) -> Any:
        if file is None:
            return None
        said = Path(file.name).read_bytes()
        if self.encoding is None:
            return said
        return said.decode(self.encoding, self.errors or "strict").replace("\r\n", "\n")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def popen(args: Sequence[str], *, draws: bool = False, **options: Any) -> Any:
    """Run the command in a forked process if that is equivalent, or else by subprocess.Popen."""
    if _is_the_same(args, options.get("env")):
        return Popen(args, draws=draws, **options)
    return subprocess.Popen(args, **options)


def run(
    args: Sequence[str], *, capture_output: bool = False, check: bool = False,
    timeout: float | None = None, draws: bool = False, **options: Any,
) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """Like subprocess.run, in a forked process if that is equivalent."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if not _is_the_same(args, options.get("env")):
        return subprocess.run(args, check=check, timeout=timeout, **options)
    process = Popen(args, draws=draws, **options)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    done = subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)
    if check:
        done.check_returncode()
    return done


def run_script(
    folder: Path, *arguments: str, script: str | Path = "train.py", path: str | Path = "",
    code: int = 0,
) -> str:  # fmt: skip
    """Return what a script prints in `folder`; `path` is for modules. It must end with `code`."""
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    kept["PYTHONPATH"] = python_path(*filter(None, [SOURCE, path]))
    done = run(
        [sys.executable, str(SCRIPTS / script), *arguments], cwd=folder, env=kept,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False,
        timeout=300,
    )  # fmt: skip
    output: str = done.stdout
    assert done.returncode == code and "Traceback" not in output, output
    return output


def copy_project(folder: Path) -> None:
    """Copy what a project needs to run into `folder`."""
    for part in ("src", "conf", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)


def _is_the_same(args: Sequence[str], env: Mapping[str, str] | None) -> bool:
    words = [str(word) for word in args]
    own = words[1] == "-c" or Path(words[1]).resolve().parent == SCRIPTS
    given = os.environ if env is None else env
    paths = given.get("PYTHONPATH", "").split(os.pathsep)
    return (
        sys.platform == "linux"
        and words[0] == sys.executable
        and own
        and _read_at_the_start(given) == _read_at_the_start(os.environ)
        and not any(Path(path, "regrow").is_dir() for path in paths if path and path != SOURCE)
    )


def _read_at_the_start(env: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in env.items() if k.startswith(AT_THE_START) and k not in TAKEN}


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Runs write an empty page and no plots, which take longer than the rest of a short run."""
    from regrow.record import report

    def draw(folder: Path) -> Path:
        path = folder / "report.html"
        path.touch()
        return path

    before, report.draw = report.draw, draw
    try:
        yield
    finally:
        report.draw = before


_server: tuple[subprocess.Popen[bytes], Any] | None = None


def _asked(**request: Any) -> Any:
    """Return the server's answer. The first request starts the server."""
    global _server
    if _server is None:
        ours, its = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, __file__, str(its.fileno())], pass_fds=[its.fileno()],
            env={**os.environ, "PYTHONPATH": python_path(SOURCE)}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()
        _server = process, ours.makefile("rwb")
        ours.close()
        atexit.register(_end)
    _, stream = _server
    stream.write(json.dumps(request).encode() + b"\n")
    stream.flush()
    return json.loads(stream.readline())


def _end() -> None:
    if _server is not None:
        process, stream = _server
        stream.close()
        process.wait()


# -- the server ------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    import_what_runs_need()
    connection = socket.socket(fileno=descriptor)
    stream = connection.makefile("rwb")
    while line := stream.readline():
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                stream.close()
                connection.close()
                become(**request)
        stream.write(json.dumps(answer).encode() + b"\n")
        stream.flush()


def import_what_runs_need() -> None:
    from regrow.sweep import preloaded  # noqa: F401  with matplotlib and sklearn, on one thread


def become(
    args: list[str], cwd: str, env: dict[str, str], out: str, err: str, session: bool, draws: bool
) -> None:
    """Become the requested Python process. Does not return."""
    import runpy
    import threading
    import traceback
    import types

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the server blocks some, as that of a sweep
    if session:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    said = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said if err == out else os.open(err, os.O_WRONLY | os.O_APPEND), 2)
    os.closerange(3, 64)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    program = args[1] if args[0] == "-c" else None
    sys.argv = ["-c", *args[2:]] if program is not None else args
    first = "" if program is not None else str(Path(args[0]).resolve().parent)
    given = [
        str(Path(path).resolve()) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path
    ]
    sys.path[:1] = [first, *given]
    code: Any = 0
    if not draws:
        without_pictures().__enter__()
    try:
        if program is not None:
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(program, "<string>", "exec"), vars(module))
        else:
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
