"""A config, from the command line to a checked job. Nothing here imports torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrow.config.hydra_access import register_resolver

__all__ = ["register_resolver"]


def __getattr__(name: str) -> Any:
    if name == "register_resolver":  # it imports OmegaConf, which reading data does not need
        from regrow.config.hydra_access import register_resolver

        return register_resolver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
