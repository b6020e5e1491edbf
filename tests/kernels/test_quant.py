"""The quantising ops, through torch's dispatcher."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import FLOATING, LAYOUTS, QUANTIZED, STRIDED, assert_quantized, draws, rows_shape

from vllmc.core.errors import VllmcError
from vllmc.kernels import quant

OPS = torch.ops.vllmc


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_elements_go_to_the_nearest_value(device: torch.device, dtype: torch.dtype) -> None:
    for draw in draws(200):
        shape = rows_shape(draw, draw.one_of((1, 2, 31, 128, 257, 4100)))
        x = draw.tensor(shape, draw.one_of(FLOATING), draw.one_of(LAYOUTS)).to(device)
        scale = torch.tensor([draw.one_of((0.5, 0.013, 0.0031))], device=device)
        q = OPS.static_scaled_quant(x, scale, dtype)
        assert q.dtype is dtype
        assert q.is_contiguous()
        assert_quantized(q, x, scale)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_the_largest_element_is_the_largest_of_the_type(
    device: torch.device, dtype: torch.dtype
) -> None:
    for draw in draws(100):
        shape = rows_shape(draw, draw.one_of((1, 31, 257)))
        x = draw.tensor(shape, draw.one_of(FLOATING), draw.one_of(LAYOUTS)).to(device)
        q, scale = OPS.dynamic_scaled_quant(x, dtype)
        assert_quantized(q, x, scale)
        if x.numel():
            assert float(q.float().abs().max()) == quant.LARGEST[dtype]


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_nothing_and_zeros_have_the_smallest_scale(
    device: torch.device, dtype: torch.dtype
) -> None:
    for x in (torch.zeros(0, 8, device=device), torch.zeros(3, 8, device=device)):
        q, scale = OPS.dynamic_scaled_quant(x, dtype)
        assert float(scale) == pytest.approx(quant.SMALLEST_AMAX / quant.LARGEST[dtype], rel=1e-6)
        assert q.shape == x.shape
        assert not bool(q.float().any())


def test_what_lies_beyond_the_type_gets_its_nearest_value(device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, 3e4], device=device)
    scale = torch.ones(1, device=device)
    for dtype, largest in quant.LARGEST.items():
        q = OPS.static_scaled_quant(x, scale, dtype)
        assert q.float().tolist() == [largest, -largest, largest, -largest, largest]


def test_nan_stays_in_fp8_and_is_zero_in_int8(device: torch.device) -> None:
    x, scale = torch.tensor([math.nan], device=device), torch.ones(1, device=device)
    assert OPS.static_scaled_quant(x, scale, torch.int8).tolist() == [0]
    assert bool(OPS.static_scaled_quant(x, scale, torch.float8_e4m3fn).float().isnan())


def test_halfway_is_to_the_even_neighbour(device: torch.device) -> None:
    scale = torch.ones(1, device=device)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5], device=device)
    assert OPS.static_scaled_quant(x, scale, torch.int8).tolist() == [0, 2, 2, 0, -2]
    x = torch.tensor([17.0, 19.0, -17.0], device=device)
    q = OPS.static_scaled_quant(x, scale, torch.float8_e4m3fn)
    assert q.float().tolist() == [16.0, 20.0, -16.0]


def test_a_tensor_without_dimensions_has_none_afterwards(device: torch.device) -> None:
    q, scale = OPS.dynamic_scaled_quant(torch.tensor(-2.0, device=device), torch.int8)
    assert q.shape == ()
    assert int(q) == -127
    assert scale.shape == (1,)


def test_another_dtype_is_refused() -> None:
    x, scale = torch.ones(3), torch.ones(1)
    with pytest.raises(VllmcError, match=r"torch.int32 is no type to quantise to") as caught:
        OPS.static_scaled_quant(x, scale, torch.int32)
    assert caught.value.code == "bad-quant-dtype"
    with pytest.raises(VllmcError, match="no type to quantise to"):
        OPS.dynamic_scaled_quant(x.to("meta"), torch.int32)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_the_ops_are_what_they_say(device: torch.device, dtype: torch.dtype) -> None:
    draw = next(draws(1))
    for x_dtype, layout in STRIDED:
        x = draw.tensor((3, 5, 64), x_dtype, layout).to(device)
        scale = torch.tensor([0.02], device=device)
        torch.library.opcheck(OPS.static_scaled_quant.default, (x, scale, dtype))
        torch.library.opcheck(OPS.dynamic_scaled_quant.default, (x, dtype))
