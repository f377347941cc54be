"""scripts/update.py: a project with edits of its own gets a newer engine, or stays as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regrow import __version__

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
ENVIRONMENT = os.environ | {
    f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
}
ENGINE, LOOP = Path("src/regrow/dotted.py"), Path("src/deep_fish/loop.py")
UNTRACKED = "?? scratch.txt\n"
MODEL, YAML = Path("src/deep_fish/models/mlp.py"), Path("conf/model/mlp.yaml")
SCHEMA = Path("schemas/model.json")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return done.stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--no-verify", "-m", message)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, f"{path} holds no {old!r}"
    path.write_text(text.replace(old, new, 1))


def script(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / "scripts" / f"{name}.py"), *arguments],
        cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the template as it is here, and a project begun from it."""
    folder = tmp_path_factory.mktemp("made")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"],
        capture_output=True, text=True, check=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/older/", "benchmarks/")):
            (folder / "template" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "template" / name)
    git(folder, "init", "-q", "template")
    commit(folder / "template", "The template")
    done = script(folder / "template", "new_project", "Deep Fish", str(folder / "project"))
    assert "one commit on main" in done.stdout, done.stderr
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    """A project with edits of its own in the loop, a model and a YAML file."""
    git(tmp_path, "clone", "-q", str(made / "project"), "project")
    folder = tmp_path / "project"
    edit(folder / LOOP, '"""', '"""My own loop. ')
    edit(folder / MODEL, '"""', '"""My own model. ')
    edit(folder / YAML, "dropout: 0.0", "dropout: 0.3")
    edit(folder / SCHEMA, '"default": 0.0', '"default": 0.3')  # as make schemas does
    (folder / "notes.txt").write_text("mine")
    edit(folder / "README.md", "# Deep Fish", "# The deepest fish")
    commit(folder, "My edits")
    (folder / "scratch.txt").write_text("untracked")
    return folder


@pytest.fixture
def template(made: Path, tmp_path: Path) -> Path:
    """A newer template: another engine, another default, a new option, a script less."""
    git(tmp_path, "clone", "-q", str(made / "template"), "template")
    folder = tmp_path / "template"
    edit(folder / ENGINE, "from __future__", "NEWER = True\nfrom __future__")
    (folder / "src/regrow/added.py").write_text('"""Added."""\n')
    (folder / "src/regrow/load.py").unlink()
    edit(folder / YAML, "activation: relu", "activation: gelu")
    edit(folder / SCHEMA, '"default": 0.0', '"default": 0.1')
    (folder / "conf/model/new.yaml").write_text("_target_: lab.models.mlp.MLP\n")
    (folder / "scripts/predict.py").unlink()
    edit(folder / "src/lab/models/mlp.py", "\nclass ", "\n# A change of the lab.\nclass ")
    edit(folder / "pyproject.toml", f'version = "{__version__}"', 'version = "9.0.0"')
    edit(
        folder / "CHANGELOG.md",
        "## [Unreleased]\n",
        "## [Unreleased]\n\n## [9.0.0] - soon\n\n- News.\n",
    )
    commit(folder, "A newer template")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths
        if "__pycache__" not in path.parts
    }


def assert_refused(project: Path, source: Path | str, *said: str, keep: str = "") -> None:
    before, status = contents(project), git(project, "status", "--porcelain")
    done = script(project, "update", f"FROM={source}", f"KEEP={keep}")
    assert done.returncode == 2, done.stdout
    for words in said:
        assert words in done.stderr, done.stderr
    assert "Nothing was changed." in done.stderr and "Traceback" not in done.stderr
    assert contents(project) == before and git(project, "status", "--porcelain") == status


def assert_updated(project: Path) -> None:
    assert "NEWER" in (project / ENGINE).read_text()
    assert (project / "src/regrow/added.py").exists()
    assert not (project / "src/regrow/load.py").exists()
    assert not (project / "scripts/predict.py").exists()
    assert '"default": 0.1' in (project / SCHEMA).read_text()  # the template's, not merged
    merged = (project / YAML).read_text()
    assert "dropout: 0.3" in merged and "activation: gelu" in merged
    assert "deep_fish.models.mlp.MLP" in (project / "conf/model/new.yaml").read_text()
    assert 'name = "deep-fish"\nversion = "0.1.0"' in (project / "pyproject.toml").read_text()
    assert json.loads((project / ".template/record.json").read_text())["version"] == "9.0.0"


