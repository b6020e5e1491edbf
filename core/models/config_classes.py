"""Transformers' configuration classes, without the modeling code that they would import.

`transformers.utils.type_validators` takes the names of activations from `transformers.activations`,
which imports torch._dynamo, torch.distributed and sympy: more than a second, for a check that one
class in Transformers 5.23 asks for (of a speech model). It leaves the check out where it finds no
names, so it is shown none.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType

_ACTIVATIONS = "transformers.activations"


def import_validators() -> None:
    """Imports what configuration classes validate their fields with, once."""
    if _ACTIVATIONS in sys.modules:
        return
    nameless = ModuleType(_ACTIVATIONS)
    nameless.ACT2FN = {}  # type: ignore[attr-defined]
    sys.modules[_ACTIVATIONS] = nameless
    try:
        # A Transformers that wants more of the module imports the true one later.
        with suppress(ImportError):
            import_module("transformers.utils.type_validators")
    finally:
        del sys.modules[_ACTIVATIONS]
