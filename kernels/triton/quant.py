"""The ops of `vllmc.kernels.quant` on a GPU."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from vllmc.kernels.quant import empty_quantized
from vllmc.kernels.triton.blocks import as_rows, row_blocks
from vllmc.kernels.triton.elements import emit, quantize_dynamic, storable


def static_scaled_quant(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `vllmc.kernels.quant.static_scaled_quant`."""
    out = empty_quantized(x, dtype)
    launch(x, out=out, scale=scale)
    return out


def dynamic_scaled_quant(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.quant.dynamic_scaled_quant`."""
    run = partial(launch, x)
    return quantize_dynamic(x, dtype, run, run)


def launch(
    x: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> None:
    """Writes `out` by `scale`, or keeps in `amax` the largest: see `elements.emit`."""
    rows = as_rows(x)
    if rows.numel() == 0:
        return
    count, width = rows.shape
    blocks = row_blocks(width, largest=4096)
    grid = (triton.cdiv(count, blocks.rows), triton.cdiv(width, blocks.columns))
    _quant_kernel[grid](
        rows,
        None if out is None else storable(out),
        scale,
        amax,
        count,
        width,
        rows.stride(0),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )


@triton.jit
def _quant_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    amax: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count) & (column < width)
    values = tl.load(x + row * stride + column, mask=mask, other=0.0)
    emit(values, row * width + column, mask, out, scale, amax)
