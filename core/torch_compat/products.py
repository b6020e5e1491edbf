"""Products of quantised matrices, for which torch has no public name."""

from __future__ import annotations

import torch

# The first compute capability with fp8 in its matrix units.
_FP8_CAPABILITY = (8, 9)


def has_fp8_products(device: torch.device) -> bool:
    """Whether the hardware of `device` multiplies matrices of fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def fp8_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`[M, K]` (row-major) by `[K, N]` (column-major), with a scale for each: `[M, N]`.

    K and N are multiples of 16.
    """
    return torch._scaled_mm(
        a, b, scale_a=scales[0], scale_b=scales[1], bias=bias, out_dtype=out_dtype
    )


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`[M, K]` by `[K, N]`, both int8: `[M, N]` (int32). On a CPU it is wrong for a K of 1."""
    return torch._int_mm(a, b)
