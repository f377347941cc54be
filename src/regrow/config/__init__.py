"""A config, from the command line to a checked job. Nothing here imports torch."""
