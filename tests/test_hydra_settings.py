"""Settings, files and scripts that users of Hydra and of other templates bring along."""

from __future__ import annotations

import enum
import re
import sys
from pathlib import Path
from typing import cast

import pytest
from forked import run_script as run
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from running import TINY, composed

from regrow.config import leads, places, registered
from regrow.config.check import check
from regrow.config.explain import composition_error, hydras_value_error
from regrow.config.hydras import check_settings
from regrow.config.keys import known_keys
from regrow.config.roles import listed
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.project import CONF, ROOT
from regrow.record.records import read_json
from regrow.record.redact import redact

SMALL = (*TINY, "trainer.max_steps=2", "trainer.progress_bar=false")
WRONG = "optimizer.lr=0"  # ends an otherwise valid command before a run starts
SAID = "optimizer.lr=0 must be"


def written(folder: Path, **files: str) -> Path:
    """Write files into a folder: a__b is b.yaml in the group a."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


HEADER = "# @package _global_\n"
OVERRIDE = "defaults:\n  - override /model: cnn\n"
EXPERIMENTS = {
    OVERRIDE: "experiment/x.yaml: its first line must be `# @package _global_`",
    "optimizer:\n  lr: 0.5\n": "experiment/x.yaml: its first line must be `# @package _global_`.",
    f"# A note.\n{HEADER}seed: 1\n": "experiment/x.yaml: its first line must be",
    f"{HEADER}defaults:\n  - override model: cnn\n": "write `override /model`, with a slash.",
    "defaults:\n  - override model: cnn\n": "experiment/x.yaml:2: write `override /model`",
    f"{HEADER}defaults:\n  - model: cnn\n": "write `override /model: cnn`, with a slash.",
    f"{HEADER}defaults:\n  - /model: cnn\n": "experiment/x.yaml:3: write `override /model: cnn`.",
    f"{HEADER}defaults:\n  - override /callbacks: default\n": "there is no group callbacks to "
    "override. Here that is trainer.checkpoint",
    f"{HEADER}defaults:\n  - override /modle: cnn\n": "no group modle to override. Did you mean "
    "model?",
    f"{HEADER}defaults:\n  override /model: cnn\n": "experiment/x.yaml:2: defaults must be a list",
    f"{HEADER}defaults:\n  - override /model cnn\n": "experiment/x.yaml:3: an entry of its "
    "defaults",
    f"{HEADER}defaults:\n  - override /model:cnn\n": "experiment/x.yaml:3: an entry of its "
    "defaults",
    f"{HEADER}defaults:\n  - digits_mpl\n": "its defaults list names experiment/digits_mpl.yaml, "
    "which does not exist. Did you mean digits_mlp?",
    f"{HEADER}optimizer.lr: 0.5\n": "In a file, write `optimizer: {lr: …}`.",
    f"{HEADER}trainer:\n  checkpoint.keep_last: 3\n": "trainer.checkpoint.keep_last: only the "
    "command line takes dots. In a file, write `checkpoint: {keep_last: …}`.",
    f"{HEADER}optimizer: sgd\n": "write `- override /optimizer: sgd` below defaults.",
    "# @package _group_\nseed: 1\n": "experiment/x.yaml: its first line must be",
    "# @package _global\nseed: 1\n": "experiment/x.yaml: its first line must be",
    f"\ufeff{HEADER}seed: 1\n": "it begins with an invisible mark (BOM)",
    f"{HEADER}data: null\n": "data is not chosen. Use data=… with an option of conf/data.",
    f"{HEADER}defaults:\n  - override /data: null\n": "data is not chosen.",
    f"{HEADER}resume: .\n": "resume=.: from a file, or with a plus, it does not resume that run.",
    f"{HEADER}resume: null\n": "resume=null must be auto, never or the folder of a run.",
    f"{HEADER}mykey: 3\n": "mykey: there is no such key. Keys of your own go into conf/train.yaml.",
    f"{HEADER}hydra:\n  sweeper:\n    params:\n      seed: 0,1\n": "hydra.sweeper.params={seed:0,1}"
    ": write sweep.params instead",
    f"{HEADER}hydra:\n  job:\n    chdir: true\n": "hydra.job.chdir=true: a run stays in",
    f"{HEADER}hydra:\n  launcher:\n    n_jobs: 2\n": "hydra.launcher.n_jobs: use launcher.jobs=…",
    f"{HEADER}hydra:\n  sweeper:\n    max_batch_size: 2\n": "max_batch_size=2: use launcher.jobs=…",
}


@pytest.mark.parametrize("text", EXPERIMENTS)
def test_an_experiment_that_has_no_effect_is_named_with_what_to_write(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, experiment__x=text)
    search = f"hydra.searchpath=[file://{tmp_path}]"
    monkeypatch.setattr(sys, "argv", ["train.py", search, "experiment=x"])
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # as in a new process
    with pytest.raises(Exception) as found:
        config = composed(search, "experiment=x")
        check_settings(config.hydra, is_sweep=False)
        check(config, config.hydra.runtime.choices)
    said = str(found.value) if isinstance(found.value, UserError) else None
    error = cast(Exception, found.value)
    said = said or hydras_value_error(error) or composition_error(error)
    assert EXPERIMENTS[text] in said and "\n" not in said


@pytest.mark.slow
def test_such_an_experiment_ends_a_run_and_a_sweep_in_one_line(tmp_path: Path) -> None:
    written(tmp_path / "D", experiment__x="optimizer:\n  lr: 0.5\n")
    for multirun in ((), ("-m",)):
        said = run(tmp_path, *multirun, "--config-dir", "D", "experiment=x", code=2)
        assert said.startswith("error: experiment/x.yaml: its first line must be"), said
        assert said.count("\n") == 1
    assert not [*(tmp_path / "outputs").rglob("*.yaml")]


PLUGIN = """
from hydra.core.config_store import ConfigStore
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

