"""scripts/export.py: a file computes what the model does, from raw inputs, or is not written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finished import finished, one_line_and_exit_code_2, script
from running import TINY
from torch import Tensor, nn

from regrow import extras
from regrow.checkpoint import writer
from regrow.errors import UserError
from regrow.load import LoadedRun, load_run
from regrow.runs import export
from regrow.runs.weights import load_weights

main = script("export").main
INSTALLED = extras.importlib.util.find_spec("onnxruntime") is not None


def exported(run: Path, output: Path, *arguments: str) -> Path:
    form = output.suffix.removeprefix(".")
    main([f"run={run}", f"format={form}", f"output={output}", *arguments])
    return output


def with_onnx(path: Path, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Return the outputs of a plain session, as a program without torch would have it."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return dict(zip([each.name for each in session.get_outputs()], found, strict=True))


def with_pt2(path: Path, inputs: Sequence[Tensor]) -> dict[str, Any]:
    found = torch.export.load(path).module()(*inputs)
    return {name: value.detach().numpy() for name, value in found.items()}


def metadata(path: Path) -> dict[str, Any]:
    if path.suffix == ".onnx":
        onnx = pytest.importorskip("onnx")
        found = {each.key: each.value for each in onnx.load(path).metadata_props}
    elif path.suffix == ".pt2":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        return dict(json.loads(files["metadata.json"]))
    else:
        found = pytest.importorskip("safetensors").safe_open(path, "pt").metadata()
    return {key: json.loads(value) for key, value in found.items() if key != "format"}


def agree(run: LoadedRun, found: dict[str, Any], inputs: Tensor) -> None:
    expected = run.predict(inputs)
    if expected.probabilities is None:
        scale = np.maximum(1, np.abs(expected.prediction))
        assert (np.abs(found["prediction"] - expected.prediction) / scale).max() < 1e-5
        return
    shares = found["probability"]
    if expected.kind == "binary":
        shares = np.stack([1 - shares, shares], 1)
    assert np.abs(shares - expected.probabilities).max() < 1e-5
    assert np.array_equal(found["prediction"], expected.prediction)


@pytest.mark.slow
def test_pt2_takes_raw_images_in_a_batch_of_any_size(
    digits: Path, tmp_path: Path, capsys: Any
) -> None:
    path = exported(digits, tmp_path / "model.pt2")
    said = capsys.readouterr().out
    assert "checked on 359 test examples: largest difference" in said and "near-ties left" in said
    run = load_run(digits)
    images = run.data.source.test.inputs
    assert images.dtype == torch.uint8 and images.max() == 16
    for inputs in (images, images[:1], images[:7]):
        agree(run, with_pt2(path, [inputs]), inputs)
    told = metadata(path)
    assert told["class_names"] == run.class_names and told["task"] == "multiclass"
    assert told["inputs"] == [{"name": "inputs", "dtype": "uint8", "shape": [None, 1, 8, 8]}]
    assert told["preprocessing"] == run.preprocessing.to_dict()
    summary = json.loads((digits / "summary.json").read_text())
    assert told["checkpoint"] == run.checkpoint and told["test"] == summary["test"]


def test_the_tested_weights_are_those_in_the_file(digits: Path, tmp_path: Path) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    found = load_file(exported(digits, tmp_path / "best.safetensors"))
    parts, _ = writer.load((digits / "checkpoints" / "best").resolve())
    assert found.keys() == parts["averaged"].keys()
    assert all(torch.equal(found[name], parts["averaged"][name]) for name in found)
    assert not all(torch.equal(found[name], parts["model"][name]) for name in found)  # the control
    model = nn.Module()
    for name, value in found.items():  # a model of the same names, with other values
        model.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
    with pytest.raises(UserError, match=r"init_from=.*none of its 10 tensors fits this model"):
        load_weights(model, tmp_path / "best.safetensors")
    other = load_run(digits, which="step_00000040").model
    load_weights(other, tmp_path / "best.safetensors")
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    told = metadata(tmp_path / "best.safetensors")
    assert told["preprocessing"] == load_run(digits).preprocessing.to_dict()
    assert told["test"]["test/accuracy"] > 0.85
    exported(digits, tmp_path / "earlier.safetensors", "checkpoint=step_00000040")
    earlier = metadata(tmp_path / "earlier.safetensors")
    assert earlier["checkpoint"] == "step_00000040" and earlier["test"] is None


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra export")
def test_onnx_runtime_agrees_with_torch_over_the_test_split(digits: Path, tmp_path: Path) -> None:
    run = load_run(digits)
    images = run.data.source.test.inputs
    onnx = with_onnx(exported(digits, tmp_path / "model.onnx"), [images])
    agree(run, onnx, images)
    other = with_pt2(exported(digits, tmp_path / "model.pt2"), [images])
    assert np.abs(onnx["probability"] - other["probability"]).max() <= 1e-5
    told = metadata(tmp_path / "model.onnx")
    assert told["class_names"] == [str(index) for index in range(10)]
    agree(run, with_onnx(tmp_path / "model.onnx", [images[:1]]), images[:1])


OF_TASKS = {
    "regression": ("data=diabetes", "task=regression"),
    "raw_regression": ("data=diabetes", "task=regression", "data.normalize_targets=false"),
    "binary": ("data=breast_cancer", "task=binary"),
    "multilabel": ("data=digits_attributes", "task=multilabel"),
}
MODELS = ("cnn", "resnet18", "vit", "whitened_cnn")
PHOTOS = ("data=synthetic", "data.input_shape=[3,32,32]", "data.source.num_train=64")
OF_MODELS = {name: (f"model={name}", "data.batch_size=16", *PHOTOS) for name in MODELS}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(not INSTALLED, reason="needs the extra export")
@pytest.mark.parametrize("name", [*OF_TASKS, *OF_MODELS])
def test_every_task_and_model_can_be_exported(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *(OF_TASKS | OF_MODELS)[name])
    loaded = load_run(run)
    inputs = loaded.data.source.test.inputs
    for form, outputs in (("pt2", with_pt2), ("onnx", with_onnx)):
        path = exported(run, tmp_path / f"model.{form}")
        agree(loaded, outputs(path, [inputs]), inputs)


class Fickle(nn.Module):
    """Depends on a batch's size in a way that tracing with two examples does not see."""

    def __init__(self, input_shape: list[int], num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(input_shape[0], num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs)
        return outputs * torch.rand(()) if not self.training else outputs


def changed(function: export.Function, change: Callable[[Tensor], Tensor]) -> export.Function:
    def run(given: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: change(value) for name, value in function(given).items()}

    return run


def test_the_comparison_sees_what_is_wrong(diabetes: Path, tmp_path: Path) -> None:
    """The negative control: of numbers, of classes, of names and shapes."""
    run = load_run(diabetes)
    batches = [run.data.source.test.inputs]
    own = export.FromRaw(run)

    def function(given: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return dict(own(*given))

    assert export.compare(run, function, batches).difference == 0
    shifted = changed(function, lambda value: value * (1 + 2e-5))
    assert not export.compare(run, shifted, batches).holds
    nothing = changed(function, lambda value: value * torch.nan)
    assert not export.compare(run, nothing, batches).holds
    short = changed(function, lambda value: value[:-1])
    assert export.compare(run, short, batches).unlike == ["prediction"]


def test_near_ties_are_left_out_and_counted() -> None:
    expected = {
        "prediction": torch.tensor([0, 1, 1]),
        "probability": torch.tensor([[0.500001, 0.499999], [0.2, 0.8], [0.1, 0.9]]).double(),
    }
    found = {**expected, "prediction": torch.tensor([1, 1, 1])}
    run: Any = SimpleNamespace(task=SimpleNamespace(kind="multiclass"))
    ties = export._ties(run, expected)
    assert ties is not None and ties.tolist() == [True, False, False]
    agreement, one = export.Agreement(), torch.ones(1).double()
    agreement.add(found, expected, ties, one)
    assert agreement.holds
    agreement.add({**found, "prediction": torch.tensor([0, 0, 1])}, expected, ties, one)
    assert agreement.others == 1 and not agreement.holds


def test_near_ties_of_tokens_are_between_classes_not_places() -> None:
    shares = torch.tensor([[[0.5, 0.5, 0.0], [0.1, 0.8, 0.1]], [[0.1, 0.8, 0.1], [0.8, 0.1, 0.1]]])
    expected = {"prediction": shares.argmax(-1), "probability": shares}  # (B, T), (B, T, C)
    run: Any = SimpleNamespace(task=SimpleNamespace(kind="language"))
    ties = export._ties(run, expected)
    assert ties is not None and ties.tolist() == [[True, False], [False, False]]
    one_place = {name: value[:, :1] for name, value in expected.items()}
    ties = export._ties(run, one_place)
    assert ties is not None and ties.tolist() == [[True], [False]]


class NeedsTwo(Fickle):
    """Cannot be called with one example."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.unsqueeze(1)).squeeze()  # type: ignore[no-any-return]


def run_of(model: type[Fickle], folder: Path) -> Path:
    arguments = ("~model.hidden", "~model.activation", "~model.norm", "~model.dropout")
    return finished(
        folder,
        *(each for each in TINY if not each.startswith("model.")),
        *(f"model._target_={__name__}.{model.__name__}", *arguments),
        *("~model.init", "~model.freeze"),
    )


def test_a_file_that_differs_from_the_model_is_not_written(tmp_path: Path, capsys: Any) -> None:
    run = run_of(Fickle, tmp_path / "run")
    with one_line_and_exit_code_2(capsys, "the file does not compute what the model does"):
        exported(run, tmp_path / "model.pt2")
    assert not (tmp_path / "model.pt2").exists() and {*tmp_path.iterdir()} == {run}


@pytest.mark.slow
def test_a_model_that_cannot_be_called_or_held_is_an_error_of_one_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = run_of(NeedsTwo, tmp_path / "run")
    with one_line_and_exit_code_2(capsys, "fails on test examples, or on one alone: Dimension out"):
        exported(run, tmp_path / "model.pt2")

    def unknown(*_: object, **__: object) -> None:  # as torch raises it: the reason comes last
        raise RuntimeError("cannot convert\nin several lines") from ValueError("No function svd.")

    monkeypatch.setattr(torch.onnx, "export", unknown)
    loaded = load_run(digits, device="cpu")
    said = r"^format=onnx: ONNX cannot hold this model: No function svd\. Use format=pt2\.$"
    with pytest.raises(UserError, match=said):
        export.onnx(loaded, export.raw_example(loaded, None))
    assert not (tmp_path / "model.pt2").exists()


def test_an_export_needs_the_data_only_for_its_check(
    table: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = table / "rows.csv"
    rows.rename(table / "moved.csv")
    try:
        with one_line_and_exit_code_2(capsys, "rows.csv cannot be read"):
            exported(table / "run", tmp_path / "model.pt2")
        path = exported(table / "run", tmp_path / "model.pt2", "check=false")
        assert "not checked" in capsys.readouterr().out
        exported(
            table / "run", tmp_path / "other.pt2", "data.source.train_file=moved.csv"
        )  # where the data are now
    finally:
        (table / "moved.csv").rename(rows)
    run = load_run(table / "run")
    inputs = torch.tensor([[0.5, 50], [20.5, 20]], dtype=torch.float64)
    agree(run, with_pt2(path, [inputs]), inputs)


@pytest.mark.parametrize(
    ("form", "module"), [("onnx", "onnxruntime"), ("safetensors", "safetensors")]
)
def test_a_missing_package_is_one_line_that_names_the_extra(
    form: str,
    module: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    lacking = lambda name: None if name == module else object()  # noqa: E731  the rest is there
    monkeypatch.setattr(extras.importlib.util, "find_spec", lacking)
    with one_line_and_exit_code_2(capsys, f"format={form} needs {module}, which the default"):
        exported(digits, tmp_path / f"model.{form}")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"pip install -e '\.\[export\]'$"):
        extras.require("format=onnx", "export", module)
    extras.require("format=pt2", "export", "torch")


def test_a_file_that_is_there_is_replaced_only_on_request(
    digits: Path, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "model.pt2"
    path.write_text("a thesis")
    with one_line_and_exit_code_2(capsys, "exists already. Choose another name, or add overwrite"):
        exported(digits, path)
    assert path.read_text() == "a thesis" and list(tmp_path.iterdir()) == [path]
    exported(digits, path, "overwrite=true", "check=false")
    assert metadata(path)["task"] == "multiclass"
    (tmp_path / "link.pt2").symlink_to(path)
    with one_line_and_exit_code_2(capsys, "is a link"):
        exported(digits, tmp_path / "link.pt2", "overwrite=true")
