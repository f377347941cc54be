"""The user's entry points: Hydra's, the arguments of scripts, the start of a process.

Public, by module; all else is private to this folder.

arguments: Arguments, Option, parse
data_alone: data_of, datasets_of
entry: entry_point
notebook: build, compose
start: start
"""
