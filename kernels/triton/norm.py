"""The ops of `vllmc.kernels.norm` on a GPU."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from vllmc.kernels.quant import empty_dense, empty_quantized
from vllmc.kernels.triton.blocks import as_rows, row_blocks
from vllmc.kernels.triton.elements import emit, quantize_dynamic, storable


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> torch.Tensor:
    """As `vllmc.kernels.norm.rms_norm`."""
    out = empty_dense(x)
    launch(x, weight, eps, weight_offset, out=out)
    return out


def fused_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.norm.fused_add_rms_norm`."""
    out, total = empty_dense(x), empty_dense(x)
    launch(x, weight, eps, weight_offset, residual=residual, total=total, out=out)
    return out, total


def rms_norm_static_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `vllmc.kernels.norm.rms_norm_static_quant`."""
    out = empty_quantized(x, dtype)
    launch(x, weight, eps, weight_offset, out=out, scale=scale)
    return out


def rms_norm_dynamic_quant(
    x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.norm.rms_norm_dynamic_quant`."""
    run = partial(launch, x, weight, eps, weight_offset)
    return quantize_dynamic(x, dtype, run, run)


def fused_add_rms_norm_static_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.norm.fused_add_rms_norm_static_quant`."""
    out, total = empty_quantized(x, dtype), empty_dense(x)
    launch(x, weight, eps, weight_offset, residual=residual, total=total, out=out, scale=scale)
    return out, total


def fused_add_rms_norm_dynamic_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.norm.fused_add_rms_norm_dynamic_quant`."""
    total = empty_dense(x)
    find = partial(launch, x, weight, eps, weight_offset, residual=residual, total=total)
    write = partial(launch, total, weight, eps, weight_offset)
    return *quantize_dynamic(x, dtype, find, write), total


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    weight_offset: float,
    *,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> None:
    """Writes `out`, quantised where there is a `scale`, or keeps in `amax` the largest.

    With a `residual` the sum that is normed is written to `total`. See `elements.emit`.
    """
    rows = as_rows(x)
    others = rows if residual is None else as_rows(residual)
    count, width = rows.shape
    if count == 0:
        return
    blocks = row_blocks(width)
    _norm_kernel[(triton.cdiv(count, blocks.rows),)](
        rows,
        None if residual is None else others,
        weight.contiguous(),
        total,
        None if out is None else storable(out),
        scale,
        amax,
        count,
        rows.stride(0),
        others.stride(0),
        eps,
        weight_offset,
        WIDTH=width,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )


@triton.jit
def _norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    amax: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    weight_offset: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    if WIDTH <= COLUMNS:
        # The rows are read once and stay in registers.
        mask = (row < count) & (column < WIDTH)
        wide = _summed(x, residual, row, column, stride, residual_stride, mask)
        if residual is not None:
            tl.store(total + row * WIDTH + column, wide.to(x.dtype.element_ty), mask=mask)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)[:, None]
        gain = weight_offset + tl.load(weight + column, mask=column < WIDTH, other=0.0).to(
            tl.float32
        )
        values = (wide * factor * gain).to(x.dtype.element_ty)
        emit(values, row * WIDTH + column, mask, out, scale, amax)
    else:
        squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, WIDTH, COLUMNS):
            at = start + column
            mask = (row < count) & (at < WIDTH)
            wide = _summed(x, residual, row, at, stride, residual_stride, mask)
            squares += wide * wide
        factor = tl.rsqrt(tl.sum(squares, axis=1) / WIDTH + eps)[:, None]
        for start in range(0, WIDTH, COLUMNS):
            at = start + column
            mask = (row < count) & (at < WIDTH)
            wide = _summed(x, residual, row, at, stride, residual_stride, mask)
            if residual is not None:
                tl.store(total + row * WIDTH + at, wide.to(x.dtype.element_ty), mask=mask)
            gain = weight_offset + tl.load(weight + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            values = (wide * factor * gain).to(x.dtype.element_ty)
            emit(values, row * WIDTH + at, mask, out, scale, amax)


@triton.jit
def _summed(
    x: tl.tensor,
    residual: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    stride: tl.tensor,
    residual_stride: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """A tile of what is normed, in float32: with a residual the sum, rounded to the dtype."""
    values = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        others = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        values = (values + others.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    return values
