"""Programs that compile again, one for each class of causes, and each with its cure applied.

`python tests/support/recompiling.py NAME` runs one in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName

LIBRARY = torch.library.Library("recompiling", "DEF")
LIBRARY.define("scale(Tensor x, str name) -> Tensor")
LIBRARY.define(f"scale_named(Tensor x, {LAYER_NAME_TYPE} name) -> Tensor")
for op in ("scale", "scale_named"):
    LIBRARY.impl(op, lambda x, name: x * 2, "CPU")
    torch.library.register_fake(f"recompiling::{op}", lambda x, name: torch.empty_like(x))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="eager", **options)


def rows(x: torch.Tensor) -> torch.Tensor:
    return x.sum(0)


def shape_0_1() -> None:
    step = compiled(rows)
    for batch in (4, 7, 1, 0):
        step(torch.ones(batch, 8))


def shape_0_1_cured() -> None:
    step = compiled(rows)
    for batch in (4, 7, 1, 0):
        x = torch.ones(batch, 8)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        step(x)


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def shape() -> None:
    step = compiled(add_one, dynamic=False)
    for length in range(4, 16, 3):
        step(torch.ones(length))


def shape_cured() -> None:
    step = compiled(add_one, dynamic=False)
    for length in range(4, 16, 3):
        x = torch.ones(length)
        torch._dynamo.mark_dynamic(x, 0)
        step(x)


def dtype() -> None:
    step = compiled(add_one)
    for kind in (torch.float32, torch.bfloat16):
        step(torch.ones(4, dtype=kind))


def dtype_cured() -> None:
    step = compiled(add_one)
    for kind in (torch.float32, torch.bfloat16):
        x = torch.ones(4, dtype=kind)
        x = x.to(torch.float32)
        step(x)


def layout() -> None:
    step = compiled(add_one)
    step(torch.ones(4, 8))
    step(torch.ones(8, 4).t())


def layout_cured() -> None:
    step = compiled(add_one)
    for x in (torch.ones(4, 8), torch.ones(8, 4).t()):
        x = x.contiguous()
        step(x)


class Counter(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step: Any = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1
        return x * self.step


class CuredCounter(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.step = torch.tensor(self.step)


def counter() -> None:
    module = compiled(Counter())
    for _ in range(12):
        module(torch.ones(4))


def counter_cured() -> None:
    # `self.step = torch.tensor(self.step)` in __init__.
    module = compiled(CuredCounter())
    for _ in range(12):
        module(torch.ones(4))


def scaled(x: torch.Tensor, k: Any) -> torch.Tensor:
    return x * k


def number() -> None:
    step = compiled(scaled)
    for k in (2, 3, 4):
        step(torch.ones(4), k)


def number_cured() -> None:
    step = compiled(scaled)
    for k in (2, 3, 4):
        k: Any = torch.tensor(k)
        step(torch.ones(4), k)


def layer(x: torch.Tensor, name: str) -> torch.Tensor:
    scaled: torch.Tensor = torch.ops.recompiling.scale(x, name)
    return scaled + 1


def named_layer(x: torch.Tensor, name: LayerName) -> torch.Tensor:
    scaled: torch.Tensor = torch.ops.recompiling.scale_named(x, name)
    return scaled + 1


def string() -> None:
    step = compiled(layer)
    for index in range(12):
        step(torch.ones(4), f"model.layers.{index}")


def string_cured() -> None:
    names = [LayerName(f"model.layers.{index}") for index in range(12)]

    @compiled
    def model(x: torch.Tensor) -> torch.Tensor:
        for name in names:
            x = named_layer(x, name)
        return x

    model(torch.ones(4))
    model(torch.ones(4))


def apply(x: torch.Tensor, f: Callable[..., Any]) -> torch.Tensor:
    result: torch.Tensor = f(x)
    return result


def object_id() -> None:
    step = compiled(apply)
    for f in (torch.cos, torch.sin):
        step(torch.ones(4), f)


def object_id_cured() -> None:
    step = compiled(apply)
    f = torch.cos
    for _ in range(3):
        step(torch.ones(4), f)


def global_state() -> None:
    step = compiled(add_one)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            step(torch.ones(4))


def global_state_cured() -> None:
    step = compiled(add_one)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    for _ in (True, False):
        step(torch.ones(4))
    torch.set_grad_enabled(before)


def indexed(x: torch.Tensor) -> torch.Tensor:
    width = torch.int32 if x.numel() <= 2**31 - 1 else torch.int64
    return torch.zeros(4, dtype=width)


def index_width() -> None:
    # On `meta` a tensor has a size, and no memory.
    step = compiled(indexed, dynamic=True)
    for size in (8, 2**31 + 8):
        step(torch.empty(size, dtype=torch.int8, device="meta"))


def widely_indexed(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.int64)


def index_width_cured() -> None:
    step = compiled(widely_indexed, dynamic=True)
    for size in (8, 2**31 + 8):
        step(torch.empty(size, dtype=torch.int8, device="meta"))


def kind() -> None:
    step = compiled(scaled)
    for k in (2.5, 2, True):
        step(torch.ones(4), k)


def kind_cured() -> None:
    step = compiled(scaled)
    for k in (2.5, 2, True):
        k: Any = torch.tensor(float(k))
        step(torch.ones(4), k)


def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


def other() -> None:
    step = compiled(added)
    x = torch.ones(4)
    step(x, torch.ones(4))
    step(x, x)


def other_cured() -> None:
    step = compiled(added)
    x = torch.ones(4)
    step(x, torch.ones(4))
    step(x, x.clone())


def clipped(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[0] <= 16 else x - 1


def short(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def long(x: torch.Tensor) -> torch.Tensor:
    return x - 1


def branch() -> None:
    step = compiled(clipped, dynamic=True)
    for length in (4, 32):
        step(torch.ones(length))


def branch_cured() -> None:
    small, large = compiled(short, dynamic=True), compiled(long, dynamic=True)
    for length in (4, 32, 5, 33):
        step = small if length <= 16 else large
        step(torch.ones(length))


def closing_over(factor: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x * factor


def closure() -> None:
    step = compiled(apply)
    for factor in (2.0, 3.0, 4.0):
        step(torch.ones(4), closing_over(factor))


def closure_cured() -> None:
    step = compiled(apply)
    for factor in (2.0, 3.0, 4.0):
        step(torch.ones(4), closing_over(torch.tensor(factor)))


def gradient() -> None:
    step = compiled(add_one)
    for needed in (False, True):
        step(torch.ones(4, requires_grad=needed))


def gradient_cured() -> None:
    step = compiled(add_one)
    for needed in (False, True):
        x = torch.ones(4, requires_grad=needed)
        x = x.detach()
        step(x)


def optional(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return x.sum() if y is None else x.sum() + y.sum()


def missing() -> None:
    step = compiled(optional)
    for y in (torch.ones(4), None):
        step(torch.ones(4), y)


def missing_cured() -> None:
    step = compiled(optional)
    for y in (torch.ones(4), torch.empty(0)):
        torch._dynamo.decorators.mark_unbacked(y, 0)
        step(torch.ones(4), y)


def total(xs: Any) -> Any:
    return xs[0] if len(xs) == 1 else sum(xs)


def stacked_total(xs: torch.Tensor) -> torch.Tensor:
    return xs.sum(0)


def length() -> None:
    step = compiled(total)
    for number in (2, 3, 4):
        step([torch.ones(4) for _ in range(number)])


def length_cured() -> None:
    step = compiled(stacked_total)
    for number in (2, 3, 4):
        xs = torch.stack([torch.ones(4) for _ in range(number)])
        torch._dynamo.mark_dynamic(xs, 0)
        step(xs)


def rank() -> None:
    step = compiled(add_one)
    for x in (torch.ones(1, 4), torch.ones(4)):
        step(x)


def rank_cured() -> None:
    step = compiled(add_one)
    for x in (torch.ones(1, 4), torch.ones(4).unsqueeze(0)):
        step(x)


def broken(x: torch.Tensor) -> torch.Tensor:
    x = x + 1
    torch._dynamo.graph_break()
    return x * 2


def graph_break() -> None:
    step = compiled(broken)
    for length in (3, 5):
        step(torch.ones(length))


class Rows(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0)


def module() -> None:
    step = compiled(Rows())
    for batch in (4, 1, 7):
        step(torch.ones(batch, 8))


def module_cured() -> None:
    step = compiled(Rows())
    for batch in (4, 1, 7):
        x = torch.ones(batch, 8)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        step(x)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
