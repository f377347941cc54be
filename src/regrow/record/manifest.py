"""manifest.json: how a run was made. Command, code, versions, hardware, data and seeds."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from regrow.dotted import Config
from regrow.errors import listed
from regrow.project import ROOT
from regrow.record import diff
from regrow.record.diff import ORIGIN as ORIGIN
from regrow.record.records import read_damaged, read_json, write_bytes, write_json, write_text
from regrow.record.redact import redact_all

log = logging.getLogger(__name__)

NAME = "manifest.json"
# Read at the start, when few packages are imported; `note_packages` adds those imported later.
PACKAGES = (
    "torch",
    "torchvision",
    "torchmetrics",
    "hydra-core",
    "omegaconf",
    "numpy",
    "scikit-learn",
    "tensorboard",
    "wandb",
    "mlflow-skinny",
    "matplotlib",
    "optuna",
)
# Variables that change results or speed. No others are read.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTHONHASHSEED",
    "NCCL_P2P_DISABLE",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "SLURM_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
)


# Folders in the root whose Python files no `_target_` names; those of NOT_NAMESPACES only if they
# hold no `__init__.py`.
NOT_OWN = ("src", "scripts", "tests", "benchmarks")
ENTRIES = 10_000
NOT_NAMESPACES = ("conf", "docs", "data", "outputs", "multirun", "wandb", "build", "dist")


def write(
    folder: Path,
    *,
    command: Sequence[str],
    root: Path,
    data: Mapping[str, Any] | None,
    seeds: Mapping[str, Any],
    accepted: Mapping[str, Any] | None = None,
    config: Mapping[str, Config] | None = None,
) -> dict[str, Any]:
    """Write manifest.json and, for code with changes, git.diff. Returns the manifest.

    If there is a manifest, this start is added to its `resumes`; see `set_step`. `root` is the
    repository's folder, `data` the data's fingerprint. `accepted` holds the splits that changed
    since the run began and that the user accepts, with both fingerprints. `config` is the source
    that the run's config was composed from: see `flags.py`.
    """
    now: dict[str, Any] = {
        "command": shlex.join(command),
        "config": config,
        "folder": _relative(Path.cwd(), Path(origin(root).get("root", root))),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git(root),
        "code_sha256": code_sha256(root),
        "code_files": code_files(root),
        "python": platform.python_version(),
        "packages": packages(),
        "hardware": hardware(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "data": data,
        "seeds": dict(seeds),
    }
    patch = (now["git"] or {}).pop("diff", "")
    if now["git"] is None:
        now["git_missing"] = reason = git_missing(root)
        if way_out := _WAYS_OUT.get(reason or ""):
            log.warning("the commit is not recorded: %s. %s", reason, way_out(root))
    now = redact_all(now)
    if first := read(folder):
        now["packages"] = _other_versions(now["packages"], first.get("packages") or {})
        git_before = first.get("git")  # as it was before its patch had a file
        git_before = git_before and {k: v for k, v in git_before.items() if k != "diff"}
        recorded = {**first, "git": git_before}
        resume = {"step": None, **{k: v for k, v in now.items() if recorded.get(k) != v}}
        if accepted:
            resume["changed_data"] = dict(accepted)
        if not resume.get("packages"):
            resume.pop("packages", None)
        first.setdefault("resumes", []).append(resume)
        if "git" in resume and patch:
            _write_patch(folder, f"git.{len(first['resumes'])}.diff", patch, resume["git"])
        write_json(folder / NAME, first)
        return first
    if patch:
        _write_patch(folder, "git.diff", patch, now["git"])
    write_json(folder / NAME, now)
    return now


def latest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest as of the latest start, with the values that a resume changed."""
    last = (content.get("resumes") or [{}])[-1]
    packages = {**(content.get("packages") or {}), **(last.get("packages") or {})}
    return {**content, **last, "packages": packages}


