"""Which jobs there are, what each uses of the machine, and how a search space is parsed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sweeping import begun

from regrow.config.hydra_access import version_arguments
from regrow.errors import UserError
from regrow.project import CONF
from regrow.record.records import Lock, create
from regrow.sweep import (
    finish,
    frozen,
    gpus,
    kinds,
    ledger,
    local,
    planning,
    results,
    schedule,
    search,
)
from regrow.sweep.composed import Composed

LOADER: Any = None  # Hydra's parser only needs one for glob(…)


@pytest.fixture
def loader_and_config() -> Iterator[tuple[ConfigLoader, DictConfig]]:
    """Return Hydra's loader, and the config of a sweep that it loaded."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **version_arguments()):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", ["seed=0,1"], run_mode=RunMode.MULTIRUN)
        yield loader, config


def test_a_grid_is_every_combination_in_the_order_of_the_command() -> None:
    jobs = planning.grid(LOADER, ["a=1,2", "b=x", "+c=choice([1,2],'a b')", "~d"])
    assert [swept for _, swept in jobs] == [
        ["a=1", "+c=[1,2]"], ["a=1", r"+c=a\ b"], ["a=2", "+c=[1,2]"], ["a=2", r"+c=a\ b"],
    ]  # fmt: skip
    assert jobs[0][0] == ["a=1", "b=x", "+c=[1,2]", "~d"]


def test_the_later_of_two_overrides_of_a_key_wins() -> None:
    assert [swept for _, swept in planning.grid(LOADER, ["a=1,2", "a=3,4"])] == [["a=3"], ["a=4"]]
    assert planning.grid(LOADER, ["a=1,2", "a=3"]) == [(["a=3"], [])]


def test_a_file_of_sets_is_read_with_the_values_that_hydra_reads(tmp_path: Path) -> None:
    file = tmp_path / "sets.yaml"
    file.write_text("- {notes: 2026-11-28, optimizer.lr: 1e-3}\n- seed=1 model=cnn\n")
    options = kinds.Sets(
        params=None, fail_fast=False, retry_failed=False, pictures="none", sets=[], file=str(file)
    )
    assert planning.sets_of(options) == [
        ["notes=2026-11-28", "optimizer.lr=0.001"],
        ["seed=1", "model=cnn"],
    ]


def test_values_of_yaml_are_typed_as_one_types_them() -> None:
    params: dict[str, Any] = {"a": [0.1, None, True, "x"], "b": "1,2", "c": [[8], [8, 8]], "d": 3}
    params |= {"e": [{"body.*": 0.1}, None], "f": [["it's"]]}
    assert planning.lines_of(params) == [
        "a=0.1,null,true,x", "b=1,2", "c=[8],[8,8]", "d=3", "e={body.*:0.1},null", 'f=["it\'s"]',
    ]  # fmt: skip
    for line in planning.lines_of(params):
        OverridesParser.create().parse_overrides([line])
    assert planning.lines_of(None) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.1,1)", FloatDistribution(0.1, 1.0)),
        ("tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("int(interval(1,9))", IntDistribution(1, 9)),
        ("tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
        ("range(2,9)", IntDistribution(2, 8)),
        ("range(8,33,8)", IntDistribution(8, 32, step=8)),
        ("range(0,1,step=0.5)", CategoricalDistribution(["0.0", "0.5"])),
        ("choice(adam,[8,8])", CategoricalDistribution(["adam", "[8,8]"])),
        ("1,2", CategoricalDistribution(["1", "2"])),
    ],
)
def test_hydras_ranges_are_optunas_distributions(text: str, expected: Any) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"a={text}"])
    assert search.distribution_of(override) == expected


@pytest.mark.parametrize("text", ["interval(1,0)", "tag(log,interval(0,1))", "range(3,1)"])
def test_an_impossible_range_is_one_line(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"a={text}"])
    with pytest.raises(UserError, match=r"^a="):
        search.distribution_of(override)


def trainer(device: str = "cpu", devices: int | str = 1) -> dict[str, Any]:
    return {"device": device, "devices": devices}


def test_jobs_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 16)
    assert local.jobs_at_once("auto", [trainer()], 0) == 8
    assert local.jobs_at_once("auto", [trainer(devices=4)], 0) == 4
    assert local.jobs_at_once("auto", [trainer("cuda")], 4) == 4
    assert local.jobs_at_once("auto", [trainer("auto", 2), trainer("auto")], 4) == 2
    assert local.jobs_at_once("auto", [trainer("cuda", "auto")], 4) == 1
    assert local.jobs_at_once("auto", [trainer("cpu")], 4) == 8
    assert local.jobs_at_once(3, [trainer("cuda")], 4) == 3
    with pytest.raises(UserError, match=r"trainer.devices=2: this machine has 1 GPU "):
        local.jobs_at_once("auto", [trainer("auto", 2)], 1)
    assert local.threads_of(trainer(), 8, 0) == 2
    assert local.threads_of(trainer(devices=4), 8, 0) == 1


