"""Explain errors of Hydra and OmegaConf in one line, with the file or the key, and the fix."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config import flags, leads, own_code, places
from regrow.config.command_line import quoted, read, shell
from regrow.config.keys import known_keys, options_with
from regrow.config.origins import shown
from regrow.config.rules import RULES
from regrow.config.targets import HANDED_IN, HANDED_TO, parameters_of, said_by
from regrow.config.yaml_keys import Choice, choices_of, keys_of
from regrow.dotted import walk
from regrow.errors import UserError, did_you_mean
from regrow.failing import one_line
from regrow.project import CONF, lab_name


def composition_error(error: Exception) -> str:
    """Return an error of Hydra's or OmegaConf's in one line, with the closest valid word."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_file(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    text = str(error)
    for pattern in (r"Ambiguous value for argument '(.+)'\n", r"Sweep parameters '(.+)' requires"):
        if found := re.search(pattern, text):
            return several_values(found[1])
    if found := re.search(r"Additional config directory '(.+)' not found", text):
        return (
            f"--config-dir {found[1]}: there is no such folder. Give its new place; a resume "
            "of a run that was composed with it needs it too."
        )
    if found := re.search(r"Sweeping over Hydra's configuration is not supported : '(.+)'", text):
        return f"{found[1]}: a setting of Hydra's takes one value."
    if found := re.search(r"In '([^']+)': Could not override '([^']+)'", text):
        return _override_in_file(*found.groups())
    if found := re.search(r"In '([^']+)': Inv[^\n]+\n.*Group Default for '([^']+)' exists", text):
        return _override_in_file(*found.groups())  # Hydra 1.4
    if found := re.search(r"Multiple values for ([^ ]+)\.|^(\S+) appears more than once", text):
        return _chosen_twice(found[1] or found[2])
    if found := re.search(r"config groups is not supported: '\++([^']+)'", text):
        return f"++{found[1]}: an option of a group is chosen without a plus: {found[1]}"
    if found := re.search(r"An item is already at '([^']+)'", text):
        argument = _typed(f"+{found[1]}") or f"+{found[1]}=…"
        return f"{argument}: the key is there already. Write it without +: {argument[1:]}"
    if found := re.search(r"Could not delete '([^']+)'", text):
        return _cannot_delete(found[1])
    if found := re.search(r"Could not delete from config\. '([^']+)'", text):
        return unknown_key(found[1], sign="~")
    found = re.search(r"full_key: (hydra\.\S+)", text)
    if found and (replaced := leads.replaced(found[1])):
        return f"{found[1]}: {replaced}"
    for pattern in (
        r"Could not override '([^']+)'",
        r"is not in struct\s+full_key: (\S+)",
        r"Key '\w+' not in '\w+'\s+full_key: (\S+)",
    ):
        if found := re.search(pattern, text):
            return unknown_key(found[1])
    if found := re.search(r"Interpolation key '([^']+)' not found\s+full_key: (\S+)", text):
        return f"{found.group(2)}: ${{{found.group(1)}}} names no key of the config."
    if found := re.search(r"Unsupported interpolation type (\S+)\s+full_key: (\S+)", text):
        return (
            f"{found.group(2)}: there is no resolver {found.group(1)}. Register it in resolvers.py "
            "in the root of the repository: see docs/hydra.md."
        )
    if found := re.search(
        r"(\w+) raised while resolving interpolation: (.*)\s+full_key: (\S+)", text
    ):
        kind, said, key = found.groups()
        if unset := re.search(r"Environment variable '(\w+)' not found", said):
            name = unset[1]
            return f"{key}: {name} is not set. Set it, or give a default: ${{oc.env:{name},…}}"
        return f"{key}: {kind}: {said.rstrip()}"
    if found := re.match(r"Error merging override (.+)", text):
        return _cannot_merge(found[1], error)
    if text.startswith("Error locating target"):
        return said_by(error)
    if (said := hydras_value_error(error)) is not None:  # Hydra 1.4 has classes of its own for them
        return said
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith("Set the environment variable"))


