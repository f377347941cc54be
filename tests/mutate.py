"""`make mutate`: break each promise on purpose and check that its test fails.

Each entry of mutations.yaml names a promise, a change to one file that breaks it, and the tests
that must fail. The changes are made in a copy. If no test fails, the mutation survives, and the
exit code is 1. A change that no longer applies also gives 1, so that the list follows the code.
Arguments select entries by a part of their promise.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutations.yaml"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    promise: str
    file: str
    find: str  # occurs in the file exactly once
    replace: str
    tests: list[str]  # arguments of pytest, relative to the repository

    def apply(self, root: Path) -> str:
        """Change the file under `root` and return its previous text. Raises LookupError."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.find)) != 1:
            raise LookupError(f"{self.file} holds {self.find!r} {count} times, not once")
        path.write_text(text.replace(self.find, self.replace), encoding="utf-8")
        return text


def mutations(path: Path = LIST) -> list[Mutation]:
    return [Mutation(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def run_tests(root: Path, tests: list[str], *, must_pass: bool = False) -> int:
    """Return pytest's exit code: 0 all passed, 1 some failed, otherwise they could not run.

    Prints the end of what pytest printed if they could not run, or failed and `must_pass`.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1) or (must_pass and done.returncode):
        print(done.stdout[-2000:], done.stderr[-2000:])
    return done.returncode


def verdict(mutation: Mutation, root: Path) -> str:
    """Return "killed", or the reason why not."""
    try:
        before = mutation.apply(root)
    except (LookupError, OSError) as error:
        return f"does not apply: {error}"
    try:
        code = run_tests(root, mutation.tests)
    finally:
        (root / mutation.file).write_text(before, encoding="utf-8")
    if code == 1:
        return "killed"
    return "SURVIVED" if code == 0 else f"its tests could not run: exit code {code}"


def copy_tree(root: Path) -> None:
    """Copy the working tree, without ignored files, as a repository: some tests copy it again."""
    listed = ["git", "-C", ROOT, "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(listed, check=True, capture_output=True).stdout
    for name in filter(None, os.fsdecode(names).split("\0")):
        if (ROOT / name).is_file():  # not one that was deleted
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    for command in (["init", "-q"], ["add", "-A"]):  # tests skip where files are untracked
        subprocess.run(["git", "-C", root, *command], check=True)


def main(words: list[str]) -> int:
    chosen = [m for m in mutations() if not words or any(word in m.promise for word in words)]
    if not chosen:
        print("no mutation has such a promise", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        root = Path(folder)
        copy_tree(root)
        # The unchanged code must pass, or a failure would prove nothing.
        tests = sorted({test for m in chosen for test in m.tests})
        if run_tests(root, tests, must_pass=True) != 0:
            print("the tests fail without any mutation", file=sys.stderr)
            return 1
        found = {}
        for mutation in chosen:
            found[mutation.promise] = verdict(mutation, root)
            print(f"{found[mutation.promise]:10} {mutation.promise}", flush=True)
    killed = sum(word == "killed" for word in found.values())
    print(f"\n{killed} of {len(chosen)} mutations killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
