"""Ops that change nothing are dropped, and no others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx

from vllmc.core.graph.passes.no_ops import drop_no_ops
from vllmc.core.torch_compat.post_grad import decomposed

aten = torch.ops.aten
X = torch.randn(2, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: aten.mul.Tensor(x, 1.0),
        lambda x: aten.mul.Tensor(x, 1),
        lambda x: aten.div.Tensor(x, 1.0),
        lambda x: aten.slice.Tensor(x, 1, 0, 2**63 - 1),
        lambda x: aten.reshape.default(x, [2, 6]),
        lambda x: aten.expand.default(x, [2, 6]),
        lambda x: torch.ops.prims.convert_element_type.default(x, torch.float32),
    ],
)
def test_what_changes_nothing_is_dropped(function: Callable[..., torch.Tensor]) -> None:
    def around(x: torch.Tensor) -> torch.Tensor:
        return aten.sin.default(function(aten.cos.default(x)))

    graph = decomposed(around, [X])
    before = len(graph.nodes)
    matches, missed = drop_no_ops(graph)
    assert missed is None
    assert before - len(graph.nodes) == matches
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [
        aten.cos.default,
        aten.sin.default,
    ]
    result = fx.Interpreter(fx.GraphModule({}, graph)).run(X)
    assert torch.equal(result, X.cos().sin())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: aten.mul.Tensor(x, 2.0),
        lambda x: aten.mul.Tensor(x, x),
        lambda x: aten.add.Tensor(x, 0.0),
        lambda x: aten.slice.Tensor(x, 1, 1, 2**63 - 1),
        lambda x: aten.slice.Tensor(x, 1, 0, 3),
        lambda x: aten.slice.Tensor(x, 1, 0, 2**63 - 1, 2),
        lambda x: aten.reshape.default(x, [3, 4]),
        lambda x: torch.ops.prims.convert_element_type.default(x, torch.bfloat16),
        lambda x: aten.mul.Tensor(aten.div.Tensor(x, 3), 3),
    ],
)
def test_what_changes_something_stays(function: Callable[..., torch.Tensor]) -> None:
    graph = decomposed(lambda x: aten.neg.default(function(x)), [X])
    before = len(graph.nodes)
    assert drop_no_ops(graph) == (0, None)
    assert len(graph.nodes) == before


def test_a_whole_number_divided_by_one_is_a_fraction() -> None:
    graph = decomposed(lambda x: aten.div.Tensor(x, 1).sin(), [torch.arange(4)])
    assert drop_no_ops(graph) == (0, None)


def test_a_result_keeps_memory_of_its_own() -> None:
    """Another piece may write to it, and the input is read again."""
    functions: list[Callable[[torch.Tensor], object]] = [
        lambda x: aten.mul.Tensor(x, 1.0),
        lambda x: aten.reshape.default(aten.mul.Tensor(x, 1.0), [3, 4]),
        lambda x: aten.mul.Tensor(aten.permute.default(x, [1, 0]), 1.0),
        lambda x: (aten.sin.default(x), (y := aten.cos.default(x)), aten.mul.Tensor(y, 1.0)),
    ]
    for function in functions:
        graph = decomposed(function, [X])
        before = fx.Interpreter(fx.GraphModule({}, graph)).run(X)
        assert drop_no_ops(graph) == (0, None)
        assert before is not X


def test_memory_that_nothing_else_has_is_handed_on() -> None:
    graph = decomposed(lambda x: aten.mul.Tensor(aten.cos.default(x), 1.0), [X])
    assert drop_no_ops(graph) == (1, None)
    result = fx.Interpreter(fx.GraphModule({}, graph)).run(X)
    assert torch.equal(result, X.cos())
