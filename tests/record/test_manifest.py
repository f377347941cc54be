from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from regrow.config.yaml_files import redact_yaml
from regrow.record import diff, manifest
from regrow.record.records import read_json, write_json
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
    monkeypatch.setenv("PATH", "/nowhere")  # also without git
    assert write(tmp_path / "other", tmp_path / "plain")["git"] is None


def test_a_checkout_of_another_user_is_recorded_with_the_reason_and_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = repository(tmp_path / "root")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for tests
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    told = write(tmp_path / "run", root)
    assert told["git"] is None and "another user owns" in told["git_missing"]
    (line,) = {record.getMessage() for record in caplog.records}
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


def test_a_repository_without_a_commit_is_recorded(tmp_path: Path) -> None:
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
    monkeypatch.setattr(diff, "redact", lambda text: text)
    write(tmp_path / "unmasked", root)  # the control: the same test detects a leak
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
def test_text_without_a_secret_is_not_redacted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_secrets_are_redacted(text: str) -> None:
    assert "abcdef" not in redact(text) and "hunter2" not in redact(text)
    assert "***" in redact(text)


@pytest.mark.parametrize(
    "override",
    [
        "+logger.mine.token='abcdef&hunter2 x'",
        "logger.mine.password='it: is #hunter2'",
        "++logger.mine.passphrase=correct abcdef hunter2",
        '+logger.mine.secret="it\'s abcdef"',
        r"+logger.mine.secret='it\'s abcdef'",
    ],
)
def test_no_part_of_a_secret_with_spaces_or_quotes_is_left(override: str) -> None:
    masked = f"{override.partition('=')[0]}=***"
    line = shlex.join(["train.py", override, "notes=it's mine"])
    found = redact(line)
    assert shlex.split(found) == ["train.py", masked, "notes=it's mine"]
    assert redact_all([override, "seed=1"]) == [masked, "seed=1"]
    key, value = override.partition("=")[::2]
    content = {"a": {key.rpartition(".")[2]: value, "n": 1.0e-5}, "overrides": [override]}
    text = yaml.safe_dump(content)
    assert "abcdef" not in redact_yaml(text) and "hunter2" not in redact_yaml(text)
    assert yaml.safe_load(redact_yaml(text))["a"]["n"] == 1.0e-5


def test_yaml_without_a_secret_is_kept_to_the_letter() -> None:
    text = "# a note\na: {token: '${oc.env:TOKEN}', auth: null}\nb: [pad_token=x y z, token=null]\n"
    assert redact_yaml(text) == text
    tagged = "a: !!python/tuple [1]\npassword: hunter2\n"  # not plain YAML, and masked all the same
    assert redact_yaml(tagged) == tagged.replace("hunter2", "***")


def test_yaml_with_a_secret_keeps_the_types_of_all_else() -> None:
    secrets = {"db_password": 12345678, "api_key": 12345678}
    content = {"a": "1e-3", "n": 1e-05, "day": "2026-11-28", "token": 3000} | secrets
    text = redact_yaml(OmegaConf.to_yaml(content))
    assert OmegaConf.create(text) == content | dict.fromkeys(secrets, "***")
    assert redact_all(content) == content | dict.fromkeys(secrets, "***")


def test_nested_values_are_masked_by_their_key() -> None:
    value = {"a": [{"token": "x1", "n": 3}], "url": "http://u:p@h", "secret": None}
    expected = {"a": [{"token": "***", "n": 3}], "url": "http://***@h", "secret": None}
    assert redact_all(value) == expected
    markers = {"image_token": "<image>", "start_token": "<|s|>", "auth": "None", "end_token": ""}
    assert redact_all(markers) == markers  # else a loaded run's model would get the mask


def test_a_huge_diff_is_limited_and_does_not_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "root")
    (root / "src" / "a.py").write_text("y = 1234567890\n" * 400_000)
    (root / "src" / "b.py").write_text("new = 1\n")
    monkeypatch.setattr(diff, "LIMIT", 50_000)
    told = write(tmp_path / "run", root)
    assert told["git"]["diff_is_cut"] is True
    content = (root / "src" / "a.py").read_bytes()
    assert told["git"]["not_in_diff"] == {"src/a.py": hashlib.sha256(content).hexdigest()}
    assert "+new = 1" in (tmp_path / "run" / "git.diff").read_text()  # complete up to the limit


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
    assert "packages" not in resume  # only the differences
    assert manifest.code_changes(tmp_path / "run", root) is None


def test_a_resume_with_the_same_changes_records_them_once(tmp_path: Path) -> None:
    root, run = repository(tmp_path / "root"), tmp_path / "run"
    (root / "src" / "a.py").write_text("x = 2\n")
    first = write(run, root)
    told = write(run, root)
    assert first["git"]["diff"] == "git.diff" and "git" not in told["resumes"][0]
    assert manifest.latest(told)["git"] == first["git"]
    (root / "src" / "a.py").write_text("x = 3\n")
    assert write(run, root)["resumes"][1]["git"]["diff"] == "git.2.diff"
    assert sorted(path.name for path in run.glob("*.diff")) == ["git.2.diff", "git.diff"]


