"""Bad input gives one line and exit code 2, nothing is written; the YAML matches the code."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from running import composed

from regrow import compose
from regrow.cli import help
from regrow.cli.entry import check_arguments
from regrow.config import entries, flags, leads, own_modules, places, targets
from regrow.config.check import RULES, check, shipped_node
from regrow.config.command_line import paths_as_typed
from regrow.config.composition import composition, hydra_as_it_was
from regrow.config.explain import composition_error, wrong_options
from regrow.config.hydras import refuse_typed
from regrow.config.leads import RECIPES
from regrow.config.own_modules import import_own_modules
from regrow.config.ranges import check_ranges
from regrow.config.resume import expand
from regrow.config.rules import applies, require
from regrow.config.schemas import OF_TORCH
from regrow.config.targets import (
    HYDRAS_OWN,
    allow,
    instantiate,
    is_allowed,
    locate,
    shipped_targets,
)
from regrow.config.yaml_files import read_yaml
from regrow.dotted import leaves
from regrow.errors import UserError, did_you_mean
from regrow.project import CONF
from regrow.record.ownership import SWEEP

TRAIN = CONF.parent / "scripts" / "train.py"

BAD = {
    "optimizer.lrr=1": "optimizer.lrr: there is no such key. Did you mean optimizer.lr?",
    "+optimizer.lrr=1": "torch.optim.AdamW has no such key. Did you mean optimizer.lr?",
    "optimizer=adamww": "optimizer=adamww: there is no such option. Did you mean adamw?",
    "seed=0,1,2": "values are a sweep: add -m. A key that takes a list: seed=[0,1,2].",
    "seed=true": "seed=true must be an integer of at least 0.",
    "sweep=optuna": "sweep=optuna: sweep keys only apply to sweeps. Add -m, or remove it.",
    "--config-dir gone": "gone: there is no such folder. Give its new place",
    "optimizer=null": "optimizer takes the name of one of its options: adagrad, adam,",
    "optimizer.foreach=true": "torch.optim.AdamW takes it, and conf/optimizer/adamw.yaml does not "
    "list it. Add `foreach: true` to that file, or type a plus for this run alone: "
    "+optimizer.foreach=true",
    "+optimizer.params=[]": "torch.optim.AdamW has no such key. It takes lr, betas,",
    "+model.patch_size=3": "MLP has no such key. model=vit has it.",
    "+trainer.fast_dev_run=true": "TrainerOptions has no such key. Here that is debug=fast.",
    "trainer.accelerator=gpu": "Here that is trainer.device=cpu, cuda or mps.",
    "task_name=x": "task_name: there is no such key. Here that is name.",
    "+mykey=3": "mykey: there is no such key. Keys of your own go into conf/train.yaml.",
    "~trainer.monitor": "~trainer.monitor: a run needs this key. Leave ~trainer.monitor out.",
    "~data.source": "~data.source: a run needs this key. Leave ~data.source out.",
    "~data.final_sets": "~data.final_sets: a run needs this key. Leave ~data.final_sets out.",
    "~step._target_": "step=default: conf/step/default.yaml has no _target_, which names",
    "~logger": "~logger: the group cannot be left out. For none beside metrics.jsonl, which is",
    "experiment=null": "experiment=null: leave it out.",
    "debug=false": "debug=false: leave it out.",
    "model=[cnn]": "model takes the name of one of its options: cnn, gpt, mlp,",
    "model=[cnn,null]": "model takes the name of one of its options: cnn, gpt, mlp,",
    "model.hidden=sort(3,1,2)": "add -m. A key that takes a list: model.hidden=[1,2,3].",
    "+experiment=digits_mlp": "an option is chosen without a plus: experiment=digits_mlp",
    "+seed=1": "+seed=1: the key is there already. Write it without +: seed=1",
    "--seed=3": "without dashes or spaces, such as optimizer.lr=0.1. Write seed=3",
    "hydra.run.dri=mine": "Hydra has no such setting. Did you mean hydra.run.dir?",
    "+hydra.mine=1": "hydra.mine: Hydra has no such setting.",
    "hydra=null": "hydra=null: Hydra's settings are set one by one, such as hydra.run.dir=…",
    "hydra.job.env_set.A=1": "a name of your own needs a plus there: +hydra.job.env_set.A=1",
    "hydra/job_logging=null": "it takes the name of an option. Leave hydra/job_logging out",
    "param_groups=[1]": "param_groups=[1]: a list and a mapping cannot take each other's place.",
    "logger=[csv,nope]": "logger=nope: there is no such option.",
    "logger=none": "logger=none: there is no such option. For none beside metrics.jsonl",
    "optimizer.lr=${oc.env:NOPE}": "optimizer.lr: NOPE is not set. Set it, or give a default:",
    "+model@net=cnn": "a group has one place here. Write model=cnn without @. Keys of your own",
    "+optimizer@_global_=sgd": "a group has one place here. Write optimizer=sgd without @.",
    "optimizer.scheduler=x": "there is no such key. Here that is the group scheduler.",
    "hydra/launcher=joblib": "hydra/launcher=joblib: it is replaced here. Use launcher.jobs=4.",
    "-m hydra/sweeper=optuna": "hydra/sweeper=optuna: it is replaced here. Use sweep=optuna.",
    "-m hydra.sweeper.params.seed=0,1": "write sweep.params instead, with the same keys",
    "hydra.job.chdir=true": "a run stays in the current folder.",
    "hydra.runtime.cwd=x": "hydra.runtime.cwd=x: Hydra fills it itself. Leave it out.",
    "~hydra.callbacks.check": "it checks a config before a run starts. Leave it as it is.",
    "model._target_=torch.nn.Linear model.bias=false": "and no file lists it. Add a plus: +mod",
    "hydra.sweep.subdir=x": "hydra.sweep.subdir=x is for a sweep: add -m.",
    "-m +hydra.job.env_set.A=1": "Set it in the shell: A=1 python …",
    "logger=5": "logger takes the name of one of its options: csv, jsonl,",
    "data.image_size=64": "channels first: 'data.input_shape=[3,64,64]'",
    "data.input_shape=64": "channels first: 'data.input_shape=[3,64,64]'",
    "data.seed=zzz": "data.seed=zzz must be an integer of at least 0.",
    "trainer.deterministic=null": "trainer.deterministic=null must be true or false.",
    "tags=null": "tags=null must be a list",
    "trainer.ema_decay=1": "must be a number from 0 to below 1, or null.",
    "task.extra_metrics={kappa:3}": "must be a mapping of names to nodes with a _target_, or null.",
    "task.extra_metrics={kappa:{_target_:torchmetrics.CohenKapa}}": "there is no CohenKapa.",
    "task=segmentation": "task=segmentation does not fit multiclass targets",
    "task.class_names=5": "task.class_names=5 must be a list, each text (in quotes where YAML",
    "data.class_names=[true,false]": 'would read something else: "no"), or null.',
    "loss.class_weights=balance": "must be balanced, or a list, each a number from 0, or a mapping",
    "loss.class_weights={cat:-1}": "must be balanced, or a list",
    "task=binary data=breast_cancer loss.pos_weight=0": "pos_weight=0 must be a number above 0, or",
    **{
        f"data=image_folder data.root=. data.num_classes=2 data.augmentation.{key}": says
        for key, says in {
            "hue=0.7": "data.augmentation.hue=0.7 must be a number from 0 to 0.5.",
            "brightness=-1": "data.augmentation.brightness=-1 must be a number from 0.",
            "crop_scale=[1,0.1]": "must be a list of two numbers from 0, the least and the gre",
            "crop_ratio=[0,1]": "must be a list of two numbers above 0, the least and the gre",
        }.items()
    },
    "loss.ignore_index=zzz": "loss.ignore_index=zzz must be an integer, or null.",
    "hydra.run.dir=/proc/x": "hydra.run.dir=/proc/x: /proc/x: No such file or directory.",
    "optimizr=adam": "optimizr: there is no such key. Did you mean optimizer?",
    "sed=1": "Did you mean seed?",
    "+foo=1": "foo: there is no such key.",
    "optimizer.lr=abc": "optimizer.lr=abc must be a number above 0.",
    "optimizer.lr='0.1'": "must be a number above 0. This is text. Leave out its quotes; of an env",
    "optimizer.lr=${oc.env:NOPE,0.1}": "write ${oc.decode:${oc.env:NAME}}.",
    "trainer.compile='true'": "trainer.compile=true must be true or false. This is text.",
    "name=2026": "must be text of one line. In quotes it is text: 'name=\"2026\"'",
    "notes=3": "notes=3 must be text. In quotes it is text: 'notes=\"3\"'",
    "optimizer.lr=-1": "optimizer.lr=-1 must be a number above 0.",
    "optimizer.lr=": "optimizer.lr= must be a number",
    "optimizer.betas=3": "optimizer.betas=3 must be a list",
    "optimizer.amsgrad=1": "optimizer.amsgrad=1 must be true or false",
    "model.hidden=3": "model.hidden=3 must be a list",
    "model.hidden=[a,b]": "model.hidden=['a', 'b'] must be a list, each an integer of at least 1",
    "model.hidden=[0]": "model.hidden=[0] must be a list",
    "model.dropout=2": "model.dropout=2 must be a number from 0 to 1.",
    "optimizer.lr=inf": "optimizer.lr=inf must be a number above 0.",
    "optimizer.betas=[0.9,1.0]": "two numbers, 0 or more and below 1",
    "init_from=": "init_from= must be text, or null.",
    "data.normalize=tran": "must be one of train, imagenet, none, or {mean: […], std: […]}.",
    "data.normalize={mean:[0.5]}": "must be one of train, imagenet, none",
    "data=csv data.source.target_columns=y data.source.train_file=t.csv data.target_kind=binary "
    "data.num_classes=2 data.num_outputs=1 data.input_shape=[1] task=binary": "columns=y must be",
    "param_groups.lr_scale={head:x}": "must be a mapping to a number from 0, or null.",
    "data.sampling=balances": "must be balanced or {column: the name of a column}, or null.",
    "data.mixing=mixup": "data.mixing=mixup must be a node with a _target_, such as {_target_: lab",
    "data.mixing={_target_:lab.data.augment.MixUp}": "data.mixing.alpha must be given",
    "data.mixing={_target_:lab.data.augment.CutMix,alpha:0}": "alpha=0 must be a number above 0.",
    "data=digit_scenes task=segmentation data.mixing={_target_:lab.data.augment.CutMix,alpha:1}": (
        "data.mixing=CutMix does not fit task=segmentation: a mask of class indices"
    ),
    "data=text task=language model=gpt data.sampling={column:w}": "does not fit task=language",
    "data=diabetes task=regression data.sampling=balanced": "its targets are values, not classes",
    "data.transforms=[3]": "data.transforms=[3] must be a list of nodes, each with a _target_.",
    "data.batch_size=[1]": "data.batch_size=[1] must be an integer",
    "data.batch_size=2.5": "data.batch_size=2.5 must be an integer",
    "trainer.max_epochs=0": "trainer.max_epochs=0 must be an integer of at least 1, or null.",
    "trainer.precision=fp8": "must be one of fp32, bf16, fp16.",
    "trainer.checkpoint.keep_lst=1": "Did you mean trainer.checkpoint.keep_last?",
    "trainer.max_epochs=null": "the run would never end",
    "data.num_outputs=null": "data.num_outputs=null: model._target_=lab.models.mlp.MLP takes a num",
    "data=diabetes task=regression data.num_outputs=null model.num_outputs=1": "lab.tasks.tasks.Re"
    "gression takes a number. Set it, such as data.num_outputs=10.",
    "data.target_kind=null data.num_classes=null": "data.num_classes=null: task._target_=lab.tasks",
    "trainer.monitor=train/loss": "must be a metric of a set that is measured during training",
    "task=regression": "Use task=multiclass.",
    "loss=mse": "loss=mse is for task=regression",
    "data=csv": "regression, segmentation, language; null for others) (and",
    "data=image_folder": "data.num_classes must be given",
    "data=image_folder data.num_classes=2": "data.root must be given: add data.root=…",
    "data=cifar10 data.root=null": "data.root must be given: add data.root=…",
    "model._target_=nope.Net": "there is no such module",
    "+step.buffers=3": "step.buffers: ",
    "lab=other": "lab=other: it is the project's, not a run's. Set it in conf/train.yaml.",
    "model._target_=torch.nn.Linearr": "Did you mean Linear?",
    "model._target_=torch.nn.Linear": "takes no such argument. To leave out what the option "
    "brings: ~model.input_shape ~model.num_outputs ~model.hidden",
    "resume=/no/such/folder": "there is no run in that folder",
    "++resume=.": "with a plus, it does not resume that run. Type it: resume=.",
    "logger=wandbb": "Did you mean wandb?",
    "trainer": "such as optimizer.lr=0.1. Give trainer a value: trainer=…",
    "optimizer.lr=1 optimizer.lr": "optimizer.lr=0.1. Give optimizer.lr a value: optimizer.lr=…",
    "--lr 0.1": "--lr: arguments are key=value, without dashes or spaces",
    "lr = 0.1": "Did you mean optimizer.lr?",
    "lr=0.1": "lr: there is no such key. Did you mean optimizer.lr?",
    "trainer.lr=0.1": "trainer.lr: there is no such key. Did you mean optimizer.lr?",
    "loss.beta=1": "the chosen loss has no such key. loss=smooth_l1 has it.",
    "data.source.delimiter=,": "needs quotes",
    "data.source.delimiter=;": "needs quotes",
    "optimizer.lr=${oc.decode:${oc.env:NOPE,0.1}}": "needs quotes: 'optimizer.lr=\"${oc.decode:${",
    "data.class_names=[a;b,Kuh,3]": "needs quotes: 'data.class_names=[\"a;b\",Kuh,3]'",
    "sweep=list sweep.sets=[[seed=1,tags=3]]": '\'sweep.sets=[["seed=1","tags=3"]]\'',
    "trainer.precision=fp16 trainer.device=cpu": "Use trainer.precision=bf16.",
    "scheduler.warmup_steps=1 scheduler.warmup_fraction=0.1": "say the same thing twice",
    "trainer.strategy=dpp": "trainer.strategy=dpp must be one of ddp, fsdp",
    "trainer.fsdp.param_dtype=half": "trainer.fsdp.param_dtype=half must be one of fp32, bf16",
    "trainer.fsdp.param_dtype=fp16": "small gradients vanish without a loss scale",
    'name="a\x07b"': "must be text of one line",
    "hydra.sweep.dir=mine": "hydra.sweep.dir=mine is for a sweep. A run's folder is hydra.run.dir",
    "-m hydra.run.dir=mine": "is for one run. A sweep's folder is hydra.sweep.dir",
    "-m seed=range(0)": "seed=range(0): there is no value in it.",
    "hydra.run.dir=mine optimizer.lr=0": "optimizer.lr=0 must be a number above 0.",
}


def run_train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    return forked.run(
        [sys.executable, str(TRAIN), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_run_does_not_write_into_a_sweeps_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / SWEEP).write_text("{}")
    done = run_train(tmp_path, "hydra.run.dir=mine", "debug=fast")
    assert done.returncode == 2 and "hydra.run.dir=mine holds a sweep" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [SWEEP]


def test_an_error_in_a_users_code_names_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unlucky.py").write_text("def net(width):\n    raise ValueError(f'not {width}')\n")
    (tmp_path / "unwritten.py").write_text("def net(width):\n    return (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = ("unlucky.net", "unwritten.net", "unlucky.nett", "unluckier.net")
    monkeypatch.setattr(targets, "_allowed", {*names})
    with pytest.raises(UserError) as found:
        instantiate({"_target_": "unlucky.net", "width": 7})
    said = f"_target_=unlucky.net ({tmp_path}/unlucky.py:2): ValueError: not 7. HYDRA_FULL_ERROR"
    assert str(found.value).startswith(said)
    with pytest.raises(UserError, match=rf"{tmp_path}/unwritten.py:2: SyntaxError: .* was never"):
        instantiate({"_target_": "unwritten.net", "width": 7})
    with pytest.raises(UserError, match=r"_target_=unlucky.nett: there is no nett.* mean net\?"):
        instantiate({"_target_": "unlucky.nett", "width": 7})
    with pytest.raises(UserError, match=r"_target_=unluckier.net: there is no such module"):
        instantiate({"_target_": "unluckier.net", "width": 7})


@pytest.mark.parametrize(
    "named",
    [
        "hydra.run.dir=file/run",
        "hydra.run.dir=file/${name}",
        "-m hydra.sweep.dir=file/sweep",
    ],
)
@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_named_with_its_argument(
    named: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = run_train(tmp_path, *named.split())
    assert done.returncode == 2
    said = done.stderr.strip()
    assert said.startswith(f"error: {named.split()[-1]}: ") and "Choose another folder." in said
    assert "\n" not in said and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("arguments", BAD)
def test_a_bad_config_is_one_line_and_leaves_nothing(arguments: str, tmp_path: Path) -> None:
    done = run_train(tmp_path, *arguments.split())
    assert done.returncode == 2
    assert BAD[arguments] in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# Values to type where an error leaves the choice open.
OPEN = {
    "data.target_kind": "multiclass",
    "data.num_classes": "2",
    "data.root": "here",
    "trainer": "cpu",
    "optimizer.lr": "0.1",
}
SET_ONE = {
    "trainer.max_epochs=null": "trainer.max_steps=1",
    "scheduler.warmup_steps=1 scheduler.warmup_fraction=0.1": "scheduler.warmup_steps=1",
}
# Errors whose advice leads to another error, and that error.
NEXT = {
    "loss.beta=1": "loss=smooth_l1 is for task=regression",
    "data=csv": "data.num_classes must be given: add data.num_classes=… (null for regression)",
    "data=image_folder": "data.root must be given",
    "trainer.max_epochs=0": "the run would never end",  # null
    "model._target_=torch.nn.Linearr": "takes no such argument",
    **dict.fromkeys(("logger=5", "logger=wandbb"), "wandb"),  # a login, or the package
    "data.source.delimiter=,": "the chosen data has no such key",
    "data.source.delimiter=;": "the chosen data has no such key",
    "+model.patch_size=3": "Write it without +",
    "-m hydra/sweeper=optuna": "sweep keys only apply to sweeps",
    "sweep=list sweep.sets=[[seed=1,tags=3]]": "sweep keys only apply to sweeps",
    "trainer.fsdp.param_dtype=half": "small gradients vanish",  # fp16, one of three
}
OFFERS = (
    r"Did you mean|Use |~|needs quotes|of that name|add [a-z]|one of|true or false|or null|Set one|"
    r"a value: "
)


def error_of(arguments: list[str]) -> str:
    """Return the program's error for these arguments, or ""."""
    try:
        check_arguments(arguments)
        refuse_typed(arguments)
        if (wrong := wrong_options(arguments)) is not None:
            return wrong
        made = composed(*expand(paths_as_typed(arguments, multirun=False)))
        check(made, made.hydra.runtime.choices)
    except UserError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return composition_error(error)
    return ""


