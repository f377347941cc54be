"""Data as a user configures it: composed from conf/data, with overrides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import skip_in_a_project

from regrow.config.check import check_data
from regrow.config.hydra_access import plain, version_arguments
from regrow.config.targets import allow, instantiate
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import Data

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def make_data() -> Callable[..., Data]:
    def make(name: str, *overrides: str, seed: int = 0) -> Data:
        if not (CONF / f"{name}.yaml").is_file():
            skip_in_a_project(f"conf/data/{name}.yaml is not there")
        with initialize_config_dir(str(CONF), **version_arguments()):
            config = compose(name, overrides=list(overrides))
        root = OmegaConf.create({"seed": seed, "data": config})
        node = plain(root.data)
        check_data(node)  # as the check of a command line does, and the next line too
        allow(node)
        data = instantiate(node)
        assert isinstance(data, Data)
        return data

    return make


@pytest.fixture
def cpu() -> torch.device:
    return torch.device("cpu")


def _same(ours: list[LoadedBatch], theirs: list[LoadedBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.inputs, b.inputs)
        and torch.equal(a.targets, b.targets)
        and (a.num_local, a.num_global) == (b.num_local, b.num_global)
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.fixture
def same() -> Callable[[list[LoadedBatch], list[LoadedBatch]], bool]:
    return _same


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """24 distinct images of 20x26 pixels in two classes."""
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "images" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (20, 26, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return tmp_path / "images"


@pytest.fixture
def global_state_unchanged() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())
