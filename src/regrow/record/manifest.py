"""manifest.json: what made this run. Command, code, versions, hardware, data and seeds."""

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

from regrow.record import diff
from regrow.record.diff import ORIGIN as ORIGIN
from regrow.record.folder import read_damaged, read_json, write_bytes, write_json, write_text
from regrow.record.redact import redact_all

log = logging.getLogger(__name__)

NAME = "manifest.json"
# Read at the start, when few packages are imported; `note_packages` adds what was imported.
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
    "matplotlib",
    "optuna",
)
# Variables that change results or speed. All others stay unread, whatever they hold.
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


# Folders in the root whose Python files no `_target_` names; the others only where they hold no
# `__init__.py`.
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
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write manifest.json and, for code with changes, git.diff; return the manifest.

    Where there is one already, it stays and this start is added to its `resumes`; see `set_step`.
    `root` is the repository's folder, `data` the data's fingerprint. `accepted` are the splits
    that changed since the run began, with both fingerprints, where the user accepts them. `config`
    is the source that the run's config was composed from: see `flags.py`.
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
        same = {key for key, value in now.items() if first.get(key) == value}
        resume = {"step": None, **{k: v for k, v in now.items() if k not in same}}
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
    """A manifest as of the latest start: what a resume changed in place of what was before."""
    last = (content.get("resumes") or [{}])[-1]
    packages = {**(content.get("packages") or {}), **(last.get("packages") or {})}
    return {**content, **last, "packages": packages}


def read(folder: Path) -> dict[str, Any]:
    """The content of manifest.json; empty where there is none, or none that can be used."""
    content = read_damaged(folder / NAME, {})
    for key in ("git", "data", "packages", "hardware", "environment", "seeds"):
        if not isinstance(content.get(key), dict | None):
            log.warning("%s: its %s is damaged and not used", folder / NAME, key)
            del content[key]
    resumes = content.get("resumes", [])
    if not isinstance(resumes, list) or not all(isinstance(it, dict) for it in resumes):
        log.warning("%s: its resumes are damaged and not used", folder / NAME)
        content["resumes"] = []
    return content


def set_step(folder: Path, step: int) -> None:
    """Note the step from which the latest start resumed, once its checkpoint is read."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        content = read_json(folder / NAME)
        content["resumes"][-1]["step"] = step
        write_json(folder / NAME, content)


def note_packages(folder: Path, root: Path) -> None:
    """Add the versions of all packages that this process imported, for the latest start.

    Called at the end of a run: reading them takes a third of a second. It never fails a run.
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
    """One line on how the code differs from the run's, or None when it does not."""
    content = read(folder)
    if not content:  # lost: nobody can tell
        return None
    recorded = latest(content)
    files, now = recorded.get("code_files"), code_files(root)
    if files is None:  # an older record, whose hash left out packages without an __init__.py
        if recorded.get("code_sha256") == code_sha256(root, namespaces=False):
            return None
        said = "files of conf, src, scripts or the root differ"
    else:
        changed = [name for name in {**files, **now} if files.get(name) != now.get(name)]
        if not changed:
            return None
        said = f"{name_some(changed)} differ{'s' if len(changed) == 1 else ''}"
    before, after = recorded.get("git") or {}, git(root) or {}
    if before.get("commit") != after.get("commit"):
        old, new = (str(it.get("commit") or "unknown")[:10] for it in (before, after))
        return f"The code has changed since: commit {old} then, {new} now; {said}."
    return f"The code has changed since: {said}."


