from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F

from vllmc.core.errors import VllmcError
from vllmc.core.graph.targets import find_target, import_path, nearest_names, op_names, target_name


def call(target: Any) -> fx.Node:
    graph = fx.Graph()
    if isinstance(target, str):
        return graph.call_method(target, (graph.placeholder("x"),))
    return graph.call_function(target, ())


@pytest.mark.parametrize(
    "function",
    [
        torch.matmul,
        torch.empty,
        torch.Size,
        torch.sym_max,
        F.silu,
        F.linear,
        F.max_pool1d,
        F.adaptive_max_pool1d,
        operator.getitem,
        operator.iadd,
        math.floor,
        torch.Tensor.add_,
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add,
    ],
    ids=lambda target: getattr(target, "__name__", str(target)),
)
def test_a_function_is_found_again_by_its_name(function: Any) -> None:
    assert find_target(target_name(call(function))) is function


def test_functions_made_by_one_dispatcher_have_names_of_their_own() -> None:
    assert F.max_pool1d.__qualname__ == F.max_pool2d.__qualname__
    assert target_name(call(F.max_pool1d)) != target_name(call(F.max_pool2d))


def test_a_function_without_a_name_is_refused() -> None:
    with pytest.raises(VllmcError, match="no other process can find") as caught:
        import_path(lambda x: x)
    assert caught.value.code == "unsupported-model"


@pytest.mark.parametrize(
    "name", ["torch.ops.nowhere.nothing", "torch.nothing", "no_such_module.x", "plain", ""]
)
def test_a_name_that_leads_nowhere_is_an_unknown_op(name: str) -> None:
    with pytest.raises(VllmcError) as caught:
        find_target(name)
    assert caught.value.code == "unknown-op"


def test_an_op_goes_by_its_name_with_and_without_overload() -> None:
    assert op_names(torch.ops.aten.add.Tensor) == {"aten::add", "aten::add.Tensor"}
    assert op_names(torch.ops.aten.sin.default) == {"aten::sin", "aten::sin.default"}
    assert op_names(torch.ops.aten.add) == {"aten::add"}
    assert op_names(F.silu) == frozenset()


def test_the_nearest_name_is_the_same_function_elsewhere() -> None:
    nodes = [call(F.silu), call(torch.ops.aten.add.Tensor), call("softmax")]
    assert nearest_names("aten::silu", nodes)[0] == "torch.nn.functional.silu"
    assert nearest_names("softmax", nodes)[0] == "torch.Tensor.softmax"
    assert nearest_names("aten::ad", nodes)[0] == "aten::add"
    assert nearest_names("zzz::zzz", nodes) == ()
