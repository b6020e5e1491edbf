"""What strings in custom ops cost: the pieces that they made unique, measured, and the cure.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllmc.core.cache.key import JsonValue

if TYPE_CHECKING:
    from vllmc.core.graph.names import NamedArgument, NamedPieces
    from vllmc.core.obtain import UnitResult

_OWN = "vllmc::"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNameCost:
    """Pieces that strings made unique, and what their units cost beyond one unit each.

    `compiled` counts the units of extra pieces that were compiled now, in `seconds`; `bytes` is
    what the artifacts of all extra units take, also of those that were stored before.
    """

    found: NamedPieces
    compiled: int
    seconds: float
    bytes: int

    def to_json(self) -> dict[str, JsonValue]:
        """The `layer_names` object of `warm --json`."""
        found = self.found
        return {
            "unique": found.unique,
            "would_be": found.unique - len(found.extra),
            "ops": [
                {
                    "op": argument.op,
                    "argument": argument.argument,
                    "values": len(argument.values),
                    "examples": [argument.values[0], argument.values[-1]],
                    "pieces": list(argument.pieces),
                    "fix": _fix(argument, found),
                }
                for argument in found.arguments
            ],
            "compiled": self.compiled,
            "seconds": round(self.seconds, 4),
            "bytes": self.bytes,
        }


def cost_of(found: NamedPieces, units: Sequence[UnitResult]) -> LayerNameCost:
    """Adds up what the units of the extra pieces took, of all `units` of the program."""
    extra = [unit for unit in units if unit.pieces[0] in found.extra]
    other = {unit.artifact for unit in units if unit.pieces[0] not in found.extra}
    artifacts = {unit.artifact: len(unit.data) for unit in extra if unit.artifact not in other}
    return LayerNameCost(
        found=found,
        compiled=sum(unit.outcome != "hit" for unit in extra),
        seconds=sum(unit.seconds for unit in extra),
        bytes=sum(artifacts.values()),
    )


def _fix(argument: NamedArgument, found: NamedPieces) -> str:
    """What to type, or to paste where the op is declared, so that its strings cost nothing.

    The same for all arguments of an op, which is declared as a whole.
    """
    if argument.op.startswith(_OWN):
        return "--layer-names hoisted"
    named = [other for other in found.arguments if other.schema == argument.schema]
    if argument.by_signature:
        names = "LayerName"
        declared = [
            f"{n.argument}: LayerName  # not {n.argument}: str, in the function of {n.op}"
            for n in named
        ]
    else:
        names = "LAYER_NAME_TYPE, LayerName"
        declared = [f'library.define(f"{_schema(named)}")']
    held = [
        f"self.{n.argument} = LayerName({n.values[0]!r})"
        f"  # in __init__ of each layer; the op's code reads {n.argument}.value"
        for n in named
    ]
    return "\n".join([f"from vllmc.kernels.layer_name import {names}", *declared, *held])


def _schema(named: Sequence[NamedArgument]) -> str:
    """The op's schema with `named` of type `LayerName`, which has no default but None."""
    schema = named[0].schema.partition("::")[2]
    for given in named:
        text = rf'\bstr(\??) {given.argument}\b(?:="(?:[^"\\]|\\.)*")?'
        schema = re.sub(text, rf"{{LAYER_NAME_TYPE}}\1 {given.argument}", schema, count=1)
    return schema
