from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllmc.core.graph.names import NamedPieces, find_named_pieces
from vllmc.core.graph.plan import Plan, make_plan
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName

Function = Callable[..., torch.Tensor]
LAYERS = [f"layers.{number}" for number in range(4)]


@pytest.fixture(scope="module")
def named(ops: Any) -> Iterator[Any]:
    """`torch.ops.vllmc_names`: ops that take strings in every way, and one `LayerName`."""
    library = torch.library.Library("vllmc_names", "DEF")
    library.define("keyword(Tensor x, *, str? name=None) -> Tensor")
    library.define("pair(Tensor x, str mode, str name) -> Tensor")
    library.define(f"hoisted(Tensor x, {LAYER_NAME_TYPE} name) -> Tensor")
    library.define("over.number(Tensor x, int name) -> Tensor")
    library.define("over.text(Tensor x, str label) -> Tensor")
    for name in ("keyword", "pair", "hoisted", "over.number", "over.text"):
        library.impl(name, lambda x, *_, **__: x.clone(), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"vllmc_names::{name}", lambda x, *_, **__: torch.empty_like(x), lib=library
        )
    yield torch.ops.vllmc_names
    library._destroy()


@pytest.fixture
def planned(trace_toy: Any, ops: Any) -> Callable[..., Plan]:
    """The plan of a chain of layers, each a piece: `planned(layer, values)`."""

    def make(layer: Callable[[torch.Tensor, Any], torch.Tensor], values: list[Any]) -> Plan:
        def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
            for value in entry.names:
                x = layer(ops.cut(x), value)
            return ops.cut(x)[0]

        captured, spec = trace_toy(function, names=values)
        return make_plan(captured, spec)

    return make


def find(plan: Plan) -> NamedPieces:
    found = find_named_pieces(plan.unique)
    assert found is not None
    return found


def test_a_string_that_differs_between_equal_pieces_is_named(planned: Any, ops: Any) -> None:
    plan = planned(lambda x, name: F.silu(ops.named(x, name)) + 1, LAYERS)
    found = find(plan)
    assert found.unique == len(plan.unique) == 6
    layers = [unique.names[0] for unique in plan.unique[1:-1]]
    assert list(found.extra) == layers[1:]
    [argument] = found.arguments
    assert (argument.op, argument.argument) == ("vllmc_test::named", "name")
    assert argument.schema == "vllmc_test::named(Tensor x, str name) -> Tensor"
    assert argument.values == tuple(LAYERS)
    assert list(argument.pieces) == layers


def test_the_op_declared_with_a_layer_name_leaves_as_many_pieces_as_was_said(
    planned: Any, ops: Any, named: Any
) -> None:
    found = find(planned(lambda x, name: F.silu(ops.named(x, name)) + 1, LAYERS))
    hoisted = planned(lambda x, name: F.silu(named.hoisted(x, name)) + 1, [*map(LayerName, LAYERS)])
    assert find_named_pieces(hoisted.unique) is None
    assert len(hoisted.unique) == found.unique - len(found.extra) == 3


def test_a_string_that_every_piece_has_costs_nothing(planned: Any, ops: Any) -> None:
    plan = planned(lambda x, _: ops.named(x, "shared") + 1, LAYERS)
    assert len(plan.unique) == 3
    assert find_named_pieces(plan.unique) is None


def test_pieces_that_differ_in_more_than_strings_are_no_finding(planned: Any, ops: Any) -> None:
    plan = planned(lambda x, name: ops.named(x, name) * (LAYERS.index(name) + 2), LAYERS)
    assert len(plan.unique) == 6
    assert find_named_pieces(plan.unique) is None


def test_pieces_without_custom_ops_are_no_finding(planned: Any) -> None:
    plan = planned(lambda x, mode: torch.div(x, 2.0, rounding_mode=mode), ["floor", "trunc"])
    assert len(plan.unique) == 4
    assert find_named_pieces(plan.unique) is None
    aten = planned(
        lambda x, mode: torch.ops.aten.gelu.default(x, approximate=mode), ["none", "tanh"]
    )
    assert len(aten.unique) == 4
    assert find_named_pieces(aten.unique) is None


def test_one_name_used_twice_is_not_taken_for_two_names(planned: Any, ops: Any) -> None:
    def layer(x: Any, names: tuple[str, str]) -> Any:
        return ops.named(ops.named(x, names[0]), names[1])

    assert find_named_pieces(planned(layer, [("a", "a"), ("b", "c")]).unique) is None
    assert find(planned(layer, [("a", "a"), ("b", "b")])).arguments[0].values == ("a", "b")


def test_only_the_argument_that_differs_is_named(planned: Any, named: Any) -> None:
    [argument] = find(planned(lambda x, name: named.pair(x, "fast", name), LAYERS)).arguments
    assert argument.argument == "name"


def test_groups_of_pieces_are_counted_each_for_itself(planned: Any, ops: Any) -> None:
    def layer(x: Any, name: str) -> Any:
        return ops.named(x, name) * (2 if name in LAYERS[:2] else 3)

    found = find(planned(layer, LAYERS))
    assert (found.unique, len(found.extra)) == (6, 2)
    [argument] = found.arguments
    assert argument.values == tuple(LAYERS)
    assert len(argument.pieces) == 4


@pytest.mark.parametrize(
    ("call", "op", "argument"),
    [
        (lambda n, x, name: n.keyword(x, name=name), "vllmc_names::keyword", "name"),
        (lambda n, x, name: n.keyword.default(x, name=name), "vllmc_names::keyword", "name"),
        (lambda n, x, name: n.over(x, name), "vllmc_names::over", "label"),
        (lambda n, x, name: n.over(x, label=name), "vllmc_names::over", "label"),
        (lambda n, x, name: n.over.text(x, name), "vllmc_names::over", "label"),
    ],
)
def test_the_argument_has_the_name_of_its_schema(
    planned: Any, named: Any, call: Any, op: str, argument: str
) -> None:
    [found] = find(planned(lambda x, name: call(named, x, name), LAYERS)).arguments
    assert (found.op, found.argument, found.values) == (op, argument, tuple(LAYERS))
