"""The kernel of quantisation, against float64 and against what a CPU computes."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    EPS32,
    FLOATING,
    LAYOUTS,
    QUANTIZED,
    Poisoned,
    assert_quantized,
    draws,
    rows_shape,
    steps_apart,
)

from vllmc.core.errors import VllmcError
from vllmc.kernels import quant as plain
from vllmc.kernels.triton import quant


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_elements_go_to_the_nearest_value_for_any_shape_stride_and_dtype(
    dtype: torch.dtype,
) -> None:
    for draw in draws(200):
        shape = rows_shape(draw, draw.one_of((1, 2, 31, 100, 128, 257, 4096, 4100)))
        x = draw.tensor(shape, draw.one_of(FLOATING), draw.one_of(LAYOUTS))
        scale = torch.tensor([draw.one_of((0.5, 0.013, 0.0031))])
        out = Poisoned.of(tuple(x.shape), dtype)
        quant.launch(x, out=out.tensor, scale=scale)
        assert_quantized(out.written(), x, scale)
        assert steps_apart(out.tensor, plain.static_scaled_quant(x, scale, dtype)) == 0


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_the_dynamic_scale_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    for draw in draws(60):
        shape = rows_shape(draw, draw.one_of((1, 31, 128, 257, 4100)))
        x = draw.tensor(shape, draw.one_of(FLOATING), draw.one_of(LAYOUTS))
        q, scale = quant.dynamic_scaled_quant(x, dtype)
        expected, expected_scale = plain.dynamic_scaled_quant(x, dtype)
        torch.testing.assert_close(scale, expected_scale, rtol=EPS32, atol=0.0)
        assert steps_apart(q, expected) == 0


def every_float16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_every_float16_is_quantised_as_on_a_cpu_infinities_and_nan_too(dtype: torch.dtype) -> None:
    x, scale = every_float16(), torch.tensor([1.0])
    out = torch.empty(x.shape, dtype=dtype)
    quant.launch(x, out=out, scale=scale)
    expected = plain.static_scaled_quant(x, scale, dtype)
    torch.testing.assert_close(out.float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def test_the_bits_that_hardware_without_fp8_is_given_are_those_of_fp8() -> None:
    near = torch.linspace(-500, 500, 100_003)
    x, scale = torch.cat([every_float16().float(), near, near / 2**12]), torch.tensor([1.0])
    out = torch.empty(x.shape, dtype=torch.uint8)
    quant.launch(x, out=out, scale=scale)
    expected = plain.static_scaled_quant(x, scale, torch.float8_e4m3fn)
    got = out.view(torch.float8_e4m3fn)
    torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    assert bool((torch.signbit(got.float()) == torch.signbit(expected.float()))[~x.isnan()].all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_shows_in_the_scale(value: float) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = value
    _, scale = quant.dynamic_scaled_quant(x, torch.int8)
    torch.testing.assert_close(scale, plain.scale_of(x, torch.int8), equal_nan=True)


def test_tensors_of_any_dimension_are_taken() -> None:
    for shape in ((), (7,), (2, 0, 3), (2, 0), (2, 3, 4, 5)):
        x = torch.randn(shape)
        q, scale = quant.dynamic_scaled_quant(x, torch.int8)
        expected, expected_scale = plain.dynamic_scaled_quant(x, torch.int8)
        assert torch.equal(q, expected)
        torch.testing.assert_close(scale, expected_scale, rtol=EPS32, atol=0.0)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(VllmcError, match="no type to quantise to"):
        quant.static_scaled_quant(torch.ones(3), torch.ones(1), torch.int32)
