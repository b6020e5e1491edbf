"""Where in a graph a pattern occurs, and where the closest occurrence fails."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx

from vllmc.core.graph.passes.matching import Match, Pattern, closest, find_match
from vllmc.core.graph.passes.report import NearMiss
from vllmc.core.torch_compat.post_grad import decomposed
from vllmc.kernels import attention as _attention  # noqa: F401  (defines the op)

aten = torch.ops.aten
EPS = 0.0625


def traced(function: Callable[..., object], inputs: int = 2) -> fx.Graph:
    return decomposed(function, [torch.randn(3, 5) for _ in range(inputs)])


def pattern(function: Callable[..., object], inputs: int = 2) -> Pattern:
    return Pattern(graph=traced(function, inputs), numbers={EPS: "eps"})


def search(wanted: Pattern, graph: fx.Graph) -> Match | NearMiss:
    """Looks for the pattern in what the graph's (only) output reads."""
    output = graph.output_node()
    root = output.args[0]
    if isinstance(root, (list, tuple)):
        root = root[0]
    assert isinstance(root, fx.Node)
    return find_match(wanted, root, output)


WANTED = pattern(lambda x, y: (torch.exp(x) * y + EPS,))


def test_what_was_traced_alike_matches_and_names_its_inputs() -> None:
    graph = traced(lambda p, q: torch.exp(q) * p + 0.5)
    found = search(WANTED, graph)
    assert isinstance(found, Match)
    p, q = graph.find_nodes(op="placeholder")
    x, y = (str(node.target) for node in WANTED.graph.find_nodes(op="placeholder"))
    assert dict(found.inputs) == {x: q, y: p, "eps": 0.5}
    assert [node.target for node in found.nodes] == [
        aten.exp.default,
        aten.mul.Tensor,
        aten.add.Tensor,
    ]


def test_the_operands_of_a_sum_or_product_may_stand_in_either_order() -> None:
    assert isinstance(search(WANTED, traced(lambda x, y: y * torch.exp(x) + 1.0)), Match)


def test_those_of_a_difference_may_not() -> None:
    wanted = pattern(lambda x, y: (torch.exp(x) - y,))
    assert isinstance(search(wanted, traced(lambda x, y: torch.exp(x) - y)), Match)
    found = search(wanted, traced(lambda x, y: y - torch.exp(x)))
    assert isinstance(found, NearMiss)


def test_an_input_that_is_read_twice_is_one() -> None:
    wanted = pattern(lambda x, y: (torch.exp(x) * x,))
    assert isinstance(search(wanted, traced(lambda x, y: y * torch.exp(y))), Match)
    assert isinstance(search(wanted, traced(lambda x, y: torch.exp(x) * y)), NearMiss)


def test_what_something_else_reads_too_does_not_match() -> None:
    found = search(WANTED, traced(lambda x, y: ((e := torch.exp(x)) * y + 1.0, e + 1.0)))
    assert isinstance(found, NearMiss)
    assert found.expected == "nothing else to read it"
    assert found.found == "aten.add.Tensor reads it"


def test_a_further_result_of_the_pattern_may_be_read_elsewhere() -> None:
    def example(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = x + y
        return torch.exp(total), total

    found = search(pattern(example), traced(lambda x, y: (torch.exp(t := x + y), t * 2.0)))
    assert isinstance(found, Match)
    assert [node.target for node in found.results] == [aten.exp.default, aten.add.Tensor]


def test_the_miss_says_where_the_closest_attempt_failed() -> None:
    found = search(WANTED, traced(lambda x, y: torch.sin(x) * y + 1.0))
    assert isinstance(found, NearMiss)
    assert (found.expected, found.found) == ("aten.exp.default", "aten.sin.default")
    assert found.node == "sin"
    far = search(WANTED, traced(lambda x, y: torch.sin(x) - y))
    assert isinstance(far, NearMiss)
    assert closest([far, found]) is found


def test_a_constant_of_another_value_does_not_match() -> None:
    wanted = pattern(lambda x, y: (x * 2.0,))
    assert isinstance(search(wanted, traced(lambda x, y: x * 2.0)), Match)
    found = search(wanted, traced(lambda x, y: x * 3.0))
    assert isinstance(found, NearMiss)
    assert (found.expected, found.found) == ("2.0", "3.0")


@pytest.mark.parametrize("hoisted", [True, False])
def test_a_layer_name_is_an_input_whether_node_or_constant(hoisted: bool) -> None:
    def graph(name: str) -> fx.Graph:
        made = fx.Graph()
        x = made.placeholder("x")
        layer = made.placeholder("layer") if hoisted else name
        named = made.call_function(operator.add, (x, layer))
        made.output(made.call_function(torch.exp, (named,)))
        return made

    wanted = fx.Graph()
    x, layer = wanted.placeholder("x"), wanted.placeholder("layer_name")
    named = wanted.call_function(operator.add, (x, layer))
    wanted.output((wanted.call_function(torch.exp, (named,)),))
    for name in ("layers.0", "layers.1"):
        found = search(Pattern(graph=wanted, numbers={}), graph(name))
        assert isinstance(found, Match)
        given = found.inputs["layer_name"]
        assert str(given) == ("layer" if hoisted else name)