def hydras_value_error(error: Exception) -> str | None:
    """Return a ValueError that Hydra raises about a config in one line; None for any other."""
    text = one_line(str(error))
    if found := re.match(r"Invalid defaults list in '([^']+)', defaults must be a list", text):
        return f"{_entry(found[1])}: defaults must be a list: begin each of its lines with `- `."
    if found := re.match(r"invalid literal for int\(\) with base 10: '(\w+)'$", text):
        for argument in sys.argv[1:]:
            key = argument.partition("=")[0].lstrip("+~")
            if key.endswith(f".{found[1]}"):
                return (
                    f"{key}: {key.rpartition('.')[0]} is a list. Give it as a whole, or by number."
                )
    if found := re.match(r"No config source registered for schema (\w+)", text):
        return (
            f"{flags.SEARCH_PATH}: Hydra reads nothing from {found[1]}://. Use a folder, or "
            "pkg://package.module."
        )
    return None


def _cannot_merge(override: str, error: Exception) -> str:
    """Return the error for an override that cannot be merged into the composed config."""
    reason = one_line(str(error.__cause__ or "").partition("full_key:")[0])
    if reason.startswith(("Cannot merge DictConfig with", "Cannot merge incompatible")):  # 2.3, 2.4
        reason = "a list and a mapping cannot take each other's place"
    if "does not support deletion" in reason:
        reason = "a setting of Hydra's has a value, and cannot be left out"
    if override.startswith("~") and "resolving interpolation" in reason:
        reason = (
            f"its value is an interpolation, which Hydra resolves too early. Leave {override} out"
        )
    return f"{override}: {reason.rstrip('.') or 'the config does not take it'}."


def _missing_file(error: Any) -> str:
    group, _, option = error.missing_cfg_file.rpartition("/")
    if group in ("hydra/launcher", "hydra/sweeper", "hydra/output"):
        return leads.replaced_option(group, option)
    where = re.match(r"In '([^']+)': ", str(error))
    parent = where[1].rpartition("/")[0] if where else ""
    inner = group.removeprefix(f"{parent}/")
    if where and parent and inner != group and places.is_group(inner):
        at = _entry(where[1], f"{inner}/{option}")
        return f"{at}: write `override /{inner}: {option}`, with a slash."
    is_typed = _is_typed(group, option)
    if where and not error.options and not is_typed:
        return _missing_default(where[1], group, option)
    found = error.options or (places.options(group) if is_typed else [])
    options = [each for each in found if not each.startswith("_")]
    if not options:
        return _missing_primary(error.missing_cfg_file)
    hint = leads.of_option(group, option) or did_you_mean(option, options)
    if option in ("none", "false", "no") and group in leads.NONE:
        hint, options = f" {leads.NONE[group]}", []
    said = f"{_chosen_at(group, option)}{group}={option}: there is no such option.{hint}"
    return f"{said} Use {', '.join(options)}." if options else said


def _missing_default(config: str, group: str, option: str) -> str:
    """Return the error for an entry of a file's defaults list that names no existing file."""
    missing = f"{group}/{option}".lstrip("/")
    parent = config.rpartition("/")[0]
    file = _entry(config, missing, missing.removeprefix(f"{parent}/"))
    if " " in missing or ":" in missing:
        return (
            f"{file}: an entry of its defaults list cannot be read. Write it as "
            "`- override /model: cnn`, with a space after the colon."
        )
    if (main := flags.typed(sys.argv[1:]).get("path")) and missing == "train":
        return (
            f"{file}: there is no train.yaml in {main}, which --config-path puts in the place of "
            f"conf/. To add a folder: {shell(['--config-dir', main])}"
        )
    hint = did_you_mean(option, places.options(group)) if group else ""
    return f"{file}: its defaults list names {missing}.yaml, which does not exist.{hint}"


def _missing_primary(name: str) -> str:
    """Return the error for a primary config that is not found.

    It must be a name, found in conf/ (or --config-path) or in --config-dir.
    """
    given = flags.typed(flags.absolute(sys.argv[1:]))
    name = str(given.get("name", name))
    said, file = f"--config-name {name}:", f"{name.removesuffix('.yaml')}.yaml"
    for place in [str(place) for place in given.get("searchpath", [])]:
        if place.startswith("file://") and Path(place.removeprefix("file://"), file).is_file():
            typed = shell(["--config-dir", place.removeprefix("file://")])
            return f"{said} {flags.SEARCH_PATH} is not searched for it. Use {typed}"
    if "/" in file and Path(file).is_file():
        path = Path(file)
        added = [] if path.parent.resolve() == CONF else ["--config-dir", str(path.parent)]
        typed = shell([*added, "--config-name", path.stem])
        return f"{said} it is a name, not a path. Use {typed}"
    main = str(given.get("path") or "conf").removeprefix("file://")
    folders = [main, *([given["dir"]] if "dir" in given else [])]
    names = [p.stem for folder in places.folders() for p in folder.glob("[!_]*.yaml")]
    hint = did_you_mean(name, names)
    return f"{said} there is no {file} in {' or '.join(folders)}.{hint}"


