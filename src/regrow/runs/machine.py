"""The device and the switches of this process."""

from __future__ import annotations

import os
import shutil
import sys

import torch

from regrow.dotted import Checked
from regrow.errors import UserError
from regrow.numerics import memory
from regrow.record import manifest


def resolve_device(name: str, index: int = 0) -> torch.device:
    """Return the device for `name`; `auto` takes CUDA, then MPS, then the CPU.

    `index` is the local rank. Raises UserError if the machine lacks the device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise UserError(
            f"trainer.device={name}: this machine has no such device that torch "
            f"{torch.__version__} can use. Use trainer.device=auto or trainer.device=cpu."
        )
    if name == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"trainer.devices: process {index + 1} of this machine has no GPU of its own; there "
            f"are {torch.cuda.device_count()}. Start as many processes, or use trainer.device=cpu."
        )
    return torch.device(name, index) if name == "cuda" else torch.device(name)


def set_numerics(trainer: Checked, device: torch.device) -> None:
    """Set this process's switches that results and speed depend on, from the node `trainer`."""
    if trainer["precision"] == "fp16" and device.type != "cuda":
        raise UserError(
            f"trainer.precision=fp16 needs CUDA, and the device is {device.type}. "
            "Use trainer.precision=bf16."
        )
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if trainer["compile"] and device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"trainer.compile=true needs a C++ compiler on a CPU, and there is no {compiler}. "
            "Install one, name it in CXX, or use trainer.compile=false."
        )
    torch.set_num_threads(trainer["num_threads"] or usable_cores())
    if trainer["keep_freed_memory"] and device.type == "cpu":
        memory.keep_freed_memory()
    torch.backends.cudnn.benchmark = trainer["cudnn_benchmark"]
    torch.set_float32_matmul_precision("high" if trainer["tf32"] else "highest")
    torch.backends.cudnn.allow_tf32 = trainer["tf32"]
    if trainer["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != trainer["deterministic"]:
        torch.use_deterministic_algorithms(trainer["deterministic"])  # slow: imports the compiler
    torch.autograd.set_detect_anomaly(trainer["detect_anomaly"])


def usable_cores() -> int:
    """Return the number of cores that this process may use, its share if it is one of several."""
    cores = manifest.cores()
    given = os.environ.get("SLURM_CPUS_PER_TASK")  # srun may not bind the task to its cores
    if given and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return min(cores, int(given))
    cores = min(cores, int(given)) if given else cores
    return max(1, cores // processes_here())


def processes_here() -> int:
    """Return the number of the run's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))
