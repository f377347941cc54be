"""An error in the user's own code is one line with its place; the engine's keep a traceback."""

from __future__ import annotations

import importlib
import json
import shlex
import statistics
import sys
import sysconfig
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import typing_extensions
import yaml
from PIL import Image
from running import config_of
from torch import nn

from regrow.config.own_code import owner_of
from regrow.config.targets import instantiate
from regrow.errors import OwnCodeError, UserError
from regrow.failing import SET_BY_US
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.sampling import permutation
from regrow.project import ROOT
from regrow.protocols import Lab
from regrow.runs import first_calls, model_checks
from regrow.runs.first_calls import explained

TRAIN = ROOT / "scripts" / "train.py"
QUICK = ("trainer.max_steps=4", "trainer.device=cpu", "trainer.num_threads=1", "data.num_workers=0")
MODELS = """
import torch
from torch import nn

from lab.tasks.tasks import Multiclass

STEPS = []


class Small(nn.Module):
    def __init__(self, groups, width, fails_at):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 6, 3, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(width, 10)
        self.fails_at = fails_at

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            STEPS.append(x)
            if len(STEPS) == self.fails_at:
                raise KeyError("training")
        return self.head(self.body(x))  # the head


class Scaled(Small):
    def __init__(self, drop: float = 0, either: "int | float" = 1, scale=1.0, count=1, num: int=1):
        super().__init__(1, 6, None)


class Leaving(Small):
    def forward(self, x):
        try:
            return super().forward(x)
        except KeyError:
            raise SystemExit(0)  # leaves


class Function:
    def __call__(self, x):
        return x


def forgets_to_return():
    nn.Sequential(*Layers())


class Wide(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 11))


class Layers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.Sequential(nn.ReLU(), nn.Linear(9, 10)))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Layers()

    def forward(self, x):
        return self.layers(
            x
        )


def plain():
    return nn.Sequential(*Layers())


def loss(outputs, targets):
    return outputs[:, 70]


def roots(outputs, targets):
    return torch.where(outputs > 0, outputs.sqrt(), 0.0).sum(1)


class Optimizer(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        raise ValueError(f"not {lr}")


def splits(**given):
    return {}["train"]


class Measured(Multiclass):
    def __init__(self, fails, **given):
        super().__init__(**given)
        self.fails = fails

    def check(self, outputs, targets):
        pass

    def metrics(self, device):
        return Hits(self.fails)


class Hits:
    names = ("hits",)

    def __init__(self, fails):
        self.fails, self.sums = fails, []

    def update(self, outputs, targets, weights=None):
        if self.fails == "update":
            self.sums.appendd(targets.sum())

    def scalars(self):
        if self.fails == "scalars":
            return {"hits": total}
        return {"hits": 1.0}

    def details(self):
        return {}
"""
LINES = {text.strip(): number for number, text in enumerate(MODELS.splitlines(), 1)}
FILES = {
    "model/small": "_target_: my_models.Small\ngroups: 1\nwidth: 6\nfails_at: null\n",
    "model/scaled": "_target_: my_models.Scaled\ndrop: 0\neither: 1\nscale: 1\ncount: 1\nnum: 1\n",
    "model/leaving": "_target_: my_models.Leaving\ngroups: 1\nwidth: 6\nfails_at: null\n",
    "model/function": "_target_: my_models.Function\n",
    "model/forgets": "_target_: my_models.forgets_to_return\n",
    "model/wide": "# Mine.\n_target_: my_models.Wide\n",
    "model/layers": "_target_: my_models.Layers\n",
    "model/nested": "_target_: my_models.Nested\n",
    "model/plain": "_target_: my_models.plain\n",
    "loss/mine": "_target_: my_models.loss\n_partial_: true\n",
    "loss/roots": "_target_: my_models.roots\n_partial_: true\n",
    "optimizer/mine": "_target_: my_models.Optimizer\n_partial_: true\nlr: 0.5\n",
    "task/measured": (
        "defaults: [multiclass]\n_target_: my_models.Measured\nmonitor: val/hits\nfails: null\n"
    ),
    "data/mine": "defaults: [digits]\nsource: {_target_: my_models.splits}\n",
}


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_models.py").write_text(MODELS)
    for name, text in FILES.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def start(mine: Path, cwd: Path, *arguments: str, script: tuple[str, ...] = (str(TRAIN),),
          **environment: str) -> Any:  # fmt: skip
    env = {"PYTHONPATH": forked.python_path(mine), "HOME": str(cwd), **environment}
    given = ("--config-dir", str(mine / "conf"), *QUICK, *arguments)
    command = [sys.executable, *script, *given]
    inherited = {
        k: v for k, v in forked.os.environ.items() if k not in ("HYDRA_FULL_ERROR", SET_BY_US)
    }
    return forked.run(
        command, cwd=cwd, env={**inherited, **env}, capture_output=True, text=True, timeout=200
    )


