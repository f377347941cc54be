"""The JSON Schemas of conf/ accept what a start accepts, and are up to date."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from referencing import Registry, Resource

from regrow.config import schemas
from regrow.config.rules import RULES, fits
from regrow.config.targets import HANDED_IN, locate
from regrow.config.yaml_files import read_yaml
from regrow.project import CONF, ROOT, lab_name


def untracked() -> set[Path]:
    """Return the files in conf/ that git does not track: they may be unfinished."""
    command = ["git", "ls-files", "--others", "-z", "--", str(CONF)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return {ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name}


UNTRACKED = untracked()
FILES = sorted({*CONF.rglob("*.yaml")} - UNTRACKED)


@functools.cache
def contents() -> dict[str, Any]:
    return {
        path.name: json.loads(path.read_text("utf-8")) for path in schemas.FOLDER.glob("*.json")
    }


def schema_of(path: Path) -> str:
    """Return the name of the schema that the editor's settings give a file of conf/."""
    settings = json.loads(schemas.EDITOR.read_text(encoding="utf-8"))["yaml.schemas"]
    found = [
        name.removeprefix("./schemas/")
        for name, patterns in settings.items()
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        if path.relative_to(ROOT).match(pattern.replace("**/", ""))
    ]
    assert len(found) == 1, (path, found)
    return found[0]


def problems(name: str, content: Any) -> list[str]:
    resources = ((each, Resource.from_contents(its)) for each, its in contents().items())
    validator = Draft7Validator(contents()[name], registry=Registry().with_resources(resources))
    return [error.message for error in validator.iter_errors(content)]


@pytest.mark.skipif(bool(UNTRACKED), reason="conf/ holds files that git does not track")
def test_the_schemas_are_those_that_make_schemas_writes() -> None:
    wanted = schemas.written()
    assert {path for path in wanted if path != schemas.EDITOR} == {*schemas.FOLDER.glob("*.json")}
    stale = [path.name for path, text in wanted.items() if path.read_text("utf-8") != text]
    assert stale == [], "run: make schemas"


def test_every_shipped_file_passes_its_schema() -> None:
    found = {
        str(path): said for path in FILES if (said := problems(schema_of(path), read_yaml(path)))
    }
    assert found == {}


def test_the_schemas_are_valid_schemas() -> None:
    for content in contents().values():
        Draft7Validator.check_schema(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_epoch": 3}, "'max_epoch' does not match any"),
        ({"max_epochs": 0}, "less than the minimum"),
        ({"max_epochs": "three"}, "does not match"),
        ({"max_epochs": [3]}, "is not of type"),
        ({"device": "gpu"}, "is not valid under any of the given schemas"),
        ({"compile": "yes please"}, "does not match"),
        ({"checkpoint": {"keep_bset": 2}}, "'keep_bset' does not match any"),
        ({"early_stopping": {"patience": -1}}, "less than the minimum"),
    ],
)
def test_a_mistake_fails_in_a_group_and_in_an_experiment(change: dict[str, Any], says: str) -> None:
    for name, content in (("trainer", change), ("experiment", {"trainer": change})):
        assert any(says in said for said in problems(f"{name}.json", content))


@pytest.mark.parametrize(
    "change",
    [
        {"max_epochs": "${oc.env:EPOCHS}"},
        {"max_epochs": None},
        {"device": "${oc.env:DEVICE}"},
        {"compile": True},
        {"checkpoint": {"keep_best": 2}},
        {"_target_": "mine.Options", "anything": 3},
    ],
)
def test_values_that_a_start_accepts_pass_the_schemas(change: dict[str, Any]) -> None:
    for name, content in (("trainer", change), ("experiment", {"trainer": change})):
        assert problems(f"{name}.json", content) == []


TORCHS = [*schemas.OF_TORCH]


def files_of(target: str) -> dict[Path, Any]:
    contents = {path: read_yaml(path) for path in FILES}
    return {path: its for path, its in contents.items() if its.get("_target_") == target}


def test_every_shipped_torch_target_is_closed_but_for_its_own_arguments() -> None:
    for target in TORCHS:
        for path, content in files_of(target).items():
            name = schema_of(path)
            group = name.removesuffix(".json")
            assert problems(name, {**content, "lrr": 1}) != []
            assert problems(name, {**content, "_target_": "mine.Optimizer", "lrr": 1}) == []
            for word in schemas.OF_TORCH[target]:
                assert problems(name, {**content, word: False}) == []
                assert problems("experiment.json", {group: {word: False}}) == []


