"""The pass `shared-quant`: a tensor that is quantised in one way several times is so once.

Query, key and value projections read one tensor, each through a quantisation of its own. Autograd's
common subexpressions, where inference has any, do not cover ops of others.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.fx as fx

from vllmc.kernels import quant as _quant_ops  # noqa: F401  (defines the ops)

_QUANTS: Final = frozenset(
    {torch.ops.vllmc.static_scaled_quant.default, torch.ops.vllmc.dynamic_scaled_quant.default}
)


def share_quants(graph: fx.Graph) -> tuple[int, None]:
    """Merges them in a graph of ATen ops: how many are left out, and no near miss."""
    first: dict[tuple[object, ...], fx.Node] = {}
    dropped = 0
    for node in list(graph.nodes):
        if node.target not in _QUANTS:
            continue
        same = first.setdefault((node.target, *node.args), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
            dropped += 1
    return dropped, None
