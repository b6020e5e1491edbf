"""Per-tensor quantisation, to fp8 (e4m3) or int8.

A quantised tensor q stands for `scale * q`, where `scale` `[1]` (float32) is one number. What lies
beyond the type's reach is given its nearest value; a value between two goes to the nearest, of two
as near to the even one. The formats are those of "FP8 Formats for Deep Learning" (Micikevicius et
al., arXiv:2209.05433), which has no infinity, and of two's complement.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels.library import define_op

LARGEST: Final = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The types to quantise to, and the largest number of each that is used."""

SMALLEST_AMAX: Final = 1e-12
"""What the largest element is taken for where it is smaller: a tensor of zeros has a scale too."""


def static_scaled_quant(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` divided by a scale that is known beforehand, as `dtype`.

    `x` is a floating tensor of any shape, `scale` `[1]` (float32), `dtype` `float8_e4m3fn` or
    `int8`. The result is contiguous, of `x`'s shape. NaN stays NaN in fp8, and is 0 in int8.

    Raises `VllmcError` (`bad-quant-dtype`).
    """
    return quantized(x, scale, require_quant_dtype(dtype))


def dynamic_scaled_quant(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` as `dtype`, and the scale `[1]` (float32) by which its largest element is the type's.

    As `static_scaled_quant` otherwise. An `x` with a NaN or an infinity has such a scale, and a
    result that means nothing.
    """
    scale = scale_of(x, require_quant_dtype(dtype))
    return quantized(x, scale, dtype), scale


def scale_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale `[1]` (float32) by which the largest element of `x` is the largest of `dtype`."""
    if x.numel() == 0:
        amax = torch.zeros(1, dtype=torch.float32, device=x.device)
    else:
        amax = x.abs().amax().to(torch.float32).view(1)
    return amax.clamp_(min=SMALLEST_AMAX) / LARGEST[dtype]


def quantized(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x / scale` in `dtype`, contiguous."""
    wide, divisor = x.to(torch.float32), scale.view(())
    return _rounded(wide / divisor if wide is x else wide.div_(divisor), dtype).contiguous()


def quantized_blocks(blocks: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`blocks` `[..., n]` in `dtype`, and a scale `[...]` for each, as `scale_of` has it of all."""
    amax = blocks.abs().amax(dim=-1).to(torch.float32)
    scales = amax.clamp_(min=SMALLEST_AMAX) / LARGEST[dtype]
    return _rounded(blocks.to(torch.float32) / scales.unsqueeze(-1), dtype), scales


def _rounded(scaled: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scaled`, which is overwritten, in `dtype`."""
    largest = LARGEST[dtype]
    if dtype is torch.int8:
        scaled = scaled.nan_to_num_(nan=0.0).round_()
    return scaled.clamp_(-largest, largest).to(dtype)


def require_quant_dtype(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, where it can be quantised to. Raises `VllmcError` (`bad-quant-dtype`)."""
    if dtype not in LARGEST:
        raise VllmcError(
            "bad-quant-dtype",
            f"{dtype} is no type to quantise to",
            context={"dtype": str(dtype)},
            hint=f"take one of {', '.join(map(str, LARGEST))}",
        )
    return dtype


def empty_dense(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor like `x`, or of `dtype`, with nothing written to it yet."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_quantized(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `empty_dense`, of a type to quantise to. Raises `VllmcError` (`bad-quant-dtype`)."""
    return empty_dense(x, require_quant_dtype(dtype))


def empty_scale(x: torch.Tensor) -> torch.Tensor:
    """A scale on the device of `x`, with nothing written to it yet."""
    return torch.empty(1, dtype=torch.float32, device=x.device)


def fake_dense(x: torch.Tensor, *_: object) -> torch.Tensor:
    """The fake of an op whose result is like its first argument."""
    return empty_dense(x)


def fake_static(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The fake of an op whose result is like its first argument, of its last, a dtype."""
    return empty_quantized(x, rest[-1])


def fake_dynamic(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fake_static`, for an op that returns the scale too."""
    return empty_quantized(x, rest[-1]), empty_scale(x)


define_op(
    "static_scaled_quant(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    cpu=static_scaled_quant,
    fake=fake_static,
    cuda="vllmc.kernels.triton.quant:static_scaled_quant",
)
define_op(
    "dynamic_scaled_quant(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    cpu=dynamic_scaled_quant,
    fake=fake_dynamic,
    cuda="vllmc.kernels.triton.quant:dynamic_scaled_quant",
)
