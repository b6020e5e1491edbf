"""The ops of `vllmc.kernels.activation` on a GPU."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from vllmc.kernels.quant import empty_dense, empty_quantized
from vllmc.kernels.triton.blocks import as_rows, row_blocks
from vllmc.kernels.triton.elements import emit, quantize_dynamic, storable

# `gelu_and_mul`'s `approximate`, as the kernel's activation.
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `vllmc.kernels.activation.silu_and_mul`."""
    return _plain(gate, up, "silu")


def gelu_and_mul(gate: torch.Tensor, up: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """As `vllmc.kernels.activation.gelu_and_mul`."""
    return _plain(gate, up, _GELU[approximate])


def silu_and_mul_static_quant(
    gate: torch.Tensor, up: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """As `vllmc.kernels.activation.silu_and_mul_static_quant`."""
    return _static(gate, up, "silu", scale, dtype)


def silu_and_mul_dynamic_quant(
    gate: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.activation.silu_and_mul_dynamic_quant`."""
    return _dynamic(gate, up, "silu", dtype)


def gelu_and_mul_static_quant(
    gate: torch.Tensor,
    up: torch.Tensor,
    approximate: str,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `vllmc.kernels.activation.gelu_and_mul_static_quant`."""
    return _static(gate, up, _GELU[approximate], scale, dtype)


def gelu_and_mul_dynamic_quant(
    gate: torch.Tensor, up: torch.Tensor, approximate: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.activation.gelu_and_mul_dynamic_quant`."""
    return _dynamic(gate, up, _GELU[approximate], dtype)


def _plain(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    out = empty_dense(gate)
    launch(gate, up, activation, out=out)
    return out


def _static(
    gate: torch.Tensor, up: torch.Tensor, activation: str, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    out = empty_quantized(gate, dtype)
    launch(gate, up, activation, out=out, scale=scale)
    return out


def _dynamic(
    gate: torch.Tensor, up: torch.Tensor, activation: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    run = partial(launch, gate, up, activation)
    return quantize_dynamic(gate, dtype, run, run)


def launch(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    *,
    out: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> None:
    """Writes `out`, quantised where there is a `scale`, or keeps in `amax` the largest.

    `activation` is "silu", "gelu" or "gelu_tanh"; for the rest see `elements.emit`.
    """
    gates, ups = as_rows(gate), as_rows(up)
    if gates.numel() == 0:
        return
    count, width = gates.shape
    blocks = row_blocks(width, largest=4096)
    grid = (triton.cdiv(count, blocks.rows), triton.cdiv(width, blocks.columns))
    _activation_kernel[grid](
        gates,
        ups,
        None if out is None else storable(out),
        scale,
        amax,
        count,
        width,
        gates.stride(0),
        ups.stride(0),
        ACTIVATION=activation,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )


@triton.jit
def _activation_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    amax: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (row < count) & (column < width)
    a = tl.load(gate + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    values = (_activated(a, ACTIVATION) * b).to(gate.dtype.element_ty)
    emit(values, row * width + column, mask, out, scale, amax)


@triton.jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # (1 + tanh(z)) / 2 is sigmoid(2 z), where z is sqrt(2 / pi) * (x + 0.044715 x**3).
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
