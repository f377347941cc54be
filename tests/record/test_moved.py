"""Names of older targets are replaced in records, and refused elsewhere with the new name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from running import TINY, composed

from regrow.config import registered
from regrow.config.check import check
from regrow.config.targets import locate
from regrow.errors import UserError
from regrow.project import of_lab
from regrow.record import moved


@pytest.mark.parametrize("name", [of_lab(name) for name in moved.MOVED.values()])
def test_every_new_name_can_be_imported(name: str) -> None:
    module, _, last = name.rpartition(".")
    if last[0].isupper():
        assert hasattr(importlib.import_module(module), last)
    else:
        importlib.import_module(name)


def test_a_recorded_config_gets_the_names_of_today() -> None:
    before = {
        "data": {"_target_": "regrow.data.loaders.Data", "root": "regrow.data.loaders.Data"},
        "both": [{"_target_": "regrow.training.options.DDPOptions"}, {"_target_": "own.Net"}],
    }
    now = moved.in_config(before)
    assert now["data"] == {
        "_target_": "regrow.feeding.loaders.Data",
        "root": "regrow.data.loaders.Data",  # a plain value
    }
    assert now["both"][0] == {"_target_": "regrow.distributed.parallel.DDPOptions"}
    assert now["both"][1] == {"_target_": "own.Net"}
    assert before["data"]["_target_"] == "regrow.data.loaders.Data"


@pytest.mark.parametrize(
    "name", ["regrow.checks.X", "my.regrow.check.X", "my.regrow.training.X", "regrow.trainings.X"]
)
def test_a_name_that_only_resembles_a_moved_one_stays(name: str) -> None:
    assert moved.in_text(name) == name


def test_names_of_the_lab_get_the_name_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert moved.in_text("regrow.models.mlp.MLP") == of_lab("lab.models.mlp.MLP")
    monkeypatch.setattr("regrow.project.lab_name", lambda: "mine")
    assert moved.in_text("regrow.models.mlp.MLP") == "mine.models.mlp.MLP"
    assert moved.in_text("regrow.training.schedules.cosine") == "mine.schedules.cosine"
    assert moved.in_text("regrow.training.lr_finder.RangeTest") == "regrow.runs.lr_finder.RangeTest"


def test_an_old_target_is_refused_with_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = "regrow.data.loaders.Data", "regrow.feeding.loaders.Data"
    said = rf"data\._target_={old}: it has moved\. Write _target_: {new}$"
    config: Any = composed(*TINY, f"data._target_={old}")
    with pytest.raises(UserError, match=said):
        check(config, config.hydra.runtime.choices)
    assert locate(new, "data").__name__ == "Data"


def test_a_recorded_node_of_a_config_store_gets_the_name_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {**store.repo})
    node = {"group": "data", "name": "mine.yaml", "package": None, "provider": None}
    node |= {"node": "_target_: regrow.data.loaders.Data", "is_masked": False}
    (tmp_path / registered.NAME).write_text(json.dumps([node]))
    registered.take_up(tmp_path)
    taken: Any = store.repo
    assert taken["data"]["mine.yaml"].node == {"_target_": "regrow.feeding.loaders.Data"}