@pytest.mark.slow
def test_an_update_keeps_every_edit_and_stages_the_rest(project: Path, template: Path) -> None:
    before = contents(project)
    done = script(project, "update", f"FROM={template}")
    assert done.returncode == 0, done.stderr
    assert_updated(project)
    after = contents(project)
    for name in (str(LOOP), str(MODEL), "README.md", "notes.txt", "scratch.txt"):
        assert after[name] == before[name]
    assert re.search(
        rf"Regrow {re.escape(__version__)} \(\w{{10}}\) → Regrow 9\.0\.0 \(\w{{10}}\)", done.stdout
    )
    assert "conf/model/mlp.yaml" in done.stdout and "- News." in done.stdout
    assert "Unreleased" not in done.stdout  # it is empty
    assert f"[{__version__}]" not in done.stdout  # no news
    staged = git(project, "status", "--porcelain").splitlines()
    assert [line for line in staged if line[1] != " "] == [UNTRACKED.strip()]
    assert git(project, "diff") == ""
    # The template's changes of the lab are offered, and apply to an edited file.
    commit(project, "Update")
    git(project, "apply", "-3", ".template/lab.patch")
    both = (project / MODEL).read_text()
    assert "My own model." in both and "# A change of the lab." in both


@pytest.mark.slow
def test_an_update_deletes_and_replaces_no_file_that_a_project_took_from_its_users_clone(
    made: Path, template: Path, tmp_path: Path
) -> None:
    mine = {
        "my_models.py": "WIDTH = 3\n",
        "my_package/__init__.py": "",
        "my_package/labels.json": "[]\n",
        "conf/model/mine.yaml": "_target_: my_models.Mine\n",
        "src/lab/models/mine.py": '"""Mine."""\n',
    }
    git(tmp_path, "clone", "-q", str(made / "template"), "clone")
    for name, text in mine.items():
        (tmp_path / "clone" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "clone" / name).write_text(text)
    commit(tmp_path / "clone", "My models")
    done = script(tmp_path / "clone", "new_project", "Deep Fish", str(tmp_path / "own"))
    assert done.returncode == 0, done.stderr
    (template / "my_package").mkdir()  # another user's clone
    (template / "my_package/__init__.py").write_text("THEIRS = True\n")
    commit(template, "Not mine")
    done = script(tmp_path / "own", "update", f"FROM={template}")
    assert done.returncode == 0, done.stderr
    assert "Deleted, as in the template: scripts/predict.py" in done.stdout  # the negative control
    assert not (tmp_path / "own/scripts/predict.py").exists()
    for name, text in mine.items():
        name = name.replace("src/lab", "src/deep_fish")
        assert (tmp_path / "own" / name).read_text() == text
    assert "mine.py" not in (tmp_path / "own/.template/lab.patch").read_text()


@pytest.mark.slow
def test_an_update_is_undone_by_a_reset(project: Path, template: Path) -> None:
    before = contents(project)
    assert script(project, "update", f"FROM={template}").returncode == 0
    assert contents(project) != before
    git(project, "reset", "-q", "--hard")
    assert contents(project) == before


@pytest.mark.nightly
@pytest.mark.slow
def test_a_second_update_changes_nothing(project: Path, template: Path) -> None:
    assert script(project, "update", f"FROM={template}").returncode == 0
    commit(project, "Update")
    before = contents(project)
    done = script(project, "update", f"FROM={template}")
    assert done.returncode == 0 and "up to date with Regrow 9.0.0" in done.stdout
    assert contents(project) == before and git(project, "diff", "HEAD") == ""


@pytest.mark.nightly
@pytest.mark.slow
def test_an_update_from_a_url_is_the_same(project: Path, template: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "-q", "--bare", "template", "bare.git")
    done = script(project, "update", f"FROM=file://{tmp_path / 'bare.git'}")
    assert done.returncode == 0, done.stderr
    assert_updated(project)
    git(project, "reset", "-q", "--hard")
    assert_refused(project, f"file://{tmp_path / 'nowhere.git'}", "neither a checkout nor a URL")


