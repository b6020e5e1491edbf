"""`vllmc::scaled_mm`: the product of two quantised matrices."""

from __future__ import annotations

from typing import Any

import torch

from vllmc.core.torch_compat.products import int8_product
from vllmc.kernels.library import define_op
from vllmc.kernels.quant import require_quant_dtype


def scaled_mm(
    a: torch.Tensor,
    weight: torch.Tensor,
    a_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`(a_scale * a) @ (weight_scale * weight).T + bias`, in `out_dtype`.

    `a` is `[..., K]` and `weight` `[N, K]`, both of one of `quant.LARGEST`; the scales are `[1]`
    (float32), `bias` `[N]` in `out_dtype`, a floating type. The result is `[..., N]`, contiguous.
    Products of int8 are summed as int32, those of fp8 as float32. Nothing is mutated.

    Raises `VllmcError` (`bad-quant-dtype`).
    """
    require_quant_dtype(a.dtype)
    rows = a.reshape(-1, a.shape[-1])
    if a.dtype is torch.int8 and a.shape[-1] > 1:
        product = int8_product(rows, weight.t()).to(torch.float32)
    else:
        product = rows.to(torch.float32) @ weight.to(torch.float32).t()
    product *= a_scale * weight_scale
    if bias is not None:
        product += bias
    return product.to(out_dtype).view(*a.shape[:-1], weight.shape[0])


def _fake(a: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    require_quant_dtype(a.dtype)
    return torch.empty((*a.shape[:-1], weight.shape[0]), dtype=rest[-1], device=a.device)


define_op(
    "scaled_mm(Tensor a, Tensor weight, Tensor a_scale, Tensor weight_scale, Tensor? bias, "
    "ScalarType out_dtype) -> Tensor",
    cpu=scaled_mm,
    fake=_fake,
    cuda="vllmc.kernels.triton.matmul:scaled_mm",
)
