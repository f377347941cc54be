"""What a user starts: Hydra's entry point, the arguments of scripts, the start of a process."""
