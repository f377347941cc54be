"""The usual update, without the frozen parameters until they thaw."""

from __future__ import annotations

from collections.abc import Sequence

from lab.faults import make_room
from lab.plan import StepPlan, StepResult
from lab.state import TrainState
from lab.step import accumulate, forward, update
from regrow.dotted import matches
from regrow.errors import UserError
from regrow.protocols import Batch


def thaw_step(
    state: TrainState, batch: Batch, plan: StepPlan, *, frozen: Sequence[str], until_step: int
) -> StepResult:
    """Update the weights; those whose names match `frozen` only after the first `until_step` steps.

    What is frozen follows from the step alone, so a resumed run freezes the same. The gradients are
    dropped, not left out: DDP and FSDP expect all of them. Raises UserError if none match.
    """
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    while not accumulate(state, batch, plan, forward):
        make_room(state, batch, plan)
    if state.step < until_step:
        chosen = [p for name, p in state.model.named_parameters() if matches(name, frozen)]
        if not chosen:
            raise UserError(
                f"step.frozen={[*frozen]}: no parameter of the model matches. Its parts are "
                f"{', '.join(name for name, _ in state.model.named_children())}."
            )
        for parameter in chosen:
            parameter.grad = None
    return update(state, batch.num_global, plan.exchange.wait(), state.step, plan)
