"""Every process that may run a model in the root of the project finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from regrow.processes import begin
from regrow.project import ROOT

NET = """
import profile  # Python's own: the project's module of that name must not hide it

from torch import nn

assert hasattr(profile, "Profile")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, inputs):
        return self.layers(inputs)
"""
QUICK = ("trainer.max_steps=3", "trainer.device=cpu", "trainer.num_threads=1", "data.num_workers=1")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "project"
    forked.copy_project(folder)
    (folder / "my_net.py").write_text(NET)
    (folder / "my_models" / "deep").mkdir(parents=True)  # a package without an __init__.py
    (folder / "my_models" / "deep" / "net.py").write_text("from my_net import Net\n")
    (folder / "my_models" / "data.bin").write_bytes(b"0" * 100)
    for name, target in (("net", "my_net.Net"), ("deep", "my_models.deep.net.Net")):
        (folder / "conf" / "model" / f"{name}.yaml").write_text(f"_target_: {target}\n")
    return folder


def test_code_below_the_prefix_of_python_is_found_and_pythons_own_folders_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Docker images keep a project in /usr/src/app, below the prefix of Debian's Python."""
    monkeypatch.setattr(sys, "prefix", "/usr/src/app/.venv")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    code = ["/usr/src/app/sweep/code/src", "/usr/src/app/src", "/mine/lib/python"]
    own = ["/usr/lib/python311.zip", "/usr/lib/python3.11/lib-dynload"]
    own += ["/usr/src/app/.venv/lib64/python3.11/site-packages", "/usr/lib/python3/dist-packages"]
    own += ["/usr/local/lib/python3.11/dist-packages", ""]
    monkeypatch.setattr(sys, "path", [*own, *code, str(ROOT)])
    assert begin.python_path().split(os.pathsep) == code


def start(project: Path, *command: str) -> str:
    # Without the settings of these tests, such as the path of the package.
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
    environment["PYTHONPATH"] = forked.python_path()
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def target_of(run: Path) -> str:
    assert json.loads((run / "status.json").read_text())["state"] == "completed"
    return (run / "config.yaml").read_text()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "options", "model"),
    [
        (TORCHRUN, ("trainer=ddp",), "net"),
        pytest.param((), ("trainer=ddp", "trainer.devices=2"), "deep", marks=pytest.mark.nightly),
    ],
    ids=["torchrun", "ddp"],
)
def test_every_rank_finds_a_module_of_the_root(
    project: Path, before: tuple[str, ...], options: tuple[str, ...], model: str, tmp_path: Path
) -> None:
    (project / "profile.py").write_text("")
    given = (f"model={model}", *options, *QUICK, f"hydra.run.dir={tmp_path / 'run'}")
    start(project, *before, "scripts/train.py", *given)
    assert "Net" in target_of(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [pytest.param("true", marks=pytest.mark.nightly), "false"])
def test_a_sweep_freezes_and_finds_modules_of_the_root(
    project: Path, fresh: str, tmp_path: Path
) -> None:
    (project / "profile.py").write_text("")  # the job server starts in this folder
    sweep = tmp_path / "sweep"
    given = ("model=net,deep", f"launcher.fresh_processes={fresh}", f"hydra.sweep.dir={sweep}")
    start(project, "scripts/train.py", "-m", *given, *QUICK)
    for number in "01":
        assert "Net" in target_of(sweep / number)
    code = sweep / "code"
    assert (code / "my_net.py").is_file() and (code / "my_models/deep/net.py").is_file()
    assert not (code / "my_models" / "data.bin").exists()


# From another copy of this package than the imported one.
AS_A_SCRIPT = """
import runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] in ("regrow", "lab")]:
    del sys.modules[name]
scripts = sys.argv.pop(1)
sys.path[:] = [scripts, *(path for path in sys.path[1:] if not path.endswith("/src"))]
sys.argv[0] = scripts + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STARTS_A_JOB = """
import os, sys
from regrow.sweep.process import make_context
os.chdir(sys.argv[1])
job = make_context(fresh=True).Process(target=os.getpid)
job.start()
job.join()
sys.exit(job.exitcode)
"""


def test_a_module_in_the_current_folder_hides_none_of_pythons_from_a_job(tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text("raise SystemExit('hidden')")
    done = forked.run(
        [sys.executable, "-c", STARTS_A_JOB, str(tmp_path)], cwd=ROOT, capture_output=True,
        text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "given", [("trainer=ddp", "trainer.devices=2"), ("-m", "seed=0,1")], ids=["ranks", "sweep"]
)
@pytest.mark.slow
def test_a_path_that_pythonpath_would_split_is_refused_in_one_line(
    given: tuple[str, ...], tmp_path: Path
) -> None:
    project = tmp_path / "a:b"
    forked.copy_project(project)
    done = forked.run(
        [sys.executable, "-c", AS_A_SCRIPT, str(project / "scripts"), *QUICK, *given],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"error: {project}/src: other processes find")
    assert [path.name for path in tmp_path.iterdir()] == ["a:b"]
