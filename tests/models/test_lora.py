"""Adapters by peft, in the YAML of docs/recipes/lora.md: only they change, and resume exactly."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from finished import finished
from running import CPU, config_of, fingerprint, train
from torch import nn

from lab.models.mlp import MLP
from regrow.checkpoint import writer
from regrow.load import load_run
from regrow.project import ROOT
from regrow.runs.training import build

pytestmark = [
    pytest.mark.slow,  # importing peft takes seconds
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora"),
]
BASE = ("trainer.num_threads=1", "trainer.device=cpu", "optimizer.lr=0.01", "model.hidden=[32,32]")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The arguments of a run with the recipe's model=lora, from the weights of another run."""
    root = tmp_path_factory.mktemp("lora")
    page = (ROOT / "docs" / "recipes" / "lora.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n# conf/(model/lora\.yaml)\n(.*?)^```$", page, re.M | re.S)
    file = root / "conf" / block[0]
    file.parent.mkdir(parents=True)
    file.write_text(block[1], encoding="utf-8")
    base = finished(root / "base", *BASE, "trainer.max_steps=60")
    return (
        f"hydra.searchpath=[file://{root / 'conf'}]",
        *("model=lora", f"init_from={base}", "trainer.num_threads=1", "trainer.device=cpu"),
        *("model.model.hidden=[32,32]", "optimizer.lr=0.01", "trainer.max_steps=24"),
    )


def test_a_model_with_adapters_starts_from_the_weights_inside(
    arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(*arguments)
    model = build(config, CPU).state.model
    base = load_run(config["init_from"]).model
    inputs = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), base(inputs))  # the adapters have no effect yet
        fresh = build(config_of(*arguments, "init_from=null"), CPU).state.model
        assert not torch.equal(fresh.eval()(inputs), base(inputs))  # the control
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert len(trained) == 6 and all("lora_" in name or "head" in name for name in trained)
    assert "start fresh: base_model.model.body.0.lora_A.default.weight" in caplog.text


def test_adapters_stopped_and_resumed_end_with_the_same_bits(
    arguments: tuple[str, ...], tmp_path: Path
) -> None:
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "stopped", *arguments, stop_at=7)
    train(tmp_path / "stopped", *arguments, stop_at=19)
    train(tmp_path / "stopped", *arguments)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    train(tmp_path / "other", *arguments, "seed=1", "data.source.seed=0")
    assert fingerprint(tmp_path / "other") != fingerprint(tmp_path / "whole")  # the control
    train(tmp_path / "slices", *arguments, "trainer.accumulation_steps=3")
    whole, slices = (
        writer.load((tmp_path / name / "checkpoints" / "last").resolve())[0]["model"]
        for name in ("whole", "slices")
    )
    for name, value in whole.items():
        assert torch.allclose(slices[name], value, atol=1e-5), name  # type: ignore[arg-type]


def test_a_run_with_adapters_keeps_its_base_and_loads_from_its_folder(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(tmp_path / "run", *arguments)
    base = load_run(config_of(*arguments)["init_from"]).model.state_dict()
    parts, _ = writer.load((folder / "checkpoints" / "last").resolve())
    saved = parts["model"]
    assert torch.equal(saved["base_model.model.body.0.base_layer.weight"], base["body.0.weight"])  # type: ignore[arg-type]
    head = saved["base_model.model.head.modules_to_save.default.weight"]
    assert not torch.equal(head, base["head.weight"])  # type: ignore[arg-type]
    kept = parts["optimizer"]["state"]
    assert isinstance(kept, dict) and len(kept) == 6  # of the trained parameters alone

    monkeypatch.setattr(sys, "argv", ["predict.py", arguments[0]])  # where conf/model/lora.yaml is
    run = load_run(folder)
    images = run.data.source.test.inputs
    found = run.predict(images)
    merged: nn.Module = run.model.merge_and_unload()
    assert type(merged) is MLP and {*merged.state_dict()} == {*base}
    inputs = next(iter(run.data.evaluation("test", device=run.device))).inputs
    with torch.no_grad():
        shares = merged(inputs).double().softmax(1).numpy()
    assert found.probabilities is not None
    assert abs(shares - found.probabilities[: len(shares)]).max() < 1e-5


def test_weights_are_not_downloaded_for_a_model_inside_adapters(tmp_path: Path) -> None:
    from regrow.runs.loaded import _without_downloads

    node = {"_target_": "peft.get_peft_model", "model": {"pretrained": True, "hidden": [1]}}
    _without_downloads(node)
    assert node["model"] == {"pretrained": False, "hidden": [1]}
