"""The agent of a wandb sweep starts the command that docs/recipes/loggers.md prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forked import python_path

from regrow.project import ROOT

# The code of wandb that `wandb agent` runs when the server proposes values.
AGENT = """
import json, os, sys
from wandb.wandb_agent import Agent
given = json.loads(sys.argv[1])
os.environ["WANDB_SWEEP_ID"] = "abcd1234"
agent = Agent(None, None, "abcd1234")
agent._sweep_command = given["command"]
agent._command_run({"run_id": "run12345", "program": given["program"], "args": given["args"]})
sys.exit(agent._run_processes["run12345"].wait(timeout=240))
"""


@pytest.mark.slow
def test_the_agent_of_a_wandb_sweep_starts_a_run_with_its_values_and_its_id(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recipes" / "loggers.md").read_text(encoding="utf-8")
    found = re.search(r"^```yaml\n(# sweep\.yaml\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None
    sweep = yaml.safe_load(found[1])
    chosen = {"optimizer.lr": 0.002, "model.dropout": 0.2}
    assert {*chosen} == {*sweep["parameters"]}
    short = ["debug=fast", "trainer.device=cpu", "logger.wandb.mode=offline", "hydra.run.dir=run"]
    given = {
        "program": str(ROOT / sweep["program"]),
        "command": [*sweep["command"], *short],
        "args": {key: {"value": value} for key, value in chosen.items()},
    }
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, "-c", AGENT, json.dumps(given)],
        cwd=tmp_path,
        env={
            "PATH": f"{folder}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": python_path(),
            "WANDB_ERROR_REPORTING": "false",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 0.002 and config["model"]["dropout"] == 0.2
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": "run12345"}
    (offline,) = (tmp_path / "run" / "wandb").glob("offline-run-*-run12345")
    assert offline.is_dir()
