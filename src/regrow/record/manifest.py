"""manifest.json: what made this run. Command, code, versions, hardware, data and seeds."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from regrow.record.folder import read_json, write_json, write_text
from regrow.record.redact import redact, redact_all

log = logging.getLogger(__name__)

NAME = "manifest.json"
ORIGIN = "origin.json"  # in a copy of the code: what it is a copy of
DIFF_BYTES = 1_000_000  # of the diff that is kept; its hash is over what was read
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
        "python": platform.python_version(),
        "packages": packages(),
        "hardware": hardware(),
        "environment": {k: os.environ[k] for k in ENVIRONMENT if k in os.environ},
        "data": data,
        "seeds": dict(seeds),
    }
    diff = now["git"].pop("diff") if now["git"] else ""
    if now["git"] is None:
        now["git_missing"] = reason = git_missing(root)
        if way_out := _WAYS_OUT.get(reason or ""):
            log.warning("the commit is not recorded: %s. %s", reason, way_out(root))
    now = redact_all(now)
    with contextlib.suppress(OSError, ValueError):
        first: dict[str, Any] = read_json(folder / NAME)
        same = {key for key, value in now.items() if first.get(key) == value}
        resume = {"step": None, **{k: v for k, v in now.items() if k not in same}}
        if accepted:
            resume["changed_data"] = dict(accepted)
        first.setdefault("resumes", []).append(resume)
        if "git" in resume and diff:
            _write_diff(folder, f"git.{len(first['resumes'])}.diff", diff, resume["git"])
        write_json(folder / NAME, first)
        return first
    if diff:
        _write_diff(folder, "git.diff", diff, now["git"])
    write_json(folder / NAME, now)
    return now


def set_step(folder: Path, step: int) -> None:
    """Note the step that the latest start went on from, once its checkpoint is read."""
    with contextlib.suppress(OSError, ValueError, LookupError):
        content = read_json(folder / NAME)
        content["resumes"][-1]["step"] = step
        write_json(folder / NAME, content)


def _write_diff(folder: Path, name: str, diff: str, entry: dict[str, Any]) -> None:
    write_text(folder / name, redact(diff))
    entry["diff"] = name


def code_changes(folder: Path, root: Path) -> str | None:
    """One line on how the code differs from the run's, or None when it does not."""
    recorded: dict[str, Any] = read_json(folder / NAME)
    recorded = {**recorded, **(recorded.get("resumes") or [{}])[-1]}
    if recorded.get("code_sha256") == code_sha256(root):
        return None
    before, after = recorded.get("git") or {}, git(root) or {}
    if before.get("commit") != after.get("commit"):
        old, new = (str(it.get("commit") or "unknown")[:10] for it in (before, after))
        return f"The code has changed since: commit {old} then, {new} now."
    return "The code has changed since: files under src, scripts or conf differ."


def code_sha256(root: Path) -> str:
    """Over names and bytes of the YAML files of conf and of the Python files of src and scripts, of
    the root and of packages there."""
    digest = hashlib.sha256()
    parts = [(part, "*.py") for part in ("src", "scripts", *own_packages(root))]
    files = [f for part, name in (*parts, ("conf", "*.yaml")) for f in (root / part).rglob(name)]
    for path in sorted([*files, *root.glob("*.py")]):
        if path.is_file():
            content = path.read_bytes()
            digest.update(
                f"{path.relative_to(root)}\0{len(content)}\0".encode("utf-8", "surrogateescape")
                + content
            )
    return digest.hexdigest()


def own_packages(root: Path) -> list[str]:
    """Packages in the root of the repository that a `_target_` may name."""
    names = [path.parent.name for path in sorted(root.glob("*/__init__.py"))]
    return [name for name in names if name not in ("src", "scripts", "tests", "benchmarks")]


def write_origin(copy: Path, root: Path) -> None:
    """Note in a `copy` of the code what `root`, of which it was made, is in git at this moment."""
    facts = origin(root) or {"root": str(root), "git": git(root)}
    if facts["git"] is None and "git_missing" not in facts:
        facts["git_missing"] = git_missing(root)
    write_json(copy / ORIGIN, redact_all(facts))


def origin(root: Path) -> dict[str, Any]:
    """What `root` is a copy of; nothing where it is none."""
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
    untracked = [line[3:] for line in (status or "").splitlines() if line.startswith("??")]
    diff = _git(root, "diff", "--no-ext-diff", "--no-color", "HEAD", limit=DIFF_BYTES) or ""
    return {
        "commit": _git(root, "rev-parse", "--verify", "-q", "HEAD"),
        "branch": _git(root, "symbolic-ref", "--short", "-q", "HEAD"),
        "remote": _git(root, "config", "--get", "remote.origin.url"),
        "dirty": None if status is None else bool(status),
        "untracked": untracked[:100],
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "diff_is_cut": len(diff.encode()) >= DIFF_BYTES,
        "diff": diff,
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


def _git(root: Path, *arguments: str, limit: int = 100_000, seconds: float = 5.0) -> str | None:
    """The first `limit` bytes that git prints, or None when it fails or takes too long."""
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
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    with process:
        assert process.stdout is not None
        output = process.stdout.read(limit)
        if len(output) == limit:  # a huge diff is never held in memory
            process.kill()
        code = process.wait()
    timer.cancel()
    if code != 0 and len(output) < limit:
        return None
    text = output.decode("utf-8", errors="replace")
    return text if arguments[0] in ("diff", "status") else text.strip() or None


def packages() -> dict[str, str]:
    """Versions of the stack's installed packages, without importing them."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    """Host, system, processor and memory; accelerators as far as torch is loaded."""
    facts: dict[str, Any] = {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
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
