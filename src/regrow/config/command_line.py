"""Text on command lines: quoting for Hydra's grammar and for the shell, and paths as typed.

Two parsers read a command line: the shell, then Hydra's override grammar, in which `=`, `,`,
brackets and every letter outside ASCII are syntax errors. All that this package puts on a command
line, or reads back from a record, is quoted for both.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.project import ROOT

# Keys whose value is one path. It may be typed unquoted, whatever characters it holds.
PATHS = (
    *("resume", "init_from", "hydra.run.dir", "hydra.sweep.dir", "sweep.file"),
    *("data.root", "data.source.root", "data.source.train_file", "data.source.val_file"),
    *("data.source.test_file", "data.source.vocabulary"),
)
ONE_VALUE = ("resume", "hydra.run.dir", "hydra.sweep.dir", "sweep.file")  # no sweep varies these
WORDS = ("auto", "never", "null", "")  # not paths
NAME_BYTES, PATH_BYTES = 255, 4000
_BARE = re.compile(r"[A-Za-z0-9_./-]*/[A-Za-z0-9_./-]*|[A-Za-z_][A-Za-z0-9_-]*")
_TYPED_OTHERWISE = ("null", "true", "false", "inf", "nan")  # as Hydra reads these words


def quoted(text: str) -> str:
    """Return `text` quoted for Hydra's grammar, so that the config gets exactly this string."""
    if _BARE.fullmatch(text) and text.lower() not in _TYPED_OTHERWISE:
        return text
    text = escaped(text)
    quote = "'" if '"' in text and "'" not in text else '"'

    def before_quote(found: re.Match[str]) -> str:
        return found[1] * 2 + (f"\\{quote}" if found[2] else "")

    # Hydra removes backslashes before a quote, and keeps all others.
    return quote + re.sub(rf"(\\*)({quote}|\Z)", before_quote, text) + quote


def escaped(text: str) -> str:
    """Return `text` with each `${` escaped, which OmegaConf would take for an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", text)


def override(key: str, value: str | Path) -> str:
    """Return `key=value` with the value quoted for Hydra."""
    return f"{key}={quoted(str(value))}"


def key_of(override: str) -> str:
    """Return the key of an override, such as `a.b@c` of `+a.b@c=1` or `a.b` of `~a.b`."""
    return override.partition("=")[0].lstrip("+~")


def typed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides typed for this start: all, or those after `expand`'s resume=<folder>."""
    places = [number for number, override in enumerate(overrides) if key_of(override) == "resume"]
    if not places or overrides[places[-1]].partition("=")[2] in ("auto", "never"):
        return list(overrides)
    return list(overrides[places[-1] + 1 :])


def paths_as_typed(arguments: Sequence[str], *, multirun: bool) -> list[str]:
    """Return the arguments, with paths quoted where Hydra's grammar would reject or alter them.

    A path that exists is taken literally. Raises UserError for one with a line break, or too long.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in PATHS and value not in WORDS:
            refuse_unusable(key, value)
            if quoted(value) != value and (
                _exists(value) or not _is_readable(key, value, multirun)
            ):
                argument = override(key, value)
        found.append(argument)
    return found


def path_of(key: str, value: str) -> str:
    """Return the path that `key=value` names: literally if it exists, else as Hydra parses it.

    Raises UserError for a path with a line break, or one that is too long.
    """
    refuse_unusable(key, value)
    if quoted(value) != value and not _exists(value):
        with_quotes = read(f"{key}={value}")
        if isinstance(with_quotes, str):
            return with_quotes
    return value


def read(argument: str) -> Any:
    """Return the value that Hydra parses from `key=value`; `...` for a syntax error.

    For several values, a sweep, returns Hydra's own override object.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException:
        return ...
    if parsed.is_sweep_override():
        return parsed
    value = parsed.value()
    if isinstance(value, str):  # unescape as OmegaConf does
        value = re.sub(r"(\\*)\\\$\{", lambda found: found[1][::2] + "${", value)
    return value


def refuse_unusable(key: str, path: str) -> None:
    """Raise UserError for a path with a line break, or one too long for any file system."""
    if "\n" in path or "\r" in path:
        raise UserError(f"{key}={path!r}: a path must not contain a line break. Rename the folder.")
    names = [len(name.encode("utf-8", "surrogateescape")) for name in path.split("/")]
    if max(names) > NAME_BYTES or sum(names) + len(names) > PATH_BYTES:
        raise UserError(
            f"{key}={path[:60]}…: the path is too long. File systems take {NAME_BYTES} bytes for "
            f"a name and {PATH_BYTES} for a path. Choose a shorter one."
        )


def shell(words: Sequence[str]) -> str:
    """Return the words quoted as one line that can be pasted into bash or zsh."""
    return " ".join(map(_word, words))


def command(*arguments: str, script: str = "train.py", root: Path = ROOT) -> str:
    """Return a command that can be pasted into a shell in the current folder."""
    shown = relative(root / "scripts" / script)
    if shown.startswith("-"):
        shown = f"./{shown}"
    return shell(["python", shown, *arguments])


def relative(path: Path) -> str:
    """Return a path as it is typed in the current folder: relative if it lies below."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _word(word: str) -> str:
    if word.isprintable() and (word.isascii() or _shows(word)):
        return shlex.quote(word)
    try:
        content = os.fsencode(word)
    except UnicodeEncodeError:
        content = word.encode("utf-8", "surrogateescape")
    # Show bytes: the terminal's encoding may differ from that of file names or lack a character.
    shown = (chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\{b:03o}" for b in content)
    return f"$'{''.join(shown)}'"


def _shows(word: str) -> bool:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    return is_utf8 and sys.getfilesystemencoding() == "utf-8"


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except (OSError, ValueError):  # the path is too long
        return False


def _is_readable(key: str, value: str, multirun: bool) -> bool:
    """Return True if Hydra parses `key=value` as text, or as several values where allowed."""
    found = read(f"{key}={value}")
    if found is ...:
        return False
    if found is None or isinstance(found, str):
        return True
    is_sweep = hasattr(found, "is_sweep_override")
    return is_sweep and multirun and key not in ONE_VALUE
