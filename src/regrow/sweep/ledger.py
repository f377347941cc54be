"""Read and write the list of a sweep's jobs and the state of each, in the sweep's folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from regrow.config import flags
from regrow.config.recorded import ELSEWHERE
from regrow.errors import UserError
from regrow.record import locks, ownership, records
from regrow.record.comparison import label_of
from regrow.record.ownership import SWEEP
from regrow.record.redact import redact, redact_all

FILE = SWEEP
CODE = "code"
JOBS, LOGS = "jobs", "logs"
LOCK, RESULTS_LOCK = ".state.lock", ".results.lock"
OWN = (CODE, JOBS, LOGS, "slurm")  # the sweep's own folders, beside those of the jobs
# Groups and keys that do not change the result of a job.
ASIDE = (*ELSEWHERE, "resume", "logger", "tags", "notes", "hydra")
# A job in any other state is unfinished.
GOOD = ("completed", "pruned", "retried")  # retried: it failed and was replaced
ENDED = (*GOOD, "failed")


@dataclass(frozen=True)
class JobEntry:
    """A job, as sweep.json lists it."""

    number: int
    identity: str  # a hash of its config: equal hashes mean the same job
    swept: dict[str, str]  # the overrides that distinguish it, as typed
    folder: str  # the run's folder, relative to the sweep's
    overrides: list[str] = field(default_factory=list)  # all of them, to compose the config again

    @property
    def label(self) -> str:
        return label_of(self.swept) or "the only job"


def identity_of(cfg: DictConfig) -> str:
    """Return a hash of a job's unresolved config, without the keys in `ASIDE`.

    Resolved values may hold the job's number or the time.
    """
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    kept = {key: value for key, value in config.items() if key not in ASIDE}
    if isinstance(kept.get("data"), dict):
        kept["data"].pop("changed", None)  # applies to one start only: see changed_data.py
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """Return the content of sweep.json; empty if it does not exist yet.

    Raises UserError if it cannot be read: treated as empty, it would be overwritten.
    """
    try:
        content = records.read_json(folder / FILE)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / FILE} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{folder / FILE} is not a sweep's: a mapping is expected.")
    return content


def write(folder: Path, entries: Sequence[JobEntry] | None = None, **facts: Any) -> None:
    """Update sweep.json with these facts, and with the list of jobs if it is given."""
    with alone(folder):
        content = {**read(folder), **redact_all(facts)}
        if entries is not None:
            content["jobs"] = redact_all([asdict(entry) for entry in entries])
        records.write_json(folder / FILE, ownership.sealed(content))


def add(folder: Path, entry: JobEntry) -> None:
    """Add a job to sweep.json unless its number is listed."""
    with alone(folder):
        content = read(folder)
        if all(one["number"] != entry.number for one in content["jobs"]):
            content["jobs"].append(redact_all(asdict(entry)))
            records.write_json(folder / FILE, ownership.sealed(content))


@contextlib.contextmanager
def alone(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Lock the sweep's records: jobs on other machines write them too."""
    with (folder / name).open("wb") as lock:
        locks.wait_for(lock.fileno(), f"{folder / name}")
        yield


def entries(folder: Path) -> list[JobEntry]:
    """Return the jobs in sweep.json. Raises UserError for an entry that is not a valid job."""
    jobs = read(folder).get("jobs", [])
    found = []
    for job in jobs if isinstance(jobs, list) else [jobs]:
        try:
            entry = JobEntry(**job)
            texts = [entry.identity, entry.folder, *entry.overrides, *entry.swept]
            texts += entry.swept.values()
            fits = type(entry.number) is int and all(isinstance(text, str) for text in texts)
            fits = fits and not Path(entry.folder).is_absolute()
            fits = fits and ".." not in Path(entry.folder).parts
        except (TypeError, AttributeError):
            fits = False
        if not fits:
            raise UserError(
                f"{folder / FILE} lists {str(job)[:100]!r}, which is not a job of this folder."
            )
        found.append(entry)
    return found


def is_open(
    folder: Path, overrides: Sequence[str], source: Mapping[str, Any] = flags.DEFAULT
) -> bool:
    """Return True if `folder` has an unfinished sweep of these overrides and this source."""
    try:
        content = read(folder)
    except UserError:
        return False
    return bool(
        content
        and content.get("overrides") == redact_all(overrides)
        and flags.of_sweep(folder) == source
        and not content.get("complete")
    )


def note(folder: Path, number: int, state: str, reason: str | None = None, **more: Any) -> None:
    """Record a job's state that its run could not write, such as a kill."""
    (folder / JOBS).mkdir(exist_ok=True)
    reason = None if reason is None else redact(" ".join(reason.split()))
    records.write_json(folder / JOBS / f"{number}.json", {"state": state, "reason": reason, **more})


def forget(folder: Path, number: int) -> None:
    (folder / JOBS / f"{number}.json").unlink(missing_ok=True)


def noted(folder: Path, number: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = records.read_json(folder / JOBS / f"{number}.json")
        return content if isinstance(content, dict) else {}
    return {}


def state_of(folder: Path, entry: JobEntry) -> tuple[str, str | None]:
    """Return a job's state and, unless it ended well, the reason.

    The state is that of its run (running, completed, interrupted, failed), pruned, retried, or one
    that `note` wrote; else `waiting`.
    """
    said = noted(folder, entry.number)
    status = records.load_status(folder / entry.folder) or {}
    if status.get("state") == "completed":
        summary = folder / entry.folder / records.SUMMARY
        with contextlib.suppress(OSError, ValueError):
            if records.read_json(summary).get("pruned"):
                return "pruned", None
        return "completed", None
    if said.get("state") == "retried":
        return "retried", said.get("reason")
    if said.get("state") == "failed":
        return "failed", said.get("reason") or status.get("error")
    if status:
        return str(status["state"]), status.get("error")
    return str(said.get("state", "waiting")), said.get("reason")


def is_to_be_run(folder: Path, entry: JobEntry, *, retry: bool) -> bool:
    """Return True if the job has not ended or, with `retry`, has failed."""
    return state_of(folder, entry)[0] not in (GOOD if retry else ENDED)


def log_of(folder: Path, number: int) -> Path:
    return folder / LOGS / f"{number}.log"
