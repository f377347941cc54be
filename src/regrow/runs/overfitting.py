"""Judge a run under `debug=overfit`: did the model learn its few examples by heart?"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.feeding.batch import parts_of
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast
from regrow.protocols import Batch, Objects, TrainBatches
from regrow.randomness import Draws, states_kept
from regrow.runs.fault_checks import mean_loss

log = logging.getLogger(__name__)

NEAR = 0.05  # of the way from the best constant answer to the least loss
# Outputs of a batch that are judged: the search for the least loss keeps some thirty copies of them
# in float64. Of larger batches these are fewer examples, and of a large example fewer places.
MOST_NUMBERS = 1_000_000
# A constant answer is already the best one if the least loss lies within this part below it,
# as where all targets are equal. The loss itself has then to be as close to the least as this.
NO_WAY, CLOSE = 1e-6, 1e-3


class Verdict(NamedTuple):
    """`reached` is None if the task's loss cannot tell. All losses are means over the examples."""

    reached: bool | None
    loss: float  # of the model in evaluation mode
    least: float  # that any outputs could have for these inputs and targets
    constant: float  # of the best answer that is the same for all examples
    trained: float  # of the last step, in training mode
    why: str = ""  # the loss cannot tell
    draws: bool = False  # the model, in evaluation mode too

    @property
    def constant_suffices(self) -> bool:
        """Return True if an answer that ignores the inputs is as good as any."""
        way = self.constant - self.least  # NaN if they are unknown
        return self.constant != 0 and way <= NO_WAY * max(1.0, abs(self.constant))

    @property
    def part(self) -> float:
        """How much of the way to the least loss is left: 1 for the best constant answer."""
        way = self.constant - self.least
        return (min(self.loss, self.trained) - self.least) / way if way > 0 else math.nan


def judge(objects: Objects, train: TrainBatches, losses: Sequence[float]) -> Verdict:
    """Return the verdict on the trained model, from an epoch of the training batches in `train`.

    `losses` are those of the steps. Changes neither the model nor the random generators.
    """
    state, task = objects.state, objects.task
    trained = losses[-1] if losses else math.nan
    nothing = Verdict(None, math.nan, math.nan, math.nan, trained)
    if state.evaluates:  # one of several models
        return nothing._replace(why="the step minimises more than the task's loss")
    model, training = state.model, state.model.training
    sums = [0.0, 0.0, 0.0]
    count = 0
    draws = Draws(0, "overfit", state.step, 0, watch=True)
    with states_kept():
        for number, batch in enumerate(train.epoch(0)):
            draws.begin(number)
            with torch.no_grad(), autocast(_device(batch), objects.options.precision):
                few, outputs = _outputs(model.eval(), batch, state.progress.num_micro_batches)
            draws.look()
            nothing = nothing._replace(draws=draws.drawn)
            found = _of_batch(task, outputs, few)
            if found is None:
                is_one = isinstance(outputs, Tensor) and isinstance(few.targets, Tensor)
                several = "the outputs or the targets are not one tensor"
                why = "the task's loss gives the outputs no gradient" if is_one else several
                return nothing._replace(why=why)
            if not math.isfinite(found[0]):
                return nothing._replace(reached=False, loss=found[0])
            sums = [one + few.num_local * other for one, other in zip(sums, found, strict=True)]
            count += few.num_local
    model.train(training)
    loss, least, constant = (each / count for each in sums)
    verdict = Verdict(None, loss, least, constant, trained, draws=draws.drawn)
    if constant - least > NO_WAY * max(1.0, abs(constant)):
        return verdict._replace(reached=verdict.part <= NEAR)
    # A loss that is zero whatever the outputs are, as that of embeddings, tells nothing.
    is_close = constant != 0 and loss - least < CLOSE
    zero = "a constant answer has a loss of zero"
    return verdict._replace(reached=True) if is_close else verdict._replace(why=zero)


def _device(batch: Batch) -> torch.device:
    return parts_of(batch.targets)[0].device


