"""The workflows, release notes, versions and the citation of the repository."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement

import regrow
from regrow.project import ROOT

GITHUB = ROOT / ".github"
TOOLS = ROOT / "build" / "site-tools"
PINNED = re.compile(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


@pytest.fixture
def notes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notes", GITHUB / "notes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_release_notes_are_the_section_of_the_version_with_each_item_on_a_line(
    notes: ModuleType,
) -> None:
    changelog = """# Changelog

## [1.1.0] - 2026-12-02

### Added

- One thing
  in two lines.
- Another.

A paragraph
of two lines.

  | a | b |
  | --- | --- |
  | 1 | 2 |

```
code
  stays
```

## [1.0.0] - 2026-12-01

- First.

[1.0.0]: https://a
"""
    assert notes.notes(changelog, "1.0.0") == "- First.\n"
    assert notes.notes(changelog, "1.1.0") == (
        "### Added\n\n- One thing in two lines.\n- Another.\n\nA paragraph of two lines.\n\n"
        "  | a | b |\n  | --- | --- |\n  | 1 | 2 |\n\n```\ncode\n  stays\n```\n"
    )
    assert notes.notes(changelog, "1.0") is None and notes.notes(changelog, "1.0.01") is None


def test_the_notes_of_a_version_that_the_changelog_lacks_are_an_error() -> None:
    for version, code in (("9.9.9", 1), (regrow.__version__, 0)):
        done = subprocess.run(
            [sys.executable, GITHUB / "notes.py", version], capture_output=True, text=True
        )
        assert done.returncode == code and bool(done.stdout) is (code == 0)


def test_one_version_stands_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (in_project,) = re.findall(r'^version = "(.*)"$', project, re.M)
    newest, date = re.findall(r"^## \[(\d.*)\] - (\S+)$", changelog, re.M)[0]
    assert in_project == newest == regrow.__version__ == citation["version"]
    assert str(citation["date-released"]) == date
    (holder,) = re.findall(r"^Copyright \(c\) \d+ (.*)$", (ROOT / "LICENSE").read_text(), re.M)
    assert [author["name"] for author in citation["authors"]] == [holder]


def test_the_lock_of_the_tools_has_a_hash_for_each_pin_and_names_no_index() -> None:
    folder = ROOT / "docs" / "site"
    text = (folder / "requirements.lock").read_text(encoding="utf-8")
    pins = re.split(r"^(?=\S+==)", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in pin for pin in pins) and "http" not in text
    ranges = (folder / "requirements.txt").read_text(encoding="utf-8")
    wanted = re.findall(r"^([a-z-]+)>=", ranges, re.M)
    assert len(wanted) == 3 and set(wanted) <= {pin.partition("==")[0] for pin in pins}


def test_the_lock_of_the_extras_has_a_hash_for_each_pin_of_each_extra_and_names_no_index() -> None:
    text = (ROOT / "requirements-extras.lock").read_text(encoding="utf-8")
    pins = re.split(r"^(?=\S+==)", text, flags=re.M)[1:]
    assert all("--hash=sha256:" in pin for pin in pins) and "://" not in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [it for its in project["optional-dependencies"].values() for it in its]
    wanted = {Requirement(it).name for it in extras}
    found = {pin.partition("==")[0]: pin.split()[0].partition("==")[2] for pin in pins}
    assert {"peft", "onnx", "mlflow-skinny", "s3fs"} <= wanted <= found.keys()
    for extra in extras:
        needed = Requirement(extra)
        assert needed.specifier.contains(found[needed.name])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--require-hashes -r requirements-extras.lock" in makefile
    assert "pyproject.toml --output-file requirements-extras.lock" in makefile


def steps(folder: Path) -> list[str]:
    """Return the lines of all workflows."""
    files = sorted(folder.glob("*.yml"))
    return [line for file in files for line in file.read_text(encoding="utf-8").split("\n")]


def test_every_action_is_pinned_to_a_commit() -> None:
    uses = [line for line in steps(GITHUB / "workflows") if "uses:" in line]
    assert len(uses) > 15 and all(PINNED.search(line) for line in uses)
    assert not PINNED.search("- uses: actions/checkout@v5")


def test_a_workflow_calls_targets_that_the_makefile_has() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    called = {
        word
        for line in steps(GITHUB / "workflows")
        for call in re.findall(r"run: make (?:-C \S+ )?(.*)", line)
        for word in call.split()
        if "=" not in word
    }
    assert {"site", "test-nightly", "lock", "workflows"} <= called <= targets


def test_each_hydra_of_the_matrix_is_installed_after_all_packages_that_make_installs() -> None:
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    runs = [step.get("run", "") for step in jobs["check"]["steps"]]
    (hydra,) = [index for index, run in enumerate(runs) if "$HYDRA" in run]
    assert "make extras" in runs[:hydra]
    assert not {"make extras", "make setup"} & {*runs[hydra:]}


def test_contributing_names_the_commands_that_need_no_set_up() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    needs = {
        name: {*before.split(), *re.findall(r"\$\(MAKE\) ([a-z-]+)", lines)}
        for name, before, lines in re.findall(
            r"^([a-z-]+):([^#=\n]*)##.*\n((?:\t.*\n)*)", makefile, re.M
        )
    }

    def is_set_up(name: str) -> bool:
        return name == "setup" or any(map(is_set_up, needs.get(name, ())))

    (said,) = re.findall(r"Every command below except (.*) first builds", page)
    without = {name for name in re.findall(r"`make ([a-z-]+)", page) if not is_set_up(name)}
    assert without == {*re.findall(r"`make ([a-z-]+)`", said)}


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("workflows/ci.yml", "runs-on:", "runs_on:", "runs_on"),
        ("workflows/ci.yml", "persist-credentials: false", "fetch-depth: 1", "artipacked"),
        ("dependabot.yml", "interval: weekly", "interval: often", "often"),
        ("ISSUE_TEMPLATE/bug.yml", "body:", "bodies:", "body"),
        ("../CITATION.cff", "license: MIT", "license: mine", "mine"),
        ("workflows/ci.yml", "", "", ""),
    ],
)
def test_the_check_of_the_workflows_finds_a_mistake(
    file: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    if not (TOOLS / "complete").exists():
        pytest.skip("make workflows installs the tools")
    shutil.copytree(GITHUB, tmp_path / ".github")
    shutil.copy(ROOT / "CITATION.cff", tmp_path)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "site-tools").symlink_to(TOOLS)
    path = tmp_path / ".github" / file
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    done = subprocess.run(
        ["sh", ".github/check.sh", sys.executable],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(TOOLS)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) is (not says), done.stdout + done.stderr
    assert says in done.stdout + done.stderr
