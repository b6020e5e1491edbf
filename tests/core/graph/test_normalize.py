from __future__ import annotations

from typing import Any

import torch

from vllmc.core.graph.normalize import value_of


def size_nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [node for node in graph.nodes if isinstance(value_of(node), torch.Size)]


def test_no_size_is_left_whole(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        y = ops.cut(x)
        a = y.view(*x.shape[:-1], -1, 4)
        b = a.reshape(x.shape[:-1] + (8,))
        return (b + b.new_zeros(x.size()) + y.new_zeros(y.shape[:2])[..., None])[0]

    captured, _ = trace_toy(function)
    assert not size_nodes(captured.graph)


def test_a_size_that_the_graph_is_given_is_not_computed_again(trace_toy: Any, ops: Any) -> None:
    captured, _ = trace_toy(lambda e, x, p, r: ops.cut(x).view(x.shape)[0] * ops.cut(x).size(1))
    tokens = next(n for n in captured.graph.nodes if isinstance(value_of(n), torch.SymInt))
    assert tokens.op == "placeholder"
    others = [
        node
        for node in captured.graph.nodes
        if isinstance(value_of(node), torch.SymInt)
        and str(value_of(node)) == str(value_of(tokens))
        and node is not tokens
    ]
    assert others == []


def test_a_constant_dimension_becomes_a_number(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        size = x.size()
        return (ops.cut(x).view(size) * size[-1])[0]

    toy = link_toy(function)
    assert not size_nodes(toy.captured.graph)
    toy.check(1, 2, 17)


def test_switches_of_gradients_are_dropped(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        with torch.enable_grad():
            return ops.cut(x * 2)[0]

    captured, _ = trace_toy(function)
    assert all(node.target is not torch._C._set_grad_enabled for node in captured.graph.nodes)
