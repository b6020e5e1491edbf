"""What the kernels share: how rounded numbers are written, quantised, or their largest kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vllmc.core.torch_compat.products import has_fp8_products
from vllmc.kernels.quant import LARGEST, SMALLEST_AMAX, empty_quantized


@triton.jit
def emit(
    values: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    amax: tl.tensor,
) -> None:
    """Does one of three things with `values`, a tile that is rounded to its dtype already.

    With `amax` (int32, the bits of a float32) the largest absolute value is kept there, and no
    more; else with `scale` the quantised values are written to `out`, else the values themselves.
    What is not asked for is None. Where to write says `at`, what there is of the tile `mask`.
    """
    if amax is not None:
        # As integers the bits of positive floats have the floats' order, and a NaN is the largest.
        bits = tl.abs(values.to(tl.float32)).to(tl.int32, bitcast=True)
        tl.atomic_max(amax, tl.max(tl.where(mask, bits, 0)), sem="relaxed")
    elif scale is not None:
        scaled = tl.div_rn(values.to(tl.float32), tl.load(scale))
        tl.store(out + at, quantized(scaled, out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + at, values, mask=mask)


@triton.jit
def quantized(scaled: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`scaled` (float32) as `dtype`: int8, float8e4nv, or uint8 for the bits of the latter."""
    if dtype == tl.int8:
        clamped = tl.clamp(tl.where(scaled == scaled, scaled, 0.0), -127.0, 127.0)
        # 1.5 * 2**23: what is added to it is rounded to a whole number, half to even.
        return (clamped + 12582912.0 - 12582912.0).to(tl.int8)
    clamped = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    if dtype == tl.uint8:
        return e4m3_bits(clamped)
    return clamped.to(dtype)


@triton.jit
def e4m3_bits(values: tl.tensor) -> tl.tensor:
    """The bits of float32 numbers of up to 448 as e4m3, for hardware that has no such type."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Rounded to 3 bits of mantissa, half to even; then the exponent's bias is 7, not 127.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 it is a multiple of 2**-9, the last place of 2**14 (whose bits are taken off).
    small = (tl.abs(values) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), small, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (((bits >> 24) & 0x80) | code).to(tl.uint8)


def storable(out: torch.Tensor) -> torch.Tensor:
    """`out` as kernels are given it: as bytes where the GPU has no fp8."""
    if out.dtype is torch.float8_e4m3fn and out.is_cuda and not has_fp8_products(out.device):
        return out.view(torch.uint8)
    return out


def quantize_dynamic(
    x: torch.Tensor, dtype: torch.dtype, find: Callable[..., None], write: Callable[..., None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A quantised tensor like `x` and its scale, of numbers that are computed twice, never stored.

    `find` is called with `amax` to keep the largest, then `write` with `out` and `scale`, as `emit`
    takes them.
    """
    out = empty_quantized(x, dtype)
    amax = torch.full((1,), SMALLEST_AMAX, dtype=torch.float32, device=x.device)
    find(amax=amax.view(torch.int32))
    scale = amax / LARGEST[dtype]
    write(out=out, scale=scale)
    return out, scale
