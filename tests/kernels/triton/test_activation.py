"""The kernel of the gated activations, against float64 and against what a CPU computes."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    EPS32,
    FLOATING,
    LAYOUTS,
    QUANTIZED,
    Draw,
    Poisoned,
    assert_near,
    draws,
    exact_activation,
    rows_shape,
    steps_apart,
)

from vllmc.kernels import activation as plain
from vllmc.kernels.quant import LARGEST, SMALLEST_AMAX, scale_of
from vllmc.kernels.triton import activation

KINDS = ("silu", "gelu", "gelu_tanh")


def inputs(draw: Draw) -> tuple[torch.Tensor, torch.Tensor, str]:
    """`gate`, `up` and the activation's name."""
    shape = rows_shape(draw, draw.one_of((1, 2, 31, 64, 100, 128, 257, 4096, 4100)))
    dtype = draw.one_of(FLOATING)
    gate, up = (draw.tensor(shape, dtype, draw.one_of(LAYOUTS)) for _ in range(2))
    return gate * draw.one_of((1, 8)), up, draw.one_of(KINDS)


def on_cpu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return plain.silu_and_mul(gate, up)
    return plain.gelu_and_mul(gate, up, "none" if kind == "gelu" else "tanh")


def test_an_activation_is_that_of_float64_for_any_shape_stride_and_dtype() -> None:
    for draw in draws(200):
        gate, up, kind = inputs(draw)
        out = Poisoned.of(tuple(gate.shape), gate.dtype)
        activation.launch(gate, up, kind, out=out.tensor)
        exact = exact_activation(gate, up, kind)
        # Far from zero an activation is the difference of numbers as large as its argument.
        slack = 4 * EPS32 * (1 + gate.double().abs()) * (gate.double() * up.double()).abs()
        assert_near(out.written(), exact, slack)


def test_quantised_activations_are_those_of_the_cpu_within_one_step() -> None:
    scale = torch.tensor([0.013])
    for draw in draws(100):
        gate, up, kind = inputs(draw)
        out = Poisoned.of(tuple(gate.shape), draw.one_of(QUANTIZED))
        activation.launch(gate, up, kind, out=out.tensor, scale=scale)
        expected = plain.static_scaled_quant(on_cpu(gate, up, kind), scale, out.tensor.dtype)
        assert steps_apart(out.written(), expected) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_quantisation_is_the_static_by_the_largest_product(kind: str) -> None:
    for draw in draws(20):
        gate, up, _ = inputs(draw)
        dtype = draw.one_of(QUANTIZED)
        if kind == "silu":
            q, scale = activation.silu_and_mul_dynamic_quant(gate, up, dtype)
            expected = activation.silu_and_mul_static_quant(gate, up, scale, dtype)
            product = activation.silu_and_mul(gate, up)
        else:
            how = "none" if kind == "gelu" else "tanh"
            q, scale = activation.gelu_and_mul_dynamic_quant(gate, up, how, dtype)
            expected = activation.gelu_and_mul_static_quant(gate, up, how, scale, dtype)
            product = activation.gelu_and_mul(gate, up, how)
        assert steps_apart(q, expected) == 0
        torch.testing.assert_close(scale, scale_of(product, dtype), rtol=EPS32, atol=0.0)
        assert steps_apart(q, plain.static_scaled_quant(product, scale, dtype)) == 0


def test_of_no_rows_the_scale_is_the_smallest() -> None:
    x = torch.empty(0, 64)
    q, scale = activation.silu_and_mul_dynamic_quant(x, x, torch.int8)
    assert q.shape == (0, 64)
    assert float(scale) == pytest.approx(SMALLEST_AMAX / LARGEST[torch.int8], rel=1e-6)


def test_the_halves_of_one_tensor_are_read_where_they_are() -> None:
    both = torch.randn(5, 2, 96)
    torch.testing.assert_close(
        activation.silu_and_mul(both[:, 0], both[:, 1]), plain.silu_and_mul(both[:, 0], both[:, 1])
    )
