"""Files are UTF-8 in any locale, and a terminal shows what it can."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import forked
import pytest
import yaml
from running import TINY

from regrow.processes import terminal
from regrow.project import ROOT
from regrow.record import records

TRAIN = ROOT / "scripts" / "train.py"
SMALL = (*TINY, "trainer.max_steps=2", "trainer.progress_bar=false")
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
fails_with_libyaml = pytest.mark.xfail(
    not version("omegaconf").startswith("2.3."),
    reason="omegaconf 2.4 writes YAML by libyaml, which takes no byte that is not UTF-8",
    raises=UnicodeEncodeError,
)


def run(
    folder: Path, *arguments: str, script: Path = TRAIN, code: int = 0, **environment: str
) -> str:
    """Return the script's output; bytes that are not UTF-8 become surrogates."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HYDRA_", "LC_", "PYTHON"))}
    done = forked.run(
        [sys.executable, str(script), *arguments], cwd=folder, env={**kept, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=300,
    )  # fmt: skip
    said = done.stdout.decode("utf-8", "surrogateescape")
    assert done.returncode == code, said
    assert "Traceback" not in said, said
    return said


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A locale whose encoding is ISO-8859-1."""
    place = tmp_path_factory.mktemp("locales")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(place / "en_US.ISO-8859-1")]
    try:
        made = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        made = None
    if made is None or not (place / "en_US.ISO-8859-1" / "LC_CTYPE").is_file():
        pytest.skip("this machine cannot make a locale: it lacks localedef or its sources")
    return {"LOCPATH": str(place), "LC_ALL": "en_US.ISO-8859-1"}


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, ASCII], ids=str
)
def test_help_and_config_show_what_the_terminal_can(
    environment: dict[str, str], tmp_path: Path
) -> None:
    said = run(tmp_path, "--help", **environment)
    assert "group=option key=value" in said
    said = run(tmp_path, "--cfg", "job", 'notes="±Ü日"', **environment)
    assert "\nseed: 0\n" in said


@pytest.mark.slow
def test_a_run_and_its_resume_end_well_on_an_ascii_terminal(tmp_path: Path) -> None:
    said = run(tmp_path, *SMALL, "hydra.run.dir=Ünï", PYTHONIOENCODING="ascii")
    assert "|- data" in said and "micro-batch x" in said
    line = next(line for line in said.splitlines() if "resume=" in line and "max_steps" in line)
    line = line[line.index("$'") if "$'" in line else 0 :]
    assert line.startswith("$'resume=\\303\\234n\\303\\257'"), line
    log = (tmp_path / "Ünï" / "train.log").read_text(encoding="utf-8")
    assert "├─ data" in log


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "latin-1"}, ASCII], ids=str)
def test_a_sweep_ends_well_on_any_terminal(environment: dict[str, str], tmp_path: Path) -> None:
    said = run(tmp_path, "-m", *SMALL, "seed=0,1", "hydra.sweep.dir=Ünï", **environment)
    assert "best job" in said
    (log,) = (tmp_path / "Ünï" / "logs").glob("0.log")
    assert "├─ data" in log.read_text(encoding="utf-8")


def test_a_yaml_file_is_read_in_a_locale_of_another_encoding(
    latin_1: dict[str, str], tmp_path: Path
) -> None:
    said = run(tmp_path, "trainer.lrr=1", code=2, **latin_1)
    assert "trainer.lrr: there is no such key" in said
    assert "\nseed: 0\n" in run(tmp_path, "--cfg", "job", **latin_1)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_in_a_locale_of_another_encoding_resumes_in_utf_8(
    latin_1: dict[str, str], tmp_path: Path
) -> None:
    run(tmp_path, *SMALL, "hydra.run.dir=Ünï 日本", **latin_1)
    said = run(tmp_path, "resume=Ünï 日本", "trainer.max_steps=4")
    assert "resuming from step 2" in said


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
@pytest.mark.slow
def test_a_folder_whose_name_is_not_utf_8_holds_a_run(tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfcni"))
    place.mkdir()
    run(place, *SMALL, "hydra.run.dir=mine")
    said = run(place, "resume=mine", "trainer.max_steps=4")
    assert "resuming from step 2" in said
    for script in ("evaluate.py", "report.py"):
        argument = "mine" if script == "report.py" else "run=mine"
        run(place, argument, script=ROOT / "scripts" / script)


@fails_with_libyaml
def test_a_byte_of_a_file_name_comes_back_from_json_and_yaml(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    name = os.fsdecode(b"\xfc 1")
    records.write_json(tmp_path / "a.json", {"name": name})
    assert records.read_json(tmp_path / "a.json") == {"name": name}
    records.write_text(tmp_path / "a.yaml", OmegaConf.to_yaml([name, "Ü"]))
    assert yaml.safe_load((tmp_path / "a.yaml").read_text(encoding="utf-8")) == [name, "Ü"]


def test_signs_that_an_encoding_lacks_have_a_form_in_ascii() -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=terminal.ERRORS)
    shown.write("├─ 3 × 4 ± 1… Ü 日 \udcfc")
    shown.flush()
    assert shown.buffer.getvalue() == b"|- 3 x 4 +- 1... \\xdc \\u65e5 \\xfc"  # type: ignore


def test_a_config_file_that_is_not_utf_8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.cli import entry
    from regrow.config import own_code, places

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "bad.yaml").write_bytes(b"a: 1\nb: \xfc\n")
    monkeypatch.setattr(own_code, "ROOT", tmp_path)
    monkeypatch.setattr(places, "CONF", tmp_path / "conf")
    assert entry.not_utf8().startswith("conf/bad.yaml:2 is not UTF-8.")


# -- the rule --------------------------------------------------------------------------------------


def without_encoding(source: str) -> Iterator[str]:
    """Find calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        of = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if "encoding" in given or of in ("os", "Image", "records", "tarfile", "webbrowser"):
            continue
        modes = [a.value for a in [*node.args, *given.values()] if isinstance(a, ast.Constant)]
        if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            if not any(isinstance(m, str) and "b" in m and set(m) <= set("rwaxb+") for m in modes):
                yield ast.unparse(node)
        else:
            switched = (given.get(key) for key in ("text", "universal_newlines"))
            is_text = any(isinstance(it, ast.Constant) and it.value for it in switched)
            of_a_path = name == "write_text" and of != ""
            # For a path, the first argument is the encoding; for a distribution, the file.
            reads = name == "FileHandler" or (name == "read_text" and not node.args)
            if is_text or of_a_path or reads:
                yield ast.unparse(node)


@pytest.mark.parametrize("part", ["src", "scripts"])
def test_text_is_read_and_written_in_a_named_encoding(part: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {call}"
        for path in sorted((ROOT / part).rglob("*.py"))
        for call in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_a_call_without_an_encoding_is_found() -> None:
    calls = (
        *("open('a')", "path.open()", "path.open('w')", "path.read_text()", "path.write_text('x')"),
        *("subprocess.run(['a'], text=True)", "gzip.open('a', 'rt')"),
    )
    for call in calls:
        assert list(without_encoding(call)), call
    for call in ("path.open('rb')", "open('a', encoding='utf-8')", "subprocess.run(['a'])"):
        assert not list(without_encoding(call)), call
