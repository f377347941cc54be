"""Submit jobs to Slurm with submitit. Before a job's time is up, it saves and is requeued."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config.job import Job
from regrow.dotted import Checked
from regrow.errors import MachineFault, UserError
from regrow.processes import outside
from regrow.processes.begin import SAFE_PATH, python_path
from regrow.processes.ranks import STOPPED
from regrow.processes.signals import STOPPING, handled
from regrow.record import names, records

EARLY = 60  # Slurm may send the signal up to this many seconds early


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """The request of a job to Slurm. An option without a unit in its name is sbatch's own."""

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    mem_gb: float | None
    timeout_minutes: int
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    save_seconds: int
    max_timeouts: int
    jobs: int | str | None
    setup: list[str]
    sbatch: dict[str, Any] | None


def check(options: SlurmOptions, trainer: Checked) -> None:
    """Raise UserError for options that Slurm rejects, or that fail once the job starts."""
    if is_missing():
        raise UserError(
            "launcher=slurm: there is no sbatch on this machine. Submit from one that has it, or "
            "leave out launcher to run here."
        )
    check_request(options, trainer)


def is_missing() -> bool:
    return shutil.which("sbatch") is None


def check_request(options: SlurmOptions, trainer: Checked) -> None:
    """Do what `check` does on a machine without Slurm."""
    if options.jobs == "auto":
        raise UserError("launcher.jobs=auto: Slurm takes a number, or null for as many as it lets.")
    if options.nodes > 1 and options.tasks_per_node == 1 and trainer["devices"] != 1:
        raise UserError(
            f"launcher.nodes={options.nodes}: the processes of several machines are started by "
            "Slurm. Use launcher=slurm_nodes."
        )
    if 60 * options.timeout_minutes <= options.save_seconds + EARLY:
        raise UserError(
            f"launcher.timeout_minutes={options.timeout_minutes}: the run would be told to save "
            f"({options.save_seconds} seconds before, up to {EARLY} earlier) as it starts. Raise "
            "it, or lower launcher.save_seconds."
        )
    if options.tasks_per_node not in (1, trainer["devices"]):
        raise UserError(
            f"launcher.tasks_per_node={options.tasks_per_node}: trainer.devices="
            f"{trainer['devices']} processes run on each machine. Give the same number to both."
        )
    lines = [f"{k}={v}" for k, v in {**vars(options), **(options.sbatch or {})}.items()
             if k != "setup" and re.search(r"[\r\n]", str(v))]  # fmt: skip
    if lines:  # sbatch's script would execute the second line
        raise UserError(f"launcher: {lines[0]!r} has more than one line.")
    asks = options.gpus_per_node or any(
        "gpu" in f"{k}={v}" for k, v in (options.sbatch or {}).items()
    )
    if trainer["device"] == "cuda" and not asks:
        raise UserError(
            "trainer.device=cuda: the job asks Slurm for no GPU. Add launcher.gpus_per_node=…"
        )


def queued(folder: Path) -> str | None:
    """Return the Slurm job of this run's folder that is queued or running, or None."""
    ids = [file.name.split("_")[0] for file in folder.glob("slurm/*_submission.sh")]
    if not ids:
        return None
    command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(ids)}"]
    # squeue fails if it knows none of them.
    answer = subprocess.run(command, capture_output=True, encoding="utf-8")
    return next(iter(answer.stdout.split()), None)


def submit(job: Job, options: SlurmOptions) -> str:
    """Submit the job to run in its folder, and return Slurm's job number.

    Raises UserError if the run is queued already, or with sbatch's message.
    """
    assert job.folder is not None
    folder = Path(job.folder).resolve()
    if (waiting := queued(folder)) is not None:
        raise UserError(
            f"{job.folder} is queued already. To submit it again, cancel that: scancel {waiting}"
        )
    with submitting(folder / "slurm", options, job.config["name"]) as executor:
        return str(executor.submit(SrunTask(write_job(job))).job_id)


