"""Quantisation expanded computes what the op does, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.fx as fx

from vllmc.core.graph.passes.expanded import expand_quants
from vllmc.core.passes import chosen
from vllmc.core.torch_compat.post_grad import decomposed

vllmc = torch.ops.vllmc
SCALE = torch.full((1,), 0.02)
TYPES = (torch.float8_e4m3fn, torch.int8)


def bits(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.view(torch.int8) if t.element_size() == 1 else t for t in tensors]


@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 7, 24), (5,), (2, 3, 4, 5)])
def test_the_expansion_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, mode: str, to: torch.dtype
) -> None:
    def run(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if mode == "static":
            return (vllmc.static_scaled_quant(x, scale, to),)
        return tuple(vllmc.dynamic_scaled_quant(x, to))

    torch.manual_seed(0)
    x = (torch.randn(shape) * 5).to(dtype)
    graph = decomposed(run, [x, SCALE])
    assert expand_quants(graph) == (1, None)
    assert not [n for n in graph.nodes if "vllmc" in str(n.target)]
    # What is beyond the type's reach, and what is no number, has no scale of its own.
    special = [math.nan, math.inf, -math.inf, 1e4, -0.0, 0.0] if mode == "static" else []
    for index, value in enumerate(special[: x.numel()]):
        x.view(-1)[index] = value
    found = fx.Interpreter(fx.GraphModule({}, graph)).run(x, SCALE)
    for one, other in zip(bits(tuple(found)), bits(run(x, SCALE)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_what_the_expansion_gives_is_contiguous_too(mode: str) -> None:
    def run(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        across = x.t()
        if mode == "static":
            q = vllmc.static_scaled_quant(across, scale, torch.int8)
        else:
            q, _ = vllmc.dynamic_scaled_quant(across, torch.int8)
        return (torch.as_strided(q, (5,), (2,)),)

    torch.manual_seed(0)
    x = torch.randn(4, 6)
    graph = decomposed(run, [x, SCALE])
    assert expand_quants(graph) == (1, None)
    (found,) = fx.Interpreter(fx.GraphModule({}, graph)).run(x, SCALE)
    assert torch.equal(found, run(x, SCALE)[0])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_what_may_be_empty_is_quantised_when_it_is(mode: str, link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        x = ops.cut(x)
        kept = torch.nonzero(x[0, :, 0] > 100)[:, 0]
        if mode == "static":
            q = vllmc.static_scaled_quant(x[0, kept], torch.ones_like(x[0, 0, :1]), torch.int8)
        else:
            q, _ = vllmc.dynamic_scaled_quant(x[0, kept], torch.int8)
        return x[0].index_add(0, kept, q.float())

    toy = link_toy(function, backend="inductor", passes=chosen(["expand-quant"], ["all"], "cpu"))
    toy.check(1, 2, 17)
    reports = [report for made in toy.artifacts.values() for report in made.passes]
    assert sum(report.matches for report in reports) == (mode == "static")


def test_a_graph_without_quantisation_stays_as_it_is() -> None:
    graph = decomposed(torch.sin, [torch.ones(3)])
    before = str(graph)
    assert expand_quants(graph) == (0, None)
    assert str(graph) == before
