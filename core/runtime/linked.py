"""One variant of a program, bound to its tensors: what runs, and of what it was made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from vllmc.core.runtime.loader import BoundPiece

Step: TypeAlias = Callable[..., Any]
"""Takes the tensors of `Layout.arguments`, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The function of one unit step, with its layer's tensors; `piece` counts `Layout.pieces`."""

    piece: int
    call: BoundPiece


@dataclass(frozen=True, slots=True, kw_only=True)
class Linked:
    """The step of one variant, and its units by their names in it.

    `rebind` makes a step of other functions for the same units. That step returns copies of what
    the units gave, which may then be written to again.
    """

    step: Step
    units: Mapping[str, Unit]
    rebind: Callable[[Mapping[str, BoundPiece]], Step]
