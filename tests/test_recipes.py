"""Each page of docs/recipes works as printed, in a project that new_project.py has just made.

The blocks of a page are followed in their order. A block marked `bash` is run. A block marked
`python` or `yaml` whose first line is a comment with a file's name, such as `# my_model.py`, is
written to that file. A block marked `diff` is applied. Any other block is only shown. A page runs
in the nightly tests alone, unless it has a line `<!-- test: slow -->` or `<!-- test: fast -->`. In
the same comment, `needs peft` skips the page where that package is missing. `needs Slurm` starts a
cluster on this machine, and `needs template` puts a checkout of the template beside the project.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slurm
from PIL import Image

from regrow.project import ROOT

RECIPES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n")  # Hydra's header stays first
TESTED = re.compile(r"^<!-- test: (.*) -->$", re.MULTILINE)


def blocks(text: str) -> Iterator[tuple[str | None, str]]:
    """Yield (file, content) for each file to write, and (None, commands) for commands to run."""
    for kind, content in BLOCK.findall(text):
        named = FILE.match(content)
        if kind == "bash":
            yield None, content
        elif kind == "diff":
            yield None, f"git apply - <<'END'\n{content}END\n"
        elif kind in ("python", "yaml") and named:
            yield named[1], content


def follow(text: str, project: Path, **more: str) -> str:
    """Write a page's files and run its commands in `project`. Returns the commands' output.

    `more`: variables of the environment.
    """
    said = ""
    kept = {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "PYTHONPATH")}
    environment = {
        **kept,
        "PATH": f"{project / 'bin'}:{kept['PATH']}",
        "PYTHONPATH": str(project / "src"),  # as if the copy were installed
        "OMP_NUM_THREADS": "1",
        **more,
    }
    for file, content in blocks(text):
        if file is not None:
            path = project / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
            continue
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", content], cwd=project, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False, timeout=900, text=True, encoding="utf-8",
        )  # fmt: skip
        said += done.stdout
        assert done.returncode == 0, f"{content}\n{done.stdout}"
    return said


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that new_project.py made, with this Python as `python` on its PATH."""
    folder = tmp_path_factory.mktemp("made") / "project"
    script = ROOT / "scripts" / "new_project.py"
    subprocess.run(
        [sys.executable, str(script), "my_project", str(folder)], check=True, capture_output=True
    )
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    with (folder / ".git" / "info" / "exclude").open("a", encoding="utf-8") as excluded:
        excluded.write("/bin/\n")
    return folder


def marks_of(text: str) -> tuple[str, list[str]]:
    """Return when a page is tested (fast, slow or nightly), and the packages that it needs."""
    found = TESTED.search(text)
    words = re.split(r"[,;\s]+", found[1]) if found else ["nightly"]
    when, needs = words[0], words[words.index("needs") + 1 :] if "needs" in words else []
    assert when in ("fast", "slow", "nightly"), f"<!-- test: {when} … -->: fast, slow or nightly"
    return when, needs


def pages() -> Iterator[Any]:
    marks = {
        "fast": [],
        "slow": [pytest.mark.slow],
        "nightly": [pytest.mark.slow, pytest.mark.nightly],
    }
    for page in sorted(RECIPES.glob("*.md")):
        if page.name == "README.md":
            continue
        when, _ = marks_of(page.read_text(encoding="utf-8"))
        yield pytest.param(page, id=page.stem, marks=marks[when])


@pytest.mark.parametrize("page", [*pages()])
def test_a_recipe_works_as_printed(page: Path, made: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(made, project, symlinks=True)
    text = (project / page.relative_to(ROOT)).read_text(encoding="utf-8")
    assert any(file is None for file, _ in blocks(text)), "no block of commands"
    _, needs = marks_of(text)
    packages = [name for name in needs if name not in ("Slurm", "template")]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{page.name} needs {', '.join(missing)}")
    if "template" in needs:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "regrow")], check=True)
    if "Slurm" not in needs:
        follow(text, project)
    elif why_not := slurm.why_not():
        pytest.skip(why_not)
    else:
        cluster = tmp_path / "slurm"
        cluster.mkdir()
        with slurm.running(cluster) as environment:
            follow(text, project, SLURM_CONF=environment["SLURM_CONF"])


def striped(project: Path) -> None:
    """Write images with stripes along a side: 60 of `cat` and `dog` each, and 30 as new_photos."""
    draws = np.random.default_rng(0)
    (project / "new_photos").mkdir()
    for name, size in (("cat", (40, 1)), ("dog", (1, 40))):
        (project / "photos" / name).mkdir(parents=True)
        for number in range(90):
            place = (
                f"photos/{name}/{number} .jpg" if number < 60 else f"new_photos/{name} {number}.jpg"
            )
            stripes = Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8))
            stripes.resize((150, 100)).save(project / place)


@pytest.mark.slow
def test_the_readme_of_a_new_project_works_as_printed(made: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(made, project, symlinks=True)
    striped(project)
    text = (project / "README.md").read_text(encoding="utf-8")
    assert [file for file, _ in blocks(text)] == ["my_models.py", "conf/model/small.yaml", None]
    said = follow(text, project)
    assert "60 predictions" in said
    summary = json.loads((project / "outputs/image_folder/latest/summary.json").read_text())
    assert summary["test"]["test/accuracy"] > 0.8


def test_files_are_written_and_commands_are_run_in_the_order_of_the_page(tmp_path: Path) -> None:
    text = """
```python
# tool/say.py
print("first")
```
```bash
cat tool/say.py
python tool/say.py
```
```python
print("only shown")
```
```yaml
# tool/say.py.yaml
key: value
```
```text
exit 1
```
```bash
cat tool/say.py.yaml
```
"""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    said = follow(text, tmp_path)
    assert said == '# tool/say.py\nprint("first")\nfirst\n# tool/say.py.yaml\nkey: value\n'


def test_a_command_that_fails_fails_the_page(tmp_path: Path) -> None:
    """The negative control."""
    with pytest.raises(AssertionError, match="no such"):
        follow("```bash\necho no such; false\ntrue\n```\n", tmp_path)
    with pytest.raises(AssertionError):
        follow("```bash\nfalse | true\n```\n", tmp_path)


def test_the_index_names_every_page() -> None:
    index = (RECIPES / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in RECIPES.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def test_when_a_page_is_tested_and_what_it_needs() -> None:
    assert marks_of("# A page") == ("nightly", [])
    assert marks_of("# A page\n\n<!-- test: fast -->\n") == ("fast", [])
    assert marks_of("<!-- test: slow; needs peft, onnx -->") == ("slow", ["peft", "onnx"])
