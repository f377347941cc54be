"""Words from other templates and Hydra's plug-ins, each with its equivalent here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OF_SHAPE = ("crop_size", "image_size", "img_size", "input_size")
# A word, as a key or as a part of one, and its equivalent here. Most are from
# lightning-hydra-template and Lightning's Trainer.
WORDS = {
    "accelerator": "trainer.device=cpu, cuda or mps",
    "accumulate_grad_batches": "trainer.accumulation_steps",
    "auto_lr_find": "scripts/find_lr.py",
    "callbacks": "trainer.checkpoint, trainer.early_stopping and trainer.progress_bar",
    "check_val_every_n_epoch": "trainer.eval_every_epochs",
    "ckpt_path": "resume=RUN to resume a run, init_from=RUN for its weights alone, and "
    "scripts/evaluate.py run=RUN to evaluate it",
    "data_dir": "data.root",
    "datamodule": "the group data",
    **dict.fromkeys(("default_root_dir", "log_dir", "save_dir", "work_dir"), "hydra.run.dir"),
    "enable_checkpointing": "trainer.checkpoint",
    "enable_progress_bar": "trainer.progress_bar",
    "epochs": "trainer.max_epochs",
    **dict.fromkeys(("exp_name", "experiment_name", "run_name"), "name"),
    "extras": "trainer.progress_bar, tags and notes: the config is always printed and tags may be "
    "empty",
    "fast_dev_run": "debug=fast",
    "gpus": "trainer.devices",
    "gradient_accumulation_steps": "trainer.accumulation_steps",
    "gradient_clip_algorithm": "trainer.clip_norm, or trainer.clip_value to clip by value",
    "gradient_clip_val": "trainer.clip_norm, or trainer.clip_value to clip by value",
    **dict.fromkeys(
        OF_SHAPE,
        "data.input_shape='[channels,height,width]', such as data.input_shape='[3,64,64]'",
    ),
    "hparams_search": "-m sweep=optuna with sweep.params, which an experiment may set",
    "learning_rate": "optimizer.lr",
    "load_from_checkpoint": "init_from=RUN for the weights of a run, resume=RUN to resume it",
    "limit_train_batches": "data.limit_train, which counts examples",
    **dict.fromkeys(
        ("limit_val_batches", "limit_test_batches"),
        "data.source of data=synthetic, or debug=fast: an evaluation takes its whole split",
    ),
    "log_every_n_steps": "trainer.log_every_steps",
    "lr_scheduler": "the group scheduler",
    "max_grad_norm": "trainer.clip_norm",
    "max_time": "trainer.max_seconds",
    "min_epochs": "trainer.early_stopping.patience: a run ends no earlier than that allows",
    "min_steps": "trainer.early_stopping.patience: a run ends no earlier than that allows",
    "model_checkpoint": "trainer.checkpoint",
    "net": "the group model, whose keys are the network's own",
    "num_nodes": "launcher=slurm_nodes with launcher.nodes, or torchrun",
    "num_processes": "trainer.devices",
    "optimized_metric": "sweep.metric, or trainer.monitor",
    "output_dir": "hydra.run.dir",
    "overfit_batches": "debug=overfit",
    "paths": "hydra.run.dir for the run and data.root for the data",
    "print_config": "nothing to set: the config is always printed, and whole in train.log",
    "profiler": "debug=profile, or trainer.profile",
    "resume_from_checkpoint": "resume=RUN",
    "save_last": "nothing to set: the last checkpoint is always kept",
    "save_top_k": "trainer.checkpoint.keep_best",
    "seed_everything": "seed",
    "strict": "init_from=RUN, which says what fits",
    "task_name": "name",
    "test": "scripts/evaluate.py run=RUN: a run always ends with the test split, if there is one",
    "train": "scripts/evaluate.py run=RUN to evaluate without training",
    "val_check_interval": "trainer.eval_every_steps",
}

# Options of other templates, by group.
OPTIONS = {
    "debug": {"default": "fast", "fdr": "fast", "limit": "fast", "profiler": "profile"},
    "trainer": {
        "ddp_sim": "ddp trainer.device=cpu trainer.devices=2",
        "mps": "default trainer.device=mps",
    },
    "logger": {"many_loggers": "[csv,tensorboard,wandb]"},
}

# Groups of each of which a run has one option.
GROUPS = (
    *("data", "task", "loss", "model", "optimizer", "scheduler", "step", "trainer"),
    *("launcher", "sweep"),
)
# Groups whose files hold values of other groups. None is chosen by default.
RECIPES = ("experiment", "debug", "local")
# How to choose no option of a group.
NONE = {
    "logger": "For none beside metrics.jsonl, which is always written: 'logger=[]'",
    "scheduler": "For a learning rate that stays: scheduler=constant",
    "launcher": "For a run in this terminal: launcher=local",
}


def as_shape(argument: str) -> str:
    """Return the error for a shape without brackets or under another name; "" for all else.

    It gives the line to type. Two numbers are height and width, one is a side or a number of
    features. Of three, a last one of 1, 3 or 4 below the first is the channels.
    """
    key, _, value = argument.partition("=")
    is_own = key == "data.input_shape"
    if not is_own and key not in [f"data.{word}" for word in OF_SHAPE]:
        return ""
    if not re.fullmatch(r"\s*[\[(]?\s*\d+(\s*,\s*\d+)*\s*,?\s*[\])]?\s*", value):
        return ""
    numbers = re.findall(r"\d+", value)
    if len(numbers) > 3 or (is_own and value.lstrip().startswith("[")) or 0 in map(int, numbers):
        return ""
    if len(numbers) == 3 and int(numbers[2]) in (1, 3, 4) and int(numbers[0]) > int(numbers[2]):
        numbers = [numbers[2], *numbers[:2]]
    full = ["3", *numbers * 2] if len(numbers) == 1 else ["3", *numbers][-3:]
    alone = f", or of {numbers[0]} features: '[{numbers[0]}]'" if len(numbers) == 1 else ""
    said = "a shape is a list in brackets" if is_own else "there is no such key"
    return (
        f"{argument}: {said}. Write the shape of an image, channels first: "
        f"'data.input_shape=[{','.join(full)}]'{alone}."
    )


def lead(name: str) -> str:
    """Return " Here that is …." for a key that holds another template's word, or ""."""
    for part in reversed(re.split(r"[./@]", name)):
        if part in ("train", "test") and name not in (part, f"trainer.{part}"):
            continue  # data.source.train stands for train_file
        if part in WORDS:
            return f" Here that is {WORDS[part]}."
    return ""


