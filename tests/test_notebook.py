"""`regrow.compose` and `regrow.build` in a notebook, and custom resolvers in every process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import OmegaConf
from running import CPU, TINY, config_of

import regrow
from regrow.config.hydra_access import plain, version_arguments
from regrow.config.keys import known_keys
from regrow.config.own_modules import import_resolvers
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.project import CONF, ROOT
from regrow.runs import training


def test_a_config_is_that_of_the_command_resolved() -> None:
    config = regrow.compose("train", [*TINY, "optimizer=sgd"])
    assert plain(config) == config_of(*TINY, "optimizer=sgd")
    assert config.name == "synthetic" and config.optimizer._target_ == "torch.optim.SGD"
    assert regrow.compose("train", (*TINY, "notes='${name}'")).notes == "synthetic"
    assert regrow.compose("train", [*TINY, r"notes='\${name}'"]).notes == "${name}"
    assert regrow.compose().name == "digits" and "find_lr" in regrow.compose("find_lr")


def test_objects_are_those_of_a_run(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        config = regrow.compose("train", [*TINY, "optimizer=sgd", r"notes='\${name}'"])
        ours, its = regrow.build(config), training.build(plain(config), CPU)
        assert isinstance(ours.state.optimizer, torch.optim.SGD)
        for name, value in its.state.model.state_dict().items():
            assert torch.equal(ours.state.model.state_dict()[name], value)
        inputs = next(iter(ours.train.epoch(0)))
        assert inputs is not None and ours.total_steps == its.total_steps
        ours.data.close()
        its.data.close()
    regrow.build(plain(config)).data.close()
    assert list(tmp_path.iterdir()) == []


def test_a_config_may_be_changed_before_it_is_built() -> None:
    config = regrow.compose("train", TINY)
    config.model.hidden = [7]
    config.trainer.device = "cpu"
    objects = regrow.build(config)
    assert (
        objects.state.model.state_dict()[next(iter(objects.state.model.state_dict()))].numel() == 42
    )
    objects.data.close()
    config.trainer.devices = 2
    with pytest.raises(UserError, match=r"trainer.devices=2: this is one process"):
        regrow.build(config)


def test_hydras_own_state_stays_as_it_was() -> None:
    kinds = (GlobalHydra, HydraConfig, VersionBase)
    for kind in kinds:
        Singleton._instances.pop(kind, None)
    regrow.compose("train", TINY)
    assert not any(kind in Singleton._instances for kind in kinds)
    assert not GlobalHydra.instance().is_initialized() and not HydraConfig.initialized()
    with initialize_config_dir(str(CONF), job_name="of_the_notebook", **version_arguments()):
        before = GlobalHydra.instance(), GlobalHydra.instance().hydra, VersionBase.instance()
        with pytest.raises(UserError):
            regrow.compose("train", ["optimizer.lrr=1"])
        regrow.compose("train", TINY)
        after = GlobalHydra.instance(), GlobalHydra.instance().hydra, VersionBase.instance()
        assert all(one is other for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("overrides", "said"),
    {
        ("optimizer.lrr=1",): "optimizer.lrr: there is no such key. Did you mean optimizer.lr?",
        ("optimizer.lr=abc",): "optimizer.lr=abc must be a number",
        ("seed=0,1",): "seed=0,1: several values are a sweep, not one config.",
        ("model=nope",): "model=nope: there is no such option.",
        ("-m",): "-m is a flag. compose takes overrides, such as seed=1.",
        (
            "resume=a",
        ): "resume=a: compose does not resume runs. regrow.load.load_run gives its model",
        "seed=1": "overrides='seed=1' must be a list, such as ['seed=1'].",
        ("optimizer.lr=${eval:1}",): "optimizer.lr: there is no resolver eval. Register it in reso",
    }.items(),
    ids=str,
)
def test_a_wrong_override_of_compose_is_an_error_of_one_line(overrides: Any, said: str) -> None:
    with pytest.raises(UserError) as raised:
        regrow.compose("train", overrides)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_config_of_hydras_own_api_is_sent_to_ours() -> None:
    from hydra import compose

    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    with initialize_config_dir(str(CONF), **version_arguments()):
        config = compose("train", [*TINY])
    with pytest.raises(UserError, match=r"Compose it with regrow\.compose"):
        regrow.build(config)
    with pytest.raises(UserError, match=r"not a run's config\. Make one with regrow\.compose"):
        regrow.build({"model": {}})


def test_a_target_set_after_compose_is_refused() -> None:
    config = regrow.compose("train", TINY)
    config.model._target_ = "os.system"
    with pytest.raises(UserError, match=r"_target_=os\.system is named neither in conf/ nor"):
        regrow.build(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.batch_size", 0, r"data\.batch_size=0 must be an integer of at least 1\."),
        ("data.overlap", "perhaps", r"data\.overlap=perhaps must be one of refuse, report, ignore"),
        ("data.target_kind", "ranking", r"data\.target_kind=ranking must be one of multiclass"),
        ("data.target_kind", "language", r"task=multiclass does not fit language targets"),
        ("model.hidden", [0], r"model\.hidden=\[0\] must be a list, each an integer of at least 1"),
    ],
)
def test_a_value_that_was_changed_after_the_check_is_checked(
    key: str, value: object, message: str
) -> None:
    config = regrow.compose("train", TINY)
    OmegaConf.update(config, key, value)
    with pytest.raises(UserError, match=message):
        regrow.build(config)


def test_importing_the_package_imports_little() -> None:
    code = "import sys, regrow; print({'torch', 'hydra', 'omegaconf'} & {*sys.modules})"
    code += "; regrow.compose('train'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["set()", "False"]


# -- custom resolvers ------------------------------------------------------------------------------

RESOLVERS = """
from regrow.config import register_resolver

