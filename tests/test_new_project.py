"""scripts/new_project.py: a project holds what is its own, under its name, or is not created."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest
from test_recipes import blocks

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "new_project.py"


@pytest.fixture(scope="module")
def new_project() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))  # as Python does for a script
    spec = importlib.util.spec_from_file_location("new_project", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_project"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copy(new_project: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("projects") / "deep-fish"
    new_project.make_project("Deep Fish", folder)
    return folder


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts]


@pytest.mark.parametrize(
    ("name", "package", "distribution", "title"),
    [
        ("Deep Fish", "deep_fish", "deep-fish", "Deep Fish"),
        ("deep-fish", "deep_fish", "deep-fish", "Deep Fish"),
        ("deep_fish2", "deep_fish2", "deep-fish2", "Deep Fish2"),
        ("  MRI   study ", "mri_study", "mri-study", "MRI study"),
    ],
)
def test_a_name_is_given_all_its_forms(
    new_project: ModuleType, name: str, package: str, distribution: str, title: str
) -> None:
    names = new_project.names_of(name)
    assert (names.package, names.distribution, names.title) == (package, distribution, title)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "letters"),
        ("2fish", "letters"),
        ("fish!", "letters"),
        ("fïsh", "letters"),
        ("a/b", "letters"),
        ("_fish", "letters"),
        ("class", "keyword"),
        ("match", "keyword"),
        ("json", "a module of Python"),
        ("Torch", "module named torch"),
        ("hydra", "module named hydra"),
        ("scikit-learn", "module named scikit_learn"),
        ("tests", "folder"),
        ("train", "named train"),
        ("running", "script or module"),  # of the tests, which import one another
        ("regrow", "folder"),
        ("lab", "folder"),
    ],
)
def test_a_name_that_cannot_be_a_package_is_refused_in_one_line(
    name: str, why: str, tmp_path: Path
) -> None:
    if name == "train" and not (ROOT / "scripts" / "train.py").exists():
        pytest.skip("no scripts/train.py")
    done = run_script(name, tmp_path / "copy")
    assert done.returncode == 2
    assert why in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tracked_module_in_the_root_is_copied(new_project: ModuleType, tmp_path: Path) -> None:
    for name in ("mine.py", "conf/model/mine.yaml", "photos/cat.py", "scripts/new_project.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert new_project.files_to_copy(tmp_path) == ["conf/model/mine.yaml", "mine.py"]


@pytest.fixture
def template(new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small template that git tracks, with files that it does not track."""
    root = tmp_path / "a template"
    for name in ("pyproject.toml", "requirements.lock"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes((ROOT / name).read_bytes())
    write(root, {"src/lab/loop.py": "from lab import optim\n", "src/regrow/errors.py": ""})
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", "-C", root, *command], check=True)
    write(root, UNTRACKED | {"photos/a b.jpg": ""})
    monkeypatch.setattr(new_project, "ROOT", root)
    return root


UNTRACKED = {
    "conf/data/ü.yaml": "",
    "conf/model/mine.yaml": "_target_: lab.models.mine.Mine\n",
    "my models.py": "from lab import loop\n",
    "src/lab/models/mine.py": "",
}


def write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_nothing_is_written_without_the_users_own_untracked_code(
    new_project: ModuleType, template: Path, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_project.main(["class", "dest=~/copy"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    before = sorted(tmp_path.rglob("*"))
    assert new_project.main(["Deep Fish", "dest=~/copy"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"does not track {', '.join(sorted(UNTRACKED))}," in said
    assert "untracked=copy" in said and "untracked=leave" in said
    assert sorted(tmp_path.rglob("*")) == before

    command = re.findall("`(.*)`", said)[0]
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path)
    there = f"{tmp_path}/../{tmp_path.name}/copy"  # as ../copy, which is printed without dots
    assert new_project.main(["Deep Fish", f"dest={there}"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"cd {tmp_path}/copy && make test" in said.out
    assert "a .venv of its own there: 6 GB" in said.out
    holds_the_untracked(tmp_path / "copy")


def holds_the_untracked(copy: Path) -> None:
    target = (copy / "conf/model/mine.yaml").read_text()
    assert target == "_target_: deep_fish.models.mine.Mine\n"
    assert (copy / "my models.py").read_text() == "from deep_fish import loop\n"
    assert (copy / "conf/data/ü.yaml").exists()
    assert (copy / "src/deep_fish/models/mine.py").exists()
    assert not (copy / "photos").exists()


def test_the_command_that_follows_works_from_the_folder_that_became_the_project(
    new_project: ModuleType,
    template: Path,
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    assert new_project.main(["Deep Fish", ".", "untracked=leave"]) == 0
    command = re.findall(r"(cd .*) && make test", capsys.readouterr().out)[0]
    found = subprocess.run(f"{command} && ls", shell=True, capture_output=True, text=True)
    assert "README.md" in found.stdout, found.stderr


def test_untracked_code_is_taken_along_or_left_as_asked(
    new_project: ModuleType, template: Path, tmp_path: Path, capsys: Any
) -> None:
    copied, left = tmp_path / "copied", tmp_path / "left"
    assert new_project.main(["Deep Fish", str(copied), "untracked=copy"]) == 0
    assert capsys.readouterr().err == ""
    holds_the_untracked(copied)
    assert new_project.main(["Deep Fish", str(left), "untracked=leave"]) == 0
    told, way, end = capsys.readouterr().err.split("\n")
    assert told == f"not copied, as git does not track them: {', '.join(sorted(UNTRACKED))}"
    assert f"remove {left} and" in way and way.endswith("untracked=copy") and end == ""
    assert not (left / "conf").exists()
    assert new_project.main(["Deep Fish", str(tmp_path / "other"), "untracked=maybe"]) == 2
    assert "untracked must be one of refuse, copy, leave" in capsys.readouterr().err
    assert new_project.main(["--help"]) == 0
    assert "untracked=…" in capsys.readouterr().out


def test_untracked_files_that_are_not_code_do_not_stop_a_new_project(
    new_project: ModuleType, template: Path, tmp_path: Path, capsys: Any
) -> None:
    for name in UNTRACKED:
        (template / name).unlink()
    write(template, dict.fromkeys(("data/x.csv", "outputs/digits/a/train.log", "b.jpg"), ""))
    write(template, dict.fromkeys(("src/lab/__pycache__/loop.pyc", "conf/notes.txt"), ""))
    write(template, dict.fromkeys(("src/lab/a.npy", "notes/a.py", "conf/local/me.yaml"), ""))
    (template / "src/lab/loop.py").write_text("changed = 1\n")  # tracked, and not committed
    assert new_project.main(["Deep Fish", str(tmp_path / "copy")]) == 0
    assert "not copied, as git does not track them: conf/notes.txt, src/lab/a.npy\n" in (
        capsys.readouterr().err
    )
    assert (tmp_path / "copy/src/deep_fish/loop.py").read_text() == "changed = 1\n"
    record = json.loads((tmp_path / "copy/.template/record.json").read_text())
    assert record["commit"].endswith(" with changes")


def test_an_interruption_is_one_line_and_leaves_nothing(
    new_project: ModuleType, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(new_project, "write_archive", stopped)
    assert new_project.main(["Deep Fish", str(tmp_path / "copy"), "untracked=leave"]) == 130
    assert capsys.readouterr().err == "new_project: stopped. Nothing was written.\n"
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(new_project.update, "update", stopped)
    assert new_project.update.main(["FROM=x"]) == 130
    assert capsys.readouterr().err == "update: stopped. Nothing was changed.\n"


def test_an_update_takes_the_template_without_untracked_files(
    new_project: ModuleType, template: Path, tmp_path: Path
) -> None:
    assert new_project.main(["Deep Fish", str(tmp_path / "copy"), "files_only=true"]) == 0
    assert not (tmp_path / "copy/conf").exists()


def test_a_folder_that_git_does_not_track_is_copied_whole(
    new_project: ModuleType, template: Path, tmp_path: Path, capsys: Any
) -> None:
    shutil.rmtree(template / ".git")
    subprocess.run(["git", "-C", template, "init", "-q"], check=True)
    assert new_project.main(["Deep Fish", str(tmp_path / "copy")]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "copy" / "src/deep_fish/models/mine.py").exists()


def test_a_module_in_the_root_keeps_its_name(
    new_project: ModuleType, template: Path, tmp_path: Path
) -> None:
    write(template, {"shells.py": ""})
    with pytest.raises(new_project.Refused, match="module of this repository named shells"):
        new_project.make_project("Shells", tmp_path / "copy")


def test_arguments_without_a_key_are_those_that_are_missing(new_project: ModuleType) -> None:
    both = {"name": "Foo", "dest": "../foo", "files_only": "false", "untracked": "refuse"}
    for given in (["Foo", "../foo"], ["name=Foo", "../foo"], ["../foo", "name=Foo"],
                  ["dest=../foo", "Foo"]):  # fmt: skip
        assert new_project.parse(given) == both
    for given in (["name=Foo", "../foo", "more"], ["Foo", "--dest"], ["name=Foo"]):
        with pytest.raises(new_project.Refused):
            new_project.parse(given)


def test_a_folder_that_holds_something_is_refused_and_left_alone(
    new_project: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(new_project.Refused, match="not empty"):
        new_project.make_project("Deep Fish", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(new_project.Refused, match="a file of this name exists"):
        new_project.make_project("Deep Fish", tmp_path / "thesis.txt")


def test_a_copy_inside_the_repository_is_refused(new_project: ModuleType) -> None:
    with pytest.raises(new_project.Refused, match="inside this repository"):
        new_project.make_project("Deep Fish", ROOT / "outputs" / "copy")
    assert not (ROOT / "outputs" / "copy").exists()


def test_nothing_is_left_of_a_copy_that_fails(
    new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(new_project, "write_archive", no_space)  # after the files were copied
    with pytest.raises(OSError, match="No space"):
        new_project.make_project("Deep Fish", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_the_module_is_renamed_and_the_word_stays(new_project: ModuleType) -> None:
    names = new_project.Names(title="Deep Fish", package="deep_fish")
    text = """
from lab import loop
    import lab
from regrow.runs.lab import lab
_target_: lab.models.mlp.MLP
lab: lab
f"lab.{name}" src/lab/loop.py ROOT / "src" / "lab"
the lab. A lab note; label.x lab-book my.lab.x config["lab"] regrow.x
"""
    assert (
        new_project.rename(text, names)
        == """
from deep_fish import loop
    import deep_fish
from regrow.runs.lab import lab
_target_: deep_fish.models.mlp.MLP
lab: deep_fish
f"deep_fish.{name}" src/deep_fish/loop.py ROOT / "src" / "deep_fish"
the lab. A lab note; label.x lab-book my.lab.x config["lab"] regrow.x
"""
    )


def test_parts_for_the_template_alone_are_removed(new_project: ModuleType) -> None:
    names = new_project.Names(title="Deep Fish", package="deep_fish")
    text = "a\n  # >>> template only\n  b\n  # <<< template only\nc\n"
    assert new_project.rename(text, names) == "a\nc\n"
    assert new_project.rename(text + text, names) == "a\nc\n" * 2


def test_no_import_or_target_of_the_lab_remains(copy: Path, new_project: ModuleType) -> None:
    old = re.compile(r"from lab\b|^ *import lab\b|(?<![\w./])lab\.[a-z]|src/lab\b|template only")
    mentions = []
    for path in files(copy):
        is_engine = path.relative_to(copy).as_posix().startswith(new_project.ENGINE)
        if not is_engine and b"\0" not in path.read_bytes():
            lines = path.read_text(encoding="utf-8").splitlines()
            mentions += [f"{path.name}: {line}" for line in lines if old.search(line)]
    assert not mentions
    sources = (ROOT / "src" / "lab").rglob("*.py")
    assert any(old.search(path.read_text()) for path in sources)  # the control


def test_the_engine_is_copied_unchanged(copy: Path, new_project: ModuleType) -> None:
    for part in new_project.ENGINE:
        names = new_project.update.files_in(copy, part)
        assert names
        for name in names:
            assert (copy / name).read_bytes() == (ROOT / name).read_bytes()


def test_a_project_holds_nothing_that_concerns_the_template_alone(copy: Path) -> None:
    inside = {path.relative_to(copy).as_posix() for path in files(copy)}
    for name in (
        *("CHANGELOG.md", "AGENTS.md", "CONTRIBUTING.md", "CITATION.cff", "src/lab"),
        *("docs/decisions.md", "docs/README.md", "docs/versions.md", "docs/keys.md"),
        *("docs/site", "docs/images", ".github/notes.py", ".github/workflows/release.yml"),
    ):
        assert (ROOT / name).exists() and not (copy / name).exists(), name
    for part in (
        "benchmarks/",
        "tests/mut",
        "tests/older",
        "tests/test_new_project",
        "tests/sweep",
    ):
        assert not [name for name in inside if name.startswith(part)]
    for part in ("conf/train.yaml", "scripts/update.py", "tests/engine/", "src/deep_fish/loop.py"):
        assert [name for name in inside if name.startswith(part)], part
    makefile = (copy / "Makefile").read_text()
    assert "benchmarks" not in makefile and "\nupdate:" in makefile
    assert not [word for word in ("docs/site", "\nsite:", "workflows") if word in makefile]
    assert "make site" not in (copy / ".github/workflows/ci.yml").read_text()
    assert "workflows" not in (copy / ".ci/run").read_text()
    for name in (".devcontainer/devcontainer.json", ".github/dependabot.yml"):
        assert (copy / name).is_file()  # as useful in a project
    for page in (copy / "docs").rglob("*.md"):
        assert "benchmarks/RESULTS.md" not in page.read_text(), page


def test_a_project_carries_its_name_and_its_origin(copy: Path) -> None:
    assert 'name = "deep-fish"\nversion = "0.1.0"' in (copy / "pyproject.toml").read_text()
    assert (copy / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    lock = (copy / "requirements.lock").read_text()
    assert lock == (ROOT / "requirements.lock").read_text()
    record = json.loads((copy / ".template" / "record.json").read_text())
    assert record["template"] == "Regrow" and record["package"] == "deep_fish"
    readme = (copy / "README.md").read_text()
    assert readme.startswith("# Deep Fish\n") and 30 < readme.count("\n") <= 45
    for needed in ("make setup", "make train", "your_images.md", "data.root=photos", "make update"):
        assert needed in readme
    start = "# Your model on your images\n"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(start)[2].partition("\n## ")[0]
    set_up, page = "make setup\nsource .venv/bin/activate\n", copy / "docs" / "your_images.md"
    own = page.read_text(encoding="utf-8")
    assert own.startswith(start) and set_up in section
    assert own == start + section.rstrip().replace(set_up, "").replace("](docs/", "](") + "\n"
    for link in re.findall(r"\]\((\w[^)#:]*)", own):
        assert (page.parent / link).exists(), link
    commands = (copy / "docs" / "commands.md").read_text(encoding="utf-8")
    titles = re.findall("(?m)^## (.*)$", commands)
    assert titles[0] == "What you type" and {"A run's folder", "Restoring", "Sweeps"} < {*titles}
    assert "`src/deep_fish/loop.py`" in commands and "new_project.py" not in commands
    assert f"Regrow {record['version']}, commit {record['commit']}" in readme
    for link in re.findall(r"\]\((\w[^)#:]*)", readme):
        assert (copy / link).exists(), link


def broken_links(page: Path) -> list[str]:
    """Return the links of a Markdown page that lead to no file, or to no heading of one."""

    def prose(path: Path) -> str:
        text = path.read_text(encoding="utf-8")
        return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)

    found = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        there = target.exists()
        if there and anchor:
            headings = re.findall(r"^#+ (.*)$", prose(target), re.MULTILINE)
            words = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
            there = anchor in [each.replace(" ", "-") for each in words]
        if not there:
            found.append(f"{page.name}: {link}")
    return found


def test_every_link_of_a_projects_pages_leads_to_a_file_or_a_heading_of_it(
    copy: Path, tmp_path: Path
) -> None:
    pages = [copy / "README.md", *(copy / "docs").rglob("*.md")]
    assert len(pages) > 30
    assert not [link for page in pages for link in broken_links(page)]
    page = tmp_path / "a.md"  # the control
    page.write_text("# Not here\n[a](b.md) [c](#not-here) [d](a.md#nor-here) `[e](f.md)`\n")
    assert broken_links(page) == ["a.md: b.md", "a.md: a.md#nor-here"]


def test_a_project_passes_its_own_checks(copy: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = run(copy, dict(os.environ), "-m", "ruff", *command, "--no-cache", ".")
        assert done.returncode == 0, done.stdout
    (copy / "src/deep_fish/wrong.py").write_text("import os\n")
    done = run(copy, dict(os.environ), "-m", "ruff", "check", "--no-cache", ".")
    (copy / "src/deep_fish/wrong.py").unlink()
    assert done.returncode == 1  # the control


def test_the_archive_holds_what_later_updates_are_merged_against(copy: Path) -> None:
    with tarfile.open(copy / ".template" / "base.tar.gz") as archive:
        names = set(archive.getnames())
        stored = archive.extractfile("conf/train.yaml")
        assert stored is not None
        assert stored.read() == (copy / "conf/train.yaml").read_bytes()
    assert {"Makefile", "requirements.txt", ".ci/run", "scripts/update.py"} <= names
    assert not [name for name in names if name.startswith(("src/regrow/", ".template/"))]


def test_runs_environment_and_history_stay_behind(copy: Path) -> None:
    assert not (copy / ".venv").exists()
    outputs = copy / "outputs"
    assert not outputs.exists() or {p.name for p in outputs.iterdir()} <= {"README.md", ".gitkeep"}
    assert not list(copy.rglob("__pycache__"))
    assert os.access(copy / ".ci" / "run", os.X_OK)
    assert not list(copy.parent.glob(".deep-fish*"))


def test_the_schemas_of_a_project_name_the_users_own_options(
    copy: Path, new_project: ModuleType, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(copy, own, ignore=shutil.ignore_patterns(".git", "outputs"))
    (own / "conf/model/mine.yaml").write_text("_target_: my_models.Mine\nown_width: 7\n")
    before = (ROOT / "schemas/model.json").read_bytes()
    new_project.write_schemas(own)
    schema = (own / "schemas/model.json").read_text(encoding="utf-8")
    assert "own_width" in schema and "own_width" not in before.decode()
    assert (ROOT / "schemas/model.json").read_bytes() == before


@pytest.mark.slow
def test_a_copy_starts_with_one_commit_or_says_why_not(tmp_path: Path) -> None:
    someone = {
        f"GIT_{who}_{what}": "a@b.c"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = run_script("Deep Fish", tmp_path / "one", **someone)
    assert done.returncode == 0 and "one commit on main" in done.stdout
    log = subprocess.run(
        ["git", "-C", tmp_path / "one", "log", "--format=%s"], capture_output=True, text=True
    )
    assert log.stdout.count("\n") == 1
    status = ["git", "-C", tmp_path / "one", "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, text=True).stdout == ""

    nobody = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "user.useConfigOnly",
        "GIT_CONFIG_VALUE_0": "true",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }
    done = run_script("Deep Fish", tmp_path / "two", **nobody)
    assert done.returncode == 0 and "could not commit" in done.stdout
    assert (tmp_path / "two" / "pyproject.toml").exists()


@pytest.mark.slow
def test_without_git_the_same_files_are_found(
    new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "template"
    for name in new_project.files_to_copy(ROOT):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    left_out = ("src/.DS_Store", "conf/a.pyc", "conf/local/default.yaml", "outputs/run/x", ".env")
    left_out += ("notes/draft.py", "benchmarks/more.py")  # the first is in no package
    own = ["my_models/__init__.py", "my_models/labels.json", "my_models/nets/small.py"]
    own += ["src/lab/my_cache.py"]
    for name in (*left_out, "src/.ruff_cache/x", *own):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    monkeypatch.setattr(new_project, "git", lambda *arguments: None)
    expected = [*new_project.files_to_copy(ROOT), *own]
    assert new_project.files_to_copy(root) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [("--one-of-each",), pytest.param((), marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_the_tests_and_the_main_script_of_a_project_pass_beside_untracked_files(
    chosen: tuple[str, ...], new_project: ModuleType, tmp_path: Path
) -> None:
    """In one folder, so that both pytest and the runs meet the untracked files."""
    copy = tmp_path / "ocean"
    new_project.make_project("Ocean Study", copy)
    for name in ("scratch.py", "conf/model/wip.yaml", "src/ocean_study/wip.py", "notes/a.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("unfinished: [\n")
    environment = os.environ | {"PYTHONPATH": forked.python_path(copy / "src")}
    trained = run(copy, environment, "scripts/train.py", "trainer.max_epochs=1")
    assert trained.returncode == 0, trained.stderr
    assert (copy / "outputs/digits/latest/summary.json").exists()
    tests = run(
        *(copy, environment, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *chosen)
    )
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout


# A model, tasks and data sets that the lab's own tests use, and the examples.
DELETED = """
    src/ocean_study/examples src/ocean_study/models/unet.py src/ocean_study/models/whitened_cnn.py
    conf/model/unet.yaml conf/model/whitened_cnn.yaml conf/data/mnist.yaml conf/data/cifar10.yaml
    conf/experiment/cifar10_fast.yaml conf/experiment/digit_scenes.yaml
    conf/task/segmentation.yaml conf/loss/for_segmentation.yaml tests/tasks/test_segmentation.py
"""
SLOWER = """# @package _global_
# conf/experiment/slower.yaml
defaults:
  - override /optimizer: adamw
  - _self_

optimizer:
  lr: 2e-3
"""


@pytest.mark.slow
def test_the_tests_of_a_project_pass_with_the_files_of_recipes_and_without_deleted_parts(
    new_project: ModuleType, tmp_path: Path
) -> None:
    copy = tmp_path / "ocean"
    new_project.make_project("Ocean Study", copy)
    pages = [page.read_text() for page in (copy / "docs/recipes").glob("*.md")]
    for name, content in blocks("".join([*pages, f"```yaml\n{SLOWER}```\n"])):
        if name is not None and not name.startswith("conf/local/"):
            (copy / name).write_text(content)
    git = ["git", "-C", copy]
    subprocess.run([*git, "rm", "-rq", *DELETED.split()], check=True)
    new_project.write_schemas(copy)
    subprocess.run([*git, "add", "-A"], check=True)
    environment = os.environ | {"PYTHONPATH": forked.python_path(copy / "src")}
    of_conf = ("tests/test_nodes.py", "tests/test_schemas.py")
    for chosen in (of_conf, ("--one-of-each", "-m", "not slow", "-rs")):
        tests = run(copy, environment, "-m", "pytest", "-p", "no:cacheprovider", *chosen)
        assert tests.returncode == 0, tests.stdout[-4000:]
    for name in ("model/whitened_cnn", "data/mnist", "data/cifar10"):
        assert f"conf/{name}.yaml is not there" in tests.stdout


def run(
    folder: Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2700
    )


def run_script(
    name: str, destination: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return run(
        ROOT, os.environ | environment, str(SCRIPT), name, str(destination), "untracked=leave"
    )
