"""Quantisations in a graph of ATen ops: finding them, and putting something in their place."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Final

import torch
import torch.fx as fx

from vllmc.kernels import quant as _quant_ops  # noqa: F401  (defines the ops)

STATIC: Final = torch.ops.vllmc.static_scaled_quant.default
DYNAMIC: Final = torch.ops.vllmc.dynamic_scaled_quant.default


def quants_in(graph: fx.Graph) -> list[fx.Node]:
    """The quantisations in `graph` whose arguments are given by position."""
    return [n for n in graph.nodes if n.target in (STATIC, DYNAMIC) and not n.kwargs]


def replace_quant(quant: fx.Node, results: Sequence[fx.Node]) -> None:
    """Lets what reads the results of `quant` read `results` instead, and erases it."""
    if quant.target is STATIC:
        quant.replace_all_uses_with(results[0])
    for user in list(quant.users):
        assert user.target is operator.getitem, "a tuple is taken apart"
        user.replace_all_uses_with(results[int(str(user.args[1]))])
        quant.graph.erase_node(user)
    quant.graph.erase_node(quant)
