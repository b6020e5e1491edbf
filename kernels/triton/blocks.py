"""How the work of a kernel is cut into blocks: plain functions of its shapes.

Nothing is tuned at run time: trying candidates would cost seconds per kernel and shape at a cold
start, and choose differently from one start to the next. Blocks hang on what a model fixes (widths,
heads), hardly on the number of tokens, so that a kernel is compiled once per model, not per batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

# What one program holds at a time: 16 numbers a thread, for the most warps that are used.
_LARGEST_TILE: Final = 8192
_NUMBERS_PER_WARP: Final = 512
# Below it a program takes several rows.
_SMALLEST_TILE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """A program's tile of a matrix, `rows` by `columns` (powers of two), and its warps."""

    rows: int
    columns: int
    warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductBlocks:
    """A program's tile of a product `[M, N]`, `m` by `n`; `k` is what it sums in one step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def row_blocks(width: int, *, largest: int = _LARGEST_TILE) -> RowBlocks:
    """The tile for rows of `width`: whole rows where `largest` numbers hold one, or parts of one.

    Narrow rows (the heads of a norm of queries, say) come several to a program.
    """
    columns = min(power_of_two(width), largest)
    rows = max(1, _SMALLEST_TILE // columns)
    return RowBlocks(rows=rows, columns=columns, warps=_warps(rows * columns))


def head_blocks(size: int, heads: int) -> RowBlocks:
    """The tile for a token's heads, `rows` of them whole: up to 4096 numbers, or one head."""
    columns = power_of_two(size)
    rows = min(power_of_two(heads), max(1, 4096 // columns))
    return RowBlocks(rows=rows, columns=columns, warps=_warps(rows * columns))


def product_blocks(rows: int) -> ProductBlocks:
    """The tile of a product with `rows` rows.

    Up to 16 rows, as in decoding, it is the reading of the weight that takes the time: narrow
    tiles give it to many programs.
    """
    if rows <= 16:
        return ProductBlocks(m=16, n=32, k=128, warps=4, stages=4)
    return ProductBlocks(m=64, n=64, k=64, warps=4, stages=3)


def _warps(numbers: int) -> int:
    return min(16, max(1, numbers // _NUMBERS_PER_WARP))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` `[..., H]` as `[N, H]` with neighbours in a row side by side, copied where it must be."""
    width = x.shape[-1] if x.dim() else 1
    rows = x.reshape(math.prod(x.shape[:-1]), width)
    return rows if width == 1 or rows.stride(1) == 1 else rows.contiguous()
