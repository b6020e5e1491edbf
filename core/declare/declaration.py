"""What `support_torch_compile` keeps of a class, and where it is found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch

from vllmc.core.declare.dims import Declared
from vllmc.core.spec import CompileSpec

ExampleInputs: TypeAlias = Callable[[torch.nn.Module], Mapping[str, object]]
"""Of a module, the arguments of one call by name; sizes that vary may be any but 0."""

DECLARATION: Final = "_vllmc_declaration"
"""The attribute of a class that holds its declaration; None where it is not to be compiled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """How a class is compiled. See `support_torch_compile` for the fields."""

    declared: Declared
    enable_if: Callable[[CompileSpec], bool] | None = None
    is_encoder: bool = False
    example_inputs: ExampleInputs | None = None


def declaration_of(module: torch.nn.Module) -> Declaration | None:
    """The declaration of the module's class or the next of its bases."""
    found: Declaration | None = getattr(type(module), DECLARATION, None)
    return found
