"""Which values of a graph share memory, and which of that memory the graph writes to.

A compiler takes each input of a piece for memory of its own. So where a graph writes to a tensor,
no view of it may enter or leave a piece beside it: the tensor itself crosses, and each piece takes
the views that it needs anew (`split`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from vllmc.core.graph.normalize import strides_of, value_of

Memory = frozenset[int]
"""The identities of storages, meaningful while the example values live."""


def memory_of(node: fx.Node) -> Memory:
    """The storages behind the value of `node`, a tensor or a tuple of tensors."""
    return frozenset(t.untyped_storage()._cdata for t in _tensors(value_of(node)))


def written_memory(graph: fx.Graph) -> Memory:
    """The storages that some node of `graph` writes to.

    Torch counts the writes of its own ops (`Tensor._version`, shared by a tensor and its views);
    ops of other libraries say in their schema what they write to.
    """
    written: set[int] = set()
    for node in graph.nodes:
        for tensor in _tensors(value_of(node)):
            if tensor._version > 0:
                written.add(tensor.untyped_storage()._cdata)
        for argument in written_arguments(node):
            written |= memory_of(argument)
    return frozenset(written)


def name_written_tensors_once(graph: fx.Graph) -> None:
    """Uses the tensor itself in place of what an op that writes to it returns (`y = x.add_(1)`)."""
    written = written_memory(graph)
    for node in graph.nodes:
        if memory_of(node) <= written and (same := _same_view(node)) is not None:
            node.replace_all_uses_with(same)


def views_of_written(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that only look in another way at memory which the graph writes to.

    A node that writes is none of them: it returns a tensor that it was given, unchanged in shape.
    """
    written = written_memory(graph)
    views: set[fx.Node] = set()
    for node in graph.nodes:
        if not (own := memory_of(node)) or not own <= written or _same_view(node) is not None:
            continue
        sources = [n for n in node.all_input_nodes if not own.isdisjoint(memory_of(n))]
        # An item of a tuple is a tensor of its own where the tuple was not made of views.
        if sources and all(isinstance(value_of(n), torch.Tensor) or n in views for n in sources):
            views.add(node)
    return frozenset(views)


def _same_view(node: fx.Node) -> fx.Node | None:
    """The argument whose value is that of `node`: the same memory, read in the same way."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    for source in node.all_input_nodes:
        other = value_of(source)
        if isinstance(other, torch.Tensor) and _view(value) == _view(other):
            return source
    return None


def _view(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.untyped_storage()._cdata, tensor.dtype, *strides_of(tensor))


def written_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that the op's schema says it writes to; of other functions nothing is said."""
    for overload in overloads_of(node.target):
        for index, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            nodes = given if isinstance(given, (list, tuple)) else (given,)
            yield from (n for n in nodes if isinstance(n, fx.Node))


def overloads_of(target: object) -> tuple[torch._ops.OpOverload, ...]:
    """The overloads that a call of `target` may mean."""
    if isinstance(target, torch._ops.OpOverload):
        return (target,)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return tuple(getattr(target, name) for name in target.overloads())
    return ()


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
