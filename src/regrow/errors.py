"""The errors that are part of the interface: one line, with the key, the value and the fix."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence


class UserError(ValueError):
    """A mistake the user can fix. The message is one line; scripts print it and exit with 2."""


class DataError(UserError):
    """Invalid data. The message names the file and the row, or the example."""


class OwnCodeError(UserError):
    """The user's model, task or loss raised an error, the cause, when it was first called."""


class MachineFault(OSError):
    """The machine lacks a resource that the program needs. The message is one line."""


class SlicesTooLarge(Exception):
    """One rank has no memory for a micro-batch: all ranks must restart with smaller ones.

    `num_micro_batches` is the number of micro-batches of a step after the restart.
    """

    def __init__(self, message: str, num_micro_batches: int) -> None:
        super().__init__(message)
        self.num_micro_batches = num_micro_batches


class RunFailed(Exception):
    """The run of a rank failed at `step` because of `error`, and has logged that."""

    def __init__(self, error: Exception, step: int) -> None:
        super().__init__(str(error))
        self.error, self.step = error, step


def _shared_memory() -> str:
    try:
        found = os.statvfs("/dev/shm")
        size = f" ({found.f_blocks * found.f_frsize / 2**20:.0f} MiB)"
    except OSError:
        size = ""
    return (
        f"/dev/shm{size} is full: data workers pass batches through it. Use data.num_workers=0 or "
        "a smaller data.batch_size, or make it larger (docker run --shm-size=8g)."
    )


def _limit(name: str, unit: int = 1) -> str:
    """Return the limit as the shell's ulimit shows it; for memory, pass `unit` 1024."""
    try:
        import resource

        limit = resource.getrlimit(getattr(resource, name))[0]
        return "unlimited" if limit == resource.RLIM_INFINITY else str(limit // unit)
    except (ImportError, AttributeError):
        return "unknown"


# Messages of the kernel, torch and gloo, with what they mean here. The first match counts.
_FAULTS: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"Too many open files|received \d+ items of ancdata",
        lambda _: (
            f"no more files can be opened (ulimit -n is {_limit('RLIMIT_NOFILE')}). Raise it "
            "with ulimit -n 4096, or lower data.num_workers."
        ),
    ),
    (
        r"(?s)signal: Bus error|file </?torch_|out of shared memory|shared memory.*No space left",
        lambda _: _shared_memory(),
    ),
    (
        r"DataLoader worker \(pid \d+\) is killed by signal: Killed",
        lambda _: (
            "a data worker was killed by signal 9, most often because memory ran out. Lower "
            "data.num_workers or data.batch_size."
        ),
    ),
    (
        r"DataLoader worker \(pid \d+\) is killed by signal: ([\w ]+)",
        lambda found: (
            f"a data worker was killed ({found[1].strip().lower()}). With "
            "data.num_workers=0 the run itself shows where."
        ),
    ),
    (
        r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) exited unexpectedly",
        lambda _: (
            "a data worker ended without an error message. With data.num_workers=0 the run itself "
            "shows why."
        ),
    ),
    (
        r"can't start new thread|Resource temporarily unavailable",
        lambda _: (
            f"no more processes or threads can be started (ulimit -u is "
            f"{_limit('RLIMIT_NPROC')}). Raise it, or lower data.num_workers and "
            "trainer.num_threads."
        ),
    ),
    (
        r"DefaultCPUAllocator.*allocate (\d+) bytes",
        lambda found: (
            f"the machine has no memory left for a tensor of {int(found[1]) / 2**30:.3g} GiB. Use "
            "a smaller model or data.batch_size, or more trainer.accumulation_steps."
        ),
    ),
    (
        r"\[Errno 12\]|Cannot allocate memory|can't allocate memory|std::bad_alloc"
        r"|failed to map segment",
        lambda _: (
            f"the machine has no memory left (ulimit -v is {_limit('RLIMIT_AS', 1024)}). Raise "
            "the limit, or lower data.num_workers or data.batch_size."
        ),
    ),
    (
        r"Timed out waiting (\d+)ms for|atchdog caught collective operation timeout",
        lambda found: (
            "another process did not answer within trainer.timeout_seconds"
            + (f" ({int(found[1]) / 1000:g})" if found[1] else "")
            + ": it hangs, or a step takes longer. Look at its lines in train.log, or raise the "
            "limit."
        ),
    ),
    (
        r"No usable temporary directory found",
        lambda _: (
            "no folder takes temporary files: TMPDIR and /tmp cannot be written or are full. "
            "Set TMPDIR to a folder that has room."
        ),
    ),
    (  # disk full, read-only file system, quota exceeded
        r"^\[Errno (?:28|30|122)\] ([^:]+)(?:: '(.*)')?",
        lambda found: (
            f"{found[2]}: {found[1]}. Make room there, or choose another folder."
            if found[2]
            else found[1]
        ),
    ),
    (
        r"Unable to find (?:address|interface) for: *(\S*)|no socket interface found",
        lambda _: (
            "the processes find no network interface to communicate over. Unset or correct "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME."
        ),
    ),
)


