"""Each command of the README's list is accepted: run as printed, or planned where it is long.

`train.py` gets `--check`, which composes the config, makes the objects and measures a micro-batch.
A command with `-m` has all its jobs composed and checked. Every other script does what is printed,
on small data. `MORE` lists what a command gets besides, and why.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from finished import finished
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from PIL import Image
from test_recipes import striped

from regrow.config.hydra_access import version_arguments
from regrow.config.targets import instantiate
from regrow.errors import UserError
from regrow.project import CONF, ROOT
from regrow.sweep import planning, search
from regrow.sweep.composed import Composed

SMALL = ["data.input_shape=[3,32,32]"]  # a ResNet-18 takes seconds for a step of 224 × 224
HERE = ["trainer.device=cpu"]  # this machine may lack a GPU
MORE = {
    # CIFAR-10 is not bundled, and a test must not download it: random images of its shape. wandb
    # would ask for an account.
    "data=cifar10": [
        *HERE, "data.source._target_=photographs.cifar10", "logger.wandb.mode=offline",
        "data.batch_size=8",
    ],
    "data=image_folder": SMALL,
    "data=resized_folder": [*SMALL, "data.source.resize=40"],
    "data=mask_folder": ["data.input_shape=[3,32,32]", "data.batch_size=4"],
    "launcher=slurm": HERE,
    "task=language": ["data.batch_size=2"],
    "scripts/find_lr.py": ["find_lr.num_steps=20", "trainer.num_threads=1"],
}  # fmt: skip


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## What you type")[2].split("```")[1]
    lines = block.replace("\\\n", " ").strip().splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines]


def test_the_readme_names_every_config_group() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (named,) = re.findall(r"^conf/ +the config groups: ([\w,\s]+?)$\n(?=scripts/)", text, re.M)
    groups = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}
    assert {*re.findall(r"\w+", named)} == groups - {"local"}  # which git ignores


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and the runs that the commands name."""
    folder = tmp_path_factory.mktemp("printed") / "here"
    folder.mkdir()
    striped(folder)
    draws = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / "masked" / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = draws.integers(0, 2, (40, 40) + (3,) * (name == "images"), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"masked/photos/{name}/{number}.png")
    (folder / "images").mkdir()
    for number in range(2):
        pixels = draws.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{number}.png")
    rows = [
        f"{','.join(f'{x:.3f}' for x in draws.normal(size=5))},{n},{'abc'[n % 3]}"
        for n in range(60)
    ]
    for target, column in (("price", 5), ("kind", 6)):
        (folder / target).mkdir()
        table = [",".join([*row.split(",")[:5], row.split(",")[column]]) for row in rows]
        header = f"length,width,height,age,weight,{target}"
        (folder / target / "mine.csv").write_text("\n".join([header, *table]) + "\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        finished(folder / "outputs/digits/one", "trainer.max_steps=null", "trainer.max_epochs=1")
        small = ("data.input_shape=[16]", "model.layers=1", "data.batch_size=8")
        finished(
            folder / "outputs" / "text" / "one", "task=language", "data=text", "model=gpt", *small
        )
    finally:
        os.chdir(before)
    return folder


def ran(place: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    paths = forked.python_path(ROOT / "src", ROOT / "tests")
    return forked.run(
        [sys.executable, str(ROOT / words[0]), *words[1:]], cwd=place, check=False, text=True,
        env=kept | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def matches(folder: Path, word: str) -> list[str]:
    """Return what a shell in `folder` makes of a word."""
    return [str(path) for path in folder.glob(word)] if "*" in word else [word]


def planned(place: Path, overrides: list[str]) -> int:
    """Compose and check each job of a sweep, or one trial of a search. Return their number."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **version_arguments()):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", overrides, run_mode=RunMode.MULTIRUN)
        composer = planning.Composer(Composed(loader, config), place)
        if any(line.startswith("sweep=") for line in overrides):
            options = instantiate(config.sweep)
            of_jobs = [line for line in overrides if not line.startswith("sweep")]
            space = search.space_of(composer, options, of_jobs)
            assert search.representative(composer, space)
            return int(options.n_trials)
        return len(planning.numbered(composer, planning.grid(loader, overrides), []))


def expanded(command: str) -> list[str]:
    """Return the overrides that bash or zsh would expand or refuse: brackets outside of quotes."""
    outside = re.sub(r"'[^']*'|\"[^\"]*\"", "", command.partition("  #")[0])
    return re.findall(r"\S*\w=\S*[][(){}*?]\S*", outside)


def test_no_shell_expands_a_printed_command() -> None:
    """zsh refuses data.input_shape=[5], as a pattern that matches no file."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/recipes").iterdir()]
    lines = [
        line
        for page in pages
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"(python|torchrun .*) scripts/", line)
    ]
    lines += re.findall(r"# .*: (-m .*)", (CONF / "sweep" / "optuna.yaml").read_text("utf-8"))
    assert len(lines) > 100
    assert not [word for line in lines for word in expanded(line)]
    found = expanded("python scripts/train.py a.b=[5] 'c=[5]' d=choice(1,2) \"e={f: 1}\"  # g=[1]")
    assert found == ["a.b=[5]", "d=choice(1,2)"]  # the control


@pytest.mark.parametrize("command", commands())
@pytest.mark.slow
def test_a_command_of_the_readme_is_accepted(command: str, place: Path) -> None:
    words = shlex.split(command)
    more = [word for part, extra in MORE.items() if part in words for word in extra]
    where = place / "masked" if "data=mask_folder" in words else place
    where = next((place / name for name in ("price", "kind") if f"[{name}]" in command), where)
    if words[0] == "make":
        update = subprocess.run(
            ["make", "-n", words[1], "FROM=there"], cwd=ROOT, capture_output=True, text=True
        )
        assert "scripts/update.py FROM='there'" in update.stdout.replace('"', "'"), update.stdout
        return
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        started = get_args_parser().parse_args(words[1:])
        assert started.nproc_per_node == "4"
        words = ["python", started.training_script, *started.training_script_args]
    if "-m" in words:
        words.remove("-m")
        assert planned(where, words[2:]) in (12, 50)
        return
    if words[1] == "scripts/export.py" and importlib.util.find_spec("onnxscript") is None:
        pytest.skip("make extras installs onnx")
    if words[1] == "scripts/train.py":
        more.append("--check")
    given = [each for word in words[1:] for each in matches(where, word)]
    done = ran(where, [*given, *more])
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout


def test_a_mistake_in_a_command_of_the_readme_is_found(place: Path) -> None:
    """The negative control."""
    assert ran(place, ["scripts/train.py", "optimizer=adamww", "--check"]).returncode == 2
    with pytest.raises(UserError, match="dropuot"):
        planned(place, ["model.dropuot=0,0.1"])