def test_the_ranks_of_a_job_on_all_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "cores", lambda: 16)
    assert local.threads_of(trainer("cuda", "auto"), 1, 8) == 2
    assert local.threads_of(trainer("auto", "auto"), 1, 8) == 2
    assert local.threads_of(trainer("cpu", "auto"), 1, 8) == 16  # one process
    assert local.threads_of(trainer("auto", "auto"), 2, 0) == 8


def test_a_job_that_a_real_time_signal_killed_is_one_that_failed() -> None:
    planned = planning.Planned(ledger.JobEntry(0, "", {}, ""), None)  # type: ignore[arg-type]
    for code, name in ((-40, "signal 40"), (-11, "SIGSEGV"), (-9, "SIGKILL (out of memory?)")):
        ended = local.how(planned, code)
        assert (ended.state, ended.reason) == ("failed", f"its process was killed by {name}")


def test_a_job_that_exits_with_0_before_its_run_is_complete_is_one_that_failed(
    tmp_path: Path,
) -> None:
    """As by `os._exit(0)` in a user's code."""
    entries = [ledger.JobEntry(n, f"{n}", {"seed": f"{n}"}, f"{n}") for n in range(2)]
    begun(tmp_path, [])
    ledger.write(tmp_path, entries)
    for entry in entries:
        (tmp_path / entry.folder).mkdir()
        (tmp_path / entry.folder / "status.json").write_text('{"state": "running"}')
    planned = planning.Planned(entries[0], None)  # type: ignore[arg-type]
    stop = schedule.Stop(None)  # type: ignore[arg-type]
    assert schedule.outcome(tmp_path, local.how(planned, 0), stop) == "failed"
    finish.finish(tmp_path, 1, 0)  # as on Slurm
    assert [ledger.state_of(tmp_path, entry)[0] for entry in entries] == ["failed", "failed"]


def test_a_gpu_is_lent_once_also_to_another_sweep(tmp_path: Path) -> None:
    mine, yours = (gpus.Leases(["0", "1", "2"], tmp_path / "locks") for _ in range(2))
    assert mine.take(2) == ["0", "1"]
    assert yours.take(2) is None  # and the one it could have had is free again
    assert yours.take(1) == ["2"] and mine.take(1) is None
    mine.give_back(["0"])
    assert yours.take(1) == ["0"]
    assert mine.take(0) == []


def test_the_gpus_are_those_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n'\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert gpus.visible() == []
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.defpath}")
    assert gpus.visible() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert gpus.visible() == ["2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,-1,2")
    assert gpus.visible() == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.visible() == []


def test_a_sweep_is_taken_up_by_the_command_that_began_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = create(Path("outputs"), "digits/sweeps")
    begun(folder, ["seed=0,1"])

    def claimed(overrides: list[str], resume: str = "auto") -> Path:
        with frozen.claim(None, "digits", overrides, resume) as lock:
            return lock.folder

    assert claimed(["seed=0,1"]) == folder
    assert claimed(["seed=0,2"]) != folder
    assert claimed(["seed=0,1"], "never") != folder
    with Lock(folder):
        assert claimed(["seed=0,1"]) != folder
    ledger.write(folder, [], complete=True)
    assert claimed(["seed=0,1"]) != folder


def test_resume_never_refuses_a_folder_that_holds_a_sweep(tmp_path: Path) -> None:
    begun(tmp_path, ["seed=0,1"])
    with pytest.raises(UserError, match="holds a sweep"):
        frozen.claim(tmp_path, "digits", ["seed=0,1"], "never")
    frozen.claim(tmp_path, "digits", ["seed=0,1"], "auto").release()


def test_a_killed_job_is_failed_and_one_still_marked_running_is_interrupted(tmp_path: Path) -> None:
    entry = ledger.JobEntry(3, "x", {"seed": "1"}, "3")
    assert ledger.state_of(tmp_path, entry) == ("waiting", None)
    ledger.note(tmp_path, 3, "failed", "killed\nby SIGKILL token=abcdefgh123")
    assert ledger.state_of(tmp_path, entry) == ("failed", "killed by SIGKILL token=***")
    ledger.forget(tmp_path, 3)
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "status.json").write_text('{"state": "running", "error": null}')
    assert ledger.state_of(tmp_path, entry)[0] == "interrupted"


