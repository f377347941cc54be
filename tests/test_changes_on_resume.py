"""A resume may differ from its run: in keys that keep the maths, or in named ones."""

from __future__ import annotations

import fnmatch
import logging
import math
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from running import TINY, composed, config_of

from regrow.config.resume import expand
from regrow.config.resumed_config import MAY_CHANGE, differences, resumed
from regrow.config.rules import of_shipped
from regrow.errors import UserError
from regrow.project import CONF
from regrow.record.records import write_text

CHANGES_THE_MATHS = (
    *("seed=1 data.seed=1", "data.batch_size=8", "data.source.num_train=40", "data.limit_train=30"),
    *("data.drop_last=true", "model.hidden=[13]", "model.dropout=0.1", "optimizer=sgd"),
    *("optimizer.lr=0.5", "scheduler=step", "scheduler.warmup_steps=2", "trainer.ema_decay=0.9"),
    *("loss.label_smoothing=0.2", "trainer.precision=bf16", "trainer.clip_norm=1.0"),
    *("trainer.early_stopping.patience=3", "trainer.eval_every_epochs=2", "trainer.mode=min"),
)
LEAVES_IT = (
    *("trainer.max_epochs=9", "trainer.max_steps=5", "trainer.devices=2", "data.num_workers=2"),
    *("data.cache=resized", "data.cache_root=elsewhere", "data.cache_max_gb=30"),
    *("trainer.accumulation_steps=4", "logger=[csv]", "notes=again", "tags=[a]"),
    *("trainer.log_every_steps=7", "trainer.checkpoint.save_every_steps=2"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config_of(*TINY))))
    write_text(folder / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(list(TINY)))
    return folder


@pytest.mark.parametrize("change", CHANGES_THE_MATHS)
def test_a_change_of_the_maths_is_refused_unless_it_is_named(
    change: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = [*TINY, *change.split()]
    config = config_of(*overrides)
    with pytest.raises(UserError) as refused:
        resumed(run, config, overrides)
    assert change.partition("=")[0] in str(refused.value)
    assert " was " in str(refused.value) and " would be " in str(refused.value)
    assert resumed(run, {**config, "resume": str(run)}, overrides)
    assert "changed by name" in caplog.text


@pytest.mark.parametrize("change", LEAVES_IT)
def test_keys_that_leave_the_maths_alone_may_change(
    change: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert resumed(run, config_of(*TINY, change), [*TINY, change])
    assert f"changed: {change.partition('=')[0].partition('[')[0]}" in caplog.text


def test_a_resume_leaves_out_what_a_newly_chosen_option_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".hydra").mkdir()
    before = ["optimizer.betas=[0.9,0.95]", "optimizer.lr=0.1", "+optimizer.foreach=true"]
    write_text(tmp_path / ".hydra" / "overrides.yaml", OmegaConf.to_yaml(before))

    def expanded(*typed: str) -> list[str]:
        lines = expand([f"resume={tmp_path}", *typed])
        config = composed(*(line for line in lines if not line.startswith("resume=")))
        assert config.optimizer._target_  # Hydra takes the whole line
        return [line for line in lines if "optimizer" in line]

    assert expanded("optimizer=sgd") == [*before[1:], "optimizer=sgd"]
    said = "the optimizer that was chosen now lacks what the run's command sets, which is left out"
    assert f"{said}: optimizer.betas=[0.9,0.95]\n" in capsys.readouterr().err
    assert expanded("optimizer=adam")[:2] == before[:2]
    assert expanded("~optimizer.foreach") == [*before, "~optimizer.foreach"]
    assert expanded("~optimizer.lr") == [before[0], before[2], "~optimizer.lr"]


def test_an_earlier_default_of_another_optimizer_is_not_kept(run: Path) -> None:
    """AdamW's default was 0.5, with which SGD would shrink all weights to zero."""
    before = config_of(*TINY, "optimizer.weight_decay=0.5")
    write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(before)))
    for chosen, kept in (("sgd", 0.0), ("adamw", 0.5)):
        overrides = [*TINY, f"optimizer={chosen}"]
        config = resumed(run, {**config_of(*overrides), "resume": str(run)}, overrides)
        assert config is not None and config["optimizer"]["weight_decay"] == kept


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_resume_refuses_another_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    write_text(tmp_path / "run" / ".hydra" / "overrides.yaml", "[]")
    if kind == "sweep":
        write_text(tmp_path / "run" / "sweep.json", "{}")
    with pytest.raises(UserError, match=rf"^hydra\.{kind}\.dir=other: resume=run writes to run\."):
        expand(["resume=run", f"hydra.{kind}.dir=other"])
    if kind == "run":
        assert expand(["resume=run", "hydra.run.dir=./run"])


def test_nan_and_infinity_in_a_file_of_ones_own_are_accepted_and_equal() -> None:
    was = {"model": {"missing": math.nan, "most": math.inf}}
    assert differences(was, {"model": {"missing": float("nan"), "most": math.inf}}) == {}
    assert [*differences(was, {"model": {"missing": 0.0, "most": math.inf}})] == ["model.missing"]
    for value in was["model"].values():
        assert of_shipped("model.missing", value) is None  # any value


def test_a_missing_key_differs_from_the_text_absent() -> None:
    assert [*differences({"notes": "absent"}, {})] == ["notes"]
    assert [*differences({}, {"notes": "absent"})] == ["notes"]


def test_the_readme_says_of_each_key_what_a_resume_does() -> None:
    readme = (CONF.parent / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| (takes|refuses)\b.* \|$", readme, re.MULTILINE)
    said = {key: does for keys, does in rows for key in re.findall(r"`([\w.*]+)`", keys)}
    assert len(said) > 8 and {*said.values()} == {"takes", "refuses"}
    for key, does in said.items():
        free = any(fnmatch.fnmatchcase(key, pattern) for pattern in MAY_CHANGE)
        assert free is (does == "takes"), key


def test_the_readme_names_the_key_that_is_refused_by_name_too(run: Path) -> None:
    readme = (CONF.parent / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (.+) \| refuses, also by name\b", readme, re.M) == ["`trainer.monitor`"]
    overrides = [*TINY, "trainer.monitor=val/loss"]
    with pytest.raises(UserError, match="which cannot be compared"):
        resumed(run, {**config_of(*overrides), "resume": str(run)}, overrides)


def test_the_number_of_threads_comes_from_the_record_unless_the_processes_change(run: Path) -> None:
    """Bits depend on it. TINY recorded one thread; the resumed command leaves it null."""
    unasked = [option for option in TINY if not option.startswith("trainer.num_threads")]
    assert config_of(*unasked)["trainer"]["num_threads"] is None
    for typed, expected in (
        ([], 1),
        (["trainer.devices=2"], None),
        (["trainer.num_threads=3"], 3),
    ):
        overrides = [*unasked, *typed]
        config = resumed(run, config_of(*overrides), overrides)
        assert config is not None and config["trainer"]["num_threads"] == expected
