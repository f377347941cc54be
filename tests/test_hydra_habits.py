"""Habits of Hydra users work as there, or one line says what to type here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import hydra
import pytest
import yaml
from finished import finished
from omegaconf import OmegaConf
from running import TINY

import regrow
from regrow.cli import entry
from regrow.cli.entry import hydras_targets
from regrow.config import check, flags, own_code, roles, yaml_files
from regrow.config.hydra_access import plain
from regrow.config.keys import known_keys
from regrow.config.targets import allow, instantiate, refuse_unknown_targets, shipped_targets
from regrow.errors import UserError
from regrow.failing import SET_BY_US, show_traceback
from regrow.processes import begin
from regrow.project import ROOT

SMALL = (*TINY, "trainer.max_steps=2", "trainer.progress_bar=false")
QUIET = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", SET_BY_US)}
IS_1_3 = hydra.__version__.startswith("1.3")


def refused(folder: Path, *arguments: str, script: str = "train.py") -> str:
    """Return the command's error, which is one line, and check that nothing is left behind."""
    before = sorted(folder.rglob("*"))
    done = forked.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments], cwd=folder, env=QUIET,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout.startswith("error: "), done.stdout
    assert done.stdout.count("\n") == 1 and sorted(folder.rglob("*")) == before
    return str(done.stdout)


FLAGS = {
    ("-m", "--cfg", "job"): "--multirun and --cfg cannot be combined. --cfg shows one config",
    ("--cfg", "hydra", "--multirun"): "--multirun and --cfg|--cfg and --multirun",
    ("-m", "--info"): "--info shows one config: leave out -m",
    ("-m", "-r"): "--multirun and --run cannot be combined. Leave one out.",
    ("--cfg=job", "--info", "all"): "--cfg and --info cannot be combined",
    ("--cfg=x",): "--cfg x: it must be one of job, hydra, all.",
    ("seed=1", "--cfg"): "--cfg: its value is missing.",
    ("-cn", "--cfg", "job"): "--config-name: its value is missing.",
    ("-i", "foo"): "--info foo: it must be one of all, config,",
    ("--resolve",): "--resolve is for --cfg. Add --cfg job",
    ("-p", "model"): "--package model is for --cfg. Add --cfg job",
    ("seed=1", "-cd"): "--config-dir: its value is missing.",
    ("-cp", "nope"): f"--config-path nope: there is no such folder in {ROOT}/scripts, where Hydra",
    ("--multirun=true",): "--multirun=true: --multirun takes no value. Write --multirun",
    ("hydra.searchpath=a,b",): "it takes a list of places: hydra.searchpath=[a,b]",
    ("-sc",): "say what to do with it, such as -sc install=bash.",
    ("--experimental-rerun", "a/config.pickle"): "scripts/reproduce.py run=<its folder>",
    ("--experimental-rerun=a/config.pickle",): "--experimental-rerun a/config.pickle: runs keep no",
}