class FakeLauncher(Launcher):
    def __init__(self, n_jobs): ...
    def setup(self, *, hydra_context, task_function, config): ...
    def launch(self, job_overrides, initial_job_idx): raise AssertionError

class FakeSweeper(Sweeper):
    def __init__(self, **options): ...
    def setup(self, *, hydra_context, task_function, config): ...
    def sweep(self, arguments): print("the sweeper of the plugin:", *arguments)

for kind, name in (("launcher", "FakeLauncher"), ("sweeper", "FakeSweeper")):
    ConfigStore.instance().store(
        group=f"hydra/{kind}", name="fake", provider="fake",
        node={"_target_": f"hydra_plugins.fake.{name}", "n_jobs": 2},
    )
"""
OWN_SCRIPT = """
import hydra
from regrow.config.hydra_access import version_arguments

@hydra.main(config_path={conf!r}, config_name="train", **version_arguments())
def main(config):
    print("my function:", config.seed)

main()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "installed" / "hydra_plugins" / "fake.py"
    path.parent.mkdir(parents=True)
    path.write_text(PLUGIN)
    return str(tmp_path / "installed")


def test_a_plugin_that_is_installed_is_refused_in_a_file_and_when_typed(
    plugin: str, tmp_path: Path
) -> None:
    for kind, ours in (("launcher", "launcher.jobs=4"), ("sweeper", "sweep=grid, list or optuna")):
        said = run(tmp_path, f"hydra/{kind}=fake", path=plugin, code=2)
        assert f"error: hydra/{kind}=fake: " in said and ours in said
        text = f"{HEADER}defaults:\n  - override /hydra/{kind}: fake\n"
        written(tmp_path / "D", experiment__x=text)
        said = run(tmp_path, "-m", "--config-dir", "D", "experiment=x", path=plugin, code=2)
        assert f"error: hydra/{kind}=fake: " in said and ours in said
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_m_runs_the_function_of_ones_own_script_with_hydras_sweeper(
    plugin: str, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(OWN_SCRIPT.format(conf=str(CONF)))
    said = run(tmp_path, "-m", "seed=3,4", script=script)
    assert "my function: 3" in said and "my function: 4" in said
    said = run(tmp_path, "-m", "seed=3,4", "hydra/sweeper=fake", script=script, path=plugin)
    assert "the sweeper of the plugin: seed=3,4" in said
    assert not (tmp_path / "outputs").exists()


CALLBACKS = """
from hydra.experimental.callback import Callback

class OfJob(Callback):
    def on_job_start(self, config, **more): print("job")

class OfSweep(Callback):
    def on_multirun_start(self, config, **more): self.begun = "the sweep has begun"
    def on_multirun_end(self, config, **more): print(self.begun, "and ended")
"""


def test_a_callback_that_jobs_of_a_sweep_would_not_call_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "called_by_hydra.py").write_text(CALLBACKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = composed("+hydra.callbacks.mine._target_=called_by_hydra.OfJob")
    check_settings(config.hydra, is_sweep=False)
    with pytest.raises(UserError, match=r"callbacks\.mine: on_job_start is not called for the job"):
        check_settings(config.hydra, is_sweep=True)
    config = composed("+hydra.callbacks.mine._target_=called_by_hydra.OfSweep")
    check_settings(config.hydra, is_sweep=True)


@pytest.mark.slow
def test_a_callback_is_told_once_that_a_sweep_begins_and_ends(tmp_path: Path) -> None:
    (tmp_path / "called_by_hydra.py").write_text(
        CALLBACKS.replace("self.begun =", "print('begun'); self.begun =")
    )
    mine = "+hydra.callbacks.mine._target_=called_by_hydra.OfSweep"
    said = run(tmp_path, *SMALL, mine, "-m", "seed=0", path=str(tmp_path))
    lines = said.splitlines()
    assert lines.count("begun") == lines.count("the sweep has begun and ended") == 1


OWN = {
    "mytrain2": "defaults: [_self_, train, {callbacks: c}]\ncallbacks: {a: 1}\nmy_own: 3\n",
    "callbacks__c": "_target_: torch.nn.Identity\nz: 1\n",
    "model__wide": "defaults: [mlp]\nhidden: [99]\n",
    "experiment__mine": f"{HEADER}my_own: 4\n",
    "logger__mine": "mine: {_target_: my_loggers.Mine, _partial_: true, least: 1e-3}\n",
}


MINE = "--config-dir D -cn mytrain2 "


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (f"{MINE} experiment=mine model=wide {WRONG}", SAID),
        (f"{MINE} logger=mine {WRONG}", SAID),  # 1e-3 is a number
        (f"{MINE} my_ownn=1", "my_ownn: there is no such key. Did you mean my_own?"),
        (
            f"{MINE} optimizer.foreach=true",
            "type a plus for this run alone: +optimizer.foreach=true",
        ),
        (f"{MINE} +mine=1", "D/mytrain2.yaml."),  # where the user's own keys belong
        (f"{MINE} model=wide +model.hiden=[1]", "Did you mean model.hidden?"),
        (f"{MINE} model=wyde", "there is no such option. Did you mean wide?"),
        ("--config-dir D my_own=1", "my_own: there is no such key."),  # the file is not chosen
    ],
)
def test_keys_and_groups_of_ones_own_come_from_any_place_on_the_search_path(
    arguments: str, says: str, tmp_path: Path
) -> None:
    written(tmp_path / "D", **OWN)
    said = run(tmp_path, *arguments.split(), code=2)
    assert says in said and said.count("\n") == 1


