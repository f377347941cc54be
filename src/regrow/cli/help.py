"""`--help` of the scripts over `conf/`: one screen, and a page for each group and key."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from regrow.config import flags, places
from regrow.config.command_line import key_of, quoted, shell
from regrow.config.composition import composition, hydra_as_it_was
from regrow.config.entries import KeyEntry, accepted, inherited, of_file, option, repeated, set_at
from regrow.config.keys import known_keys
from regrow.config.leads import RECIPES, lead
from regrow.config.rules import RULES, applies, of_shipped
from regrow.config.target_docs import said_by_target
from regrow.config.targets import HYDRAS_OWN
from regrow.config.yaml_files import read_yaml
from regrow.config.yaml_keys import head_of
from regrow.errors import UserError, did_you_mean
from regrow.record.redact import redact_all

HELP = ("-h", "--help")
# The keys that users change most, shown in two columns.
COMMON = (
    *("data.batch_size", "optimizer.lr", "optimizer.weight_decay", "trainer.max_epochs"),
    *("trainer.device", "trainer.devices", "trainer.precision", "trainer.accumulation_steps"),
    *("trainer.clip_norm", "trainer.ema_decay", "trainer.early_stopping.patience", "seed"),
)
EXAMPLES = {
    "train": (
        ("experiment=digits_cnn seed=1", "a recipe with a change"),
        ("resume=outputs/digits/latest", "resume a run, or train it longer"),
        ("-m seed=0,1,2", "a sweep; -m sweep=optuna …: a search"),
        ("--check data=csv …", "describe a run without starting it"),
    ),
    "find_lr": (
        ("model=cnn", "suggest a learning rate"),
        ("find_lr.max_lr=1", "search for a rate below 1"),
    ),
}
NARROW = 33  # the column of comments on a page of one option
BASE = "_base"  # the file of what all options of a group share
OFTEN = ("data.num_classes", "data.input_shape", "data.normalize")
SELDOM = ("data.target_kind", "data.num_outputs")  # an option sets them, and rarely a user
# If several of these keys of a node have their defaults, an option's page shows only their names.
RARELY = (
    *("crop_ratio", "brightness", "contrast", "saturation", "hue"),
    *("exif_orientation", "timeout_seconds", "retries"),
)
# Values to type for keys whose own value suggests none, by the last part of the key. These keys
# can be typed even where they follow another, such as trainer.monitor.
OTHERS: dict[str, list[Any]] = {
    "adamw_betas": [[0.9, 0.95], [0.9, 0.99]],
    "adjust_lr_fn": ["original", "match_rms_adamw"],
    "betas": [[0.9, 0.95], [0.9, 0.99]],
    "crop_scale": [[0.5, 1.0], [0.25, 1.0]],
    "crop_ratio": [[0.9, 1.1], [1.0, 1.0]],
    "delimiter": [";", "|"],
    "depth": [18, 50],
    "jobs": [4],
    "leave_out": [["hidden", "empty", "folder/broken.jpg"], ["hidden", "empty"]],
    "metric": ["val/loss", "val/accuracy"],
    "monitor": ["val/loss", "val/accuracy"],
    "normalize": ["none", "train"],
    "resize": [256],
    "vocabulary": ["bpe", "characters"],
}


def is_asked(arguments: Sequence[str]) -> bool:
    return any(argument in HELP for argument in arguments)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the groups and keys that help is asked about, and the other arguments but --help.

    `--help data=csv` alone asks about the group data with that option.
    """
    place = next(index for index, argument in enumerate(arguments) if argument in HELP)
    asked = flags.split([a for a in arguments[place:] if a not in HELP])[1]
    found, others = flags.split([a for a in arguments if a not in HELP])
    topics = [a for a in others if "=" not in a and not a.startswith(("~", "+"))]
    if asked == others and len(asked) == 1 and "=" in asked[0]:
        topics = [key_of(asked[0])]
    return topics, [*found, *(a for a in others if a not in topics)]


