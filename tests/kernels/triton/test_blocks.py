"""How kernels are cut into blocks: whatever the shape, tiles that Triton and a GPU take."""

from __future__ import annotations

import pytest
import torch

from vllmc.kernels.triton.blocks import (
    as_rows,
    head_blocks,
    power_of_two,
    product_blocks,
    row_blocks,
)


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def test_the_next_power_of_two() -> None:
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 4096, 4097)] == [1, 2, 4, 4, 8, 4096, 8192]


@pytest.mark.parametrize("largest", [4096, 8192])
def test_tiles_of_rows_are_neither_too_small_nor_too_large(largest: int) -> None:
    for width in (*range(1, 300), 1000, 1024, 4096, 5120, 8192, 11008, 28672, 128256):
        blocks = row_blocks(width, largest=largest)
        tile = blocks.rows * blocks.columns
        assert all(map(is_power_of_two, (blocks.rows, blocks.columns, blocks.warps)))
        assert 1024 <= tile <= largest
        assert blocks.columns >= min(width, largest)
        assert blocks.rows == 1 or tile == 1024
        assert 1 <= blocks.warps <= 16
        assert tile == 512 * blocks.warps


def test_tiles_of_heads_hold_whole_heads() -> None:
    for size in (2, 64, 80, 96, 128, 256, 512):
        for heads in (1, 2, 3, 8, 32, 40, 71, 128):
            blocks = head_blocks(size, heads)
            assert all(map(is_power_of_two, (blocks.rows, blocks.columns, blocks.warps)))
            assert blocks.columns >= size
            assert blocks.rows * blocks.columns <= 4096
            assert blocks.rows < 2 * heads
            assert 1 <= blocks.warps <= 16


def test_tiles_of_products_are_what_matrix_units_take() -> None:
    for rows in (1, 16, 17, 4096):
        blocks = product_blocks(rows)
        assert all(map(is_power_of_two, (blocks.m, blocks.n, blocks.k, blocks.warps)))
        assert min(blocks.m, blocks.n) >= 16
        assert blocks.k >= 32  # Of int8; fp8 is multiplied as float16.
        # Bytes of float16 that are kept for the steps under way, within an A100's 163 KiB.
        assert blocks.stages * (blocks.m + blocks.n) * blocks.k * 2 <= 163 * 1024


def test_rows_are_a_view_where_neighbours_are_side_by_side() -> None:
    x = torch.randn(4, 3, 10)
    for view, shape in (
        (x, (12, 10)),
        (x[..., 2:8], (12, 6)),
        (x[:, 1], (4, 10)),
        (x[0, 0], (1, 10)),
    ):
        rows = as_rows(view)
        assert rows.shape == shape
        assert rows.data_ptr() == view.data_ptr()
        assert torch.equal(rows.flatten(), view.flatten())


def test_rows_are_a_copy_where_they_are_not() -> None:
    x = torch.randn(4, 3, 10)
    for view in (x[..., ::2], x.transpose(0, 2), x.transpose(0, 1)):
        rows = as_rows(view)
        assert rows.stride(1) == 1
        assert torch.equal(rows.flatten(), view.flatten())


def test_there_may_be_no_rows_and_no_dimensions() -> None:
    assert as_rows(torch.empty(0, 3, 5)).shape == (0, 5)
    assert as_rows(torch.empty(3, 0)).shape == (3, 0)
    assert as_rows(torch.tensor(1.0)).shape == (1, 1)
