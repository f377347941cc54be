"""Watch the first steps of a run under `trainer.find_faults=true`, and name what goes wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regrow.distributed.parallel import World
from regrow.errors import listed
from regrow.feeding.loaders import Data
from regrow.numerics.calls import call
from regrow.numerics.precision import autocast
from regrow.numerics.totals import weighted
from regrow.protocols import Batch, Objects, State
from regrow.randomness import seed_step, states_kept
from regrow.runs import fault_checks, overfitting
from regrow.runs.model_checks import buffers_kept
from regrow.runs.overfitting import Verdict

log = logging.getLogger(__name__)

STEPS = 5  # a layer behind zeros, such as an adapter's, only gets a gradient from the second on
UPHILL = 0.3  # agreement of the step and the gradient; -0.4 or less in all shipped recipes
FEW = 8  # examples for the sign of the loss


class FirstSteps:
    """Calls a lab's step, and watches the first five of this process.

    Neither the weights nor what the step draws change. The main process logs each fault once;
    `faults` holds them. Sharded models, whose parameters are pieces, are not watched. With
    `overfits`, `losses` holds each step's loss, and `conclude` judges a finished run.
    """

    def __init__(self, objects: Objects, world: World, *, overfits: bool) -> None:
        self.objects, self.world, self.overfits = objects, world, overfits
        self.verdict: Verdict | None = None
        self.faults: list[str] = []
        self.losses: list[float] = []
        self.left = STEPS if world.mesh is None else 0
        self.model: nn.Module = objects.state.model
        self.frozen: list[str] = []  # lines about parameters that require no gradient
        self.names = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        self.got_gradient: set[str] = set()  # other than zero, in a backward pass
        self.was_given: set[str] = set()  # other than zero, when an optimizer stepped
        self.in_optimizer: set[str] = set()
        self.moved: set[str] = set()
        self.stepped = False
        self.agreement: float | None = None  # of the first step and the gradient, from -1 to 1
        self.rate = 0.0  # the largest learning rate of these steps
        self.train_step: Any = None
        self.is_new = True

    def over(self, plan: Any) -> Any:
        """Return the plan with a watched step, after the checks that need no step."""
        self.train_step = plan.train_step
        self.is_new = self.objects.state.step == 0  # else momentum remembers other batches
        if self.overfits:
            self._stop_dropout()
        if self.world.is_main:
            self.frozen = fault_checks.frozen_parameters(self.model)
            for line in self.frozen:
                log.info("%s", line)
            data = self.objects.data
            if getattr(data, "overlap", None) != "ignore":
                self.tell(*fault_checks.leaks(data, self.world.device))
        return dataclasses.replace(plan, train_step=self)

    def _stop_dropout(self) -> None:
        """Set the rate of dropout modules to zero: they keep a loss from its least value."""
        modules = [m for m in self.model.modules() if isinstance(m, _DropoutNd) and m.p > 0]
        for module in modules:
            module.p = 0.0
        if modules and self.world.is_main:
            log.info("debug=overfit: no dropout in this run (%d modules)", len(modules))

    def conclude(self) -> None:
        """Judge the trained model, if the run is to learn its examples by heart.

        Each of several processes judges the whole batch: a share of it has another least loss.
        """
        if not self.overfits:
            return
        data, train = self.objects.data, self.objects.train
        if self.world.size > 1 and isinstance(data, Data):
            train = data.train(device=self.world.device)
        if self.world.size == 1 or isinstance(data, Data):
            self.verdict = overfitting.judge(self.objects, train, self.losses)
        elif self.world.is_main:
            kind = type(data).__name__
            log.info(
                "debug=overfit: no verdict, as %s cannot give each process the whole batch. Use "
                "trainer.devices=1.", kind,
            )  # fmt: skip

    def report(self) -> None:
        """Log the verdict. Raises SystemExit(1) if the run did not learn its examples.

        Call it in every process, after the results of the run. The main process's verdict counts.
        """
        if self.verdict is None:
            return
        steps = self.objects.state.step
        failed = self.verdict.reached is False
        if self.world.is_main:
            said = overfitting.lines(self.verdict, self.faults, self.losses, steps, self.frozen)
            for line in said:
                log.log(logging.ERROR if failed else logging.INFO, "%s", line)
        if self.world.from_main(str(failed)) == str(True):
            if self.world.is_main and self.world.store is not None:
                self.world.store.set("error", json.dumps({"kind": "not_reached", "step": steps}))
            self.world.barrier()
            raise SystemExit(1)

    def tell(self, *lines: str) -> None:
        for line in lines:
            if line not in self.faults:
                self.faults.append(line)
                if self.world.is_main:
                    log.warning("%s", line)

    def __call__(self, state: State, batch: Batch, plan: Any) -> Any:
        """Run `train_step`, the lab's, and return its result."""
        if not self.left:
            return self._counted(self.train_step(state, batch, plan))
        is_first = self.left == STEPS
        self.left -= 1
        if is_first:
            self.tell(*fault_checks.of_inputs(batch, images=True))
        if is_first and self.world.size == 1 and not self.objects.state.evaluates:
            self._look_at_loss(batch)
        reference = {} if self.agreement is not None else self._reference(batch, plan)
        before = {name: p.detach().clone() for name, p in self._trained()}
        calls = fault_checks.Calls(self.model)
        with self._watched(), calls if is_first else contextlib.nullcontext():
            result = self._counted(self.train_step(state, batch, plan))
        self.tell(*calls.found.values())
        moves = {name: p.detach() - before[name] for name, p in self._trained()}
        self.moved |= {name for name, move in moves.items() if bool(move.any())}
        self._look_at_direction(moves, reference)
        if not self.left and not state.skips[0].item():  # type: ignore[attr-defined]
            self._judge()
        return result

    def _counted(self, result: Any) -> Any:
        if self.overfits:  # to read waits for the device
            loss, _, weight, *_ = result.totals.read()
            self.losses.append(loss / weight if weight else float("nan"))
        return result

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            if id(parameter) in self.names:
                yield name, parameter

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Note inside which parameters get a gradient, and which reach an optimizer's step."""

        def note(parameter: Tensor) -> None:
            if parameter.grad is not None and bool(parameter.grad.any()):
                self.got_gradient.add(self.names[id(parameter)])

        def look(optimizer: Any, *_: Any) -> None:
            self.stepped = True
            for group in optimizer.param_groups:
                own = [p for p in group["params"] if id(p) in self.names]
                self.rate = max(self.rate, abs(float(group.get("lr", 1.0))))
                self.in_optimizer |= {self.names[id(p)] for p in own}
                given = (p for p in own if p.grad is not None and bool(p.grad.any()))
                self.was_given |= {self.names[id(p)] for p in given}

        handles: list[Any] = [register_optimizer_step_pre_hook(look)]
        parameters: list[Any] = [parameter for _, parameter in self._trained()]
        handles += [each.register_post_accumulate_grad_hook(note) for each in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Keep buffers and random states, and pass over what cannot be computed."""
        passed_over = contextlib.suppress(RuntimeError, TypeError, ValueError, IndexError)
        precision = autocast(self.world.device, self.objects.options.precision)
        with buffers_kept(self.model), passed_over, states_kept(), precision:
            yield

    def _look_at_loss(self, batch: Batch) -> None:
        """Tell of a task's loss that rises when the outputs move towards the targets."""
        rises = False
        with self._without_a_trace(), torch.no_grad():
            few = batch.split(-(-max(1, batch.num_local) // FEW))[0]
            outputs = call(self.model.train(), few.inputs)
            if isinstance(outputs, Tensor) and isinstance(few.targets, Tensor):
                task = self.objects.task
                rises = fault_checks.rises_towards_targets(task, outputs, few.targets, few.weights)
        if rises:
            self.tell(
                f"loss: it rises when the outputs of task={getattr(task, 'kind', '')} move "
                "towards the targets: its sign is wrong. Return the loss, not its negative."
            )

    def _reference(self, batch: Batch, plan: Any) -> Mapping[str, Tensor]:
        """Return the gradient of the task's loss by parameter; empty if there is none."""
        state, task = self.objects.state, self.objects.task
        if state.evaluates or self.world.size > 1 or not self.is_new:
            return {}
        sums: dict[str, Tensor] = {}
        named = dict(self._trained())
        with self._without_a_trace():
            for index, part in enumerate(batch.split(state.progress.num_micro_batches)):
                seed_step(plan.seed_of(state.step, index))  # the step's dropout
                outputs = call(self.model.train(), part.inputs)
                loss = task.loss(outputs, part.targets, part.weights)
                total = weighted(loss.values, loss.weights).sum()
                found = torch.autograd.grad(total, [*named.values()], allow_unused=True)
                for name, slope in zip(named, found, strict=True):
                    if slope is not None:
                        sums[name] = sums[name] + slope if name in sums else slope.detach()
            return sums
        return {}

    def _look_at_direction(
        self, moves: Mapping[str, Tensor], reference: Mapping[str, Tensor]
    ) -> None:
        """Tell of a first step up the slope of the task's loss.

        Compares directions by their cosine and by their signs, and takes what says more: a step of
        Adam has a small cosine with a gradient of few large values, and equal signs.
        """
        both = [(moves[name].double(), slope.double()) for name, slope in reference.items()]
        found = []
        for pairs in (both, [(move.sign(), slope.sign()) for move, slope in both]):
            moved = sum(float(move.square().sum()) for move, _ in pairs) ** 0.5
            steep = sum(float(slope.square().sum()) for _, slope in pairs) ** 0.5
            if not moved * steep > 0:  # the warm-up's first rate may be zero
                return
            product = sum(float((move * slope).sum()) for move, slope in pairs)
            found.append(product / (moved * steep))
        self.agreement = max(found, key=abs)
        if self.agreement > UPHILL:
            self.tell(
                "step: the first step leads up the slope of the task's loss (agreement "
                f"{self.agreement:+.2f}): a sign is wrong. Check optimizer.maximize and the sign "
                "of your step's gradients."
            )

    def _judge(self) -> None:
        """Tell of parameters that no gradient reaches, or that no optimizer moves."""
        names = [name for name, _ in self._trained()]
        for optimizer in _each(self.objects.state.optimizer):  # an optimizer may run no hooks
            held = (p for group in optimizer.param_groups for p in group["params"])
            self.in_optimizer |= {self.names[id(p)] for p in held if id(p) in self.names}
        got = self.got_gradient | self.was_given  # torch.autograd.grad calls no hook
        if not self.stepped:  # a step may write the weights itself
            got |= self.moved
        without = [name for name in names if name not in got]
        lines = []
        if not got:
            lines.append(
                f"gradients: they are zero for all {len(names)} trainable parameters in each of "
                f"these {STEPS} steps. Look for detach(), no_grad() and hooks that return "
                "zeros in the model, the loss and the step."
            )
        elif not self.was_given and self.stepped:
            lines.append(
                "step: the backward pass gives gradients, and they are gone or zero when the "
                "optimizer steps. Call zero_grad() before the backward pass or after the step, not "
                "between them."
            )
        elif not self.moved and (self.rate > 0 or not self.stepped):
            why = f"the rate is {self.rate:g}" if self.stepped else "no optimizer steps"
            lines.append(
                f"optimizer.lr: no parameter changes in these {STEPS} steps ({why}). Call "
                "optimizer.step() in the step, and raise optimizer.lr."
            )
        elif without:
            hooked = any(p._backward_hooks for name, p in self._trained() if name in without)
            cause = "a hook on it returns zeros" if hooked else "detach(), no_grad() or a hook"
            lines.append(
                f"model: the gradients of {listed(without, 4)} are zero in each of these {STEPS} "
                "steps, though they require one. Unless a later step trains them, this is a frozen "
                f"layer: look for {cause} in forward, or say that it is meant: "
                "requires_grad_(False)."
            )
        left = self.got_gradient - self.in_optimizer - self.moved
        if self.in_optimizer and (foreign := [name for name in names if name in left]):
            lines.append(
                f"optimizer: it does not hold {listed(foreign, 4)}, which get gradients and "
                "never change. Give all trainable parameters to the optimizer, or freeze these."
            )
        left = self.got_gradient & self.in_optimizer - self.was_given - self.moved
        dropped = [name for name in names if name in left]
        if dropped and self.was_given:
            log.info(
                "step: it drops the gradients of %s in these %d steps, so they do not train",
                *(listed(dropped, 4), STEPS),
            )
        self.tell(*lines)


def _each(optimizers: Any) -> Iterable[Any]:
    """Return the optimizers of a state, which has one, or a mapping of several."""
    found: Iterable[Any]
    found = optimizers.values() if isinstance(optimizers, Mapping) else [optimizers]
    return found
