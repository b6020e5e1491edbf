"""How a module's forward is called."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Final

import torch

EXCHANGED: Final = threading.RLock()
"""Held while forwards of classes are exchanged to capture a model, and while models are told."""


def positional_and_named(
    module: torch.nn.Module, arguments: Mapping[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """`arguments`, by name, as the forward of `module` takes them: some by their place alone."""
    named = dict(arguments)
    parameters = inspect.signature(module.forward).parameters.values()
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    return tuple(named.pop(name) for name in first), named