@pytest.mark.parametrize("target", TORCHS)
def test_the_file_and_the_table_hold_every_argument_of_the_installed_torch(target: str) -> None:
    parameters = {*inspect.signature(locate(target, "")).parameters} - HANDED_IN
    for content in files_of(target).values():
        assert parameters <= {*content, *schemas.OF_TORCH[target]}
        assert not {*content} & {*schemas.OF_TORCH[target]}


@pytest.mark.parametrize("group", ["optimizer", "scheduler"])
def test_an_experiment_takes_the_keys_of_any_option_and_no_others(group: str) -> None:
    contents = [read_yaml(path) for path in (CONF / group).glob("*.yaml")]
    targets = [its["_target_"] for its in contents if "_target_" in its]
    is_open = any(  # a project's own option may take any key
        target not in TORCHS and not target.startswith(f"{lab_name()}.") for target in targets
    )
    key = {"optimizer": "betas", "scheduler": "T_0"}[group]
    value = {"optimizer": [0.9, 0.99], "scheduler": 3}[group]
    assert problems("experiment.json", {group: {key: value}}) == []
    assert (problems("experiment.json", {group: {"lrr": 1}}) == []) is is_open
    several = {"of_one": {"_target_": "torch.optim.SGD", "lr": 1.0}}
    assert problems("experiment.json", {group: several}) == []


def test_an_experiment_takes_only_the_keys_of_the_option_that_it_chooses() -> None:
    def fails(option: str | None, **node: Any) -> bool:
        chosen = ["_self_"] if option is None else [{"override /optimizer": option}, "_self_"]
        return problems("experiment.json", {"defaults": chosen, "optimizer": node}) != []

    assert fails("adamw", momentum=0.9) and not fails("adamw", weight_decay=0.1)
    assert fails("sgd", betas=[0.9, 0.99]) and not fails("sgd", momentum=0.9)
    assert not fails("adamw", _target_="mine.Optimizer", momentum=0.9)
    assert not fails(None, momentum=0.9) and not fails("mine", momentum=0.9)
    chosen = {"defaults": [{"override /optimizer": "adamw"}]}
    assert len(problems("experiment.json", {**chosen, "optimizer": {"lrr": 1}})) == 1
    chosen = {"defaults": [{"override /data": "digits"}]}
    assert problems("experiment.json", {**chosen, "data": {"augmentation": None}}) == []
    assert problems("experiment.json", {**chosen, "data": {"source": None}}) != []
    cases = contents()["experiment.json"]["allOf"]
    for case in cases:  # each leads to a definition
        (node,) = case["then"]["properties"].values()
        name, _, place = node["$ref"].partition("#/definitions/")
        assert place in contents()[name]["definitions"]
    assert len(cases) > 50


def test_a_misspelt_key_fails_at_the_top_of_an_experiment() -> None:
    assert problems("experiment.json", {"trianer": {}}) != []
    assert problems("experiment.json", {"lab": "lab"}) != []  # conf/train.yaml alone has it
    assert problems("experiment.json", {"seed": 3}) == []


def test_the_check_of_a_start_reads_a_rule_as_json_schema_means_it() -> None:
    values: list[Any] = [
        *(None, True, False, 0, 1, -1, 19, 20, 0.5, -0.5, 1.5, 1000.5),
        *("", "a", "auto", "train", "balanced", "cpu", "max", "none", "contents", "ddp"),
        *([], [0], [1, 2], [0.5, 0.5], [0.5, 1], [0.5], ["a"], [""], [None], ["hidden"]),
        *([{}], [{"_target_": "a.b"}], {}, {"a": 1}, {"a": "b"}, {"a": -1}, {"column": "w"}),
        *({"column": ""}, {"column": "w", "more": 1}, {"mean": [1], "std": [2]}, {"mean": [1]}),
        {"k": {"_target_": "a.b"}},
    ]
    accepted = 0
    for key, rule in RULES.items():
        meant = Draft7Validator(dict(rule.schema))
        for value in values:
            assert fits(value, rule.schema) == meant.is_valid(value), (key, value)
            accepted += fits(value, rule.schema)
    assert accepted > len(RULES)
