"""JSON Schemas (draft 7) of the files in `conf/`, with which an editor completes and underlines.

They say what a start checks before torch is imported: the keys that the shipped files have, the
ranges of `rules`, and otherwise the type of the shipped value. Comments become descriptions.
`make schemas` writes them; a test compares.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regrow.config.entries import KeyEntry, in_conf, of_file, option, unique
from regrow.config.leads import RECIPES
from regrow.config.rules import RULES, Rule, applies, of_shipped
from regrow.config.yaml_files import broken_files
from regrow.config.yaml_keys import head_of
from regrow.errors import UserError
from regrow.project import CONF, ROOT, lab_name

FOLDER = ROOT / "schemas"
EDITOR = ROOT / ".vscode" / "settings.json"
DRAFT = "http://json-schema.org/draft-07/schema#"
_BESIDE = "./schemas/"  # as the editor names them
PRIMARY, RECIPE = "train", "experiment"
BASE = "_base"  # the file of what all options of a group share
INTERPOLATED = r"\$\{|^\?\?\?$"  # ??? must be given elsewhere
OF_NODES = r"^_[a-z]+_$"  # what Hydra reads in any node, such as _partial_
# Arguments of shipped torch targets that conf/ leaves at torch's defaults, from torch 2.11 to 2.15.
# The run passes `params` and `optimizer`. A list here keeps the schemas the same for any torch.
OF_TORCH: Mapping[str, tuple[str, ...]] = {
    "torch.optim.Adagrad": ("differentiable", "fused", "maximize"),
    "torch.optim.Adam": (
        *("capturable", "decoupled_weight_decay", "differentiable", "foreach", "maximize"),
    ),
    "torch.optim.AdamW": ("capturable", "differentiable", "foreach", "maximize"),
    "torch.optim.NAdam": ("capturable", "differentiable", "maximize"),
    "torch.optim.RAdam": ("capturable", "differentiable", "maximize"),
    "torch.optim.RMSprop": ("capturable", "differentiable", "maximize"),
    "torch.optim.SGD": ("differentiable", "foreach", "maximize"),
    "torch.optim.lr_scheduler.CosineAnnealingWarmRestarts": ("last_epoch",),
}
SEVERAL = ("model", "optimizer", "scheduler")  # each takes nodes by name too
# Keys that are null in some option, and otherwise a node: no value there tells of which type.
OR_NODE = ("data.augmentation", "data.mixing", "data.source.collate")
SHARED = 100  # characters; the schema of a key that is longer stands once in a file


def write() -> list[Path]:
    """Write the schemas, remove those of groups that are gone, and return the changed files.

    Raises UserError for a file of conf/, or an editor's settings, that cannot be read.
    """
    wanted = written()
    gone = [path for path in FOLDER.rglob("*.json") if path not in wanted]
    changed = [path for path, text in wanted.items() if not path.is_file() or _text(path) != text]
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    for path in gone:
        path.unlink()
    return [*changed, *gone]


def written() -> dict[Path, str]:
    """Return the content of each file that `write` writes."""
    if broken := broken_files():
        raise UserError(f"{broken[0]} is not valid YAML. Correct it.")
    found = {f"{group}.json": of_group(group) for group in _groups() if group not in RECIPES}
    found |= {f"{PRIMARY}.json": of_primaries(), f"{RECIPE}.json": of_recipes()}
    files = {FOLDER / name: as_text(schema) for name, schema in sorted(found.items())}
    return {**files, EDITOR: as_text(_settings(found))}


def _settings(names: Iterable[str]) -> dict[str, Any]:
    """Return the editor's settings with the schemas of these names in `yaml.schemas`."""
    try:
        settings = json.loads(_text(EDITOR)) if EDITOR.is_file() else {}
        others = settings.get("yaml.schemas", {})
        others = {name: its for name, its in others.items() if not name.startswith(_BESIDE)}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{EDITOR.relative_to(ROOT)} is not plain JSON ({error}). Remove its comments, or add "
            f"this to it: {json.dumps({'yaml.schemas': editors_map(names)})}"
        ) from None
    return {**settings, "yaml.schemas": {**others, **editors_map(names)}}


def editors_map(names: Iterable[str]) -> dict[str, Any]:
    """Return the editor's setting `yaml.schemas`: the files that each schema is for."""
    recipes = [f"conf/{group}/**/*.yaml" for group in RECIPES]
    of = {f"{PRIMARY}.json": "conf/*.yaml", f"{RECIPE}.json": recipes}
    return {
        f"{_BESIDE}{name}": of.get(name, f"conf/{name.removesuffix('.json')}/*.yaml")
        for name in sorted(names)
    }