def show(config_name: str, topics: Sequence[str], arguments: Sequence[str]) -> bool:
    """Print the help of the composed config, or of `topics`.

    Returns False if the user's own config has a help of its own, for Hydra to print. Raises
    UserError for an unknown topic, and Hydra's errors.
    """
    source = {**flags.DEFAULT, "name": config_name, **flags.typed(arguments)}
    overrides = [o for o in flags.split(arguments)[1] if not o.startswith(f"{flags.SEARCH_PATH}=")]
    with hydra_as_it_was():
        from hydra.core.hydra_config import HydraConfig

        config = composition(source, overrides)
        HydraConfig.instance().set_config(config)
        if not topics and _has_its_own(config):
            return False
        lines = [line for topic in topics for line in _topic(topic, config)]
        for line in lines or _overview(str(source["name"]), config):
            print(line)
    return True


def _has_its_own(config: Any) -> bool:
    import hydra

    usual = read_yaml(Path(hydra.__file__).parent / "conf" / "hydra" / "help" / "default.yaml")
    node = OmegaConf.to_container(config.hydra.help, resolve=False)
    return isinstance(node, dict) and node["template"] != usual["template"]


# -- One screen ------------------------------------------------------------------------------------


def _overview(name: str, config: Any) -> Iterator[str]:
    script = Path(sys.argv[0]).name
    yield f"python scripts/{script} [flags] group=option key=value …"
    for arguments, what in EXAMPLES.get(name, ()):
        yield f"  {script} {arguments}".ljust(44) + what
    yield ""
    yield "Common keys, and their values here:"
    common = [key for key in COMMON if OmegaConf.select(config, key, default=...) is not ...]
    if name in config and name != "train":
        common = [f"{name}.{key}" for key in config[name] if key not in HYDRAS_OWN] + common
    pairs = [f"{key}={_value(config, key)}" for key in common]
    half = -(-len(pairs) // 2)
    for left, right in zip(pairs[:half], [*pairs[half:], ""], strict=False):
        yield f"  {left:<38}{right}".rstrip()[:80]
    yield "Groups, each with the chosen option first:"
    choices = config.hydra.runtime.choices
    for group in sorted(places.groups()):
        if options := places.options(group):
            chosen = places.names_in(choices.get(group) or "")
            others = [each for each in options if each not in chosen]
            first = ",".join(chosen) or "-"
            yield _cut(f"  {group:<11}{first:<12} {' '.join(others)}".rstrip(), 79)
    yield "More: --help optimizer, --help trainer.checkpoint; Hydra's own: --hydra-help"


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 2].rpartition(" ")[0] + " …"


# -- A group or a key ------------------------------------------------------------------------------


def _topic(topic: str, config: Any) -> Iterator[str]:
    group = topic.strip("/")
    if places.is_group(group) and places.options(group):
        yield from _group(group, config)
        return
    key = group.replace("/", ".")
    if key == "hydra" or key.startswith("hydra."):
        raise UserError(f"--help {topic}: these are Hydra's own settings. Use --cfg hydra.")
    entry, parent, where = _entry(key, config)
    if entry is None:
        words = [*places.groups(), *known_keys()]
        raise UserError(
            f"--help {topic}: there is no such group or key."
            f"{lead(key) or did_you_mean(key, words) or ' --help lists the groups.'}"
        )
    if entry.below:
        yield f"{key} ({where})"
        yield from _keys(key, entry, parent, config)
    else:
        yield from _page(key, entry, parent, where, config)


