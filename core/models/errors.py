"""Errors about models. Imports no torch."""

from __future__ import annotations

from vllmc.core.errors import VllmcError


def unsupported_model(name: str, cause: str) -> VllmcError:
    """The error for a model that vllmc cannot compile, before any capture."""
    return VllmcError(
        "unsupported-model",
        f"the model '{name}' cannot be compiled: {cause}",
        hint="docs/models.md lists what is known to work",
    )
