"""Check a config for every possible mistake before torch is imported.

Keys and types are compared with the shipped YAML, which a test proves equal to the signatures
behind it. Only a target that does not ship is imported, to read its signature.
"""

from __future__ import annotations

import codecs
import contextlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow.config import class_folders, entries, leads, places
from regrow.config.command_line import shell
from regrow.config.explain import composition_error, takes, typed_node, where_own_keys_go
from regrow.config.foreign import check_recorded
from regrow.config.hydra_access import plain, typed_overrides, without_hydra
from regrow.config.hydras import check_settings
from regrow.config.keys import options_with
from regrow.config.origins import located
from regrow.config.origins import shown as file_shown
from regrow.config.ranges import check_ranges
from regrow.config.rules import RULES, TARGET_KINDS, applies, of_shipped, refusal, require
from regrow.config.started import is_started, note_missing
from regrow.config.target_kinds import refuse_mixing, refuse_sampling
from regrow.config.targets import HANDED_IN, HANDED_TO, allow, note_typed, parameters_of
from regrow.config.yaml_files import readable
from regrow.dotted import Config, walk
from regrow.errors import UserError, did_you_mean, listed
from regrow.failing import fail, in_one_line
from regrow.project import CONF, lab_name
from regrow.record import loggers, monitor

# Keys that a run reads besides those of the trainer, so that ~key cannot leave them out.
NEEDED = ("data.final_sets", "data.source", "name", "param_groups", "resume", "seed")
# The option that a group's files build on, and those of its keys that a run reads; (): all of them.
BASES = {"data": ("_base", ("_target_", "source", "final_sets")), "trainer": ("default", ())}

# The tasks that each shipped loss is for.
LOSSES = {
    "CrossEntropy": ("multiclass", "segmentation", "language"),
    "BCEWithLogits": ("binary", "multilabel"),
    **dict.fromkeys(("mse", "l1", "smooth_l1", "huber", "mse_plus_mae"), ("regression",)),
}


# The config that `CheckBeforeStart` has checked in this process.
_checked: list[dict[str, Any]] = []


class CheckBeforeStart(Callback):
    """Hydra callback that exits on a bad config before Hydra creates a folder."""

    @in_one_line()
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # as Hydra does next, for ${hydra:…}
        try:
            check_leftovers(config.hydra)
            if is_started():
                check_settings(config.hydra, is_sweep=False)
            check(config, config.hydra.runtime.choices)
            _checked[:] = [plain(without_hydra(config))]
            note_missing(Path(str(OmegaConf.select(config, "hydra.run.dir"))))
        except OmegaConfBaseException as error:
            fail(composition_error(error))

    @in_one_line()
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # for ${hydra:…} in hydra.sweep.dir
        if is_started():
            check_leftovers(config.hydra, is_sweep=True)
            check_settings(config.hydra, is_sweep=True)


def check_leftovers(hydra: DictConfig, *, is_sweep: bool = False) -> None:
    """Raise UserError for Hydra settings of log files and output_subdir that do not apply here.

    Hydra would write into the current folder or, in a sweep, nothing. A run keeps its own log and
    its own `.hydra`.
    """
    node = plain(hydra, resolve=False)
    if (kept := node["output_subdir"]) is not None:
        raise UserError(
            f"hydra.output_subdir={kept}: a run keeps .hydra in its own folder anyway. Leave "
            "hydra.output_subdir out."
        )
    handlers = node["job_logging"].get("handlers") or {}
    chosen = f"hydra/job_logging={node['runtime']['choices'].get('hydra/job_logging')}"
    if is_sweep and handlers:
        raise UserError(
            f"{chosen}: a job of a sweep logs to train.log in its folder, and to logs/ of the "
            "sweep. Leave hydra/job_logging out."
        )
    files = [str(each.get("filename")) for each in handlers.values() if isinstance(each, dict)]
    if any("runtime.output_dir" in file for file in files):
        raise UserError(
            f"{chosen}: it would write {node['job']['name'] or 'train'}.log beside the run's own. "
            "A run logs to train.log in its folder. Leave hydra/job_logging out, or use "
            "hydra/job_logging=stdout for other libraries' lines."
        )


