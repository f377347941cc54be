from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from regrow.record import manifest
from regrow.record.folder import read_json
from regrow.record.redact import redact, redact_all

TOKENS = {
    "in the environment": "s3cr3t-from-the-environment",
    "in a remote": "ghp_" + "A1b2C3d4" * 5,
    "as a password": "hunter2hunter2",
    "in the diff": "planted-in-the-diff",
}


def repository(root: Path) -> Path:
    root.mkdir(parents=True)
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(root), *arguments],
            check=True,
            capture_output=True,
            env={**os.environ, **identity},
        )

    git("init", "-b", "main")
    (root / "src").mkdir()
    (root / "src" / "a.py").write_text("x = 1\n")
    git("add", ".")
    git("commit", "-m", "first")
    remote = f"https://user:{TOKENS['in a remote']}@example.org/lab/project.git"
    git("remote", "add", "origin", remote)
    return root


def write(folder: Path, root: Path, **more: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    given = {"command": ["python", "scripts/train.py", "seed=1"], "data": {"n": 3}, "seeds": {}}
    return manifest.write(folder, root=root, **{**given, **more})


def test_it_tells_command_code_versions_hardware_data_and_seeds(tmp_path: Path) -> None:
    root = repository(tmp_path / "root")
    (root / "src" / "a.py").write_text("x = 2\n")
    (root / "new.txt").touch()
    told = write(tmp_path / "run", root, seeds={"seed": 1})
    assert told == json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert told["command"] == "python scripts/train.py seed=1"
    assert len(told["git"]["commit"]) == 40 and told["git"]["branch"] == "main"
    assert told["git"]["dirty"] is True and told["git"]["untracked"] == ["new.txt"]
    assert "+x = 2" in (tmp_path / "run" / told["git"]["diff"]).read_text()
    assert "torch" in told["packages"] and told["python"].startswith("3.")
    assert told["hardware"]["cpus"] >= 1 and told["hardware"]["memory_gib"] > 0
    assert (told["data"], told["seeds"]) == ({"n": 3}, {"seed": 1})


def test_a_clean_repository_has_no_diff(tmp_path: Path) -> None:
    told = write(tmp_path / "run", repository(tmp_path / "root"))
    assert told["git"]["dirty"] is False and "diff" not in told["git"]
    assert not (tmp_path / "run" / "git.diff").exists()


def test_outside_a_repository_git_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "plain").mkdir()
    told = write(tmp_path / "run", tmp_path / "plain")
    assert told["git"] is None and told["git_missing"] == "not a git repository"
    monkeypatch.setenv("PATH", "/nowhere")  # nor without git
    assert write(tmp_path / "other", tmp_path / "plain")["git"] is None


def test_a_checkout_of_another_user_is_recorded_with_the_reason_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = repository(tmp_path / "root")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    told = write(tmp_path / "run", root)
    assert told["git"] is None and "another user owns" in told["git_missing"]
    (line,) = [record.getMessage() for record in caplog.records]
    copy = tmp_path / "copy"
    copy.mkdir()
    manifest.write_origin(copy, root)  # a sweep's jobs run from there
    assert "another user owns" in write(tmp_path / "job", copy)["git_missing"]
    subprocess.run(shlex.split(line.partition("If you trust it: ")[2]), check=True)
    assert write(tmp_path / "again", root)["git"]["branch"] == "main"


def test_a_repository_without_git_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = repository(tmp_path / "root")
    monkeypatch.setenv("PATH", "/nowhere")
    assert write(tmp_path / "run", root)["git_missing"] == "git is not installed"


def test_a_repository_without_a_commit_is_no_error(tmp_path: Path) -> None:
    subprocess.run(
        ["git", "init", "-b", "main", str(tmp_path / "r")], check=True, capture_output=True
    )
    told = write(tmp_path / "run", tmp_path / "r")
    assert told["git"]["commit"] is None and told["git"]["branch"] == "main"