def _page(
    key: str, entry: KeyEntry, parent: KeyEntry | None, where: str, config: Any
) -> Iterator[str]:
    """Yield all that is known of one key."""
    shipped, here = _plain(entry.value), _current(key, entry, config)
    named, _, option_of = where.partition("=")
    group = named if option_of else key.partition(".")[0]
    below = key[len(group) + 1 :]  # a slash of the group is a dot of the key
    chosen = config.hydra.runtime.choices.get(group)
    is_chosen = option_of in places.names_in(chosen or "")
    lacks = bool(option_of) and not is_chosen and bool(chosen)
    yield f"{key}={here}" + (
        f" with {where}; the chosen {group}={chosen} has no such key" if lacks else ""
    )
    if entry.comment:
        yield from _wrapped("", entry.comment, column=2)
    rows = {"values": accepted(key, entry, parent)}
    if shipped == "???":
        rows["default"] = "none: it must be given"
    else:
        followed = _followed(key, entry, config)
        followed = followed or (f"{here} here" if "${" in shipped and here != shipped else "")
        rows["default"] = f"{shipped}  ({followed})" if followed else shipped
    if option_of:
        rows["set in"] = f"{set_at(group, option_of, below) or 'the ConfigStore'} ({where})"
    else:
        rows["set in"] = set_at("", Path(where).stem, key) or where
    if (of := repeated(key, entry.value)) and key.rpartition(".")[2] not in OTHERS:
        example = f"{of}=…, whose value this key takes"
    else:
        value, typed = _held(key, entry, config), key
        if group in RECIPES:  # its keys are those of other groups
            typed = below
            own = _entry(typed, config)
            entry, parent = (own[0], own[1]) if own[0] is not None else (entry, parent)
        example = _example(typed, entry, parent, value)
    for name, text in rows.items():
        if text:
            yield from _wrapped(f"  {name}:", text, column=11)
    if option_of and group not in RECIPES:
        its = (entry, parent)
        yield from _others(group, below, option_of, its, with_alike=not is_chosen)
    if lacks:
        yield f"  choose:  {where}, or another option that has the key"
    if example:
        yield from _wrapped("  type:", example, column=11)


def _others(
    group: str, below: str, shown: str, first: tuple[KeyEntry, KeyEntry | None], *, with_alike: bool
) -> Iterator[str]:
    """Yield a line for the other options with this key: default, and range and meaning if others.

    Options whose key is the same share a line; options with the facts of `first` are left out
    unless `with_alike`.
    """
    alike: dict[tuple[str, str, str], list[str]] = {}
    key = f"{group.replace('/', '.')}.{below}"
    for name in places.options(group):
        whole = option(group, name)
        found, parent = whole.at(below), _parent(whole, below)
        if name != shown and found is not None and not found.below:
            facts = (_plain(found.value), accepted(key, found, parent), found.comment)
            alike.setdefault(facts, []).append(name)
    entry, its = first
    usual = (_plain(entry.value), accepted(key, entry, its), entry.comment)
    if not with_alike:
        alike.pop(usual, None)
    for number, (facts, names) in enumerate(alike.items()):
        default = f"default {facts[0]}"
        more = [new for new, old in zip(facts[1:], usual[1:], strict=True) if new not in ("", old)]
        text = f"{group}={', '.join(names)}: {', '.join([default, *more])}"
        yield from _wrapped("  others:" if number == 0 else "", text, column=11)


def _example(key: str, entry: KeyEntry, parent: KeyEntry | None, value: Any) -> str:
    """Return a way to type the key with a value that it takes and does not have; "" for none."""
    rule = RULES.get(key) if applies(parent.target if parent else None) else None
    rule = rule or of_shipped(key, entry.value)
    schema = rule.schema if rule else {}
    name = key.rpartition(".")[2]
    tried: list[Any] = [*OTHERS.get(name, ()), *entry.listed(), *schema.get("enum", ())]
    if isinstance(value, bool):
        tried.append(not value)
    elif isinstance(value, int | float):
        tried += [value * 2, value / 2, 0.1, 1, value + 1]
    elif isinstance(value, list):
        tried.append(_other_list(name, value))
    elif isinstance(value, str) and value not in ("???", "…") and "${" not in value:
        tried.append("name")
    elif rule is not None:  # without one, a value that is not known can be of any type
        tried += [10, 0.5, "name", True, ["a"], [3, 64, 64] if name.endswith("shape") else [1, 2]]
    tried += _enums(schema)
    for each in tried:
        text = f"{key}={quoted(each) if isinstance(each, str) else _plain(each)}"
        if (
            each not in (value, None, [])
            and (rule is None or rule.allows(each))
            and "…" not in text
        ):
            return shell([text])
    return ""


