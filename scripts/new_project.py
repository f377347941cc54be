"""Begin your own project: python scripts/new_project.py my_project ../my_project

Writes the lab as src/my_project, the engine (src/regrow) unchanged, and the configs, scripts and
tests that go with them. Runs, data, history and all that concerns the template alone stay behind.
Needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import update
from update import BASE, ENGINE, HELPERS, RECORD, Refused, git

ROOT = Path(__file__).resolve().parent.parent
README = Path(__file__).with_suffix(".md")
LAB = "lab"  # the package that a project renames
TITLE = "Regrow"

# A project gets these besides the engine; all of it is renamed.
PARTS = (
    f"src/{LAB}/",
    "conf/",
    "scripts/",
    ".ci/",
    ".devcontainer/",
    ".github/dependabot.yml",
    ".github/workflows/ci.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".vscode/settings.json",
    "LICENSE",
    "Makefile",
    "docs/hydra.md",
    "docs/recipes/",
    "docs/scaling.md",
    "outputs/README.md",
    "pyproject.toml",
    "requirements",
    "schemas/",
    *HELPERS,
    "tests/data/conftest.py",
    "tests/data/test_augment.py",
    "tests/data/test_sources.py",
    "tests/models/test_models.py",
    "tests/tasks/",
    "tests/test_nodes.py",
    "tests/test_schemas.py",
    "tests/training/test_arithmetic.py",
    "tests/training/test_average.py",
    "tests/training/test_optimizers.py",
    "tests/training/test_scheduler_adapter.py",
    "tests/training/test_schedules.py",
)
NOT_COPIED = ("scripts/new_project.py", "scripts/new_project.md")
# Without git's list of files, skip what these are part of.
LEFT_OUT = (
    *("__pycache__/", ".mypy_cache/", ".pytest_cache/", ".ruff_cache/", ".pyc", ".egg-info/"),
    *(".ipynb_checkpoints/", ".DS_Store"),
)

TEMPLATE_ONLY = re.compile(r"(?ms)^[ \t]*# >>> template only\n.*?^[ \t]*# <<< template only\n")
# A module's name, not the word in prose.
MODULE = re.compile(
    rf"""(?x)(?<![\w./-]) {LAB} (?=\.[\w"'{{])   # {LAB}.loop, "{LAB}."
    | (?<=from[ ]) {LAB} (?=[ ]import) | ^[ ]*import[ ] {LAB} \b
    | (?<=src/) {LAB} \b | (?<=/[ ]") {LAB} (?=") | (?<=^{LAB}:[ ]) {LAB} \b  # paths, the config
    """,
    re.MULTILINE,
)


@dataclass(frozen=True)
class Names:
    """One name in the forms that a project uses."""

    title: str  # Deep Fish
    package: str  # deep_fish

    @property
    def distribution(self) -> str:  # deep-fish
        return self.package.replace("_", "-")


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
    if title == title.lower() and " " not in title:
        title = " ".join(word.capitalize() for word in package.split("_"))
    return Names(title=title, package=package)


def who_has(package: str) -> str | None:
    """Return what else is called `package`, in words; None if the name is free."""
    if package in sys.stdlib_module_names:
        return "a module of Python"
    places = (ROOT / package, ROOT / "src" / package, ROOT / "scripts" / f"{package}.py")
    if any(place.exists() for place in places):
        return "a folder or script of this repository"
    if package in required() or importlib.util.find_spec(package) is not None:
        return "an installed or required module"
    return None


def required() -> set[str]:
    """Return the names in the lock, and modules that are imported under another name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].strip().replace("-", "_") for line in lines if "==" in line}
    return pinned | {"hydra", "hydra_plugins", "sklearn", "pil", "yaml", "google", "opentelemetry"}


def files_to_copy(root: Path) -> list[str]:
    """Return the files of a project that git tracks; without git, all of them but caches."""
    listed = (git(root, "ls-files", "-z", "--", ".") or "").split("\0")
    names = [name for name in listed if name] or [*update.files_in(root)]
    return [
        name
        for name in sorted(names)
        # A module in the root, such as a model, is the user's.
        if (name.startswith((*ENGINE, *PARTS)) or re.fullmatch(r"[^/]+\.py", name))
        if name not in NOT_COPIED
        if (root / name).is_file() and not any(part in name for part in LEFT_OUT)
        if not (name.startswith("conf/local/") and name.endswith(".yaml"))  # this machine's
    ]


def rename(text: str, new: Names) -> str:
    """Return `text` with the lab's name replaced and without what concerns the template alone."""
    return MODULE.sub(lambda found: found[0].replace(LAB, new.package), TEMPLATE_ONLY.sub("", text))


def copy_file(source: Path, target: Path, new: Names) -> None:
    content = source.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):  # e.g. an image
        content = rename(content.decode(), new).encode()
    target.write_bytes(content)
    shutil.copymode(source, target)


