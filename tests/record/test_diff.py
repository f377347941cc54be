"""git.diff restores a checkout: `git apply` on a clean one gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from regrow.record import diff, manifest

KEY = "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----\n"


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER")
                              for what in ("NAME", "EMAIL")}},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "a", "--allow-empty")


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A committed repository with files of every kind."""
    root = tmp_path / "top"
    (root / "src").mkdir(parents=True)
    git(root, "init", "-qb", "main")
    (root / "src" / "a.py").write_text("".join(f"line {n}\n" for n in range(40)))
    (root / "src" / "crlf.py").write_bytes(b"a\r\nb\r\n")
    (root / "src" / "latin.py").write_bytes("# Grün\n".encode("latin-1"))
    (root / "src" / "moved.py").write_text("".join(f"moved {n}\n" for n in range(40)))
    (root / "gone.py").write_text("x = 1")
    (root / "run.sh").write_text("echo\n")
    (root / "link").symlink_to("run.sh")
    (root / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (root / ".gitignore").write_text("/outputs/\nconf/local/\n")
    commit(root)
    return root


def edit(root: Path) -> None:
    """Make changes of every kind, some of them staged."""
    (root / "src" / "a.py").write_text("".join(f"line {n}\n" for n in range(1, 40)) + "no newline")
    (root / "src" / "crlf.py").write_bytes(b"a\r\nc\r\n\r\n")
    (root / "src" / "latin.py").write_bytes("# Grüße\n".encode("latin-1"))
    git(root, "mv", "src/moved.py", "src/über uns.py")
    (root / "gone.py").unlink()
    (root / "run.sh").chmod(0o755)
    (root / "link").unlink()
    (root / "link").symlink_to("src/a.py")
    (root / "weights.bin").write_bytes(bytes(range(255, -1, -1)) * 9)
    (root / "staged.py").write_text("staged = 1\n")
    git(root, "add", "staged.py")
    new = {
        "my_model.py": b"class Net: ...\n",
        "no_newline.py": b"x = 1\n\ny = 2",
        "crlf new.py": b"x\r\ny\r\n",
        "empty.py": b"",
        "one.py": b"x\n",
        'Ünï "code\\ \ttab.py': "# é\n".encode(),
        "pkg/deep/er/m.py": b"\x0cform feed\n\xff latin\n",
        "conf/model/mine.yaml": b"a: 1\n",
        "conf/model/sub/deep.yaml": b"a: 1\n",
        "executable.py": b"#!/usr/bin/env python\n",
        "-- dash.py": b"+++ b/x\n--- a/x\n@@ -1 +1 @@\n-x\ndiff --git a/x b/x\n",
    }
    for name, content in new.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    (root / "executable.py").chmod(0o755)
    (root / "linked.py").symlink_to("my_model.py")


def restored(root: Path, patch: str, place: Path) -> dict[str, tuple[int, bytes]]:
    """Apply the patch to a clean checkout and return its content."""
    git(root.parent, "clone", "-q", str(root), str(place))
    if patch:
        (place.parent / "git.diff").write_bytes(patch.encode("utf-8", "surrogateescape"))
        git(place, "apply", str(place.parent / "git.diff"))
    return content(place)


def content(root: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in root.rglob("*"):
        if ".git" in path.parts or (path.is_dir() and not path.is_symlink()):
            continue
        read = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()  # noqa: PTH115
        found[str(path.relative_to(root))] = (path.lstat().st_mode & 0o100, read)
    return found


@pytest.mark.parametrize(
    "setting",
    [None, "diff.noprefix=true", "diff.mnemonicPrefix=true", "color.ui=always", "diff.context=0"],
)
def test_git_apply_restores_every_kind_of_change(
    top: Path, tmp_path: Path, setting: str | None
) -> None:
    edit(top)
    if setting is not None:
        git(top, "config", *setting.split("="))
    told = manifest.git(top)
    assert told is not None and told["redacted"] == [] and told["not_in_diff"] == {}
    assert told["diff_is_cut"] is False
    assert restored(top, told["diff"], tmp_path / "clean") == content(top)
    assert restored(top, "", tmp_path / "unpatched") != content(top)  # the negative control


def test_other_new_files_are_listed_by_name_and_hash(top: Path) -> None:
    (top / "data.csv").write_text("a,b\n")
    (top / "settings.yaml").write_text("a: 1\n")
    (top / "binary.py").write_bytes(b"\0")
    for name in ("outputs/x/code.py", "conf/local/account.yaml"):  # ignored
        (top / name).parent.mkdir(parents=True)
        (top / name).touch()
    (top / "env" / "lib").mkdir(parents=True)
    (top / "env" / "pyvenv.cfg").touch()
    (top / "env" / "lib" / "x.py").write_text("installed = 1\n")
    told = manifest.git(top)
    assert told is not None
    names = ["binary.py", "data.csv", "env/lib/x.py", "env/pyvenv.cfg", "settings.yaml"]
    hashes = {name: hashlib.sha256((top / name).read_bytes()).hexdigest() for name in names}
    assert told["not_in_diff"] == hashes and told["untracked"] == names
    assert told["diff"] == ""


def test_photos_and_archives_are_counted_and_code_is_listed_and_restored(
    top: Path, tmp_path: Path
) -> None:
    for number in range(300):
        (top / "photos" / f"{number}.JPG").parent.mkdir(exist_ok=True)
        (top / "photos" / f"{number}.JPG").write_bytes(bytes([number % 256, 0, 1]))
    (top / "photos.tar.gz").write_bytes(b"\0")
    (top / "table.csv").write_text("a\n")
    (top / "weights.pt").write_bytes(b"\0")  # no fingerprint of data covers it
    (top / "my_models.py").write_text("width = 3\n")
    told = manifest.git(top)
    assert told is not None and told["untracked"] == ["my_models.py", "table.csv", "weights.pt"]
    assert (told["num_untracked"], told["num_untracked_media"]) == (3, 301)
    assert [*told["not_in_diff"]] == ["table.csv", "weights.pt"]
    assert told["not_in_diff_nor_listed"] == 0
    assert "my_models.py" in restored(top, told["diff"], tmp_path / "clean")
    for number in range(150):
        (top / f"note_{number:03}.txt").touch()
    told = manifest.git(top)
    assert told is not None
    assert (len(told["untracked"]), told["num_untracked"]) == (100, 153)


def test_files_too_large_for_the_diff_are_listed_and_the_rest_restores(
    top: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (top / "src" / "a.py").write_text("big = 1\n" * 1000)
    (top / "src" / "crlf.py").write_bytes(b"changed\r\n")
    (top / "big.py").write_text("big = 1\n" * 1000)
    (top / "small.py").write_text("small = 1\n")
    monkeypatch.setattr(diff, "LIMIT", 4000)
    told = manifest.git(top)
    assert told is not None and told["diff_is_cut"] is True
    assert len(told["diff"]) <= 4000
    left = {"big.py", "src/a.py"}
    hashes = {name: hashlib.sha256((top / name).read_bytes()).hexdigest() for name in left}
    assert told["not_in_diff"] == hashes
    found = restored(top, told["diff"], tmp_path / "clean")
    now = content(top)
    assert {name for name in now if found.get(name) != now[name]} == left
    monkeypatch.setattr(diff, "LISTED", 1)
    told = manifest.git(top)
    assert told is not None
    assert len(told["not_in_diff"]) == 1 and told["not_in_diff_nor_listed"] == 1


def test_a_project_in_a_folder_of_a_larger_repository(top: Path, tmp_path: Path) -> None:
    project = top / "projects" / "mine"
    (project / "conf").mkdir(parents=True)
    (project / "train.py").write_text("x = 1\n")
    commit(top)
    (project / "train.py").write_text("x = 2\n")
    (project / "net.py").write_text("y = 1\n")
    (project / "conf" / "new.yaml").write_text("a: 1\n")
    (top / "conf").mkdir()
    (top / "conf" / "not_ours.yaml").write_text("a: 1\n")
    (top / "not_ours.py").write_text("z = 1\n")
    told = manifest.git(project)
    assert told is not None
    found = restored(top, told["diff"], tmp_path / "clean")
    expected = {k: v for k, v in content(top).items() if "not_ours" not in k}
    assert found == expected


def test_before_the_first_commit_and_without_git(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "src").mkdir(parents=True)
    (root / "src" / "a.py").write_text("x = 1\n")
    (root / "new.py").write_text("x = 1\n")
    environment = {"GIT_CEILING_DIRECTORIES": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*next(iter(environment.items())))
        assert manifest.git(root) is None
    git(tmp_path, "init", "-qb", "main", str(root))
    git(root, "add", "src")
    told = manifest.git(root)
    assert told is not None and told["commit"] is None
    clean = tmp_path / "clean"
    git(tmp_path, "init", "-q", str(clean))
    (tmp_path / "git.diff").write_text(told["diff"])
    git(clean, "apply", str(tmp_path / "git.diff"))
    assert content(clean) == content(root)


def test_a_redacted_patch_still_applies_and_names_what_was_masked(
    top: Path, tmp_path: Path
) -> None:
    (top / "secret.py").write_text(f'x = 1\ntoken = "abcdef123"\nkey = """\n{KEY}"""\n')
    (top / "tricky.py").write_text("token:\nx=1234567\n")  # the mask must not remove a sign
    (top / "plain.py").write_text("x = 1\n")
    (top / "src" / "a.py").write_text("a\n")
    told = manifest.git(top)
    assert told is not None and told["redacted"] == ["secret.py", "tricky.py"]
    assert "abcdef" not in told["diff"] and "RSA" not in told["diff"]
    found, now = restored(top, told["diff"], tmp_path / "clean"), content(top)
    assert {name for name in now if found[name] != now[name]} == {"secret.py", "tricky.py"}
    assert len(found["secret.py"][1].splitlines()) == len(now["secret.py"][1].splitlines())


def test_submodules_are_named(top: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    git(tmp_path, "init", "-qb", "main", str(other))
    (other / "lib.py").write_text("x = 1\n")
    commit(other)
    allowed = ("-c", "protocol.file.allow=always")
    git(top, *allowed, "submodule", "--quiet", "add", str(other), "vendor/lib")
    commit(top)
    told = manifest.git(top)
    head = git(other, "rev-parse", "HEAD").strip()
    assert told is not None
    assert told["submodules"] == {"vendor/lib": {"commit": head, "dirty": False}}
    (top / "vendor" / "lib" / "lib.py").write_text("x = 2\n")
    told = manifest.git(top)
    assert told is not None and told["submodules"]["vendor/lib"]["dirty"] is True
    assert "Subproject" not in told["diff"]  # `git apply` could not restore it


def test_a_copy_of_the_code_keeps_the_patch(top: Path, tmp_path: Path) -> None:
    edit(top)
    (top / "secret.py").write_text('password = "abcdef123"\n')
    copy = tmp_path / "code"
    copy.mkdir()
    manifest.write_origin(copy, top)
    assert manifest.git(copy) == manifest.git(top)
    run = tmp_path / "run"
    run.mkdir()
    told = manifest.write(run, command=[], root=copy, data=None, seeds={})
    assert told["git"]["redacted"] == ["secret.py"] and "diff" in told["git"]
    patch = (run / "git.diff").read_bytes().decode("utf-8", "surrogateescape")
    (top / "secret.py").write_text("password = ***\n")
    assert restored(top, patch, tmp_path / "clean") == content(top)
