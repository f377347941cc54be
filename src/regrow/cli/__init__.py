"""The user's entry points: Hydra's, the arguments of scripts, the start of a process."""
