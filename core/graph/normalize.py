"""Rewrites of a captured graph that make it safe to cut, without changing what it computes."""

from __future__ import annotations

import operator
from collections.abc import Hashable

import sympy
import torch
import torch.fx as fx

_SIZE_OP = torch.ops.aten.sym_size.int


def value_of(node: fx.Node) -> object:
    """The example value that capture gave `node` (a fake tensor, a `SymInt`, a constant...)."""
    return node.meta.get("example_value")


def is_symbolic(node: fx.Node) -> bool:
    """Whether `node` stands for a number or truth value rather than a tensor."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool))


def symbols_of(value: object) -> set[sympy.Symbol]:
    """The symbols among the numbers or the sizes of `value`."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor):
        return {symbol for size in value.shape for symbol in symbols_of(size)}
    return set()


def expression_of(number: int | torch.SymInt) -> Hashable:
    """A number, a symbolic one as an expression, to be compared without asking what it is."""
    return number.node.expr if isinstance(number, torch.SymInt) else number


def strides_of(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """How many dimensions `tensor` has, its shape, its strides and its offset."""
    numbers = (tensor.dim(), *tensor.shape, *tensor.stride(), tensor.storage_offset())
    return tuple(map(expression_of, numbers))


def normalize(graph: fx.Graph) -> None:
    """Prepares `graph` for splitting, in place: see the functions below, in their order."""
    drop_global_switches(graph)
    decompose_sizes(graph)
    share_size_inputs(graph)


def drop_global_switches(graph: fx.Graph) -> None:
    """Removes calls that compute nothing and that no piece should make on its own.

    Logging of API usage, which no compiler takes; and switching gradients on and off, which
    begins in one piece and ends in another. Gradients are never taken.
    """
    dropped = (torch._C._log_api_usage_once, torch._C._set_grad_enabled)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in dropped:
            graph.erase_node(node)


def decompose_sizes(graph: fx.Graph) -> None:
    """Replaces every `torch.Size` value by its dimensions, so that none can cross a cut."""
    for node in list(graph.nodes):
        size = value_of(node)
        if not isinstance(size, torch.Size) or node.op == "placeholder":
            continue
        dims = _dimension_nodes(graph, node, size)
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(user.args[1], int):
                picked = dims[user.args[1]]
                if isinstance(picked, fx.Node):
                    user.replace_all_uses_with(picked)
                else:
                    _replace_by_constant(user, picked)
                graph.erase_node(user)
            else:
                user.args = _inline_size(user.args, node, dims)
                user.kwargs = _inline_size(user.kwargs, node, dims)
        graph.erase_node(node)


def _dimension_nodes(graph: fx.Graph, node: fx.Node, size: torch.Size) -> tuple[object, ...]:
    if node.op == "call_function" and node.target is torch.Size:
        (parts,) = node.args
        assert isinstance(parts, (list, tuple))
        return tuple(parts)
    (tensor,) = node.all_input_nodes
    dims: list[object] = []
    with graph.inserting_before(node):
        for index, dim in enumerate(size):
            if isinstance(dim, torch.SymInt):
                call = graph.call_function(_SIZE_OP, (tensor, index))
                call.meta["example_value"] = dim
                dims.append(call)
            else:
                dims.append(int(dim))
    return tuple(dims)


def _replace_by_constant(node: fx.Node, constant: object) -> None:
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda a: constant if a is node else a)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda a: constant if a is node else a)


def _inline_size(args: object, node: fx.Node, dims: tuple[object, ...]) -> object:
    return fx.node.map_arg(args, lambda a: dims if a is node else a)


def share_size_inputs(graph: fx.Graph) -> None:
    """Uses the graph's own size input wherever the same size is computed again.

    Otherwise identical layers would differ in which tensor they read the token count from.
    """
    inputs = {
        str(value.node.expr): node
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(value := value_of(node), torch.SymInt)
    }
    for node in list(graph.nodes):
        value = value_of(node)
        if node.op == "placeholder" or not isinstance(value, torch.SymInt):
            continue
        if (shared := inputs.get(str(value.node.expr))) is not None:
            node.replace_all_uses_with(shared)
            graph.erase_node(node)
