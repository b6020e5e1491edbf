"""`vllmc::scaled_mm`, through torch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EPS32, FLOATING, QUANTIZED, Draw, assert_near, draws

import vllmc.kernels.matmul  # noqa: F401, defines the op
from vllmc.core.errors import VllmcError

SCALED_MM = torch.ops.vllmc.scaled_mm


def quantized(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (draw.tensor(shape, torch.float32, "dense") * 30).clamp(-127, 127).to(dtype)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_product_is_that_of_float64(device: torch.device, dtype: torch.dtype) -> None:
    for draw in draws(200):
        # On a GPU: what torch's products take, and what they do not.
        rows = draw.one_of(((1,), (17,), (0,), (2, 3), (1, 40), (1, 0)))
        width, depth = draw.one_of((1, 7, 16, 64)), draw.one_of((1, 15, 32, 48, 129))
        a = quantized(draw, (*rows, depth), dtype).to(device)
        weight = quantized(draw, (width, depth), dtype).to(device)
        scales = [torch.tensor([scale], device=device) for scale in (0.03, 0.7)]
        out_dtype = draw.one_of(FLOATING)
        bias = draw.one_of((None, draw.tensor((width,), out_dtype, "dense").to(device)))
        got = SCALED_MM(a, weight, *scales, bias, out_dtype)
        assert got.dtype is out_dtype
        assert got.is_contiguous()
        scale = scales[0].double() * scales[1].double()
        added = torch.zeros((), device=device) if bias is None else bias.double()
        size = scale * (a.double().abs() @ weight.double().abs().t()) + added.abs()
        # Sums of whole numbers are exact; those of fp8 are off by a part for every product, on a
        # CPU of float32, in an H100's matrix units of 14 bits.
        part = EPS32 if device.type == "cpu" else 2.0**-13
        slack = 4 * EPS32 * size + (0 if dtype is torch.int8 else depth * part * size)
        assert_near(got, scale * (a.double() @ weight.double().t()) + added, slack)


def test_numbers_that_are_not_quantised_are_refused(device: torch.device) -> None:
    x, scale = torch.ones(20, 32, device=device), torch.ones(1, device=device)
    with pytest.raises(VllmcError, match=r"torch.float32 is no type to quantise to") as caught:
        SCALED_MM(x, x, scale, scale, None, torch.float32)
    assert caught.value.code == "bad-quant-dtype"


def test_the_op_is_what_it_says(device: torch.device) -> None:
    draw = next(draws(1))
    scale = torch.tensor([0.02], device=device)
    for dtype in QUANTIZED:
        a, weight = (quantized(draw, s, dtype).to(device) for s in ((2, 5, 32), (7, 32)))
        # torch compares no tensors of fp8, which its test of the schema does.
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        for bias in (None, torch.randn(7, device=device)):
            torch.library.opcheck(
                SCALED_MM.default,
                (a, weight, scale, scale, bias, torch.float32),
                test_utils=tests if dtype is torch.int8 else tests[1:],
            )
