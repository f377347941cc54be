"""The task of giving embeddings: a linear probe on them is the metric."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lab.tasks.losses import LossOutput
from regrow.errors import UserError

RIDGE = 1e-2  # per example


class Embedding:
    """Outputs are embeddings (B, D). Labels serve the probe alone; training never sees them."""

    kind = "embedding"
    running_name = None
    sums_over_examples = False  # each example is compared with all others of the global batch

    def __init__(self, *, num_classes: int, monitor: str, loss: object) -> None:
        self.num_classes, self.monitor = num_classes, monitor

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        """Return zeros: an evaluation has single examples, and the loss compares pairs."""
        return LossOutput(outputs.sum(1) * 0, weights)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim != 2:
            raise UserError(f"task: the model gives {list(outputs.shape)}, not embeddings (B, D).")

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"prediction": F.normalize(outputs.double(), dim=1)}

    def metrics(self, device: torch.device) -> Probe:
        return Probe(self.num_classes, device)


class Probe:
    """Accuracy of a linear probe on each example of a split, fitted to all others."""

    names = ("probe_accuracy",)

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.rows, self.num_classes = Rows().to(device), num_classes

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        if weights is not None:  # zero for what a process without examples holds
            outputs, targets = outputs[weights != 0], targets[weights != 0]
        self.rows.update(F.normalize(outputs.float(), dim=1), targets)

    def scalars(self) -> dict[str, float]:
        embeddings, labels = self.rows.compute()
        right = left_out(embeddings.double(), labels, self.num_classes).argmax(1).eq(labels)
        return {"probe_accuracy": right.double().mean().item()}

    def details(self) -> dict[str, object]:
        return {}


class Rows(Metric):
    """All embeddings and labels. torchmetrics gathers them over processes."""

    embeddings: list[Tensor]  # each (B, D)
    labels: list[Tensor]  # each (B,)

    def __init__(self) -> None:
        super().__init__()
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings.append(embeddings)
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.embeddings), dim_zero_cat(self.labels)


def left_out(embeddings: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return ridge regression's scores (N, C) of each example, fitted to the others.

    In closed form by the hat matrix H: e_i = r_i / (1 - H_ii) (Allen, Technometrics 1974).
    """
    design = torch.cat([embeddings, embeddings.new_ones(len(embeddings), 1)], dim=1)
    wanted = F.one_hot(labels, num_classes).to(design)
    gram = design.T @ design
    gram += RIDGE * len(design) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    hat = design @ torch.linalg.solve(gram, design.T)
    errors = (wanted - hat @ wanted) / (1 - hat.diagonal()).unsqueeze(1)
    scores: Tensor = wanted - errors
    return scores
