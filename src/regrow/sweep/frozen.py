"""A sweep's folder, with the frozen copy of the code from which all its jobs run.

The process that the user started chooses the folder, makes the copy, and executes the same script
of the copy. So all that a sweep composes, checks and runs, now or when it is resumed next week,
comes from the copy: edits or a switch of git branch do not affect it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from regrow.config import flags, registered
from regrow.config.command_line import command, path_of
from regrow.errors import UserError
from regrow.processes import begin, outside
from regrow.project import ROOT
from regrow.record import manifest, names, ownership, records
from regrow.sweep import ledger

DIR = "hydra.sweep.dir"
PARTS = ("src", "conf", "scripts")
# Environment variables that pass the sweep's state to the copy's script.
FOLDER, LOCK, WARM = "REGROW_SWEEP", "REGROW_SWEEP_LOCK", "REGROW_SWEEP_WARM"
IDENTITY = "REGROW_SWEEP_ID"  # the sweep's id in the list of the user's folders
SEALS = "ownership.py"  # code without this module, in whichever folder, writes no seals


def claim(
    named: Path | None,
    name: str,
    overrides: Sequence[str],
    resume: str,
    source: Mapping[str, Any] = flags.DEFAULT,
) -> records.Lock:
    """Return the acquired lock of the sweep's folder.

    The folder is the one `named`; else the newest unfinished sweep of the same command that no
    process is running; else a new one under outputs/<name>/sweeps. Raises UserError, before
    anything is written, for a named folder that holds something else or is in use, and for a sweep
    that is neither the user's nor trusted.
    """
    if named is not None:
        names.refuse_foreign_sweep(named)
        if (named / ledger.FILE).is_file() or is_copy(named / ledger.CODE):
            ownership.check_sweep(named, f"hydra.sweep.dir={named}")
        # A killed start may have left the copy, the lock and temporary files; names with a dot.
        held = [path.name for path in named.glob("[!.]*") if not is_copy(path)]
        if held and not (named / ledger.FILE).is_file():
            raise UserError(
                f"hydra.sweep.dir={named} holds no sweep, but {held[0]}. Choose another folder."
            )
        if resume == "never" and held:
            raise UserError(f"resume=never: {named} holds a sweep. Choose another folder.")
        return records.Lock(named).acquire()
    sweeps = Path("outputs", name, "sweeps")
    for folder in sorted(sweeps.glob("*/"), reverse=True) if resume != "never" else ():
        if folder.is_symlink() or not ledger.is_open(folder, overrides, source):
            continue
        try:
            ownership.check_sweep(folder, str(folder))
        except UserError as error:
            raise UserError(f"{error}. To start another sweep instead: resume=never") from None
        with contextlib.suppress(UserError):  # in use
            lock = records.Lock(folder).acquire()
            if ledger.is_open(folder, overrides, source):
                return lock
            lock.release()
    return records.Lock(records.create(Path("outputs"), f"{name}/sweeps")).acquire()


def freeze(folder: Path, source: Mapping[str, Any] = flags.DEFAULT) -> tuple[Path, str]:
    """Copy the code, and the folders that the config's `source` adds, into the sweep's folder.

    Keeps an existing copy. Returns its path and its id in the list of the user's folders, "" if
    that cannot be written. Raises UserError for code that is neither the user's nor trusted.
    """
    code = folder / ledger.CODE
    if is_copy(code) or (folder / ledger.FILE).is_file():
        entry = ownership.check_sweep(folder, str(folder))
        ownership.remove_caches(code)
        copied = flags.copied_source(code)
        if copied is not None and source != flags.in_copy(copied, code):  # a resume names copies
            refuse_another_source(folder, copied, source)
        return code, entry.id if entry is not None else adopt(folder)
    temporary = folder / f".{ledger.CODE}"  # may remain from an interrupted start
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)  # conf/local may name accounts
    ignored = shutil.ignore_patterns("*.egg-info")
    try:
        for part in (*PARTS, *manifest.own_packages(ROOT)):
            shutil.copytree(
                ROOT / part, temporary / part, ignore=ignored, ignore_dangling_symlinks=True
            )
        # Single files of a namespace package: its folders may hold data.
        for file in (*ROOT.glob("*.py"), *manifest.namespace_files(ROOT)):
            if file.is_file():  # an editor's lock is a link to nothing
                target = temporary / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target)
        copy_places(source, temporary / flags.COPIES)
        registered.write(temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # copytree lists each file that it could not copy.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise UserError(f"the code could not be copied into {folder}: {reason}") from None
    manifest.write_origin(temporary, ROOT)
    identity = entered(ownership.digest_of_code(temporary, str(folder)))
    temporary.rename(code)
    return code, identity


def copy_places(source: Mapping[str, Any], target: Path) -> None:
    """Copy the YAML files of the folders that a source adds, from which jobs are composed.

    Leaves out hidden folders and those of runs and sweeps: a source may add the current folder.
    """

    def may_hold_configs(folder: Path) -> bool:
        is_record = any((folder / name).exists() for name in manifest.OF_RECORDS)
        return not (folder.name.startswith(".") or is_record)

    for name, place in flags.folders_of(source).items():
        for root, folders, files in os.walk(place):
            folders[:] = [inner for inner in folders if may_hold_configs(Path(root, inner))]
            found = (Path(root, each) for each in files if each.endswith(".yaml"))
            for file in filter(Path.is_file, found):
                copy = target / name / file.relative_to(place)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        records.write_json(target / "source.json", source)


def refuse_another_source(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if the sweep in `folder` was composed from a different source than `now`."""
    for key in ("name", *flags.PLACES):
        if before[key] != now[key]:
            words = command(*flags.arguments_of(before), "-m", root=manifest.own_root())
            raise UserError(
                f"{folder} holds a sweep with another config or search path, which "
                f"starts with {words}. Another one needs another folder."
            )


