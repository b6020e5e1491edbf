"""The ops of gated activations, through torch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    EPS32,
    FLOATING,
    LAYOUTS,
    QUANTIZED,
    STRIDED,
    Draw,
    assert_near,
    assert_same,
    draws,
    exact_activation,
    rows_shape,
)

import vllmc.kernels.activation  # noqa: F401, defines the ops

OPS = torch.ops.vllmc
KINDS = ("silu", "gelu", "gelu_tanh")


def inputs(draw: Draw, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shape = rows_shape(draw, draw.one_of((1, 2, 31, 64, 100, 257, 4100)))
    dtype = draw.one_of(FLOATING)
    gate, up = (draw.tensor(shape, dtype, draw.one_of(LAYOUTS)).to(device) for _ in range(2))
    return gate * draw.one_of((1, 8)), up


def named(kind: str, suffix: str = "") -> tuple[torch._ops.OpOverload, tuple[str, ...]]:
    """The op of an activation, and what it takes after `gate` and `up`."""
    name = "silu" if kind == "silu" else "gelu"
    how = {"silu": (), "gelu": ("none",), "gelu_tanh": ("tanh",)}[kind]
    return getattr(OPS, f"{name}_and_mul{suffix}").default, how


@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_is_that_of_float64(device: torch.device, kind: str) -> None:
    op, how = named(kind)
    for draw in draws(200):
        gate, up = inputs(draw, device)
        got, exact = op(gate, up, *how), exact_activation(gate, up, kind)
        assert got.dtype is gate.dtype
        assert got.is_contiguous()
        # Far from zero an activation is the difference of numbers as large as its argument.
        slack = 4 * EPS32 * (1 + gate.double().abs()) * (gate.double() * up.double()).abs()
        assert_near(got, exact, slack)


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("kind", KINDS)
def test_fusing_with_quantisation_changes_no_number(
    device: torch.device, kind: str, dtype: torch.dtype
) -> None:
    scale = torch.tensor([0.013], device=device)
    (plain, how), (static, _), (dynamic, _) = (
        named(kind, suffix) for suffix in ("", "_static_quant", "_dynamic_quant")
    )
    for draw in draws(50):
        gate, up = inputs(draw, device)
        product = plain(gate, up, *how)
        assert_same(
            [static(gate, up, *how, scale, dtype)],
            [OPS.static_scaled_quant(product, scale, dtype)],
        )
        assert_same(dynamic(gate, up, *how, dtype), OPS.dynamic_scaled_quant(product, dtype))


@pytest.mark.parametrize(("dtype", "layout"), STRIDED)
def test_the_ops_are_what_they_say(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    draw = next(draws(1))
    scale = torch.tensor([0.02], device=device)
    gate, up = (draw.tensor((3, 5, 64), dtype, layout).to(device) for _ in range(2))
    for kind in ("silu", "gelu_tanh"):
        for suffix, rest in (
            ("", ()),
            ("_static_quant", (scale, torch.int8)),
            ("_dynamic_quant", (torch.float8_e4m3fn,)),
        ):
            op, how = named(kind, suffix)
            torch.library.opcheck(op, (gate, up, *how, *rest))


def test_nothing_is_mutated(device: torch.device) -> None:
    for dtype in FLOATING:
        gate, up = torch.randn(2, 3, 32, device=device).to(dtype).unbind()
        before = gate.clone(), up.clone()
        for kind in KINDS:
            op, how = named(kind)
            op(gate, up, *how)
        assert torch.equal(gate, before[0])
        assert torch.equal(up, before[1])