def ways_out(arguments: list[str], said: str) -> list[list[str]]:
    """Return the arguments that follow the advice, one list per advice."""
    *others, last = arguments
    key, _, value = last.partition("=")
    if found := re.search(r"Did you mean (\S+)\?", said):
        if "arguments are key=value" in said:
            return [[f"{found[1]}=0.1"]]
        if "no such option" in said:
            return [[f"{key}={found[1]}"]]
        if key.endswith("_target_"):
            return [[f"{key}={value.rpartition('.')[0]}.{found[1]}"]]
        return [[*others, f"{found[1]}={value}"]]
    if found := re.search(r"Give (\S+) a value:|add (\S+)=…", said):
        named = found[1] or found[2]
        kept = [argument for argument in arguments if argument.partition("=")[0] != named]
        return [[*kept, f"{named}={OPEN[named]}"]]
    if found := re.search(r"always written: (\S+)$|is replaced here\. Use (\S+)\.$", said):
        return [shlex.split(found[1] or found[2])]
    if found := re.search(r"Use (\S+)=(\S+)\.$", said):
        kept = [argument for argument in arguments if not argument.startswith(f"{found[1]}=")]
        return [[*kept, f"{found[1]}={found[2]}"]]
    if found := re.search(r"such as '(\[\S+\])'", said):
        return [[*others, f"{key}={found[1]}"]]
    if "Use bf16." in said:
        return [[*others, f"{key}=bf16"]]
    if said.endswith(f"Leave {last} out."):
        return [others]
    if "Set one." in said:
        return [[SET_ONE[" ".join(arguments)]]]
    if found := re.search(r"(~\S+( ~\S+)*)$", said):
        return [[*arguments, *found[1].split()]]
    if found := re.search(r"(?:needs quotes|of that name): (.+)$", said):
        return [[*others, *shlex.split(found[1])]]
    if found := re.search(r"no such key\. (\S+) has it\.$", said):
        return [[found[1], last]]
    found = re.search(r"one of (?:its options: )?([\w, ]+)", said)
    words = re.findall(r"\w+", found[1]) if found else []
    words += ["true", "false"] if "true or false" in said else []
    words += ["null"] if said.endswith("or null.") else []
    return [[*others, f"{key}={word}"] for word in words if word != "or"]


