"""Attention writes its output quantised where that is all that becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx

from vllmc.core.graph.aliases import memory_of
from vllmc.core.graph.passes.attention import quantize_attention
from vllmc.core.graph.passes.report import NearMiss
from vllmc.core.torch_compat.fake import fake_weights
from vllmc.kernels.layer_name import LayerName

FP8 = torch.float8_e4m3fn
T, HEADS, SIZE = 3, 2, 4
PACKET = torch.ops.vllmc.unified_attention_with_output
QUANT = torch.ops.vllmc.static_scaled_quant.default


class Captured:
    """A captured graph: attention fills an output, of which `then` makes the result."""

    def __init__(self, then: Callable[[Captured], fx.Node], *, hoisted: bool = True) -> None:
        self.graph = fx.Graph()
        with fake_weights():
            heads = torch.empty(1, T, HEADS, SIZE)
            self.query = self.given("query", heads)
            self.scale = self.given("scale", torch.empty(1))
            self.name: Any = "layers.0"
            if hoisted:
                self.name = self.given("name", LayerName("layers.0"))
            shape = (1, T, HEADS, SIZE)
            self.output = self.call(torch.empty, shape, dtype=torch.float32)
            op = PACKET.default if hoisted else PACKET.str
            args = (self.query, self.query, self.query, self.output, self.name, 0.5)
            self.attention = self.graph.call_function(op, args)
            self.graph.output((then(self),))

    def given(self, name: str, value: object) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        node.meta["example_value"] = function(*values[0], **values[1])
        return node

    def method(self, name: str, owner: fx.Node, *args: Any) -> fx.Node:
        node = self.graph.call_method(name, (owner, *args))
        node.meta["example_value"] = getattr(owner.meta["example_value"], name)(*args)
        return node

    def quantized(self, node: fx.Node) -> fx.Node:
        return self.call(QUANT, node, self.scale, FP8)

    def rows(self) -> fx.Node:
        flat = self.method("reshape", self.output, 1, T, HEADS * SIZE)
        return self.method("contiguous", flat)

    def miss(self) -> NearMiss:
        matches, missed = quantize_attention(self.graph)
        assert matches == 0
        assert missed is not None
        return missed


@pytest.mark.parametrize("hoisted", [True, False])
def test_attention_quantises_what_is_only_quantised(hoisted: bool) -> None:
    captured = Captured(lambda c: c.quantized(c.rows()), hoisted=hoisted)
    assert quantize_attention(captured.graph) == (1, None)
    captured.graph.lint()
    assert not captured.graph.find_nodes(op="call_function", target=QUANT)
    assert captured.attention.kwargs == {"output_scale": captured.scale}
    # The layer's name stays what it was: an input of the graph, or a constant in it.
    assert captured.attention.args[4] is captured.name
    assert captured.output.kwargs["dtype"] is FP8
    (result,) = captured.graph.output_node().args[0]
    assert result.meta["example_value"].dtype is FP8
    assert result.meta["example_value"].shape == (1, T, HEADS * SIZE)
    # Nothing is left to do.
    assert quantize_attention(captured.graph) == (0, None)


def test_a_view_of_the_output_stays_one() -> None:
    captured = Captured(lambda c: c.quantized(c.rows()))
    assert quantize_attention(captured.graph) == (1, None)
    (result,) = captured.graph.output_node().args[0]
    assert memory_of(result) == memory_of(captured.output)


def test_a_gate_between_them_is_where_it_fails() -> None:
    captured = Captured(lambda c: c.quantized(c.method("mul", c.rows(), 2.0)))
    missed = captured.miss()
    assert (missed.node, missed.expected) == ("mul", "vllmc::static_scaled_quant")
    assert missed.found == "torch.Tensor.mul"


def test_an_output_that_is_read_twice_stays_as_it_is() -> None:
    def twice(c: Captured) -> fx.Node:
        rows = c.rows()
        c.method("sum", rows)
        return c.quantized(rows)

    missed = Captured(twice).miss()
    assert (missed.expected, missed.found) == ("one reader", "2 readers")


def test_a_view_of_another_dtype_is_no_reshape() -> None:
    def reinterpreted(c: Captured) -> fx.Node:
        return c.quantized(c.method("view", c.output, torch.float32))

    assert Captured(reinterpreted).miss().found == "torch.Tensor.view"


def test_a_scale_that_is_computed_may_come_too_late() -> None:
    def late(c: Captured) -> fx.Node:
        scale = c.method("mul", c.scale, 2.0)
        return c.call(QUANT, c.rows(), scale, FP8)

    assert Captured(late).miss().expected == "a scale that is an input"


def test_an_output_that_is_not_allocated_for_it_stays_as_it_is() -> None:
    captured = Captured(lambda c: c.quantized(c.rows()))
    given = captured.graph.find_nodes(op="placeholder")[0]
    captured.attention.update_arg(3, given)
    assert captured.miss().expected == "an output of its own"


def test_a_graph_that_quantises_nothing_misses_nothing() -> None:
    captured = Captured(lambda c: c.rows())
    assert quantize_attention(captured.graph) == (0, None)
