"""A recorded run as a model that predicts: `load_run(folder).predict(inputs)`."""

from regrow.runs.loaded import LoadedRun, load_run

__all__ = ["LoadedRun", "load_run"]