def test_changed_files_that_the_config_names_come_first_and_commands_last(tmp_path: Path) -> None:
    root, run = repository(tmp_path / "root"), tmp_path / "run"
    names = [
        *("src/lab/models/z.py", "a_loss.py", "src/lab/step.py", "src/regrow/b.py"),
        *("conf/a.yaml", "scripts/a.py", "docs/site/keys.py", "tests/test_a.py"),
    ]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("# 1\n")
    write(run, root)
    (run / "config.yaml").write_text("model:\n  _target_: lab.models.z.Net\n")
    for name in names:
        (root / name).write_text("# 2\n")
    said = "The code has changed since: {} and 1 more differ."
    assert manifest.code_changes(run, root) == said.format(", ".join(names[:5]))
    (run / "config.yaml").unlink()
    moved = ", ".join(["a_loss.py", "src/lab/models/z.py", *names[2:5]])
    assert manifest.code_changes(run, root) == said.format(moved)


def test_changed_code_files_are_named(tmp_path: Path) -> None:
    root = repository(tmp_path / "root")
    (root / "my_models").mkdir()
    (root / "my_models" / "net.py").write_text("x = 1\n")  # a package without an __init__.py
    (root / "my_losses.py").write_text("x = 1\n")
    run = tmp_path / "run"
    write(run, root)
    (root / "notes.txt").touch()  # not code
    new = ("scratch.py", "mine/net.py", "src/lab/models/new.py", "conf/model/new.yaml")
    for name in new:  # imported or chosen by nothing that is as it was
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert manifest.code_changes(run, root) is None
    for name in ("resolvers.py", "conf/local/default.yaml"):  # every start reads them
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
        said = manifest.code_changes(run, root)
        assert said is not None and name in said and said.endswith("are new.")
        (root / name).unlink()
    for name in new:
        (root / name).unlink()
    (root / "my_losses.py").write_text("x = 2\n")
    assert manifest.code_changes(run, root) == "The code has changed since: my_losses.py differs."
    (root / "my_models" / "net.py").unlink()
    (root / "conf" / "new.yaml").touch()
    change = "my_losses.py differs, my_models/net.py is gone, conf/new.yaml is new."
    assert manifest.code_changes(run, root) == f"The code has changed since: {change}"
    older = read_json(run / "manifest.json")
    del older["code_files"]
    older["code_sha256"] = manifest.code_sha256(root, namespaces=False)
    write_json(run / "manifest.json", older)
    assert manifest.code_changes(run, root) is None  # its hash excluded my_models
    (root / "my_losses.py").write_text("x = 3\n")
    change = "The code has changed since: files of conf, src, scripts or the root differ."
    assert manifest.code_changes(run, root) == change