def test_help_lists_the_groups_of_the_search_path(tmp_path: Path) -> None:
    written(tmp_path / "D", **OWN)
    assert "  callbacks  c\n" in run(tmp_path, *MINE.split(), "--help")


def test_help_of_a_group_within_a_group_shows_keys_that_can_be_typed(tmp_path: Path) -> None:
    node = "_target_: mine.Part\nwidth: 16 # channels\n"
    own = "_target_: mine.Net\ndefaults: [{part: small}, _self_]\n"
    written(tmp_path / "D", model__mine=own)
    written(tmp_path / "D" / "model", part__small=node, part__big=node.replace("16", "64"))
    given = ("--config-dir", "D", "model=mine", "--help")
    said = run(tmp_path, *given, "model/part", "model.part.width=3")
    assert "  model.part.width=3 " in said and "(default 16)" in said
    said = run(tmp_path, *given, "model.part.width")
    assert said.startswith("model.part.width=16\n") and "D/model/part/small.yaml:2" in said
    assert "model/part=big: default 64" in said and "model.part.width=32" in said


def test_a_help_of_ones_own_is_hydras(tmp_path: Path) -> None:
    own = "defaults: [train, _self_]\nhydra: {help: {template: 'Mine: $CONFIG'}}\n"
    written(tmp_path / "D", mine=own)
    said = run(tmp_path, "--config-dir", "D", "--config-name", "mine", "--help")
    assert said.startswith("Mine: ") and "\nseed: 0\n" in said


