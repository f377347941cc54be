"""Update this project's engine: make update FROM=<checkout or clone URL of a newer template>

Replaces src/regrow, src/hydra_plugins and tests/engine. Merges the template's changes to conf/,
scripts/, requirements, Makefile and other files into yours, except for your package, your tests and
README.md. Stages the result, or changes nothing. KEEP="<path> …" keeps your versions of these
files unmerged. MIGRATED=<n> confirms that your package fits version n of the Protocols.
"""

from __future__ import annotations

import ast
import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ("src/regrow/", "src/hydra_plugins/", "tests/engine/")
HELPERS = (
    "tests/conftest.py",
    "tests/forked.py",
    "tests/running.py",
)  # of all tests
SHARED = ("src/", "scripts/", "tests/", "conf/", "docs/", ".")  # folders of Python files of both
GENERATED = ("schemas/",)  # not merged: `make schemas` writes them again
RECORD, BASE, PATCH = ".template/record.json", ".template/base.tar.gz", ".template/lab.patch"
PROTOCOLS = "src/regrow/protocols.py"
MIGRATIONS = "docs/migrations.md"
# Path fragments to skip; they matter where git cannot tell which files are tracked.
SKIPPED = (
    *("__pycache__/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".pyc", ".egg-info/"),
    *(".ipynb_checkpoints/", ".DS_Store"),
)

Changes = dict[str, Path | None]  # by path: the file with the new content; None deletes it


class Refused(Exception):
    """The update is not possible. The message tells the user why."""


def git(folder: Path, *arguments: str, lines: Iterable[str] = (), **environment: str) -> str | None:
    """Return git's output, or None if it fails or is not installed. `lines` end with NUL."""
    # A hook's GIT_DIR would override the folder.
    its = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    clean = {key: value for key, value in os.environ.items() if key not in its}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            input=os.fsencode("".join(f"{line}\0" for line in lines)),
            capture_output=True,
            check=True,
            env=clean | {"GIT_TERMINAL_PROMPT": "0"} | environment,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout)


def files_in(root: Path, *parts: str) -> set[str]:
    """Return the files below the folders `parts` of `root`, relative to it, without SKIPPED."""
    paths = (path for part in parts or (".",) for path in (root / part).rglob("*"))
    names = (path.relative_to(root).as_posix() for path in paths if path.is_file())
    return {name for name in names if not any(part in name for part in SKIPPED)}


