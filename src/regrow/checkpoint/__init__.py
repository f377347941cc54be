"""Checkpoints: written whole, verified, rotated, and sharded.

Public, by module; all else is private to this folder.

digest: weights_sha256
sharded: Writers
writer: CheckpointOptions, CheckpointWriter, complete, DamagedCheckpoint, evaluated_part,
    evaluated_weights, CheckpointFacts, fill, load, load_newest, named, outline, Parts, read, rotate
"""
