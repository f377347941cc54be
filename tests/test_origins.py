"""An error about a value names the file and line that the value comes from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from regrow.config import flags, origins
from regrow.config.origins import TYPED, located_in
from regrow.config.yaml_keys import head_of, keys_of
from regrow.project import CONF, ROOT


def line_of(path: Path, start: str) -> int:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.strip().startswith(start))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an experiment and a primary config of one's own."""
    folder = tmp_path_factory.mktemp("own")
    files = {
        "model/wide.yaml": "# Wide.\ndefaults: [mlp]\nhidden: [99]\n",
        "experiment/bad.yaml": "# @package _global_\noptimizer:\n  lr: -1\n  betas: [0.9, 2]\n",
        "experiment/late.yaml": "# @package _global_\nmodel:\n  norm: bach\n",
        "mine.yaml": "defaults:\n  - train\n  - _self_\ndata:\n  batch_size: 0\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def error_of(folder: Path, *arguments: str, script: str = "train.py") -> str:
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    done = forked.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert not (folder / "outputs").exists() or not any((folder / "outputs").iterdir())
    return done.stdout.splitlines()[-1]


def test_a_key_has_its_line_and_the_comment_beside_or_above_it(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# @package _global_\n# What it is:\n# a test.\nfirst: 1\n\n# A section.\n\n"
        'second: "a # b" # said\n# above\n# it\nthird:\n  inner: [1, 2] # two\n'
        "fourth: {a: 1, b: {c: 2}} # flow\nfifth: # node\n  x: null\nsixth:\n",
        encoding="utf-8",
    )
    assert head_of(path) == "What it is: a test."
    found = {key: tuple(its) for key, its in keys_of(path).items()}
    assert found == {
        "first": (4, ""), "second": (8, "said"), "third": (11, "above it"),
        "third.inner": (12, "two"), "fourth": (13, "flow"), "fourth.a": (13, ""),
        "fourth.b": (13, ""), "fourth.b.c": (13, ""), "fifth": (14, "node"), "fifth.x": (15, ""),
        "sixth": (16, ""),
    }  # fmt: skip


def test_a_merged_key_has_the_line_that_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "base: &base {lr: 1}\nmore: &more\n  lr: 3\n  betas: 2\noptimizer:\n  eps: 1\n"
        "  <<: [*base, *more]\nown:\n  lr: 4\n  <<: *more\nlast:\n  <<: {lr: -1}\n",
        encoding="utf-8",
    )
    found = {key: its.line for key, its in keys_of(path).items() if "." in key}
    assert found == {
        "base.lr": 1, "more.lr": 3, "more.betas": 4, "optimizer.eps": 6, "optimizer.lr": 1,
        "optimizer.betas": 4, "own.lr": 9, "own.betas": 4, "last.lr": 12,
    }  # fmt: skip


def test_a_typed_value_is_found_without_composing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(origins, "origins", lambda *_: asked.append("") or 1 / 0)
    said = "model.dropout=3 must be below 1."
    assert located_in(said, flags.DEFAULT, ["model=mlp", "model.dropout=3"]) == said
    assert asked == []
    for others in (["model=mlp"], ["model.dropout=${seed}"], ["model={dropout:3}"]):
        located_in(said, flags.DEFAULT, others)
    assert len(asked) == 3


def test_an_error_about_a_key_of_hydras_names_no_other_file() -> None:
    said = "hydra.run.dir=full holds notes.txt."
    assert located_in(said, flags.DEFAULT, []) == said
    assert origins.origins(flags.DEFAULT, []).of("hydra.run.dir") is not None  # not what was typed


def test_the_last_file_that_sets_a_key_counts(place: Path) -> None:
    source = {**flags.DEFAULT, "dir": str(place)}
    given = ["model=wide", "experiment=bad", "seed=3", "data.folds=null"]
    found = origins.origins(source, given)
    assert found.of("model.hidden") == f"{place}/model/wide.yaml:3"
    shipped = CONF / "model" / "mlp.yaml"
    assert found.of("model.norm") == f"conf/model/mlp.yaml:{line_of(shipped, 'norm:')}"
    assert found.of("optimizer.lr") == f"{place}/experiment/bad.yaml:3"
    assert found.of("optimizer.betas.1") == f"{place}/experiment/bad.yaml:4"
    assert found.of("seed") == found.of("data.seed") == TYPED  # data.seed is ${seed}
    assert found.of("data.folds") == found.of("data.source.folds") == TYPED
    assert found.of("data.source.fold") == (
        f"conf/data/_base.yaml:{line_of(CONF / 'data' / '_base.yaml', 'fold:')}"
    )
    assert found.of("model.nothing") is None


def test_only_a_message_that_begins_with_a_key_gets_a_place() -> None:
    said = "trainer.max_steps=3 is odd."
    at = f"conf/trainer/default.yaml:{line_of(CONF / 'trainer' / 'default.yaml', 'max_steps:')}"
    assert located_in(said, flags.DEFAULT, []) == f"{at}: {said}"
    assert located_in(f"{at}: {said}", flags.DEFAULT, []) == f"{at}: {said}"
    for unchanged in ("x.csv cannot be read.", "task=binary does not fit.", "model: odd", "Odd."):
        assert located_in(unchanged, flags.DEFAULT, []) == unchanged
    assert located_in(said, flags.DEFAULT, ["trainer.max_steps=3"]) == said