def test_no_planted_secret_enters_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "root")
    (root / "src" / "a.py").write_text(
        f'api_key = "{TOKENS["in the diff"]}"\nother = "{TOKENS["in the environment"]}"\n'
    )
    monkeypatch.setenv("WANDB_API_KEY", TOKENS["in the environment"])
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    command = [
        "python",
        "scripts/train.py",
        f"+data.password={TOKENS['as a password']}",
        f"data.root=s3://me:{TOKENS['as a password']}@store/x",
        f"notes={TOKENS['in the environment']}",
        "optimizer.lr=0.1",
    ]
    told = write(tmp_path / "run", root, command=command)
    text = "".join(path.read_text() for path in (tmp_path / "run").iterdir())
    for where, token in TOKENS.items():
        assert token not in text, where
    assert told["git"]["remote"] == "https://***@example.org/lab/project.git"
    assert "optimizer.lr=0.1" in told["command"]
    assert told["environment"] == {"SLURM_JOB_ID": "77"} | told["environment"]
    assert "WANDB_API_KEY" not in told["environment"]
    monkeypatch.setattr(manifest, "redact", lambda text: text)
    write(tmp_path / "unmasked", root)  # the same test would see a leak
    assert TOKENS["in the diff"] in (tmp_path / "unmasked" / "git.diff").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=128 tokenizer=bert monkey=12345 author=someone",
        "keyboard: qwerty, model.pad_token=<pad>",
        "model.pad_token: '[PAD]', eos_token=endoftext",
        "https://example.org/a@b and user@example.org",
        "token: ${oc.env:TOKEN}",
        "optimizer.lr=0.001 tags=[authentic]",
    ],
)
def test_what_is_no_secret_stays(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "password=hunter2",
        "PGPASSWORD=hunter2",
        "GITHUB_PAT=abcdef",
        'password: str = "hunter2"',
        'token: str | None = "abcdef"',
        "api_key: 'abcdef'",
        '{"access_token": "abcdef"}',
        "git@ssh://me:abcdef@host/x hunter2 password=hunter2"[4:].replace("hunter2 ", "", 1),
        "Authorization: Bearer abcdef123456",
        "-----BEGIN RSA PRIVATE KEY-----\nabcdef\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_is_a_secret_goes(text: str) -> None:
    assert "abcdef" not in redact(text) and "hunter2" not in redact(text)
    assert "***" in redact(text)


def test_nested_values_are_masked_by_their_key() -> None:
    value = {"a": [{"token": "x1", "n": 3}], "url": "http://u:p@h", "secret": None}
    expected = {"a": [{"token": "***", "n": 3}], "url": "http://***@h", "secret": None}
    assert redact_all(value) == expected


def test_a_huge_diff_is_cut_and_does_not_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "root")
    (root / "src" / "a.py").write_text("y = 1234567890\n" * 400_000)
    monkeypatch.setattr(manifest, "DIFF_BYTES", 50_000)
    told = write(tmp_path / "run", root)
    assert told["git"]["diff_is_cut"] is True
    assert (tmp_path / "run" / "git.diff").stat().st_size <= 50_000


def test_a_resume_keeps_the_first_record_and_adds_itself(tmp_path: Path) -> None:
    root = repository(tmp_path / "root")
    first = write(tmp_path / "run", root)
    assert manifest.code_changes(tmp_path / "run", root) is None
    (root / "src" / "a.py").write_text("x = 3\n")
    change = manifest.code_changes(tmp_path / "run", root)
    assert change is not None and "code has changed" in change and "\n" not in change
    told = write(tmp_path / "run", root, command=["python", "x"])
    assert {k: v for k, v in told.items() if k != "resumes"} == first
    (resume,) = told["resumes"]
    assert (resume["command"], resume["git"]["dirty"]) == ("python x", True)
    manifest.set_step(tmp_path / "run", 40)
    assert [it["step"] for it in read_json(tmp_path / "run" / "manifest.json")["resumes"]] == [40]
    assert "+x = 3" in (tmp_path / "run" / resume["git"]["diff"]).read_text()
    assert "packages" not in resume  # only what differs
    assert manifest.code_changes(tmp_path / "run", root) is None