def _other_list(name: str, value: list[Any]) -> list[Any]:
    """Return another list for a key that holds `value`; [] if none can be guessed."""
    if not value:
        return ["a", "b"]
    if not all(isinstance(each, int) for each in value):
        return []
    kept = 1 if name == "input_shape" and len(value) == 3 else 0  # the channels
    return [*value[:kept], *(each * 2 for each in value[kept:])]


def _enums(schema: Mapping[str, Any]) -> list[Any]:
    """Return the options of those alternatives of a schema that list them."""
    found = list(schema.get("enum", ()))
    for each in schema.get("anyOf", ()):
        found += _enums(each)
    return found


def _group(group: str, config: Any) -> Iterator[str]:
    chosen = places.names_in(config.hydra.runtime.choices.get(group) or "")
    options = places.options(group)
    is_typed = any(key_of(each) == group for each in config.hydra.overrides.task)
    if is_typed and len(chosen) == 1 and BASE in inherited(group, chosen[0]):
        yield from _option(group, chosen[0], config)
        return
    yield f"{group}=… chooses:"
    width = max(map(len, options)) + 2
    for name in options:
        path = places.file_of(group, name)
        says = _said_of(path) if path is not None else "registered in Hydra's ConfigStore"
        mark = "*" if name in chosen else " "
        yield from _wrapped(f"{mark} {name}", says, column=width + 2, most=2)
    if group in RECIPES:
        if not chosen:
            yield f"None is chosen. A file holds values of other groups: --help {group} {group}=…"
        for name in chosen:
            path = places.file_of(group, name)
            own = of_file(path, name) if path is not None else option(group, name)
            yield f"{group}={name} sets:"
            yield from _values(own, "")
        return
    for name in chosen:
        yield f"Keys of {group}={name}:"
        yield from _keys(group.replace("/", "."), option(group, name), None, config)


def _said_of(path: Path) -> str:
    """Return the comment at the top of an option's file; else what its target is."""
    content = read_yaml(path)
    target = content.get("_target_") if isinstance(content, dict) else None
    if (head := head_of(path)) or not isinstance(target, str):
        return head
    return said_by_target(target) or target


def _option(group: str, name: str, config: Any) -> Iterator[str]:
    """Yield the keys of an option: its own with their comments, then the shared in short."""
    whole, base, path = option(group, name), option(group, BASE), places.file_of(group, name)
    head = _said_of(path) if path is not None else ""
    yield from _wrapped(f"{group}={name}:", head, column=4, most=2)
    own, repeats, rest = [], [], []
    for key, entry, parent in _leaves(whole, group):
        name_below = key.removeprefix(f"{group}.")
        shared = base.at(name_below)
        is_usual = _current(key, entry, config) == _plain(entry.value) or _follows(key, config)
        is_shared = shared is not None and (shared.value == entry.value or key in SELDOM)
        if is_usual and (of := repeated(key, entry.value)) and key not in SELDOM:
            repeats.append(f"{name_below} ({of})" if _last(of) != _last(key) else name_below)
        elif is_usual and is_shared and key not in (*COMMON, *OFTEN):
            shipped = _plain(entry.value)
            is_computed = "${" in shipped and ":" in shipped
            rest.append(name_below if is_computed else f"{name_below}={shipped}")
        else:
            own.append((key, entry, parent))
    line = functools.partial(_key, config=config, most=1, with_values=False, column=NARROW)
    own.sort(key=_is_optional)
    for node, grouped in itertools.groupby(own, lambda each: each[0].rpartition(".")[0]):
        keys = [*grouped]
        is_alone = node == group or len(keys) == 1
        if not is_alone:
            yield f"  {node}:"
        named = [
            key
            for key, entry, _ in keys
            if _last(key) in RARELY and _current(key, entry, config) == _plain(entry.value)
        ]
        named = named if len(named) > 1 else []
        for key, entry, parent in keys:
            if key not in named:
                shown_as = key if is_alone else f"  .{_last(key)}"
                yield from line(key, entry, parent, shown_as=shown_as)
        if named:
            yield from _wrapped(
                "", " ".join(["and", *(f".{_last(key)}" for key in named)]), column=4
            )
    if repeats:
        yield "Taken from another key, of the same name or in brackets, so set that one:"
        yield from _wrapped("", " ".join(repeats), column=2)
    more = f"--help {group}.KEY explains one; --help {group} lists the options"
    yield f"Also below {group} ({more}):"
    yield from _wrapped("", " ".join(rest), column=2)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _is_optional(each: tuple[str, KeyEntry, KeyEntry | None]) -> bool:
    return each[1].value != "???" and not each[1].comment.endswith("required")


