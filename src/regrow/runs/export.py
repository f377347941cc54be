"""A run's model as one file for other programs, compared with the model before it is written."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regrow.errors import UserError, brief, chain, machine_fault
from regrow.feeding.batch import each
from regrow.feeding.preprocess import Normalizer
from regrow.numerics.calls import call
from regrow.numerics.capture import same
from regrow.protocols import Inputs
from regrow.record.records import load_summary
from regrow.runs.loaded import LoadedRun
from regrow.runs.predictions import kind_of

# Outputs may differ by this much. The difference of two values of a regression is divided by the
# deviation of the targets if the data standardises them, or by the value if that is larger.
TOLERANCE = 1e-5
RAW = {"image": torch.uint8, "table": torch.float64, "integer": torch.int64}
# From tuples of raw inputs to named outputs: how a file is called.
Function = Callable[[Sequence[Tensor]], dict[str, Tensor]]


class FromRaw(nn.Module):
    """Raw inputs (B, …) to what `run.predict` returns: normalisation, model and task in one.

    Several inputs are positional, in the order of `run.input_names`.
    """

    def __init__(self, run: LoadedRun) -> None:
        super().__init__()
        self.model, self.task = run.model, run.task
        self.normalize = Normalizer(run.preprocessing)
        self.names = run.input_names

    def forward(self, *raw: Tensor) -> dict[str, Tensor]:
        inputs: Inputs = raw[0]
        if self.names:
            by_place = self.names == [str(place) for place in range(len(raw))]
            inputs = tuple(raw) if by_place else dict(zip(self.names, raw, strict=True))
        found: dict[str, Tensor] = self.task.predict(call(self.model, self.normalize(inputs)))
        return found


@dataclass
class Agreement:
    """How a file's outputs compare with the model's, over the examples of a split."""

    examples: int = 0
    difference: float = 0.0  # the largest
    near_ties: int = 0  # classes too close for rounding not to decide; not counted as `others`
    others: int = 0  # other classes, elsewhere
    unlike: list[str] = field(default_factory=list)  # outputs of another name or shape

    @property
    def holds(self) -> bool:
        return self.difference <= TOLERANCE and not self.others and not self.unlike

    def sentence(self) -> str:
        if self.unlike:
            return f"its outputs {', '.join(self.unlike)} are not those of the model"
        ties = f"{self.near_ties} near-tie{'s'[: self.near_ties != 1]} left out"
        others = f"{self.others} other predictions" if self.others else "the same predictions"
        return (
            f"largest difference {self.difference:.2g} of at most {TOLERANCE:g}, {others}, {ties}"
        )

    def add(
        self,
        found: dict[str, Tensor],
        expected: dict[str, Tensor],
        ties: Tensor | None,
        unit: Tensor,
    ) -> None:
        """Count a batch. `ties` is True where a class is undecided, shaped like the prediction."""
        for name, value in expected.items():
            other = found.get(name)
            if other is None or other.shape != value.shape:
                self.unlike = sorted({*self.unlike, name})
            elif value.is_floating_point():
                apart = (other - value).abs() / value.abs().clamp(min=unit)
                # A NaN equals a NaN, and differs infinitely from a number.
                apart = torch.where(other.isnan() & value.isnan(), 0.0, apart.nan_to_num(np.inf))
                self.difference = max(self.difference, float(apart.max()))
            else:
                wrong = other != value
                if ties is not None and ties.shape == wrong.shape:
                    wrong &= ~ties
                self.others += int(wrong.sum())


def exported(run: LoadedRun, form: str, *, check: bool) -> tuple[bytes, str]:
    """Return a file's content, and a sentence on how it was compared with the model.

    `form` is onnx, pt2 or safetensors. The model computes in float32, on the CPU. The data are read
    if `check`, and for the inputs of a data set of one's own. Raises UserError if the model cannot
    be exported, or if the file's outputs are not the model's.
    """
    if form == "safetensors":
        content = safetensors(run)
        if not same_weights(run, content):
            raise UserError(f"format={form}: the file's weights are not the model's. Use pt2.")
        return content, "checked: its tensors are those of the checkpoint, bit for bit"
    names = ("test", "val", "train")
    split = next(name for name in names if name in run.data.num_examples) if check else None
    example = raw_example(run, split)
    content = (onnx if form == "onnx" else pt2)(run, example)
    if split is None:
        return content, "not checked, as check=false says"
    try:
        function = (of_onnx if form == "onnx" else of_pt2)(content)
        found = compare(run, function, raw_batches(run, split))
    except Exception as error:  # of the model or of what runs the file: of any class
        if isinstance(error, UserError) or machine_fault(error) is not None:
            raise
        raise UserError(
            f"format={form}: the model or the file fails on {split} examples, or on one alone: "
            f"{brief(error, 200)}. Nothing was written. Let the model take a batch of any size."
        ) from error
    if not found.holds:
        raise UserError(
            f"format={form}: the file does not compute what the model does: {found.sentence()}. "
            "Nothing was written. A model that draws random numbers in evaluation cannot be "
            "exported; for another, use format=safetensors."
        )
    return content, f"checked on {found.examples:,} {split} examples: {found.sentence()}"


def onnx(run: LoadedRun, example: Inputs) -> bytes:
    """Return an ONNX model with a dynamic batch. `example` are raw inputs of two examples."""
    names = run.input_names or ["inputs"]
    outputs = [*FromRaw(run)(*as_tuple(example))]
    program = _program(run, example, "onnx")
    try:
        with warnings.catch_warnings(action="ignore"):  # which concern the exporter's own code
            made: Any = torch.onnx.export(
                program, dynamo=True, input_names=names, output_names=outputs, verbose=False
            )
    except Exception as error:  # its last cause names the operation that ONNX lacks
        if isinstance(error, UserError) or machine_fault(error) is not None:
            raise
        *_, cause = chain(error)
        reason = brief(cause, 300).rstrip(".")
        raise UserError(
            f"format=onnx: ONNX cannot hold this model: {reason}. Use format=pt2."
        ) from error
    model = made.model_proto
    for key, value in facts(run, example).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value, ensure_ascii=False)
    try:
        content: bytes = model.SerializeToString()
    except ValueError as error:  # protobuf ends at 2 GiB
        raise UserError(f"format=onnx: {brief(error, 200)}. Use format=pt2.") from None
    return content


def of_onnx(content: bytes) -> Function:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    inputs = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]

    def run(given: Sequence[Tensor]) -> dict[str, Tensor]:
        arrays = [tensor.contiguous().numpy() for tensor in given]
        found = session.run(outputs, dict(zip(inputs, arrays, strict=True)))
        return {
            name: torch.from_numpy(np.array(it)) for name, it in zip(outputs, found, strict=True)
        }

    return run


def pt2(run: LoadedRun, example: Inputs) -> bytes:
    """Return a `torch.export` archive with a dynamic batch, and metadata.json among its files."""
    file = io.BytesIO()
    extra = {"metadata.json": json.dumps(facts(run, example), ensure_ascii=False)}
    torch.export.save(_program(run, example, "pt2"), file, extra_files=extra)
    return file.getvalue()


def of_pt2(content: bytes) -> Function:
    with warnings.catch_warnings(action="ignore"):  # torch 2.11 reads weights from immutable bytes
        program = torch.export.load(io.BytesIO(content)).module()
    return lambda given: program(*given)


def safetensors(run: LoadedRun) -> bytes:
    """Return the model's state_dict, with the metadata as JSON texts in the header."""
    from safetensors.torch import save

    weights = {}
    for name, value in run.model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"format=safetensors: {name} of the model's state is a {type(value).__name__}, and "
                "the format holds tensors alone. Use format=pt2."
            )
        weights[name] = value.detach().cpu().contiguous().clone()  # tied weights share memory
    told = {key: json.dumps(it, ensure_ascii=False) for key, it in facts(run).items()}
    content: bytes = save(weights, metadata={"format": "pt", **told})
    return content


