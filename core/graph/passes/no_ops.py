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
        if isinstance(given, fx.Node) and _alike(given, node) and not _shares_anew(given, node):
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


def _shares_anew(given: fx.Node, result: fx.Node) -> bool:
    """Whether a result of the graph would share memory that it has for itself as it is.

    Another piece may write to it.
    """
    if _is_view(result) or not _leaves(result):
        return False
    owner = given
    while _is_view(owner):
        owner = owner.args[0]
    return owner.op == "placeholder" or _leaves(owner)


def _leaves(node: fx.Node) -> bool:
    """Whether the memory of `node` is that of a result of the graph."""
    return any(user.op == "output" or (_is_view(user) and _leaves(user)) for user in node.users)


def _is_view(node: fx.Node) -> bool:
    """Whether `node` may share the memory of its first argument."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args:
        return False
    # `reshape` and its like say that they share nothing, and may.
    return node.target in _MAY_SHARE or any(r.alias_info for r in node.target._schema.returns)


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


_MAY_SHARE: Final = frozenset({_aten.reshape.default, _aten.contiguous.default})

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