def machine_fault(error: BaseException) -> MachineFault | None:
    """Return the machine fault behind an error or one of its causes; None for any other error."""
    for told in chain(error, suppressed=False):
        if isinstance(told, MachineFault):
            return told
        if isinstance(told, RuntimeError | OSError | MemoryError | ImportError) and not isinstance(
            told, NotImplementedError
        ):
            text = str(told)
            if isinstance(told, MemoryError):  # Python's own error has no text
                text = f"Cannot allocate memory: {text}"
            for pattern, words in _FAULTS:
                if found := re.search(pattern, text):
                    return MachineFault(words(found))
    return None


def chain(error: BaseException, *, suppressed: bool = True) -> Iterator[BaseException]:
    """Yield an error and its causes, with the contexts that `from None` suppressed or without."""
    told: BaseException | None = error
    seen: set[int] = set()  # an error that is raised again may be among its own causes
    while told is not None and id(told) not in seen:
        seen.add(id(told))
        yield told
        is_hidden = told.__suppress_context__ and not suppressed
        told = told.__cause__ or (None if is_hidden else told.__context__)


def brief(error: BaseException, most: int | None = None) -> str:
    """Return an error's text, or its type's name, in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def in_a_line(error: BaseException) -> str:
    """Return an error in one line, without torch's list of C++ frames."""
    text = str(machine_fault(error) or error).partition("Exception raised from")[0]
    return re.sub(r"\s+", " ", text).strip()


# Control characters, and those that change the direction of text: a terminal executes them.
_ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return the text with control characters escaped, except new lines and tabs.

    Names and commands may come from an untrusted folder or file.
    """
    return _ORDERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


# difflib's ratio for one letter missing, added or moved. With its default of 0.6, `test` matches
# `notes`.
SIMILAR = 0.75


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return " Did you mean …?" with the closest of `words`, or "".

    Prefers a dotted name that ends in the word, then one that begins with it, then one with a
    similar spelling, then one whose last part contains the word; the shortest of several.
    """
    others = sorted({other for other in words if other != word}, key=lambda w: (len(w), w))
    last = word.rpartition(".")[2]
    near = (
        [other for other in others if other.rpartition(".")[2] == word]
        or [other for other in others if len(word) > 2 and other.startswith(word)]
        or [
            other
            for other in difflib.get_close_matches(word, others, cutoff=SIMILAR)
            if _is_near(last, other.rpartition(".")[2])
        ]
        or [
            other
            for other in others
            if len(last) > 2 and f"_{last}_" in f"_{other.rpartition('.')[2]}_"
        ]
    )
    return f" Did you mean {near[0]}?" if near else ""


def _is_near(word: str, other: str) -> bool:
    near = difflib.get_close_matches(word, [other], cutoff=SIMILAR)
    return bool(near) or sorted(word) == sorted(other)
