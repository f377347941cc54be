"""The predictions of a trained model, by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regrow.errors import UserError
from regrow.feeding.files import shown as printable
from regrow.record.comparison import as_text

NUM_SHOWN = 10  # rows on a terminal
MOST_COUNTED = 20  # classes on a terminal
LONG_NAME = 60  # characters


@dataclass(frozen=True)
class Predictions:
    """The predictions for N examples, in their order.

    inputs: the file of each example, its label in a table's index, or its row from 0.
    kind: the task's kind: multiclass, binary, multilabel or regression; for others see `kind_of`.
    classes: the names of C classes or labels, or of a regression's values.
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
                "have no names. Use prediction."
            )
        return [self.classes[index] for index in self.prediction]

    def rows(self) -> list[dict[str, str]]:
        """Return a row of text per example: a table's columns, with all digits of a float64.

        Fewer digits would make ties, and an AUROC computed from the table would differ.

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
            raise UserError(
                f"predictions of a task of kind {self.kind} have no columns. Use run.predict(…)."
                f"prediction, an array, or give your task a kind that has: {', '.join(of_kind)}."
            )
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


class Glance:
    """The first rows of a table of predictions and the number of each class, for a terminal."""

    def __init__(self, kind: str, class_names: Sequence[str] | None) -> None:
        self.kind = kind
        self.positive = class_names[1] if class_names is not None and len(class_names) > 1 else "1"
        self.first: list[dict[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.total = 0

    def passing(self, rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
        """Yield the rows of `Predictions.rows`, unchanged."""
        for row in rows:
            if len(self.first) < NUM_SHOWN:
                self.first.append(row)
            if self.kind == "multilabel":
                self.counts.update(_labels(row))
            elif self.kind != "regression":
                self.counts[row["prediction"]] += 1
            self.total += 1
            yield row

    def lines(self) -> list[str]:
        """Return a table of the first rows, and how many examples each class or label has."""
        if not self.first:
            return []
        shown = [self._shown(row) for row in self.first]
        lines = as_text([*shown[0]], [[*row.values()] for row in shown])
        if self.total > len(shown):
            lines.append(f"… and {self.total - len(shown):,} more")
        if self.counts:
            most = self.counts.most_common(MOST_COUNTED)
            told = ", ".join(f"{printable(name)} {count:,}" for name, count in most)
            rest = len(self.counts) - len(most)
            more = f" and {rest} other classes" if rest else ""
            lines += ["", f"counts: {told}{more}"]
        return lines

    def _shown(self, row: Mapping[str, str]) -> dict[str, str]:
        name = printable(row["input"])
        told = {"input": name if len(name) <= LONG_NAME else f"…{name[1 - LONG_NAME :]}"}
        if self.kind == "multilabel":
            return {**told, "labels": printable(", ".join(_labels(row)) or "–")}
        if self.kind == "regression":
            values = {printable(k): f"{float(v):.6g}" for k, v in row.items() if k != "input"}
            return told | values
        chosen = row["prediction"]
        if self.kind == "binary":  # the number that the table has
            title, share = f"probability of {printable(self.positive)}", row["probability"]
        else:
            title, share = "probability", row[f"probability/{chosen}"]
        return {**told, "prediction": printable(chosen), title: f"{float(share):.4f}"}


def _labels(row: Mapping[str, str]) -> list[str]:
    named = ((key.partition("/"), value) for key, value in row.items())
    return [name for (title, _, name), value in named if title == "predicted" and float(value)]


def kind_of(task: Any) -> str:
    """Return a task's `kind`, or the name of its class if it has none."""
    return str(getattr(task, "kind", type(task).__name__))


def columns_of(
    task: Any,
    prediction: Tensor,
    class_names: Sequence[str] | None,
    target_names: Sequence[str] | None,
) -> list[str]:
    """Return the names of the classes, or of a regression's values; positions if none are known.

    A user's own task may have no classes.
    """
    kind = kind_of(task)
    if kind == "regression":
        count, known = prediction[:1].numel(), target_names
    else:
        count, known = 2 if kind == "binary" else getattr(task, "num_classes", 0), class_names
    fits = known is not None and (kind != "regression" or len(known) == count)
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