register_resolver("eval", lambda text: eval(text, {}))
"""


@pytest.mark.parametrize("text", ["def (", "import no_such_module", "x = 1\ny = 1 / 0\n"])
def test_resolvers_that_cannot_be_imported_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "resolvers.py").write_text(text)
    before = sys.modules.get("resolvers")
    with pytest.raises(UserError, match=r"resolvers\.py:[12]: \w+Error: .*correct it, or remove"):
        import_resolvers(tmp_path)
    assert sys.modules.get("resolvers") is before


def test_resolvers_are_imported_once_and_not_from_elsewhere(
    tmp_path: Path, monkeypatch: Any
) -> None:
    import_resolvers(tmp_path)  # none there
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "resolvers.py").write_text(RESOLVERS.replace('"eval"', '"of_a_test"'))
    monkeypatch.setitem(sys.modules, "resolvers", sys)  # an installed module of that name
    import_resolvers(tmp_path / "a")
    OmegaConf.clear_resolver("of_a_test")
    import_resolvers(tmp_path / "a")
    assert not OmegaConf.has_resolver("of_a_test") and sys.modules["resolvers"] is sys


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "project"
    forked.copy_project(folder)
    (folder / "resolvers.py").write_text(RESOLVERS)
    # A config and a model that need it, the model in the process that builds it.
    model = (
        "import resolvers\nfrom omegaconf import OmegaConf\nfrom lab.models.mlp import MLP\n\n\n"
    )
    model += (
        "def net(**given):\n    assert OmegaConf.has_resolver('eval')\n    return MLP(**given)\n"
    )
    (folder / "own_model.py").write_text(model)
    (folder / "conf" / "model" / "own.yaml").write_text(
        "defaults: [mlp]\n_target_: own_model.net\nhidden: ['${eval:\"4 * 2\"}']\n"
    )
    return folder


def said(project: Path, *command: str, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = forked.python_path()
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stdout, done.stdout[-3000:]
    return done.stdout


GIVEN = (
    *TINY[:8],
    "model=own",
    "trainer.max_steps=2",
    "trainer.device=cpu",
    "trainer.num_threads=1",
)
GIVEN = (*GIVEN, "optimizer.lr=${eval:'1e-3 * 2'}")


def value_of(folder: Path) -> tuple[Any, Any]:
    assert json.loads((folder / "status.json").read_text())["state"] == "completed"
    config = read_yaml(folder / "config.yaml")
    return config["model"]["hidden"], config["optimizer"]["lr"]


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_its_resume_and_what_reads_it_find_resolvers(project: Path) -> None:
    said(project, "scripts/train.py", *GIVEN, "hydra.run.dir=one")
    assert value_of(project / "one") == ([8], 0.002)
    assert "identical" in said(project, "scripts/reproduce.py", "run=one")
    said(project, "scripts/train.py", "resume=one", "trainer.max_steps=4")
    assert value_of(project / "one") == ([8], 0.002)
    assert "The run itself measured the same" in said(project, "scripts/evaluate.py", "run=one")
    code = "import sys; sys.path.insert(0, 'src'); import regrow\n"
    code += f"config = regrow.compose('train', {[*GIVEN]!r}); regrow.build(config).data.close()\n"
    code += "print(config.model.hidden, config.optimizer.lr)"
    assert "[8] 0.002" in said(project, "-c", code)


@pytest.mark.slow
def test_a_range_test_finds_resolvers(project: Path) -> None:
    said(project, "scripts/find_lr.py", *GIVEN[:-1], "find_lr.num_steps=${eval:'10 * 2'}")


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [pytest.param("true", marks=pytest.mark.nightly), "false"])
@pytest.mark.nightly
def test_a_sweep_and_its_resume_find_resolvers_in_its_copy(project: Path, fresh: str) -> None:
    sweep = f"sweep_{fresh}"
    given = (*GIVEN, f"hydra.sweep.dir={sweep}", f"launcher.fresh_processes={fresh}")
    said(project, "scripts/train.py", "-m", *given, "seed=0")
    moved = (project / "resolvers.py").rename(project / "resolvers_moved.py")
    try:
        said(project, "scripts/train.py", "-m", f"resume={sweep}", "seed=0,1")
    finally:
        moved.rename(project / "resolvers.py")
    for number in "01":
        assert value_of(project / sweep / number) == ([8], 0.002)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        pytest.param((), marks=pytest.mark.nightly, id="ddp"),
        pytest.param(
            ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"), id="torchrun"
        ),
    ],
)
def test_every_rank_finds_resolvers(project: Path, before: tuple[str, ...]) -> None:
    options = ("trainer=ddp",) if before else ("trainer=ddp", "trainer.devices=2")
    folder = f"ranks_{len(before)}"
    said(project, *before, "scripts/train.py", *GIVEN, *options, f"hydra.run.dir={folder}")
    assert value_of(project / folder) == ([8], 0.002)


# -- the page --------------------------------------------------------------------------------------


def test_the_words_of_the_tables_are_keys_options_and_scripts_of_ours() -> None:
    rows = []
    for page, heading in (
        ("hydra.md", "## From Hydra's words"),
        ("coming_from.md", "## Terms of lightning-hydra-template"),
    ):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        section = text.partition(heading)[2].partition("\n## ")[0]
        rows += [line for line in section.split("\n") if line.startswith("|")]
    words = [word for row in rows for word in re.findall("`([^`]+)`", row.split("|")[2])]
    assert len(words) > 60
    keys = {*known_keys(), "hydra.run.dir", "seed", "run", "checkpoint"}
    for word in words:
        key, equals, value = word.partition("=")
        if "/" in word:
            assert (ROOT / word).exists(), word
            continue
        assert key in keys, word
        if equals and (CONF / key).is_dir():
            for option in value.strip("[]").split(","):
                assert (CONF / key / f"{option}.yaml").is_file(), word


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "hydra.md").read_text(encoding="utf-8")
    notebook, resolvers = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert resolvers.strip() == RESOLVERS.strip()
    here: dict[str, Any] = {}
    exec(notebook, here)
    assert here["config"].model.hidden == [64] and list(tmp_path.iterdir()) == []