def entered(code_sha256: str) -> str:
    """Return the id of a new entry in the list of the user's folders.

    If the list cannot be written, prints a warning and returns "".
    """
    try:
        return ownership.enter(code_sha256).id
    except OSError as error:
        print(
            f"warning: this sweep could not be listed as yours ({ownership.reason_of(error)}). It "
            "runs anyway; resuming it will need the trust=… that its command then names.",
            file=sys.stderr,
        )
        return ""


def adopt(folder: Path) -> str:
    """Enter a sweep that the user trusts, seal it as it is now, and return its id.

    If its code is older and would break the seal with its next write, prints a warning and returns
    "".
    """
    if not any((folder / ledger.CODE / "src").rglob(SEALS)):
        print(
            f"warning: {os.path.relpath(folder)} resumes with code that is older than the list of "
            "your folders. To resume it another time will need trust=… again.",
            file=sys.stderr,
        )
        return ""
    identity = entered(ownership.digest_of_code(folder / ledger.CODE, str(folder)))
    if (folder / ledger.FILE).is_file():
        ledger.write(folder, id=identity)
    return identity


def is_copy(path: Path) -> bool:
    """Return True if this is a frozen copy, not a user's folder with the same name."""
    return path.name == ledger.CODE and (path / manifest.ORIGIN).is_file()


def tell_of_edits(folder: Path) -> None:
    """Print a warning if the resumed sweep's code differs from the current code."""
    code = folder / ledger.CODE
    if is_copy(code) and manifest.code_sha256(code) != manifest.code_sha256(ROOT):
        print(
            f"warning: {os.path.relpath(folder)} resumes with the code that it started with; yours "
            "has changed since. To start with yours: resume=never, or another hydra.sweep.dir.",
            file=sys.stderr,
        )


def become(
    code: Path, identity: str, lock: records.Lock, arguments: Sequence[str], *, warm: bool
) -> NoReturn:
    """Replace this process by the same script of the frozen code, which takes over the lock.

    With `warm`, it will fork its jobs and starts the fork server at once.
    """
    assert lock.descriptor is not None
    os.set_inheritable(lock.descriptor, True)
    told = {FOLDER: str(lock.folder), LOCK: str(lock.descriptor), WARM: "1" if warm else ""}
    told[IDENTITY] = identity
    script = script_in(code.resolve())
    if (source := flags.copied_source(code)) is not None:
        given, overrides = flags.split(arguments)
        overrides = [one for one in overrides if one.partition("=")[0] != flags.SEARCH_PATH]
        places = flags.arguments_of(flags.in_copy(source, code.resolve()))
        arguments = [*flags.others(given), *places, *overrides]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, str(script), *arguments], {**os.environ, **told})


def script_in(code: Path) -> Path:
    """Return the copy's script of the same name; train.py if the copy lacks that."""
    started = Path(sys.argv[0]).resolve()
    same = code / started.relative_to(ROOT) if started.is_relative_to(ROOT) else None
    return same if same is not None and same.is_file() else code / "scripts" / "train.py"


def resume_in_copy(arguments: Sequence[str]) -> None:
    """Execute the frozen code of a sweep resumed by name, if it differs from this code.

    Otherwise Hydra would first compose this code's conf/, which may lack keys of the sweep.
    `arguments` are those that `resume.expand_sweep` returns.
    """
    named = [path_of(key, v) for key, _, v in (a.partition("=") for a in arguments) if key == DIR]
    if not named or [a for a in arguments if a.startswith("-")] != ["-m"]:
        return
    folder = Path(named[-1])
    code = folder / ledger.CODE
    if outside.started_from_outside() or flags.copied_source(code) is not None:
        return
    if is_copy(code) and manifest.code_sha256(code) != manifest.code_sha256(ROOT):
        become(*opened(folder, "", [], "auto"), arguments, warm=False)


def opened(
    named: Path | None,
    name: str,
    overrides: Sequence[str],
    resume: str,
    source: Mapping[str, Any] = flags.DEFAULT,
) -> tuple[Path, str, records.Lock]:
    """Return the code, the id and the lock of the sweep's folder: see `claim` and `freeze`."""
    begin.python_path()  # raises if a path contains the separator
    begin.refuse_separator((named or Path.cwd()).resolve())
    try:
        lock = claim(named, name, overrides, resume, source)
        tell_of_edits(lock.folder)
        return *freeze(lock.folder, source), lock
    except OSError as error:
        raise UserError(
            f"{DIR}={named or 'outputs'}: the folder cannot be written: "
            f"{error.strerror or error}. Make room in it. Choose another folder."
        ) from error


def is_entered() -> bool:
    """Return True in the process that runs a sweep's frozen copy."""
    return FOLDER in begin.handed
