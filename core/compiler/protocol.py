"""What a compiler is: one unit in, one self-contained artifact out, and the way back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Final, Protocol

from vllmc.core.graph.passes.report import PassReport
from vllmc.core.graph.piece import (
    OpaqueInput,
    Piece,
    PieceInput,
    SizeInput,
    TensorInput,
    symbol,
)
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.opaque import real_value
from vllmc.core.torch_compat.shapes import ShapeScope, SymbolRange

BEFORE_TEXT: Final = "before.py"
AFTER_TEXT: Final = "after.py"
CODE_TEXT: Final = "code.py"
"""The texts of `Compiled`: the graph before and after the passes, and the generated code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A compile unit: one piece for one range of token counts (inclusive)."""

    piece: Piece
    range: CompileRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """`artifact` is self-contained; `code` is the digest of what was generated for the unit.

    `passes` says what they did. `texts` are what a person may want to read, by file name: graphs
    and code, where they were asked for.
    """

    format: str
    artifact: bytes
    code: str
    passes: tuple[PassReport, ...] = field(default=(), compare=False)
    texts: tuple[tuple[str, str], ...] = field(default=(), compare=False)


class Compiler(Protocol):
    """Compiles units under the configuration in force where it is called."""

    def compile(self, unit: Unit, spec: CompileSpec, *, texts: bool = False) -> Compiled:
        """With `texts`, also what a person may want to read.

        Raises `VllmcError` (`no-compiler`, `compile-failed`, `range-not-covered`)."""


def example_scope(unit: Unit, spec: CompileSpec) -> ShapeScope:
    """Symbols for the unit's sizes: tokens within the range, rows up to its end.

    Where the token count plays no part the unit serves every range, so no end limits it. Only
    token counts are ever backed.
    """
    piece = unit.piece
    end = unit.range.end if piece.depends_on_tokens else None
    ranges = []
    for index, role in enumerate(piece.roles):
        low = {"tokens": unit.range.start, "rows": 1, "other": 1, "data": 0}[role]
        backed = role == "tokens" and spec.dynamic_shapes != "unbacked"
        high = end if role in ("tokens", "rows") else None
        ranges.append(SymbolRange(symbol=symbol(index), low=low, high=high, backed=backed))
    return ShapeScope(ranges)


def example_inputs(unit: Unit, scope: ShapeScope) -> list[object]:
    """Fake arguments of the unit's piece, in its order."""
    return [_example(given, scope) for given in unit.piece.inputs]


def _example(given: PieceInput, scope: ShapeScope) -> object:
    match given:
        case TensorInput():
            return scope.tensor(given.shape, given.stride, dtype=given.dtype, device=given.device)
        case SizeInput():
            return scope.size(given.value)
        case OpaqueInput():
            # The example of a layer that was not traced is that of the one like it, and of inputs
            # that are one object AOTAutograd makes one.
            return copy.copy(real_value(given.example))
