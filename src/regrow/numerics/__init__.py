"""Sums, precision and memory of a step."""
