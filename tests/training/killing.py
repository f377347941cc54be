"""A crash harness: runs a run in forked children, kills them at given instants, restarts them.

Started in its own process: `python killing.py <request.json>`. It imports what a run needs, with
one thread, and only then forks, so that a child starts to train within milliseconds. The request
holds the config and, for each folder, when to kill: after a number of seconds, at a named point,
or some time after a checkpoint. The answer, on the last line of its output, gives the newest
checkpoint at each death, for each folder.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchmetrics.classification  # noqa: F401

from lab import loop, step
from regrow.checkpoint import writer
from regrow.config import targets
from regrow.distributed.parallel import World
from regrow.numerics import capture
from regrow.record import loggers
from regrow.runs import training

DONE, FAILED = 0, 3
PRELOADED = {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow"}


def child(config: dict[str, Any], folder: Path, prepare: Callable[[], None]) -> None:
    """Train to the end in a forked process. Never returns."""
    code = FAILED
    try:
        torch.set_num_threads(1)
        prepare()
        world = World(device=torch.device("cpu"))
        with contextlib.redirect_stderr(io.StringIO()):
            objects = training.build(config, world)
            summary = training.train(objects, config, folder, world, training.StopRequest())
        code = DONE if summary["status"] == "completed" else FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_until_killed(
    config: dict[str, Any],
    folder: Path,
    after: float | None,
    prepare: Callable[[], None],
    *,
    from_step: int = 0,
) -> bool:
    """Return True if the child ended before it was killed, `after` seconds from its start or from
    its checkpoint of `from_step`; None: not killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        child(config, folder, prepare)
    if after is not None:
        while newest_step(folder) < from_step and not over(pid):
            time.sleep(0.001)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if os.waitstatus_to_exitcode(status) != DONE:
        raise RuntimeError(f"the child ended with {status}")
    return True


def over(pid: int) -> bool:
    """Return True if a child has ended. The caller must still wait for it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


# Named points: just before and just after the n-th call of each.

POINTS: dict[str, tuple[Any, str]] = {
    "step": (step, "train_step"),
    "report": (loop, "report"),
    "evaluate": (loop, "evaluate"),
    "decide": (loop, "take_in"),
    "save": (writer.CheckpointWriter, "save"),
    "copy": (writer.CheckpointWriter, "_copy"),
    "write": (writer, "write"),
    "sync": (writer, "_sync"),
    "sync_folder": (writer, "_sync_folder"),
    "rotate": (writer, "rotate"),
    "point": (writer, "_point"),
    "rename": (Path, "rename"),
    "rmtree": (writer.shutil, "rmtree"),
    "line": (loggers.Jsonl, "log"),
    "rewind": (loggers.Jsonl, "rewind"),
    "load": (writer, "load_newest"),
    "best": (training, "take_best"),
    "test": (training, "measure_once"),
    "summary": (training.records, "write_json"),
}


def dies_at(point: str, when: str, count: int) -> Callable[[], None]:
    """Prepare a child to kill itself before or after the n-th call of a named point."""

    def prepare() -> None:
        owner, name = POINTS[point]
        function, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **named: Any) -> Any:
            calls[0] += 1
            if when == "before" and calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **named)
            if when == "after" and calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)

    return prepare


def counts_calls(answer: Path) -> Callable[[], None]:
    """Prepare a child to record how often it reached each named point."""

    def prepare() -> None:
        calls = dict.fromkeys(POINTS, 0)

        def counted(point: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **named: Any) -> Any:
                calls[point] += 1
                return function(*args, **named)

            return call

        for point, (owner, name) in POINTS.items():
            setattr(owner, name, counted(point, getattr(owner, name)))
        ends, begin = os._exit, time.time()

        def leave(code: int) -> None:
            end, last = time.time(), newest(answer.parent).stat().st_mtime
            seen = {"calls": calls, "seconds": end - begin, "last": end - last}
            answer.write_text(json.dumps(seen))
            ends(code)

        os._exit = leave  # type: ignore[assignment]

    return prepare


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def prepare() -> None:
        first()
        second()

    return prepare


# Mistakes that the comparison must detect, prepared in every child.


def without_rewind() -> None:
    loggers.Jsonl.rewind = lambda self, position, step=None: None  # type: ignore[method-assign]


def without_seeds() -> None:
    capture.seed_step = lambda value: None  # type: ignore[assignment]


def forgetful() -> None:
    """Neither the record nor MLflow's logger knows what was logged before."""
    without_rewind()
    if importlib.util.find_spec("mlflow") is not None:
        from regrow.record.mlflow_logger import Mlflow

        Mlflow._history = lambda self, keys: set()  # type: ignore[method-assign]


MISTAKES = {
    "none": lambda: None,
    "without_rewind": without_rewind,
    "without_seeds": without_seeds,
    "forgetful": forgetful,
}


def newest(folder: Path) -> Path:
    """Return a run's newest checkpoint, or its folder if there is none."""
    return max((folder / "checkpoints").glob("step_????????"), default=folder)


def newest_step(folder: Path) -> int:
    path = newest(folder)
    return 0 if path == folder else int(path.name[5:])


def main(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each job with `killed`: the newest checkpoint's step at each death, or null if the run
    had already ended. A kill is a share of an undisturbed run's seconds; a point, when, and a share
    of its calls; or a step, and a share of the seconds between an undisturbed run's last
    checkpoint and its end.
    """
    torch.set_num_threads(1)
    config, answers = request["config"], []
    for name in {*PRELOADED} & {*config["logger"]}:
        importlib.import_module(PRELOADED[name])
    targets.allow(config)  # composed by the test, which may add a folder of examples
    undisturbed = Path(request["undisturbed"])
    if not run_until_killed(config, undisturbed, None, counts_calls(undisturbed / "calls.json")):
        raise RuntimeError("killed by somebody else")
    seen = json.loads((undisturbed / "calls.json").read_text())
    for job in request["jobs"]:
        folder, killed, done = Path(job["folder"]), [], False
        mistake = MISTAKES[job["mistake"]]
        for kill in job["kills"]:
            if done:
                killed.append(None)
                continue
            match kill:
                case [str(point), when, share]:
                    call = 1 + round(share * max(0, seen["calls"][point] - 1))
                    prepare = both(mistake, dies_at(point, when, call))
                    done = run_until_killed(config, folder, None, prepare)
                case [int(step), share]:
                    after = share * seen["last"]
                    done = run_until_killed(config, folder, after, mistake, from_step=step)
                case share:
                    done = run_until_killed(config, folder, share * seen["seconds"], mistake)
            killed.append(None if done else newest_step(folder))
        if not done and not run_until_killed(config, folder, None, mistake):
            raise RuntimeError("killed by somebody else")
        answers.append({**job, "killed": killed})
    return answers


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