def _leaves(
    entry: KeyEntry, path: str, parent: KeyEntry | None = None
) -> Iterator[tuple[str, KeyEntry, KeyEntry | None]]:
    """Yield each key without keys below it: its dotted name, itself, and the node it is in."""
    if not entry.below:
        yield path, entry, parent
    for name, each in entry.below.items():
        if name not in HYDRAS_OWN:
            yield from _leaves(each, f"{path}.{name}", entry)


def _entry(key: str, config: Any) -> tuple[KeyEntry | None, KeyEntry | None, str]:
    """Return a key with its node, and the option or file that it belongs to."""
    parts = key.split(".")
    for number in range(1, max(len(parts), 2)):  # a group may lie in a group
        group, below = "/".join(parts[:number]), ".".join(parts[number:])
        if not places.is_group(group):
            break
        chosen = places.names_in(config.hydra.runtime.choices.get(group) or "")
        options = [*chosen, *(each for each in places.options(group) if each not in chosen)]
        for name in options:
            whole = option(group, name)
            if (found := whole.at(below)) is not None:
                return found, _parent(whole, below), f"{group}={name}"
    for path in (path for folder in places.folders() for path in sorted(folder.glob("*.yaml"))):
        whole = of_file(path, path.stem)
        if (found := whole.at(key)) is not None:
            return found, _parent(whole, key), places.primary_file(path.stem)
    return None, None, ""


def _parent(whole: KeyEntry, key: str) -> KeyEntry | None:
    """Return the entry that holds the dotted key below `whole`; None for `whole` itself."""
    return whole.at(key.rpartition(".")[0]) if key else None


def _keys(path: str, entry: KeyEntry, parent: KeyEntry | None, config: Any) -> Iterator[str]:
    """Yield the lines of a key, or of the keys below a node."""
    if not entry.below:
        yield from _key(path, entry, parent, config)
        return
    if entry.target is not None:
        yield f"  _target_: {entry.target}"
    for name, each in entry.below.items():
        if name in HYDRAS_OWN:
            continue
        inner = f"{path}.{name}"
        if each.below:
            yield from _wrapped(f"  {inner}:", each.comment)
            yield from _keys(inner, each, entry, config)
        else:
            yield from _key(inner, each, entry, config)


def _key(
    path: str,
    entry: KeyEntry,
    parent: KeyEntry | None,
    config: Any,
    *,
    most: int = 9,
    with_values: bool = True,
    column: int = 34,
    shown_as: str | None = None,
) -> Iterator[str]:
    shipped, shown = _plain(entry.value), _current(path, entry, config)
    text, says = entry.comment, accepted(path, entry, parent)
    if with_values and says not in ("", "true or false") and not entry.listed():
        text = f"{text} [{says}]".strip()
    if followed := _followed(path, entry, config):
        shown, text = shipped, f"{followed}: {text}".removesuffix(": ")
    elif shown != shipped and "${" not in shipped and shipped != "???":
        text = f"{text} (default {shipped})".strip()
    yield from _wrapped(f"  {shown_as or path}={shown}", text, most=most, column=column)