def same_weights(run: LoadedRun, content: bytes) -> bool:
    """Return True if a safetensors file holds the model's weights, bit for bit."""
    from safetensors.torch import load

    found, own = load(content), run.model.state_dict()
    return found.keys() == own.keys() and same(
        [found[name] for name in own], [value.cpu() for value in own.values()]
    )


def facts(run: LoadedRun, example: Inputs = ()) -> dict[str, Any]:
    """Return what an exported file says about itself, as plain values."""
    summary = load_summary(run.folder, whole=False)
    best = (summary.get("best") or {}).get("step", summary.get("steps"))
    return {
        "task": kind_of(run.task),
        "class_names": run.class_names,
        "preprocessing": run.preprocessing.to_dict(),
        "inputs": [
            {"name": name, "dtype": _dtype(tensor), "shape": [None, *tensor.shape[1:]]}
            for name, tensor in zip(run.input_names or ["inputs"], as_tuple(example), strict=False)
        ],
        "model": run.config["model"],
        "checkpoint": run.checkpoint,
        "test": summary.get("test") if best == run.step else None,
    }


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    if isinstance(inputs, Tensor):
        return (inputs,)
    return tuple(inputs.values()) if isinstance(inputs, Mapping) else tuple(inputs)


def raw_example(run: LoadedRun, split: str | None) -> Inputs:
    """Return raw inputs of two examples: of a split, or else blank ones of the recorded shape."""
    if split is not None:
        first = next(iter(raw_batches(run, split)))
        return each(first, lambda part: torch.cat([part[:1], part[-1:]]))
    how = run.preprocessing
    if how.kind not in RAW or how.input_shape is None:
        raise UserError(
            "check=false: the inputs of a data set of your own are known from its items alone. "
            "Leave check out, and give its place: data.root=…"
        )
    return torch.zeros(2, *how.input_shape, dtype=RAW[how.kind])