@pytest.mark.parametrize("given", FLAGS, ids=" ".join)
def test_flags_that_do_not_fit_are_one_line(given: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        flags.check(given)
    assert any(part in str(raised.value) for part in FLAGS[given].split("|"))


def test_flags_that_fit_pass() -> None:
    for line in (
        "-m seed=0,1", "--cfg job --resolve -p model", "--info", "--info seed=1", "-sc query=bash",
        "--help -m", "--hydra-help", "--version", "-r seed=1", "--help --resolve", "-c job -c all",
    ):  # fmt: skip
        flags.check(line.split())
    assert flags.split(["--info", "seed=1"]) == (["--info", "all"], ["seed=1"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("script", ["train", "find_lr"])
def test_shells_find_what_completes_a_script(shell: str, script: str, tmp_path: Path) -> None:
    def asked(what: str, line: str = "") -> str:
        command = [sys.executable, f"scripts/{script}.py", "-sc", f"{what}={shell}"]
        found = subprocess.run(
            command, cwd=ROOT, env=QUIET | {"COMP_LINE": line}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        return found.stdout

    # The shell looks for these words in the script; on Hydra 1.4 some look for none.
    marks = re.findall(r'grep (?:-q )?"([^"]+)"', installed := asked("install"))
    text = (ROOT / "scripts" / f"{script}.py").read_text()
    assert "query=" in installed and all(mark in text for mark in marks)
    line = f"python scripts/{script}.py optimizer=ada"
    assert asked("query", line).split() == [f"optimizer=ada{end}" for end in ("grad", "m", "mw")]


def test_a_flag_is_refused_before_hydra_sees_it(tmp_path: Path) -> None:
    assert "--cfg shows one config" in refused(tmp_path, "-m", "--cfg", "job", "seed=0,1")


PLACES = {
    "-cn mytrain": "--config-name mytrain: there is no mytrain.yaml in conf.",
    "-cn D/mine.yaml": "it is a name, not a path. Use --config-dir D --config-name mine\n",
    "-cn mine hydra.searchpath=[D]": "hydra.searchpath is not searched for it. Use --config-dir /",
    "-cn mine --config-path {D}": "mine.yaml:1: there is no train.yaml in {D}, which --config-path",
    "-cp D -cn mine": "where Hydra looks. To add a folder to conf/: --config-dir D\n",
    "-cd D -cn listed": "D/listed.yaml must hold keys and values",
    "-cn find_lr": "--config-name find_lr is for scripts/find_lr.py.",
    "--config_name mine": "there is no such flag. Did you mean --config-name?",
    "+hydra.searchpath=[D] model=mine optimizer.lr=0": "optimizer.lr=0 must be",  # found
    "hydra.searchpath=[/nope]": "hydra.searchpath: there is no /nope.",
    "hydra.searchpath=[http://x]": "Hydra reads nothing from http://.",
    "~hydra.sweep": "~hydra.sweep: a setting of Hydra's has a value, and cannot be left out.",
    "~name": "~name: its value is an interpolation, which Hydra resolves too early. Leave ~name",
    # Hydra 1.3 removes no null; 1.4 does, and the run needs the key.
    "~trainer.clip_norm": "~trainer.clip_norm: it is not there, or is null already."
    if IS_1_3
    else "~trainer.clip_norm: a run needs this key.",
}


@pytest.mark.parametrize("given", PLACES)
def test_a_place_or_a_name_that_is_not_found_leads_to_where_it_is(
    given: str, tmp_path: Path
) -> None:
    folder = tmp_path / "D"
    (folder / "model").mkdir(parents=True)
    (folder / "mine.yaml").write_text("defaults: [train, _self_]\n")
    (folder / "listed.yaml").write_text("- a\n- b\n")
    (folder / "model" / "mine.yaml").write_text("defaults: [mlp]\n")
    said = refused(tmp_path, *given.replace("{D}", str(folder)).split())
    assert PLACES[given].replace("{D}", str(folder)) in said


def test_info_behind_head_ends_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT}/scripts/train.py --info all | head -1"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=QUIET,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.parametrize(
    "given",
    [
        ("hydra/job_logging=default",),
        ("-m", "hydra/job_logging=default", "seed=0,1"),
        ("-m", "hydra/job_logging=stdout", "seed=0,1"),
        ("hydra.output_subdir=.hydra",),
        ("hydra.output_subdir=config", "hydra.run.dir=mine"),
    ],
    ids=" ".join,
)
def test_hydra_writes_nothing_beside_a_run(given: tuple[str, ...], tmp_path: Path) -> None:
    said = refused(tmp_path, *given)
    assert "Leave hydra" in said and "folder" in said


def test_hydras_log_goes_into_the_folder_of_a_range_test_in_a_sweep(tmp_path: Path) -> None:
    said = refused(tmp_path, "-m", "hydra/job_logging=default", "x=1", script="find_lr.py")
    assert "x: there is no such key" in said


# -- a broken file that a command does not compose -------------------------------------------------


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: Any) -> Iterator[Path]:
    """A copy of conf/ with files that are not YAML, not UTF-8 and not a mapping."""
    copy = tmp_path / "conf"
    shutil.copytree(ROOT / "conf", copy)
    for place in ("experiment", "model", "logger", "."):
        (copy / place / "broken.yaml").write_text("a: 1\nb: [1\nc: {")
        (copy / place / "latin.yaml").write_bytes("a: é".encode("latin-1"))
        (copy / place / "listed.yaml").write_text("- a\n- b\n")
    (copy / "model" / "folder.yaml").mkdir()
    for module in (entry, yaml_files, check, roles):
        if hasattr(module, "CONF"):
            monkeypatch.setattr(module, "CONF", copy)
    for module in (own_code, yaml_files):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    shipped_targets.cache_clear()
    roles.listed.cache_clear()
    yield copy
    shipped_targets.cache_clear()
    roles.listed.cache_clear()


def test_a_broken_file_elsewhere_in_conf_does_not_end_a_command(conf: Path) -> None:
    assert "lab.models.mlp.MLP" in shipped_targets()
    assert "lab.models.mlp.MLP" in roles.listed("model")
    assert "optimizer.lr" in known_keys()
    assert flags.CHECK in hydras_targets([])
    values = plain(hydra_free(*TINY))
    check._check_keys(values, {})


def hydra_free(*overrides: str) -> Any:
    from running import composed

    composition = composed(*overrides)
    del_hydra = [str(key) for key in composition if key != "hydra"]
    return OmegaConf.masked_copy(composition, del_hydra)


def test_a_target_that_a_broken_file_may_name_names_the_file(conf: Path) -> None:
    with pytest.raises(UserError, match=r"own\.Net.*cannot be read: conf/broken\.yaml:3, .*latin"):
        refuse_unknown_targets({"_target_": "own.Net"})


def test_a_composed_file_that_is_broken_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "D" / "experiment").mkdir(parents=True)
    (tmp_path / "D" / "experiment" / "mine.yaml").write_text("a: 1\nb: [1\nc: {")
    said = refused(tmp_path, "--config-dir", "D", "experiment=mine")
    assert f"{tmp_path}/D/experiment/mine.yaml:3 is not YAML: " in said


