"""git.diff: the code's changes since its commit, as a patch for `git apply`."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import re
import stat
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from regrow.record.redact import redact

ORIGIN = "origin.json"  # in a copy of the code: its origin
LIMIT = 1_000_000  # bytes of the patch; files that do not fit are listed by name and SHA-256
SECONDS = 5.0
HASHED_BYTES = 100_000_000  # of the listed files
LISTED = 200
# Suffixes of untracked files that are only counted, as there may be thousands of them.
OF_MEDIA = {
    *(".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"),
    *(".avi", ".flac", ".mkv", ".mov", ".mp3", ".mp4", ".ogg", ".wav"),
    *(".7z", ".gz", ".tar", ".tgz", ".zip"),
}
# Override user settings that would produce a patch that `git apply` cannot read.
AS_A_PATCH = (
    *("-c", "core.quotePath=true", "diff", "--no-ext-diff", "--no-textconv", "--no-color"),
    *("--binary", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--no-relative"),
    *("--submodule=short", "--ignore-submodules=all"),
)


@dataclass
class Changes:
    """The parts of a checkout that its commit does not hold; names are relative to its top."""

    patch: bytes = b""
    left_out: dict[str, str | None] = field(default_factory=dict)  # SHA-256 by name
    cut: bool = False  # True if code was left out
    not_listed: int = 0  # number of further files left out
    untracked: list[str] = field(default_factory=list)  # except media
    untracked_media: int = 0  # number of images, recordings and archives


def run_git(root: Path, *arguments: str, limit: int) -> bytes | None:
    """Return the first `limit` bytes of git's output, or None if it fails or takes too long."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        process = subprocess.Popen(
            ["git", "-C", str(root), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    timer = threading.Timer(SECONDS, process.kill)
    timer.start()
    with process:
        assert process.stdout is not None
        output = process.stdout.read(limit)
        if len(output) == limit:  # never hold a huge diff in memory
            process.kill()
        code = process.wait()
    timer.cancel()
    return None if code != 0 and len(output) < limit else output


def changes_of(root: Path, top: Path) -> Changes:
    """Return the changes of tracked files, including staged ones, and the content of new code.

    New code is `.py` files and `conf/**/*.yaml` under `root`. `top` is the repository's folder,
    which may contain `root`.
    """
    until = time.monotonic() + SECONDS
    base = _base(top)
    found = Changes()
    hashed = _Hashes(top)
    patch = run_git(top, *AS_A_PATCH, "--find-renames", base, limit=LIMIT + 1)
    if patch is not None and len(patch) <= LIMIT:
        found.patch = patch
    else:
        for name in _names(top, "diff", "--name-only", "--no-renames", "--no-relative", base):
            room = LIMIT - len(found.patch)
            part = None
            if room > 0 and time.monotonic() < until:
                one = ("--no-renames", base, "--", f":(top,literal){name}")
                part = run_git(top, *AS_A_PATCH, *one, limit=room + 1)
            if part is None or len(part) > room:
                found.left_out |= hashed(name)
                found.cut = True
            else:
                found.patch += part
    inside = os.path.relpath(root.resolve(), top.resolve())
    for name in _names(root, "ls-files", "--others", "--exclude-standard", "--full-name"):
        if Path(name).suffix.lower() in OF_MEDIA:
            found.untracked_media += 1
            continue
        found.untracked.append(_shown(name))
        addition = None
        if _is_new_code(name, "" if inside == "." else f"{inside}/", top):
            with contextlib.suppress(OSError):
                addition = _addition(name, top / name, LIMIT - len(found.patch))
            found.cut = found.cut or addition is None
        if addition is None:
            found.left_out |= hashed(name)
        else:
            found.patch += addition
    found.not_listed = max(0, hashed.count - LISTED)
    return found


def redacted(patch: bytes) -> tuple[bytes, list[str]]:
    """Return the patch without secrets, and the names of the files in which one was masked.

    The number of lines does not change, so the patch still applies to every other file.
    """
    text, names = patch.decode("utf-8", "surrogateescape"), []
    sections = re.split(r"(?m)^(?=diff --git )", text)
    for index, section in enumerate(sections):
        start = re.search(r"(?m)^(?:@@ |GIT binary patch$)", section)
        split = start.start() if start else len(section)
        head, body = section[:split], section[split:]
        if body.startswith("@@"):
            body = _redacted_lines(body)
        if (masked := redact(head) + body) != section:
            sections[index] = masked
            names.append(_name_in(head))
    return "".join(sections).encode("utf-8", "surrogateescape"), names


def _redacted_lines(body: str) -> str:
    """Return the lines of hunks, redacted without the sign in their first column."""
    lines = body.split("\n")
    signs = [line[:1] if line[:1] in (" ", "+", "-") else "" for line in lines]
    own = [line[len(sign) :] for sign, line in zip(signs, lines, strict=True)]
    masked = redact("\n".join(own)).split("\n")
    return "\n".join(sign + line for sign, line in zip(signs, masked, strict=True))


def _name_in(head: str) -> str:
    """Return the file that a section of a patch changes."""
    named = re.findall(r"(?m)^(?:\+\+\+|---) (.+?)\t?$", head) or [head.split(" ")[-1].strip()]
    name: str = next(one for one in reversed(named) if one != "/dev/null")
    if name.startswith('"'):
        quoted: bytes = ast.literal_eval(f"b{name}")
        name = quoted.decode("utf-8", "replace")
    return name[2:]


def _base(top: Path) -> str:
    """Return the checked-out commit, or the empty tree before the first commit."""
    if run_git(top, "rev-parse", "--verify", "-q", "HEAD", limit=1000) is not None:
        return "HEAD"
    empty = run_git(top, "hash-object", "-t", "tree", "--stdin", limit=1000) or b""
    return empty.decode().strip()


def _names(folder: Path, *arguments: str) -> list[str]:
    """Return file names that git prints with -z; undecodable bytes stay as surrogates."""
    output = run_git(folder, arguments[0], "-z", *arguments[1:], limit=LIMIT) or b""
    return [os.fsdecode(name) for name in output.split(b"\0")[:-1]]


def _is_new_code(name: str, inside: str, top: Path) -> bool:
    """Return True if an untracked file is code, outside copies of the code and environments."""
    own = name.removeprefix(inside)
    if not own.endswith(".py") and not (own.startswith("conf/") and own.endswith(".yaml")):
        return False
    parents = [top / inside / parent for parent in Path(own).parents if parent.parts]
    return not any((it / ORIGIN).is_file() or (it / "pyvenv.cfg").is_file() for it in parents)


def _addition(name: str, path: Path, room: int) -> bytes | None:
    """Return a new file as a git patch; None if it is larger than `room` or not text."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        mode, content = "120000", os.fsencode(path.readlink())
    elif stat.S_ISREG(status.st_mode) and status.st_size <= room:
        mode = "100755" if status.st_mode & stat.S_IXUSR else "100644"
        content = path.read_bytes()
    else:
        return None
    if b"\0" in content:
        return None
    old, new = _quoted(f"a/{name}"), _quoted(f"b/{name}")
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    head = f"diff --git {old} {new}\nnew file mode {mode}\nindex {'0' * 40}..{blob}\n"
    lines = content.split(b"\n")
    torn = lines.pop()  # after the last newline
    body = b""
    if content:
        count = len(lines) + bool(torn)
        body = (
            f"--- /dev/null\n+++ {new}\n@@ -0,0 +1{f',{count}' if count > 1 else ''} @@\n".encode()
        )
        body += b"".join(b"+" + line + b"\n" for line in lines)
        body += b"+" + torn + b"\n\\ No newline at end of file\n" if torn else b""
    whole = head.encode() + body
    return whole if len(whole) <= room else None


def _quoted(name: str) -> str:
    """Return a name as git writes it with core.quotePath; also quoted if it has a space."""
    raw = os.fsencode(name)
    if re.fullmatch(rb"[!#-\[\]-~]+", raw):
        return name
    escaped = [f"\\{byte:03o}" if byte < 32 or byte > 126 else chr(byte) for byte in raw]
    return '"' + "".join(f"\\{char}" if char in '"\\' else char for char in escaped) + '"'


class _Hashes:
    """SHA-256 of files by name, within limits on the list's length and the bytes read."""

    def __init__(self, top: Path) -> None:
        self.top, self.count, self.room = top, 0, HASHED_BYTES

    def __call__(self, name: str) -> dict[str, str | None]:
        self.count += 1
        return {_shown(name): self._hash(self.top / name)} if self.count <= LISTED else {}

    def _hash(self, path: Path) -> str | None:
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_size <= self.room:
                self.room -= status.st_size
                with path.open("rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
        return None


def _shown(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "replace")