def at(text: str) -> str:
    """Return the place of a line of the module, as messages name it."""
    return f"my_models.py:{LINES[text]}"


LINEAR = "Linear(in_features=9, out_features=10, bias=True)): "
SEVEN = "Linear(in_features=7, out_features=10, bias=True)): "
BODY = "nn.Conv2d(1, 6, 3, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten()"
HEAD = "return self.head(self.body(x))  # the head"
MEASURED = "model=small task=measured loss=cross_entropy trainer.mode=max"
# Each command, and the parts of its line; {} is the folder of the module.
SAID = {
    "model=small model.width=7": (
        "error: {}" + at(HEAD) + f", in forward ({SEVEN}{HEAD}: RuntimeError: ",
        " The inputs had shape (180, 1, 8, 8). HYDRA_FULL_ERROR=1 shows the whole traceback.",
    ),
    "model=layers": (
        "error: {}" + at("class Layers(nn.Sequential):") + ", Layers: layer 2.1, Linear(in_feat",
        "RuntimeError: ",
    ),
    "model=nested": (
        "error: {}" + at("return self.layers(") + f", in forward (layer 2.1, {LINEAR}return self.l",
        "return self.layers( x ): RuntimeError: ",
    ),
    "model=plain": ("error: model: layer 2.1, Linear(in_features=9, ", "RuntimeError: "),
    "model=small loss=mine": (
        "error: {}" + at("return outputs[:, 70]") + ", in loss: return outputs[:, 70]: IndexErr",
        ", the outputs (180, 10), the targets (180,). HYDRA_FULL_ERROR=1 shows the whole trace",
    ),
    "model=small model.width=abc": (
        "error: model.width=abc must be an integer, such as its default, 6.",
        "",
    ),
    "model=small model.width=2.5": (
        "error: model (my_models.Small, {}" + at("self.head = nn.Linear(width, 10)"),
        " (width=2.5). HYDRA_FULL_ERROR=1 shows",
    ),
    "model=small model.width=0": (  # the layer's own error names no key
        "error: {}" + at(HEAD) + ", in forward (Linear(in_features=0, out_features=10",
        "shows the whole traceback. Set by the command: model.width=0.",
    ),
    "model=small model.width=-3": (
        "error: model (my_models.Small, {}" + at("self.head = nn.Linear(width, 10)"),
        " (model.width=-3). HYDRA_FULL_ERROR=1 shows",
    ),
    "model=small model.width=[6]": (  # the class itself may take a list
        "error: model (my_models.Small, {}" + at("self.head = nn.Linear(width, 10)"),
        "TypeError: ",
    ),
    "model=small model.groups=5": (
        "error: model (my_models.Small, {}" + at(BODY) + "): ValueError: ",
        "groups. HYDRA_FULL_ERROR=1 shows the whole traceback.",
    ),
    "model=small optimizer=mine": (
        ".yaml:1: optimizer (my_models.Optimizer, {}" + at('raise ValueError(f"not {lr}")'),
        "): not 0.5.",
    ),
    "model=wide": (  # the choice of the task, in conf/train.yaml, is right
        "/conf/model/wide.yaml:2: task=multiclass needs outputs of shape (B, 10), got (B, 11).",
        "Give the model 10 outputs.",
    ),
    "model=small optimizer=mine optimizer.lr=3": (  # a typed value may be the cause
        "error: optimizer (my_models.Optimizer, {}my_models.py:",
        "): not 3.",
    ),
    f"{MEASURED} task.fails=update": (
        "error: {}" + at("self.sums.appendd(targets.sum())") + ", in update: self.sums.app",
        "AttributeError: 'list' object has no attribute 'appendd'. The inputs had shape (180, ",
    ),
    f"{MEASURED} task.fails=scalars": (
        "error: {}" + at('return {"hits": total}') + ', in scalars: return {"hits": total}: Name',
        "the targets (180,).",
    ),
    "model=small data=mine": (
        ".yaml:2: data.source (my_models.splits, {}"
        + at('return {}["train"]')
        + "): KeyError: 'tr",
        "",
    ),
}


