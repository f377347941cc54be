"""The predictions of a trained model, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regrow.errors import UserError


@dataclass(frozen=True)
class Predictions:
    """The predictions for N examples, in their order.

    inputs: the file of each example, its label in a table's index, or its row from 0.
    kind: the task's: multiclass, binary, multilabel or regression.
    classes: the names of C classes or labels, or of the values of a regression.
    prediction: (N,) class indices; (N, C) of 0 and 1 for multilabel; (N,) or (N, C) float64 values
        in the targets' own units for a regression. A class per pixel or token gives (N, …).
    probabilities: (N, C) float64, or (N, C, …); None for a regression.
    """

    inputs: list[str]
    kind: str
    classes: list[str]
    prediction: npt.NDArray[Any]
    probabilities: npt.NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def names(self) -> list[Any]:
        """The predicted class of each example; for multilabel, a list of those labels that apply.

        Raises UserError for a regression, and for a class per pixel or token.
        """
        if self.kind == "multilabel":
            return [
                [name for name, applies in zip(self.classes, row, strict=True) if applies]
                for row in self.prediction
            ]
        if self.kind not in ("multiclass", "binary") or self.prediction.ndim > 1:
            raise UserError(
                f"names: predictions of kind {self.kind} and shape {list(self.prediction.shape)} "
                "have no name each. Use prediction."
            )
        return [self.classes[index] for index in self.prediction]

    def rows(self) -> list[dict[str, str]]:
        """Return a row of text per example: a table's columns, with all digits.

        The columns are `input`, then by kind:
        multiclass: `prediction` (the name) and `probability/<class>`;
        binary: `prediction` and `probability` (of the second class);
        multilabel: `predicted/<label>` (1 or 0) and `probability/<label>`;
        regression: `prediction`, or `prediction/<target>` for several.
        """
        of_kind = {
            "multiclass": self._multiclass,
            "binary": self._binary,
            "multilabel": self._multilabel,
            "regression": self._regression,
        }
        if self.kind not in of_kind:
            raise UserError(f"predictions of a task of kind {self.kind} have no columns.")
        rows = of_kind[self.kind]()
        return [{"input": name, **row} for name, row in zip(self.inputs, rows, strict=True)]

    def _multiclass(self) -> list[dict[str, str]]:
        shares = self._columns("probability", self.probabilities)
        named = zip(self.names, shares, strict=True)
        return [{"prediction": name, **share} for name, share in named]

    def _binary(self) -> list[dict[str, str]]:
        assert self.probabilities is not None
        named = zip(self.names, self.probabilities[:, 1].tolist(), strict=True)
        return [{"prediction": name, "probability": repr(share)} for name, share in named]

    def _multilabel(self) -> list[dict[str, str]]:
        chosen = self._columns("predicted", self.prediction)
        shares = self._columns("probability", self.probabilities)
        return [one | share for one, share in zip(chosen, shares, strict=True)]

    def _regression(self) -> list[dict[str, str]]:
        if self.prediction[:1].size == 1:
            return [{"prediction": repr(value)} for value in self.prediction.ravel().tolist()]
        return self._columns("prediction", self.prediction)

    def _columns(self, title: str, values: npt.NDArray[Any] | None) -> list[dict[str, str]]:
        assert values is not None
        return [
            {f"{title}/{name}": repr(value) for name, value in zip(self.classes, row, strict=True)}
            for row in values.tolist()
        ]


def columns_of(
    task: Any,
    prediction: Tensor,
    class_names: Sequence[str] | None,
    target_names: Sequence[str] | None,
) -> list[str]:
    """Return the names of the classes, or of a regression's values; positions if none are known."""
    if task.kind == "regression":
        count, known = prediction[:1].numel(), target_names
    else:
        count, known = 2 if task.kind == "binary" else task.num_classes, class_names
    fits = known is not None and (task.kind != "regression" or len(known) == count)
    return [str(name) for name in known] if fits and known else [str(i) for i in range(count)]


def predictions_of(
    inputs: list[str], kind: str, classes: Sequence[str], found: Mapping[str, Tensor]
) -> Predictions:
    """Return what a task's `predict` has `found` for a batch; `inputs` name its examples."""
    probability = found.get("probability")
    shares = None if probability is None else probability.detach().cpu().numpy()
    if kind == "binary" and shares is not None:
        shares = np.stack([1 - shares, shares], 1)
    prediction = found["prediction"].detach().cpu().numpy()
    return Predictions(inputs, kind, list(classes), prediction, shares)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of several batches, of at least one, as one."""
    first = parts[0]
    shares = [part.probabilities for part in parts if part.probabilities is not None]
    return Predictions(
        [name for part in parts for name in part.inputs],
        first.kind,
        first.classes,
        np.concatenate([part.prediction for part in parts]),
        np.concatenate(shares) if shares else None,
    )