def _unreadable(error: Any) -> str:
    if re.search(r"[\r\n]", str(error.override)):
        return _broken_line(str(error.override))
    if said := leads.as_shape(str(error.override)):
        return said
    key, equals, value = str(error.override).partition("=")
    reason = one_line(str(error)).partition(" See https://")[0]
    advice = f"{key}={quoted(value)}"
    if not equals or read(advice) is ...:  # the key is invalid
        return f"{error.override} cannot be read: {reason}"
    if _is_interpolation(value):  # Hydra reads one within another in quotes alone
        advice = f"{key}='{value}'" if '"' in value else f'{key}="{value}"'
    items = _with_quotes(value)
    if items and read(f"{key}={items}") is not ...:
        return (
            f"{error.override} cannot be read. Text with special characters needs quotes: "
            f"{shell([f'{key}={items}'])}"
        )
    if value[:1] in "[{":
        return (
            f"{error.override} cannot be read as a list or mapping: {reason}. If it is one "
            f"text: {shell([advice])}"
        )
    said = f"{error.override} cannot be read."
    return f"{said} Text with special characters needs quotes: {shell([advice])}"


def _is_interpolation(value: str) -> bool:
    """Return True if OmegaConf reads an interpolation in the text; one quote may go around it."""
    from omegaconf.errors import GrammarParseError
    from omegaconf.grammar_parser import parse

    if "${" not in value or {"'", '"'} <= {*value}:
        return False
    with contextlib.suppress(GrammarParseError):
        parse(value)
        return True
    return False


def _with_quotes(value: str) -> str:
    """Return a list, or lists in a list, with quotes around the items that need them; or ""."""

    def shown(found: re.Match[str]) -> str:
        item = found[0].strip()
        return item if not item or read(f"x={item}") is not ... else quoted(item)

    is_list = re.fullmatch(r"\[[^{}()'\"]+\]", value)
    return re.sub(r"[^\[\],]+", shown, value) if is_list else ""


def _broken_line(override: str) -> str:
    """Return the error for an override with a line break, which Hydra reads in quotes alone."""
    lines = [line.strip() for line in override.splitlines() if line.strip()]
    said = f"{override!r} contains a line break."
    if len(lines) > 1 and all(re.match(r"[~+]*[\w./@]+=|~", line) for line in lines):
        return f"{said} Write them as {len(lines)} arguments: {shell(lines)}"
    key, equals, value = override.partition("=")
    joined = f"{said} Leave it out: {shell([''.join(lines)])}"
    if len(lines) < 2 or not equals or value[:1] in "[{" or "\n" in key:
        return joined
    return f"{joined}, or quote a text that has one: {shell([f'{key}={quoted(value)}'])}"


def several_values(argument: str) -> str:
    """Return the error for several values in a single run."""
    if said := leads.as_shape(argument):
        return said
    key = argument.partition("=")[0]
    said = f"{argument}: several values are a sweep: add -m."
    parsed = read(argument)
    if not hasattr(parsed, "is_interval_sweep"):
        return said
    if parsed.is_interval_sweep():
        return f"{argument}: values from an interval are a search: add -m sweep=optuna."
    if parsed.value_type.name == "GLOB_CHOICE_SWEEP":
        return said
    group = key.lstrip("+")
    if places.is_group(group) and group != "logger":
        return said
    values = [str(each) for each in parsed.sweep_string_iterator()]
    if len(values) > 20:
        return said
    line = f"{key}=[{','.join(values)}]"
    return f"{said} A key that takes a list: {line}."


def _file(config: str) -> str:
    return f"{config.removesuffix('.yaml')}.yaml"


