"""Each node of conf/ is a call of its target: its keys are the parameters, with every default."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import running
import yaml
from omegaconf import DictConfig, OmegaConf
from running import composed, skip_in_a_project

import regrow
from regrow.config.check import shipped_node
from regrow.config.hydra_access import plain
from regrow.config.targets import locate
from regrow.config.yaml_files import plain_value, read_yaml, readable
from regrow.dotted import leaves
from regrow.errors import UserError
from regrow.project import CONF, lab_name


def nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from nodes(value, f"{path}.{key}")


def options() -> list[tuple[str, str]]:
    groups = ("model", "optimizer", "scheduler", "data", "task", "loss", "trainer", "logger")
    return [
        (group, path.stem)
        for group in groups
        for path, _ in readable(f"{group}/[!_]*.yaml")  # an unfinished file is left out
    ]


# The run passes these: they are not config keys.
HANDED_IN = {
    "optimizer": {"params"},
    "scheduler": {"length"},
    "task": {"loss"},
    "loss": {"outputs", "targets"},
    "step": {"state", "batch", "plan"},
    "logger": {"folder", "resume_step", "run_name", "config"},
    "data": {"images", "inputs"},
}

# No file in conf/ names this function, so the default in Python is the only one.
OPTIONAL = {"data.datasets.from_datasets": {"sets"}}


def found(target: str, path: str) -> Any:
    """Return a target. In a project, skips the test if a package is not installed."""
    try:
        return locate(target, path)
    except UserError as error:
        cause = error.__cause__  # of a module that imports another one
        module = (isinstance(cause, ModuleNotFoundError) and cause.name) or target
        if importlib.util.find_spec(package := module.partition(".")[0]) is None:
            skip_in_a_project(f"{target} needs {package}, which is not installed")
        raise


def mismatches(group: str, node: dict[str, Any], path: str) -> set[str]:
    """Return keys that the target does not take, and parameters of our own targets without a key
    or with a default: defaults belong in YAML only.
    """
    function = found(node["_target_"], path)
    parameters = inspect.signature(function).parameters
    keys = {key for key in node if not (key.startswith("_") and key.endswith("_"))}
    # The configs of transformers pass on to __post_init__ what __init__ does not name.
    later = getattr(function, "__post_init__", None)
    of_later = inspect.signature(later).parameters if later else {}
    if any(p.kind is p.VAR_KEYWORD for p in (*parameters.values(), *of_later.values())):
        return set()
    if not node["_target_"].startswith(("regrow.", f"{lab_name()}.")):
        ours = {"interval"} if path == "scheduler" and "optimizer" in parameters else set()
        return keys - set(parameters) - ours
    asked = set(parameters) - HANDED_IN.get(group, set())
    defaults = {name for name in asked if parameters[name].default is not inspect.Parameter.empty}
    return ((keys ^ asked) | defaults) - OPTIONAL.get(node["_target_"].partition(".")[2], set())


@pytest.mark.parametrize(("group", "option"), options(), ids=lambda value: str(value))
def test_the_keys_of_a_node_are_its_targets_parameters(group: str, option: str) -> None:
    for path, node in nodes(shipped_node(group, option), group):
        assert mismatches(group, node, path) == set(), f"{path} of {group}={option}"


def test_a_file_for_ones_own_data_sets_may_leave_out_only_further_sets() -> None:
    keys = dict.fromkeys(("train", "val", "test", "collate", "sets"))
    node = {"_target_": "lab.data.datasets.from_datasets", **keys}
    assert mismatches("data", node, "data.source") == set()
    del node["sets"], node["collate"]
    assert mismatches("data", {**node, "set": None}, "data.source") == {"collate", "set"}


def test_only_a_project_may_lack_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ROOT", tmp_path)
    with pytest.raises(UserError, match="no such module"):
        found("no_such_package.Model", "model")
    (tmp_path / ".template").mkdir()
    with pytest.raises(pytest.skip.Exception, match="needs no_such_package"):
        found("no_such_package.Model", "model")
    with pytest.raises(UserError, match=r"there is no Adamm\."):
        found("torch.optim.Adamm", "optimizer")


def test_a_key_that_no_parameter_answers_to_is_found() -> None:
    node = {**shipped_node("optimizer", "muon"), "lrr": 1.0}
    assert mismatches("optimizer", node, "optimizer") == {"lrr"}
    del node["lr"]
    assert mismatches("optimizer", node, "optimizer") == {"lrr", "lr"}
    others = {"_target_": "torch.optim.Adamax", "lr": 0.1, "lrr": 0.1}  # its own may be left out
    assert mismatches("optimizer", others, "optimizer") == {"lrr"}


def test_a_file_may_give_weights_to_classes_by_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    text = "defaults: [cross_entropy, _self_]\nclass_weights: {0: 1.0, 1: 2.0}\n"
    (tmp_path / "loss" / "mine.yaml").write_text(text)
    config = regrow.compose(overrides=["loss=mine", f"hydra.searchpath=[{tmp_path}]"])
    assert config.loss.class_weights == {"0": 1.0, "1": 2.0}


def missing(node: Any) -> set[str]:
    """Return the dotted keys whose value is still missing."""
    return {key for key, value in leaves(node).items() if value == "???"}


@pytest.mark.parametrize(("group", "option"), options(), ids=lambda value: str(value))
def test_a_value_that_a_file_marks_as_required_is_required(group: str, option: str) -> None:
    """A ??? does not replace a value that the file inherits."""
    written = missing(read_yaml(CONF / group / f"{option}.yaml"))
    left = missing(
        plain(
            composed(f"{group}=[{option}]" if group == "logger" else f"{group}={option}"),
            resolve=False,
        )[group]
    )
    assert written <= left


def test_a_value_that_is_inherited_would_be_found() -> None:
    merged = OmegaConf.merge({"root": "data"}, {"root": "???", "source": "???"})
    assert missing(plain(cast(DictConfig, merged), resolve=False)) == {"source"}


def test_a_file_is_read_with_the_numbers_that_hydra_reads(tmp_path: Path) -> None:
    words = ("1e-3", "-2E+4", "1.5e3", "1_0e2", "0.1", "7", "1e", "e3", "1e-3x", "1.e2.3")
    file = tmp_path / "own.yaml"
    file.write_text("".join(f"key{i}: {word}\n" for i, word in enumerate(words)))
    assert read_yaml(file) == OmegaConf.to_container(OmegaConf.load(file))
    assert read_yaml(file) != yaml.safe_load(file.read_text())  # the reason for a loader of our own


def misspelt_floats(node: Any) -> list[str]:
    """Return the texts, at any depth, that look like a number with an exponent and are none."""
    if isinstance(node, dict | list):
        values = node.values() if isinstance(node, dict) else node
        return [text for value in values for text in misspelt_floats(value)]
    looks = isinstance(node, str) and re.fullmatch(r"[-+]?[.\d][-+._\d]*[eE][-+._\d]*", node)
    return [node] if looks and isinstance(plain_value(node), str) else []  # not 1e-3 in quotes


def test_floats_in_yaml_are_floats() -> None:
    for path, content in readable("**/*.yaml"):
        assert misspelt_floats(content) == [], path


def test_a_misspelt_float_is_found() -> None:
    text = "[1e-3, 2E4, '1e5', 1e, {a: 1.e2.3}, -2e--3, 1e-, 'tag(log,interval(1e-4,1e-1))', 3rd]"
    assert misspelt_floats(plain_value(text)) == ["1e", "1.e2.3", "-2e--3", "1e-"]
