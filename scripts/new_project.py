"""Write a renamed copy of this repository: python scripts/new_project.py "My Project" ../my-project

Package, configs, tests and documents carry the new name; runs, data and history stay behind. Needs
nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import io
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "regrow"
TITLE = "Regrow"

# Copied unchanged: the licence names its holders, the lock only names other projects.
KEPT = {"LICENSE", "requirements.lock"}
# Without git's list of files, skip these at the top, and the names below anywhere.
NOT_AT_TOP = {
    ".git",
    ".venv",
    ".venv.lock",
    "data",
    "dist",
    "build",
    "wandb",
    "multirun",
    "htmlcov",
}
NOWHERE = {"__pycache__", ".ipynb_checkpoints", ".idea", ".vscode", ".DS_Store", ".env"}
NO_ENDINGS = (".egg-info", "_cache", ".pyc")
NOTES_OF_OUTPUTS = {"outputs/README.md", "outputs/.gitkeep"}


class Refused(Exception):
    """The request cannot be carried out. The message is one line."""


@dataclass(frozen=True)
class Names:
    """One name in the forms that a repository uses."""

    title: str  # Deep Fish
    package: str  # deep_fish

    @property
    def distribution(self) -> str:  # deep-fish
        return self.package.replace("_", "-")

    @property
    def constant(self) -> str:  # DEEP_FISH
        return self.package.upper()

    @property
    def camel(self) -> str:  # DeepFish
        return "".join(word.capitalize() for word in self.package.split("_"))


OLD = Names(title=TITLE, package=PACKAGE)


def names_of(name: str) -> Names:
    """Return the forms of `name`. Raises Refused if it cannot name a package."""
    title = " ".join(name.split())
    package = re.sub(r"[\s.-]+", "_", title).lower()
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", package):
        raise Refused(
            f"NAME={name!r} gives no package name. Use letters, digits, spaces, - and _, "
            "a letter first: 'Deep Fish' becomes deep_fish."
        )
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        raise Refused(f"NAME={name!r} is a keyword of Python. Choose another name.")
    if package == PACKAGE:
        raise Refused(f"NAME={name!r} is this repository's own name. Choose another name.")
    if taken := who_has(package):
        raise Refused(f"NAME={name!r} would hide {taken} named {package}. Choose another name.")
    if title == title.lower() and " " not in title:
        title = " ".join(word.capitalize() for word in package.split("_"))
    return Names(title=title, package=package)


def who_has(package: str) -> str | None:
    """Return what else is called `package`, in words; None if the name is free."""
    if package in sys.stdlib_module_names:
        return "a module of Python"
    if (ROOT / package).is_dir() or (ROOT / "scripts" / f"{package}.py").exists():
        return "a folder or script of this repository"
    if package in required() or importlib.util.find_spec(package) is not None:
        return "an installed or required module"
    return None


def required() -> set[str]:
    """Return the names in the lock, and modules that are imported under another name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].strip().replace("-", "_") for line in lines if "==" in line}
    return pinned | {"hydra", "hydra_plugins", "sklearn", "pil", "yaml", "google", "opentelemetry"}


def git(folder: Path, *arguments: str) -> str | None:
    """Return git's output, or None if it fails or is not installed."""
    # A hook's GIT_DIR would override the folder.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    }
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout)


def files_to_copy(root: Path) -> list[PurePosixPath]:
    """Return the files that git tracks; without git, all but caches, runs and data."""
    listed = git(root, "ls-files", "-z", "--", ".") or ""
    names = [name for name in listed.split("\0") if name]
    if not names:
        names = [str(path.relative_to(root)) for path in walk(root)]
    return [
        path
        for path in sorted(set(map(PurePosixPath, names)))
        if (root / path).is_symlink() or (root / path).is_file()
        if path.parts[0] != "outputs" or str(path) in NOTES_OF_OUTPUTS
    ]


def walk(folder: Path, depth: int = 0) -> Iterable[Path]:
    for path in folder.iterdir():
        name = path.name
        if name in NOWHERE or name.endswith(NO_ENDINGS) or name.startswith(".coverage"):
            continue
        if depth == 0 and name in NOT_AT_TOP:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from walk(path, depth + 1)
        elif path.parent.name != "local" or path.suffix != ".yaml":  # local to this machine
            yield path


def rename(text: str, old: Names, new: Names) -> str:
    """Return `text` with every whole mention of `old` replaced; words that only contain it stay."""
    forms = {
        old.camel: new.camel,
        old.constant: new.constant,
        old.distribution: new.distribution,
        old.package: new.package,
        old.title: new.title,  # if forms are equal the title wins: Regrow alone is prose
    }
    whole = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    # Class names such as RegrowSearch start with it.
    pattern = rf"(?<![A-Za-z0-9])(?:(?:{whole})(?![A-Za-z0-9])|{old.camel}(?=[A-Z]))"

    def replacement(found: re.Match[str]) -> str:
        is_part_of_a_name = text[found.end() : found.end() + 1].isupper()
        return new.camel if is_part_of_a_name else forms[found.group()]

    return re.sub(pattern, replacement, text)