def _entry(config: str, *wanted: str) -> str:
    """Return file:line of an entry of a config's defaults list, else of the list.

    `wanted` are its group and option, or a group with a slash at the end, or a name alone.
    """
    parent, _, name = config.rpartition("/")
    if (path := places.file_of(parent, name)) is None:
        return _file(config)  # a node of the ConfigStore
    with contextlib.suppress(Exception):  # Hydra has read it, and the error matters more
        lines = [
            choice.line
            for choice in choices_of(path)
            if {f"{choice.group}/{choice.option}".lstrip("/"), f"{choice.group}/"} & {*wanted}
        ]
        return f"{shown(path)}:{(*lines, keys_of(path)['defaults'].line)[0]}"
    return shown(path)


def _entries() -> Iterator[tuple[Path, Choice]]:
    """Yield the entries of the defaults lists of the primary config and of the chosen files."""
    todo = [("", places.primary())]
    for argument in flags.split(sys.argv[1:])[1]:
        group, _, value = argument.lstrip("+").partition("=")
        if places.is_group(group):
            todo += [(group, name) for name in places.names_in(value)]
    seen: set[Path] = set()
    while todo:
        group, name = todo.pop(0)
        path = places.file_of(group, name)
        if path is None or path in seen:
            continue
        seen.add(path)
        with contextlib.suppress(Exception):  # a file that cannot be read has its own error
            for choice in choices_of(path):
                yield path, choice
                todo.append((choice.group or group, choice.option))


def _chosen_at(group: str, option: str) -> str:
    """Return `file:line: ` of the entry that chooses an option; "" without one, or if typed."""
    if _is_typed(group, option):
        return ""
    found = (
        f"{shown(path)}:{choice.line}: "
        for path, choice in _entries()
        if (choice.group, choice.option) == (group, option)
    )
    return next(found, "")


def _is_typed(group: str, option: str) -> bool:
    typed = (a.lstrip("+").partition("=") for a in flags.split(sys.argv[1:])[1])
    return any(key == group and option in places.names_in(value) for key, _, value in typed)


def _override_in_file(config: str, key: str) -> str:
    """Return the error for an `override` in a file's defaults list that overrides nothing."""
    parent = config.rpartition("/")[0]
    name, _, package = key.partition("@")
    group = name.removeprefix(f"{parent}/") if parent else name
    file = _entry(config, f"{group}/")
    if parent and package and package.split(".")[0] == parent.replace("/", "."):
        return (
            f"{_file(config)}: its first line must be `{places.HEADER}`, so that it overrides "
            f"{name.removeprefix(f'{parent}/')}."
        )
    if group != name and (places.is_group(group) or group.startswith("hydra/")):
        if replaced := leads.replaced(group):
            return f"{file}: override /{group}: {replaced}"
        return f"{file}: write `override /{group}`, with a slash."
    if package:
        outer = package.split(".")[0]
        return f"{file}: its values do not go below {outer}. Choose it without @{outer}."
    if places.is_group(group):
        return (
            f"{file}: `override /{group}` comes before anything chooses {group}. Write "
            f"`/{group}: …` without `override`."
        )
    hint = leads.lead(group) or did_you_mean(group, places.groups())
    return f"{file}: there is no group {group} to override.{hint}"


def _chosen_twice(group: str) -> str:
    if argument := _typed(f"+{group}"):
        return f"{argument}: an option is chosen without a plus: {argument[1:]}"
    primary = places.file_of("", places.primary())
    for path, choice in _entries():
        if choice.group == group and not choice.is_override and path != primary:
            at = f"{shown(path)}:{choice.line}"
            return f"{at}: write `override /{group}: {choice.option}`."
    return f"{group} is chosen twice. In a defaults list write `override /{group}: …`."


def _cannot_delete(group: str) -> str:
    if group in leads.NONE:
        return f"~{group}: the group cannot be left out. {leads.NONE[group]}"
    if options := places.options(group):
        return f"~{group}: the group cannot be left out. Choose one of {', '.join(options)}."
    return unknown_key(group, sign="~")