def engine_hash(root: Path) -> str:
    """Return the SHA-256 over the names and contents of the engine's files."""
    digest = hashlib.sha256()
    for name in sorted(files_in(root, *ENGINE)):
        content = (root / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def update(given: Mapping[str, str], folder: Path) -> list[str]:
    """Update this project and return a report. Works in `folder`. Raises Refused if it cannot."""
    source = given["FROM"]
    record = read_record(ROOT)
    refuse_edits(record)
    checkout = checkout_of(source, folder)
    refuse_other_protocols(checkout, source, given.get("MIGRATED", ""))
    theirs, base = folder / "theirs", folder / "base"
    render(checkout, record, theirs)
    new = read_record(theirs)
    if new == record:
        return [f"This project is up to date with {named(new)}."]
    if order(new["version"]) < order(record["version"]):
        raise Refused(f"FROM={source} is {named(new)}, which is older than {named(record)}.")
    with tarfile.open(ROOT / BASE) as archive:
        # Python 3.11.3 and older have no filters. The archive is this project's own.
        archive.extractall(base, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    forget_users_files(base, theirs, checkout, record["package"])
    engine: Changes = dict.fromkeys(files_in(ROOT, *ENGINE))
    engine |= {name: theirs / name for name in files_in(theirs, *ENGINE)}
    changes = engine | merged(record, new, folder, given.get("KEEP", "").split())
    changes |= {name: theirs / name for name in (RECORD, BASE)}
    changes[PATCH] = patch_of_lab(record["package"], folder)
    changes = {name: file for name, file in changes.items() if not same(ROOT / name, file)}
    put_in_place(changes, folder)
    others = sorted(set(changes) - set(engine))
    gone = [name for name in others if changes[name] is None]
    return [
        f"{named(record)} → {named(new)}. Changed, besides the engine: "
        + (", ".join(name for name in others if name not in gone) or "nothing")
        + (f". Deleted, as in the template: {', '.join(gone)}" if gone else ""),
        *changes_since(record["version"], checkout),
        *(
            [
                f"The template also changed its lab, which src/{record['package']} was made from. "
                f"Yours is as it was. To take these changes over: git apply -3 {PATCH}"
            ]
            if changes.get(PATCH)
            else []
        ),
        "All changes are staged. Next: make schemas test, then git commit -a. To go back: "
        "git reset --hard",
    ]


def read_record(root: Path) -> dict[str, Any]:
    path = root / RECORD
    if not path.is_file():
        raise Refused(f"{path} is missing: scripts/new_project.py did not make this project.")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def named(record: dict[str, Any]) -> str:
    return f"{record['template']} {record['version']} ({record['commit'][:10]})"


def refuse_edits(record: dict[str, Any]) -> None:
    """Raise Refused if the tree is not clean or the engine was edited."""
    top = git(ROOT, "rev-parse", "--show-toplevel")
    if top is None or Path(top.rstrip("\n")).resolve() != ROOT:
        raise Refused(f"{ROOT} is not the root of a git repository. Then nobody could go back.")
    said = git(ROOT, "status", "--porcelain", "-z", "-uall", "--no-renames")
    if said is None:
        raise Refused("git status failed, so your edits cannot be told.")
    status = said.split("\0")
    edited = [line[3:] for line in status if line and not line.startswith("??")]
    if edited:
        raise Refused(f"these changes are not committed: {', '.join(edited)}. Commit them first.")
    if unknown := [line[3:] for line in status if line[3:].startswith(ENGINE)]:
        raise Refused(f"git does not know these files in the engine: {', '.join(unknown)}.")
    if engine_hash(ROOT) != record["engine"]:
        last = git(ROOT, "log", "-1", "--format=%h %s", "--", *ENGINE) or ""
        raise Refused(
            f"the engine differs from {named(record)}, and your edits would be lost. The last "
            f"commit that touched it: {last.strip()}. Move the edits to src/{record['package']}."
        )


def order(version: str) -> tuple[list[int], bool]:
    """Return what sorts versions: a pre-release such as 1.0.0rc1 comes before its release."""
    numbers, rest = re.match(r"([\d.]*)(.*)", version, re.DOTALL).groups()  # type: ignore[union-attr]
    return [int(number) for number in numbers.split(".") if number], not rest


def checkout_of(source: str, folder: Path) -> Path:
    """Return the folder of a checkout, cloned if `source` is a URL."""
    checkout = Path(source).expanduser().absolute()
    if not (checkout / PROTOCOLS).is_file():
        checkout = folder / "checkout"
        clone = ("clone", "-q", "--filter=blob:none")  # with its history, for `was_shipped`
        if git(Path(), *clone, "--", source, str(checkout)) is None:
            raise Refused(f"FROM={source} is neither a checkout nor a URL that git can clone.")
    if not all((checkout / name).is_file() for name in (PROTOCOLS, "scripts/new_project.py")):
        raise Refused(f"FROM={source} is not the template.")
    return checkout


def refuse_other_protocols(checkout: Path, source: str, migrated: str) -> None:
    own, new = (protocols_version(root) for root in (ROOT, checkout))
    if own != new and migrated != str(new):
        raise Refused(
            f"FROM={source} has version {new} of the Protocols between lab and engine, and this "
            f"project has {own}. Change your package as {note_of(source)} says, and add "
            f"MIGRATED={new}."
        )


def note_of(source: str) -> str:
    """Return where to read how a lab must change: a path or a link that opens, if there is one."""
    if (Path(source).expanduser() / MIGRATIONS).is_file():
        return f"{source}/{MIGRATIONS}"
    on_github = re.fullmatch(
        r"(?:https://|ssh://git@|git@)github\.com[:/]([^/]+/[^/]+?)(?:\.git)?/?", source
    )
    if on_github:
        return f"https://github.com/{on_github[1]}/blob/HEAD/{MIGRATIONS}"
    return f"{MIGRATIONS} in a clone of {source}"


def protocols_version(root: Path) -> int:
    """Return VERSION of the module of the Protocols, without importing it."""
    for node in ast.parse((root / PROTOCOLS).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VERSION":
            return int(ast.literal_eval(node.value))
    raise Refused(f"{root / PROTOCOLS} has no VERSION.")


def render(checkout: Path, record: dict[str, Any], target: Path) -> None:
    """Write what `checkout` gives a new project of this name, so that all is renamed alike."""
    script = checkout / "scripts" / "new_project.py"
    done = subprocess.run(
        [sys.executable, script, f"name={record['title']}", f"dest={target}", "files_only=true"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode:
        raise Refused(f"{script} failed: {done.stderr.strip()}")


def forget_users_files(base: Path, theirs: Path, checkout: Path, package: str) -> None:
    """Remove from `base` what the template never had: a project begins with its user's files too.

    They would look as if the template had deleted them.
    """
    for name in files_in(base) - files_in(theirs):
        if not was_shipped(name, checkout, package):
            (base / name).unlink()


def was_shipped(name: str, checkout: Path, package: str) -> bool:
    """Return True if the history of `checkout` has a project's file."""
    path = name.replace(f"src/{package}/", "src/lab/", 1)
    return bool(git(checkout, "log", "-1", "--format=%h", "--", path))


def same(one: Path, other: Path | None) -> bool:
    """Return True if both files have the same content, or neither exists."""
    if one.is_file() and other is not None and other.is_file():
        return filecmp.cmp(one, other, shallow=False)
    return not one.is_file() and (other is None or not other.is_file())


def is_own(path: str, package: str) -> bool:
    """Return True for what no update changes: the user's package, tests and modules in the root."""
    is_test = path.startswith("tests/") and not path.startswith(ENGINE) and path not in HELPERS
    is_module = path.endswith(".py") and not path.startswith(SHARED)
    return is_test or is_module or path.startswith(f"src/{package}/")


def merged(
    record: dict[str, Any], new: dict[str, Any], folder: Path, keep: Sequence[str]
) -> Changes:
    """Return the files that the template changed, merged with the user's. Raises Refused."""
    base, theirs, result = folder / "base", folder / "theirs", folder / "merged"
    names = sorted(files_in(base) | files_in(theirs))
    if unknown := set(keep).difference(names):
        raise Refused(f"KEEP: the template has no {', '.join(sorted(unknown))}.")
    changes: Changes = {}
    conflicts: list[str] = []
    for name in names:
        if is_own(name, record["package"]) or name.startswith((*ENGINE, ".template/", "README.md")):
            continue
        own, before, now = ROOT / name, base / name, theirs / name
        if name in keep or same(before, now) or same(own, now):
            continue
        if same(own, before) or name.startswith(GENERATED):
            changes[name] = now if now.is_file() else None
        elif not (own.is_file() and now.is_file()):
            who, what = ("you", "the template") if now.is_file() else ("the template", "you")
            conflicts.append(f"{name}: {who} deleted it, and {what} changed it.")
        else:
            labels = (f"yours: {name}", named(record), f"{named(new)}: {name}")
            command = ["git", "merge-file", "-p", "--diff3", *(f"-L{label}" for label in labels)]
            files = [own, before if before.is_file() else Path(os.devnull), now]
            done = subprocess.run([*command, *files], capture_output=True)
            if done.returncode:
                text = (done.stdout or done.stderr).decode(errors="replace")
                conflicts += re.findall(r"(?ms)^<{7} .*?^>{7} [^\n]*", text) or [text]
                continue
            changes[name] = result / name
            (result / name).parent.mkdir(parents=True, exist_ok=True)
            (result / name).write_bytes(done.stdout)
            shutil.copymode(own, result / name)
    if conflicts:
        raise Refused(
            "both you and the template changed the same lines:\n\n"
            + "\n\n".join(conflicts)
            + "\n\n"
            "Write and commit the template's lines there, or add KEEP='<path> …' to keep yours."
        )
    return changes


def patch_of_lab(package: str, folder: Path) -> Path | None:
    """Write the template's changes to its lab and tests as a patch; None if there are none."""
    for side, name in (("base", "a"), ("theirs", "b")):
        (folder / name).mkdir()
        for path in files_in(folder / side):
            if is_own(path, package):
                (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / side / path, folder / name / path)
    command = [
        "git",
        "diff",
        "--no-index",
        "--no-prefix",
        "--full-index",
        "--no-ext-diff",
        "--no-color",
        "--binary",
        "a",
        "b",
    ]
    patch = folder / "lab.patch"
    patch.write_bytes(subprocess.run(command, cwd=folder, capture_output=True).stdout)
    return patch if patch.stat().st_size else None


def put_in_place(changes: Changes, folder: Path) -> None:
    """Stage and write the files. If killed, `git reset --hard` restores the last commit.

    The index changes first, in one step, so that a reset also removes new files.
    """
    written = sorted(name for name, file in changes.items() if file)
    gone = sorted(set(changes) - set(written))
    known = {Path(name) for name in (git(ROOT, "ls-files", "-z") or "").split("\0")}
    known |= {folder for name in known for folder in name.parents}
    taken = {part for name in written for part in (Path(name), *Path(name).parents)}
    in_the_way = [it for it in sorted(taken - known) if os.path.lexists(ROOT / it)]
    # A reset may leave the folders of an undone update, with what it ignores in them.
    if unknown := [str(it) for it in in_the_way if str(it) in written or not (ROOT / it).is_dir()]:
        raise Refused(f"git does not know {', '.join(unknown)}. Move it away.")
    new, index = folder / "new", {"GIT_INDEX_FILE": str(folder / "index")}
    new.mkdir()
    for name in written:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(changes[name] or "", new / name)

    def must(*arguments: str, lines: Iterable[str] = (), **environment: str) -> str:
        said = git(ROOT, *arguments, lines=lines, **environment)
        if said is None:
            raise Refused(f"git {' '.join(arguments)} failed.")
        return said.strip()

    must("read-tree", "HEAD", **index)
    must("update-index", "--force-remove", "-z", "--stdin", lines=gone, **index)
    tree = {**index, "GIT_DIR": must("rev-parse", "--absolute-git-dir"), "GIT_WORK_TREE": str(new)}
    must("update-index", "--add", "-z", "--stdin", lines=written, **tree)
    after = must("write-tree", **index)
    try:
        must("read-tree", "-m", after)
        must("checkout-index", "-f", "-u", "-z", "--stdin", lines=written)
        for name in gone:
            (ROOT / name).unlink(missing_ok=True)
    except BaseException:
        git(ROOT, "reset", "-q", "--hard")
        raise


def changes_since(version: str, checkout: Path) -> list[str]:
    """Return the sections of the CHANGELOG above that of `version`, but for empty ones."""
    path = checkout / "CHANGELOG.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    sections = re.split(r"(?m)^(?=## )", text)[1:]
    count = next((i for i, it in enumerate(sections) if it.startswith(f"## [{version}]")), 0)
    return [text for section in sections[:count] if "\n" in (text := section.strip())]


def main(arguments: Sequence[str]) -> int:
    given = dict(argument.partition("=")[::2] for argument in arguments)
    try:
        if not set(given) <= {"FROM", "KEEP", "MIGRATED"} or not given.get("FROM"):
            raise Refused("give FROM=<checkout or clone URL of a newer template>.")
        with tempfile.TemporaryDirectory(prefix="update-") as folder:
            report = update(given, Path(folder))
    except (Refused, OSError) as error:
        print(f"update: {error} Nothing was changed.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("update: stopped. Nothing was changed.", file=sys.stderr)
        return 130
    print("\n\n".join(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
