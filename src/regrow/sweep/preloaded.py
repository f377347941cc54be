"""The imports of the server that jobs are forked from: the modules that most runs need.

Importing them starts no thread and uses no GPU or data. Nothing else imports this module.
"""

# ruff: noqa: E402, F401
import contextlib
import importlib
import os
import signal

from regrow.processes.parent import die_with_parent

# The modules of the lab that most runs use. A removed one costs nothing.
OF_THE_LAB = (
    *("build", "loop", "data.augment", "data.datasets", "models.cnn", "models.mlp"),
    *("tasks.losses", "tasks.tasks"),
)

die_with_parent(os.getppid())
# Only the sweep handles Ctrl-C. The signal was blocked when this process started.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

# OpenBLAS would start its threads on import. `process.work` restores a job's threads.
_is_given = "OPENBLAS_NUM_THREADS" in os.environ
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sklearn.datasets
import torch._dynamo  # else building the first optimizer imports it
import torchmetrics.classification

# Code that cannot be imported must not end the server: each job that needs it reports the error.
with contextlib.suppress(Exception):
    from regrow.feeding import loaders
    from regrow.project import lab_name
    from regrow.record import plots
    from regrow.runs import worker

    for module in OF_THE_LAB:
        with contextlib.suppress(Exception):
            importlib.import_module(f"{lab_name()}.{module}")

if not _is_given:
    del os.environ["OPENBLAS_NUM_THREADS"]
