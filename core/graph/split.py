"""Cutting a graph at its splitting ops (vLLM's piecewise compilation, without its limits).

The pieces, run one after the other in order, are the graph. Rules: consecutive splitting ops
share a piece; a `getitem` stays with its producer, so no tuple crosses a cut; a piece that only
allocates joins its predecessor; the original order of operations is kept, because some of them
mutate. Sizes cross no cut: each piece computes those it needs from its own inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.fx as fx
from vllmc.core.graph.normalize import is_symbolic

_ALLOCATIONS: frozenset[object] = frozenset(
    {torch.empty, torch.empty_like, torch.empty_strided, torch.ops.aten.empty.memory_format}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A run of consecutive nodes. `inputs` and `outputs` are nodes of the whole graph."""

    name: str
    splitting: bool
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def op_names(target: object) -> frozenset[str]:
    """The names by which `--splitting-op` may call the target of a node."""
    if isinstance(target, torch._ops.OpOverload):
        return frozenset({target.name(), str(target._schema.name)})
    if isinstance(target, torch._ops.OpOverloadPacket):
        return frozenset({target._qualified_op_name})
    if isinstance(target, str):
        return frozenset({f"torch.Tensor.{target}"})
    name = getattr(target, "__qualname__", getattr(target, "__name__", None))
    if name is None:
        return frozenset()
    return frozenset({f"{getattr(target, '__module__', '')}.{name}"})


def splits_at(names: Iterable[str]) -> Callable[[fx.Node], bool]:
    """A predicate: is this node a call of one of the ops in `names`?"""
    wanted = frozenset(names)
    return lambda node: (
        node.op in {"call_function", "call_method"} and not wanted.isdisjoint(op_names(node.target))
    )


def split(graph: fx.Graph, is_splitting: Callable[[fx.Node], bool]) -> tuple[Cut, ...]:
    """Cuts the normalised `graph`; together the cuts hold every node but inputs and output."""
    groups = _merge(_runs(graph, is_splitting))
    owner = {node: index for index, (_, nodes) in enumerate(groups) for node in nodes}
    return tuple(
        Cut(
            name=f"piece_{index}",
            splitting=splitting,
            nodes=tuple(nodes),
            inputs=_inputs_of(nodes, owner, index),
            outputs=tuple(n for n in nodes if _is_needed_outside(n, owner, index)),
        )
        for index, (splitting, nodes) in enumerate(groups)
    )


_Group = tuple[bool, list[fx.Node]]


def _runs(graph: fx.Graph, is_splitting: Callable[[fx.Node], bool]) -> list[_Group]:
    groups: list[_Group] = []
    home: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in {"placeholder", "output"}:
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, fx.Node) and isinstance(
            producer.meta.get("example_value"), (tuple, list)
        ):
            members = home[producer]
        elif is_splitting(node):
            if not groups or not groups[-1][0]:
                groups.append((True, []))
            members = groups[-1][1]
        else:
            if not groups or groups[-1][0]:
                groups.append((False, []))
            members = groups[-1][1]
        members.append(node)
        home[node] = members
    return groups


def _merge(groups: list[_Group]) -> list[_Group]:
    """Lets pieces that only allocate join their predecessor, and what then touches unite."""
    merged: list[_Group] = []
    for splitting, nodes in groups:
        joins = merged and (
            (not splitting and all(_allocates(n) for n in nodes)) or merged[-1][0] == splitting
        )
        if joins:
            merged[-1][1].extend(nodes)
        else:
            merged.append((splitting, list(nodes)))
    return merged


def _allocates(node: fx.Node) -> bool:
    return is_symbolic(node) or node.target in _ALLOCATIONS


def _inputs_of(nodes: list[fx.Node], owner: dict[fx.Node, int], index: int) -> tuple[fx.Node, ...]:
    """The nodes whose values the piece takes, in the order of first use."""
    inputs: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if owner.get(source) == index:
                continue
            if source in owner and is_symbolic(source):
                visit(source)
            else:
                inputs.setdefault(source)

    for node in nodes:
        visit(node)
    return tuple(inputs)


def _is_needed_outside(node: fx.Node, owner: dict[fx.Node, int], index: int) -> bool:
    """Whether another piece or the output reads `node`. Sizes are computed anew where needed."""
    return not is_symbolic(node) and any(owner.get(user) != index for user in node.users)
