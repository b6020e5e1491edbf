"""What a capture assumed of the sizes of its inputs, checked against what is to be compiled.

A linked program has no guards. So whatever capture took for granted about the token count, be it
a guard on a backed size or a `torch._check` of the model, must hold for every compiled one. What
cannot be decided beforehand becomes part of the program's layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
import torch.fx as fx

from vllmc.core.declare.calls import Call
from vllmc.core.errors import VllmcError
from vllmc.core.graph.call import role_of, symbols_of_sizes
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.runtime.conditions import can_be_kept
from vllmc.core.spec import OPEN_END, CompileRange, CompileSpec
from vllmc.core.torch_compat.capture import SizeGuard
from vllmc.core.torch_compat.shapes import python_text, truth


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What could be neither shown to hold for every call nor seen to fail, as `conditions` has it.

    `demands` are the model's own assertions: each call is held against them. `promises` are
    guards of capture: a call that breaks one would have been compiled anew by torch.
    """

    demands: tuple[str, ...]
    promises: tuple[str, ...]


def check_assumptions(
    name: str,
    graph: fx.Graph,
    guards: Iterable[SizeGuard],
    taken: Sequence[tuple[str, sympy.Expr]],
    call: Call,
    spec: CompileSpec,
) -> Assumptions:
    """Drops from `graph` the assertions about its inputs' sizes that hold for all of the spec.

    `taken` says what capture took the varying sizes of `call` for: a symbol, a number, or something
    that another size decides. Raises `VllmcError` (`range-not-covered`) where an assertion about
    the token count, or a guard, fails somewhere in the spec's ranges and sizes, or where a guard
    cannot be kept; `name` is the model's.
    """
    ranges = (*(CompileRange(size, size) for size in spec.sizes), *spec.ranges)
    symbols = symbols_of_sizes(taken)
    # Each size by a symbol of its own name, where capture took it for something else.
    named = symbols | {sympy.Symbol(size): size for size in call.sizes}
    places = {s: sympy.Symbol(f"d{call.sizes.index(size)}") for s, size in named.items()}
    roles = {symbol: role_of(size, call) for symbol, size in named.items()}
    tokens = {symbol for symbol, role in roles.items() if role == "tokens"}

    def judge(
        condition: sympy.Basic, *, demanded: bool, within: Sequence[CompileRange] = ranges
    ) -> bool | None:
        """Whether the condition always holds; None where only a call can tell."""
        found = {r: truth(condition, _bounds(roles, r)) for r in within}
        failing = [r for r, holds in found.items() if holds is False]
        if failing and not (demanded and condition.free_symbols - tokens):
            raise _not_covered(name, condition, symbols, failing[0])
        if all(found.values()):
            return True
        if not can_be_kept(python_text(condition, places)):
            if not demanded:
                raise _not_covered(name, condition, symbols, ranges[0])
            return False
        return None

    demands = [f"d{place} <= d0" for place, size in enumerate(call.sizes) if size in call.bounded]
    promises = []
    for size, value in dict.fromkeys(taken):
        if symbols.get(value) == size:
            continue
        equal = sympy.Eq(sympy.Symbol(size), value)
        if judge(equal, demanded=not value.is_number) is None:
            demands.append(python_text(equal, places))
    for guard in dict.fromkeys(guards):
        # What an op of torch asks of one token says how it is laid out there, where pieces are
        # compiled by themselves: no other result comes of it.
        apart = guard.of_op and spec.dynamic_shapes == "backed"
        within = [_beyond_one(r) for r in ranges if r.end > 1] if apart else ranges
        if judge(guard.condition, demanded=False, within=within) is None:
            promises.append(python_text(guard.condition, places))
    for node, condition in list(_entry_assertions(graph, symbols)):
        always = judge(condition, demanded=True)
        if always:
            graph.erase_node(node)
        elif always is None:
            demands.append(python_text(condition, places))
    return Assumptions(
        demands=tuple(dict.fromkeys(demands)), promises=tuple(dict.fromkeys(promises))
    )


def _entry_assertions(
    graph: fx.Graph, symbols: Mapping[sympy.Symbol, str]
) -> Iterator[tuple[fx.Node, sympy.Basic]]:
    for node in graph.nodes:
        if node.target is not torch.ops.aten._assert_scalar.default:
            continue
        given = node.args[0]
        condition = value_of(given) if isinstance(given, fx.Node) else given
        if isinstance(condition, torch.SymBool):
            condition = condition.node.expr
        expr = sympy.sympify(condition)
        if expr.free_symbols <= symbols.keys():
            yield node, expr


def _beyond_one(given: CompileRange) -> CompileRange:
    return replace(given, start=max(given.start, 2))


def _bounds(
    roles: Mapping[sympy.Symbol, SymbolRole], given: CompileRange
) -> dict[sympy.Symbol, tuple[int, int]]:
    """What the inputs' symbols may be in a call of the range `given`."""
    ends = {
        "tokens": (given.start, given.end),
        "rows": (1, given.end),
        "other": (1, OPEN_END),
        "data": (0, OPEN_END),
    }
    return {symbol: ends[role] for symbol, role in roles.items()}


def _not_covered(
    name: str,
    condition: sympy.Basic,
    symbols: Mapping[sympy.Symbol, str],
    given: CompileRange,
) -> VllmcError:
    readable = condition.xreplace({s: sympy.Symbol(size) for s, size in symbols.items()})
    return VllmcError(
        "range-not-covered",
        f"the model '{name}' takes for granted that {readable}, which does not hold for all of "
        f"the range {given}",
        context={"condition": str(readable), "range": str(given)},
        hint="compile for token counts for which it does: --compile-range A:B",
    )