@pytest.mark.slow
def test_a_conflict_names_both_sides(project: Path, template: Path) -> None:
    edit(template / YAML, "dropout: 0.0", "dropout: 0.5")
    edit(template / "conf/model/cnn.yaml", "_target_", "# changed\n_target_")
    commit(template, "Another default")
    (project / "conf/model/cnn.yaml").unlink()
    commit(project, "Without the CNN")
    sides = ("yours: conf/model/mlp.yaml", "dropout: 0.3", f"Regrow {__version__}", "dropout: 0.0")
    sides += ("Regrow 9.0.0", "dropout: 0.5")
    lost = "conf/model/cnn.yaml: you deleted it, and the template changed it."
    assert_refused(project, template, *sides, lost)
    kept = "conf/model/mlp.yaml"
    assert_refused(project, template, lost, keep=kept)
    assert_refused(project, template, "the template has no conf/none.yaml", keep="conf/none.yaml")
    keep = f"KEEP={kept} conf/model/cnn.yaml"
    done = script(project, "update", f"FROM={template}", keep)
    assert done.returncode == 0, done.stderr
    assert "dropout: 0.3" in (project / YAML).read_text()
    assert not (project / "conf/model/cnn.yaml").exists()
    commit(project, "Update")  # and the question is settled
    edit(template / "Makefile", "ARGS =", "# newer\nARGS =")
    commit(template, "A newer Makefile")
    done = script(project, "update", f"FROM={template}")
    assert done.returncode == 0, done.stderr
    assert "dropout: 0.3" in (project / YAML).read_text()


@pytest.mark.parametrize("name", ["src/regrow/dotted.py", "src/hydra_plugins/regrow_sweeper.py"])
def test_an_edited_engine_is_refused(name: str, project: Path, template: Path) -> None:
    (project / name).write_text("# Mine.\n" + (project / name).read_text())
    commit(project, "Tweak the engine")
    assert_refused(
        project, template, f"the engine differs from Regrow {__version__}", "Tweak the engine"
    )


@pytest.mark.slow
def test_an_unclean_tree_is_refused(project: Path, template: Path) -> None:
    edit(project / LOOP, "My own loop.", "My own unfinished loop.")
    assert_refused(project, template, f"not committed: {LOOP}")
    git(project, "checkout", "-q", ".")
    (project / "src/regrow/scratch.py").write_text("")
    assert_refused(project, template, "git does not know", "src/regrow/scratch.py")
    (project / "src/regrow/scratch.py").unlink()
    (project / "conf/model/new.yaml").write_text("mine")
    assert_refused(project, template, "yours: conf/model/new.yaml\nmine\n")
    (project / "conf/model/new.yaml").unlink()
    (project / "docs/more").write_text("mine, where the template has a folder now")
    (template / "docs/more").mkdir()
    (template / "docs/more/hydra.md").write_text("")
    edit(template / "scripts/new_project.py", '"docs/hydra.md"', '"docs/"')
    commit(template, "A folder")
    assert_refused(project, template, "git does not know docs/more")


@pytest.mark.slow
def test_a_renamed_file_is_named_in_full_and_a_systems_file_is_not_an_edit(
    project: Path, template: Path
) -> None:
    (project / "src/regrow/.DS_Store").write_bytes(b"")  # ignored by git
    git(project, "mv", "notes.txt", "other.txt")
    said = "these changes are not committed: notes.txt, other.txt. Commit"
    assert_refused(project, template, said)
    commit(project, "Rename")
    assert script(project, "update", f"FROM={template}").returncode == 0


