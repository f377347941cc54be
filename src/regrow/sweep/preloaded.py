"""The imports of the server that jobs are forked from: the modules that most runs need.

Importing them starts no thread and uses no GPU or data. Nothing else imports this module.
"""

# ruff: noqa: F401
import contextlib
import importlib
import os

from regrow.processes import begin
from regrow.processes.parent import die_with_parent

# Each job imports scripts/train.py as its main module.
OF_TRAIN_PY = ("regrow.cli.entry", "regrow.cli.start")
# The modules of the lab that most runs use. A removed one costs nothing.
OF_THE_LAB = (
    *("build", "loop", "data.augment", "data.datasets", "models.cnn", "models.mlp"),
    *("tasks.losses", "tasks.tasks"),
)

die_with_parent(os.getppid())

with begin.server():
    import torch._dynamo  # else building the first optimizer imports it
    import torchmetrics.classification

    # Code that cannot be imported must not end the server: each job that needs it reports that.
    with contextlib.suppress(Exception):
        from regrow.config import explain, hydras
        from regrow.feeding import loaders
        from regrow.numerics import exact
        from regrow.project import lab_name
        from regrow.record import plots
        from regrow.runs import worker

        for module in (*OF_TRAIN_PY, *(f"{lab_name()}.{name}" for name in OF_THE_LAB)):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
