"""The kernel of the norms, against float64 and against what a CPU computes."""

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
    exact_norm,
    rows_shape,
    steps_apart,
)

from vllmc.kernels import norm as plain
from vllmc.kernels.quant import LARGEST, SMALLEST_AMAX, scale_of
from vllmc.kernels.triton import norm

EPS = 1e-6


def inputs(draw: Draw, *, width: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """`x`, a residual, a weight and its offset; width 0 is any."""
    shape = rows_shape(draw, width or draw.one_of((1, 2, 31, 64, 100, 128, 257, 300)))
    dtype = draw.one_of(FLOATING)
    x = draw.tensor(shape, dtype, draw.one_of(LAYOUTS))
    residual = draw.tensor(shape, dtype, draw.one_of(LAYOUTS))
    weight = draw.tensor(shape[-1:], draw.one_of(FLOATING), draw.one_of(LAYOUTS))
    return x, residual, weight, draw.one_of((0.0, 1.0))


def expect_norm(x: torch.Tensor, weight: torch.Tensor, offset: float) -> None:
    out = Poisoned.of(tuple(x.shape), x.dtype)
    norm.launch(x, weight, EPS, offset, out=out.tensor)
    exact = exact_norm(x, weight, EPS, offset)
    assert_near(out.written(), exact, slack=8 * EPS32 * exact.abs())


def expect_fused(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, offset: float
) -> None:
    out, total = (Poisoned.of(tuple(x.shape), x.dtype) for _ in range(2))
    added = {"residual": residual, "total": total.tensor}
    norm.launch(x, weight, EPS, offset, **added, out=out.tensor)
    assert torch.equal(total.written(), x + residual)
    exact = exact_norm(x + residual, weight, EPS, offset)
    assert_near(out.written(), exact, slack=8 * EPS32 * exact.abs())


def test_a_norm_is_that_of_float64_for_any_shape_stride_and_dtype() -> None:
    for draw in draws(200):
        x, _, weight, offset = inputs(draw)
        expect_norm(x, weight, offset)


@pytest.mark.parametrize("width", [8191, 8192, 8193, 20011])
def test_rows_that_no_program_holds_are_read_in_parts(width: int) -> None:
    for draw in draws(6):
        x, residual, weight, offset = inputs(draw, width=width)
        expect_norm(x, weight, offset)
        expect_fused(x, residual, weight, offset)


def test_a_residual_is_added_first_and_the_rounded_sum_is_normed() -> None:
    for draw in draws(100):
        expect_fused(*inputs(draw))


@pytest.mark.parametrize(("width", "count"), [(0, 100), (8300, 4)])
def test_quantised_norms_are_those_of_the_cpu_within_one_step(width: int, count: int) -> None:
    scale = torch.tensor([0.013])
    for draw in draws(count):
        x, residual, weight, offset = inputs(draw, width=width)
        args, dtype = (weight, EPS, offset), draw.one_of(QUANTIZED)
        out, total = Poisoned.of(tuple(x.shape), dtype), Poisoned.of(tuple(x.shape), x.dtype)
        norm.launch(x, *args, out=out.tensor, scale=scale)
        assert steps_apart(out.written(), plain.rms_norm_static_quant(x, *args, scale, dtype)) <= 1
        added = {"residual": residual, "total": total.tensor}
        norm.launch(x, *args, **added, out=out.tensor, scale=scale)
        expected, expected_total = plain.fused_add_rms_norm_static_quant(
            x, residual, *args, scale, dtype
        )
        assert steps_apart(out.written(), expected) <= 1
        assert torch.equal(total.written(), expected_total)


def test_dynamic_quantisation_is_the_static_by_the_largest_of_the_norm() -> None:
    for draw in draws(60):
        x, residual, weight, offset = inputs(draw)
        args, dtype = (weight, EPS, offset), draw.one_of(QUANTIZED)
        q, scale = norm.rms_norm_dynamic_quant(x, *args, dtype)
        expect_scale(scale, norm.rms_norm(x, *args), dtype)
        assert steps_apart(q, plain.rms_norm_static_quant(x, *args, scale, dtype)) <= 1
        q, scale, total = norm.fused_add_rms_norm_dynamic_quant(x, residual, *args, dtype)
        expect_scale(scale, norm.rms_norm(total, *args), dtype)
        assert steps_apart(q, plain.rms_norm_static_quant(total, *args, scale, dtype)) <= 1
        assert torch.equal(total, x + residual)


def expect_scale(scale: torch.Tensor, normed: torch.Tensor, dtype: torch.dtype) -> None:
    assert scale.shape == (1,)
    torch.testing.assert_close(scale, scale_of(normed, dtype), rtol=EPS32, atol=0.0)


def test_of_no_rows_the_scale_is_the_smallest() -> None:
    x = torch.empty(0, 64)
    for dtype in QUANTIZED:
        q, scale = norm.rms_norm_dynamic_quant(x, torch.ones(64), EPS, 0.0, dtype)
        assert q.shape == (0, 64)
        assert float(scale) == pytest.approx(SMALLEST_AMAX / LARGEST[dtype], rel=1e-6)


def test_the_ops_return_what_the_kernel_writes() -> None:
    x, residual, weight = torch.randn(3, 40), torch.randn(3, 40), torch.randn(40)
    scale = torch.tensor([0.02])
    torch.testing.assert_close(norm.rms_norm(x, weight, EPS), plain.rms_norm(x, weight, EPS))
    for got, expected in zip(
        norm.fused_add_rms_norm(x, residual, weight, EPS, 1.0),
        plain.fused_add_rms_norm(x, residual, weight, EPS, 1.0),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    args = (weight, EPS, 1.0, scale, torch.int8)
    got_q = norm.rms_norm_static_quant(x, *args)
    assert steps_apart(got_q, plain.rms_norm_static_quant(x, *args)) <= 1
    got_q, total = norm.fused_add_rms_norm_static_quant(x, residual, *args)
    expected_q, expected_total = plain.fused_add_rms_norm_static_quant(x, residual, *args)
    assert steps_apart(got_q, expected_q) <= 1
    assert torch.equal(total, expected_total)