def raw_batches(run: LoadedRun, split: str) -> Iterator[Inputs]:
    """Yield a split's raw inputs, of the dtype that an exported file takes."""
    kind = run.preprocessing.kind
    for batch in run.data.raw_inputs(split):
        yield each(batch, lambda part: part.to(RAW[kind])) if kind in RAW else batch


@torch.no_grad()
def compare(run: LoadedRun, function: Function, batches: Iterable[Inputs]) -> Agreement:
    """Return how a file's outputs agree with the model's in float32, also for a batch of one."""
    model, agreement = FromRaw(run).eval(), Agreement()
    unit = torch.tensor(run.preprocessing.target_std or [1.0], dtype=torch.float64)
    for batch in batches:
        given = as_tuple(batch)
        expected = model(*given)
        ties = _ties(run, expected)
        if not agreement.examples:
            one = tuple(part[:1] for part in given)
            agreement.add(function(one), model(*one), None if ties is None else ties[:1], unit)
        agreement.add(function(given), expected, ties, unit)
        agreement.examples += len(given[0])
        agreement.near_ties += 0 if ties is None else int(ties.sum())
    return agreement


def _ties(run: LoadedRun, expected: dict[str, Tensor]) -> Tensor | None:
    """Return True where the probabilities of the model do not decide between two classes."""
    shares = expected.get("probability")
    if shares is None:
        return None
    if shares.ndim > expected["prediction"].ndim:
        class_dim = -1 if kind_of(run.task) == "language" else 1
        two = shares.topk(2, dim=class_dim).values
        return two.select(class_dim, 0) - two.select(class_dim, 1) <= 2 * TOLERANCE
    return (shares - getattr(run.task, "threshold", 0.5)).abs() <= TOLERANCE


def _program(run: LoadedRun, example: Inputs, form: str) -> Any:
    """Trace the model. Raises UserError if torch cannot."""
    given = as_tuple(example)
    batch = torch.export.Dim("batch")
    # A data set of one's own may pad its batches to different lengths.
    is_fixed = run.preprocessing.input_shape is not None
    inner = torch.export.Dim.STATIC if is_fixed else torch.export.Dim.AUTO
    shapes = [{0: batch, **dict.fromkeys(range(1, it.ndim), inner)} for it in given]
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            return torch.export.export(
                FromRaw(run).eval(), given, dynamic_shapes=(tuple(shapes),), strict=False
            )
    except Exception as error:  # torch raises errors of a dozen classes here
        raise UserError(
            f"format={form}: torch.export cannot trace this model: {brief(error, 300)}. "
            "Use format=safetensors."
        ) from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