def read(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json; empty if it is missing or damaged."""
    content = read_damaged(folder / NAME, {})
    for key in ("git", "code_files", "data", "packages", "hardware", "environment", "seeds"):
        if not isinstance(content.get(key), dict | None):
            log.warning("%s: its %s is damaged and not used", folder / NAME, key)
            del content[key]
    resumes = content.get("resumes", [])
    if not isinstance(resumes, list) or not all(isinstance(it, dict) for it in resumes):
        log.warning("%s: its resumes are damaged and not used", folder / NAME)
        content["resumes"] = []
    hardware = content.get("hardware") or {}
    found = hardware.get("accelerators") or []
    if not isinstance(found, list) or not all(isinstance(it, dict) for it in found):
        log.warning("%s: its accelerators are damaged and not used", folder / NAME)
        hardware["accelerators"] = []
    return content


def set_step(folder: Path, step: int) -> None:
    """Record the step that the latest start resumed from, once its checkpoint is read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content = read_json(folder / NAME)
        content["resumes"][-1]["step"] = step
        write_json(folder / NAME, content)


def note_packages(folder: Path, root: Path) -> None:
    """Add the versions of all packages that this process imported, for the latest start.

    Called at the end of a run, because reading them takes a while. Ignores all errors.
    """
    with contextlib.suppress(Exception):
        content = read_json(folder / NAME)
        found = redact_all(imported_packages(root))
        if resumes := content.get("resumes"):
            before = content.get("packages") or {}
            if other := _other_versions(found, before):
                resumes[-1]["packages"] = {**(resumes[-1].get("packages") or {}), **other}
        else:
            content["packages"] = dict(sorted({**content["packages"], **found}.items()))
        write_json(folder / NAME, content)


def _other_versions(now: Mapping[str, str], before: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in now.items() if before.get(name) != version}


def _write_patch(folder: Path, name: str, patch: str, entry: dict[str, Any]) -> None:
    write_bytes(folder / name, patch.encode("utf-8", "surrogateescape"))
    entry["diff"] = name


def code_changes(folder: Path, root: Path) -> str | None:
    """Return one line on how the code differs from the run's, or None if it does not."""
    content = read(folder)
    if not content:  # lost: no comparison possible
        return None
    recorded = latest(content)
    files, now = recorded.get("code_files"), code_files(root)
    if files is None:  # an older record, whose hash omits packages without an __init__.py
        if recorded.get("code_sha256") == code_sha256(root, namespaces=False):
            return None
        said = "files of conf, src, scripts or the root differ"
    else:
        changed = [name for name in {**files, **now} if files.get(name) != now.get(name)]
        if all(name not in files and not name.startswith(_USED_UNASKED) for name in changed):
            return None
        kinds = {
            ("differs", "differ"): [name for name in changed if name in files and name in now],
            ("is gone", "are gone"): [name for name in changed if name not in now],
            ("is new", "are new"): [name for name in changed if name not in files],
        }
        said = ", ".join(
            f"{name_some(names, key=_relevance(folder))} {one if len(names) == 1 else several}"
            for (one, several), names in kinds.items()
            if names
        )
    before, after = recorded.get("git") or {}, git(root) or {}
    if before.get("commit") != after.get("commit"):
        old, new = (str(it.get("commit") or "unknown")[:10] for it in (before, after))
        return f"The code has changed since: commit {old} then, {new} now; {said}."
    return f"The code has changed since: {said}."


# A start reads these by itself. Unchanged code and a recorded config use no other new file.
_USED_UNASKED = ("resolvers.py", "src/hydra_plugins/", "conf/hydra/", "conf/local/")


CHANGED = "The run's code has changed since."


def way_back(folder: Path, root: Path) -> str:
    """Return the end of an error: the commands that restore the code of the run in `folder`.

    The code is that of the latest start with other code than now: a start that fails is recorded
    before it does. Returns "" if all starts had this code. Says what the record does not hold.
    """
    content, folder = read(folder), folder.resolve()
    starts = [{**content, **later} for later in ({}, *content.get("resumes", []))]
    start = next((it for it in reversed(starts) if not _had_code_of(it, root)), None)
    if not content or start is None:
        return ""
    its, top = start.get("git") or {}, _git(root, "rev-parse", "--show-toplevel")
    if not its or top is None:
        reason = start.get("git_missing") or git_missing(root) or NO_REPOSITORY
        return f" {CHANGED} It was not recorded: {reason}."
    commit, at = str(its.get("commit") or ""), Path(top).parent / f"code-of-{folder.name}"
    if commit and _git(root, "cat-file", "-t", "--end-of-options", commit) != "commit":
        return f" {CHANGED} Its commit, {commit}, is not in {top}."
    is_inside = Path.cwd().is_relative_to(top)
    place = os.path.relpath(at) if is_inside else str(at)
    where = () if is_inside else ("-C", top)
    begin = ("worktree", "add", place, commit[:10]) if commit else ("init", "-q", place)
    commands = [("git", *where, *begin)]
    if its.get("diff"):
        commands.append(("git", "-C", place, "apply", str(folder / str(its["diff"]))))
    lines = "".join(f" {line}" for line in not_restored(its))
    scripts = os.path.normpath(Path(place, os.path.relpath(root, top), "scripts"))
    typed = " && ".join(map(shlex.join, commands))
    way = f"To use the run, restore its code and call the scripts in {scripts}: {typed}"
    return f" {CHANGED}{lines} {way}"


def _had_code_of(start: Mapping[str, Any], root: Path) -> bool:
    if (files := start.get("code_files")) is not None:
        return bool(files == code_files(root))
    return bool(start.get("code_sha256") == code_sha256(root, namespaces=False))  # an older record


def not_restored(git: Mapping[str, Any]) -> list[str]:
    """Return sentences on the run's code that its commit and its git.diff do not restore."""
    said = []
    if masked := git.get("redacted"):
        said.append(
            f"Its {git.get('diff', 'git.diff')} masks what looked like a secret in "
            f"{name_some(masked)}: put it back after git apply. If that refuses the "
            "patch, leave the file out with git apply --exclude=<file>."
        )
    if git.get("diff_is_cut") and (left := git.get("not_in_diff")):
        said.append(
            f"Too large for its git.diff: {name_some([*left])}. Their SHA-256 is in {NAME}."
        )
    return said


def name_some(names: Sequence[str], key: Callable[[str], Any] | None = None) -> str:
    """Return the first five names, and the number of others."""
    return listed(sorted(names, key=key), 5)


def _relevance(folder: Path) -> Callable[[str], tuple[int, str]]:
    """Return a sort key for files: first those that a run's config names, then other own code.

    The engine follows, then conf/, whose values the run recorded, then the commands.
    """
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    named = {target.rpartition(".")[0] for target in re.findall(r"_target_: *([\w.]+)", text)}
    after = ("src/regrow/", "src/hydra_plugins/", "conf/", "scripts/")

    def key(name: str) -> tuple[int, str]:
        module = name.removeprefix("src/").removesuffix(".py").replace("/", ".")
        if module in named:
            return 0, name
        return next((2 + n for n, start in enumerate(after) if name.startswith(start)), 1), name

    return key


def code_sha256(root: Path, *, namespaces: bool = True) -> str:
    """Return the SHA-256 over names and contents of the code.

    It covers the YAML files of conf and the Python files of src and scripts, of the root and of
    packages there.
    """
    digest = hashlib.sha256()
    for path in _code_paths(root, namespaces=namespaces):
        content = path.read_bytes()
        name = str(path.relative_to(root)).encode("utf-8", "surrogateescape")
        digest.update(name + f"\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def code_files(root: Path) -> dict[str, str]:
    """Return the start of the SHA-256 of each file in `code_sha256`, by its name in `root`."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in _code_paths(root)
    }


def _code_paths(root: Path, *, namespaces: bool = True) -> list[Path]:
    parts = [(part, "*.py") for part in ("src", "scripts", *own_packages(root))]
    files = [f for part, name in (*parts, ("conf", "*.yaml")) for f in (root / part).rglob(name)]
    files += namespace_files(root) if namespaces else []
    return [path for path in sorted([*files, *root.glob("*.py")]) if path.is_file()]


def own_packages(root: Path) -> list[str]:
    """Return packages in the repository's root that a `_target_` may name."""
    names = [path.parent.name for path in sorted(root.glob("*/__init__.py"))]
    return [name for name in names if name not in NOT_OWN]


OF_RECORDS = ("origin.json", "sweep.json", "manifest.json")  # mark a frozen copy, a sweep, a run


def namespace_files(root: Path) -> list[Path]:
    """Return Python files in root folders without `__init__.py`, which Python can import too.

    At most `ENTRIES` entries per folder are read, because it may hold a million images.
    """
    found = []
    for folder in sorted(root.iterdir()):
        if folder.name in (*NOT_OWN, *NOT_NAMESPACES) or (folder / "__init__.py").exists():
            continue
        queue, left = [folder], ENTRIES
        while queue:
            inner = queue.pop(0)
            if not inner.name.isidentifier() or inner.is_symlink() or not inner.is_dir():
                continue
            if (inner / "pyvenv.cfg").exists() or inner.name == "__pycache__":
                continue
            if any((inner / name).exists() for name in OF_RECORDS):
                continue
            with contextlib.suppress(OSError), os.scandir(inner) as entries:
                seen = list(itertools.islice(entries, left))
                left -= len(seen)
                queue += sorted(Path(entry) for entry in seen if entry.is_dir())
                found += [Path(entry) for entry in seen if entry.name.endswith(".py")]
    return found


def write_origin(copy: Path, root: Path) -> None:
    """Record in a `copy` of the code the git state of its `root`."""
    facts = origin(root) or {"root": str(root), "git": git(root)}
    if facts["git"] is None and "git_missing" not in facts:
        facts["git_missing"] = git_missing(root)
    patch = (facts["git"] or {}).get("diff")
    facts = redact_all(facts)
    if patch:
        facts["git"]["diff"] = patch  # already redacted, line by line, as a patch
    # ASCII, because the patch may hold bytes that are not UTF-8.
    write_text(copy / ORIGIN, json.dumps(facts, indent=2) + "\n")


def origin(root: Path) -> dict[str, Any]:
    """Return the origin of `root` if it is a copy, else {}."""
    with contextlib.suppress(OSError, ValueError):
        facts: dict[str, Any] = read_json(root / ORIGIN)
        return facts
    return {}


def own_root() -> Path:
    """Return the user's own checkout, even in a process that runs a frozen copy of it."""
    own = Path(origin(ROOT).get("root", ROOT))
    return own if (own / "scripts" / "train.py").is_file() else ROOT


def git(root: Path) -> dict[str, Any] | None:
    """Return commit, branch, remote, dirty flag and diff; None outside a repository.

    Time and size are bounded: values that take longer than a few seconds are None or omitted. For a
    copy, the values recorded when it was made are returned.
    """
    if noted := origin(root):
        facts: dict[str, Any] | None = noted["git"]
        return facts
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    status = _git(root, "status", "--porcelain")
    changes = diff.changes_of(root, Path(top))
    patch, redacted = diff.redacted(changes.patch)
    return {
        "commit": _git(root, "rev-parse", "--verify", "-q", "HEAD"),
        "branch": _git(root, "symbolic-ref", "--short", "-q", "HEAD"),
        "remote": _git(root, "config", "--get", "remote.origin.url"),
        "dirty": None if status is None else bool(status),
        "untracked": changes.untracked[:100],
        "num_untracked": len(changes.untracked),
        "num_untracked_media": changes.untracked_media,
        "diff_sha256": hashlib.sha256(changes.patch).hexdigest() if changes.patch else None,
        "diff_is_cut": bool(changes.cut),
        "redacted": redacted,
        "not_in_diff": changes.left_out,
        "not_in_diff_nor_listed": changes.not_listed,
        "submodules": submodules(Path(top)),
        "diff": patch.decode("utf-8", "surrogateescape"),
    }


NO_GIT, NO_REPOSITORY = "git is not installed", "not a git repository"
ANOTHERS = "git does not trust a checkout that another user owns"
_WAYS_OUT: dict[str, Callable[[Path], str]] = {
    NO_GIT: lambda root: "Install git.",
    ANOTHERS: lambda root: (
        "If you trust it: "
        + shlex.join(["git", "config", "--global", "--add", "safe.directory", str(root)])
    ),
}


def git_missing(root: Path) -> str | None:
    """Return the reason why `git(root)` is None, or None if git works."""
    if noted := origin(root):
        reason: str | None = noted.get("git_missing")
        return reason
    environment = {**os.environ, "LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0"}
    is_checkout = any((folder / ".git").exists() for folder in (root, *root.parents))
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--show-toplevel"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=5,
        )
    except OSError:
        return NO_GIT if is_checkout else NO_REPOSITORY
    except subprocess.TimeoutExpired:
        return "git took more than 5 seconds"
    if done.returncode == 0:
        return None
    said = done.stderr.decode("utf-8", errors="replace")
    if "dubious ownership" in said or "unsafe repository" in said:  # since git 2.35.3, and before
        return ANOTHERS
    if NO_REPOSITORY in said:
        return NO_REPOSITORY
    return " ".join(said.split())[:200] or f"git ended with {done.returncode}"


def submodules(top: Path) -> dict[str, Any]:
    """Return each submodule's commit, and whether it has changes, which are not recorded."""
    if not (top / ".gitmodules").is_file():
        return {}
    listed = _git(top, "config", "-f", ".gitmodules", "--get-regexp", r"\.path$") or ""
    found = {}
    for line in listed.splitlines():
        path = line.partition(" ")[2]
        if (top / path / ".git").exists():
            commit = _git(top / path, "rev-parse", "--verify", "-q", "HEAD")
            found[path] = {
                "commit": commit,
                "dirty": bool(_git(top / path, "status", "--porcelain")),
            }
        else:
            found[path] = {"commit": None, "dirty": None}  # not checked out
    return found


def _git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None if it fails or takes too long."""
    output = diff.run_git(root, *arguments, limit=100_000)
    if output is None:
        return None
    text = os.fsdecode(output) if arguments[0] == "rev-parse" else output.decode(errors="replace")
    return text if arguments[0] == "status" else text.strip() or None


def packages() -> dict[str, str]:
    """Return versions of the stack's installed packages, without importing them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def imported_packages(root: Path) -> dict[str, str]:
    """Return versions of the packages that this process has imported, except the code of `root`."""
    imported = {}
    for name, module in [*sys.modules.items()]:
        if "." not in name and name not in sys.stdlib_module_names:
            file = getattr(module, "__file__", None)
            imported[name] = Path(file).resolve() if file else None
    found = {}
    for one in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # a package with broken metadata has no version
            place, name = _editable(one), _header(one, "Name")
            if place is None:
                used = name in imported or not imported.keys().isdisjoint(_modules_of(one))
            else:  # its metadata may not list modules
                files = [file for file in imported.values() if file and _is_in(file, place)]
                used = any(not _is_in(file, root.resolve()) for file in files)
            if not used:
                continue
            name = re.sub(r"[-_.]+", "-", name).lower()  # spelled as in PACKAGES
            if name not in found:  # the first on the path is the imported one
                suffix = "" if place is None else _of_a_checkout(place)
                found[name] = _header(one, "Version") + suffix
    return found


def _header(one: importlib.metadata.Distribution, name: str) -> str:
    """Return a header of the package's metadata, whose parser would read the whole README too."""
    text = one.read_text("METADATA") or one.read_text("PKG-INFO") or ""
    found = re.search(rf"^{name}:(.*)$", text, re.MULTILINE)
    if found is None:
        raise LookupError(name)
    return found[1].strip()


def _modules_of(one: importlib.metadata.Distribution) -> set[str]:
    """Return the importable names of a distribution.

    Like `packages_distributions`, which takes five times as long.
    """
    if listed := one.read_text("top_level.txt"):
        return set(listed.split())
    lines = (one.read_text("RECORD") or "").splitlines()
    return {re.split(r"[,/.]", line, maxsplit=1)[0] for line in lines}


def _editable(one: importlib.metadata.Distribution) -> Path | None:
    """Return the folder of a `pip install -e`, or None."""
    told = json.loads(one.read_text("direct_url.json") or "{}")
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(told["url"].removeprefix("file://"))).resolve()


def _is_in(file: Path, folder: Path) -> bool:
    """Return True if `file` is code of the folder, and not of an environment in it."""
    return file.is_relative_to(folder) and "site-packages" not in file.parts


def _of_a_checkout(place: Path) -> str:
    commit = _git(place, "rev-parse", "--verify", "-q", "HEAD")
    return f" (editable{f', commit {commit[:10]}' if commit else ''})"


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def hardware() -> dict[str, Any]:
    """Return host, system, processor and memory; accelerators if torch is loaded."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": cores(),
        "memory_gib": None,
        "accelerators": [],
    }
    with contextlib.suppress(OSError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        facts["memory_gib"] = round(total / 2**30, 1)
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = round(properties.total_memory / 2**30, 1)
            facts["accelerators"].append({"name": properties.name, "memory_gib": memory})
        facts["cuda"] = torch.version.cuda
    elif torch is not None and torch.backends.mps.is_available():
        facts["accelerators"].append({"name": "Apple GPU (MPS)", "memory_gib": None})
    return facts


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _relative(path: Path, root: Path) -> str:
    try:
        return str(path.resolve().relative_to(root.resolve()))
    except ValueError:
        return str(path)
