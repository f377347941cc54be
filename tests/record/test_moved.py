"""Names of older targets are replaced in records, and refused elsewhere with the new name."""

from __future__ import annotations

import contextlib
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

# The classes and functions of src/regrow at 8483121, of which no part of the name begins with _.
OLD = (Path(__file__).parent / "names_of_0_1.txt").read_text("utf-8").split()


def exists(name: str) -> bool:
    module, _, last = name.rpartition(".")
    with contextlib.suppress(ImportError):
        return importlib.import_module(name) is not None
    with contextlib.suppress(ImportError):
        return hasattr(importlib.import_module(module), last)
    return False


def test_every_new_name_exists() -> None:
    for name in moved.MOVED.values():
        assert exists(of_lab(name)), name
    assert not exists("regrow.runs.training.no_such")


def test_every_public_name_of_the_first_version_is_found_or_has_an_answer() -> None:
    assert len(OLD) == 566
    for name in OLD:
        if name in moved.GONE:
            with pytest.raises(UserError, match="had it, and nothing replaces it"):
                locate(name, "")
        elif (new := moved.in_text(name)) != name:
            with pytest.raises(UserError, match=rf"it has moved\. Write _target_: {new}$"):
                locate(name, "")
            assert callable(locate(new, ""))
        else:
            assert callable(locate(name, ""))


def test_no_name_of_today_is_replaced() -> None:
    for name in (*moved.MOVED, *moved.GONE):
        assert not exists(name), name


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
