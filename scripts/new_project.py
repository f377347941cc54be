"""Begin your own project: python scripts/new_project.py my_project ../my_project

Writes the lab as src/my_project, the engine (src/regrow) unchanged, and the configs, scripts and
tests that go with them. It does not copy runs, data, git history or files that only concern the
template. Needs nothing but the standard library.
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
# Made from sections of the template's README.
ON_IMAGES, COMMANDS = Path("docs", "your_images.md"), Path("docs", "commands.md")
SECTIONS = (
    "What you type",
    "To change X, edit Y",
    "A run's folder",
    "Restoring",
    "Sweeps",
    "Different on purpose",
)
# Lines and a sentence of these that concern the template alone.
LEFT_OUT = re.compile(
    r"(?m)^python scripts/new_project\.py .*\n|^!\[.*\n\n?| \[On GPUs\]\(docs/gpu\.md\) has .*$"
)
LEAD = """\
For your own images, lay them out as `photos/cat/*.jpg` and `photos/dog/*.jpg`.
[Your model on your images](docs/your_images.md) writes a model of your own, trains it on them, and
predicts new ones. [Commands](docs/commands.md) lists all commands, and how to resume and sweep.

"""
LAB = "lab"  # the package that a project renames
TITLE = "Regrow"
SET_UP = "make setup\nsource .venv/bin/activate"

TEMPLATE_PACKAGES = ("benchmarks",)  # in the root, and not the user's

# Copied besides the engine, with the package `lab` renamed inside each file.
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
    "docs/coming_from.md",
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
TEMPLATE_FILES = ("scripts/new_project.py", "scripts/new_project.md")

TEMPLATE_ONLY = re.compile(r"(?ms)^[ \t]*# >>> template only\n.*?^[ \t]*# <<< template only\n")
# A module's name, not the word in prose.
MODULE = re.compile(
    rf"""(?x)
      (?<![\w./-]) {LAB} (?=\.[\w"'{{])  # {LAB}.loop, "{LAB}."
    | (?<=from[ ]) {LAB} (?=[ ]import)  # from {LAB} import loop
    | ^[ ]*import[ ] {LAB} \b  # import {LAB}
    | (?<=src/) {LAB} \b  # src/{LAB}
    | (?<=/[ ]") {LAB} (?=")  # ROOT / "src" / "{LAB}"
    | (?<=^{LAB}:[ ]) {LAB} \b  # {LAB}: {LAB}, in the config
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
            f"name={name!r} gives no package name. Use letters, digits, spaces, - and _, "
            "a letter first: 'Deep Fish' becomes deep_fish."
        )
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        raise Refused(f"name={name!r} is a keyword of Python. Choose another name.")
    if title == title.lower() and " " not in title:
        title = " ".join(word.capitalize() for word in package.split("_"))
    return Names(title=title, package=package)


def taken_by(package: str) -> str | None:
    """Return a description of what already uses this name, or None."""
    if package in sys.stdlib_module_names:
        return "a module of Python"
    module = f"{package}.py"
    uses = [ROOT / package, ROOT / "src" / package, ROOT / module]
    uses += [ROOT / folder / module for folder in ("scripts", "tests")]  # they import one another
    if any(path.exists() for path in uses):
        return "a folder, script or module of this repository"
    if package in required() or importlib.util.find_spec(package) is not None:
        return "an installed or required module"
    return None


def required() -> set[str]:
    """Return the names in the lock, and modules that are imported under another name."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].strip().replace("-", "_") for line in lines if "==" in line}
    return pinned | {"hydra", "hydra_plugins", "sklearn", "pil", "yaml", "google", "opentelemetry"}


def files_to_copy(root: Path) -> list[str]:
    """Return the files of a project that git tracks; if it tracks none, all of them but caches.

    Each is copied as it is now, with changes that are not committed.
    """
    names = listed_by_git(root) or [*update.files_in(root)]
    return [name for name in sorted(names) if belongs_to_a_project(root, name)]


def untracked_files(root: Path) -> list[str]:
    """Return the files that a project would hold if git tracked them."""
    if not listed_by_git(root):  # then all files are copied
        return []
    names = listed_by_git(root, "--others", "--exclude-standard")
    return [name for name in sorted(names) if belongs_to_a_project(root, name)]


def is_source(name: str) -> bool:
    """Return True for files that a run of the project may import or compose."""
    return name.endswith(".py") if not name.startswith("conf/") else name.endswith(".yaml")


def refuse_untracked(root: Path) -> None:
    """Raise Refused if a project would lack untracked modules or configs; data do not matter."""
    parts = ("src/", "scripts/", "conf/")
    found = untracked_files(root)
    names = [name for name in found if name.startswith(parts) or is_own_module(root, name)]
    if names := [name for name in names if is_source(name)]:
        add = shlex.join(["git", "-C", str(root), "add", "--", *names])
        raise Refused(
            f"git does not track {some(names)}, which would stay behind. Run `{add}`, or add "
            "untracked=copy to take such files along, or untracked=leave to do without them. "
            "Nothing was written."
        )


def some(names: Sequence[str], most: int = 10) -> str:
    """Return the first names, and the number of others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def listed_by_git(root: Path, *options: str) -> list[str]:
    """Return the files of `git ls-files`; none without git."""
    listed = git(root, "ls-files", "-z", *options, "--", ".") or ""
    return [name for name in listed.split("\0") if name]


def belongs_to_a_project(root: Path, name: str) -> bool:
    return (
        (name.startswith((*ENGINE, *PARTS)) or is_own_module(root, name))
        and name not in TEMPLATE_FILES
        and (root / name).is_file()
        and not any(part in name for part in update.SKIPPED)
        and not (name.startswith("conf/local/") and name.endswith(".yaml"))  # this machine's
    )


def is_own_module(root: Path, name: str) -> bool:
    """Return True for a module in the root and for files of a package there: the user's."""
    top, _, below = name.partition("/")
    in_package = bool(below) and (root / top / "__init__.py").is_file()
    return (in_package or (not below and name.endswith(".py"))) and top not in TEMPLATE_PACKAGES


def rename(text: str, names: Names) -> str:
    """Return `text` with the lab's name replaced and without what concerns the template alone."""
    return MODULE.sub(
        lambda found: found[0].replace(LAB, names.package), TEMPLATE_ONLY.sub("", text)
    )


def copy_file(source: Path, target: Path, names: Names) -> None:
    content = source.read_bytes()
    with contextlib.suppress(UnicodeDecodeError):  # e.g. an image
        content = rename(content.decode(), names).encode()
    target.write_bytes(content)
    shutil.copymode(source, target)


def write_files(folder: Path, names: Names, *, untracked: bool = False) -> None:
    """Write the files of a project into the empty `folder`."""
    for name in files_to_copy(ROOT) + (untracked_files(ROOT) if untracked else []):
        target = folder / name.replace(f"src/{LAB}/", f"src/{names.package}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.startswith(ENGINE):
            shutil.copy(ROOT / name, target)
        else:
            copy_file(ROOT / name, target, names)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    record = record_of(text, names)
    for key, value in (
        ("name", names.distribution),
        ("version", "0.1.0"),
        ("description", f"Experiments of {names.title}."),
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
    pages = {
        ON_IMAGES: of_readme("Your model on your images").replace(f"{SET_UP}\n", "")[1:],
        COMMANDS: rename(LEFT_OUT.sub("", of_readme(*SECTIONS)), names),
    }
    if complete := all(pages.values()):
        pages[COMMANDS] = f"# Commands, and what a run writes\n\n{pages[COMMANDS]}"
        for path, page in pages.items():
            (folder / path).write_text(page.replace("](docs/", "]("), encoding="utf-8")
    (folder / RECORD).parent.mkdir()
    write_archive(folder, folder / BASE)
    record["engine"] = update.engine_hash(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    leads = {"images": LEAD if complete else ""}
    readme = README.read_text(encoding="utf-8").format_map(record | leads)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def of_readme(*titles: str) -> str:
    """Return sections of the template's README; "" if one is missing."""
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    sections = [re.search(rf"(?ms)^## {title}$.*?(?=\s+^## |\s*\Z)", text) for title in titles]
    found = [section[0] for section in sections if section]
    return "\n\n".join(found) + "\n" if len(found) == len(titles) else ""


def record_of(project: str, names: Names) -> dict[str, str]:
    """Return what a project keeps about the template that it came from."""
    commit = (git(ROOT, "rev-parse", "HEAD") or "unknown").strip()
    if git(ROOT, "status", "--porcelain", "-uno"):
        commit += " with changes"
    version = re.search(r'(?m)^version = "(.*)"$', project)
    return {
        "template": TITLE,
        "version": version[1] if version else "unknown",
        "commit": commit,
        "title": names.title,
        "package": names.package,
    }


def write_archive(folder: Path, path: Path) -> None:
    """Write the base that later updates are merged against.

    It holds all files but the engine's, and not README.md, which is written later.
    """
    with gzip.GzipFile(path, "wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as it:
        for name in sorted(update.files_in(folder)):
            if not name.startswith((*ENGINE, ".template/")):
                info = it.gettarinfo(folder / name, name)
                info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
                with (folder / name).open("rb") as file:
                    it.addfile(info, file)


def write_schemas(folder: Path) -> None:
    """Write the schemas of conf/ again: the user's own files there have copied ones changed.

    Does nothing without the packages that this needs: a project can be made before a set-up.
    """
    subprocess.run(
        [sys.executable, "scripts/make_schemas.py"],
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def first_commit(folder: Path, message: str) -> str:
    """Make `folder` a repository with one commit, as far as git allows.

    Returns a sentence for the user: what git did.
    """
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


def make_project(
    name: str, destination: Path, *, files_only: bool = False, untracked: str = "leave"
) -> str:
    """Write the project and return what git did. `destination` appears complete or not at all.

    `files_only` is for updates: the name may be in use, and no repository is made. `untracked`
    says what becomes of files that git does not track: see `UNTRACKED`.
    """
    names = names_of(name)
    if not files_only and (taken := taken_by(names.package)):
        raise Refused(
            f"name={name!r} would hide {taken} named {names.package}. Choose another name."
        )
    destination = destination.expanduser().absolute()
    if destination.resolve().is_relative_to(ROOT):
        raise Refused(f"dest={destination} lies inside this repository. Choose a folder outside.")
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise Refused(f"dest={destination}: a file of this name exists. Choose another name.")
    if destination.is_dir() and any(destination.iterdir()):
        raise Refused(f"dest={destination} is not empty. Choose another folder, or empty it.")
    if untracked == "refuse":
        refuse_untracked(ROOT)
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        unfinished.chmod(0o777 & ~current_umask())  # mkdtemp makes private folders
        write_files(unfinished, names, untracked=untracked == "copy")
        if not files_only:
            write_schemas(unfinished)
        message = f"Begin {names.title} from {update.named(update.read_record(unfinished))}"
        done = "written" if files_only else first_commit(unfinished, message)
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return done


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


USAGE = f"""{__doc__.partition(chr(10) + chr(10))[0]}

  name=…       'Deep Fish' gives the package deep_fish; also as the first argument
  dest=…       a folder that is new or empty; also as the second argument
  untracked=…  refuse: write nothing if git does not track a module or config of yours
               copy: copy them too
               leave: leave them out [refuse; with files_only=true leave]
  files_only=… true: write only the files, without a git repository [false]

Files that git tracks are copied as they are now, uncommitted changes included. Data, runs and what
.gitignore names stay behind."""
UNTRACKED = ("refuse", "copy", "leave")


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """Return name, dest, files_only and untracked. Raises Refused for anything else."""
    options = {"files_only": "false"}
    unnamed = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("name", "dest", "files_only", "untracked"):
            options[key] = value
        else:
            unnamed.append(argument)
    missing = [key for key in ("name", "dest") if key not in options]
    for number, argument in enumerate(unnamed):
        if argument.startswith("--") or number >= len(missing):
            raise Refused(f"{argument}: arguments are NAME DEST, or key=value. See --help.")
        options[missing[number]] = argument
    for key in ("name", "dest"):
        if key not in options or (key == "dest" and not options[key]):
            raise Refused(f"{key} must be given: {key}=… See --help.")
    if options["files_only"] not in ("true", "false"):
        raise Refused("files_only must be true or false.")
    # An update compares with what git tracks in the template.
    options.setdefault("untracked", "leave" if options["files_only"] == "true" else "refuse")
    if options["untracked"] not in UNTRACKED:
        raise Refused(f"untracked must be one of {', '.join(UNTRACKED)}.")
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
    dest = Path(options["dest"]).expanduser().absolute()  # `.` becomes another folder
    try:
        files_only, choice = options["files_only"] == "true", options["untracked"]
        done = make_project(options["name"], dest, files_only=files_only, untracked=choice)
    except (Refused, OSError) as error:
        print(f"new_project: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("new_project: stopped. Nothing was written.", file=sys.stderr)
        return 130
    if choice != "copy" and (left := untracked_files(ROOT)):
        print(
            f"not copied, as git does not track them: {some(left)}\nto have them there, remove "
            f"{shlex.quote(str(dest))} and run this command again with untracked=copy",
            file=sys.stderr,
        )
    if not importlib.util.find_spec("ruff"):
        done += "; run `make format` there, as another name makes other line breaks"
    dest = dest.resolve()  # without the dots of ../my_project
    print(f"{dest}: {done}. Next:")
    print(f"  cd {shlex.quote(str(dest))} && make test")
    print("  make train")
    print("The first sets up a .venv of its own there: 6 GB on Linux.")
    if shutil.which("uv") is None:
        print("With uv on the PATH, environments share their files: they are links to its cache.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
