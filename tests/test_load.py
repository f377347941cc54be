"""Loading a run from its folder, and initial weights: nothing foreign runs, nothing is silent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from finished import finished
from running import CPU, TINY, config_of
from torch import nn

from regrow.checkpoint import writer
from regrow.checkpoint.digest import weights_sha256
from regrow.config import foreign
from regrow.config.foreign import downloads_elsewhere, targets_of
from regrow.config.roles import check_roles
from regrow.config.targets import allow, instantiate
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.load import load_run
from regrow.project import ROOT
from regrow.randomness import seed_everything
from regrow.record.records import read_json
from regrow.runs.loaded import set_numerics
from regrow.runs.training import build
from regrow.runs.weights import load_weights, warn_of_other_splits


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(
        tmp_path_factory.mktemp("outputs") / "run",
        *(*TINY, "trainer.max_steps=12", "trainer.checkpoint.keep_last=3"),
    )


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may modify."""
    return Path(shutil.copytree(original, tmp_path / "run", symlinks=True))


def test_a_run_that_lacks_a_key_was_made_by_other_code(run: Path) -> None:
    config = read_yaml(run / "config.yaml")
    del config["data"]["eval_batch_size"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"'eval_batch_size'.*other code: the commit is in its man"):
        load_run(run).data.close()


def changed(run: Path, **groups: dict[str, Any]) -> Path:
    config = read_yaml(run / "config.yaml")
    for group, values in groups.items():
        config[group].update(values)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def without(run: Path, group: str, key: str) -> None:
    config = read_yaml(run / "config.yaml")
    del config[group][key]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def resealed(folder: Path) -> None:
    """Make a checkpoint's manifest match its files, as an attacker would."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("sha256")
    for name in content["files"]:
        data = (folder / name).read_bytes()
        content["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["sha256"] = writer._digest(content)
    (folder / "manifest.json").write_text(json.dumps(content))


class Evil:
    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def test_a_run_comes_back_as_it_was(run: Path) -> None:
    last = load_run(run, which="last")
    summary = json.loads((run / "summary.json").read_text())
    assert weights_sha256(last.model) == summary["weights_sha256"]
    assert last.step == 12 and last.checkpoint == "step_00000012"
    assert not last.model.training and last.device.type == "cpu"
    assert load_run(run).step == summary["best"]["step"]
    older = load_run(run, which="step_00000004")
    assert older.step == 4 and weights_sha256(older.model) != summary["weights_sha256"]


def test_loading_a_run_leaves_what_is_drawn_next(run: Path) -> None:
    """A step that loads a frozen teacher draws the same dropout where it resumes."""

    def drawn_after(load: bool) -> list[float]:
        seed_everything(3)
        if load:
            load_run(run)
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    assert drawn_after(load=True) == drawn_after(load=False)


def test_the_averaged_weights_are_those_one_gets(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY, "trainer.ema_decay=0.9")
    parts, _ = writer.load((run / "checkpoints" / "best").resolve())
    weights = load_run(run).model.state_dict()
    assert all(torch.equal(weights[name], parts["averaged"][name]) for name in weights)
    assert not all(torch.equal(weights[name], parts["model"][name]) for name in weights)


def test_latest_stays_the_run_that_it_was_when_asked(run: Path) -> None:
    latest = run.parent / "latest"
    latest.symlink_to(run.name)
    loaded = load_run(latest)
    assert loaded.folder == run.resolve()
    latest.unlink()
    assert loaded.data.num_examples["test"] == 10


def test_the_data_is_read_only_when_it_is_asked_for(run: Path) -> None:
    changed(run, data={"_target_": "regrow.feeding.loaders.Data", "batch_size": 0})
    loaded = load_run(run)
    assert loaded.preprocessing.input_shape == [6]
    with pytest.raises(UserError, match=r"data\.batch_size=0"):
        _ = loaded.data
    assert load_run(run, data={"batch_size": 5}).data.batch_size == 5


def test_a_source_that_draws_gives_the_examples_of_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []

    def draws(node: Any, **more: Any) -> Any:
        if node.get("_target_") == "regrow.feeding.loaders.Data":
            drawn.append([torch.rand(1).item(), np.random.rand(), random.random()])
        return instantiate(node, **more)

    for module in ("lab.build", "regrow.runs.loaded"):
        monkeypatch.setattr(f"{module}.instantiate", draws)
    build(config_of(*TINY), CPU)
    loaded, state = load_run(run), torch.get_rng_state()
    loaded.data.close()
    assert torch.equal(torch.get_rng_state(), state)  # a notebook's own draws are not affected
    build(config_of(*TINY, "seed=1"), CPU)
    *same, other = drawn
    assert same == [same[0]] * len(same) and other != same[0]


def test_a_missing_device_is_an_error_only_where_it_was_asked_for(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changed(run, trainer={"device": "cuda", "precision": "fp16"})
    loaded = load_run(run)
    assert loaded.device.type == "cpu" and loaded.precision == "fp32"
    assert "the run's device, cuda, is missing here" in caplog.text
    with pytest.raises(UserError, match=r"^device=cuda: this machine has no such"):
        load_run(run, device="cuda")
    with pytest.raises(UserError, match="device=gpu must be one of"):
        load_run(run, device="gpu")


def test_a_compiled_run_is_used_where_there_is_no_compiler(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    changed(run, trainer={"compile": True})
    set_numerics(load_run(run))
    assert torch.get_num_threads() == 1


def test_a_run_still_in_training_is_read_again_where_its_checkpoint_went(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, read = run / "checkpoints" / "best", writer.load
    first = best.resolve()
    other = next(path for path in writer.complete(run / "checkpoints") if path != first)

    def rotated(path: Path) -> Any:
        if path == first and path.exists():  # the run moves on at this very moment
            best.unlink()
            best.symlink_to(other.name)
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(writer, "load", rotated)
    assert load_run(run).checkpoint == other.name


def test_a_damaged_checkpoint_is_named_with_what_else_there_is(run: Path) -> None:
    target = (run / "checkpoints" / "last").resolve() / "model.pt"
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_run(run, which="last")
    message = str(caught.value)
    assert "step_00000012/model.pt does not match its SHA-256" in message and "\n" not in message
    assert "Choose another: " in message and "step_00000004" in message
    assert load_run(run, which="step_00000004").step == 4
    target.unlink()
    (run / "checkpoints" / "step_00000008" / "model.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"step_00000012/model.pt is missing") as caught:
        load_run(run, which="last")
    assert "step_00000004" in str(caught.value) and "step_00000008" not in str(caught.value)


def with_config(run: Path, text: str) -> None:
    """Replace the config, and remove Hydra's copy of it."""
    (run / "config.yaml").write_text(text)
    (run / ".hydra" / "config.yaml").unlink()