# -- errors in a user's own code -------------------------------------------------------------------


def raised_in(folder: Path, monkeypatch: Any) -> UserError:
    folder.mkdir(parents=True)
    name = f"own_{abs(hash(folder))}"
    (folder / f"{name}.py").write_text("def make():\n    text = 'a'\n    return int(text)\n")
    monkeypatch.syspath_prepend(folder)
    allow({"_target_": f"{name}.make"})
    with pytest.raises(UserError) as raised:
        instantiate({"_target_": f"{name}.make"})
    return raised.value


@pytest.mark.parametrize("name", ["hydra", "importlib", "site-packages/hydra", "mine"])
@pytest.mark.skipif(not IS_1_3, reason="from 1.4 on, such an error has its traceback")
def test_the_place_of_an_error_is_said_whatever_the_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    said = str(raised_in(tmp_path / name / "project", monkeypatch))
    assert f"({tmp_path / name / 'project'}/own_" in said
    assert ".py:3): ValueError: invalid literal" in said


@pytest.mark.skipif(not IS_1_3, reason="from 1.4 on, such an error has its traceback")
def test_a_user_who_asks_for_tracebacks_gets_them(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    error = raised_in(tmp_path / "project", monkeypatch)
    for name in ("HYDRA_FULL_ERROR", SET_BY_US):
        monkeypatch.delenv(name, raising=False)
    begin.main()
    show_traceback(error)
    assert os.environ["HYDRA_FULL_ERROR"] == "1" and capsys.readouterr().err == ""
    monkeypatch.delenv(SET_BY_US)
    begin.main()
    show_traceback(error)
    said = capsys.readouterr().err
    assert "Traceback" in said and "return int(text)" in said
    show_traceback(UserError("a line that says it all"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("asks", [True, False])
def test_only_asked_for_does_a_command_print_a_traceback(asks: bool, tmp_path: Path) -> None:
    (tmp_path / "broken_model.py").write_text("import no_such_module_at_all\n")
    environment = {
        **QUIET,
        "PYTHONPATH": forked.python_path(tmp_path),
        **({"HYDRA_FULL_ERROR": "1"} if asks else {}),
    }
    done = forked.run(
        [sys.executable, str(ROOT / "scripts/train.py"), "model._target_=broken_model.Net"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "error: " in done.stdout.splitlines()[-1]
    assert ("import no_such_module_at_all" in done.stdout) is asks
    assert ("Traceback" in done.stdout) is asks


COUNTED = """
import runpy, sys
from regrow.config import check
from regrow.errors import UserError
ours, calls = check.check_ranges, []
def counted(values):
    calls.append(values["seed"])
    ours(values)
check.check_ranges = counted
sys.path.insert(0, {scripts!r})
sys.argv = [{scripts!r} + "/train.py", *sys.argv[1:]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("checks:", *calls)
"""
CHANGES_THE_SEED = """
from hydra.experimental.callback import Callback

class Change(Callback):
    def on_run_start(self, config, **more):
        config.seed = 7
"""


@pytest.mark.parametrize(
    ("overrides", "checks"),
    [
        ((), "0"),
        (("+hydra.callbacks.z._target_=mine.Change",), "0 7"),  # another config
    ],
)
@pytest.mark.slow
def test_a_start_checks_each_value_once(
    overrides: tuple[str, ...], checks: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(CHANGES_THE_SEED)
    code = COUNTED.format(scripts=str(ROOT / "scripts"))
    path = f"{ROOT / 'src'}{os.pathsep}{tmp_path}"
    quick = (*TINY, "trainer.max_steps=1", "data.source.num_test=2", "hydra.run.dir=run")
    done = forked.run(
        [sys.executable, "-c", code, *quick, *overrides], cwd=tmp_path,
        env={**QUIET, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"checks: {checks}\n" in done.stdout


# -- a user's own callbacks ------------------------------------------------------------------------

CALLBACK = """
import logging
from hydra.experimental.callback import Callback

class Say(Callback):
    def __init__(self):
        print("made by Hydra")

class Handler(logging.StreamHandler):
    pass
"""


def test_hydra_may_call_what_the_users_own_files_and_command_line_name(tmp_path: Path) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "a.yaml").write_text(
        "# @package hydra.callbacks\nmine: {_target_: own.Say}\n"
    )
    (tmp_path / "b.yaml").write_text(
        "hydra: {job_logging: {handlers: {x: {class: own.Handler}}}}\n"
    )
    given = ["+hydra.callbacks.c._target_=typed.Say", "+hydra.callbacks.d={_target_:typed.Too,a:1}"]
    found = hydras_targets(["--config-dir", str(tmp_path), *given, "model._target_=not.This"])
    assert {"own.Say", "own.Handler", "typed.Say", "typed.Too", flags.CHECK} <= {*found}
    assert "not.This" not in found


def test_a_callback_of_ones_own_runs(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(CALLBACK)
    place = tmp_path / "D" / "experiment"
    place.mkdir(parents=True)
    node = {"callbacks": {"say": {"_target_": "my_callbacks.Say"}}}
    text = yaml.safe_dump({"hydra": node, "seed": -1})  # ends before it trains
    (place / "mine.yaml").write_text("# @package _global_\n" + text)
    done = forked.run(
        [sys.executable, str(ROOT / "scripts/train.py"), "--config-dir", "D", "experiment=mine"],
        cwd=tmp_path, env={**QUIET, "PYTHONPATH": forked.python_path(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False,
    )  # fmt: skip
    assert "made by Hydra" in done.stdout and "whitelist" not in done.stdout, done.stdout


def test_a_callback_that_cannot_be_imported_says_why_and_where(tmp_path: Path) -> None:
    (tmp_path / "my_callbacks.py").write_text(f"{CALLBACK}\nnot_there\n")
    done = forked.run(
        [
            *(sys.executable, str(ROOT / "scripts/train.py"), "seed=-1"),
            "+hydra.callbacks.say._target_=my_callbacks.Say",
        ],
        cwd=tmp_path, env={**QUIET, "PYTHONPATH": forked.python_path(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False,
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == 2 and said.count("\n") == 1, said
    assert "'not_there' is not defined" in said and "my_callbacks.py:" in said, said


# -- a run's record as a config --------------------------------------------------------------------


@pytest.fixture(scope="module")
def done_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("repeated") / "run", *SMALL)


@pytest.mark.slow
def test_a_record_as_a_config_leads_to_the_commands_for_it(done_run: Path) -> None:
    place = done_run.parent
    away = os.path.relpath(done_run, ROOT / "scripts")
    for given in (
        ("--config-path", str(done_run / ".hydra"), "--config-name", "config"),
        ("--config-path", f"{away}/.hydra", "--config-name", "config"),
        ("-cp", "run/.hydra", "-cn", "config"),
        ("--config-dir=run/.hydra", "-cn", "config"),
        ("-cn", "config", f"hydra.searchpath=[file://{done_run}/.hydra]"),
        ("-cp", str(done_run), "-cn", "config"),
        ("-m", "-cp", "run/.hydra", "-cn", "config", "seed=0,1"),
    ):
        said = refused(place, *given)
        assert "reproduce.py run=run. To resume it: " in said and "train.py resume=run." in said


def test_a_primary_config_that_leaves_out_train_is_refused(done_run: Path, tmp_path: Path) -> None:
    place = tmp_path / "D"
    place.mkdir()
    shutil.copy(done_run / "config.yaml", place / "copied.yaml")
    (place / "mine.yaml").write_text("defaults: [train, _self_]\nnotes: mine\n")
    (place / "further.yaml").write_text("defaults:\n- mine\n- _self_\n")
    (place / "none.yaml").write_text("defaults: [copied]\n")
    for name in ("copied", "none"):
        said = refused(tmp_path, "--config-dir", "D", "-cn", name)
        assert f"D/{name}.yaml does not build on train" in said
    for name in ("mine", "further", "train", "elsewhere"):
        flags.refuse_records(["--config-dir", str(place), "--config-name", name])


# -- another way to start --------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train", "find_lr", "evaluate", "reproduce"])
def test_scripts_start_as_modules_too(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", "--help"], cwd=ROOT, env=QUIET,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("given", ["hydra=null", "model=null", "hydra.searchpath=[http://x]"])
def test_hydras_error_about_a_value_is_one_line_in_a_notebook_too(given: str) -> None:
    with pytest.raises(UserError) as found:
        regrow.compose("train", [given])
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("optimizer=ada", ["optimizer=adagrad", "optimizer=adam", "optimizer=adamw"]),
        ("--check model=cnn model.chan", ["model.channels"]),
        ("--conf", []),  # Hydra completes no flags, and its usage must not reach the prompt
    ],
)
def test_a_shell_completes_options_and_keys(line: str, offers: list[str], tmp_path: Path) -> None:
    script = ROOT / "scripts" / "train.py"
    typed = f"python train.py {line}"
    done = subprocess.run(
        [sys.executable, str(script), "-sc", "query=bash"], cwd=tmp_path, capture_output=True,
        text=True, check=False, env={**QUIET, "COMP_LINE": typed, "COMP_POINT": str(len(typed))},
    )  # fmt: skip
    assert done.stderr == "" and list(tmp_path.iterdir()) == []
    assert [word.rstrip(".") for word in done.stdout.split()] == offers
