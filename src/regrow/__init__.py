"""Regrow: an experiment repository whose runs are pure functions of code, config and data."""
