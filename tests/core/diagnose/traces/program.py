"""What the traces beside this file are of. `make.py` runs it, with the name of a case."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]


@torch._dynamo.allow_in_graph
def unknown_to_the_cache(x: Tensor) -> Tensor:
    return x * 2


@torch.compile
def scale(x: Tensor) -> Tensor:
    return torch.relu(x) * 2


@torch.compile
def custom(x: Tensor) -> Tensor:
    return unknown_to_the_cache(x) + 1


@torch.compile
def train(x: Tensor) -> Tensor:
    return x.sin().sum()


@torch.compile
def late(x: Tensor) -> Tensor:
    return x.cos() - 1


def scale_at(*sizes: int) -> Step:
    return lambda: [scale(torch.ones(size)) for size in sizes]


def freeze() -> None:
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4))(torch.ones(2, 4))


ALL: tuple[Step, ...] = (
    scale_at(4, 6),
    lambda: custom(torch.ones(4)),
    lambda: train(torch.ones(3, requires_grad=True)).backward(),
)
STEPS: dict[str, tuple[Step, ...]] = {
    "cold": ALL,
    "warm": ALL,
    "option": ALL,
    "moved": (lambda: late(torch.ones(4)), *ALL[1:], scale_at(4)),
    "detailed": (scale_at(4),),
    "changed": (scale_at(8),),
    "frozen": (freeze,),
    "disabled": (scale_at(4),),
}

if __name__ == "__main__":
    case = sys.argv[1]
    if case == "option":
        torch._inductor.config.epilogue_fusion = False
    if case == "changed":
        torch._functorch.config.donated_buffer = False
    for step in STEPS[case]:
        step()