def of_group(group: str) -> dict[str, Any]:
    """Return the schema of a group's files; `definitions` holds one for each option."""
    paths = sorted((CONF / group).glob("*.yaml"))
    entries = [option(group, path.stem, in_conf) for path in paths]
    schema = _node(group, entries, {"defaults": _defaults_of_option(_names(group))})
    return _shared(
        {
            "$schema": DRAFT,
            "title": f"conf/{group}",
            "description": f"A file of the group {group}: an option that {group}=… chooses.",
            **schema,
            "type": "object",
            "definitions": {"node": _node(group, entries), **_definitions(group, entries)},
        }
    )


def _definitions(group: str, entries: Iterable[KeyEntry]) -> dict[str, Any]:
    return {
        entry.option: {
            "title": f"{group}={entry.option}",
            "description": head_of(CONF / group / f"{entry.option}.yaml"),
            **_node(group, [entry]),
        }
        for entry in entries
    }


def of_primaries() -> dict[str, Any]:
    """Return the schema of conf/train.yaml and its neighbours, which may hold keys of their own."""
    return {
        "$schema": DRAFT,
        "title": "conf",
        "description": "A config that --config-name names. It chooses the groups' options.",
        "type": "object",
        "properties": {"defaults": _defaults("", "override "), **_top_level()},
    }


def of_recipes() -> dict[str, Any]:
    """Return the schema of files that override keys of other groups, such as experiments."""
    keys = {key: its for key, its in _top_level().items() if key != "lab"}  # of conf/train.yaml
    chosen = {group: [*_chosen(group)] for group in sorted(keys.keys() & _groups())}
    # A condition holds the keys of such a group, so that an editor reports a wrong one once.
    keys |= {group: True for group, cases in chosen.items() if cases}
    return {
        "$schema": DRAFT,
        "title": "overrides",
        "description": "Overrides of any key. The first line must be `# @package _global_`.",
        "type": "object",
        "properties": {"defaults": _defaults("override /", "/"), **keys},
        "additionalProperties": False,
        "allOf": [case for cases in chosen.values() for case in cases],
    }


def _chosen(group: str) -> Iterator[dict[str, Any]]:
    """Yield an if/then per option: a file that chooses it may only set that option's keys.

    The last is for a file that chooses none of them, and may set the keys of each.
    """
    key = f"override /{group}"

    def case(is_chosen: bool, options: dict[str, Any], definition: str) -> dict[str, Any]:
        entry = {"type": "object", "required": [key], "properties": {key: options}}
        chooses = {"required": ["defaults"], "properties": {"defaults": {"contains": entry}}}
        return {
            "if": chooses if is_chosen else {"not": chooses},
            "then": {"properties": {group: {"$ref": f"{group}.json#/definitions/{definition}"}}},
        }

    if names := _names(group) if group != "logger" else []:  # a list chooses several
        yield from (case(True, {"const": name}, name) for name in names)
        yield case(False, {"enum": names}, "node")


def _top_level() -> dict[str, Any]:
    """Return the schemas of all top-level keys."""
    found: dict[str, Any] = {
        group: {"$ref": f"{group}.json#/definitions/node"}
        for group in sorted(_groups())
        if group not in RECIPES and "/" not in group
    }
    for path in sorted(CONF.glob("*.yaml")):
        for key, entry in of_file(path, path.stem).below.items():
            if key == "lab":
                found[key] = {**_words([entry], ""), "type": "string"}
            elif key not in found and key not in ("defaults", "hydra"):
                found[key] = _value(key, [entry])
    return {**found, "hydra": {"type": "object", "description": "Hydra's own settings"}}


# -- Defaults lists --------------------------------------------------------------------------------


def _defaults_of_option(names: Iterable[str]) -> dict[str, Any]:
    words = {"anyOf": [{"enum": ["_self_", *names]}, {"type": "string"}]}
    return {
        "description": "options of this group that this one builds on; _self_: this file",
        "type": "array",
        "items": {"anyOf": [words, {"type": "object"}]},
    }


def _defaults(*prefixes: str) -> dict[str, Any]:
    """Return the schema of a defaults list that chooses options of groups behind these prefixes."""
    entries: dict[str, Any] = {}
    for group in sorted(_groups() - {"local"}):  # its files are this machine's
        if not (options := _names(group)):
            continue
        names = {"enum": options}
        chosen: dict[str, Any] = {
            "description": f"the option of the group {group}",
            "anyOf": [names, {"type": ["string", "null"]}, {"type": "array", "items": names}],
        }
        entries |= {f"{prefix}{group}": chosen for prefix in prefixes}
    return {
        "description": "the options that are chosen, and _self_: the keys of this file",
        "type": "array",
        "items": {
            "anyOf": [
                {"anyOf": [{"enum": ["_self_", *_names("")]}, {"type": "string"}]},
                {"type": "object", "properties": entries},
            ]
        },
    }


