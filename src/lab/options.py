"""The trainer's settings, as frozen values. Their defaults are defined only in `conf/trainer/`."""

from __future__ import annotations

from dataclasses import dataclass

from regrow.checkpoint.writer import CheckpointOptions
from regrow.distributed.parallel import DDPOptions
from regrow.distributed.sharding import FSDPOptions


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    patience: int | None  # in evaluations
    min_delta: float


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    max_epochs: int | None
    max_steps: int | None
    max_seconds: float | None
    device: str
    devices: int | str
    strategy: str
    max_restarts: int
    timeout_seconds: float
    sync_batch_norm: bool
    activation_checkpointing: list[str]
    accumulation_steps: int
    num_threads: int | None
    keep_freed_memory: bool
    precision: str
    clip_norm: float | None
    clip_value: float | None
    ema_decay: float | None
    ema_warmup: bool
    max_skipped_steps: int
    deterministic: bool
    tf32: bool
    cudnn_benchmark: bool
    channels_last: bool
    compile: bool
    capture: str | bool  # auto or false
    detect_anomaly: bool
    find_faults: bool
    profile: bool
    eval_every_epochs: int | None
    eval_every_steps: int | None
    log_every_steps: int
    log_histograms_every_steps: int | None
    check_first_batch: bool
    progress_bar: bool
    monitor: str | None
    mode: str | None  # max or min, set when the run is built; None without a monitor
    early_stopping: EarlyStopping
    ddp: DDPOptions
    fsdp: FSDPOptions
    checkpoint: CheckpointOptions
