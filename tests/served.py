"""A server of files over HTTP for tests, with ranges of bytes, tags, and faults on cue.

`python served.py <folder>` prints its port and serves until its input ends. A file `.faults.json`
in the folder holds faults by name: {"train/000000.tar": {"status": 503, "times": 2}}; `times` null
means always, "hang": true sends nothing, and "damaged": true wrong bytes. Each request is a line of
`.requests`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root = Path()
    lock = threading.Lock()

    def do_HEAD(self) -> None:
        self._answer(with_content=False)

    def do_GET(self) -> None:
        self._answer(with_content=True)

    def _answer(self, *, with_content: bool) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        asked = self.headers.get("Range", "")
        with self.lock, (self.root / ".requests").open("a") as file:
            file.write(f"{self.command} {name} {asked}\n")
        fault = self._fault(name)
        if fault.get("hang"):
            time.sleep(30)
            return
        if "status" in fault:
            self.send_response(fault["status"])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        path = self.root / name
        if not path.is_file():
            self.send_error(404)
            return
        status = path.stat()
        start, stop = 0, status.st_size
        ranged = None if fault.get("whole") else re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        if ranged:
            start = int(ranged[1])
            stop = min(stop, int(ranged[2] or stop) + 1)
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{status.st_size}")
        self.end_headers()
        if with_content:
            with path.open("rb") as file:
                os.lseek(file.fileno(), start, os.SEEK_SET)
                content = file.read(stop - start)
                self.wfile.write(content[::-1] if fault.get("damaged") else content)

    def _fault(self, name: str) -> dict[str, Any]:
        path = self.root / ".faults.json"
        with self.lock:
            if not path.exists():
                return {}
            faults = json.loads(path.read_text())
            fault: dict[str, Any] = faults.get(name, {})
            if fault.get("times") is not None:
                if fault["times"] == 0:
                    return {}
                fault["times"] -= 1
                path.write_text(json.dumps(faults))
            return fault

    def log_message(self, format: str, *args: Any) -> None: ...


def faults(folder: Path, **by_name: Any) -> None:
    """Set the faults of a served folder."""
    (folder / ".faults.json").write_text(json.dumps(by_name))


def requests(folder: Path) -> list[str]:
    path = folder / ".requests"
    return path.read_text().splitlines() if path.exists() else []


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the folder from a process of its own, and yield its URL."""
    server = subprocess.Popen(
        [sys.executable, "-S", __file__, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.stdin.close()
        server.kill()
        server.wait()
        server.stdout.close()


if __name__ == "__main__":
    Handler.root = Path(sys.argv[1])
    ThreadingHTTPServer.handle_error = lambda *_: None  # type: ignore[method-assign]  a killed client
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()
