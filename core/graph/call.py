"""What capture is given of a call, and what it makes of its sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import sympy
import torch
import torch.fx as fx

from vllmc.core.declare.calls import Call
from vllmc.core.declare.containers import map_tensors
from vllmc.core.graph.layout import GraphInput
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.piece import SymbolRole
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.capture import mark_dimension

# Distinct, and neither 0 nor 1, so that no two sizes are taken for one.
_TOKENS: Final = 17
_OTHERS: Final = (3, 5, 7, 11, 13, 19, 23, 29, 31, 37, 41, 43)


def example_arguments(call: Call, spec: CompileSpec) -> dict[str, object]:
    """Arguments to capture `call` with: new tensors, whose varying sizes are marked as such.

    Only the token count is of the spec's kind. Every other size is unbacked in any case: a backed
    one would be taken for neither 0 nor 1.
    """
    described = {argument.path: argument for argument in call.arguments}
    numbers = dict(zip(call.sizes, (_TOKENS, *_OTHERS), strict=False))
    high = max(spec.max_tokens, _TOKENS)

    def example(path: str, _: torch.Tensor) -> torch.Tensor:
        argument = described[path]
        shape = [size if isinstance(size, int) else numbers[size] for size in argument.shape]
        made = torch.zeros(shape, dtype=getattr(torch, argument.dtype), device=spec.device)
        for dim, size in enumerate(argument.shape):
            if isinstance(size, str):
                kind = spec.dynamic_shapes if size == call.sizes[0] else "unbacked"
                mark_dimension(made, dim, kind=kind, shape_id=size, low=1, high=high)
        return made

    return {name: map_tensors(name, value, example) for name, value in call.values.items()}


def sizes_in(
    graph: fx.Graph, inputs: Sequence[GraphInput], call: Call
) -> tuple[tuple[str, sympy.Expr], ...]:
    """What capture took each varying size for, by the size's name, as often as the graph reads it.

    A symbol, or the number that capture fixed it to.
    """
    described = {argument.path: argument for argument in call.arguments}
    found = []
    for node, given in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        value = value_of(node)
        if given.kind == "activation" and isinstance(value, torch.Tensor):
            for name, size in zip(described[given.name].shape, value.shape, strict=True):
                if isinstance(name, str):
                    symbolic = isinstance(size, torch.SymInt)
                    found.append((name, size.node.expr if symbolic else sympy.Integer(size)))
    return tuple(found)


def symbols_of_sizes(sizes: Iterable[tuple[str, sympy.Expr]]) -> dict[sympy.Symbol, str]:
    """The size that each symbol stands for: of several that are one, the first."""
    found: dict[sympy.Symbol, str] = {}
    for name, size in sizes:
        if isinstance(size, sympy.Symbol):
            found.setdefault(size, name)
    return found


def role_of(size: str, call: Call) -> SymbolRole:
    """What the varying size called `size` is: the first one chooses the compile range."""
    if size == call.sizes[0]:
        return "tokens"
    return "rows" if size in call.bounded else "other"
