"""The pass `expand-quant`: quantisation in the ops that Inductor computes in loops of its own.

What comes before it is then computed in the same loop, whatever it is: a norm, a gated activation,
a rotation. An op is expanded to what its function for a CPU does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Final

import torch
import torch.fx as fx

from vllmc.core.graph.passes.quants import DYNAMIC, STATIC, quants_in, replace_quant
from vllmc.core.torch_compat.post_grad import decomposed, insert_call, never_empty
from vllmc.core.torch_compat.shapes import is_contiguous
from vllmc.kernels.quant import dynamic_scaled_quant, static_scaled_quant

_CLONE: Final = torch.ops.aten.clone.default
_FUNCTIONS: Final[Mapping[Any, Callable[..., Any]]] = {
    STATIC: static_scaled_quant,
    DYNAMIC: dynamic_scaled_quant,
}


def expand_quants(graph: fx.Graph) -> tuple[int, None]:
    """Expands each quantisation in a graph of ATen ops: how many there were, and no near miss.

    Not the search for the scale of what may be empty: the largest of no elements is no op's result.
    """
    quants = [q for q in quants_in(graph) if q.target is STATIC or never_empty(q.args[0])]
    for quant in quants:
        *tensors, dtype = quant.args
        replace_quant(quant, _inlined(graph, quant, tensors, dtype))
    return len(quants), None


def _inlined(graph: fx.Graph, quant: fx.Node, tensors: list[Any], dtype: Any) -> list[fx.Node]:
    """The results of the op's expansion, computed before `quant`."""
    x = tensors[0].meta["val"]
    expansion = _expansion(quant.target, dtype, x.dtype, x.dim())
    found = dict(zip(expansion.find_nodes(op="placeholder"), tensors, strict=True))
    with graph.inserting_before(quant):
        for node in expansion.nodes:
            if node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: found[n])
                found[node] = insert_call(graph, node.target, args, node.kwargs)
    (results,) = expansion.output_node().args
    assert isinstance(results, (list, tuple))
    # An op's results are contiguous; those of its expansion lie as what they are computed from.
    dense = {"memory_format": torch.contiguous_format}
    made = [found[node] for node in results]
    with graph.inserting_before(quant):
        return [
            n if is_contiguous(n.meta["val"]) else insert_call(graph, _CLONE, [n], dense)
            for n in made
        ]


@lru_cache(maxsize=32)
def _expansion(op: Any, dtype: torch.dtype, given: torch.dtype, dims: int) -> fx.Graph:
    # Neither op depends on how many elements there are, but for their number not being zero.
    tensors = [torch.ones((2,) * dims, dtype=given)]
    if op is STATIC:
        tensors.append(torch.ones(1))

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = _FUNCTIONS[op](*given, dtype)
        return result if isinstance(result, tuple) else (result,)

    return decomposed(function, tensors)
