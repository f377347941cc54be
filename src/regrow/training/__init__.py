"""The loop and what it stands on: state, checkpoints, processes, precision, optimizers."""