@pytest.mark.parametrize("key", ["drop", "either", "scale", "count", "num"])
def test_a_fraction_is_taken_for_an_integer_if_the_signature_says_so(
    key: str, mine: Path, tmp_path: Path
) -> None:
    done = start(mine, tmp_path, "model=scaled", f"model.{key}=0.5", "--check")
    if key in ("count", "num"):
        said = f"error: model.{key}=0.5 must be an integer. If it may be a fraction, write its def"
        assert done.returncode == 2 and done.stderr.startswith(said), done.stderr
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", SAID)
def test_an_error_in_ones_own_code_is_one_line_with_its_place(
    given: str, mine: Path, tmp_path: Path
) -> None:
    first, later = SAID[given]
    done = start(mine, tmp_path, *given.split(), "hydra.run.dir=run")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert first.replace("{}my_m", f"{mine}/my_m") in line and later in line
    assert line.count("cannot be multiplied") <= 1 and "torch/nn" not in line
    assert [*tmp_path.iterdir()] == []


class OwnMetrics:
    """Metrics of one's own, whose `update` and `scalars` are the two functions."""

    def __init__(self, update: Any, scalars: Any) -> None:
        self.functions, self.calls = (update, scalars), ""

    def update(self, outputs: torch.Tensor, targets: torch.Tensor, weights: None) -> None:
        self.calls += "u"
        assert not outputs.requires_grad
        self.functions[0](outputs, targets)

    def details(self) -> dict[str, Any]:
        self.calls += "d"
        return {}

    def scalars(self) -> Any:
        self.calls += "s"
        return self.functions[1]()


class OwnTask:
    def __init__(self, update: Any, scalars: Any, *, shares: bool = False) -> None:
        self.functions, self.made = (update, scalars), []
        self.shares = shares

    def metrics(self, device: torch.device) -> OwnMetrics:
        if not (self.made and self.shares):
            self.made.append(OwnMetrics(*self.functions))
        return self.made[-1]


def checked(task: Any, *, gathers: bool = True, count: int = 4) -> list[str]:
    """Check the metrics with a batch; return what was called of each of them."""
    model, weights = nn.Dropout(), None
    batch = LoadedBatch(torch.ones(count, 3), torch.arange(count), weights, count, count, 0)
    model_checks.check_metrics(model, task, batch, "fp32", gathers=gathers)
    assert model.training and batch.targets.tolist() == [*range(count)]
    return [each.calls for each in task.made]


def unbound() -> float:
    if len(OwnTask.__name__) == 0:
        value = 1.0
    return value


def fine(*_: Any) -> None: ...


WRONG = {  # in `update`, and in `scalars`
    "a wrong name of a module": (lambda *_: nn.Identity().updat(), None),
    "too many columns": (lambda outputs, _: outputs[:, 70], None),
    "two sizes": (lambda outputs, targets: nn.functional.mse_loss(outputs, targets), None),
    "a value for each row": (lambda outputs, _: float(outputs), None),
    "a wrong name": (fine, lambda: totals),  # type: ignore[name-defined]  # noqa: F821
    "a wrong type": (fine, lambda: 1 + "1"),  # type: ignore[operator]
}
OF_FEW = {
    "one value in a library": (lambda *_: statistics.stdev([1.0]), None),
    "a division by what is not predicted yet": (lambda *_: 1 / 0, None),
    "a matrix of few rows": (lambda outputs, _: torch.linalg.cholesky(outputs[:3]), None),
    "one value": (fine, lambda: statistics.stdev([1.0])),
    "a division by a class's count": (fine, lambda: 1 / 0),
    "no rows of a class": (fine, lambda: torch.stack([])),
    "no best value yet": (fine, lambda: max([None], key=fine).item()),  # type: ignore[attr-defined]
    "no value without a class": (fine, unbound),
}


@pytest.mark.parametrize("name", WRONG)
def test_metrics_that_fail_with_any_batch_are_refused(name: str) -> None:
    update, scalars = WRONG[name]
    with pytest.raises(OwnCodeError, match=r"test_own_faults\.py:\d+, in <lambda>"), explained():
        checked(OwnTask(update, scalars or fine))


@pytest.mark.parametrize("name", OF_FEW)
def test_metrics_that_fail_only_with_few_examples_are_not_refused(name: str) -> None:
    update, scalars = OF_FEW[name]
    assert "u" in checked(OwnTask(update, scalars or fine))[0]


