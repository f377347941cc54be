"""Types, options and ranges of the keys in `conf/`, as data, each written here alone.

The check of a config and the schemas read them. So do classes that Python code also calls without a
config, by `require`. A rule is a JSON Schema (draft 7) with words for its error. `fits` reads the
part of that language that the rules use.
"""

from __future__ import annotations

import contextlib
import math
import numbers
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from regrow.config.command_line import override, shell
from regrow.config.leads import shown
from regrow.config.yaml_files import plain_value
from regrow.errors import UserError
from regrow.project import lab_name

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """The values that a key accepts: in words, as a schema, and what no schema can say."""

    says: str
    schema: Schema
    also: Callable[[Any], bool] = lambda value: True

    def allows(self, value: Any) -> bool:
        return fits(value, self.schema) and self.also(value)


def _is(value: Any, kind: type) -> bool:
    """Return True for a number of a kind, also one of numpy's; true and false are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: _is(v, numbers.Integral),
    "number": lambda v: _is(v, numbers.Real) and math.isfinite(v),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, Mapping),
}
LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda v, limit: v >= limit,
    "exclusiveMinimum": lambda v, limit: v > limit,
    "maximum": lambda v, limit: v <= limit,
    "exclusiveMaximum": lambda v, limit: v < limit,
}
LENGTHS: dict[str, Callable[[Any, Any], bool]] = {
    "minLength": lambda v, limit: len(v) >= limit,
    "maxLength": lambda v, limit: len(v) <= limit,
    "pattern": lambda v, pattern: re.search(pattern, v) is not None,
}
SIZES: dict[str, Callable[[Any, Any], bool]] = {
    "minItems": lambda v, limit: len(v) >= limit,
    "maxItems": lambda v, limit: len(v) <= limit,
}


OF_A_PATH: Schema = {"type": "string", "pattern": "[./]"}  # so that a misspelt word is refused


def fits(value: Any, schema: Schema) -> bool:
    """Return True if `value` is valid under the schema of a rule."""
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(TYPES[kind](value) for kind in kinds):
        return False
    if "enum" in schema and not any(type(v) is type(value) and v == value for v in schema["enum"]):
        return False
    if "anyOf" in schema and not any(fits(value, each) for each in schema["anyOf"]):
        return False
    limits: dict[str, Callable[[Any, Any], bool]] = {}
    if TYPES["number"](value):
        limits = LIMITS
    elif isinstance(value, str):
        limits = LENGTHS
    elif isinstance(value, list):
        limits = SIZES
        if not all(fits(item, schema.get("items", {})) for item in value):
            return False
    elif isinstance(value, Mapping):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        if not set(schema.get("required", ())) <= set(value):
            return False
        for key, its in value.items():
            inner = known.get(key, others)
            if inner is False or not fits(its, inner):
                return False
    return all(fit(value, schema[name]) for name, fit in limits.items() if name in schema)


def integer(low: int) -> Rule:
    return Rule(f"an integer of at least {low}", {"type": "integer", "minimum": low})


def number(
    low: float, high: float | None = None, *, above: bool = False, below: bool = False
) -> Rule:
    """Return the rule of a number from `low` to `high`; `above` and `below` leave these out."""
    schema = {"type": "number", "exclusiveMinimum" if above else "minimum": low}
    words = f"a number {'above' if above else 'from'} {low:g}"
    if high is not None:
        schema["exclusiveMaximum" if below else "maximum"] = high
        words += f" {'and' if above and below else 'to'} {'below ' if below else ''}{high:g}"
    return Rule(words, schema)


def choice(*options: str) -> Rule:
    says = f"one of {', '.join(options)}" if len(options) > 1 else options[0]
    return Rule(says, {"enum": [*options]})


def optional(rule: Rule) -> Rule:
    return either(rule, Rule("null", {"type": "null"}))


def text() -> Rule:
    return Rule("text", {"type": "string", "minLength": 1})


def list_of(rule: Rule, *, least: int = 0) -> Rule:
    """Return the rule of a list of values, at least so many."""
    schema = {"type": "array", "items": rule.schema}
    if not least:
        return Rule(f"a list, each {rule.says}", schema)
    return Rule(f"a list of {least} or more, each {rule.says}", {**schema, "minItems": least})


def mapping_to(rule: Rule) -> Rule:
    return Rule(
        f"a mapping to {rule.says}", {"type": "object", "additionalProperties": rule.schema}
    )


def two_of(rule: Rule) -> Schema:
    return {**list_of(rule).schema, "minItems": 2, "maxItems": 2}


def mapping_of(**rules: Rule) -> Schema:
    """Return the schema of a mapping with exactly these keys."""
    return {
        "type": "object",
        "required": [*rules],
        "properties": {key: rule.schema for key, rule in rules.items()},
        "additionalProperties": False,
    }


def either(one: Rule, other: Rule) -> Rule:
    return Rule(
        f"{one.says}, or {other.says}",
        {"anyOf": [one.schema, other.schema]},
        lambda value: one.allows(value) or other.allows(value),
    )


def below(node: str, keys: str, rule: Rule) -> dict[str, Rule]:
    return {f"{node}.{key}": rule for key in keys.split()}


INTEGER = Rule("an integer", {"type": "integer"})
NUMBER = Rule("a number", {"type": "number"})
NAME = Rule(
    'text (in quotes where YAML would read something else: "no")', {"type": ["string", "integer"]}
)
PLAIN = Rule("text, a number, true or false", {"type": ["string", "number", "boolean"]})
BETAS = Rule("a list of two numbers, 0 or more and below 1", two_of(number(0, 1, below=True)))
SHARES = Rule(
    "a list of two numbers from 0, the least and the greatest",
    two_of(number(0)),
    lambda value: value[0] <= value[1],
)
RANGE = Rule(
    "a list of two numbers above 0, the least and the greatest",
    two_of(number(0, above=True)),
    lambda value: value[0] <= value[1],
)
SHAPE = Rule("a list of integers of at least 1, such as '[3,64,64]'", list_of(integer(1)).schema)
DIRECTION = choice("maximize", "minimize")
STATISTICS = Rule("{mean: […], std: […]}", mapping_of(mean=list_of(NUMBER), std=list_of(NUMBER)))
NORMALIZE = Rule(
    "one of train, imagenet, none, or {mean: […], std: […]}",
    either(choice("train", "imagenet", "none"), STATISTICS).schema,
)
COLUMN = Rule("{column: the name of a column}", mapping_of(column=text()))
SAMPLING = Rule(
    "balanced or {column: the name of a column}", either(choice("balanced"), COLUMN).schema
)
NODE: Schema = {"type": "object", "required": ["_target_"]}
NODES = Rule("a list of nodes, each with a _target_", {"type": "array", "items": NODE})
NAMED_NODES = Rule(
    "a mapping of names to nodes with a _target_",
    {"type": "object", "additionalProperties": NODE},
)


TARGET_KINDS = ("multiclass", "binary", "multilabel", "regression", "segmentation", "language")

# Ranges, and the types of values that may be null. Other types follow from the shipped values.
RULES: dict[str, Rule] = {
    "seed": integer(0),
    **below("data", "seed num_workers", integer(0)),
    **below("data.source", "seed num_val num_test", integer(0)),
    "loss.ignore_index": optional(INTEGER),
    "task.class_names": optional(list_of(NAME)),
    "data.class_names": optional(list_of(NAME)),
    "data.source.class_names": optional(list_of(NAME)),
    "name": Rule("text of one line", text().schema, str.isprintable),
    "init_from": optional(text()),
    **below("data", "batch_size eval_batch_size", integer(1)),
    **below("data", "limit_train num_classes num_outputs", optional(integer(1))),
    "data.limit_by": choice("random", "first"),
    "data.ignore_index": optional(INTEGER),
    "data.input_shape": optional(SHAPE),
    "model.input_shape": optional(list_of(integer(1), least=1)),
    "data.target_kind": optional(choice(*TARGET_KINDS)),
    "data.normalize": NORMALIZE,
    "data.overlap": choice("refuse", "report", "ignore"),
    "data.changed": choice("refuse", "accept"),
    "data.identity": choice("contents", "length"),
    "data.integers": choice("int64", "float32"),
    "data.target_dtype": choice("float64", "float32"),
    "data.final_sets": list_of(text()),
    "data.folds": optional(integer(2)),
    "data.fold": integer(0),
    "data.sampling": optional(SAMPLING),
    "data.transforms": NODES,
    "data.mixing.alpha": number(0, above=True),
    "data.source.group": optional(either(text(), integer(1))),
    "data.augmentation.pad": integer(0),
    "data.augmentation.padding_mode": choice("constant", "reflect"),
    "data.augmentation.crop_scale": SHARES,
    "data.augmentation.crop_ratio": RANGE,
    **below("data.augmentation", "brightness contrast saturation", number(0)),
    "data.augmentation.hue": number(0, 0.5),
    **below("data.source", "val_fraction test_fraction", number(0, 1)),
    "data.source.num_train": integer(1),
    **below("data.source", "extensions feature_columns", optional(list_of(text()))),
    "data.source.leave_out": list_of(
        either(choice("hidden", "empty"), Rule("a path below data.root", OF_A_PATH))
    ),
    "data.source.identity": choice("contents", "ends", "sizes"),
    "data.cache": optional(choice("resized")),
    "data.cache_root": optional(text()),
    "data.cache_max_gb": number(0, above=True),
    "data.root": optional(text()),
    **below("data.source", "val_file test_file weight_column", optional(text())),
    "data.source.train_file": text(),
    **below("logger.wandb", "entity group", optional(NAME)),
    "data.source.decoder": choice("pillow", "torchvision"),
    "data.source.cache": optional(text()),
    **below("data.source", "cache_gb pool_mb timeout_seconds", number(0, above=True)),
    "data.source.lanes": integer(1),
    "data.source.retries": integer(0),
    "data.source.resize": optional(either(choice("auto"), integer(1))),
    "data.source.vocabulary": text(),
    "data.source.mask_values": optional(
        list_of(Rule("an integer from 0 to 65535", {**integer(0).schema, "maximum": 65535}))
    ),
    **below("data.source", "images_in masks_in", text()),
    "data.source.delimiter": Rule("one character", {**text().schema, "maxLength": 1}),
    "data.source.target_columns": list_of(text()),
    "data.source.sets": optional(either(mapping_to(text()), list_of(text()))),
    "model.hidden": list_of(integer(1)),
    "model.channels": list_of(integer(1), least=1),
    "model.dropout": number(0, 1),
    **below("model", "width depth heads layers", integer(1)),
    "model.norm_momentum": number(0, 1, above=True),
    "model.views": choice("one", "mirror", "mirror_shift"),
    "model.patch_size": optional(integer(1)),
    "loss.label_smoothing": number(0, 1),
    "loss.class_weights": optional(
        either(choice("balanced"), either(list_of(number(0)), mapping_to(number(0))))
    ),
    "loss.pos_weight": optional(either(number(0, above=True), list_of(number(0, above=True)))),
    "loss.delta": number(0, above=True),
    "loss.beta": number(0),
    "task.threshold": number(0, 1, above=True, below=True),
    "task.target_names": optional(list_of(NAME)),
    "task.extra_metrics": optional(NAMED_NODES),
    "param_groups.lr_scale": optional(mapping_to(number(0))),
    "optimizer.lr": number(0, above=True),
    **below("optimizer", "weight_decay eps dampening", number(0)),
    **below("optimizer", "momentum alpha", number(0, 1)),
    **below("optimizer", "betas adamw_betas", BETAS),
    "optimizer.adamw_modules": list_of(text()),
    "optimizer.ns_steps": integer(1),
    "scheduler.warmup_steps": optional(integer(0)),
    "scheduler.warmup_fraction": optional(number(0, 1)),
    "scheduler.interval": choice("step", "epoch"),
    "scheduler.every_epochs": integer(1),
    "scheduler.milestones_epochs": list_of(integer(1)),
    **below("scheduler", "gamma final_factor initial_factor peak_fraction factor", number(0, 1)),
    "scheduler.min_factor": number(0, 1),
    "scheduler.patience": integer(0),
    "scheduler.min_delta": number(0),
    "launcher.jobs": Rule(
        "an integer of at least 1, or auto (local), or null (slurm)",
        {"anyOf": [integer(1).schema, {"enum": ["auto", None]}]},
    ),
    **below("launcher", "nodes tasks_per_node cpus_per_task timeout_minutes", integer(1)),
    "launcher.save_seconds": integer(1),
    **below("launcher", "gpus_per_node max_timeouts", integer(0)),
    "launcher.mem_gb": optional(number(0, above=True)),
    **below("launcher", "partition account qos constraint", optional(text())),
    "launcher.setup": list_of(text()),
    "launcher.sbatch": optional(mapping_to(PLAIN)),
    **below("trainer", "max_epochs max_steps num_threads eval_every_epochs", optional(integer(1))),
    **below("trainer", "eval_every_steps log_histograms_every_steps", optional(integer(1))),
    **below("trainer", "max_seconds clip_norm clip_value", optional(number(0, above=True))),
    "trainer.device": choice("auto", "cpu", "cuda", "mps"),
    "trainer.devices": Rule(
        "an integer of at least 1, or auto",
        {"anyOf": [integer(1).schema, {"enum": ["auto"]}]},
    ),
    "trainer.strategy": choice("ddp", "fsdp"),
    "trainer.fsdp.modules": optional(list_of(text())),
    "trainer.activation_checkpointing": list_of(text()),
    **below("trainer.fsdp", "param_dtype reduce_dtype", optional(choice("fp32", "bf16", "fp16"))),
    "trainer.max_restarts": integer(0),
    "trainer.timeout_seconds": number(0, above=True),
    **below("trainer", "accumulation_steps max_skipped_steps log_every_steps", integer(1)),
    "trainer.precision": choice("fp32", "bf16", "fp16"),
    "trainer.capture": Rule("auto or false", {"enum": ["auto", False]}),
    "trainer.ema_decay": optional(number(0, 1, below=True)),
    "trainer.monitor": optional(text()),
    "trainer.mode": optional(choice("max", "min")),
    "trainer.early_stopping.patience": optional(integer(0)),
    "trainer.early_stopping.min_delta": number(0),
    **below("trainer.checkpoint", "save_every_epochs save_every_steps", optional(integer(1))),
    "trainer.checkpoint.milestones_every_epochs": optional(integer(1)),
    **below("trainer.checkpoint", "keep_last keep_best", integer(1)),
    "sweep.params": optional(Rule("a mapping of keys to values", {"type": "object"})),
    "sweep.pictures": choice("best", "all", "none"),
    "sweep.sets": Rule("a list of sets of overrides", {"type": "array"}),
    "sweep.file": optional(text()),
    **below("sweep", "n_trials max_failures", integer(1)),
    "sweep.metric": optional(either(text(), list_of(text(), least=1))),
    "sweep.direction": optional(either(DIRECTION, list_of(DIRECTION, least=1))),
    "sweep.sampler": choice("tpe", "random", "grid", "nsgaii"),
    **below("sweep", "seed pruner_startup_trials pruner_warmup_evaluations", integer(0)),
    "sweep.pruner": choice("none", "median", "hyperband"),
    **below("find_lr", "min_lr max_lr", number(0, above=True)),
    "find_lr.num_steps": integer(20),
    "find_lr.divergence_factor": number(1, above=True),
}


def of_shipped(path: str, shipped: Any) -> Rule | None:
    """Return the rule of a key without one in RULES, by its shipped value; None: any value."""
    if shipped is None or shipped == "???" or (isinstance(shipped, str) and "${" in shipped):
        return None
    if isinstance(shipped, float) and not math.isfinite(shipped):  # of a class of one's own
        return None
    kinds = {
        bool: Rule("true or false", {"type": "boolean"}),
        int: INTEGER,
        float: NUMBER,
        str: Rule("text", {"type": "string"}),
        list: Rule("a list, such as [1,2]", {"type": "array"}),
    }
    rule = kinds.get(type(shipped))
    ours = path.split(".")[0] in ("trainer", "data", "tags", "notes")
    if rule is None or (ours and not isinstance(shipped, str)):
        return rule
    nullable = {"anyOf": [rule.schema, {"type": "null"}]}  # another library's argument may be None
    return Rule(rule.says, nullable)


def applies(target: object) -> bool:
    """Return True if RULES apply to the keys of a node with this `_target_`; None: without one.

    A user's own model may take a list as `dropout`.
    """
    return str(target or "regrow.").startswith((f"{lab_name()}.", "regrow.", "torch.optim."))


def refusal(key: str, value: Any, rule: Rule, says: str = "") -> str:
    """Return the error for a value that a rule refuses; `says` replaces the rule's words.

    Text that looks like a value that the rule allows, and a number in place of text, are explained:
    an error shows neither's quotes.
    """
    said = f"{key}={shown(value)} must be {says or rule.says}."
    if TYPES["integer"](value) and rule.allows(str(value)):
        return f"{said} In quotes it is text: {shell([override(key, str(value))])}"
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            meant = plain_value(value)
            if meant is not None and meant != value and rule.allows(meant):
                return (
                    f"{said} This is text. Leave out its quotes; of an environment variable, write "
                    "${oc.decode:${oc.env:NAME}}."
                )
    return said


def require(key: str, value: Any) -> None:
    """Raise UserError unless the rule of `key` allows `value`; a tuple counts as a list.

    For code that is also called without a config, which the check has not seen.
    """
    if not RULES[key].allows([*value] if isinstance(value, tuple) else value):
        raise UserError(refusal(key, value, RULES[key]))