def _outputs(model: nn.Module, batch: Batch, slices: int) -> tuple[Batch, Any]:
    """Return the batch, or its first examples, and their outputs, on the CPU if it is a tensor.

    The first forward pass has one example, to know the size of its outputs; others have no more
    examples than a micro-batch of the step.
    """
    one = batch.split(max(1, batch.num_local))[0]
    outputs = call(model, one.inputs)
    if not isinstance(outputs, Tensor):
        return one, outputs
    most = max(1, MOST_NUMBERS // max(1, outputs.numel()))
    few: Batch = batch.split(-(-max(1, batch.num_local) // most))[0]
    size = -(-max(1, batch.num_local) // slices)  # of a micro-batch
    parts = few.split(-(-max(1, few.num_local) // size))
    return few, torch.cat([call(model, part.inputs).float().cpu() for part in parts])


def _places(task: Any, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first tokens, or rows of pixels, of outputs and targets that are very large."""
    kind = getattr(task, "kind", None)
    place_dim = {"language": 1, "segmentation": 2}.get(kind) if isinstance(kind, str) else None
    if outputs.numel() <= MOST_NUMBERS or place_dim is None or outputs.ndim <= place_dim:
        return outputs, targets
    places = max(1, outputs.shape[place_dim] * MOST_NUMBERS // outputs.numel())
    is_soft = targets.ndim == outputs.ndim  # else targets have no dimension of classes
    target_dim = place_dim if is_soft else 1
    return outputs.narrow(place_dim, 0, places), targets.narrow(target_dim, 0, places)


def _of_batch(task: Any, outputs: Any, batch: Batch) -> tuple[float, float, float] | None:
    """Return the loss of `outputs`, the least one and that of the best constant answer.

    The last two are NaN if the first one is not finite.
    """
    if not isinstance(outputs, Tensor) or not isinstance(batch.targets, Tensor):
        return None
    outputs = outputs.detach().float().cpu()
    outputs, targets = _places(task, outputs, batch.targets.cpu())
    weights = None if batch.weights is None else batch.weights.cpu()

    def loss_of(values: Tensor) -> Tensor | None:
        return mean_loss(task, values, targets, weights)

    own = loss_of(outputs)
    if own is None:
        return None
    if not bool(own.isfinite()):
        return float(own), math.nan, math.nan
    tied = _cells(task, outputs, batch)
    table = outputs.flatten(0, tied.ndim - 1)
    count = int(tied.max()) + 1
    places = tied.flatten()
    sums = torch.zeros(count, *table.shape[1:]).index_add_(0, places, table)
    sizes = torch.zeros(count).index_add_(0, places, torch.ones(len(places)))
    start = sums / sizes.view(-1, *[1] * (table.ndim - 1))
    least = _least(lambda rows: loss_of(rows[places].view_as(outputs)), start)
    class_dim = 2 if getattr(task, "kind", None) == "language" else 1
    shape = [1] * outputs.ndim
    if outputs.ndim > class_dim:
        shape[class_dim] = outputs.shape[class_dim]
    constant = _least(lambda row: loss_of(row.expand_as(outputs)), torch.zeros(shape))
    if least is None or constant is None:
        return None
    return float(own), min(least, float(own)), constant


def _cells(task: Any, outputs: Tensor, batch: Batch) -> Tensor:
    """Return numbers (B,), or (B, T) of tokens: outputs of one number have equal inputs.

    An output for tokens depends on those up to its place alone, so a model cannot tell equal
    beginnings of two texts apart, whatever follows.
    """
    numbers: dict[bytes, int] = {}
    inputs = [tensor.detach().cpu() for tensor in parts_of(batch.inputs)]

    def number(*parts: bytes) -> int:
        digest = hashlib.blake2b(b"".join(parts), digest_size=16).digest()
        return numbers.setdefault(digest, len(numbers))

    if getattr(task, "kind", None) == "language" and inputs[0].ndim == 2:
        rows = []
        for text in inputs[0][:, : outputs.shape[1]].contiguous().numpy():
            digest, row = hashlib.blake2b(digest_size=16), []
            for token in text:
                digest.update(token.tobytes())
                row.append(numbers.setdefault(digest.digest(), len(numbers)))
            rows.append(row)
        return torch.tensor(rows)
    return torch.tensor(
        [number(*(t[row].numpy().tobytes() for t in inputs)) for row in range(len(outputs))]
    )


def _least(loss_of: Callable[[Tensor], Tensor | None], start: Tensor) -> float | None:
    """Return the least loss over free `start`, by L-BFGS in float64; None if there is no slope."""
    free = start.double().requires_grad_(True)
    best = math.inf
    search = torch.optim.LBFGS(
        [free],
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=1e-15,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        nonlocal best
        search.zero_grad()
        loss = loss_of(free)
        if loss is None or not loss.requires_grad:
            raise _NoSlope
        loss.backward()  # type: ignore[no-untyped-call]
        if bool(loss.isfinite()):
            best = min(best, float(loss.detach()))
        return loss.detach()

    try:
        with torch.enable_grad():
            for _ in range(3):  # a restart forgets a bad curvature
                before = best
                search.step(closure)  # type: ignore[no-untyped-call]
                if before - best < 1e-6 * abs(best):
                    break
    except _NoSlope:
        return None
    return best if math.isfinite(best) else None


class _NoSlope(Exception):
    """The loss does not depend on the outputs."""


def lines(
    verdict: Verdict,
    faults: Sequence[str],
    losses: Sequence[float],
    steps: int,
    frozen: Sequence[str] = (),
) -> list[str]:
    """Return what to say about a verdict: what was reached, which checks fired, what to try.

    `steps` are those of the run, `losses` those of this process: a resumed one has fewer. `frozen`
    are lines that matter only if the least loss was not reached.
    """
    noise = ["model: it draws random numbers in evaluation mode too, which may keep the loss up."]
    noise = noise if verdict.draws else []
    if verdict.reached is None and not verdict.constant_suffices:
        return [
            f"debug=overfit: the step's loss is {verdict.trained:.4g} after {steps} steps. Its "
            f"least value is unknown, as {verdict.why}.",
            *fired(faults),
            *noise,
        ]
    if not math.isfinite(verdict.loss):
        return [
            f"debug=overfit: not reached. The loss on the training examples is {verdict.loss:.4g} "
            f"after {steps} steps: it is not finite.",
            *(fired(faults) or ["checks: none of them fired."]),
            "try: debug=anomaly, which names the operation, or a smaller optimizer.lr.",
        ]
    last = f" ({verdict.trained:.4g} in the last step)" if losses else ""
    of = (
        f"the loss on the training examples is {verdict.loss:.4g} after {steps} steps{last}; the "
        f"least that this loss and data allow is {verdict.least:.4g}, and the best "
        f"constant answer has {verdict.constant:.4g}"
    )
    if verdict.constant_suffices:
        return [
            f"debug=overfit: no verdict. {of[0].upper()}{of[1:]}: a model that ignores its inputs "
            "is just as good, as the targets (or the inputs) of these examples are alike. Take "
            "more examples, such as data.limit_train=512 data.batch_size=512.",
            *fired(faults),
        ]
    if verdict.reached:
        return [f"debug=overfit: reached. {of[0].upper()}{of[1:]}.", *fired(faults)]
    return [
        f"debug=overfit: not reached. {of[0].upper()}{of[1:]}.",
        *(fired(faults) or ["checks: none of them fired."]),
        *frozen,
        *noise,
        f"try: {advice(verdict, faults, losses, steps)}",
    ]


def fired(faults: Sequence[str]) -> list[str]:
    return [f"check: {fault}" for fault in faults]


def advice(verdict: Verdict, faults: Sequence[str], losses: Sequence[float], steps: int) -> str:
    """Return the most likely way to a smaller loss."""
    if faults:
        return "correct what the checks name, then run debug=overfit again."
    more = f"trainer.max_steps={max(1000, 3 * steps)}"
    quarter = max(1, len(losses) // 4)
    late, before = losses[-quarter:], losses[-2 * quarter : -quarter] or losses[:1]
    now, then = (sum(each) / len(each) if each else math.nan for each in (late, before))
    if now < then - 0.01 * abs(verdict.constant - verdict.least):
        return f"{more}: the loss still falls."
    return (
        f"a larger optimizer.lr (scripts/find_lr.py finds one), {more}, "
        "optimizer.weight_decay=0, or a larger model."
    )