@pytest.mark.parametrize("bad", [bad for bad, said in BAD.items() if re.search(OFFERS, said)])
def test_following_the_advice_of_an_error_helps(bad: str) -> None:
    said = error_of(bad.split())
    assert BAD[bad] in said
    ways = ways_out(bad.split(), said)
    assert ways
    for arguments in {" ".join(way): way for way in (ways[0], ways[-1])}.values():
        after = error_of(arguments)
        assert after == "" or (NEXT.get(bad, "\0") in after and after != said), (arguments, after)


def test_a_needed_node_may_be_replaced_but_not_left_out() -> None:
    node = "+data.source={_target_: lab.data.datasets.digits, val_fraction: 0.1, test_fraction: 0.2"
    assert error_of(["~data.source", node + ", folds: null, fold: null, seed: 0}"]) == ""
    assert error_of(["~data.source"]).startswith("~data.source: a run needs this key.")


def test_an_error_that_needs_torch_is_one_line_too(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has what the test asks for in vain")
    done = run_train(tmp_path, "trainer.device=cuda", "hydra.run.dir=mine")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "trainer.device=cuda" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_ends_in_softmax_is_found_before_a_folder_is_made(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(width):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softmax(-1))\n"
    )
    environment = {**os.environ, "PYTHONPATH": forked.python_path(tmp_path)}
    keys = read_yaml(CONF / "model" / "mlp.yaml")
    removed = [f"~model.{key}" for key in keys if key not in ("_target_", "defaults")]
    done = subprocess.run(
        [sys.executable, str(TRAIN), "model._target_=mine.net", "+model.width=1", *removed],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "softmax" in done.stderr.lower() and done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


def test_a_module_in_the_root_of_the_repository_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_module_of_ones_own.py").write_text("class Net: ...\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(UserError, match="there is no such module"):
        locate("a_module_of_ones_own.Net", "model")
    monkeypatch.setattr(own_modules, "ROOT", tmp_path)
    import_own_modules()
    assert locate("a_module_of_ones_own.Net", "model").__name__ == "Net"


def test_a_range_binds_each_of_several_models_and_no_class_of_ones_own() -> None:
    wrong = {"_target_": "lab.models.mlp.MLP", "hidden": [8, 0]}
    right = {**wrong, "hidden": [8]}
    with pytest.raises(UserError, match=r"^model\.second\.hidden=\[8, 0\] must be a list, each"):
        check_ranges({"model": {"first": right, "second": wrong}})
    with pytest.raises(UserError, match=r"^model\.hidden=\[8, 0\] must be a list, each"):
        check_ranges({"model": wrong})
    own = {"_target_": "mine.Net", "hidden": [8, 0]}
    check_ranges({"model": {"width": right, "second": own}})  # a name that is also a key


def test_every_trainer_key_that_may_be_null_says_what_else_it_may_be() -> None:
    shipped = shipped_node("trainer", "default")
    nulls = [f"trainer.{key}" for key, value in leaves(shipped).items() if value is None]
    assert [key for key in nulls if key not in RULES] == []


def test_code_without_a_config_asks_the_same_rule() -> None:
    require("model.hidden", (np.int64(8), 8))
    require("loss.label_smoothing", np.float32(0.5))
    for key, value in {
        "model.hidden": (8, 0),
        "loss.label_smoothing": np.float64("nan"),
        "task.threshold": 1.0,
        "model.channels": [],
    }.items():
        with pytest.raises(UserError, match=rf"^{re.escape(key)}=.* must be "):
            require(key, value)


@pytest.mark.parametrize(
    ("task", "data"),
    [("binary", "breast_cancer"), ("multilabel", "digits_attributes"), ("regression", "diabetes")],
)
def test_a_task_brings_its_loss_and_monitor(task: str, data: str) -> None:
    config = composed(f"task={task}", f"data={data}")
    check(config, config.hydra.runtime.choices)
    assert config.trainer.monitor == config.task.monitor
    if task == "regression":
        assert config.loss["_target_"].endswith(".mse")


def test_the_advice_to_leave_out_arguments_works_also_for_those_that_are_null() -> None:
    given = ("scheduler._target_=torch.optim.lr_scheduler.StepLR", "+scheduler.step_size=2")
    config = composed(*given)
    with pytest.raises(UserError, match=r"warmup_steps, .*\.final_factor") as caught:
        check(config, config.hydra.runtime.choices)
    _, _, advice = str(caught.value).partition("To leave out what the option brings: ")
    config = composed(*given, *advice.split())
    check(config, config.hydra.runtime.choices)


def test_a_task_without_its_data_is_refused() -> None:
    config = composed("task=binary")
    with pytest.raises(UserError, match="Use task=multiclass"):
        check(config, config.hydra.runtime.choices)


@pytest.mark.parametrize(
    ("word", "words", "meant"),
    [
        ("val/acc", ["val/auc", "val/accuracy", "val/accuracy/cat"], "val/accuracy"),
        ("lr", ["param_groups.lr_scale", "optimizer.lr"], "optimizer.lr"),
        ("trainer.lr", ["trainer.mode", "trainer.clip_norm"], ""),
        ("adma", ["adam", "adamw"], "adam"),
        ("beta", ["beta"], ""),
        ("task_name", ["task.class_names"], ""),
        ("test", ["notes"], ""),
        ("dri", ["dir"], ""),
        ("run.dri", ["run.dir"], "run.dir"),
    ],
)
def test_a_suggestion_is_near_and_never_the_word_itself(
    word: str, words: list[str], meant: str
) -> None:
    assert did_you_mean(word, words) == (f" Did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    "override",
    [
        "data.normalize={mean:[0.5],std:[0.5]}",
        "data.augmentation=null",
        "param_groups.lr_scale={body.0:0.1}",
        "loss.class_weights=[1,2,1,1,1,1,1,1,1,0.5]",
    ],
)
def test_keys_that_the_yaml_offers_need_no_plus(override: str) -> None:
    made = composed(override)
    check(made, made.hydra.runtime.choices)


def test_a_key_that_the_target_takes_and_the_file_leaves_out_may_be_added() -> None:
    made = composed("+optimizer.foreach=true", "optimizer.fused=false")
    check(made, made.hydra.runtime.choices)
    made = composed("+optimizer.foreech=true")
    with pytest.raises(UserError, match=r"Did you mean optimizer\.foreach\?"):
        check(made, made.hydra.runtime.choices)


def test_a_key_of_anothers_model_may_hold_what_it_likes() -> None:
    removed = [f"~model.{key}" for key in shipped_node("model", "mlp") if key[0] != "_"]
    target = ("model._target_=torch.nn.Transformer", "+model.dropout=7")
    made = composed(*removed, *target)
    check(made, made.hydra.runtime.choices)
    with pytest.raises(UserError, match=r"model\.dropout=7"):
        made = composed("model.dropout=7")
        check(made, made.hydra.runtime.choices)


@pytest.mark.slow
def test_a_missing_number_of_classes_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", ".cache"):
        (tmp_path / "photos" / name).mkdir(parents=True)
    says = "photos holds 2 class folders (images): cat 0, dog 0. The folders cat and dog hold no"
    made = composed("data=image_folder", "data.root=photos")
    with pytest.raises(UserError, match=re.escape(f"data.num_classes must be given: {says}")):
        check(made, made.hydra.runtime.choices)
    for name in ("a", "b", "c"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"train holds 3 class .*\. Set data\.num_classes=3\.$"):
        check(made, made.hydra.runtime.choices)
    for given, says in {
        "extensions=[3]": "=[3] must be",
        "extensions=jpg": "=jpg must be",
        "extensions=[jpgg]": ": Pillow does not decode .jpgg",
        "leave_out=3": "=3 must be a list",
        "leave_out=[3]": "=[3] must be a list",
    }.items():
        made = composed("data=image_folder", "data.root=photos", f"data.source.{given}")
        says = f"data.source.{given.partition('=')[0]}{says}"
        with pytest.raises(UserError, match=rf"^{re.escape(says)}[^\n]*\.$"):
            check(made, made.hydra.runtime.choices)
    made = composed("data=mask_folder", "data.root=photos")  # folders say nothing there
    with pytest.raises(UserError, match=r"must be given: add data\.num_classes=…"):
        check(made, made.hydra.runtime.choices)


@pytest.mark.slow
def test_matplotlib_lists_the_fonts_of_a_machine_without_a_word(tmp_path: Path) -> None:
    key = "task.extra_metrics={kappa:{_target_:torchmetrics.CohenKapa}}"
    fonts = tmp_path / "fonts"
    done = subprocess.run(  # a new process: one that is forked has imported matplotlib
        [sys.executable, str(TRAIN), key],
        cwd=tmp_path,
        env={**os.environ, "MPLCONFIGDIR": str(fonts)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert [*fonts.glob("fontlist*")]  # the control: it has listed them


def test_a_node_without_a_target_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "mine.yaml"
    path.write_text("target: my_models.Net\nwidth: 3\n")
    given = ["--config-dir", str(tmp_path), "model=mine"]
    done = run_train(tmp_path, *given)
    assert done.returncode == 2
    assert done.stderr == (
        "error: model=mine: model/mine.yaml has no _target_, which names the class or function to "
        "call. Did you mean _target_ for target?\n"
    )
    path.write_text("# Nothing yet.\n")
    done = run_train(tmp_path, *given)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model=mine: model/mine.yaml has no _target_, which names")


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("trainer", "max_epochs: 3\n", "_target_, max_steps, max_seconds and "),
        ("data", "source: {_target_: lab.data.datasets.digits}\n", "_target_, final_sets, which"),
    ],
)
def test_an_option_that_does_not_build_on_the_base_is_told_how(
    option: str, text: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "D" / option).mkdir(parents=True)
    (tmp_path / "D" / option / "mine.yaml").write_text(text)
    done = run_train(tmp_path, "--config-dir", "D", f"{option}=mine")
    base = {"trainer": "default", "data": "_base"}[option]
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.startswith(f"error: {option}=mine: D/{option}/mine.yaml lacks ")
    assert done.stderr.endswith(f" Begin the file with `defaults: [{base}, _self_]`.\n")


def test_a_model_of_ones_own_may_take_null_for_the_number_of_outputs() -> None:
    made = composed("data.num_outputs=null")
    made.model = {"_target_": "collections.OrderedDict", "num_outputs": None}
    check(made, made.hydra.runtime.choices)


def test_a_metric_of_ones_own_task_may_be_no_node() -> None:
    made = composed("task.extra_metrics={}")
    made.task = {**made.task, "_target_": "collections.OrderedDict", "extra_metrics": ["f2"]}
    check(made, made.hydra.runtime.choices)


def test_an_augmentation_that_a_file_merges_into_its_options_is_told_as_that(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    text = "defaults: [mask_folder, _self_]\nroot: .\nnum_classes: 2\naugmentation:\n"
    text += "  _target_: torch.nn.Dropout\n  p: 0.3\n"
    (tmp_path / "data" / "mine.yaml").write_text(text)
    done = run_train(tmp_path, "--config-dir", str(tmp_path), "data=mine", "task=segmentation")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "data.augmentation.input_shape, data.augmentation.crop_scale, " in done.stderr
    assert done.stderr.endswith(
        "Hydra merges a node into the option's. To replace it: '~data.augmentation' "
        "'+data.augmentation={_target_:torch.nn.Dropout,p:0.3}'\n"
    )


@pytest.mark.slow
def test_a_loss_without_a_target_is_for_a_task_that_brings_its_own(tmp_path: Path) -> None:
    for group, text in {
        "loss": "{} # the task brings its own\n",
        "task": "_target_: lab.examples.contrastive.probe.Embedding\nnum_classes: 10\n"
        "monitor: val/probe_accuracy\n",
    }.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{'for_' * (group == 'loss')}mine.yaml").write_text(text)
    given = ["--config-dir", str(tmp_path), "--check", "trainer.mode=max"]
    done = run_train(tmp_path, *given, "task=mine")
    assert (done.returncode, done.stderr) == (0, "")
    done = run_train(tmp_path, *given, "loss=for_mine")  # of task=multiclass
    assert done.returncode == 2
    assert done.stderr.startswith("error: loss=for_mine: loss/for_mine.yaml has no _target_")


def test_slurms_keys_may_stand_in_this_machines_config_without_its_launcher() -> None:
    """`+` puts them there as conf/local/default.yaml does."""
    for launcher in ("local", "slurm"):
        plus = "+" * (launcher == "local")
        config = compose(overrides=[f"launcher={launcher}", f"{plus}launcher.partition=gpu"])
        assert config.launcher.partition == "gpu"
    with pytest.raises(UserError, match=r"Did you mean launcher\.partition\?"):
        compose(overrides=["+launcher.partitoin=gpu"])
    with pytest.raises(UserError, match=r"launcher\.partition=3 must be text, or null"):
        compose(overrides=["+launcher.partition=3"])


def help_of(folder: Path, *arguments: str, script: str = "train.py", code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(TRAIN.with_name(script)), *arguments], cwd=folder,
        env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code and list(folder.iterdir()) == [], done.stderr
    return done.stdout + done.stderr


NEEDS_A_NEIGHBOUR = re.compile(r"\blikewise\b|\bditto\b|\bas above\b|^the same\b", re.I)


def faults_of_comments(entry: entries.KeyEntry, path: str) -> list[str]:
    """Return the keys below an option that lack a comment, or whose comment needs another's.

    A node's own keys explain it.
    """
    found = []
    for name, each in entry.below.items():
        key = f"{path}.{name}"
        is_bare = not each.comment and not each.below and name not in HYDRAS_OWN
        if is_bare or NEEDS_A_NEIGHBOUR.search(each.comment):
            found.append(key)
        found += faults_of_comments(each, key)
    return found


def test_each_key_has_a_comment_that_stands_alone(tmp_path: Path) -> None:
    found = []
    for file in sorted(CONF.glob("*/*.yaml")):
        if file.parent.name not in (*RECIPES, "local"):
            option = entries.option(file.parent.name, file.stem, entries.in_conf)
            found += faults_of_comments(option, f"{file.parent.name}={file.stem}")
    primary = entries.of_file(CONF / "train.yaml", "train")
    found += [k for k in faults_of_comments(primary, "train") if not k.startswith("train.hydra.")]
    assert found == []
    mine = tmp_path / "mine.yaml"  # the negative controls
    mine.write_text(
        "a: 1 # of the first\nb: 2 # likewise\nc: 3\nd: ${.a}\ne: ${.c}\nf:\n  g: 1 # the same\n"
        "_target_: x.Y\n"
    )
    option = entries.option("data", "mine", lambda group, name: mine)
    assert option.below["d"].comment == "of the first"
    assert faults_of_comments(option, "data") == ["data.b", "data.c", "data.e", "data.f.g"]


def test_help_fits_on_a_screen_and_shows_keys_and_groups(tmp_path: Path) -> None:
    for script in ("train.py", "find_lr.py"):
        said = help_of(tmp_path, "--help", "model=cnn", "optimizer.lr=0.25", script=script)
        lines = said.splitlines()
        assert len(lines) <= 30 and max(map(len, lines)) <= 80
        assert "  model      cnn          gpt mlp" in said and "optimizer.lr=0.25" in said
        assert "_base" not in said
    assert "find_lr.max_lr=10.0" in said


def test_help_of_a_group_shows_its_options_and_the_keys_of_the_chosen_one(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "scheduler", "scheduler=linear", "scheduler.warmup_steps=7")
    assert "* linear" in said and "  cosine" in said and "Half a cosine down to" in said
    assert "Keys of scheduler=linear:\n  _target_: lab.schedules.linear\n" in said
    line = next(line for line in said.splitlines() if "warmup_steps=7" in line)
    assert "steps of a linear warm-up" in line and "(default null)" in said
    assert "[an integer of at least 0, or null]" in " ".join(said.split())
    assert max(map(len, said.splitlines())) <= 80


SCREEN = 40  # lines; test_help_fits_on_a_screen has the shorter one of --help alone


@pytest.mark.parametrize("option", sorted(places.options("data")))
def test_help_of_each_data_set_stays_below_a_screen_and_names_each_of_its_keys(
    option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(*arguments: str) -> str:
        help.show("train", *help.split(["--help", "data", f"data={option}", *arguments]))
        return capsys.readouterr().out

    said = shown()
    words = {word.partition("=")[0].rpartition(".")[2] for word in said.split()}
    keys = [key for key, _, _ in help._leaves(entries.option("data", option), "data")]
    assert len(said.splitlines()) < SCREEN and not {key.rpartition(".")[2] for key in keys} - words
    if option == "mask_folder":
        assert "\n    and .crop_ratio .brightness .contrast .saturation .hue\n" in said
        changed = shown("data.augmentation.hue=0.1")  # has its comment now
        assert ".hue=0.1" in changed and "    and .crop_ratio .brightness .contrast" in changed
        monkeypatch.setattr(help, "RARELY", ())  # the control
        assert len(shown().splitlines()) > SCREEN


def test_help_of_a_group_that_lacks_a_key_shows_it_as_missing(tmp_path: Path) -> None:
    said = help_of(tmp_path, "data=image_folder", "--help", "data")
    assert "  data.num_classes=???" in said and " num_outputs=${.num_classes}" in said
    assert help_of(tmp_path, "--help", "data=image_folder") == said
    assert help_of(tmp_path, "data=image_folder", "--help").startswith("python scripts/train.py")


def test_help_of_keys_shows_comment_default_and_range(tmp_path: Path) -> None:
    said = help_of(tmp_path, "trainer.checkpoint", "model.norm", "data/source", "seed", "--help")
    assert "trainer.checkpoint.keep_best=1" in said and "[an integer of at\n" in said
    assert "model.norm=layer" in said and "none, layer, batch (batch statistics" in said
    assert "data.source (data=digits)" in said and "data.source.val_fraction=0.1" in said
    assert "seed=0\n  seeds the model, shuffling" in said


def test_help_of_a_dotted_key_says_what_it_is_and_how_to_type_it(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "trainer.max_epochs", "data.input_shape", "model.dropout")
    first, _, others = said.partition("data.input_shape=[1,8,8]\n")
    assert re.fullmatch(
        r"trainer\.max_epochs=100\n  passes over the training split; .*\n"
        r"  values:  an integer of at least 1, or null\n"
        r"  default: \$\{if_chosen:task,language,5,100\}  \(100 here\)\n"
        r"  set in:  conf/trainer/default\.yaml:\d+ \(trainer=default\)\n"
        r"  type:    trainer\.max_epochs=200\n",
        first,
    )
    line = int(first.partition("default.yaml:")[2].partition(" ")[0])
    written = (CONF / "trainer" / "default.yaml").read_text().splitlines()
    assert written[line - 1].startswith("max_epochs:")
    assert "  type:    'data.input_shape=[1,16,16]'\n" in others  # quoted for a shell
    assert "  values:  a number from 0 to 1\n" in others and "type:    model.dropout=0.1" in others
    said = help_of(tmp_path, "--help", "trainer.max_epoch", code=2)
    assert said.endswith("no such group or key. Did you mean trainer.max_epochs?\n")


@pytest.mark.parametrize("typed", [[], ["data=csv", "optimizer=muon"]])
def test_help_of_every_key_gives_a_value_that_the_key_takes_and_does_not_have(
    typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(help, "option", functools.cache(entries.option))
    monkeypatch.setenv("COLUMNS", "120")
    with hydra_as_it_was():
        config = composition({**flags.DEFAULT, "name": "train"}, typed)
        HydraConfig.instance().set_config(config)
        found = {}
        for group in places.groups():
            for name in places.options(group):
                for key, entry, parent in help._leaves(help.option(group, name), group):
                    found.setdefault(key, (entry, parent))
        del found["experiment.param_groups.lr_scale.*.bias"]  # a name with a dot
        pages = {key: list(help._topic(key, config)) for key in found}
    examples = {}
    for key, page in pages.items():
        text = next((line for line in page if line.startswith("  type:")), "").partition(":")[2]
        if text and "=…" not in text:
            typed_as = OverridesParser.create().parse_override(shlex.split(text)[0])
            name, examples[key] = typed_as.key_or_group, typed_as.value()
            assert name == key or key.partition(".")[2] == name  # of a recipe
            assert shlex.split(text)[0] != page[0]
            if applies(getattr(found[key][1], "target", None)) and name in RULES:
                assert RULES[name].allows(examples[key]), text
    assert len(pages) > 300 and len(examples) > 200
    assert examples["logger.wandb.mode"] == "offline" and examples["debug.trainer.max_steps"] == 4
    assert examples["data.normalize"] == "none" and examples["optimizer.betas"] == [0.9, 0.95]
    assert examples["model.hidden"] == [512, 512] and 0 < examples["optimizer.eps"] < 1e-7
    assert "model.input_shape" not in examples and "optimizer.adamw_modules" not in examples
    assert pages["model.input_shape"][-1].startswith("  type:    data.input_shape=…")


def test_help_shows_which_key_of_the_data_a_model_takes_its_shape_from(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "model=cnn")
    assert "model.input_shape=${data.input_shape}" in said and "[1,8,8] with data=digits" in said
    said = help_of(tmp_path, "--help", "model", "data=image_folder", "model.num_outputs=7")
    assert "[3,224,224] with data=image_folder" in said and "[1,8,8]" not in said
    assert "model.num_outputs=7 " in said  # typed, so that it follows nothing


def test_help_of_an_option_begins_with_its_own_keys_and_ends_with_the_others(
    tmp_path: Path,
) -> None:
    said = help_of(tmp_path, "--help", "data=image_folder")
    lines = said.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    own, _, rest = said.partition("Taken from another key")
    rest = " ".join(rest.split())
    assert own.index("data.root=null") < own.index("data.num_classes=???") < own.index("data.batch")
    assert "  data.source:\n" in own and own.index(".val_fraction=0.1") > own.index("data.source:")
    assert "pin_memory" not in own and own.index(".flip=true") < own.index("data.source:")
    assert " source.root " in rest and "pin_memory=true" in rest
    assert "--help data.KEY explains one; --help data lists the options" in rest
    typed = help_of(tmp_path, "--help", "data", "data=image_folder", "data.pin_memory=false")
    assert "data.pin_memory=false" in typed.partition("Taken from another key")[0]


@pytest.mark.parametrize(
    ("typed", "shape"),
    [
        ("data.input_shape=(3,64,64)", "[3,64,64]"),
        ("data.input_shape=64,64", "[3,64,64]"),
        ("data.input_shape=1,28,28", "[1,28,28]"),
        ("data.input_shape=64", "[3,64,64]"),
        ("data.image_size=(3,64,64)", "[3,64,64]"),
        ("data.image_size=32,48", "[3,32,48]"),
        ("data.image_size=64", "[3,64,64]"),
        ("data.input_shape=64,64,3", "[3,64,64]"),
        ("data.image_size=[48,32,1]", "[1,48,32]"),
        ("data.input_shape=1,28,3", "[1,28,3]"),
        ("data.input_shape=64,64,64", "[64,64,64]"),
    ],
)
def test_a_shape_without_brackets_gets_the_line_to_type(typed: str, shape: str) -> None:
    assert f"channels first: 'data.input_shape={shape}'" in leads.as_shape(typed)
    for other in ("data.input_shape=[3,64,64]", "data.batch_size=64", "data.input_shape=square",
                  "data.input_shape=0", "data.image_size=0,64"):  # fmt: skip
        assert leads.as_shape(other) == ""  # the negative controls


@pytest.mark.parametrize("typed", ["input_shape=(3,64,64)", "input_shape=6,4", "input_shape=64",
                                   "image_size=64,64", "image_size=64"])  # fmt: skip
def test_a_start_gives_one_line_for_a_shape_without_brackets(typed: str, tmp_path: Path) -> None:
    done = run_train(tmp_path, f"data.{typed}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"error: data.{typed}: " in done.stderr
    assert "channels first: 'data.input_shape=[3," in done.stderr


def folders_of_images(root: Path, **counts: int) -> None:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            path = root / name / f"{number}.png"
            Image.new("L", (8, 8), number * 40 + len(name)).save(path)


@pytest.mark.parametrize("given", [[], ["data.num_classes=2"], ["data.num_classes=3"]])
@pytest.mark.slow
def test_images_a_folder_too_deep_or_an_empty_class_are_told(
    given: list[str], tmp_path: Path
) -> None:
    folders_of_images(tmp_path / "photos" / "inner", cat=2, dog=3)
    folders_of_images(tmp_path / "three", cat=2, dog=3, x=0)
    typed = ["data=image_folder", "model=cnn", "data.input_shape=[1,8,8]", "--check", *given]
    said = run_train(tmp_path, *typed, "data.root=photos").stderr
    assert "photos holds one folder, inner, with" in said and "data.root=photos/inner" in said
    is_right = given == ["data.num_classes=2"]
    assert "in it: cat 2, dog 3. If" in said
    assert ("data.num_classes=2" in said.partition("photos/inner")[2]) != is_right
    said = run_train(tmp_path, *typed, "data.root=three").stderr
    assert "no images" in said and "x" in said
    assert ("cat 2, dog 3, x 0" in said) == (given != ["data.num_classes=3"])
    if "x 0" not in said:
        return
    (tmp_path / "three" / "x" / "notes.txt").write_text("no image")
    assert run_train(tmp_path, *typed, "data.root=three").stderr == said  # it still has none
    Image.new("L", (8, 8)).save(tmp_path / "three" / "x" / "0.png")  # the control
    assert "no images" not in run_train(tmp_path, *typed, "data.root=three").stderr


def test_a_call_that_refuses_an_argument_suggests_one_or_lists_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"_target_": "fractions.Fraction", "numerater": 1}
    allow(node)
    with pytest.raises(UserError, match=r"^numerater: .* takes no such argument.*Did you mean n"):
        instantiate(node)
    node = {"_target_": "fractions.Fraction", "zzz": 1}
    with pytest.raises(UserError, match=r"^zzz: .* argument\. It takes numerator, denominator"):
        instantiate(node)
    assert instantiate({"_target_": "fractions.Fraction", "numerator": 1}) == 1
    # The negative control: the refusal comes from inside the target, whose arguments do not matter.
    text = "def made(numerater=0):\n    import fractions\n    return fractions.Fraction(zzz=1)\n"
    (tmp_path / "refusing_inside.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "refusing_inside.made", "numerater": 1}
    allow(node)
    with pytest.raises(UserError, match="unexpected keyword argument 'zzz'") as caught:
        instantiate(node)
    assert "takes" not in str(caught.value) and "Did you mean" not in str(caught.value)


def test_help_of_a_recipe_shows_what_it_sets(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "experiment", "experiment=digits_cnn")
    assert "* digits_cnn" in said and "  trainer.max_epochs=30" in said


def test_help_reads_odd_options_of_a_group(tmp_path: Path) -> None:
    folder = tmp_path / "D" / "model"
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text("defaults: [other]\nwidth: 1 # here\n")
    (folder / "other.yaml").write_text("defaults: [one]\ndepth: 2 # there\n")
    found = entries.option("model", "one", lambda group, name: folder / f"{name}.yaml")
    assert found.value == {"depth": 2, "width": 1} and found.below["depth"].comment == "there"
    (folder / "one.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"one.yaml is not a mapping"):
        entries.option("model", "one", lambda group, name: folder / f"{name}.yaml")


def test_help_of_a_key_that_the_chosen_option_lacks_lists_all_options_that_have_it(
    tmp_path: Path,
) -> None:
    said = help_of(tmp_path, "--help", "model.width").splitlines()
    assert said[0] == "model.width=128 with model=gpt; the chosen model=mlp has no such key"
    assert "  others:  model=vit: default 192, values per patch; ViT-B/16 has 768" in said
    assert said[-2:] == [
        "  choose:  model=gpt, or another option that has the key",
        "  type:    model.width=256",
    ]
    chosen = help_of(tmp_path, "--help", "model.width", "model=vit").splitlines()
    assert chosen[0] == "model.width=192"  # the chosen option first
    assert "  others:  model=gpt: default 128, values per token" in chosen
    assert not any(line.startswith("  choose:") for line in chosen)
    rates = help_of(tmp_path, "--help", "optimizer.lr")
    assert "  optimizer=adam, radam, rmsprop: default 0.001, learning rate\n" in rates


def test_help_says_what_ones_own_option_is_from_its_source_alone(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    own = tmp_path_factory.mktemp("own")
    (own / "my_models.py").write_text(OWN_CLASSES)
    for name in ("Said", "Silent", "made", "Absent"):
        (own / "model").mkdir(exist_ok=True)
        text = f"_target_: my_models.{name}\n"
        (own / "model" / f"own_{name.lower()}.yaml").write_text(text)
    given = ("--help", "model", "--config-dir", str(own))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(own))
        said = help_of(tmp_path, *given)
    for name, text in {
        "own_said": "Two convolutions, in one line.",
        "own_silent": "my_models.Silent",
        "own_made": "A function.",
        "own_absent": "my_models.Absent",
    }.items():
        assert re.search(rf"(?m)^  {name} +{re.escape(text)}$", said), said


OWN_CLASSES = """
raise RuntimeError("imported")


class Said:
    \'\'\'Two convolutions,
    in one line.

    More.
    \'\'\'


class Silent: ...


def made():
    "A function."
"""


def test_help_masks_a_secret(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "notes", "notes='password=abc123secret'")
    assert "abc123secret" not in said and "notes" in said
    said = help_of(tmp_path, "--help", "notes", "notes=abc123plain")
    assert "notes=abc123plain" in said  # the negative control


def test_help_of_an_unknown_word_is_one_line(tmp_path: Path) -> None:
    said = help_of(tmp_path, "--help", "optimiser", code=2)
    assert said == (
        "error: --help optimiser: there is no such group or key. Did you mean optimizer?\n"
    )


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_help_into_a_closed_pipe_prints_no_traceback(script: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -1` does, sooner or later
    command = [sys.executable, str(TRAIN.with_name(f"{script}.py")), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cfg", "job"], "lr: ${if_chosen:model,gpt,0.001,0.003}"),
        (["--help", "optimizer", "model.hidden"], "optimizer.lr=0.003"),
        (["optimizer.lrr=1"], "Did you mean optimizer.lr?"),
    ],
)
def test_help_job_config_and_a_misspelt_key_need_no_torch(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    code = (
        f"import sys, runpy; sys.path.insert(0, {str(TRAIN.parent)!r})\n"
        f"sys.argv = ['train.py', *{arguments!r}]\n"
        f"try: runpy.run_path({str(TRAIN)!r}, run_name='__main__')\n"
        f"finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert says in done.stdout + done.stderr
    assert done.stderr.strip().endswith("False")
    assert list(tmp_path.iterdir()) == []


NESTED = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.mkdir", "path": "made"}]}


def test_only_what_was_let_through_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "_allowed", set())
    made = instantiate(read_yaml(CONF / "scheduler" / "cosine.yaml"))
    assert callable(made)  # conf/ names it
    with pytest.raises(UserError, match=r"_target_=torch.nn.Sequential is named neither in conf/"):
        instantiate(NESTED)
    allow({"_target_": "torch.nn.Sequential"})
    with pytest.raises(UserError, match=r"_args_.0._target_=os.mkdir is named neither in conf/"):
        instantiate(NESTED)
    assert not Path("made").exists()
    made = instantiate({**NESTED, "_args_": []})
    assert type(made).__name__ == "Sequential"


def test_the_call_itself_refuses_a_foreign_target_in_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(targets, "_allowed", {"torch.nn.Sequential"})
    monkeypatch.setattr(targets, "refuse_unknown_targets", lambda node: None)
    with pytest.raises(UserError, match=r"os\.mkdir"):
        instantiate(NESTED)
    assert not Path("made").exists()


def test_a_command_line_lets_its_own_targets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_allowed", set())
    config = composed("model._target_=torch.nn.Identity")
    assert not is_allowed("torch.nn.Identity")
    check(config, config.hydra.runtime.choices)
    assert is_allowed("torch.nn.Identity") and not is_allowed("os.mkdir")


def test_the_schemas_know_the_further_arguments_of_every_shipped_torch_target() -> None:
    shipped = {target for target in shipped_targets() if target.startswith("torch.optim.")}
    assert {*OF_TORCH} == shipped


@pytest.mark.slow
def test_a_check_and_a_run_whose_reader_goes_away_end_well(tmp_path: Path) -> None:
    run = (
        "data=synthetic",
        "trainer.max_steps=2",
        "trainer.progress_bar=false",
        "hydra.run.dir=run",
    )
    for arguments in ((*run, "--check"), run):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, str(TRAIN), *arguments, "trainer.device=cpu"]
        done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        # matplotlib may log, through Hydra, that it looks for fonts for the first time.
        assert done.returncode == 0 and b"error: " not in done.stderr, done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "completed"
    assert "nothing reads the output any more" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize("place", ["pipe", "/dev/full"])
def test_a_line_that_cannot_be_shown_ends_no_run(place: str) -> None:
    code = (
        "import logging; from regrow.runs.console import console; log = logging.getLogger('regrow')"
        "\nwith console():\n for _ in range(2): log.info('x' * 99_999); log.warning('x' * 99_999)"
    )
    if place == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(place, os.O_WRONLY)
    command = [sys.executable, "-u", "-c", code]  # as ranks are started, so that nothing is kept
    done = subprocess.run(command, stdout=writer, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
