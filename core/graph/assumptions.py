"""What a capture assumed of the sizes of its inputs, checked against what is to be compiled.

A linked program has no guards. So whatever capture took for granted about the token count, be it
a guard on a backed size or a `torch._check` of the model, must hold for every compiled one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import sympy
import torch
import torch.fx as fx

from vllmc.core.errors import VllmcError
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.core.torch_compat.shapes import truth


def check_assumptions(
    name: str,
    graph: fx.Graph,
    guards: Iterable[sympy.Basic],
    roles: Mapping[sympy.Symbol, SymbolRole],
    spec: CompileSpec,
) -> None:
    """Drops from `graph` the assertions about its inputs' sizes that hold for all of the spec.

    One that cannot be decided stays, and is evaluated on every call. Raises `VllmcError`
    (`range-not-covered`) where an assertion fails, or a guard cannot be shown to hold, somewhere
    in the spec's ranges and sizes; `name` is the model's.
    """
    ranges = (*(CompileRange(size, size) for size in spec.sizes), *spec.ranges)
    for guard in guards:
        for given in ranges:
            if truth(guard, _bounds(roles, given)) is not True:
                raise _not_covered(name, guard, roles, given)
    for node, condition in list(_entry_assertions(graph, roles)):
        truths = {given: truth(condition, _bounds(roles, given)) for given in ranges}
        for given, holds in truths.items():
            if holds is False:
                raise _not_covered(name, condition, roles, given)
        if all(truths.values()):
            graph.erase_node(node)


def _entry_assertions(
    graph: fx.Graph, roles: Mapping[sympy.Symbol, SymbolRole]
) -> Iterator[tuple[fx.Node, sympy.Basic]]:
    for node in graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        given = node.args[0]
        condition = value_of(given) if isinstance(given, fx.Node) else given
        if isinstance(condition, torch.SymBool):
            condition = condition.node.expr
        expr = sympy.sympify(condition)
        if expr.free_symbols <= roles.keys():
            yield node, expr


def _bounds(
    roles: Mapping[sympy.Symbol, SymbolRole], given: CompileRange
) -> dict[sympy.Symbol, tuple[int, int]]:
    """What the inputs' symbols may be in a batch of the range `given`."""
    start = {"tokens": given.start, "rows": 1, "data": 0}
    return {symbol: (start[role], given.end) for symbol, role in roles.items()}


def _not_covered(
    name: str,
    condition: sympy.Basic,
    roles: Mapping[sympy.Symbol, SymbolRole],
    given: CompileRange,
) -> VllmcError:
    readable = condition.xreplace({s: sympy.Symbol(role) for s, role in roles.items()})
    return VllmcError(
        "range-not-covered",
        f"the model '{name}' takes for granted that {readable}, which does not hold for all of "
        f"the range {given}",
        context={"condition": str(readable), "range": str(given)},
        hint="compile for token counts for which it does: --compile-range A:B",
    )
