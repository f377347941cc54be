"""Each page of docs/recipes works as printed, in a project that new_project.py has just made.

The blocks of a page are followed in their order. A block marked `bash` is run. A block marked
`python` or `yaml` begins with a comment with a file's name, such as `# my_model.py`, and is written
to that file. A block marked `diff` is applied. A block marked `text` is compared with what the
commands before it printed (`is_printed`). A block marked `pattern` shows commands with a gap (`…`)
for the reader to fill; their overrides are composed. A block marked `folders` shows names of files.
No block is without a mark. A page runs in the nightly tests alone, unless it has a line
`<!-- test: slow -->` or `<!-- test: fast -->`. In the same comment, `needs peft` skips the page
where that package is missing. `needs Slurm` starts a cluster on this machine, and `needs template`
puts a checkout of the template beside the project. A line `<!-- needs datasets -->` before a block
skips that block alone.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import slurm
from PIL import Image
from running import composed

from regrow.project import ROOT

RECIPES = ROOT / "docs" / "recipes"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:,\d{3})*\.\d+(?:e[+-]\d+)?|\d+e[+-]\d+|\d+(?:,\d{3})*")
VARY = "the numbers vary"
FILE = re.compile(r"(?:# @package \S+\n)?# (\S+\.(?:py|yaml))\n")  # Hydra's header stays first
TESTED = re.compile(r"^<!-- test: (.*) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    kind: str
    content: str
    file: str | None = None  # that the block is written to
    note: str = ""  # the comment before the block

    @property
    def commands(self) -> str | None:
        if self.kind == "diff":
            return f"git apply - <<'END'\n{self.content}END\n"
        return self.content if self.kind == "bash" else None


def marked(text: str) -> Iterator[Block]:
    for note, kind, content in MARKED.findall(text):
        named = FILE.match(content) if kind in ("python", "yaml") else None
        yield Block(kind, content, named[1] if named else None, note)


def blocks(text: str) -> Iterator[tuple[str | None, str]]:
    """Yield (file, content) for each file to write, and (None, commands) for commands to run."""
    for block in marked(text):
        if block.file is not None:
            yield block.file, block.content
        elif block.commands is not None:
            yield None, block.commands


def is_printed(line: str, said: str, *, vary: bool = False) -> bool:
    """Return True if a line of `said` is `line`, but for what depends on the machine.

    Words and whole numbers must be equal. Other numbers may differ in the third digit or by 0.03.
    With `vary`, only words count. `…` stands for any text. The amount of space does not matter.
    """

    def numbers(text: str) -> list[str]:
        return [number for number in NUMBER.findall(text) if not number.replace(",", "").isdigit()]

    parts = NUMBER.split(line)
    pattern = re.escape(parts[0])
    for number, words in zip(NUMBER.findall(line), parts[1:], strict=True):
        whole = number.replace(",", "").isdigit()
        equal = re.escape(number) if whole and not vary else f"({NUMBER.pattern})"
        pattern += equal + re.escape(words)
    pattern = re.sub(r"(\\ )+", r"\\s+", pattern.strip()).replace("…", ".*")
    for found in re.finditer(rf"^\s*{pattern}\s*$", said, re.MULTILINE):
        if vary:
            return True
        pairs = zip(numbers(line), found.groups(), strict=True)
        values = [tuple(float(text.replace(",", "")) for text in pair) for pair in pairs]
        if all(math.isclose(*pair, rel_tol=0.005, abs_tol=0.03) for pair in values):
            return True
    return False


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
    for block in marked(text):
        needed = re.fullmatch(r"needs (\w+)", block.note)
        if needed and importlib.util.find_spec(needed[1]) is None:
            continue
        if block.file is not None:
            path = project / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.content, encoding="utf-8")
        elif block.kind == "text":
            for line in block.content.splitlines():
                shown = is_printed(line, said, vary=block.note == VARY)
                assert shown, f"not printed: {line}\n{said}"
        if block.commands is None:
            continue
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block.commands], cwd=project, env=environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            check=False, timeout=900, text=True, encoding="utf-8",
        )  # fmt: skip
        said += done.stdout
        assert done.returncode == 0, f"{block.commands}\n{done.stdout}"
    return said


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that new_project.py made, with this Python as `python` on its PATH."""
    folder = tmp_path_factory.mktemp("made") / "project"
    script = ROOT / "scripts" / "new_project.py"
    command = [sys.executable, str(script), "my_project", str(folder), "untracked=leave"]
    subprocess.run(command, check=True, capture_output=True)
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
def test_the_page_of_a_new_project_on_ones_own_images_works_as_printed(
    made: Path, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    shutil.copytree(made, project, symlinks=True)
    striped(project)
    text = (project / "docs/your_images.md").read_text(encoding="utf-8")
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
```pattern
exit 1 …
```
```yaml
# tool/say.py.yaml
key: value
```
```text
fi…
```
<!-- needs no_such_package -->
```bash
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
    with pytest.raises(AssertionError, match="not printed: three"):
        follow("```bash\necho one; echo two\n```\n```text\ntwo\nthree\n```\n", tmp_path)


def test_a_printed_line_may_differ_only_in_what_depends_on_the_machine() -> None:
    said = "first\nloss  0.00041 after 300 steps; a constant has 2.228 \nlast"
    assert is_printed("loss 0.00038 after 300 steps; a constant has 2.227", said)
    assert is_printed("loss … a constant has 2.228", said)
    assert is_printed("loss 7.5 after 9 steps; a constant has 9.9", said, vary=True)
    for wrong in (
        "loss 0.00041 after 300 steps; a constant has 2.267",
        "loss 0.00041 after 301 steps; a constant has 2.228",
        "a loss 0.00041 after 300 steps; a constant has 2.228",
        "loss 0.00041 after 300 steps",
    ):
        assert not is_printed(wrong, said), wrong
    assert not is_printed("loss 0.00041 after 300 steps", said, vary=True)


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*.md")), ids=lambda page: page.stem)
def test_each_block_of_a_recipe_is_followed_or_marked_as_a_pattern(page: Path) -> None:
    for block in marked(page.read_text(encoding="utf-8")):
        assert block.kind in ("bash", "diff", "python", "yaml", "text", "pattern", "folders")
        assert block.file or block.kind not in ("python", "yaml"), block.content
        assert block.kind != "bash" or "…" not in re.sub("#.*", "", block.content), block.content
        if block.kind != "pattern":
            continue
        lines = [shlex.split(line, comments=True) for line in block.content.splitlines()]
        assert all("…" in words or "<" in block.content for words in lines), block.content
        for words in lines:
            if words[1] == "scripts/train.py":
                assert composed(*(word for word in words[2:] if word != "…"))


def test_the_index_names_every_page() -> None:
    index = (RECIPES / "README.md").read_text(encoding="utf-8")
    pages = {page.name for page in RECIPES.glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def touched(text: str) -> set[str]:
    """Return the files that a page writes or edits, and the folders of examples that it runs."""
    found: set[str] = set()
    for block in marked(text):
        if block.file:
            found.add(block.file)
        elif block.kind == "diff":
            found |= {*re.findall(r"^\+\+\+ b/(\S+)", block.content, re.MULTILINE)}
        elif block.kind == "bash":
            found |= {*re.findall(r"--config-dir (src/lab/examples/\w+/)conf", block.content)}
    return found


def named(text: str) -> set[str]:
    """Return the files that the line `Files:` of a page names. Its first sentence has them all."""
    (line,) = re.findall(r"^Files: (.*?)\.(?: |$)", text, re.MULTILINE)
    return {*re.findall(r"`([^`]+)`", line)}


def test_each_recipe_names_the_files_that_it_touches() -> None:
    for page in sorted({*RECIPES.glob("*.md")} - {RECIPES / "README.md"}):
        text = page.read_text(encoding="utf-8")
        assert named(text) == touched(text), page.name
        assert not [name for name in named(text) if name.startswith("src/regrow")], page.name
    page = RECIPES / "your_model.md"
    assert named("Files: `my_models.py`.\n") != touched(page.read_text(encoding="utf-8"))


def test_when_a_page_is_tested_and_what_it_needs() -> None:
    assert marks_of("# A page") == ("nightly", [])
    assert marks_of("# A page\n\n<!-- test: fast -->\n") == ("fast", [])
    assert marks_of("<!-- test: slow; needs peft, onnx -->") == ("slow", ["peft", "onnx"])