# -- Keys ------------------------------------------------------------------------------------------


def _value(path: str, entries: list[KeyEntry]) -> dict[str, Any]:
    """Return the schema of a key from its value in each option that has it."""
    nodes = [entry for entry in entries if isinstance(entry.value, Mapping)]
    rule = RULES.get(path)
    if rule is None and nodes and any(entry.value for entry in nodes):
        schema = _node(path, nodes)
        if len(nodes) < len(entries) or _is_null_in_base(path):
            schema["type"] = [*schema["type"], "null"]
        return {**_words(entries, ""), **schema}
    if rule is None and (listed := _listed(entries)):
        schema = _or_interpolated({"enum": listed}, f"one of {', '.join(listed)}")
        return {**_words(entries, ""), **schema, **_default(entries)}
    rules = [rule] if rule is not None else [of_shipped(path, entry.value) for entry in entries]
    found = [each for each in rules if each is not None]
    if nodes or len(found) < len(rules):
        found = []  # any value
    if path in OR_NODE and all(entry.value is None for entry in entries):
        found = [Rule("null, or a node with a _target_", {"type": ["object", "null"]})]
    says = " or ".join(unique(each.says for each in found))
    schemas = unique(json.dumps(each.schema) for each in found)
    made = (
        {"anyOf": [*map(json.loads, schemas)]} if schemas[1:] else json.loads((*schemas, "{}")[0])
    )
    return {
        **_words(entries, says),
        **_or_interpolated(made, says),
        **_suggested(entries),
        **_default(entries),
    }


def _is_null_in_base(path: str) -> bool:
    """Return True if the key is null in the `_base.yaml` of its group: every option takes null."""
    group, _, below = path.partition(".")
    entry = option(group, BASE, in_conf).at(below)
    return entry is not None and entry.value is None


def _words(entries: list[KeyEntry], says: str) -> dict[str, Any]:
    """Return what an editor shows of a key: its comments, and the values that it accepts."""
    comment = "; or: ".join(unique(entry.comment for entry in entries if entry.comment))
    found = {"description": comment} if comment else {}
    if says:
        shown = f"{comment}\n\nAccepts {says}." if comment else f"Accepts {says}."
        found |= {"markdownDescription": shown, "x-accepts": says}
    return found


