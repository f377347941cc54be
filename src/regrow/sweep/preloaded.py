"""What the server that jobs are forked from imports: what most runs need, and no more.

Importing starts no thread and touches no GPU and no data. Imported nowhere else.
"""

# ruff: noqa: E402, F401
import contextlib
import os
import signal

from regrow.parent import die_with_parent

die_with_parent(os.getppid())
# A Ctrl-C is for the sweep. It was blocked as this process was started.
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

# It would start its threads as it is imported; a job asks for them again, see `process.work`.
_is_given = "OPENBLAS_NUM_THREADS" in os.environ
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sklearn.datasets
import torch._dynamo  # the first optimizer that is built would
import torchmetrics.classification

# Code that cannot be imported must not end the server: each job that needs it says so by itself.
with contextlib.suppress(Exception):
    from regrow import worker
    from regrow.data import augment, datasets, loaders
    from regrow.models import cnn, mlp
    from regrow.record import plots
    from regrow.tasks import losses, tasks
    from regrow.training import optim, options, schedules

if not _is_given:
    del os.environ["OPENBLAS_NUM_THREADS"]