def _current(path: str, entry: KeyEntry, config: Any) -> str:
    """Return the text of the key's value, as `_held` gives it."""
    return _plain(_held(path, entry, config))


def _held(path: str, entry: KeyEntry, config: Any) -> Any:
    """Return the value in the composed config; the shipped one if the config lacks the key."""
    try:
        is_there = OmegaConf.select(config, path, default=..., throw_on_missing=False) is not ...
    except OmegaConfBaseException:  # it follows a key that must be given
        is_there = False
    return _resolved(config, path) if is_there else entry.value


def _followed(path: str, entry: KeyEntry, config: Any) -> str:
    """Return in words what a key of another group is here, if `path` takes its value; else ""."""
    if not _follows(path, config):
        return ""
    group = (of := repeated(path, entry.value)).partition(".")[0]
    if not places.is_group(group) or group == path.partition(".")[0]:
        return ""
    value, chosen = _value(config, of), config.hydra.runtime.choices.get(group)
    return f"{f'{of} must be given' if value == '???' else value} with {group}={chosen}"


def _follows(path: str, config: Any) -> bool:
    """Return True if a key of the composed config is an interpolation, not a typed value."""
    try:
        parent, name = _node_of(config, path)
        return OmegaConf.is_config(parent) and bool(OmegaConf.is_interpolation(parent, name))
    except (OmegaConfBaseException, AttributeError, ValueError):  # there is no such node
        return False


def _values(entry: KeyEntry, prefix: str) -> Iterator[str]:
    for name, each in entry.below.items():
        if each.below:
            yield from _values(each, f"{prefix}{name}.")
        else:
            yield from _wrapped(f"  {prefix}{name}={_plain(each.value)}", each.comment)


def _wrapped(start: str, text: str, *, column: int = 34, most: int = 9) -> Iterator[str]:
    """Yield a line with a text behind it, in a column of its own, wrapped to the terminal."""
    width = min(max(shutil.get_terminal_size((80, 24)).columns, 60), 120)
    column = min(column, width // 2)
    if not text:
        yield start
        return
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False, break_long_words=False)
    if len(lines) > most:
        lines = [*lines[: most - 1], _cut(f"{lines[most - 1]} {lines[most]}", width - column)]
    if len(start) < column:
        yield f"{start:<{column}}{lines.pop(0)}"
    else:
        yield start
    for line in lines:
        yield f"{'':<{column}}{line}"


def _value(config: Any, key: str) -> str:
    """Return the text of a key's value in the composed config."""
    return _plain(_resolved(config, key))


def _resolved(config: Any, key: str) -> Any:
    """Return a key's value in the composed config, "???" if missing, "…" if a run resolves it."""
    try:
        value = OmegaConf.select(
            config, key, throw_on_missing=False, throw_on_resolution_failure=False
        )
        if value is None and OmegaConf.is_missing(*_node_of(config, key)):
            return "???"
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        return redact_all({key.rpartition(".")[2]: value}).popitem()[1]
    except OmegaConfBaseException:  # an interpolation that only a run resolves
        return "…"


def _node_of(config: Any, key: str) -> tuple[Any, str]:
    parent, _, last = key.rpartition(".")
    return (OmegaConf.select(config, parent) if parent else config), last


def _plain(value: Any) -> str:
    """Return a value as it would be typed, in at most 60 characters."""
    if isinstance(value, str):
        text = value or '""'
    else:
        text = (
            json.dumps(value, default=str, ensure_ascii=False).replace('"', "").replace(", ", ",")
        )
    return text if len(text) <= 60 else f"{text[:58]} …"
