"""Checkpoints: written whole, verified, rotated, and sharded.

Public, by module; all else is private to this folder.

digest: weights_sha256
sharded: Writers
writer: CheckpointFacts, CheckpointOptions, CheckpointWriter, complete, DamagedCheckpoint,
    evaluated_part, evaluated_weights, fill, load, load_newest, MANIFEST, named, outline, Parts,
    read, rotate, verify
"""