@pytest.mark.slow
def test_a_run_with_keys_of_its_own_resumes_and_is_evaluated(tmp_path: Path) -> None:
    written(tmp_path / "D", **OWN)
    mine = ("--config-dir", "D", "-cn", "mytrain2")
    own = ("optimizer.fused=false", "+optimizer.foreach=true", "experiment=mine")
    run(tmp_path, *SMALL, *mine, *own, "hydra.run.dir=r")
    recorded = read_yaml(tmp_path / "r" / "config.yaml")
    assert recorded["my_own"] == 4 and recorded["optimizer"]["foreach"] is True
    said = run(tmp_path, *mine, "resume=r", "trainer.max_steps=4")
    assert "resuming from step 2" in said
    run(tmp_path, "run=r", script="evaluate.py")


def test_a_place_on_the_search_path_names_targets_and_runs_that_lie_there_do_not(
    tmp_path: Path,
) -> None:
    written(
        tmp_path, callbacks__c="_target_: os.getcwd\n", run__config="callbacks: {_target_: x.y}"
    )
    written(tmp_path, config="callbacks: {_target_: x.y}\n")
    assert listed("callbacks", tmp_path) == {"os.getcwd"}
    assert listed("callbacks") == frozenset()


WRAPPER = """
import sys
sys.path.insert(0, {scripts!r})
from hydra.core.config_store import ConfigStore

ConfigStore.instance().store(
    group="model", name="registered", node={{"defaults": ["mlp", "_self_"], "hidden": [33]}}
)
import train
from regrow.cli.start import start

if __name__ == "__main__":
    start(train.main)
"""


@pytest.mark.slow
def test_a_registered_node_is_checked_as_a_file_is(tmp_path: Path) -> None:
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(scripts=str(ROOT / "scripts")))
    said = run(tmp_path, "model=registered", WRONG, script=script, code=2)
    assert SAID in said
    said = run(tmp_path, "model=registered", "+model.hiden=[1]", script=script, code=2)
    assert "model.hiden: lab.models.mlp.MLP has no such key. Did you mean model.hidden?" in said


@pytest.mark.slow
def test_a_node_that_a_wrapper_registered_survives_a_sweep_and_its_resume(tmp_path: Path) -> None:
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(scripts=str(ROOT / "scripts")))
    small = [line for line in SMALL if not line.startswith("model.")]
    run(tmp_path, *small, "model=registered", "-m", "seed=0,1", "hydra.sweep.dir=s", script=script)
    assert read_yaml(tmp_path / "s" / "1" / "config.yaml")["model"]["hidden"] == [33]
    run(tmp_path, "-m", "resume=s", "seed=0,1,2")  # as printed, with train.py
    assert read_yaml(tmp_path / "s" / "2" / "config.yaml")["model"]["hidden"] == [33]


