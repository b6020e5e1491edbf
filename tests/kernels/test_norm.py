"""The ops of RMSNorm, through torch's dispatcher."""

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
    exact_norm,
    rows_shape,
)

import vllmc.kernels.norm  # noqa: F401, defines the ops

OPS = torch.ops.vllmc
EPS = 1e-6


def inputs(
    draw: Draw, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """`x`, a residual, a weight and its offset."""
    shape = rows_shape(draw, draw.one_of((1, 2, 31, 64, 100, 257, 4096, 9000)))
    dtype = draw.one_of(FLOATING)
    x = draw.tensor(shape, dtype, draw.one_of(LAYOUTS))
    residual = draw.tensor(shape, dtype, draw.one_of(LAYOUTS))
    weight = draw.tensor(shape[-1:], draw.one_of(FLOATING), draw.one_of(LAYOUTS))
    return x.to(device), residual.to(device), weight.to(device), draw.one_of((0.0, 1.0))


def test_a_norm_is_that_of_float64(device: torch.device) -> None:
    for draw in draws(200):
        x, _, weight, offset = inputs(draw, device)
        got, exact = OPS.rms_norm(x, weight, EPS, offset), exact_norm(x, weight, EPS, offset)
        assert got.dtype is x.dtype
        assert got.is_contiguous()
        assert_near(got, exact, slack=8 * EPS32 * exact.abs())


def test_a_residual_is_added_first_and_the_rounded_sum_is_normed(device: torch.device) -> None:
    for draw in draws(200):
        x, residual, weight, offset = inputs(draw, device)
        got, total = OPS.fused_add_rms_norm(x, residual, weight, EPS, offset)
        assert torch.equal(total, x + residual)
        assert total.is_contiguous()
        exact = exact_norm(total, weight, EPS, offset)
        assert_near(got, exact, slack=8 * EPS32 * exact.abs())


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_fusing_with_quantisation_changes_no_number(
    device: torch.device, dtype: torch.dtype
) -> None:
    scale = torch.tensor([0.013], device=device)
    for draw in draws(100):
        x, residual, weight, offset = inputs(draw, device)
        args = (weight, EPS, offset)
        normed, (added, total) = OPS.rms_norm(x, *args), OPS.fused_add_rms_norm(x, residual, *args)
        static, dynamic = OPS.static_scaled_quant, OPS.dynamic_scaled_quant
        assert_same(
            [OPS.rms_norm_static_quant(x, *args, scale, dtype)], [static(normed, scale, dtype)]
        )
        assert_same(OPS.rms_norm_dynamic_quant(x, *args, dtype), dynamic(normed, dtype))
        assert_same(
            OPS.fused_add_rms_norm_static_quant(x, residual, *args, scale, dtype),
            [static(added, scale, dtype), total],
        )
        assert_same(
            OPS.fused_add_rms_norm_dynamic_quant(x, residual, *args, dtype),
            [*dynamic(added, dtype), total],
        )


@pytest.mark.parametrize(("dtype", "layout"), STRIDED)
def test_the_ops_are_what_they_say(device: torch.device, dtype: torch.dtype, layout: str) -> None:
    draw = next(draws(1))
    x, residual = (draw.tensor((3, 5, 64), dtype, layout).to(device) for _ in range(2))
    weight, scale = torch.ones(64, device=device), torch.tensor([0.02], device=device)
    norm, added = (x, weight, EPS, 1.0), (x, residual, weight, EPS, 1.0)
    torch.library.opcheck(OPS.rms_norm.default, norm)
    torch.library.opcheck(OPS.fused_add_rms_norm.default, added)
    for suffix, rest in (("static", (scale, torch.int8)), ("dynamic", (torch.float8_e4m3fn,))):
        for name, args in (("rms_norm", norm), ("fused_add_rms_norm", added)):
            op = getattr(OPS, f"{name}_{suffix}_quant").default
            torch.library.opcheck(op, (*args, *rest))


def test_nothing_is_mutated(device: torch.device) -> None:
    for dtype in FLOATING:
        x, residual = torch.randn(2, 3, 32, device=device).to(dtype).unbind()
        weight = torch.randn(32, device=device)
        before = [tensor.clone() for tensor in (x, residual, weight)]
        OPS.rms_norm(x, weight, EPS, 1.0)
        OPS.fused_add_rms_norm_dynamic_quant(x, residual, weight, EPS, 1.0, torch.int8)
        for tensor, copy in zip((x, residual, weight), before, strict=True):
            assert torch.equal(tensor, copy)