def test_a_check_of_metrics_leaves_nothing_behind() -> None:
    def draws(outputs: torch.Tensor, targets: torch.Tensor) -> None:
        torch.rand(3)
        targets.zero_()

    before = torch.get_rng_state()
    assert checked(OwnTask(draws, fine)) == ["uds", ""]
    assert torch.equal(torch.get_rng_state(), before)
    assert checked(OwnTask(draws, fine), gathers=False) == ["u", ""]  # others would be waited for
    assert checked(OwnTask(draws, fine, shares=True)) == [""]  # a later evaluation's own
    assert checked(OwnTask(draws, fine), count=1) == [""]


@pytest.mark.slow
def test_a_check_says_the_same_and_the_whole_traceback_comes_on_request(
    mine: Path, tmp_path: Path
) -> None:
    given = ("model=small", "model.width=7", "--check")
    said = start(mine, tmp_path, *given)
    (line,) = said.stderr.splitlines()
    assert said.returncode == 2 and line.startswith(f"error: {mine}/my_models.py:")
    whole = start(mine, tmp_path, *given, HYDRA_FULL_ERROR="1")
    assert whole.returncode == 2 and whole.stderr.splitlines()[-1] == line
    assert "torch/nn/modules/linear.py" in whole.stderr
    # The training step of the check, after the checks of the first outputs.
    said = start(mine, tmp_path, "model=small", "model.fails_at=2", "--check")
    assert said.returncode == 2 and "KeyError: 'training'. The inputs had shape" in said.stderr
    assert [*tmp_path.iterdir()] == []


def test_the_first_steps_error_is_one_line_and_its_traceback_is_in_the_log(
    mine: Path, tmp_path: Path
) -> None:
    # The first pass with gradients in training mode is a check's, which passes over errors.
    done = start(mine, tmp_path, "model=small", "model.fails_at=2", "hydra.run.dir=run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"error: {mine}/{at('raise KeyError(' + chr(34) + 'training' + chr(34) + ')')}"
    )
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log and "lab/step.py" in log and log.rstrip().endswith(line[7:])
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 0


def test_debug_anomaly_ends_with_the_operation_and_one_traceback(
    mine: Path, tmp_path: Path
) -> None:
    """Autograd shows that of the forward pass, which ends in the user's line."""
    done = start(mine, tmp_path, "debug=anomaly", "model=mlp", "loss=roots")
    assert done.returncode == 1, done.stderr
    assert "outputs.sqrt(), 0.0).sum(1)" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert "error: failed at step 0: Function 'SqrtBackward0'" in done.stderr.splitlines()[-1]


def test_a_step_without_a_finite_gradient_is_named_once(mine: Path, tmp_path: Path) -> None:
    done = start(mine, tmp_path, "model=mlp", "loss=roots", "trainer.max_skipped_steps=1")
    assert done.returncode == 1, done.stderr
    assert "error: failed at step 1: no finite loss or gradient" in done.stderr


@pytest.mark.slow
def test_code_that_leaves_the_program_never_looks_like_a_complete_run(
    mine: Path, tmp_path: Path
) -> None:
    """At the first call in one line with its place, and later as any other error."""
    for fails_at in (1, 2):  # a check's call, and the first step's
        done = start(mine, tmp_path, "model=leaving", f"model.fails_at={fails_at}")
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert at("raise SystemExit(0)  # leaves") in line and "SystemExit: 0." in line
    done = start(mine, tmp_path, "model=leaving", "model.fails_at=3", "hydra.run.dir=run")
    assert done.returncode == 1
    assert "failed at step 1: sys.exit() ended the run before its last step" in done.stderr
    assert "raise SystemExit(0)  # leaves" in done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_model_that_is_not_a_module_is_one_line(mine: Path, tmp_path: Path) -> None:
    for option, made in (("function", "Function"), ("forgets", "NoneType")):
        done = start(mine, tmp_path, f"model={option}", "hydra.run.dir=run")
        assert done.returncode == 2, done.stderr
        said = f"error: model: its _target_ gave {made}, which is not a torch.nn.Module."
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_an_error_of_the_first_step_of_two_ranks_is_one_line(mine: Path, tmp_path: Path) -> None:
    given = ("trainer=ddp", "trainer.devices=2", "hydra.run.dir=run")
    done = start(mine, tmp_path, "model=small", "model.fails_at=2", *given)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "KeyError: 'training'. The inputs had shape (32, 1, 8, 8)." in done.stderr