def name_some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def code_sha256(root: Path, *, namespaces: bool = True) -> str:
    """Over names and bytes of the YAML files of conf and of the Python files of src and scripts, of
    the root and of packages there."""
    digest = hashlib.sha256()
    for path in _code_paths(root, namespaces=namespaces):
        content = path.read_bytes()
        name = str(path.relative_to(root)).encode("utf-8", "surrogateescape")
        digest.update(name + f"\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def code_files(root: Path) -> dict[str, str]:
    """The start of each file's SHA-256, by its name in `root`: what `code_sha256` is over."""
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
    """Packages in the root of the repository that a `_target_` may name."""
    names = [path.parent.name for path in sorted(root.glob("*/__init__.py"))]
    return [name for name in names if name not in NOT_OWN]


OF_RECORDS = ("origin.json", "sweep.json", "manifest.json")  # a frozen copy, a sweep, a run


def namespace_files(root: Path) -> list[Path]:
    """Python files in folders of the root that have no `__init__.py`: Python imports them, too.

    Of each folder so many entries are looked at, since it may as well hold a million images.
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
    """Note in a `copy` of the code what `root`, of which it was made, is in git at this moment."""
    facts = origin(root) or {"root": str(root), "git": git(root)}
    if facts["git"] is None and "git_missing" not in facts:
        facts["git_missing"] = git_missing(root)
    patch = (facts["git"] or {}).get("diff")
    facts = redact_all(facts)
    if patch:
        facts["git"]["diff"] = patch  # redacted line by line: it is still a patch
    # As ASCII: the patch may hold bytes that are not UTF-8.
    write_text(copy / ORIGIN, json.dumps(facts, indent=2) + "\n")


def origin(root: Path) -> dict[str, Any]:
    """The origin of `root` if it is a copy; else empty."""
    with contextlib.suppress(OSError, ValueError):
        facts: dict[str, Any] = read_json(root / ORIGIN)
        return facts
    return {}


def own_root() -> Path:
    """The user's own checkout, also in a process that runs a frozen copy of it."""
    root = Path(__file__).resolve().parents[3]
    own = Path(origin(root).get("root", root))
    return own if (own / "scripts" / "train.py").is_file() else root


def git(root: Path) -> dict[str, Any] | None:
    """Commit, branch, remote, whether there are changes, and the diff; None outside a repository.

    Time and size are bounded: what does not come within seconds is null or left out. Of a copy,
    what was noted when it was made.
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
    found = {
        "commit": _git(root, "rev-parse", "--verify", "-q", "HEAD"),
        "branch": _git(root, "symbolic-ref", "--short", "-q", "HEAD"),
        "remote": _git(root, "config", "--get", "remote.origin.url"),
        "dirty": None if status is None else bool(status),
        "untracked": changes.untracked[:100],
        "diff_sha256": hashlib.sha256(changes.patch).hexdigest() if changes.patch else None,
        "diff_is_cut": bool(changes.cut),
        "redacted": redacted,
        "not_in_diff": changes.left_out,
        "not_in_diff_nor_listed": changes.not_listed,
        "submodules": submodules(Path(top)),
        "diff": patch.decode("utf-8", "surrogateescape"),
    }
    return found


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
    """The reason why `git(root)` is None, or None where git answers."""
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
    """The commit of each submodule, and whether it has changes, which are not recorded."""
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


def _git(root: Path, *arguments: str, limit: int = 100_000) -> str | None:
    """The output of git, or None if it fails or takes too long."""
    output = diff.run_git(root, *arguments, limit=limit)
    if output is None:
        return None
    text = os.fsdecode(output) if arguments[0] == "rev-parse" else output.decode(errors="replace")
    return text if arguments[0] == "status" else text.strip() or None


def packages() -> dict[str, str]:
    """Versions of the stack's installed packages, without importing them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def imported_packages(root: Path) -> dict[str, str]:
    """Versions of the packages that this process has imported, the code of `root` aside."""
    imported = {}
    for name, module in [*sys.modules.items()]:
        if "." not in name and name not in sys.stdlib_module_names:
            file = getattr(module, "__file__", None)
            imported[name] = Path(file).resolve() if file else None
    found = {}
    for one in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # one whose metadata is broken has no version
            place = _editable(one)
            if place is None:
                used = not imported.keys().isdisjoint(_modules_of(one))
            else:  # its metadata may list no module
                files = [file for file in imported.values() if file and _is_in(file, place)]
                used = any(not _is_in(file, root.resolve()) for file in files)
            name = re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()  # as PACKAGES has them
            if used and name not in found:  # the first on the path is the one that is imported
                found[name] = one.version + ("" if place is None else _of_a_checkout(place))
    return found


def _modules_of(one: importlib.metadata.Distribution) -> set[str]:
    """Names that can be imported of it. As `packages_distributions`, which takes five times as
    long."""
    if listed := one.read_text("top_level.txt"):
        return set(listed.split())
    lines = (one.read_text("RECORD") or "").splitlines()
    return {re.split(r"[,/.]", line, maxsplit=1)[0] for line in lines}


def _editable(one: importlib.metadata.Distribution) -> Path | None:
    """The folder that it was installed from with `pip install -e`, if it was."""
    told = json.loads(one.read_text("direct_url.json") or "{}")
    if not told.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(told["url"].removeprefix("file://"))).resolve()


def _is_in(file: Path, folder: Path) -> bool:
    """Return True if it is code of the folder, and not of an environment there."""
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
    """Host, system, processor and memory; accelerators as far as torch is loaded."""
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
