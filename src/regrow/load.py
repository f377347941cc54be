"""A recorded run as a model that predicts: `load_run(folder).predict(inputs)`."""

from regrow.runs.loaded import LoadedRun, load_run
from regrow.runs.predictions import Predictions

__all__ = ["LoadedRun", "Predictions", "load_run"]