@pytest.mark.slow
def test_a_node_that_a_wrapper_registered_survives_in_a_run(tmp_path: Path) -> None:
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(scripts=str(ROOT / "scripts")))
    small = [line for line in SMALL if not line.startswith("model.")]
    run(tmp_path, *small, "model=registered", "hydra.run.dir=r", script=script)
    run(tmp_path, "resume=r", "trainer.max_steps=3")  # as printed, with train.py
    assert read_yaml(tmp_path / "r" / "config.yaml")["model"]["hidden"] == [33]
    kept = tmp_path / "r" / ".hydra" / registered.NAME
    kept.write_text(kept.read_text().replace("33", "34"))
    said = run(tmp_path, "resume=r", "trainer.max_steps=4", code=2)  # differs from the sealed one
    assert "model=registered: there is no such option." in said


class Kind(enum.Enum):
    ONE = 1


def test_registered_configs_are_written_without_hydras_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    monkeypatch.setattr(store, "repo", {"hydra": store.repo["hydra"]})
    registered.write(tmp_path)
    assert not (tmp_path / registered.NAME).exists() and registered.text(redact) is None
    node = OmegaConf.create({"x": "${y}", "path": Path("a"), "kind": Kind.ONE, "api_key": "abcd12"})
    store.store(group="a/b", name="c", node=node, package="p")
    registered.write(tmp_path)
    masked = registered.text(redact)
    monkeypatch.setattr(store, "repo", {"hydra": store.repo["hydra"]})
    registered.take_up(tmp_path)
    assert store.load("a/b/c.yaml").node._content["x"]._value() == "${y}"
    assert store.load("a/b/c.yaml").package == "p"
    # A run's record masks secrets, and is complete otherwise.
    assert masked is not None and "abcd12" not in masked
    (tmp_path / registered.NAME).write_text(masked)
    registered.take_up(tmp_path)  # it is there
    monkeypatch.setattr(store, "repo", {"hydra": store.repo["hydra"]})
    registered.take_up(tmp_path)
    assert "c held a secret, which the record masks" in capsys.readouterr().err
    assert "a" not in store.repo
    (tmp_path / registered.NAME).write_text('[{"group": 1}]')
    with pytest.raises(UserError, match="is damaged"):
        registered.take_up(tmp_path)


ASKED = (
    *("ckpt_path", "fast_dev_run", "accelerator", "gradient_clip_val", "accumulate_grad_batches"),
    *("task_name", "hparams_search", "callbacks", "save_top_k", "val_check_interval"),
    *("optimized_metric", "test", "min_epochs", "num_nodes"),
)


def test_words_of_another_template_lead_to_keys_that_there_are() -> None:
    for word in ASKED:
        assert leads.lead(word) and leads.lead(f"trainer.{word}")
    keys = {*known_keys(), "sweep.params", "hydra.run.dir", "launcher.nodes"}
    for word, lead in leads.WORDS.items():
        assert word not in known_keys()
        named = re.findall(r"\b(?:trainer|optimizer|data|sweep|launcher|hydra)\.[\w.]*\w", lead)
        assert [key for key in named if key not in keys] == [], word
        for group, option in re.findall(r"\b(debug|launcher|sweep)=(\w+)", lead):
            assert option in places.options(group), word
    for group, options in leads.OPTIONS.items():
        for word, option in options.items():
            assert word not in places.options(group)
            for name in places.names_in(option.split()[0]):
                assert name in places.options(group)


@pytest.mark.slow
def test_the_current_folder_is_a_runs_if_it_is_named(tmp_path: Path) -> None:
    mine, another = tmp_path / "mine", tmp_path / "another"
    mine.mkdir()
    another.mkdir()
    run(mine, *SMALL, "hydra.run.dir=.")
    assert read_json(mine / "summary.json")["steps"] == 2
    assert "resuming from step 2" in run(mine, "resume=.", "trainer.max_steps=3")
    assert not (mine / "outputs").exists()
    (another / "notes").touch()
    said = run(another, *SMALL, "hydra.run.dir=.", code=2)
    assert "hydra.run.dir=. holds notes, which no run" in said
    assert [path.name for path in another.iterdir()] == ["notes"]
