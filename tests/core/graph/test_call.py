import dataclasses
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from vllmc.core.declare.calls import Call, describe_call
from vllmc.core.declare.dims import declare
from vllmc.core.errors import UsageError
from vllmc.core.graph.call import example_arguments
from vllmc.core.graph.layout import Argument
from vllmc.core.spec import CompileSpec


@dataclasses.dataclass
class Step:
    ids: Tensor | None
    count: int


class Model(torch.nn.Module):
    def forward(self, x: Any, y: Any = None, z: Any = None) -> Any: ...


def called(dims: Any, **values: Any) -> Call:
    return describe_call(declare(Model.forward, dims), values)


def test_sizes_that_vary_have_names_and_all_else_is_fixed() -> None:
    call = called(
        {"x": {0: "t"}, "y": {-1: "t"}, "z": 1},
        x=torch.ones(3, 2),
        y={"a": torch.ones(1, 3), "n": 4},
        z=torch.ones(5, 7, dtype=torch.int64),
    )
    assert call.arguments == (
        Argument(path="x", dtype="float32", shape=("t", 2)),
        Argument(path="y['a']", dtype="float32", shape=(1, "t")),
        Argument(path="z", dtype="int64", shape=(5, "z.shape[1]")),
    )
    assert call.sizes == ("t", "z.shape[1]")
    assert call.constants == {"y['n']": 4, "type(y)": "builtins.dict"}


def test_examples_are_new_tensors_with_sizes_of_their_own() -> None:
    step = Step(torch.ones(3, 2), 5)
    call = called({"x": {0: "t"}, "y": 0}, x=step, y=torch.ones(3), z=None)
    made = example_arguments(call, CompileSpec())
    assert made["x"].ids.shape == (17, 2)
    assert (made["x"].count, made["z"]) == (5, None)
    assert made["y"].shape not in ((17,), (0,), (1,))
    assert step.ids is not None
    assert step.ids.shape == (3, 2)


@pytest.mark.parametrize("value", [None, {}, [], (), [None], {"a": None}, Step(None, 3)])
def test_where_a_tensor_may_be_absent_there_may_be_none(value: Any) -> None:
    assert called({"x": 0}, x=value).arguments == ()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (3, "not-a-tensor"),
        ("tokens", "not-a-tensor"),
        ([1, 2], "not-a-tensor"),
        ({"a": 1}, "not-a-tensor"),
        (torch.ones(1).numpy(), "bad-argument"),
        (torch.nn.Linear(1, 1), "bad-argument"),
        (types.SimpleNamespace(tensors=3), "not-a-tensor"),
    ],
)
def test_a_declared_argument_without_a_tensor_is_an_error(value: Any, code: str) -> None:
    with pytest.raises(UsageError, match="argument x") as caught:
        called({"x": 0}, x=value)
    assert caught.value.code == code
