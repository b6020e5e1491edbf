"""The interpreter as the other tests of this directory use it: it rounds as a GPU does."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _cast(source: tl.tensor, target: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at, mask=at < count)
    tl.store(target + at, values.to(target.dtype.element_ty), mask=at < count)


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(source: torch.dtype, target: torch.dtype) -> None:
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 20
    numbers[:8] = torch.tensor([1.97, -1.97, 0.0, 447.9, 0.001, 0.0009765625, 240.1, 17.0])
    got = torch.full((1000,), 77.0).to(target)
    _cast[(1,)](numbers.to(source), got, 1000, BLOCK=1024)
    assert torch.equal(got.float(), numbers.to(source).to(target).float())


def test_what_is_masked_is_not_written() -> None:
    got = torch.full((16,), 77.0)
    _cast[(1,)](torch.zeros(16), got, 3, BLOCK=16)
    assert got.tolist() == [0.0] * 3 + [77.0] * 13


@triton.jit
def _bound(source: tl.tensor, low: tl.tensor, high: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    values = tl.load(source + at)
    tl.store(low + at, tl.minimum(values, 1.0))
    tl.store(high + at, tl.maximum(values, 1.0))


def test_of_a_number_and_nan_the_number_is_smaller_and_larger() -> None:
    low, high = torch.zeros(2, 2)
    _bound[(1,)](torch.tensor([math.nan, 3.0]), low, high, BLOCK=2)
    assert low.tolist() == [1.0, 1.0]
    assert high.tolist() == [1.0, 3.0]
