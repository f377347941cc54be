"""The advice of an error is a command that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from forked import run_script

MIXER = """from torch import nn


class Mixer(nn.Module):
    def __init__(self, num_outputs, depth=2):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), *(nn.LazyLinear(8) for _ in range(depth)))
        self.head = nn.LazyLinear(num_outputs)

    def forward(self, inputs):
        return self.head(self.layers(inputs))
"""
NODE = "# Mine.\n_target_: mixer.Mixer\nnum_outputs: ${data.num_outputs}\n"


def train(folder: Path, *arguments: str, code: int = 0) -> str:
    return run_script(folder, *arguments, path=folder, code=code)


# A mistake, what its error says, and whether the command behind it must compose.
MISTAKES = [
    ("optimizer.lr=0.1\n", r"'optimizer.lr=0.1\\n' contains a line break. Leave it out: (.*)"),
    ("notes=a\nb", r"a line break. Leave it out: notes=ab, or quote a text that has one: (.*)"),
    ("model=cnn\noptimizer=sgd", r"contains a line break. Write them as 2 arguments: (.*)"),
    ("model.hidden=[1,\n2]", r"contains a line break. Leave it out: (.*)"),
    ("data.sampling=w", r"must be balanced or .* For a column of that name: (.*)"),
    ("data.sampling.column=w", r"data.sampling has no keys yet. Give it as a whole: (.*)"),
    ("param_groups.lr_scale.head=0.1", r"lr_scale has no keys yet. Give it as a whole: (.*)"),
    ("data.mixing.alpha=0.3", r"data.mixing is null. Give it as a whole, such as (.*)"),
    (
        "data.augmentation={_target_: torchvision.transforms.v2.RandomErasing, p: 0.3}",
        r"data.augmentation: Hydra merges this node into the option's, which has other keys. To "
        r"replace that: (.*)",
    ),
    (
        "data.augmentation={_target_: torchvision.transforms.v2.RandomErasing}",
        r"data.augmentation.pad, .* takes no such argument. Hydra merges a node into the option's."
        r" To replace it: (.*)",
    ),
    (
        "data.augmentation._target_=torchvision.transforms.v2.RandomErasing",
        r"Hydra merges a node into the option's. To replace it: (.*)",
    ),
]


@pytest.mark.parametrize(("argument", "says"), MISTAKES)
def test_the_advice_for_a_value_composes(argument: str, says: str, tmp_path: Path) -> None:
    said = train(tmp_path, argument, code=2)
    found = re.search(f"{says}\n$", said)
    assert found and said.count("\n") == 1, said
    advice = found[1].replace("$'", "'").replace("\\012", "\n")  # as bash reads it
    config = train(tmp_path, *shlex.split(advice), "--cfg", "job")
    if "RandomErasing" in argument:
        node = config.partition("  augmentation:\n")[2].partition("  transforms:")[0]
        assert "_target_: torchvision.transforms.v2.RandomErasing" in node and "pad:" not in node


@pytest.mark.slow
def test_a_key_that_takes_no_single_value_says_what_it_takes(tmp_path: Path) -> None:
    said = train(tmp_path, "data.normalize.mean=[1]", code=2)
    assert "Give it as a whole: it takes one of train, imagenet, none, or {mean" in said
    said = train(tmp_path, "data.augmentation={flipp: true}", code=2)
    assert said == "error: data.augmentation.flipp: there is no such key. Did you mean " + (
        "data.augmentation.flip?\n"
    )
    said = train(tmp_path, "data.transforms.first=1", code=2)
    assert said.startswith("error: data.transforms.first: data.transforms is a list.")


def test_a_typed_node_that_is_not_merged_gets_no_advice_to_replace_it(tmp_path: Path) -> None:
    node = "data.mixing={_target_: lab.data.augment.MixUp, alpha: 0.2, beta: 2}"
    said = train(tmp_path, node, code=2)
    assert (
        "data.mixing.beta: lab.data.augment.MixUp takes no such argument. It takes alpha." in said
    )
    said = train(tmp_path, "optimizer={_target_: torch.optim.SGD, momentum: 0.9}", code=2)
    assert said.endswith(
        "Write the node to conf/optimizer/mine.yaml, and choose it: optimizer=mine\n"
    )


@pytest.mark.slow
def test_a_key_in_python_alone_is_offered_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "mixer.py").write_text(MIXER, encoding="utf-8")
    (tmp_path / "D" / "model").mkdir(parents=True)
    file = tmp_path / "D" / "model" / "mixer.yaml"
    file.write_text(NODE, encoding="utf-8")
    there = ("--config-dir", "D", "model=mixer")
    said = train(tmp_path, *there, "model.depth=3", code=2)
    assert said == (
        f"error: model.depth: mixer.Mixer takes it, and {file} does not list it. Add `depth: 3` to "
        "that file, or type a plus for this run alone: +model.depth=3\n"
    )
    once = train(tmp_path, *there, "+model.depth=3", "--check", "trainer.device=cpu")
    file.write_text(NODE + "depth: 3\n", encoding="utf-8")
    there = (*there, "model.depth=3", "--check", "trainer.device=cpu")
    assert train(tmp_path, *there).splitlines()[:4] == once.splitlines()[:4]
    said = train(tmp_path, "model._target_=mixer.Mixer", "model.depth=3", code=2)
    assert said.endswith("takes it, and no file lists it. Add a plus: +model.depth=3\n")


@pytest.mark.slow
def test_an_argument_that_the_run_passes_is_not_offered_as_a_key(tmp_path: Path) -> None:
    for argument in ("+task.loss=3", "+step.plan=1", "+optimizer.params=[]"):
        said = train(tmp_path, argument, code=2)
        assert "has no such key." in said and argument.partition(".")[2] not in said