def wrong_options(arguments: Sequence[str]) -> str | None:
    """Return the error for the first group whose option is not a name, or None."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        group = key.lstrip("+~")
        if group == "hydra":
            return f"{argument}: Hydra's settings are set one by one, such as hydra.run.dir=…"
        if group.startswith("hydra/") and equals:
            if any(
                value is not ... and not isinstance(value, str) for value in _plain_values(argument)
            ):
                return f"{argument}: it takes the name of an option. Leave {group} out for ours."
            continue
        if key.startswith("~") and group not in leads.RECIPES and (CONF / group).is_dir():
            return _cannot_delete(group)
        if not equals or not places.is_group(group):
            continue
        names = list(_plain_values(argument))
        wrong = [each for each in names if each is not ... and not isinstance(each, str)]
        several = group in leads.GROUPS and isinstance(read(argument), list)
        if not (wrong or value == "" or several):
            continue
        none = wrong == [None] or wrong == [False] or value == ""
        if none and group in leads.RECIPES:
            return (
                f"{argument}: leave it out. No {group} is chosen by itself; one that your own "
                f"config chooses is left out by ~{group}."
            )
        options = (
            f"{group} takes the name of one of its options: {', '.join(places.options(group))}"
        )
        hint = f" {leads.NONE[group]}" if none and group in leads.NONE else ""
        return f"{argument}: {options}.{hint}"
    return None


def _plain_values(argument: str) -> Iterator[Any]:
    """Yield the values in an override, including those in a list or a sweep."""
    value = read(argument)
    if hasattr(value, "is_discrete_sweep"):
        try:
            found: Any = list(value.sweep_iterator()) if value.is_discrete_sweep() else []
        except Exception:  # only Hydra's loader can expand a glob
            found = []
    else:
        found = value if isinstance(value, list) else [value]
    for each in found:
        each = each.text if hasattr(each, "text") else each  # a quoted string
        if isinstance(each, dict):
            continue
        yield from each if isinstance(each, list) else [each]


def unknown_key(name: str, *, sign: str = "") -> str:
    """Return the error for a key that the composed config lacks."""
    keys = known_keys()
    group, _, rest = name.partition(".")
    if "@" in name:
        plain = name.partition("@")[0]
        return f"{name}: a group has one place here. Write {plain}=… without @."
    if not sign and name.startswith(("hydra.callbacks.", "hydra.job.env_set.")):
        argument = _typed(name) or f"{name}=…"
        return f"{argument}: a name of your own needs a plus there: +{argument}"
    if group == "hydra":
        return f"{name}: Hydra has no such setting.{did_you_mean(name, hydras_keys())}"
    if name.replace("/", ".") in keys and "/" in name:
        return f"{name}: a key is written with dots: {name.replace('/', '.')}=…"
    if group in leads.RECIPES and rest:
        return f"{name}: {group} has no keys of its own. Write {rest}=…"
    if not sign and (target := _target_that_takes(name)):
        return _in_python_alone(name, target)
    if sign and name in keys:
        return f"{sign}{name}: it is not there, or is null already. Leave {sign}{name} out."
    if not sign and (said := _merged_node(name, keys) or _in_a_mapping(name, keys)):
        return said
    if said := leads.as_shape(_typed(name)):
        return said
    lead = leads.lead(name)
    if not lead and name.rpartition(".")[2] in places.groups():
        lead = f" Here that is the group {name.rpartition('.')[2]}."
    if not lead and (others := options_with(name)):
        return f"{name}: the chosen {group} has no such key.{others}"
    here = [key for key in keys if key.startswith(f"{group}.")]
    hint = did_you_mean(name, here or keys) or did_you_mean(name.rpartition(".")[2], keys)
    if sign:
        return f"{sign}{name}: there is no such key.{hint}"
    if not (lead or hint) and not here:
        return f"{name}: there is no such key.{where_own_keys_go()}"
    return f"{name}: there is no such key.{lead or hint}"


def _typed(key: str) -> str:
    """Return the argument of this command that gives `key` a value; "" without one."""
    return next((a for a in sys.argv[1:] if a.startswith(f"{key}=")), "")


def _merged_node(name: str, keys: Mapping[str, Any]) -> str | None:
    """Return the error for a mapping with keys that the node at `name` lacks; None for others."""
    argument = _typed(name)
    value = read(argument) if argument and name in keys else None
    if not isinstance(value, Mapping):
        return None
    new = [str(key) for key in value if f"{name}.{key}" not in keys]
    if "_target_" not in value:
        return unknown_key(f"{name}.{new[0]}") if new else None
    said = f"{name}: Hydra merges this node into the option's, which has other keys."
    if "." not in name:
        return f"{said} Write the node to conf/{name}/mine.yaml, and choose it: {name}=mine"
    return f"{said} To replace that: {shell([f'~{name}', f'+{argument}'])}"


def typed_node(name: str) -> Mapping[str, Any]:
    """Return the mapping that was typed for a key; empty if none was."""
    argument = _typed(name) or _typed(f"+{name}") or _typed(f"++{name}")
    value = read(argument) if argument else None
    return value if isinstance(value, Mapping) else {}


def _in_a_mapping(name: str, keys: Collection[str]) -> str | None:
    """Return the error for a key below one that takes a mapping and has none; None for others."""
    parent, _, key = name.rpartition(".")
    rule = RULES.get(parent)
    if parent == "data.mixing":
        node = f"{{_target_: {lab_name()}.data.augment.MixUp, alpha: 0.2}}"
        return (
            f"{name}: {parent} is null. Give it as a whole, such as {shell([f'{parent}={node}'])}"
        )
    if parent not in keys or rule is None or '"object"' not in json.dumps(rule.schema):
        return None
    said = f"{name}: {parent} has no keys yet. Give it as a whole"
    argument = _typed(name)
    value = read(argument) if argument else ...
    if rule.allows({key: value}):
        typed = argument.partition("=")[2]
        return f"{said}: {shell([f'{parent}={{{key}: {typed}}}'])}"
    return f"{said}: it takes {rule.says}."


def _in_python_alone(name: str, target: str) -> str:
    """Return the error for a key that its target takes, and that the option's file lacks."""
    argument = _typed(name) or f"{name}=…"
    group, *nodes, key = name.split(".")
    option = _of_choices()["hydra"]["runtime"]["choices"].get(group)
    path = places.file_of(group, option) if isinstance(option, str) else None
    once = f"+{argument}"
    if path is None or f"_target_: {target}" not in path.read_text(encoding="utf-8"):
        return f"{name}: {target} takes it, and no file lists it. Add a plus: {once}"
    line = f"{key}: {argument.partition('=')[2]}"
    for node in reversed(nodes):
        line = f"{node}: {{{line}}}"
    return (
        f"{name}: {target} takes it, and {own_code.shown(path)} does not list it. Add `{line}` to "
        f"that file, or type a plus for this run alone: {once}"
    )


