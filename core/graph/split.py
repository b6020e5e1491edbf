"""Cutting a graph at its splitting ops (vLLM's piecewise compilation, without its limits).

The pieces, run one after the other in order, are the graph. Rules: consecutive splitting ops
share a piece; a `getitem` stays with its producer, so no tuple crosses a cut; a piece that only
allocates joins its predecessor; the original order of operations is kept, because some of them
mutate. Sizes, and views of memory that the graph writes to, cross no cut: each piece takes anew
those it needs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import torch
import torch.fx as fx

from vllmc.core.errors import VllmcError
from vllmc.core.graph.aliases import name_written_tensors_once, views_of_written
from vllmc.core.graph.normalize import is_symbolic, symbols_of, value_of
from vllmc.core.graph.targets import allocates, find_target, op_names, spelled
from vllmc.core.torch_compat.opaque import is_opaque_value, real_value


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A piece of the graph. `inputs` and `outputs` are nodes of the whole graph.

    `nodes` are what it computes, in order. Sizes and views may be nodes of several cuts.
    """

    name: str
    splitting: bool
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def splits_at(names: Iterable[str]) -> Callable[[fx.Node], bool]:
    """A predicate: does this node call one of the functions in `names`?

    A registered op goes by `namespace::name`, with or without its overload; a method by
    `torch.Tensor.name`; any other function by a dotted name under which Python finds it.
    """
    wanted = frozenset(names)
    functions = [f for f in map(_function, sorted(wanted)) if f is not None]

    def is_splitting(node: fx.Node) -> bool:
        if node.op == "call_method":
            return spelled(node) in wanted
        if node.op != "call_function":
            return False
        return not wanted.isdisjoint(op_names(node.target)) or any(
            node.target is function for function in functions
        )

    return is_splitting


def _function(name: str) -> object:
    try:
        return None if "::" in name else find_target(name)
    except VllmcError:
        return None


def split(graph: fx.Graph, is_splitting: Callable[[fx.Node], bool]) -> tuple[Cut, ...]:
    """Cuts the normalised `graph`; its output is computed by the last piece or before.

    Raises `VllmcError` (`unsupported-model`) where something else than a tensor, a number or an
    opaque value would cross a cut.
    """
    name_written_tensors_once(graph)
    anew = taken_anew(graph)
    groups = _merge(_runs(graph, is_splitting, anew))
    ends = graph.output_node().all_input_nodes
    drafts = []
    for index, (splitting, nodes) in enumerate(groups):
        roots = [*nodes, *(n for n in ends if n in anew and index == len(groups) - 1)]
        again, inputs = _reach(roots, frozenset(nodes), anew)
        drafts.append((splitting, _in_order(roots, again), inputs))
    needed = {*ends, *(node for _, _, inputs in drafts for node in inputs)}
    cuts = tuple(
        Cut(
            name=f"piece_{index}",
            splitting=splitting,
            nodes=tuple(nodes),
            inputs=inputs,
            outputs=tuple(
                n for n in nodes if n in needed and (n not in anew or index == len(drafts) - 1)
            ),
        )
        for index, (splitting, nodes, inputs) in enumerate(drafts)
    )
    _refuse_foreign_values(cuts)
    return cuts


def taken_anew(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes whose values cross no cut: sizes that follow from those of the graph's inputs.

    And views of written memory. A number read from a tensor (`item`) is no size.
    """
    entry = {
        symbol
        for node in graph.nodes
        if node.op == "placeholder"
        for symbol in symbols_of(value_of(node))
    }
    sizes = {
        node
        for node in graph.nodes
        if node.op != "placeholder" and is_symbolic(node) and symbols_of(value_of(node)) <= entry
    }
    return views_of_written(graph) | sizes


_Group = tuple[bool, list[fx.Node]]


def _runs(
    graph: fx.Graph, is_splitting: Callable[[fx.Node], bool], anew: frozenset[fx.Node]
) -> list[_Group]:
    groups: list[_Group] = []
    home: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in {"placeholder", "output"} or node in anew:
            continue
        producer = node.args[0] if node.target is operator.getitem else None
        if isinstance(producer, fx.Node) and isinstance(value_of(producer), (tuple, list)):
            members = home[producer]
        else:
            splitting = is_splitting(node)
            if not groups or groups[-1][0] != splitting:
                groups.append((splitting, []))
            members = groups[-1][1]
        members.append(node)
        home[node] = members
    return groups


def _merge(groups: list[_Group]) -> list[_Group]:
    """Lets pieces that only allocate join their predecessor, and what then touches unite."""
    merged: list[_Group] = []
    for splitting, nodes in groups:
        only_room = not splitting and all(map(allocates, nodes))
        if merged and (only_room or merged[-1][0] == splitting):
            merged[-1][1].extend(nodes)
        else:
            merged.append((splitting, list(nodes)))
    return merged


def _reach(
    roots: Iterable[fx.Node], own: frozenset[fx.Node], anew: frozenset[fx.Node]
) -> tuple[set[fx.Node], tuple[fx.Node, ...]]:
    """What `roots` need besides `own`: what to take anew, and the inputs in order of first use."""
    again: set[fx.Node] = set()
    inputs: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in anew:
                take(source)
            elif source not in own:
                inputs.setdefault(source)

    def take(node: fx.Node) -> None:
        if node not in again:
            again.add(node)
            visit(node)

    for root in roots:
        if root in anew:
            take(root)
        else:
            visit(root)
    return again, tuple(inputs)


def _in_order(roots: Iterable[fx.Node], again: Container[fx.Node]) -> list[fx.Node]:
    """`roots`, and before the first use of each what is taken anew.

    Dynamo computes a size once, in the first of all layers that want it. Were it to come where it
    stood in the graph, that layer's piece would differ from those of the others.
    """
    found: dict[fx.Node, None] = {}

    def put(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in again and source not in found:
                put(source)
        found[node] = None

    for root in roots:
        put(root)
    return list(found)


def _refuse_foreign_values(cuts: Iterable[Cut]) -> None:
    for cut in cuts:
        for node in cut.inputs:
            value = real_value(value_of(node))
            if isinstance(value, (torch.Tensor, int, torch.SymInt)) or is_opaque_value(value):
                continue
            raise VllmcError(
                "unsupported-model",
                f"the result of {spelled(node)} is needed on both sides of a splitting op",
                context={"type": type(value).__name__},
                hint="a context such as torch.autocast must begin and end between splitting ops",
            )