def just_begun(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: [file.unlink() for file in run.rglob("config.yaml")], "holds no config.yaml"),
        (lambda run: with_config(run, "a: [b"), "config.yaml cannot be read"),
        (lambda run: with_config(run, "a: 1"), "has no section data; is this a run's folder?"),
        (lambda run: with_config(run, "- 1"), "it holds a list"),
        (lambda run: without(run, "trainer", "device"), "has no trainer.device"),
        (lambda run: without(run, "model", "_target_"), "has no model._target_"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "this run (completed) has no checkpoint"),
        (just_begun, "this run (interrupted) has no checkpoint"),
        (lambda run: changed(run, model={"hidden": [13]}), "not those of the model"),
        (lambda run: changed(run, model={"hiden": [13]}), "hiden"),
    ],
)
def test_a_spoilt_folder_is_one_line(run: Path, spoil: Any, message: str) -> None:
    spoil(run)
    with pytest.raises(UserError) as caught:
        load_run(run)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_load_that_fails_after_a_change_of_code_says_how_to_get_it_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(UserError) as caught:
            load_run(run, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    content, way = read_json(run / "manifest.json"), " The run's code has changed since. "
    changed(run, model={"hidden": [13]})
    assert "not those of the model" in (before := said()) and way not in before  # the control
    others = {**content["code_files"], "src/lab/models/mlp.py": "0" * 16}
    (run / "manifest.json").write_text(json.dumps({**content, "code_files": others}))
    assert said().startswith(f"{before}{way}")
    assert way not in said(which="step_1")  # not a matter of the code
    changed(run, model={"hiden": [12]})
    assert "hiden" in (now := said()) and way in now
    monkeypatch.setattr(foreign, "is_own", lambda folder: False)
    assert said().endswith(f"{run / 'manifest.json'} names its commit.") and "apply" not in said()
    changed(run, model={"hidden": [12]})
    config = read_yaml(run / "config.yaml")
    del config["model"]["hiden"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    load_run(run)  # changed code that can load the run is not an error


@pytest.mark.parametrize("group", ["model", "loss", "task", "data"])
def test_a_foreign_target_is_not_made(run: Path, tmp_path: Path, group: str) -> None:
    made = tmp_path / "executed"
    evil = {"_target_": "os.makedirs", "name": str(made)}
    config = read_yaml(run / "config.yaml")
    config[group] = evil
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=rf"{group}._target_=os.makedirs, which no file in conf/"):
        _ = load_run(run).data
    assert not made.exists()
    allow(evil)
    instantiate(evil)  # the negative control: instantiated, it would have run
    assert made.exists()


def test_a_foreign_target_is_not_made_below_or_in_a_list(run: Path, tmp_path: Path) -> None:
    evil = {"_target_": "os.makedirs", "name": str(tmp_path / "executed")}
    for group, values in (("model", {"dropout": evil}), ("data", {"class_names": [evil]})):
        spoilt = shutil.copytree(run, tmp_path / group, symlinks=True)
        with pytest.raises(UserError, match=r"is not (instantiated|used)\."):
            load_run(changed(spoilt, **{group: values}))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("where", ["run", "package"])
def test_a_module_that_came_with_the_run_is_not_imported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Even if Python would find it, in the current folder, as in a notebook."""
    made = tmp_path / "executed"
    code = f"import pathlib, torch\npathlib.Path({str(made)!r}).mkdir()\nNet = torch.nn.Identity\n"
    (run / "evil_module.py").write_text(code)
    (run / "__init__.py").touch()
    monkeypatch.chdir(run if where == "run" else tmp_path)
    monkeypatch.syspath_prepend("")
    target = "evil_module.Net" if where == "run" else "run.evil_module.Net"
    changed(run, model={"_target_": target})
    with pytest.raises(UserError, match="It is not imported"):
        load_run(run)
    assert not made.exists()
    allow({"_target_": target})
    instantiate({"_target_": target})  # the negative control: found, it would have run
    assert made.exists()


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "logging.os.system", "command": "mkdir"},  # os.system under another name
        {"_target_": "torch.utils.collect_env.run", "command": "mkdir"},  # runs a shell
        {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.mkdir", "path": "made"}]},
        {"_target_": "os.mkdir", "_partial_": True},
        {"_target_": "torch.nn.Linear", "in_features": {"_target_": "os.mkdir", "path": "made"}},
        {"_target_": "functools.partial", "_args_": ["os.mkdir", "made"]},
        {"_target_": "builtins.eval", "_args_": ["__import__('os').mkdir('made')"]},
        {"_target_": "hydra.utils.instantiate", "config": {"_target_": "os.mkdir"}},
        {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
        {"_target_": "torch.hub.load", "repo_or_dir": "."},
        {"_target_": "torch.load", "f": "x", "weights_only": False},
        {"_target_": "torch.nn.Module.__init_subclass__"},
        {"_target_": ["torch.nn.Linear"]},
        {"_target_": None},
    ],
    ids=lambda node: str(node["_target_"]),
)
def test_a_target_that_runs_a_shell_is_refused_by_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "command" in node:
        node = {**node, "command": "mkdir made"}
    changed(run, model=node)
    with pytest.raises(UserError, match=r"is not instantiated|names|is not imported"):
        load_run(run)
    assert not Path("made").exists()


def test_nothing_of_pythons_own_is_imported_to_look_at_it(run: Path) -> None:
    import sys

    sys.modules.pop("this", None)
    changed(run, model={"_target_": "this.Net"})
    with pytest.raises(UserError, match="which no file in conf/model names"):
        load_run(run)
    assert "this" not in sys.modules


def test_a_target_of_another_role_is_foreign(run: Path) -> None:
    changed(run, model={"_target_": "lab.data.datasets.digits"})  # ours, but not a model
    with pytest.raises(UserError, match="which no file in conf/model names"):
        load_run(run)
    changed(run, model={"_target_": "torch.hub.load"})  # torch's, but not a module
    with pytest.raises(UserError, match="which no file in conf/model names"):
        load_run(run)


@pytest.mark.slow
def test_a_plain_callable_that_the_users_own_command_named_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transform need not be a module, and no file has to name it."""
    here, own = tmp_path / "here", tmp_path / "own"
    here.mkdir()
    own.mkdir()
    for name in ("Darker", "Lighter"):
        with (own / "own_transforms.py").open("a") as file:
            file.write(f"class {name}:\n    def __init__(self, by): self.by = by\n")
            file.write("    def __call__(self, image): return image // self.by\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(own)

    def done(script: str, *words: str) -> str:
        command = [sys.executable, str(ROOT / "scripts" / script), *words]
        path = {"PYTHONPATH": str(own), "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    transforms = "data.transforms=[{_target_: own_transforms.Darker, by: 2}]"
    few = ("trainer.max_epochs=1", "data.limit_train=64", "trainer.num_threads=1")
    done("train.py", "model=cnn", transforms, *few, "hydra.run.dir=run")
    assert "The run itself measured the same" in done("evaluate.py", "run=run", "split=test")
    assert "identical:" in done("reproduce.py", "run=run")
    done("train.py", "resume=run", "trainer.max_epochs=2")
    run = Path("run")
    assert foreign.named_by_command(run) == {("data.transforms.0", "own_transforms.Darker")}
    # config.yaml has no seal: another target is refused.
    changed(run, data={"transforms": [{"_target_": "own_transforms.Lighter", "by": 2}]})
    with pytest.raises(UserError, match=r"\.Lighter, which no file in conf/data names"):
        _ = load_run("run").data
    # The command of a copy that the list of the user's folders does not hold counts for nothing.
    (run / ".hydra" / "owner.json").unlink()
    assert foreign.named_by_command(run) == frozenset()


@pytest.mark.slow
def test_any_module_may_stand_in_the_place_of_the_model(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY)
    config = read_yaml(run / "config.yaml")
    config["model"] = {"_target_": "torch.nn.Linear", "in_features": 6, "out_features": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="not those of the model"):  # built, with other weights
        load_run(run)


def test_names_in_the_preprocessing_are_not_made(run: Path, tmp_path: Path) -> None:
    """They become an argument of the task."""
    content = json.loads((run / "preprocessing.json").read_text())
    evil = {"_target_": "os.makedirs", "name": str(tmp_path / "executed")}
    content["class_names"] = [evil, "b", "c"]
    (run / "preprocessing.json").write_text(json.dumps(content))
    load_run(run)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("group", ["data", "optimizer", "trainer"])
def test_an_interpolation_is_not_resolved(
    run: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    monkeypatch.setenv("PRIVATE", "secret")
    changed(run, **{group: {"root": ["${oc.env:PRIVATE}"]}})
    with pytest.raises(UserError, match=rf"{group}.root.0=.* where a plain value is expected"):
        load_run(run)


@pytest.mark.parametrize("key", ["_execution_whitelist_", "_isolate_", "_call_"])
def test_a_record_gives_hydra_no_orders(run: Path, key: str) -> None:
    changed(run, model={key: ["os.*"]})
    with pytest.raises(UserError, match=rf"model.{key}, which is not a key"):
        load_run(run)


def test_timms_schedulers_may_be_recorded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not torch's. Only subclasses of timm's own base are accepted as a scheduler."""
    package = tmp_path / "site" / "timm" / "scheduler"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(
        "from .scheduler import Scheduler\nclass Cosine(Scheduler): ...\nclass Other: ...\n"
        "def make(): ...\n"
    )
    (package / "scheduler.py").write_text("class Scheduler: ...\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in ("timm", "timm.scheduler", "timm.scheduler.scheduler"):
        monkeypatch.setitem(sys.modules, name, None)  # so that its modules are removed at the end
        del sys.modules[name]
    for name in ("Cosine", "Other", "make"):
        config = {"scheduler": {"_target_": f"timm.scheduler.{name}"}}
        with contextlib.ExitStack() as stack:
            if name != "Cosine":
                stack.enter_context(pytest.raises(UserError, match="no file in conf/scheduler"))
            check_roles(config, ("scheduler",), run, "resume=run")
    with pytest.raises(UserError, match="no file in conf/model names"):
        check_roles({"model": {"_target_": "timm.scheduler.Cosine"}}, ("model",), run, "resume=run")


def test_a_target_that_was_typed_lets_none_below_it_through(run: Path) -> None:
    config = read_yaml(run / "config.yaml")
    config["model"] = {"_target_": "my.Net", "head": {"_target_": "os.mkdir"}}
    with pytest.raises(UserError, match=r"model.head._target_=os.mkdir"):
        check_roles(config, ("model",), run, "resume=run", targets_of("model._target_=my.Net"))
    dictionary = targets_of("+model={_target_:my.Net,tail:{_target_:my.Tail}}")
    assert dictionary == ["model", "model.tail"]
    with pytest.raises(UserError, match=r"model.head._target_=os.mkdir"):
        check_roles(config, ("model",), run, "resume=run", dictionary)


def test_a_foreign_record_downloads_nowhere_by_itself(run: Path) -> None:
    config = read_yaml(run / "config.yaml")
    config["data"]["source"]["download"] = True
    assert not downloads_elsewhere(run, config, {})  # this user's own
    (run / ".hydra" / "owner.json").unlink()
    for typed, expected in (({}, True), ({"root": "/mine"}, False), ({"source.root": 1}, False)):
        assert downloads_elsewhere(run, config, typed) is expected


@pytest.mark.parametrize(
    "swapped", [{}, {"root": "mine"}], ids=["nothing", "a root that the source does not follow"]
)
def test_an_edited_record_of_ones_own_downloads_nowhere_else(
    run: Path, swapped: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its overrides are sealed, but config.yaml is not."""
    monkeypatch.chdir(run.parent)
    mnist = {"_target_": "lab.data.datasets.mnist", "val_fraction": 0.1, "seed": 0}
    for place, expected in (("data", True), (str(run.parent / "evil"), False)):
        changed(run, data={"source": {**mnist, "download": True, "root": place}})
        loaded = load_run(run, data=swapped)
        assert loaded.config["data"]["source"]["download"] is expected
    with pytest.raises(UserError, match=r"no MNIST under data\.root=.*/evil, and it is not there"):
        _ = loaded.data
    assert not (run.parent / "evil").exists()
    typed = {"source.root": "mine", **swapped}
    assert load_run(run, data=typed).config["data"]["source"]["download"] is True


def test_a_pickle_in_a_checkpoint_is_not_opened(run: Path, tmp_path: Path) -> None:
    made = tmp_path / "executed"
    folder = (run / "checkpoints" / "best").resolve()
    torch.save({"weight": Evil(made)}, folder / "model.pt")
    resealed(folder)
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        load_run(run)
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        load_weights(nn.Linear(1, 1), run)
    assert not made.exists()
    torch.load(folder / "model.pt", weights_only=False)  # the negative control
    assert made.exists()


def test_a_resume_goes_back_from_a_checkpoint_that_holds_no_tensors(
    run: Path, tmp_path: Path
) -> None:
    made = tmp_path / "executed"
    folder = (run / "checkpoints" / "last").resolve()
    for content in (b"no zip at all", b""):
        (folder / "optimizer.pt").write_bytes(content)
        resealed(folder)
        with pytest.raises(writer.DamagedCheckpoint, match=r"optimizer\.pt (holds|cannot be)"):
            writer.load(folder)
    torch.save([1], folder / "optimizer.pt")
    resealed(folder)
    with pytest.raises(writer.DamagedCheckpoint, match="holds a list instead of a dict"):
        writer.load(folder)
    torch.save({"weight": Evil(made)}, folder / "optimizer.pt")
    resealed(folder)
    loaded = writer.load_newest(run / "checkpoints")
    assert loaded is not None and loaded[1]["step"] < 12
    assert not made.exists()


# -- initial weights -------------------------------------------------------------------------------


def model_of(*overrides: str) -> nn.Module:
    torch.manual_seed(1)
    model: nn.Module = instantiate(config_of(*TINY, *overrides)["model"])
    return model


def test_weights_come_from_a_run_a_checkpoint_or_a_file(run: Path, tmp_path: Path) -> None:
    expected = load_run(run).model
    torch.save(expected.state_dict(), tmp_path / "weights.pt")
    for source in (run, run / "checkpoints" / "best", tmp_path / "weights.pt"):
        model = model_of()
        assert weights_sha256(model) != weights_sha256(expected)
        load_weights(model, source)
        assert weights_sha256(model) == weights_sha256(expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_other_programs_are_taken_off(run: Path, tmp_path: Path, prefix: str) -> None:
    expected = load_run(run).model.state_dict()
    torch.save({f"{prefix}{name}": v for name, v in expected.items()}, tmp_path / "weights.pt")
    model = model_of()
    load_weights(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_part_that_is_itself_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    torch.manual_seed(0)
    torch.save(Wrapper().state_dict(), tmp_path / "weights.pt")
    model = Wrapper()
    load_weights(model, tmp_path / "weights.pt")
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(model.module.weight, found["module.weight"])


def test_a_head_of_another_size_starts_fresh_and_is_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="regrow")
    model = model_of("data.num_classes=5", "data.num_outputs=5")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_weights(model, run)
    after, expected = model.state_dict(), load_run(run).model.state_dict()
    fresh = [name for name in after if after[name].shape != expected[name].shape]
    assert len(fresh) == 2
    for name, value in after.items():
        assert torch.equal(value, before[name] if name in fresh else expected[name])
    for name in fresh:
        assert f"init_from: {name} starts fresh" in caplog.text
    assert "(3, 12) there, (5, 12) here" in caplog.text


def test_a_new_run_starts_from_the_weights_of_another(run: Path, tmp_path: Path) -> None:
    lr = ("optimizer.lr=1.0e-12", "optimizer.weight_decay=0.0", "trainer.max_steps=1")
    tuned = finished(tmp_path / "tuned", *TINY, *lr, f"init_from={run}")
    expected = load_run(run).model.state_dict()
    for name, value in load_run(tuned).model.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-9)


@pytest.mark.parametrize("now", ["gone", "changed"])
@pytest.mark.slow
def test_a_resume_with_a_checkpoint_does_not_read_what_the_run_started_from(
    run: Path, tmp_path: Path, now: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(run, source, symlinks=True)
    given = (*TINY, "scheduler=constant", f"init_from={source}")
    whole = finished(tmp_path / "whole", *given, "trainer.max_steps=4")
    parts = finished(tmp_path / "parts", *given, "trainer.max_steps=2")
    shutil.rmtree(source)
    if now == "changed":  # into something that would not even load
        source.write_text("no weights")
    finished(parts, *given, "trainer.max_steps=4")
    shas = {read_json(it / "summary.json")["weights_sha256"] for it in (whole, parts)}
    assert len(shas) == 1
    shutil.rmtree(parts / "checkpoints")  # before the first checkpoint the source is needed
    with pytest.raises(UserError, match=f"init_from={source}: "):
        finished(parts, *given, "trainer.max_steps=6")


@pytest.mark.slow
def test_a_warning_names_weights_of_a_run_with_other_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished(tmp_path / "run", "model.hidden=[4]")
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    build(config_of("model.hidden=[4]", f"init_from={run}"), CPU)
    assert "may be validated or tested on" not in caplog.text
    for source in (run, run / "checkpoints" / "best", run / "checkpoints" / "best" / "model.pt"):
        caplog.clear()
        build(config_of("model.hidden=[4]", f"init_from={source}", "seed=1"), CPU)
        assert "data.source.seed was 0 and is 1" in caplog.text


@pytest.mark.parametrize("text", ["data: coco.yaml", "[1]", "a: [", "x: !!python/name:os.getcwd"])
def test_another_programs_config_beside_weights_is_not_read_as_a_runs(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    warn_of_other_splits(tmp_path / "weights.pt", {"source": {"_target_": "x"}})


def test_names_on_one_side_only_are_said(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = dict(load_run(run).model.state_dict())
    dropped = sorted(weights)[0]
    torch.save({**weights, "extra": torch.ones(1)} | {}, tmp_path / "more.pt")
    load_weights(model_of(), tmp_path / "more.pt")
    assert "not in the model: extra" in caplog.text
    del weights[dropped]
    torch.save(weights, tmp_path / "fewer.pt")
    load_weights(model_of(), tmp_path / "fewer.pt")
    assert f"not in the weights, start fresh: {dropped}" in caplog.text


def test_files_that_hold_no_weights_are_one_line(tmp_path: Path) -> None:
    made = tmp_path / "executed"
    torch.save({"weight": Evil(made)}, tmp_path / "evil.pt")
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "nested.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbers.pt")
    torch.save({"other": torch.ones(7)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello world")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "other.pt").read_bytes()[:200])
    (tmp_path / "folder").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name, message in (
        ("evil.pt", "holds more than tensors and plain values, and is not opened"),
        ("nested.pt", "Save its entry 'state_dict' alone."),
        ("list.pt", "a dict of tensors is expected"),
        ("numbers.pt", "a dict of tensors is expected"),
        ("other.pt", "none of its 1 tensors fits this model"),
        ("text.pt", "no state_dict can be read"),
        ("empty.pt", "no state_dict can be read"),
        ("cut.pt", "no state_dict can be read"),
        ("folder", "manifest.json is missing. Give a folder such as outputs/digits/latest"),
        ("run", "has no checkpoint yet"),
        ("nothing.pt", "there is no such file or folder"),
    ):
        with pytest.raises(UserError) as caught:
            load_weights(nn.Linear(1, 1), tmp_path / name)
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert f"init_from={tmp_path / name}" in str(caught.value)
    assert not made.exists()


def test_inputs_of_several_lengths_or_of_none_are_refused(run: Path) -> None:
    class Sum(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a + b)[:, :3]

    loaded = dataclasses.replace(load_run(run), input_names=["a", "b"], model=Sum())
    plain = dataclasses.replace(loaded.preprocessing, mean=None, std=None)
    loaded = dataclasses.replace(loaded, recorded=plain)
    assert len(loaded.predict({"a": torch.ones(3, 6), "b": torch.ones(3, 6)})) == 3
    with pytest.raises(UserError, match=r"inputs: batches of 3 and 5 examples"):
        loaded.predict({"a": torch.ones(3, 6), "b": torch.ones(5, 6)}, batch_size=3)
    with pytest.raises(UserError, match=r"inputs: batches of no examples"):
        loaded.predict({"a": torch.ones(0, 6), "b": torch.ones(0, 6)})


@pytest.mark.slow
def test_a_pretrained_model_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab.models import vision

    small = ("data.source.num_train=8", "data.source.num_val=8", "data.source.num_test=8")
    shape = ("data.input_shape=[3,8,8]", "data.batch_size=4", "trainer.max_steps=1")
    run = finished(tmp_path / "run", "data=synthetic", "model=resnet18", *small, *shape)
    changed(run, model={"pretrained": True})
    monkeypatch.setattr(vision, "_download", lambda weights: pytest.fail("downloads"))
    assert load_run(run).config["model"]["pretrained"] is False


def test_a_run_is_used_in_a_notebook_in_two_lines(run: Path) -> None:
    loaded = load_run(str(run))
    assert loaded.model(torch.zeros(2, 6)).shape == (2, 3)


def test_a_loaded_run_shows_itself_in_one_short_line(run: Path) -> None:
    """As in a cell of a notebook."""
    loaded = load_run(run)
    best = read_json(run / "summary.json")["best"]
    assert repr(loaded) == (
        f"<run {run.resolve()}: MLP, step {best['step']}, {best['metric']} {best['value']:.4g}, on "
        "cpu. run.predict(inputs) predicts; also run.model, run.data, run.task, run.config>"
    )
    unmeasured = dataclasses.replace(loaded, value=None)
    assert f"step {best['step']}, on cpu." in repr(unmeasured)
    assert type(loaded.config) is type(loaded.config["model"]) is dict


def test_a_bad_precision_in_a_recorded_config_is_one_line(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("precision: fp32", "precision: fp8"))
    with pytest.raises(UserError, match=r"trainer\.precision=fp8\. It must be one of fp32"):
        load_run(run)


def test_a_run_whose_loss_names_no_target_is_loaded(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *TINY)
    config = read_yaml(run / "config.yaml")
    config["loss"] = {}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert load_run(run).step > 0


def test_code_that_has_changed_since_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model's edited forward fits the weights and gives other predictions."""
    load_run(run)
    assert "has changed" not in caplog.text
    manifest = read_json(run / "manifest.json")
    (name, *_) = (name for name in manifest["code_files"] if name.endswith("mlp.py"))
    manifest["code_files"][name] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    load_run(run)
    assert f"{name} differs. Its weights run in the code as it is now." in caplog.text
