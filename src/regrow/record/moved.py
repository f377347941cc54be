"""New names of targets of older versions, which records and YAML files may still contain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from regrow.dotted import Config
from regrow.project import of_lab


def _each(old: str, new: str, names: str) -> dict[str, str]:
    return {f"{old}.{name}": f"{new}.{name}" for name in names.split()}


# Names in version 0.1.0, of modules and of what left theirs, each with its current name. The
# longest match counts. `lab` stands for the lab's package.
MOVED: Mapping[str, str] = {
    # whole modules
    **_each("regrow", "regrow.cli", "arguments start"),
    **_each("regrow", "regrow.config", "job resume roles"),
    **_each("regrow", "regrow.processes", "outside parent ranks slurm"),
    **_each("regrow", "regrow.runs", "console find_lr inference weights worker"),
    **_each(
        "regrow.data",
        "regrow.feeding",
        "batch feeds files identity images loaders preprocess sampling splits tables",
    ),
    **_each("regrow.training", "regrow.distributed", "activation_checkpointing parallel sharding"),
    **_each("regrow.training", "regrow.numerics", "memory precision scheduler_adapter"),
    **_each("regrow.training", "regrow.runs", "lr_finder model_checks"),
    # renamed, or in parts
    "regrow.check": "regrow.config.check",
    **_each(
        "regrow.check",
        "regrow.config.rules",
        "Rule choice either integer list_of mapping_to number optional text",
    ),
    **_each("regrow.compose", "regrow.config.job", "job_of with_override"),
    **_each("regrow.config", "regrow.cli.entry", "check_arguments entry_point folder_named"),
    **_each("regrow.config", "regrow.config.explain", "composition_error unknown_key"),
    **_each(
        "regrow.config",
        "regrow.config.hydra_access",
        "if_chosen plain version_arguments",
    ),
    **_each("regrow.config", "regrow.config.targets", "instantiate locate"),
    "regrow.config.fail": "regrow.failing.fail",
    "regrow.config.known_keys": "regrow.config.keys.known_keys",
    "regrow.config.read_yaml": "regrow.config.yaml_files.read_yaml",
    **_each("regrow.data.augment", "regrow.protocols", "Augmentation Store"),
    "regrow.data.batch.Batch": "regrow.feeding.batch.LoadedBatch",
    **_each("regrow.data.images", "regrow.feeding.decoding", "fit load_image"),
    "regrow.data.loaders.EvalBatches": "regrow.feeding.loaders.EvalLoader",
    "regrow.data.loaders.TrainBatches": "regrow.feeding.loaders.TrainLoader",
    "regrow.launch": "regrow.runs.session",
    "regrow.launch.command": "regrow.config.command_line.command",
    **_each("regrow.launch", "regrow.runs.banner", "conclude config_tree introduce longer"),
    **_each("regrow.launch", "regrow.runs.launch", "launch submit"),
    **_each("regrow.load", "regrow.runs.loaded", "preprocessing_record set_numerics swap"),
    "regrow.models.freeze": "lab.models.freezing",
    "regrow.models.init": "lab.models.initialisation",
    "regrow.output": "regrow.record.output",
    "regrow.ranks.python_path": "regrow.processes.begin.python_path",
    "regrow.record.comparison.write_page": "regrow.record.side_by_side.write_page",
    "regrow.record.folder": "regrow.record.records",
    "regrow.record.report.compare": "regrow.record.comparison.compare",
    "regrow.resume.key_of": "regrow.config.command_line.key_of",
    "regrow.resume.refuse_other_data": "regrow.config.changed_data.refuse_other_data",
    **_each("regrow.resume", "regrow.config.foreign", "check_recorded is_foreign"),
    **_each("regrow.resume", "regrow.config.recorded", "is_of_the_launcher recorded_overrides"),
    **_each("regrow.resume", "regrow.config.resumed_config", "differences is_done reached"),
    "regrow.run": "regrow.runs.training",
    "regrow.run.Objects": "regrow.protocols.Objects",
    "regrow.run.go_on": "regrow.runs.training.restore",
    "regrow.run.tell_of_another_rate": "lab.progress.tell_of_another_rate",
    **_each("regrow.run", "lab.build", "measured_by plan_of schedule_of steps_of"),
    **_each("regrow.run", "regrow.runs.machine", "resolve_device set_numerics usable_cores"),
    "regrow.sweep.options": "regrow.sweep.kinds",
    "regrow.sweep.plan": "regrow.sweep.planning",
    "regrow.sweep.run.going_on": "regrow.sweep.run.resume_command",
    "regrow.sweep.schedule.Place": "regrow.sweep.schedule.Executor",
    "regrow.sweep.schedule.Source": "regrow.sweep.schedule.JobSource",
    "regrow.sweep.state": "regrow.sweep.ledger",
    "regrow.sweep.state.Entry": "regrow.sweep.ledger.JobEntry",
    "regrow.sweep.trial": "regrow.runs.trial",
    "regrow.slurm.Task": "regrow.processes.slurm.SrunTask",
    "regrow.training.checkpoint": "regrow.checkpoint.writer",
    "regrow.training.checkpoint.Facts": "regrow.checkpoint.writer.CheckpointFacts",
    "regrow.training.options.CheckpointOptions": "regrow.checkpoint.writer.CheckpointOptions",
    "regrow.training.options.DDPOptions": "regrow.distributed.parallel.DDPOptions",
    "regrow.training.options.FSDPOptions": "regrow.distributed.sharding.FSDPOptions",
    "regrow.tasks.exact": "regrow.numerics.exact",
    "regrow.tasks.tasks.Task": "regrow.protocols.Task",
    "regrow.tasks.metrics.widest": "regrow.numerics.precision.widest",
    "regrow.training.interrupt": "regrow.processes.interrupt",
    "regrow.training.loop.StepResult": "lab.plan.StepResult",
    "regrow.training.plan.Metrics": "regrow.protocols.MetricsLike",
    "regrow.training.plan.Plan": "lab.plan.LoopPlan",
    "regrow.training.loop.at_least_float32": "regrow.numerics.precision.at_least_float32",
    "regrow.training.loop.refuse_endless_skipping": "lab.faults.refuse_endless_skipping",
    "regrow.training.loop.pruned": "lab.loop.report_to_search",
    **_each("regrow.training.loop", "lab.evaluate", "evaluate measure"),
    **_each("regrow.training.loop", "lab.step", "backward forward train_step"),
    **_each(
        "regrow.training.loop",
        "regrow.numerics.calls",
        "call is_out_of_memory say_if_out_of_memory",
    ),
    **_each(
        "regrow.training.loop", "regrow.runs.model_checks", "check_first_batch check_one_example"
    ),
    **_each("regrow.training.optim", "regrow.numerics.totals", "gradient_norm numbers"),
    **_each(
        "regrow.training.plan",
        "regrow.protocols",
        "Batch EvalBatches Record Task TrainBatches Trial",
    ),
    "regrow.training.sharded_checkpoint": "regrow.checkpoint.sharded",
    "regrow.training.show": "lab.progress",
    "regrow.training.state.Buffers": "regrow.numerics.buffers.Buffers",
    "regrow.training.state.weights_sha256": "regrow.checkpoint.digest.weights_sha256",
    "regrow.training.sums": "regrow.numerics.totals",
    "regrow.data.augment": "lab.data.augment",
    "regrow.data.datasets": "lab.data.datasets",
    "regrow.models": "lab.models",
    "regrow.tasks": "lab.tasks",
    "regrow.training": "lab",
}
# Names in version 0.1.0 that nothing replaces.
GONE = frozenset(
    {
        *("regrow.config.find_own_modules", "regrow.config.option_list"),
        *("regrow.config.wrong_option", "regrow.ranks.forwarding", "regrow.resume.continues"),
        *("regrow.run.summarise", "regrow.run.test_once", "regrow.sweep.frozen.taken_over"),
        *("regrow.sweep.plan.in_group", "regrow.sweep.plan.with_threads"),
        *("regrow.sweep.process.context_of", "regrow.sweep.process.have_threads_again"),
        *("regrow.sweep.process.cores", "regrow.sweep.schedule.noting_signals"),
        *("regrow.sweep.search.pruner_options", "regrow.sweep.trial.storage_of"),
        "regrow.training.loop.Slice",
        *("regrow.training.loop.count", "regrow.training.loop.gradients"),
        *("regrow.training.loop.halve_slices", "regrow.training.show.running"),
        *("regrow.training.sums.added", "regrow.training.sums.constant"),
        *("regrow.training.sums.epoch_sums", "regrow.training.sums.read"),
        "regrow.training.sums.slice_sums",
    }
)
_LONGEST_FIRST = sorted(MOVED, key=len, reverse=True)
_NAMES = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, _LONGEST_FIRST))})(?!\w)")


def in_text(text: str) -> str:
    """Return the text with old names replaced by the current ones."""
    return _NAMES.sub(lambda found: of_lab(MOVED[found[0]]), text)


def in_config(config: Mapping[str, Config]) -> dict[str, Any]:
    """Return a copy of a recorded config with the current name in every `_target_`."""
    return {
        key: in_text(value) if key == "_target_" and isinstance(value, str) else _renamed(value)
        for key, value in config.items()
    }


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return in_config(value)
    return [*map(_renamed, value)] if isinstance(value, list) else value