def distribution(folder: Path, name: str, version: str, **files: str) -> None:
    """A package as an installer leaves it."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files.items():
        (info / file.replace("_json", ".json").replace("_txt", ".txt")).write_text(text)


def test_the_versions_of_all_imported_packages_are_noted_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, checkout, root = tmp_path / "site-packages", tmp_path / "checkout", tmp_path / "root"
    distribution(site, "Lab_Metrics", "1.2+cu130", RECORD="lab_metrics_x/__init__.py,,\n")
    distribution(site, "unused", "3.0", top_level_txt="unused_x\n")
    url = json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}})
    distribution(site, "edited", "0.1", RECORD="__editable__.edited.pth,,\n", direct_url_json=url)
    repository(checkout)
    for place, module in ((site, "lab_metrics_x"), (site, "unused_x"), (checkout, "edited_x")):
        (place / module).mkdir()
        (place / module / "__init__.py").touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(checkout)
    run = tmp_path / "run"
    repository(root)
    told = write(run, root)
    assert "lab-metrics" not in told["packages"]  # not imported yet: a start does not wait for it
    __import__("lab_metrics_x")
    __import__("edited_x")
    manifest.note_packages(run, root)
    noted = read_json(run / "manifest.json")["packages"]
    assert noted["lab-metrics"] == "1.2+cu130" and "unused" not in noted
    assert re.fullmatch(r"0\.1 \(editable, commit [0-9a-f]{10}\)", noted["edited"])
    assert noted["torch"] == told["packages"]["torch"] and noted["pytest"]

    told = write(run, root)  # a resume with the same packages
    manifest.note_packages(run, root)
    assert "packages" not in read_json(run / "manifest.json")["resumes"][0]
    (site / "Lab_Metrics-1.2+cu130.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: Lab_Metrics\nVersion: 1.3\n"
    )
    write(run, root)
    manifest.note_packages(run, root)
    content = read_json(run / "manifest.json")
    assert content["resumes"][1]["packages"] == {"lab-metrics": "1.3"}
    assert manifest.latest(content)["packages"] == {**noted, "lab-metrics": "1.3"}
    shutil.rmtree(site / "unused-3.0.dist-info")
    (run / "manifest.json").write_text("")
    manifest.note_packages(run, root)  # a damaged manifest does not fail a run


@pytest.mark.parametrize(
    "name", ["src/a.py", "scripts/train.py", "conf/model/mlp.yaml", "my_losses.py", "mine/net.py"]
)
def test_the_code_hash_changes_with_every_kind_of_code(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [manifest.code_sha256(tmp_path)]
    for content in ("x: 1", "x: 2"):
        path.write_text(content)
        found.append(manifest.code_sha256(tmp_path))
    assert len({*found}) == 3
    assert name in manifest.code_files(tmp_path)


def restored(folder: Path, root: Path) -> Path:
    """Type the commands that `way_back` gives, in the current folder; return the restored root."""
    said = manifest.way_back(folder, root)
    found = re.search(r"call the scripts in (.+)/scripts: (git .+)", said)
    assert found is not None and "\n" not in said, said
    done = subprocess.run(["bash", "-c", found[2]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (place,) = shlex.split(found[1])
    return Path(place)


@pytest.mark.parametrize("place", ["the checkout", "a folder in it", "another folder"])
@pytest.mark.parametrize("inner", ["", "nested/project"])
def test_the_commands_restore_changed_and_new_code_wherever_they_are_typed(
    place: str, inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = repository(tmp_path / "a root")
    root, run = top / inner, tmp_path / "my runs" / "r1"
    for name in ("conf/model", "src", "scripts"):
        (root / name).mkdir(parents=True, exist_ok=True)
    run.mkdir(parents=True)
    (top / "src" / "a.py").write_text("x = 2\n")
    new = [root / "src" / "new model.py", root / "conf" / "model" / "mine.yaml"]
    for path in new:
        path.write_text("width: 8\n")
    monkeypatch.chdir({"the checkout": top, "a folder in it": root / "src"}.get(place, tmp_path))
    write(run, root)
    assert manifest.way_back(run, root) == ""  # the control: the code is the run's
    recorded = manifest.code_files(root)
    new[0].write_text("width: 9\n")
    new[1].unlink()
    back = restored(run, root)
    assert manifest.code_files(back) == recorded != manifest.code_files(root)
    assert (tmp_path / "code-of-r1" / "src" / "a.py").read_text() == "x = 2\n"
    assert manifest.way_back(run, back) == ""


def test_the_code_is_that_of_the_latest_start_with_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, run = repository(tmp_path / "root"), tmp_path / "run"
    monkeypatch.chdir(root)
    file = root / "src" / "a.py"
    for text in ("x = 2\n", "x = 3\n", "x = 4\n"):  # the last start may be the one that fails now
        file.write_text(text)
        write(run, root)
    assert (restored(run, root) / "src" / "a.py").read_text() == "x = 3\n"
    file.write_text("x = 5\n")
    assert "git.2.diff" in manifest.way_back(run, root)
    unchanged = tmp_path / "unchanged"
    subprocess.run(["git", "checkout", "-q", "."], check=True)
    write(unchanged, root)
    file.write_text("x = 2\n")
    assert "apply" not in manifest.way_back(unchanged, root)
    assert (restored(unchanged, root) / "src" / "a.py").read_text() == "x = 1\n"


def test_code_missing_from_the_record_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare, run = tmp_path / "bare", tmp_path / "run"
    (bare / "src").mkdir(parents=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(bare)
    write(run, bare)
    assert manifest.way_back(run, bare) == ""
    (bare / "src" / "a.py").write_text("x = 1\n")
    said = " The run's code has changed since. It was not recorded: not a git repository."
    assert manifest.way_back(run, bare) == said
    assert manifest.way_back(tmp_path / "nothing", bare) == ""

    subprocess.run(["git", "init", "-q"], check=True)  # and no commit yet
    write(tmp_path / "first", bare)
    (bare / "src" / "a.py").write_text("x = 2\n")
    assert (restored(tmp_path / "first", bare) / "src" / "a.py").read_text() == "x = 1\n"

    root, other = repository(tmp_path / "root"), tmp_path / "other"
    monkeypatch.chdir(root)
    (root / "src" / "a.py").write_text("x = 2\n")
    content = write(other, root)
    (root / "src" / "a.py").write_text("x = 3\n")
    git = {**content["git"], "redacted": ["src/a.py"]}
    write_json(other / "manifest.json", {**content, "git": git})
    assert "masks what looked like a secret in src/a.py" in manifest.way_back(other, root)
    for commit in ("0" * 40, "--help", "HEAD; touch x"):
        git = {**content["git"], "commit": commit}
        write_json(other / "manifest.json", {**content, "git": git})
        assert manifest.way_back(other, root).endswith(f"commit, {commit}, is not in {root}.")


@pytest.mark.parametrize("found", ["abc", [1], {"name": "x"}])
def test_damaged_accelerators_are_told_and_not_used(
    found: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {"hardware": {"cpu": "x", "accelerators": [{"name": "A"}]}}
    write_json(tmp_path / manifest.NAME, whole)
    assert manifest.read(tmp_path) == whole and not caplog.records  # the negative control
    write_json(tmp_path / manifest.NAME, {"hardware": {"accelerators": found}})
    assert manifest.read(tmp_path) == {"hardware": {"accelerators": []}}
    assert "its accelerators are damaged and not used" in caplog.text
