"""Calls that nobody has made yet, as they are guessed."""

from typing import Any

import torch
from torch import Tensor

from vllmc.core import support_torch_compile
from vllmc.core.declare.calls import example_call
from vllmc.core.graph.layout import Argument


def test_dimensions_counted_from_the_last_are_guessed_as_others_are() -> None:
    @support_torch_compile(dynamic_arg_dims={"ids": {0: "t"}, "positions": {-1: "t"}, "x": [-2]})
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(5, 3)

        def forward(self, ids: Tensor, positions: Tensor, x: Tensor) -> Any:
            return torch.stack([ids, positions]), torch.cat([self.linear(x), ids[:, None]], -1)

    call = example_call("model", Model())
    assert call.arguments == (
        Argument(path="ids", dtype="int64", shape=("t",)),
        Argument(path="positions", dtype="int64", shape=("t",)),
        Argument(path="x", dtype="float32", shape=("x.shape[0]", 5)),
    )
