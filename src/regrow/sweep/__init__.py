"""Sweeps: plan many runs, freeze the code, run each in a separate process, collect the results."""
