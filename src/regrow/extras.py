"""Packages outside the default install, which pyproject.toml lists as extras."""

from __future__ import annotations

import importlib.util

from regrow.errors import UserError


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UserError if `what`, such as format=onnx, needs a module that is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{what} needs {', '.join(missing)}, which the default install leaves out. "
            f"Install the extra: pip install -e '.[{extra}]'"
        )