def check_once(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Check the config of Hydra's job, unless `CheckBeforeStart` has checked the same."""
    if plain(config) not in _checked:
        check(config, choices)


@contextlib.contextmanager
def _with_place() -> Iterator[None]:
    """Add the file and line of a value to an error about it: see `origins.located`."""
    try:
        yield
    except UserError as error:
        raise type(error)(located(str(error))) from error.__cause__
    except OmegaConfBaseException as error:
        raise UserError(located(composition_error(error))) from error


@_with_place()
def check(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Raise UserError with one line for the first mistake in a composed config.

    `config` may hold the node `hydra`. `choices` are the chosen options, by group.
    """
    config = without_hydra(config)
    typed = typed_overrides(HydraConfig.get().overrides.task)
    for line in typed:
        key = line.removeprefix("~").partition("=")[0]
        is_replaced = any(other.startswith(f"+{key}=") for other in typed)
        is_needed = (key.startswith("trainer.") or key in NEEDED) and not is_replaced
        if line.startswith("~") and is_needed:
            raise UserError(f"{line}: a run needs this key. Leave {line} out.")
    unresolved = plain(config, resolve=False)  # others may follow a key of what is left out
    for group in leads.GROUPS:
        _refuse_unchosen(group, unresolved.get(group))
    for group in BASES:
        _refuse_lacking(group, unresolved[group], choices)
    missing = [key for key, value in walk(unresolved, closed=RULES) if value == "???"]
    if missing:
        others = f" (and {', '.join(missing[1:])})" if missing[1:] else ""
        hint = {
            "data.num_classes": " (null for regression)",
            "data.target_kind": f" ({', '.join(TARGET_KINDS)}; null for others)",
            "data.input_shape": " (null where examples have no common shape)",
        }.get(missing[0], "")
        if missing[0] == "data.num_classes" and (found := _class_folders(config)):
            raise UserError(f"data.num_classes must be given{others}: {found}")
        raise UserError(f"{missing[0]} must be given: add {missing[0]}=…{hint}{others}")
    values = plain(config)
    for group in ("model", "optimizer", "scheduler", "loss", "task", "step"):
        # `{}` is the loss of a task of the user's own that brings one.
        if group != "loss" or values["loss"] or _is_shipped(values["task"]):
            _refuse_without_target(group, values[group], choices)
    _check_resume(values["resume"], typed)
    check_recorded(values, typed)
    note_typed(typed)
    allow(values)
    _check_keys(values, choices)
    check_ranges(values)
    task, data = values["task"], values["data"]
    if applies(task.get("_target_")):  # another class may take what it likes by these names
        for name, node in (task.get("extra_metrics") or {}).items():
            check_signature(node, f"task.extra_metrics.{name}")
    if applies(data.get("_target_")):
        for index, node in enumerate(data.get("transforms") or []):
            check_signature(node, f"data.transforms.{index}")
    _check_mixing(data)
    loggers.check_choice(values["logger"])
    _check_combinations(values)


def _check_resume(resume: object, typed: Sequence[str]) -> None:
    """Raise UserError for a folder that `expand` has not seen: its run would not be resumed."""
    if resume in ("auto", "never"):
        return
    if not isinstance(resume, str) or not Path(resume).is_dir():
        raise UserError(f"resume={leads.shown(resume)} must be auto, never or the folder of a run.")
    if not any(line.startswith("resume=") for line in typed):
        raise UserError(
            f"resume={resume}: from a file, or with a plus, it does not resume that run. Type it: "
            f"{shell([f'resume={resume}'])}"
        )


def check_values(values: Mapping[str, Config]) -> None:
    """Raise UserError for values out of range, or that do not fit each other.

    For a composed config that a notebook may have changed since its check. Imports no target,
    except a class of the lab that got a null.
    """
    check_ranges(values)
    _check_combinations(values)


def check_data(data: Mapping[str, Config]) -> None:
    """Raise UserError for values of the node `data` alone, as `check_values` does for all."""
    check_ranges({"data": data})
    _check_data(data)


def _refuse_without_target(group: str, node: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Raise UserError for a node without a class. Several, by name, are a mapping of nodes."""
    if "_target_" in node or (node and all(isinstance(it, Mapping) for it in node.values())):
        return
    near = next((key for key in node if str(key).strip("_") in ("target", "class")), None)
    hint = f" Did you mean _target_ for {near}?" if near else ""
    raise UserError(
        f"{_file_of(group, choices)} has no _target_, which names the class or function to call."
        f"{hint}"
    )


def _refuse_unchosen(group: str, node: object) -> None:
    """Raise UserError unless a group holds keys, or is an interpolation."""
    if isinstance(node, str) and "${" not in node and node != "???":
        raise UserError(
            f"{group}={node}: keys belong here, and this is a text. To choose an option in a file, "
            f"write `- override /{group}: {node}` below defaults."
        )
    if not isinstance(node, Mapping | str):
        raise UserError(f"{group} is not chosen. Use {group}=… with an option of conf/{group}.")


def _refuse_lacking(group: str, node: Any, choices: Mapping[str, Any]) -> None:
    """Raise UserError for an option of one's own that does not build on that of `BASES`."""
    base, keys = BASES[group]
    wanted = keys or shipped_node(group, base)
    lacking = [key for key in wanted if key not in node] if isinstance(node, Mapping) else []
    if lacking:
        raise UserError(
            f"{_file_of(group, choices)} lacks {listed(lacking, 3)}, which a run reads. Begin the "
            f"file with `defaults: [{base}, _self_]`."
        )


def _file_of(group: str, choices: Mapping[str, Any]) -> str:
    """Return `group=option: ` and the file of the chosen option, for an error."""
    option = choices.get(group)
    path = places.file_of(group, option) if isinstance(option, str) else None
    return f"{group}={option}: {file_shown(path) if path else 'it'}"


def _class_folders(config: DictConfig) -> str:
    """Return what the folder of data=image_folder holds, in words; "" for other data and none."""
    source = OmegaConf.select(config, "data.source", throw_on_resolution_failure=False)
    if not isinstance(source, DictConfig):
        return ""
    named = ("_target_", "root", "extensions", "leave_out")
    with contextlib.suppress(OSError, OmegaConfBaseException):
        found = [OmegaConf.select(source, it, throw_on_resolution_failure=False) for it in named]
        found = [OmegaConf.to_container(it) if OmegaConf.is_config(it) else it for it in found]
        target, root, extensions, leave_out = found
        if not str(target).endswith(".image_folder") or not root:
            return ""
        require("data.source.extensions", extensions)  # the check of all values comes later
        require("data.source.leave_out", leave_out or [])
        return class_folders.contents_in_words(Path(str(root)), extensions, leave_out or ())
    return ""


@_with_place()
def check_group(config: DictConfig, group: str) -> None:
    """Check one group's keys, types and ranges, while other groups may still be incomplete."""
    values = plain(config, resolve=False)
    option = HydraConfig.get().runtime.choices.get(group)
    if not isinstance(values.get(group), Mapping) or not isinstance(option, str):
        raise UserError(f"{group} is not chosen. Use {group}=… with an option of conf/{group}.")
    _check_node(values[group], _known_node(group, option), group)
    check_ranges({group: values[group]})


def _check_keys(values: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    top = {key: node for _, nodes in readable("*.yaml") for key, node in nodes.items()}
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    own = places.own_keys(str(HydraConfig.get().job.config_name), choices)
    for key, value in values.items():
        if key in leads.RECIPES and value:
            path = places.without_header(key, places.names_in(choices.get(key) or ""))
            if path is not None and path.read_bytes().startswith(codecs.BOM_UTF8):
                raise UserError(
                    f"{key}/{path.name}: it begins with an invisible mark (BOM), and Hydra does "
                    f"not see `{places.HEADER}`. Save it as UTF-8 without one."
                )
            if path is None:
                raise UserError(
                    f"{key}: it has no keys of its own, as its files hold those of other groups. "
                    f"Choose a file: {key}=…"
                )
            raise UserError(
                f"{key}/{path.name}: its first line must be `{places.HEADER}`. Without it, its "
                f"values are put below {key}, where nothing reads them."
            )
        if key not in top and key not in groups and key not in own:
            _refuse_misplaced(key, choices)
            hint = leads.lead(key) or did_you_mean(key, {*top, *groups, *own})
            raise UserError(f"{key}: there is no such key.{hint}{where_own_keys_go()}")
        if key in top:
            _check_node(value, top[key], key)
    shipped_loggers: dict[str, Any] = {}
    for folder in reversed(places.folders()):
        for _, content in readable("logger/*.yaml", folder):
            shipped_loggers |= content
    for name, node in values["logger"].items():
        if name in shipped_loggers:
            _check_node(node, shipped_loggers[name], f"logger.{name}")
        else:
            parameters = check_signature(node, f"logger.{name}")
            loggers.check_required(node, f"logger.{name}", parameters)
    for group in leads.GROUPS:
        names = places.names_in(choices.get(group) or "")
        if len(names) == 1 and isinstance(values.get(group), Mapping):
            _check_node(values[group], _known_node(group, names[0]), group)


def _refuse_misplaced(key: str, choices: Mapping[str, Any]) -> None:
    """Raise UserError if a top-level key results from a package, or from a dotted key in a file."""
    if "." in key:
        _refuse_dots(key)
    for group in leads.RECIPES:
        for option in places.names_in(choices.get(group) or ""):
            path = places.file_of(group, option)
            if path is not None and places.package_of(path).split(".")[0] == key:
                raise UserError(f"{group}/{path.name}: its first line must be `{places.HEADER}`.")
    for argument in sys.argv[1:]:
        if found := re.match(r"\+*([\w/]+)@(\w+)[^=]*=(.*)", argument):
            group, package, option = found.groups()
            if package in (key, "_global_"):
                raise UserError(
                    f"{argument}: a group has one place here. Write {group}={option} without @."
                    + (where_own_keys_go() if package == key else "")
                )


def _refuse_dots(key: str, node: str = "") -> NoReturn:
    nested = ": {".join(key.split(".")) + ": …" + "}" * key.count(".")
    raise UserError(f"{node}{key}: only the command line takes dots. In a file, write `{nested}`.")


def shipped_node(group: str, option: str) -> dict[str, Any]:
    """Return a group's option as its YAML states it, including what it inherits.

    Empty if neither a file nor a node in Hydra's ConfigStore defines it.
    """
    node: dict[str, Any] = entries.option(group, option).value
    return node


def _known_node(group: str, option: str) -> dict[str, Any]:
    """Return `shipped_node`; of launcher=local, which passes them over, with Slurm's keys as well.

    conf/local/default.yaml may set those for each start with launcher=slurm.
    """
    node = shipped_node(group, option)
    if group != "launcher" or "_target_" in node:
        return node
    others = [shipped_node(group, each) for each in places.options(group)]
    keys = {key: value for each in others for key, value in each.items() if key != "_target_"}
    return keys | node


def _check_node(node: Any, shipped: Any, path: str, owner: object = None) -> None:
    """Raise UserError if a node's keys or types differ from the shipped ones.

    `owner` is the `_target_` that takes the node as an argument.
    """
    if not isinstance(shipped, Mapping):
        _check_type(node, shipped, path, owner)
        return
    if path == "data.augmentation" and node is None:
        return
    if not isinstance(node, Mapping):
        raise UserError(f"{path}={leads.shown(node)} must be a mapping of keys to values.")
    if not shipped:  # this mapping accepts any key
        return
    target = node.get("_target_")
    # A file that builds on an option may put another class there, and keeps the option's keys.
    is_replaced = path == "data.augmentation" and isinstance(target, str) and not applies(target)
    if target != shipped.get("_target_") or is_replaced:
        check_signature(node, path)
        return
    for key, value in node.items():
        if key in shipped:
            _check_node(value, shipped[key], f"{path}.{key}", target)
        elif "." in str(key):
            _refuse_dots(str(key), f"{path}.")
        elif not (isinstance(target, str) and takes(target, path, key)):
            _refuse_key(f"{path}.{key}", target, shipped)


def _refuse_key(full: str, target: Any, shipped: Mapping[str, Any]) -> NoReturn:
    """Raise UserError for a key that a node does not accept, with the closest one that it does."""
    path = full.rpartition(".")[0]
    handed_in = {*HANDED_IN, *HANDED_TO.get(path, ())}
    known = [key for key in shipped if not key.startswith("_") and key != "defaults"]
    if isinstance(target, str):
        with contextlib.suppress(UserError):
            parameters = parameters_of(target, path) or {}
            known += [key for key in parameters if key not in (*known, *handed_in, "self")]
    hint = leads.lead(full) or did_you_mean(full, (f"{path}.{key}" for key in known))
    hint = hint or options_with(full) or (f" It takes {', '.join(known)}." if known else "")
    raise UserError(f"{full}: {target or path} has no such key.{hint}")


def _check_type(value: Any, shipped: Any, path: str, owner: object) -> None:
    rule, example = of_shipped(path, shipped), ""
    if path in RULES:  # which only bind the project's own classes
        is_text = isinstance(value, str) and "${" not in value
        if applies(owner) or not is_text:  # a user's model may take a list as dropout
            return
        example = f", such as its default, {leads.shown(shipped)}"
    if rule is not None and not rule.allows(value):
        way_out = ""
        if type(shipped) is int and isinstance(value, float) and not applies(owner):
            if _takes_fractions(owner, path):
                return
            way_out = f" If it may be a fraction, write its default as {shipped}.0."
        raise UserError(refusal(path, value, rule, f"{rule.says}{example}") + way_out)


def _takes_fractions(target: object, path: str) -> bool:
    """Return True if the signature of a user's target says so: by type or default. Imports it."""
    parent, _, key = path.rpartition(".")
    with contextlib.suppress(UserError):
        if parameter := (parameters_of(str(target), parent) or {}).get(key):
            return "float" in str(parameter.annotation) or isinstance(parameter.default, float)
    return False


def check_signature(node: Mapping[str, Any], path: str) -> Mapping[str, inspect.Parameter]:
    """Check a node's keys against its target's signature and return the parameters by name.

    Imports the target's module. Raises UserError for a key that the target does not accept.
    """
    target = node.get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{path}._target_={target!r} must name a class or a function.")
    parameters = parameters_of(target, path)
    if parameters is None:
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return parameters
    ours = ("interval",) if path == "scheduler" and "optimizer" in parameters else ()
    foreign = [
        str(key)
        for key in node
        if key not in (*parameters, *ours) and not (key.startswith("_") and key.endswith("_"))
    ]
    if foreign:
        named = ", ".join(f"{path}.{key}" for key in foreign)
        hint = did_you_mean(foreign[0], parameters) if len(foreign) == 1 else ""
        said = f"{named}: {target} takes no such argument.{hint}"
        if "." not in path:
            # Hydra deletes no null: ~key would be refused until the key has a value.
            set_first = {key: f"{path}.{key}=0 " if node[key] is None else "" for key in foreign}
            left_out = " ".join(f"{value}~{path}.{key}" for key, value in set_first.items())
            raise UserError(f"{said} To leave out what the option brings: {left_out}")
        is_item = path.rpartition(".")[2].isdigit()  # of a list, into which nothing is merged
        if is_item or {*foreign} <= {*typed_node(path)}:
            raise UserError(f"{said} It takes {', '.join(parameters)}.")
        kept = leads.shown({key: value for key, value in node.items() if key not in foreign})
        words = shell([f"~{path}", f"+{path}={kept}"])
        raise UserError(f"{said} Hydra merges a node into the option's. To replace it: {words}")
    return parameters


def _check_combinations(values: Mapping[str, Any]) -> None:
    if (named := values.get("lab", lab_name())) != lab_name():
        raise UserError(
            f"lab={named}: it is the project's, not a run's. Set it in conf/train.yaml."
        )
    trainer, data = values["trainer"], values["data"]
    task, loss = (values[group].get("_target_", "").split(".")[-1] for group in ("task", "loss"))
    kind = task.lower()
    shipped_task = _is_shipped(values["task"])
    if shipped_task and data.get("target_kind") not in (None, kind):
        raise UserError(
            f"task={kind} does not fit {data['target_kind']} targets, which this data set has. "
            f"Use task={data['target_kind']}."
        )
    if shipped_task and kind not in LOSSES.get(loss, (kind,)):
        fitting = " or ".join(LOSSES[loss])
        raise UserError(f"loss={loss} is for task={fitting}, and this is task={kind}.")
    nodes = {f"data.{key}": data.get(key) for key in ("source", "augmentation")}
    for path, node in {"model": values["model"], **nodes}.items():
        if isinstance(node, Mapping) and node.get("input_shape", ...) is None:
            raise UserError(
                f"data.input_shape=null: {path}._target_={node.get('_target_')} takes a shape. "
                "Set it, such as data.input_shape='[3,64,64]'."
            )
    for path in ("model", "task"):
        _refuse_null_numbers(path, values[path], data)
    source = data["source"]
    if isinstance(source, Mapping) and source.get("root", "") is None:
        raise UserError("data.root must be given: add data.root=…")
    _check_data(data)
    if trainer["precision"] == "fp16" and trainer["device"] in ("cpu", "mps"):
        raise UserError(
            f"trainer.precision=fp16 needs CUDA, and trainer.device={trainer['device']}. "
            "Use trainer.precision=bf16."
        )
    fsdp_dtypes = (trainer["fsdp"]["param_dtype"], trainer["fsdp"]["reduce_dtype"])
    if "fp16" in fsdp_dtypes and trainer["precision"] != "fp16":
        raise UserError(
            "trainer.fsdp.param_dtype or reduce_dtype=fp16: small gradients vanish without a loss "
            "scale, which trainer.precision=fp16 has. Use bf16."
        )
    if trainer["strategy"] == "fsdp" and trainer["channels_last"]:
        raise UserError(
            "trainer.channels_last=true: FSDP shards contiguous parameters only. "
            "Use trainer.channels_last=false."
        )
    if all(trainer[key] is None for key in ("max_epochs", "max_steps", "max_seconds")):
        raise UserError(
            "trainer.max_epochs, max_steps and max_seconds are all null: "
            "the run would never end. Set one."
        )
    scheduler = values["scheduler"]
    if None not in (scheduler.get("warmup_steps"), scheduler.get("warmup_fraction")):
        raise UserError(
            f"scheduler.warmup_steps={scheduler['warmup_steps']} and "
            f"warmup_fraction={scheduler['warmup_fraction']} say the same thing twice. Set one."
        )
    if trainer["monitor"] is None:
        monitor.refuse_without(values)
    else:
        monitor.refuse_unmeasured("trainer.monitor", str(trainer["monitor"]), data)


def _refuse_null_numbers(path: str, node: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raise UserError for null where a class of the lab takes a number of the data's."""
    target = str(node.get("_target_", ""))
    nulls = [key for key in ("num_outputs", "num_classes") if node.get(key, ...) is None]
    if nulls and target.startswith(f"{lab_name()}."):
        parameters = parameters_of(target, path) or {}
        for key in nulls:
            if key in parameters and parameters[key].annotation in (int, "int"):
                of = "data" if data.get(key) is None else path
                raise UserError(
                    f"{of}.{key}=null: {path}._target_={target} takes a number. Set it, such as "
                    f"{of}.{key}=10."
                )


def _is_shipped(task: Mapping[str, Any]) -> bool:
    return str(task.get("_target_", "")).startswith(f"{lab_name()}.tasks.")


def _check_mixing(data: Mapping[str, Any]) -> None:
    node = data.get("mixing")
    if node is None:
        return
    if not isinstance(node, Mapping):
        raise UserError(
            f"data.mixing={leads.shown(node)} must be a node with a _target_, such as "
            f"{{_target_: {lab_name()}.data.augment.MixUp, alpha: 0.2}}, or null."
        )
    parameters = check_signature(node, "data.mixing")
    for needed, parameter in parameters.items():
        kinds = (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if parameter.default is parameter.empty and parameter.kind in kinds and needed not in node:
            raise UserError(f"data.mixing.{needed} must be given: {node['_target_']} needs it.")


def _check_data(data: Mapping[str, Any]) -> None:
    _check_folds(data)
    kind = data.get("target_kind")
    refuse_sampling(data.get("sampling"), kind)
    if data.get("augment") and isinstance(mixing := data.get("mixing"), Mapping):
        name = str(mixing.get("_target_")).rpartition(".")[2]
        refuse_mixing(name, kind, data.get("ignore_index"))


def _check_folds(data: Mapping[str, Any]) -> None:
    folds, fold, source = data.get("folds"), data.get("fold"), data["source"]
    if folds is None:
        if fold:
            raise UserError(f"data.fold={fold}: data.folds=null. Set data.folds to their number.")
        return
    if fold >= folds:
        raise UserError(
            f"data.fold={fold}: with data.folds={folds}, the last fold is {folds - 1}. Choose "
            f"0 … {folds - 1}."
        )
    if isinstance(source, Mapping) and "folds" not in source:
        raise UserError(
            f"data.folds={folds}: {source.get('_target_')} makes no folds, as its test split is "
            "given. Use data.folds=null. A source of your own takes folds: ${data.folds} and "
            "fold: ${data.fold}, and passes them to regrow.feeding.splits.cut_examples."
        )