def submit_array(
    jobs: Mapping[int, Job], options: SlurmOptions, sweep: Path, name: str
) -> dict[int, str]:
    """Submit the sweep's jobs as one array, and return Slurm's job number of each.

    Both mappings are by the sweep's number. Raises UserError with sbatch's message.
    """
    with submitting(sweep.resolve() / "slurm", options, name) as executor:
        tasks = {n: SrunTask(write_job(job), (sweep.resolve(), n)) for n, job in jobs.items()}
        with executor.batch():
            submitted = {n: executor.submit(task) for n, task in tasks.items()}
        return {n: str(job.job_id) for n, job in submitted.items()}


def write_job(job: Job) -> Path:
    """Write the job to a file in its run's folder, which its processes read; return the path."""
    file = Path(str(job.folder)).resolve() / "slurm" / "job.json"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # may hold API keys
    (file.parents[1] / names.LOCK).touch()  # marks it as a run's folder: see `names`
    file.with_name("restarts").unlink(missing_ok=True)
    # A requeued job must resume; `launch.submit` has checked `resume` before.
    records.write_text(file, job.started_again().to_json(), private=True)
    return file


@contextlib.contextmanager
def submitting(folder: Path, options: SlurmOptions, name: str) -> Iterator[Any]:
    """Yield submitit's executor with its files in `folder`, removed again if sbatch rejects a job.

    Raises UserError with sbatch's message.
    """
    import submitit

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    before = {*folder.glob("*"), *folder.glob(".*")}
    executor = submitit.SlurmExecutor(folder, max_num_timeout=options.max_timeouts)
    named = {"partition": options.partition, "account": options.account}
    named |= {"qos": options.qos, "constraint": options.constraint}
    if options.mem_gb is not None:
        named["mem"] = f"{round(1024 * options.mem_gb)}M"
    executor.update_parameters(
        job_name=re.sub(r"[^\w.-]+", "_", name)[:64],
        nodes=options.nodes,
        ntasks_per_node=options.tasks_per_node,
        cpus_per_task=options.cpus_per_task,
        time=options.timeout_minutes,
        signal_delay_s=options.save_seconds,
        setup=[
            *options.setup,
            f"export PYTHONPATH={shlex.quote(python_path())}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export {SAFE_PATH}=1",  # the current folder may shadow Python's own modules
        ],
        stderr_to_stdout=True,
        srun_args=["--kill-on-bad-exit=1", f"--cpus-per-task={options.cpus_per_task}"],
        additional_parameters={"requeue": True, **(options.sbatch or {})},
        **{name: value for name, value in named.items() if value is not None},
        **({"array_parallelism": options.jobs} if options.jobs else {}),
        **({"gpus_per_node": options.gpus_per_node} if options.gpus_per_node else {}),
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints the message as well
            yield executor
    except submitit.core.utils.FailedJobError as error:
        for left in {*folder.glob("*"), *folder.glob(".*")} - before:
            if re.fullmatch(
                r"job\.json|\d+_.*|\.?(submission_file_)?[0-9a-f-]+\.(pkl|sh)", left.name
            ):
                left.unlink()
        with contextlib.suppress(OSError):  # files of an earlier job may remain
            folder.rmdir()
        raise UserError(f"launcher=slurm: {why_refused(str(error))}") from None


def why_refused(said: str) -> str:
    """Return sbatch's message in one line, or advice if it finds no cluster."""
    lines = [re.sub(r"^sbatch: (error|fatal): ", "", line) for line in said.splitlines()]
    words = " ".join("; ".join(line for line in lines if line).split())
    if re.search("configuration source|contact slurm controller", words):
        return (
            "sbatch finds no cluster from this machine. Submit from one that belongs to it, or "
            "leave out launcher to run here."
        )
    return words


def waiting_or_running(numbers: Sequence[str]) -> set[str]:
    """Return those of Slurm's job numbers that are queued or running.

    Raises MachineFault if Slurm does not answer.
    """
    if not numbers:
        return set()
    command = ["squeue", "--noheader", "--array", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, encoding="utf-8")
    if answer.returncode:
        raise MachineFault(f"launcher=slurm: {why_refused(answer.stderr)}")
    # Print an array's jobs as 12_3; Slurm also has separate numbers for them.
    return set(answer.stdout.split()) & set(numbers)


class SrunTask:
    """A task of srun: one rank of the run, or all of them if it is the only task."""

    def __init__(self, job: Path, sweep: tuple[Path, int] | None = None) -> None:
        self.job = job
        self.sweep = sweep  # its folder, and the job's number in it
        self.process: subprocess.Popen[bytes] | None = None
        self.signalled = False

    def __call__(self) -> None:
        """Run to the end. Raises SystemExit if the process fails or is stopped."""
        with handled([signal.SIGUSR2], signal.SIG_IGN):  # only for submitit, not the child
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "regrow.runs.child"],
                env={
                    **{key: value for key, value in os.environ.items() if key != SAFE_PATH},
                    **outside.srun_environment(),
                    "REGROW_JOB": str(self.job),
                    "REGROW_PARENT": str(os.getpid()),
                },
            )
        for number in STOPPING:
            signal.signal(number, self.forward)
        code = self.process.wait()
        is_first = os.environ["SLURM_PROCID"] == "0"
        if is_first and self.sweep is not None:
            told = [*map(str, self.sweep), str(code)]
            subprocess.run([sys.executable, "-P", "-m", "regrow.sweep.finish", *told])
        if code == 0:
            if is_first:
                self.job.unlink(missing_ok=True)
            return
        if self.signalled or code in STOPPED:
            if not is_first:
                return  # failing would end the first task, which must requeue the job
            if is_preempted():
                requeue("preempted")
        elif int(os.environ["SLURM_NTASKS"]) > 1:
            if code == 2:  # a user's error would only recur
                self.refused.touch()
            time.sleep(2)  # the task that made this one fail needs time to write its file
            if self.may_start_again():
                self.start_again()
        raise SystemExit(code if code > 0 else 128 - code)

    def forward(self, number: int, frame: object = None) -> None:
        assert self.process is not None
        self.signalled = True
        self.process.send_signal(number)

    def checkpoint(self) -> Any:
        """Stop cleanly and return the resubmission; submitit calls this before time is up."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # __call__ is past its end already
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # __call__ waits
        return submitit.helpers.DelayedSubmission(SrunTask(self.job, self.sweep))

    @property
    def refused(self) -> Path:
        return self.job.with_name(f"refused-{os.environ['SLURM_JOB_ID']}")

    def may_start_again(self) -> bool:
        """Return True if trainer.max_restarts allows it, or a rank ran out of memory."""
        if self.refused.exists():
            return False
        job = Job(**json.loads(self.job.read_text(encoding="utf-8")))
        return self.out_of_memory() or self.restarts() < job.config["trainer"]["max_restarts"]

    def restarts(self) -> int:
        counter = self.job.with_name("restarts")
        return int(counter.read_text(encoding="utf-8")) if counter.is_file() else 0

    def out_of_memory(self) -> bool:
        return "num_micro_batches" in (records.load_status(self.job.parents[1]) or {})

    def start_again(self) -> None:
        """Requeue all tasks. Each failing task calls this; only the first call has an effect."""
        number = os.environ.get("SLURM_RESTART_COUNT", "0")
        with contextlib.suppress(FileExistsError):
            self.job.with_name(f"failed-{os.environ['SLURM_JOB_ID']}.{number}").touch(
                exist_ok=False
            )
            if not self.out_of_memory():
                records.write_text(self.job.with_name("restarts"), str(self.restarts() + 1))
            assert self.process is not None
            requeue(f"task {os.environ['SLURM_PROCID']} ended with {self.process.returncode}")
        time.sleep(60)  # Slurm ends this task and all others meanwhile


def is_preempted() -> bool:
    """Return True if Slurm preempts this job, which then must requeue itself."""
    command = ["scontrol", "show", "job", os.environ["SLURM_JOB_ID"]]
    said = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace").stdout
    return re.search(r"\bPreemptTime=\d", said) is not None


def requeue(reason: str) -> None:
    """Requeue this job, which then resumes from the last checkpoint."""
    print(f"{reason}: going back to the queue", flush=True)
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
