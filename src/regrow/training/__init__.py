"""The training loop and its parts: state, checkpoints, processes, precision, optimizers."""
