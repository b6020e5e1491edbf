"""Errors about models. Imports no torch."""

from __future__ import annotations

from vllmc.core.errors import VllmcError
from vllmc.core.models.place import Place


def unsupported_model(
    name: str, cause: str, *, place: Place | None = None, hint: str = ""
) -> VllmcError:
    """The error for a model that vllmc cannot compile: `cause` in words, `place` in its source."""
    return VllmcError(
        "unsupported-model",
        f"the model '{name}' cannot be compiled: {cause}",
        context=place.context() if place is not None else None,
        hint=hint or "docs/models.md lists what is known to work",
    )