def _node(
    path: str, entries: list[KeyEntry], also: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the schema of a node: closed for each shipped `_target_`, and open for any other.

    `also` are further properties, by key.
    """
    also = also or {}
    closed = functools.partial(_closed, path, also=dict.fromkeys(also, True))
    targets = unique(entry.target for entry in entries if entry.target is not None)
    kinds = ["object", "string"]
    schema: dict[str, Any] = {"type": kinds, "pattern": INTERPOLATED, "properties": dict(also)}
    if not targets:
        return {**schema, **_closed(path, entries, also=also)}
    schema["properties"]["_target_"] = {"anyOf": [{"enum": targets}, {"type": "string"}]}
    names: dict[str, Any] = {"required": ["_target_"], "properties": {"_target_": {}}}
    cases = []
    for target in targets:
        its = [entry for entry in entries if entry.target == target]
        case = {**names, "properties": {"_target_": {"const": target}}}
        cases.append({"if": case, "then": closed(its)})
    if len(targets) > 1:
        chosen_elsewhere = closed(entries)
        if path in SEVERAL and not chosen_elsewhere["additionalProperties"]:
            chosen_elsewhere["additionalProperties"] = {
                "type": "object",
                "required": ["_target_"],
                "errorMessage": f"No option of {path} has this key.",
            }
        cases.append({"if": {"not": {"required": ["_target_"]}}, "then": chosen_elsewhere})
        return {**schema, "allOf": cases}
    other = {**names, "properties": {"_target_": {"not": {"const": targets[0]}}}}
    return {**schema, "if": other, "then": True, "else": closed(entries)}


def _closed(path: str, entries: list[KeyEntry], *, also: Mapping[str, Any]) -> dict[str, Any]:
    """Return the properties of nodes with these keys, those of `also`, and no others."""
    keys = unique(key for entry in entries for key in entry.below)
    properties: dict[str, Any] = {}
    for key in keys:
        its = [entry.below[key] for entry in entries if key in entry.below]
        if key == "_target_":
            targets = unique(str(each.value) for each in its)
            properties[key] = {"anyOf": [{"enum": targets}, {"type": "string"}]}
        else:
            properties[key] = _value(f"{path}.{key}" if path else key, its)
    # A foreign target may take arguments that its file leaves out: see `explain.takes`.
    further = unique(word for entry in entries for word in OF_TORCH.get(entry.target or "", ()))
    patterns = [OF_NODES, *([rf"^({'|'.join(sorted(further))})$"] if further else [])]
    foreign = any(entry.target and not _is_closed(entry.target) for entry in entries)
    is_open = foreign or path == "logger"  # a logger of one's own has a name of its own
    return {
        "properties": {**also, **properties},
        "patternProperties": dict.fromkeys(patterns, True),
        "additionalProperties": is_open,
    }


def _is_closed(target: str) -> bool:
    return target in OF_TORCH or (applies(target) and not target.startswith("torch."))


def _or_interpolated(schema: Mapping[str, Any], says: str) -> dict[str, Any]:
    """Return the schema that also accepts an interpolation, and `???` for a value given later."""
    made = _flat(schema)
    for name in ("items", "additionalProperties"):
        if isinstance(made.get(name), Mapping):
            made[name] = _or_interpolated(made[name], "")
    if "properties" in made:
        made["properties"] = {k: _or_interpolated(v, "") for k, v in made["properties"].items()}
    types = made.get("type", [])
    types = [types] if isinstance(types, str) else types
    text = {"type": "string", "pattern": INTERPOLATED}
    if says:
        text["patternErrorMessage"] = f"This must be {says}, or an interpolation ${{…}}."
    if "anyOf" in made:
        return {"anyOf": [*made["anyOf"], text]}
    if "enum" in made or "maxLength" in made:
        return {"anyOf": [made, text]}
    return {**made, **text, "type": [*types, "string"]} if types and "string" not in types else made


def _flat(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with null among its types, where it is a choice of null and one other."""
    made: dict[str, Any] = dict(schema)
    others = [each for each in made.get("anyOf", []) if each != {"type": "null"}]
    if len(made) == len(others) == 1 and isinstance(others[0].get("type"), str):
        return {**others[0], "type": [others[0]["type"], "null"]}
    return made


def _listed(entries: list[KeyEntry]) -> list[str]:
    """Return the options that the comments list, if each comment is such a list and no more."""
    lists = [entry.listed() for entry in entries]
    return unique(word for words in lists for word in words) if all(lists) else []


def _suggested(entries: list[KeyEntry]) -> dict[str, Any]:
    """Return examples for a key whose comment begins with some of its values."""
    found = unique(word for entry in entries for word in entry.suggested())
    return {"examples": found} if found else {}


def _default(entries: list[KeyEntry]) -> dict[str, Any]:
    """Return the default, if all options that have the key agree on it."""
    values = unique(json.dumps(entry.value, default=str) for entry in entries)
    return {"default": json.loads(values[0])} if len(values) == 1 and values[0] != '"???"' else {}


# -- Files -----------------------------------------------------------------------------------------


def _groups() -> set[str]:
    folders = (path.parent for path in CONF.rglob("*.yaml") if path.parent != CONF)
    return {folder.relative_to(CONF).as_posix() for folder in folders} | {*RECIPES}


def _names(group: str) -> list[str]:
    """Return the options of a group; of the group "", the primary configs."""
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def _shared(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with each long schema of a key in `keys`, by its dotted name."""
    keys: dict[str, Any] = {}

    def walked(part: Any, path: str) -> Any:
        if isinstance(part, list):
            return [walked(each, path) for each in part]
        if not isinstance(part, Mapping):
            return part
        found = {}
        for word, its in part.items():
            if word == "properties":
                found[word] = {key: named(its[key], f"{path}.{key}".lstrip(".")) for key in its}
            else:
                found[word] = its if word == "default" else walked(its, path)
        return found

    def named(its: Any, path: str) -> Any:
        its = walked(its, path)
        # Neither the lab's name nor its length may change the form: a clone renames it in here.
        if len(json.dumps(its).replace(f"{lab_name()}.", "lab.")) < SHARED:
            return its
        same = [name for name in keys if name.partition(":")[0] == path]
        name = next((name for name in same if keys[name] == its), None)
        if name is None:
            name = f"{path}:{len(same) + 1}" if same else path
            keys[name] = its
        return {"$ref": f"#/keys/{name}"}

    return {**walked(schema, ""), "keys": keys}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
