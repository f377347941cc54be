"""Checkpoints: written whole, verified, rotated, and sharded."""
