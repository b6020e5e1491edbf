"""`vllmc::scaled_mm` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllmc.core.torch_compat.products import fp8_product, has_fp8_products
from vllmc.kernels import matmul as plain
from vllmc.kernels.quant import require_quant_dtype
from vllmc.kernels.triton.blocks import as_rows, product_blocks


def scaled_mm(
    a: torch.Tensor,
    weight: torch.Tensor,
    a_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As `vllmc.kernels.matmul.scaled_mm`.

    By torch's own products where these take the shapes, else by a kernel; fp8 is computed in
    float32 where the GPU has no fp8.
    """
    require_quant_dtype(a.dtype)
    rows = as_rows(a)
    (count, depth), width = rows.shape, weight.shape[0]
    shape = (*a.shape[:-1], width)
    scales = (a_scale, weight_scale)
    if a.dtype is torch.int8:
        # The limits of cuBLASLt's product.
        torch_takes_it = count > 16 and depth % 8 == 0 and width % 8 == 0
    else:
        torch_takes_it = not has_fp8_products(a.device)
        if not torch_takes_it and count and depth % 16 == 0 and width % 16 == 0:
            return _fp8(rows, weight, scales, bias, out_dtype).view(shape)
    if torch_takes_it:
        return plain.scaled_mm(a, weight, a_scale, weight_scale, bias, out_dtype)
    out = torch.empty(shape, dtype=out_dtype, device=a.device)
    launch(rows, weight, scales, bias, out=out)
    return out


def _fp8(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if bias is not None and out_dtype is torch.float32:
        # torch adds no bias to a result in float32.
        return fp8_product(rows, weight.t(), scales, None, out_dtype).add_(bias)
    return fp8_product(rows, weight.t(), scales, bias, out_dtype)


def launch(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    *,
    out: torch.Tensor,
) -> None:
    """Writes the product of `rows` `[M, K]` and `weight` `[N, K]` to `out` `[..., N]`."""
    (count, depth), width = rows.shape, weight.shape[0]
    if out.numel() == 0:
        return
    blocks = product_blocks(count)
    _product_kernel[(triton.cdiv(count, blocks.m), triton.cdiv(width, blocks.n))](
        rows,
        weight,
        *scales,
        bias,
        out,
        count,
        width,
        depth,
        rows.stride(0),
        *weight.stride(),
        M=blocks.m,
        N=blocks.n,
        K=blocks.k,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


@triton.jit(do_not_specialize=["count"])
def _product_kernel(
    rows: tl.tensor,
    weight: tl.tensor,
    a_scale: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    depth: tl.tensor,
    row_stride: tl.tensor,
    weight_row: tl.tensor,
    weight_column: tl.tensor,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * N + tl.arange(0, N)).to(tl.int64)[None, :]
    k = tl.arange(0, K)
    whole: tl.constexpr = rows.dtype.element_ty == tl.int8
    total = tl.zeros((M, N), dtype=tl.int32 if whole else tl.float32)
    for start in range(0, depth, K):
        at = start + k
        a = tl.load(
            rows + row * row_stride + at[None, :],
            mask=(row < count) & (at < depth)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight + column * weight_row + (at * weight_column)[:, None],
            mask=(column < width) & (at < depth)[:, None],
            other=0.0,
        )
        if whole:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            # Every number of fp8 is one of float16 too, and the products are summed in float32.
            total = tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    result = total.to(tl.float32) * (tl.load(a_scale) * tl.load(weight_scale))
    if bias is not None:
        result += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    mask = (row < count) & (column < width)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=mask)