def where_own_keys_go() -> str:
    return f" Keys of your own go into {places.primary_file(places.primary())}."


def hydras_keys() -> list[str]:
    """Return the dotted keys of Hydra's own node."""
    from hydra.conf import HydraConf
    from omegaconf import OmegaConf

    node: Any = OmegaConf.to_container(OmegaConf.structured(HydraConf), resolve=False)
    return [key for key, _ in walk(node, "hydra.") if not key.startswith("hydra.defaults")]


def takes(target: str, path: str, key: str) -> bool:
    """Return True if a config may give this argument to the target of the node at `path`.

    Imports the target's module. False for an argument that the run passes itself.
    """
    parameters = parameters_of(target, path)
    if parameters is None:
        return True  # the call itself reports an error
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    # conf/ lists every argument of the engine's targets that a config may give.
    handed_in = {*HANDED_IN, *HANDED_TO.get(path, ())}
    return key in parameters and key not in handed_in and not target.startswith("regrow.")


def _target_that_takes(name: str) -> str | None:
    """Return the target of the key's node if it accepts the key, else None. Imports the target.

    A key like one in the file is taken for a mistake in spelling if it is torch's target: its
    import takes two seconds.
    """
    parent, _, key = name.rpartition(".")
    if not parent or not places.is_group(parent.split(".")[0]):
        return None
    node = _of_choices()
    for part in parent.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str) or key in node:
        return None
    if target.startswith("torch.") and did_you_mean(name, (f"{parent}.{k}" for k in node)):
        return None
    with contextlib.suppress(UserError):
        if takes(target, parent, key):
            return target
    return None


def _of_choices() -> Any:
    """Return the config composed from the command line's options and targets, without values."""
    from omegaconf import OmegaConf

    from regrow.config.composition import composition, hydra_as_it_was

    arguments = flags.absolute(sys.argv[1:])
    source = {**flags.DEFAULT, **flags.typed(arguments)}
    chosen = [
        line
        for line in flags.split(arguments)[1]
        if (places.is_group(key := line.partition("=")[0]) or key.endswith("._target_"))
        and isinstance(read(line), str | list)
    ]
    try:
        with hydra_as_it_was():
            return OmegaConf.to_container(composition(source, chosen), resolve=False)
    except Exception:  # the result only adds a hint to an error
        return {}
