"""Tasks: losses as values and weights, prediction rules and metrics."""