def write_files(folder: Path, new: Names) -> None:
    """Write the files of a project into the empty `folder`."""
    for name in files_to_copy(ROOT):
        target = folder / name.replace(f"src/{LAB}/", f"src/{new.package}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith(ENGINE):
            shutil.copy(ROOT / name, target)
        else:
            copy_file(ROOT / name, target, new)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    record = record_of(text, new)
    for key, value in (
        ("name", new.distribution),
        ("version", "0.1.0"),
        ("description", f"Experiments of {new.title}."),
    ):
        text = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{value}"', text, count=1)
    project.write_text(text, encoding="utf-8")
    if importlib.util.find_spec("ruff"):
        # A new name changes the order of imports and line breaks, and makes some texts too long.
        for command in (
            ["check", "--select", "I", "--fix-only"],
            ["format"],
            ["check", "--select", "E501", "--add-noqa"],
        ):
            subprocess.run(
                [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache", "."]
                + [f"--extend-exclude={part}" for part in ENGINE],
                cwd=folder,
                stdin=subprocess.DEVNULL,
            )
    (folder / RECORD).parent.mkdir()
    write_archive(folder, folder / BASE)
    record["engine"] = update.engine_hash(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8").format_map(record)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def record_of(project: str, new: Names) -> dict[str, str]:
    """Return what a project keeps about the template that it came from."""
    commit = (git(ROOT, "rev-parse", "HEAD") or "unknown").strip()
    if git(ROOT, "status", "--porcelain", "-uno"):
        commit += " with changes"
    version = re.search(r'(?m)^version = "(.*)"$', project)
    return {
        "template": TITLE,
        "version": version[1] if version else "unknown",
        "commit": commit,
        "title": new.title,
        "package": new.package,
    }


def write_archive(folder: Path, path: Path) -> None:
    """Write the base that later updates are merged against: all files but the engine's."""
    with gzip.GzipFile(path, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as it:
        for name in sorted(update.files_in(folder)):
            if not name.startswith((*ENGINE, ".template/")):
                info = it.gettarinfo(folder / name, name)
                info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
                with (folder / name).open("rb") as file:
                    it.addfile(info, file)


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


def make_project(name: str, destination: Path, *, files_only: bool = False) -> str:
    """Write the project and return how far git got. `destination` appears complete or not at all.

    With `files_only`, as an update needs them, the name may be in use, and git has no part in it.
    """
    new = names_of(name)
    if not files_only and (taken := who_has(new.package)):
        raise Refused(f"NAME={name!r} would hide {taken} named {new.package}. Choose another name.")
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
        write_files(half, new)
        message = f"Begin {new.title} from {update.named(update.read_record(half))}"
        done = "written" if files_only else first_commit(half, message)
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

  name=…       'Deep Fish' gives the package deep_fish; also as the first argument
  dest=…       a folder that is new or empty; also as the second argument
  files_only=… true: write the files alone, without a git repository [false]"""


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return name, dest and files_only. Raises Refused for anything else."""
    options = {"files_only": "false"}
    places = ["dest", "name"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("name", "dest", "files_only"):
            options[key] = value
        elif argument.startswith("--") or not places:
            raise Refused(f"{argument}: arguments are NAME DEST, or key=value. See --help.")
        else:
            options[places.pop()] = argument
    for key in ("name", "dest"):
        if key not in options or (key == "dest" and not options[key]):
            raise Refused(f"{key} must be given: {key}=… See --help.")
    if options["files_only"] not in ("true", "false"):
        raise Refused("files_only must be true or false.")
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
        done = make_project(options["name"], dest, files_only=options["files_only"] == "true")
    except (Refused, OSError) as error:
        print(f"new_project: {error}", file=sys.stderr)
        return 2
    new = (git(ROOT, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    new = [name for name in new if name.startswith("conf/") or re.fullmatch(r"[^/]+\.py", name)]
    if new:
        more = f" and {len(new) - 10} more" if len(new) > 10 else ""
        print(
            f"not copied, as git does not know them: {', '.join(new[:10])}{more}", file=sys.stderr
        )
        folders = dict.fromkeys(name.rpartition("/")[0] for name in new[:10])
        copies = []
        for folder in folders:
            names = [name for name in new[:10] if name.rpartition("/")[0] == folder]
            copies.append(shlex.join(["cp", *names, f"{dest / folder}/"]))
        print(f"to have them there: {' && '.join(copies)}", file=sys.stderr)
    if not importlib.util.find_spec("ruff"):
        done += "; run `make format` there, as another name makes other line breaks"
    print(f"{dest}: {done}. Next:")
    print(f"  cd {shlex.quote(str(dest))} && make test")
    print("  make train")
    print(
        "Each sets up a .venv of its own there: 6 GB on Linux, fetched from the installer's cache."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