@pytest.mark.slow
def test_an_update_from_a_relative_bare_clone_in_an_older_python(
    project: Path, template: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", "--bare", "template", "bare.git")
    # Before 3.11.4, extractall took no filter.
    (tmp_path / "sitecustomize.py").write_text(
        "import tarfile\n"
        "del tarfile.data_filter\n"
        "now = tarfile.TarFile.extractall\n"
        "tarfile.TarFile.extractall = lambda self, path: now(self, path, filter='tar')\n"
    )
    done = subprocess.run(
        [sys.executable, "scripts/update.py", "FROM=../bare.git"],
        env=ENVIRONMENT | {"PYTHONPATH": str(tmp_path)},
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_updated(project)


@pytest.mark.slow
def test_another_version_of_the_protocols_is_refused(project: Path, template: Path) -> None:
    edit(template / "src/regrow/protocols.py", "VERSION = 1", "VERSION = 2")
    commit(template, "Other Protocols")
    said = "has version 2 of the Protocols between lab and engine, and this project has 1"
    assert_refused(project, template, said, f"as {template}/docs/migrations.md says")
    url = f"file://{template}"
    assert_refused(project, url, said, f"as docs/migrations.md in a clone of {url} says")
    assert script(project, "update", f"FROM={template}", "MIGRATED=3").returncode == 2
    assert script(project, "update", f"FROM={template}", "MIGRATED=2").returncode == 0


@pytest.mark.parametrize(
    "source",
    [
        *("https://github.com/ours/regrow.git", "https://github.com/ours/regrow/"),
        *("git@github.com:ours/regrow.git", "ssh://git@github.com/ours/regrow"),
    ],
)
def test_the_link_to_the_migrations_of_a_clone_url_opens(source: str) -> None:
    import finished  # imports torch

    link = "https://github.com/ours/regrow/blob/HEAD/docs/migrations.md"
    assert finished.script("update").note_of(source) == link


@pytest.mark.parametrize("arguments", [[], ["FROM="], ["from=x"], ["FROM=x", "--force"]])
def test_a_wrong_command_is_refused(arguments: list[str], project: Path) -> None:
    done = script(project, "update", *arguments)
    assert done.returncode == 2 and "give FROM=" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_older_template_and_other_folders_are_refused(
    project: Path, template: Path, made: Path, tmp_path: Path
) -> None:
    assert_refused(project, tmp_path, "neither a checkout nor a URL")
    assert_refused(project, project, "is not the template")
    assert script(project, "update", f"FROM={template}").returncode == 0
    commit(project, "Update")
    assert_refused(project, made / "template", "which is older than Regrow 9.0.0")
    done = script(made / "template", "update", f"FROM={template}")
    assert done.returncode == 2 and "did not make this project" in done.stderr


# A git that, at a call with the words AT, kills the update before or after it, or fails.
OTHER_GIT = """#!/bin/sh
case "$*" in *"$AT"*) found=$HOW;; esac
[ "$found" = fails ] && exit 1
[ "$found" = before ] && kill -9 $PPID && exit
"$REAL_GIT" "$@"
code=$?
[ "$found" = after ] && kill -9 $PPID
exit $code
"""


def update_with_other_git(
    project: Path, template: Path, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    (folder / "bin").mkdir()
    (folder / "bin/git").write_text(OTHER_GIT)
    (folder / "bin/git").chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "scripts/update.py", f"FROM={template}"],
        env=ENVIRONMENT | variables | {"REAL_GIT": shutil.which("git") or "", "PATH": path},
        cwd=project, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_an_update_that_cannot_be_written_leaves_everything_as_it_was(
    project: Path, template: Path, tmp_path: Path
) -> None:
    before = contents(project)
    done = update_with_other_git(project, template, tmp_path, AT="checkout-index", HOW="fails")
    assert done.returncode == 2 and "checkout-index" in done.stderr
    assert contents(project) == before and git(project, "status", "--porcelain") == UNTRACKED


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("at", ["write-tree", "read-tree -m", "checkout-index"])
def test_killed_at_any_instant_a_reset_goes_back(
    at: str, how: str, project: Path, template: Path, tmp_path: Path
) -> None:
    before = contents(project)
    done = update_with_other_git(project, template, tmp_path, AT=at, HOW=how)
    assert done.returncode == -9, done.stderr
    assert (contents(project) != before) == ((at, how) == ("checkout-index", "after"))
    git(project, "reset", "-q", "--hard")
    assert contents(project) == before and git(project, "status", "--porcelain") == UNTRACKED


@pytest.mark.slow
def test_an_updated_project_resumes_with_its_edits_on_the_newer_engine(
    project: Path, template: Path
) -> None:
    for name, words in ((LOOP, "my loop"), (MODEL, "my model")):
        (project / name).write_text((project / name).read_text() + f'\nprint("{words}")\n')
    commit(project, "Print my edits")
    edit(template / ENGINE, "NEWER = True\n", "")
    (template / ENGINE).write_text((template / ENGINE).read_text() + '\nprint("newer engine")\n')
    commit(template, "Print the engine")
    arguments = ("trainer.device=cpu", "hydra.run.dir=outputs/run")
    done = script(project, "train", *arguments, "trainer.max_epochs=1")
    assert done.returncode == 0, done.stderr
    assert "my loop" in done.stdout and "my model" in done.stdout
    assert "newer engine" not in done.stdout
    updated = script(project, "update", f"FROM={template}", "KEEP=conf/model/mlp.yaml")
    assert updated.returncode == 0, updated.stderr
    done = script(project, "train", "resume=outputs/run", "trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    for words in ("my loop", "my model", "newer engine"):
        assert words in done.stdout
    assert json.loads((project / "outputs/run/summary.json").read_text())["epochs"] == 2
    assert "dropout: 0.3" in (project / "outputs/run/config.yaml").read_text()