def of_option(group: str, option: str) -> str:
    """Return the same hint for another template's option, such as debug=fdr."""
    found = OPTIONS.get(group, {}).get(option)
    return f" Here that is {group}={found}." if found else ""


# -- Hydra's own settings --------------------------------------------------------------------------

LAUNCHERS = {
    "joblib": "launcher.jobs=4",
    "basic": "launcher.jobs=1",
    "submitit_local": "launcher.jobs=4",
    "submitit_slurm": "launcher=slurm",
}
SWEEPERS = {"basic": "sweep=grid", "optuna": "sweep=optuna"}
_LAUNCHER = (
    "the jobs of a sweep start in another way here. Use launcher.jobs=4 for four at once, or "
    "launcher=slurm."
)
_SWEEPER = "-m starts a sweep of another kind here. Use sweep=grid, list or optuna, and its keys."
# Settings that have no effect here, each with what to use. The longest match counts.
REPLACED = {
    "hydra/launcher": _LAUNCHER,
    "hydra.launcher": _LAUNCHER,
    "hydra/sweeper": _SWEEPER,
    "hydra.sweeper": _SWEEPER,
    "hydra.sweeper.params": "write sweep.params instead, with the same keys and values.",
    "hydra.sweeper.n_trials": "use sweep=optuna sweep.n_trials=….",
    "hydra.sweeper.n_jobs": "use launcher.jobs=….",
    "hydra.sweeper.max_batch_size": "use launcher.jobs=….",
    "hydra.sweeper.direction": "use sweep=optuna sweep.direction=….",
    "hydra.sweeper.sampler": "use sweep=optuna sweep.sampler=….",
    "hydra.sweeper.sampler.seed": "use sweep=optuna sweep.seed=….",
    "hydra/sweeper/sampler": "use sweep=optuna sweep.sampler=….",
    "hydra.sweeper.study_name": "a search is known by its folder: use hydra.sweep.dir=….",
    "hydra.sweeper.storage": "a search keeps its record in its folder: use hydra.sweep.dir=….",
    "hydra.launcher.n_jobs": "use launcher.jobs=….",
    "hydra.launcher.timeout_min": "use launcher=slurm launcher.timeout_minutes=….",
    "hydra.launcher.partition": "use launcher=slurm launcher.partition=….",
    "hydra/output": "name the run's folder with hydra.run.dir=….",
    "hydra.job.chdir": "a run stays in the current folder. Its own is named by hydra.run.dir=….",
    "hydra.job.name": "use name=…, which names the folder in outputs.",
    "hydra.job.id": "use name=…, which names the folder in outputs.",
    "hydra.job.num": "the sweep numbers its jobs. Use hydra.sweep.subdir=….",
    "hydra.job.config_name": "use --config-name ….",
    "hydra.runtime": "Hydra fills it itself. Leave it out.",
    "hydra.overrides": "Hydra fills it itself. Leave it out.",
    "hydra.callbacks.check": "it checks a config before a run starts. Leave it as it is.",
    "hydra.callbacks.sweep": "it starts a sweep in its copy of the code. Leave it as it is.",
    "hydra.job.override_dirname": "use hydra.job.config.override_dirname.exclude_keys=[…].",
}


def replaced(key: str) -> str | None:
    """Return what to use for a Hydra setting that has no effect here; None for one that has."""
    for prefix in sorted(REPLACED, key=len, reverse=True):
        if key == prefix or key.startswith((f"{prefix}.", f"{prefix}/", f"{prefix}@")):
            return REPLACED[prefix]
    return None


def replaced_option(group: str, option: str) -> str:
    """Return the error for an option of hydra/launcher, hydra/sweeper or hydra/output."""
    known = LAUNCHERS if group == "hydra/launcher" else SWEEPERS
    if option in known and group in ("hydra/launcher", "hydra/sweeper"):
        return f"{group}={option}: it is replaced here. Use {known[option]}."
    return f"{group}={option}: {replaced(group)}"


def shown(value: Any) -> str:
    """Return a value in one line, as it would be typed."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