def test_a_sweep_with_a_secret_goes_with_its_own_command(tmp_path: Path) -> None:
    """The record masks it, so that another one cannot be told from it."""
    overrides = ["model.token=abcdefgh", "model.passphrase=correct horse"]
    fixed = planning.fixed_by(overrides, [])
    ledger.write(tmp_path, [], fixed=fixed, varied=[], overrides=overrides)
    assert ledger.is_open(tmp_path, overrides) and "horse" not in str(ledger.read(tmp_path))
    planning.refuse_another(tmp_path, fixed, [])
    with pytest.raises(UserError, match=r"^~model\.passphrase: .* with model\.passphrase=\*\*\*\."):
        planning.refuse_another(tmp_path, {"model.token": fixed["model.token"]}, [])


def test_jobs_that_were_made_otherwise_are_not_mixed_in(tmp_path: Path) -> None:
    fixed = planning.fixed_by(["optimizer=adamw", "seed=0,1", "tags=[a]", "sweep=grid"], ["seed=0"])
    assert fixed == {"optimizer": "optimizer=adamw"}
    ledger.write(tmp_path, [], fixed=fixed, varied=["seed"])
    planning.refuse_another(tmp_path, fixed, ["seed=0"])
    planning.refuse_another(tmp_path, {}, ["optimizer=adamw", "seed=5"])  # now a varied key
    with pytest.raises(UserError, match="was made with optimizer=adamw"):
        planning.refuse_another(tmp_path, {"optimizer": "optimizer=sgd"}, ["seed=0"])
    with pytest.raises(UserError, match="was made with no such override"):
        planning.refuse_another(
            tmp_path, {**fixed, "trainer.max_epochs": "trainer.max_epochs=9"}, []
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "optimizer.lr=0.1"],
        ["optimizer.lr=0.1", "optimizer=sgd", "+tags=[a]", "seed=1"],
        ["experiment=digits_cnn", "optimizer.lr=0.1", "optimizer=sgd", "name=x"],
        ["logger=[csv,jsonl]", "model.hidden=[8,8]", "model={hidden:[4]}"],
        ["~scheduler", "seed=2", "++model.dropout=0.5"],
        ["hydra.sweep.subdir=x${hydra.job.num}", "seed=2", "hydra.job.chdir=false"],
        ["trainer=ddp", "trainer.devices=2", "name=a\\,b"],
        [r"notes='it\'s'", "tags=[a,'b c']", "trainer.clip_norm=null", "name=''"],
    ],
)
def test_configs_composed_for_many_jobs_are_those_composed_for_each(
    overrides: list[str], loader_and_config: tuple[Any, DictConfig]
) -> None:
    loader, config = loader_and_config
    composed = Composed(loader, config)
    composed([o.replace("seed=", "trainer.max_epochs=") for o in overrides])  # leaves no trace
    for lines in (overrides, [*overrides, "seed=7"], overrides):
        expected = loader.load_sweep_config(config, lines)
        assert composed(lines) == expected
        found, its = (OmegaConf.to_yaml(c.hydra) for c in (composed(lines), expected))
        assert found == its
        assert composed(lines)._metadata.resolver_cache == expected._metadata.resolver_cache


@pytest.mark.parametrize(
    "wrong",
    ["optimizer.lrr=1", "optimizer=adan", "sead=1", "seed@x=1", "logger=null", "notes=glob(a*)"],
)
def test_a_wrong_override_gets_the_same_error_in_many_configs_as_in_one(
    wrong: str, loader_and_config: tuple[Any, DictConfig]
) -> None:
    loader, config = loader_and_config
    with pytest.raises((HydraException, ValueError)) as expected:
        loader.load_sweep_config(config, [wrong, "seed=1"])
    with pytest.raises((HydraException, ValueError)) as found:
        Composed(loader, config)([wrong, "seed=1"])
    assert str(found.value) == str(expected.value)


@pytest.mark.slow
def test_a_job_is_the_same_job_whatever_is_logged_or_noted_about_it(
    loader_and_config: tuple[ConfigLoader, DictConfig],
) -> None:
    loader, _ = loader_and_config

    def identity(*overrides: str) -> str:
        config = loader.load_configuration("train", list(overrides), run_mode=RunMode.RUN)
        return ledger.identity_of(config)

    plain = identity()
    for aside in ("logger=[csv]", "tags=[a]", "notes=again", "launcher.jobs=3", "resume=never"):
        assert identity(aside) == plain, aside
    for part in ("seed=1", "optimizer.lr=0.5", "model=cnn", "name=other", "data.num_workers=1"):
        assert identity(part) != plain, part


def test_a_value_written_in_another_way_is_not_a_change() -> None:
    entry = ledger.JobEntry(0, "", {}, "0", ["optimizer.lr=0.01", "seed=1"])
    for typed, others in (("1e-2", []), ("0.02", ["optimizer.lr=0.02"])):
        run: Any = SimpleNamespace(overrides=[f"optimizer.lr={typed}", "seed=1"])
        assert results.asked_since(entry, run) == others