@pytest.mark.slow
def test_an_error_names_the_file_and_line_of_its_value(place: Path, tmp_path: Path) -> None:
    there = ("--config-dir", str(place))
    said = "optimizer.lr=-1 must be a number above 0."
    assert error_of(tmp_path, "optimizer.lr=-1") == f"error: {said}"
    for arguments in (
        (*there, "experiment=bad"),
        ("experiment=bad", f"hydra.searchpath=[{place}]"),
    ):
        assert error_of(tmp_path, *arguments) == f"error: {place}/experiment/bad.yaml:3: {said}"
    assert error_of(tmp_path, *there, "experiment=bad", script="find_lr.py").endswith(said)
    said = error_of(tmp_path, *there, "experiment=bad", "optimizer.lr=0.1")
    assert said.startswith(
        f"error: {place}/experiment/bad.yaml:4: optimizer.betas=[0.9, 2] must be"
    )
    said = error_of(tmp_path, *there, "--config-name", "mine")
    assert said.startswith(f"error: {place}/mine.yaml:5: data.batch_size=0 must be")


def test_an_error_of_the_lab_names_the_file_and_line(place: Path, tmp_path: Path) -> None:
    said = error_of(tmp_path, "--config-dir", str(place), "experiment=late", "trainer.device=cpu")
    assert said.startswith(f"error: {place}/experiment/late.yaml:3: model.norm=bach is unknown.")


OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, depth):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(depth)])
"""
MODEL = "_target_: net_of_origins.Net\nnum_classes: 10\n"
SGD = "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.1\n"
OF_ALL = "# @package _global_\ndefaults:\n"
# A file of one's own, its content, and the start of the error behind the file's path.
MISTAKES = {
    "optimizer/mine": (
        f"{SGD}lrr: 1\n",
        ":4: optimizer.lrr: torch.optim.SGD takes no such argument. Did you mean lr?",
    ),
    "optimizer/still": (
        f"{SGD}nesterov: true\nmomentum: 0\n",
        ":5: optimizer (torch.optim.SGD): Nesterov momentum requires a momentum",
    ),
    "scheduler/short": (
        "_target_: torch.optim.lr_scheduler.StepLR\ninterval: epoch\nstep_size: 0\ngama: 1\n",
        ":4: scheduler.gama: torch.optim.lr_scheduler.StepLR takes no such argument. Did you mean ",
    ),
    "scheduler/brief": (
        "_target_: lab.schedules.cosine\n_partial_: true\nwarmup_steps: null\n"
        "warmup_fraction: null\n",
        ":1: scheduler (lab.schedules.cosine): cosine() missing 1 required keyword-only argument:",
    ),
    "model/misspelt": (
        f"{MODEL}depht: 2\n",
        ":3: model.depht: net_of_origins.Net takes no such argument. Did you mean depth?",
    ),
    "model/lacking": (MODEL, ":1: model (net_of_origins.Net): TypeError: Net.__init__() missing 1"),
    "model/none": (
        MODEL.replace("Net", "Nett"),
        ":1: model._target_=net_of_origins.Nett: there is no Nett. Did you mean Net?",
    ),
    "model/deep": (f"{MODEL}depth: deep\n", ":3: model (net_of_origins.Net, "),
    "experiment/option": (
        f"{OF_ALL}  - override /optimizer: adaam\n",
        ":3: optimizer=adaam: there is no such option. Did you mean adam? Use ",
    ),
    "experiment/task": (
        f"{OF_ALL}  - override /model: cnn\n  - override /task: regression\n",
        ":4: task=regression does not fit multiclass targets",
    ),
    "experiment/twice": (f"{OF_ALL}  - /model: cnn\n", ":3: write `override /model: cnn`."),
    "experiment/mapping": (f"seed: 1\n{OF_ALL}  a: b\n", ":3: defaults must be a list: begin"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistaken")
    (folder / "net_of_origins.py").write_text(OWN)
    for name, (text, _) in MISTAKES.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_file_has_its_line(
    name: str, mistaken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", forked.python_path(mistaken))
    given = ("--config-dir", str(mistaken / "conf"), name.replace("/", "="), "trainer.device=cpu")
    said = error_of(tmp_path, *given)
    assert said.startswith(f"error: {mistaken}/conf/{name}.yaml{MISTAKES[name][1]}"), said


@pytest.mark.slow
def test_a_typed_mistake_has_no_file(
    mistaken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", forked.python_path(mistaken))
    for typed, says in (
        (("optimizer=sgd", "optimizer.momentum=0"), "optimizer (torch.optim.SGD): Nesterov"),
        (("optimizer=adaam",), "optimizer=adaam: there is no such option."),
        (("task=regression",), "task=regression does not fit"),
    ):
        there = ("--config-dir", str(mistaken / "conf"), "trainer.device=cpu")
        assert error_of(tmp_path, *there, *typed).startswith(f"error: {says}")


def test_a_node_of_the_config_store_is_named(tmp_path: Path) -> None:
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "from hydra.core.config_store import ConfigStore\n"
        "from regrow.config import flags\nfrom regrow.config.origins import origins\n"
        "node = {'_target_': 'torch.optim.SGD', '_partial_': True, 'lr': -1}\n"
        "ConfigStore.instance().store(group='optimizer', name='mine', node=node)\n"
        "print(origins(flags.DEFAULT, ['optimizer=mine']).of('optimizer.lr'))\n",
        encoding="utf-8",
    )
    done = forked.run(
        [sys.executable, str(script)], cwd=tmp_path, stdout=subprocess.PIPE, encoding="utf-8",
        check=True, timeout=100,
    )  # fmt: skip
    assert done.stdout.strip() == "ConfigStore node optimizer/mine"


def test_a_good_start_looks_for_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from running import composed

    from regrow.config import check

    asked: list[str] = []
    monkeypatch.setattr(check, "located", lambda said: asked.append(said) or said)
    config = composed()
    check.check(config, config.hydra.runtime.choices)
    assert asked == []
    with pytest.raises(ValueError, match="seed"):
        check.check(composed("seed=-1"), config.hydra.runtime.choices)
    assert len(asked) == 1
