"""A config, from the command line to a checked job. Nothing here imports torch."""

from regrow.config.hydra_access import register_resolver

__all__ = ["register_resolver"]
