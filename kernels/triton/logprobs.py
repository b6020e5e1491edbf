"""`vllmc::batched_count_greater_than` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllmc.kernels.triton.blocks import row_blocks


def batched_count_greater_than(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """As `vllmc.kernels.logprobs.batched_count_greater_than`.

    A row is counted by several programs: a vocabulary is long, and a batch may be a single row.
    """
    blocks = row_blocks(x.shape[1])
    chunks = triton.cdiv(x.shape[1], blocks.columns)
    counts = torch.empty((x.shape[0], chunks), dtype=torch.int32, device=x.device)
    launch(x, values, counts)
    return counts.sum(dim=1)


def launch(x: torch.Tensor, values: torch.Tensor, counts: torch.Tensor) -> None:
    """Writes to `counts` `[batch, chunks]` (int32) what each chunk of a row counts."""
    batch, width = x.shape
    blocks = row_blocks(width)
    grid = (triton.cdiv(batch, blocks.rows), triton.cdiv(width, blocks.columns))
    _count_kernel[grid](
        x,
        values.reshape(batch),
        counts,
        batch,
        width,
        *x.stride(),
        values.reshape(batch).stride(0),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )


@triton.jit
def _count_kernel(
    x: tl.tensor,
    values: tl.tensor,
    counts: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    row_stride: tl.tensor,
    column_stride: tl.tensor,
    value_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    column = (chunk * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    mask = (row < batch)[:, None] & (column < width)
    elements = tl.load(x + row[:, None] * row_stride + column * column_stride, mask=mask, other=0)
    value = tl.load(values + row * value_stride, mask=row < batch, other=0)[:, None]
    if elements.dtype == tl.bfloat16 or elements.dtype == tl.float16:
        # Every number of them is one of float32 too, which all GPUs compare.
        elements, value = elements.to(tl.float32), value.to(tl.float32)
    found = tl.sum(((elements >= value) & mask).to(tl.int32), axis=1)
    tl.store(counts + row * tl.num_programs(1) + chunk, found, mask=row < batch)
