"""The kernel that counts greater elements, against counting them one by one."""

from __future__ import annotations

import math

import torch
from kernel_cases import FLOATING, draws

from vllmc.kernels.triton import logprobs

DTYPES = (*FLOATING, torch.float64, torch.int32, torch.int64)


def test_a_count_is_exact_for_any_shape_stride_and_dtype() -> None:
    for draw in draws(200):
        batch, width = 1 + draw.below(9), draw.one_of((1, 2, 31, 97, 128, 700, 8192, 8200))
        # Few distinct values, so that rows are full of ties.
        x = (draw.tensor((batch, width + 3), torch.float32, "dense") * 4).round()
        x = draw.one_of((x[:, 3:], x.t().contiguous().t()[:, 3:], x.repeat(1, 2)[:, 6::2]))
        x = x.to(draw.one_of(DTYPES))
        values = x.gather(1, torch.randint(width, (batch, 1), generator=draw.generator))
        got = logprobs.batched_count_greater_than(x, values)
        pairs = zip(x.tolist(), values.flatten().tolist(), strict=True)
        expected = [sum(element >= value for element in row) for row, value in pairs]
        assert got.dtype is torch.int64
        assert got.tolist() == expected


def test_every_part_of_a_row_is_written() -> None:
    counts = torch.full((3, 2), -7, dtype=torch.int32)
    logprobs.launch(torch.zeros(3, 9000), torch.zeros(3, 1), counts)
    assert counts.tolist() == [[8192, 808]] * 3


def test_a_nan_is_neither_greater_nor_equal() -> None:
    x = torch.tensor([[math.nan, 1.0, math.inf, -math.inf]])
    for value, count in ((1.0, 2), (math.nan, 0), (-math.inf, 3)):
        got = logprobs.batched_count_greater_than(x, torch.tensor([[value]]))
        assert got.tolist() == [count]
