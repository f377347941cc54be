"""The user's entry points: Hydra's, the arguments of scripts, the start of a process.

Public, by module; all else is private to this folder.

arguments: Arguments, Option, parse
entry: entry_point
notebook: build, compose
start: start
"""