def test_the_same_error_in_a_later_step_keeps_its_traceback(mine: Path, tmp_path: Path) -> None:
    done = start(mine, tmp_path, "model=small", "model.fails_at=3", "hydra.run.dir=run")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith("KeyError: 'training'")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 1


# The content of a module, its line, and what is said of it.
WHOLE = " HYDRA_FULL_ERROR=1 shows the whole traceback."
FAILED_IMPORTS = {
    "import torch\nimport absent.part\n": (
        2, "ModuleNotFoundError: No module named 'absent'. Install absent, or correct that line.",
    ),
    "\nimport failing\n": (  # a package that the name of the module begins with
        2, "ModuleNotFoundError: No module named 'failing'. Install failing, or correct that line.",
    ),
    "class Net(:\n    pass\n": (1, "SyntaxError: invalid syntax. Correct that line."),
    "import json\n\nwidth = json.loads('{')\n": (
        3, "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1). Correct that line.",
    ),
    "from torch.nn import Liner\n": (1, "ImportError: cannot import name 'Liner' from"),
    "import sys\nsys.exit(3)\n": (
        2, "SystemExit: 3. Put what only a script does under if __name__ == \"__main__\".",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", FAILED_IMPORTS)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(
    content: str, tmp_path: Path
) -> None:
    line, words = FAILED_IMPORTS[content]
    module = tmp_path / "own" / "failing_models.py"
    (module.parent / "conf").mkdir(parents=True)
    module.write_text(content)
    done = start(module.parent, tmp_path, "model._target_=failing_models.Net", "hydra.run.dir=run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    where = f"importing failing_models failed at {module}:{line}: "
    assert f"model._target_=failing_models.Net: {where}{words}" in done.stderr
    assert done.stderr.endswith(WHOLE + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_module_that_is_not_there_and_one_of_a_library_get_other_words(
    mine: Path, tmp_path: Path
) -> None:
    """The negative control: neither is a line of the user's."""
    for target in ("absent_models.Net", "my_models.absent.Net"):
        done = start(mine, tmp_path, f"model._target_={target}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "failed at" not in done.stderr and "there is no " in done.stderr
    installed = tmp_path / "site-packages" / "fragile.py"
    (installed.parent / "conf").mkdir(parents=True)
    installed.write_text("def check():\n    raise OSError('no driver')\n\n\ncheck()\n")
    done = start(installed.parent, tmp_path, "model._target_=fragile.Net")
    assert f"importing fragile failed at {installed}:2: OSError: no driver. Rei" in done.stderr


BROKEN_ENGINE = f"""
import runpy, sys
from regrow.runs import model_checks
model_checks.parts_of = int
sys.argv[0] = {str(TRAIN)!r}
sys.path.insert(0, {str(TRAIN.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_fault_of_the_engine_keeps_its_traceback(mine: Path, tmp_path: Path) -> None:
    done = start(mine, tmp_path, "model=small", script=("-c", BROKEN_ENGINE))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "model_checks.py" in done.stderr


def test_errors_that_are_not_the_users_pass_through() -> None:
    def failing(error: Exception) -> None:
        with explained():
            raise error

    for error in (FloatingPointError("NaN"), MemoryError(), RuntimeError("closed by peer")):
        with pytest.raises(type(error)) as found:
            failing(error)
        assert found.value is error and not isinstance(error, OwnCodeError)
    with pytest.raises(torch.OutOfMemoryError):
        failing(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(OwnCodeError, match=r"in failing: raise error: ValueError\. HYDRA"):
        failing(ValueError())
    with pytest.raises(ValueError, match=r"^later$"), explained(lambda: False):
        raise ValueError("later")


RENAMES = """
import torch

def loss(outputs):
    outputs = outputs[:, 0]
    raise ValueError("a column")

def forward(batch):
    outputs = torch.ones(4, 10)
    loss(outputs)
"""


@pytest.mark.parametrize("folder", ["mine", "site-packages"])
def test_the_shape_of_the_outputs_is_the_models_also_in_an_installed_package(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the loss has given the name to a part of them."""
    path = tmp_path / folder / "own_losses.py"
    path.parent.mkdir()
    path.write_text(RENAMES)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr(first_calls, "named_packages", lambda: frozenset({"own_losses"}))
    try:
        module = importlib.import_module("own_losses")
        batch = LoadedBatch(torch.ones(4, 3), torch.ones(4, dtype=torch.long), None, 4, 4)
        with pytest.raises(OwnCodeError) as said, explained():
            module.forward(batch)
    finally:
        sys.modules.pop("own_losses", None)
    shapes = "The inputs had shape (4, 3), the outputs (4, 10), the targets (4,)."
    assert f"own_losses.py:6, in loss: {RENAMES.splitlines()[5].strip()}" in str(said.value)
    assert shapes in str(said.value)


def test_a_file_of_code_has_one_owner() -> None:
    owners = {
        "own": [__file__, ROOT / "my_models.py", ROOT / "src/lab/models/cnn.py",
                ROOT / "src/lab/tasks/losses.py"],
        "engine": [first_calls.__file__, ROOT / "src/lab/step.py", TRAIN],
        "library": [nn.__file__, json.__file__, "<string>", sysconfig.get_path("stdlib") + "/a.py"],
    }  # fmt: skip
    for owner, files in owners.items():
        assert {file: owner_of(str(file)) for file in files} == dict.fromkeys(files, owner)
    for installed in (yaml, typing_extensions):  # a package, and a single file
        assert installed.__file__ is not None
        assert owner_of(installed.__file__) == "library"
        assert owner_of(installed.__file__, frozenset({"models"})) == "library"
        assert owner_of(installed.__file__, frozenset({installed.__name__})) == "own"


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@pytest.mark.slow
def test_a_broken_image_says_how_to_resume_only_if_steps_were_taken(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for number in range(40):
        split = ("train", "train", "train", "val", "test")[number // 2 % 5]
        path = tmp_path / "photos" / split / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    given = (
        "data=image_folder", "data.root=photos", "data.num_classes=2", "data.input_shape=[3,8,8]",
        "data.source.resize=8", "data.batch_size=4", "data.normalize=none",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data = instantiate(config_of(*given)["data"])
    order = permutation(data.seed, 0, len(data.source.train))
    file = Path(data.source.train.files[order[place]])
    file.write_bytes(file.read_bytes()[:300])
    done = forked.run(
        [sys.executable, str(TRAIN), *given, *QUICK[1:], "trainer.max_epochs=1",
         "hydra.run.dir=run"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    start = f"error: {file} is not a readable image: Truncated File Read (the only one of 40"
    skip = f"'data.source.leave_out=[hidden,empty,{file.relative_to('photos')}]'"
    start = f"{start} images). Fix or remove it"
    way_on = f"python {TRAIN} resume=run {skip} data.changed=accept"
    assert done.returncode == 2
    if place == 0:
        assert line == f"{start}, or leave it out: {skip}"
        return
    assert line == f"{start}. Resume without it: {way_on}"
    for more, code in (("", 2), (" data.changed=accept", 0)):  # the fingerprint has changed
        words = shlex.split(way_on.replace(" data.changed=accept", more))[1:]
        done = forked.run([sys.executable, *words], capture_output=True, text=True, timeout=200)
        assert done.returncode == code, done.stderr
    assert "data.changed=accept" in (Path("run") / "train.log").read_text()


def test_an_error_in_a_shipped_model_names_its_line(mine: Path, tmp_path: Path) -> None:
    done = start(mine, tmp_path, "model=cnn", "model.input_shape=[2,8,8]", "--check")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: src/lab/models/cnn.py:")


def test_a_lab_without_a_function_that_the_engine_calls_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {
        "build": "build = check_first_batch = plan_of = print",
        "evaluate": "measure_split = print",
        "loop": "fit = print",
    }
    for name, code in made.items():
        path = tmp_path / "half_a_lab" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("regrow.runs.lab.lab_name", lambda: "half_a_lab")
    module = importlib.import_module("regrow.runs.lab")
    found = module.lab.__wrapped__
    named = [name for names in module.FUNCTIONS.values() for name in names]
    assert sorted(named) == sorted(name for name in vars(Lab) if name[0] != "_")
    with pytest.raises(
        UserError, match=r"^lab=half_a_lab: there is no half_a_lab\.loop\.summary, "
    ):
        found()
    importlib.import_module("half_a_lab.loop").summary = print  # type: ignore[attr-defined]
    assert found().summary is print
    monkeypatch.setattr("regrow.runs.lab.lab_name", lambda: "no_lab")
    with pytest.raises(UserError, match=r"^lab=no_lab: the module no_lab is missing"):
        found()
