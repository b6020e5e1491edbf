"""The pass `shared-quant`: quantising one tensor twice is quantising it once.

Linears that read the same tensor each quantise it. No compiler of torch's merges equal calls of
custom ops in a graph without gradients.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Final

import torch.fx as fx

from vllmc.core.graph.aliases import memory_of, written_memory
from vllmc.core.graph.targets import op_names

_QUANTISING: Final = frozenset({"vllmc::static_scaled_quant", "vllmc::dynamic_scaled_quant"})


def share_quants(graph: fx.Graph) -> tuple[int, None]:
    """Leaves one of the calls in a captured graph that quantise a tensor in the same way.

    Not where the tensor, a scale or a result is written to: it may have changed in between. How
    many calls were dropped, and no near miss.
    """
    dropped = 0
    written = written_memory(graph)
    known: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if not _QUANTISING.isdisjoint(op_names(node.target)):
            read = [*node.all_input_nodes, node]
            if not all(written.isdisjoint(memory_of(n)) for n in read):
                continue
        elif node.target is not operator.getitem or node.args[0] not in known.values():
            continue
        call = (node.target, node.args, tuple(node.kwargs.items()))
        if (same := known.setdefault(call, node)) is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            dropped += node.target is not operator.getitem
    return dropped, None
