"""A step that also logs images, by tensor and by figure."""

from __future__ import annotations

from typing import Any

import torch

from lab.step import train_step


def picturing_step(state: Any, batch: Any, plan: Any) -> Any:
    result = train_step(state, batch, plan)
    step = state.step + 1
    if step % 2 == 0:
        plan.record.image("batch/inputs", torch.full((2, 3, 4, 5), step / 20), step=step)
    if step == 6:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([0, 1], [0, 1])
        plan.record.image("line", figure, step=step)
    return result
