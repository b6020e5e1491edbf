from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from vllmc.core.graph.passes.shared import share_quants
from vllmc.core.torch_compat.fake import fake_weights
from vllmc.kernels import quant as _quant_ops  # noqa: F401  (defines the ops)

STATIC = torch.ops.vllmc.static_scaled_quant.default
DYNAMIC = torch.ops.vllmc.dynamic_scaled_quant.default
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def merged(function: Callable[..., Any]) -> list[Any]:
    """The ops of the graph of `function(x, scale, other scale)` after merging."""
    graph = fx.symbolic_trace(function).graph
    with fake_weights():
        values = iter((torch.ones(3, 4), torch.ones(1), torch.ones(1)))
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = next(values)
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, lambda n: n.meta["example_value"])
                node.meta["example_value"] = node.target(*args)
    share_quants(graph)
    graph.lint()
    return [node.target for node in graph.nodes if node.op == "call_function"]


def test_a_tensor_is_quantised_once() -> None:
    def three(x: Any, s: Any, _: Any) -> Any:
        return STATIC(x, s, FP8), STATIC(x, s, FP8), STATIC(x, s, FP8)

    assert merged(three) == [STATIC]


def test_what_a_dynamic_call_returns_is_taken_apart_once() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = [graph.call_function(DYNAMIC, (x, INT8)) for _ in range(2)]
    items = [graph.call_function(operator.getitem, (c, i)) for c in calls for i in range(2)]
    graph.output(tuple(items))
    with fake_weights():
        x.meta["example_value"] = torch.ones(3, 4)
        for call in calls:
            call.meta["example_value"] = DYNAMIC(x.meta["example_value"], INT8)
    share_quants(graph)
    graph.lint()
    kinds = [node.target for node in graph.nodes if node.op == "call_function"]
    assert kinds == [DYNAMIC, operator.getitem, operator.getitem]
    (outputs,) = graph.output_node().args
    assert outputs[:2] == outputs[2:]


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s, t: (STATIC(x, s, FP8), STATIC(x, t, FP8)),
        lambda x, s, _: (STATIC(x, s, FP8), STATIC(x, s, INT8)),
        lambda x, s, _: (STATIC(x, s, FP8), STATIC(torch.neg(x), s, FP8)),
    ],
    ids=["another scale", "another type", "another tensor"],
)
def test_what_differs_is_quantised_by_itself(function: Callable[..., Any]) -> None:
    assert merged(function).count(STATIC) == 2


def test_a_tensor_that_is_written_to_in_between_is_quantised_again() -> None:
    def changed(x: Any, s: Any, _: Any) -> Any:
        before = STATIC(x, s, FP8)
        torch.ops.aten.add_.Tensor(x, 1)
        return before, STATIC(x, s, FP8)

    assert merged(changed).count(STATIC) == 2