def copy_file(source: Path, target: Path, old: Names, new: Names) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(rename(str(source.readlink()), old, new))
        return
    content = source.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):  # e.g. an image
        content = rename(content.decode(), old, new).encode()
    target.write_bytes(content)
    shutil.copymode(source, target)


def fresh_changelog(new: Names, old: Names) -> str:
    return f"""# Changelog

All notable changes to {new.title}. The format is that of \
[Keep a Changelog](https://keepachangelog.com/en/1.1.0/).

## [Unreleased]

### Added

- {new.title}, begun as a copy of {old.title} on {datetime.date.today().isoformat()}.
"""


def write_copy(folder: Path, new: Names, *, without_benchmarks: bool) -> None:
    """Write the renamed files of this repository into the empty `folder`."""
    for path in files_to_copy(ROOT):
        if without_benchmarks and path.parts[0] == "benchmarks":
            continue
        if path.name in KEPT and len(path.parts) == 1:
            shutil.copy(ROOT / path, folder / path)
        else:
            copy_file(ROOT / path, folder / rename(str(path), OLD, new), OLD, new)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    project.write_text(
        text.replace(f'\nname = "{new.package}"\n', f'\nname = "{new.distribution}"\n'),
        encoding="utf-8",
    )
    (folder / "CHANGELOG.md").write_text(fresh_changelog(new, OLD), encoding="utf-8")
    if importlib.util.find_spec("ruff"):
        # A new name changes the order of imports and line breaks, and makes some texts too long.
        for command in (
            ["check", "--select", "I", "--fix-only"],
            ["format"],
            ["check", "--select", "E501", "--add-noqa"],
        ):
            subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache", "."],
                cwd=folder,
                stdin=subprocess.DEVNULL,
            )


def first_commit(folder: Path, message: str) -> str:
    """Make `folder` a repository with one commit, as far as git allows. Returns how far it got."""

    if shutil.which("git") is None:
        return "git is not installed: no repository was made"
    if git(folder, "init", "-q") is None:
        return "git init failed: no repository was made"
    git(folder, "symbolic-ref", "HEAD", "refs/heads/main")  # the branch that CI runs on
    if git(folder, "add", "-A") is None:
        return "git add failed: the repository is empty"
    if git(folder, "commit", "-q", "--no-verify", "-m", message) is None:
        return "git could not commit (are user.name and user.email set?): files are added only"
    return "one commit on main"


def make_project(name: str, destination: Path, *, without_benchmarks: bool = False) -> str:
    """Write the copy and return how far git got. `destination` appears complete or not at all."""
    new = names_of(name)
    destination = destination.expanduser().absolute()
    if destination.resolve().is_relative_to(ROOT):
        raise Refused(f"DEST={destination} lies inside this repository. Choose a folder outside.")
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise Refused(f"DEST={destination}: a file of this name exists. Choose another name.")
    if destination.is_dir() and any(destination.iterdir()):
        raise Refused(f"DEST={destination} is not empty. Choose another folder, or empty it.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        half.chmod(0o777 & ~current_umask())  # mkdtemp makes private folders
        write_copy(half, new, without_benchmarks=without_benchmarks)
        done = first_commit(half, f"{new.title}, begun as a copy of {OLD.title}")
        half.rename(destination)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return done


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


USAGE = f"""{__doc__.partition(chr(10) + chr(10))[0]}

  name=…               'Deep Fish' gives the package deep_fish; also as the first argument
  dest=…               a folder that is new or empty; also as the second argument
  without_benchmarks=… true: leave out benchmarks/, which measure the template [false]"""


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return name, dest and without_benchmarks. Raises Refused for anything else."""
    options = {"without_benchmarks": "false"}
    places = ["dest", "name"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("name", "dest", "without_benchmarks"):
            options[key] = value
        elif argument.startswith("--") or not places:
            raise Refused(f"{argument}: arguments are NAME DEST, or key=value. See --help.")
        else:
            options[places.pop()] = argument
    for key in ("name", "dest"):
        if key not in options or (key == "dest" and not options[key]):
            raise Refused(f"{key} must be given: {key}=… See --help.")
    if options["without_benchmarks"] not in ("true", "false"):
        raise Refused("without_benchmarks must be true or false.")
    return options


def main(arguments: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the terminal may lack characters of a name
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in given):
        print(USAGE)
        return 0
    try:
        options = parse(given)
    except Refused as error:
        print(f"new_project: {error}", file=sys.stderr)
        return 2
    dest = Path(options["dest"])
    try:
        without = options["without_benchmarks"] == "true"
        done = make_project(options["name"], dest, without_benchmarks=without)
    except (Refused, OSError) as error:
        print(f"new_project: {error}", file=sys.stderr)
        return 2
    new = (git(ROOT, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    if new:
        print(f"not copied, as git does not know them: {', '.join(new[:10])}", file=sys.stderr)
    if not importlib.util.find_spec("ruff"):
        done += "; run `make format` there, as another name makes other line breaks"
    print(f"{dest}: {done}. Next:")
    print(f"  cd {shlex.quote(str(dest))} && make test")
    print("  make train")
    return 0


if __name__ == "__main__":
    sys.exit(main())
