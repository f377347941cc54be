"""docs/start.md and docs/coming_from.md work as printed."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from finished import script
from hydra.core.override_parser.overrides_parser import OverridesParser
from test_recipes import BLOCK, follow, striped

from regrow.project import ROOT

DOCS = ROOT / "docs"
PEERS = ROOT / "build" / "peers"
needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
LABELS = ("lightning-hydra-template", "Lightning", "Trainer", "Accelerate", "a script")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def tracked(folder: Path) -> Path:
    """Copy what git tracks, with a .venv that `make setup` finds complete."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():  # not one that was just removed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    venv.create(folder / ".venv", symlinks=True)
    (site,) = (folder / ".venv" / "lib").glob("python*/site-packages")
    packages = [path for path in sys.path if path.endswith("-packages")]
    (site / "these.pth").write_text("\n".join([str(folder / "src"), *packages]) + "\n")
    set_up = script("set_up")
    facts = set_up.wanted() | {"place": str(folder), "lock": "yes"}
    (folder / ".venv" / set_up.STAMP.name).write_text(json.dumps(facts))
    return folder


def as_a_user(folder: Path) -> Path:
    """Put the environment's `python` on the path that `follow` gives, as activating it does."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(str(folder))}/.venv/bin/python "$@"\n')
    python.chmod(0o755)
    return folder


@needs_git
@pytest.mark.slow
def test_the_first_five_minutes_are_as_printed(tmp_path: Path) -> None:
    project = as_a_user(tracked(tmp_path / "project"))
    said = follow(page("start.md"), project)
    assert "set-up" not in said  # the real one is the next test's
    assert "identical" in said and "±" in said
    assert (project / "outputs/digits/latest/report.html").is_file()
    assert (tmp_path / "my_project" / "src" / "my_project" / "loop.py").is_file()


@needs_git
@pytest.mark.slow
@pytest.mark.nightly
def test_the_first_five_minutes_work_in_a_fresh_clone(tmp_path: Path) -> None:
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "--quiet", ROOT, project], check=True)
    said = follow(page("start.md"), as_a_user(project))
    assert "set-up: complete" in said and "identical" in said


@needs_git
@pytest.mark.slow
def test_a_model_on_a_folder_of_images_works_as_the_readme_prints_it(tmp_path: Path) -> None:
    project = as_a_user(tracked(tmp_path / "project"))
    striped(project)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your model on your images")[2].partition("\n## ")[0]
    said = follow(section, project)
    assert "60 predictions" in said
    run = project / "outputs/image_folder/latest"
    assert json.loads((run / "summary.json").read_text())["test"]["test/accuracy"] > 0.8
    assert (run / "report.html").is_file()
    with (project / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["input", "prediction", "probability/cat", "probability/dog"]
    assert sum(Path(row["input"]).name.startswith(row["prediction"]) for row in rows) > 48


def test_the_refusal_that_the_first_page_shows_is_that_of_the_command() -> None:
    (shown,) = re.findall(r"```console\n\$ python (.*)\n(.*)\n```", page("start.md"))
    done = subprocess.run(
        [sys.executable, *shown[0].split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.strip()) == (2, shown[1])


def test_an_edit_that_a_page_shows_fits_the_file(tmp_path: Path) -> None:
    (edit,) = [content for kind, content in BLOCK.findall(page("coming_from.md")) if kind == "diff"]
    for diff, fits in ((edit, True), (edit.replace("float(result", "float(no_result"), False)):
        (tmp_path / "src" / "lab").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "src" / "lab" / "loop.py", tmp_path / "src" / "lab")
        done = subprocess.run(
            ["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, stderr=subprocess.PIPE
        )
        assert (done.returncode == 0) is fits, done.stderr
        if fits:
            compile((tmp_path / "src" / "lab" / "loop.py").read_text(), "loop.py", "exec")


@needs_git
@pytest.mark.slow
@pytest.mark.nightly
def test_our_side_of_each_comparison_is_as_printed(tmp_path: Path) -> None:
    project = as_a_user(tracked(tmp_path / "project"))
    # This machine's settings make the runs short.
    short = "# @package _global_\ntrainer: {max_epochs: 2, device: cpu}\n"
    (project / "conf" / "local" / "default.yaml").write_text(short)
    follow(page("coming_from.md"), project)


def snippets_of(text: str, kinds: tuple[str, ...] = ("python", "shell")) -> dict[str, list[str]]:
    """Return the snippets of other engines by label."""
    found: dict[str, list[str]] = {label: [] for label in LABELS}
    for kind, content in BLOCK.findall(text):
        if kind in kinds:
            parts = re.split(r"^# (.*)\n", content, flags=re.MULTILINE)
            assert not parts[0].strip(), content
            for label, snippet in zip(parts[1::2], parts[2::2], strict=True):
                found[label].append(snippet)
    return found


def test_each_of_ten_tasks_is_shown_for_each_engine() -> None:
    text = page("coming_from.md")
    sections = text.split("\n## ")
    tasks = [section for section in sections if "```bash" in section]
    assert len(tasks) == 10 and len(sections) == 14  # the rest: title, two of terms, differences
    for task in tasks:
        assert all(len(snippets) == 1 for snippets in snippets_of(task).values()), task


def test_the_commands_of_other_engines_are_well_formed() -> None:
    """Only the grammar of overrides, and the options of torchrun, can be checked without them."""
    from torch.distributed.run import get_args_parser

    commands = [
        shlex.split(line)
        for snippets in snippets_of(page("coming_from.md"), ("shell",)).values()
        for line in "".join(snippets).splitlines()
        if line
    ]
    parser = OverridesParser.create()
    for words in commands:
        if words[0] == "python":
            assert words[1] == "src/train.py"
            parser.parse_overrides([word for word in words[2:] if word != "-m"])
        elif words[0] == "torchrun":
            assert get_args_parser().parse_args(words[1:]).training_script == "train.py"
        else:
            assert words[:2] == ["accelerate", "launch"]
            if importlib.util.find_spec("accelerate"):
                from accelerate.commands.launch import launch_command_parser

                assert launch_command_parser().parse_args(words[2:]).num_processes == 2


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("label", LABELS)
def test_the_snippets_of_other_engines_run(label: str) -> None:
    package = {
        "lightning-hydra-template": "lightning",
        "Lightning": "lightning",
        "Trainer": "transformers",
        "Accelerate": "accelerate",
    }
    if label in package and not (
        (PEERS / package[label]).is_dir() or importlib.util.find_spec(package[label])
    ):
        pytest.skip("make peers installs it")
    snippets = snippets_of(page("coming_from.md"), ("python",))[label]
    ran = run_snippets(label, snippets)
    assert ran.returncode == 0, ran.stderr[-3000:]
    if label == "Lightning":
        wrong = run_snippets(label, [*snippets, "Trainer(accumulate_gradients=4)\n"])
        assert "accumulate_gradients" in wrong.stderr and wrong.returncode == 1


def run_snippets(label: str, snippets: list[str]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{PEERS}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "others.py"), label], env=environment, text=True,
        input=json.dumps(snippets), capture_output=True, check=False, timeout=600,
    )  # fmt: skip
