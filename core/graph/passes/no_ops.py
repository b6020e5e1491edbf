"""The pass `no-ops`: drops ops whose result is what they were given, to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.fx as fx

from vllmc.core.graph.normalize import strides_of

_aten = torch.ops.aten


def drop_no_ops(graph: fx.Graph) -> tuple[int, None]:
    """Drops them from a graph of ATen ops: how many they were, and no near miss.

    Adding zero is none of them: it turns a negative zero into a positive one.
    """
    dropped = 0
    for node in list(graph.nodes):
        rule = _RULES.get(node.target)
        if rule is None or not rule(node):
            continue
        given = node.args[0]
        if isinstance(given, fx.Node) and _alike(given, node):
            node.replace_all_uses_with(given)
            graph.erase_node(node)
            dropped += 1
    return dropped, None


def _alike(given: fx.Node, result: fx.Node) -> bool:
    """Whether both are tensors of one dtype, shape and layout."""
    before, after = given.meta.get("val"), result.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and strides_of(before) == strides_of(after)


def _by_one(node: fx.Node) -> bool:
    # `x * y` of two tensors has a node there.
    return not isinstance(node.args[1], fx.Node) and node.args[1] == 1 and not node.kwargs


def _of_all(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out."""
    defaults = (None, 0, 0, sys.maxsize, 1)
    given = tuple(node.args)
    return (given + defaults[len(given) :])[2:] == defaults[2:]


def _always(_: fx.Node) -> bool:
    return True


# What is left of these, where the result is as what was given, computes nothing.
_RULES: Final[Mapping[object, Callable[[fx.Node], bool]]] = {
    _aten.mul.Tensor: _by_one,
    _aten.div.Tensor: _by_one,
    _aten.slice.Tensor: _of_all,
    _aten.reshape.default: _always,
    _aten.view.default: _always,
    _aten.expand.default: _always,
    torch.ops.prims.convert_element_type.default: _always,
}
