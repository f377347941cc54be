"""Write docs/keys.md, every key of conf/, from the JSON Schemas: python docs/site/keys.py.

`make schemas` makes these from the comments and values in conf/ and from the ranges of the check.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from regrow.config.entries import repeated
from regrow.config.yaml_files import read_yaml
from regrow.config.yaml_keys import head_of
from regrow.project import CONF, ROOT

PAGE = ROOT / "docs" / "keys.md"
SCHEMAS = ROOT / "schemas"
RECIPES = ("experiment", "debug")
EMPTY = '""'
HEAD = """# Every key of `conf/`

`make reference` writes this page from the comments in `conf/` and from the ranges that the check
knows. A key that is marked *given* has no default: your option or the command line must set it.
A value `${…}` is taken from the key or the resolver that it names. Where options of a group differ,
they are in brackets. To add a key, see [adding an option](hydra.md#adding-an-option).
"""


class Row(NamedTuple):
    """One key of one option."""

    accepts: str
    comment: str
    default: str


def properties_of(schema: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a node, those of its shipped `_target_` included."""
    if not isinstance(schema, dict):
        return {}
    if "$ref" in schema:
        return properties_of(looked_up(schema, keys), keys)
    parts = [schema.get("else"), *(case.get("then") for case in schema.get("allOf", []))]
    found = dict(schema.get("properties", {}))
    for part in parts:
        found |= properties_of(part, keys)
    return {key: its for key, its in found.items() if key[0] != "_" and key != "defaults"}


def looked_up(schema: Any, keys: dict[str, Any]) -> Any:
    reference = schema.get("$ref", "") if isinstance(schema, dict) else ""
    return keys[reference.removeprefix("#/keys/")] if reference.startswith("#/keys/") else schema


def rows_of(path: str, schema: Any, keys: dict[str, Any]) -> Iterator[tuple[str, Row]]:
    """Yield the keys of a node with their dotted names."""
    for name, its in schemas_of(path, schema, keys):
        yield name, row_of(name, its)


def schemas_of(
    path: str, schema: Any, keys: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schemas of the keys of a node, with their dotted names."""
    for key, its in properties_of(schema, keys).items():
        its, name = looked_up(its, keys), f"{path}.{key}" if path else key
        if isinstance(its, dict) and ".json#" not in str(its.get("$ref", "")):
            if properties_of(its, keys):
                yield from schemas_of(name, its, keys)
            elif key != "hydra":
                yield name, its


def row_of(path: str, schema: dict[str, Any]) -> Row:
    default = code(schema["default"]) if "default" in schema else "*given*"
    if targets := schema.get("properties", {}).get("_target_"):  # a node without keys
        names = next(each["enum"] for each in targets["anyOf"] if "enum" in each)
        default = code(f"{{_target_: {names[0]}}}")
    return Row(in_cell(accepted(path, schema)), in_cell(schema.get("description", "")), default)


def accepted(path: str, schema: dict[str, Any]) -> str:
    """Return in words what values a key takes, or those of the key that its value repeats."""
    if says := schema.get("x-accepts", ""):
        return str(says)
    for each in (schema, *schema.get("anyOf", [])):
        if "enum" in each:
            return "one of " + ", ".join(map(str, each["enum"]))
    if "_target_" in schema.get("properties", {}):
        return "a node with a _target_"
    if owner := repeated(path, schema.get("default")):
        says = by_key().get(owner, set()) - {""}
        return says.pop() if len(says) == 1 else f"what {owner} takes"
    return "text" if schema.get("type") == "string" else ""


@functools.cache
def by_key() -> dict[str, set[str]]:
    """Return the values that each key takes, in words, as its options and the top level state."""
    found: dict[str, set[str]] = {}
    for path in SCHEMAS.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        group, keys = path.stem, content.get("keys", {})
        nodes = {"": content} if group == "train" else content.get("definitions", {})
        for name, its in nodes.items():
            if name != "node" and group not in RECIPES:
                top = "" if group == "train" else group
                for key, schema in schemas_of(top, its, keys):
                    found.setdefault(key, set()).add(schema.get("x-accepts", ""))
    return found


def code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"`{text or EMPTY}`".replace("|", "\\|")


def in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def table(rows: dict[str, dict[str, Row]], options: list[str]) -> str:
    """Return one row for a key, or several where options give it another meaning."""
    lines = ["| key | accepts | default | comment |", "| --- | --- | --- | --- |"]
    for name, by_option in rows.items():
        meanings = dict.fromkeys((row.accepts, row.comment) for row in by_option.values())
        for accepts, comment in meanings:
            its = {
                o: r for o, r in by_option.items() if (r.accepts, r.comment) == (accepts, comment)
            }
            defaults: dict[str, list[str]] = {}
            for option, row in its.items():
                defaults.setdefault(row.default, []).append(option)
            shown = ", ".join(
                value + among(who, [*its])
                for value, who in sorted(defaults.items(), key=_commonest)
            )
            lines.append(f"| `{name}`{among([*its], options)} | {accepts} | {shown} | {comment} |")
    return "\n".join(lines) + "\n"


def _commonest(default: tuple[str, list[str]]) -> int:
    return -len(default[1])


def among(names: list[str], others: list[str]) -> str:
    """Return which of the options are meant, in brackets; nothing for all of them."""
    if len(names) == len(others):
        return ""
    rest = [name for name in others if name not in names]
    return f" (not {', '.join(rest)})" if len(rest) < len(names) / 2 else f" ({', '.join(names)})"


def section(group: str) -> str:
    schema = json.loads((SCHEMAS / f"{group}.json").read_text(encoding="utf-8"))
    shipped = {
        name: its
        for name, its in schema["definitions"].items()
        if name[0] != "_" and name != "node"
    }
    text = f"\n## {group}\n\n"
    text += "".join(
        f"- `{group}={name}`"
        + (f": {in_cell(its['description'])}" if its["description"] else "")
        + "\n"
        for name, its in shipped.items()
    )
    rows: dict[str, dict[str, Row]] = {}
    for name, its in shipped.items():
        for key, row in rows_of(group, its, schema["keys"]):
            rows.setdefault(key, {})[name] = row
    return text + ("\n" + table(rows, [*shipped]) if rows else "")


def page() -> str:
    top = json.loads((SCHEMAS / "train.json").read_text(encoding="utf-8"))
    for key, its in read_yaml(CONF / "train.yaml").items():
        if isinstance(its, str):  # the schema leaves the name of the lab to each project
            top["properties"][key].setdefault("default", its)
    rows = {name: {"": row} for name, row in rows_of("", top, {})}
    text = HEAD + "\n## At the top\n\n" + table(rows, [""])
    names = sorted(path.stem for path in SCHEMAS.glob("*.json"))
    for group in names:
        if group not in ("train", *RECIPES):
            text += section(group)
    for group in RECIPES:
        text += f"\n## {group}\n\n" + "".join(
            f"- `{group}={path.stem}`: {in_cell(head_of(path))}\n"
            for path in sorted((CONF / group).glob("*.yaml"))
        )
    return text


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
