"""Rotary position embedding of queries and keys.

After Su et al., "RoFormer" (arXiv:2104.09864): pairs of a head's elements are rotated by angles
that grow with the position.
"""

from __future__ import annotations

import torch

from vllmc.kernels.library import define_op
from vllmc.kernels.quant import empty_dense


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` and `key` with the first R elements of each head rotated, the others as they are.

    `query` is `[1, T, Hq, D]`, `key` `[1, T, Hkv, D]`, of any floating dtypes up to float32 and any
    strides; `cos` and `sin` are `[1, T, R]`, of any floating dtype and any strides, with R even and
    at most D. Element i is rotated with i + R/2 (GPT-NeoX), or with `interleaved` element 2i with
    2i + 1 (GPT-J): of a pair (a, b) at i and j `a * cos[i] - b * sin[i]` and
    `b * cos[j] + a * sin[j]`, computed in float32 and rounded once. The results are contiguous, of
    the same shapes and dtypes; there may be no tokens. Nothing is mutated.
    """
    wide_cos, wide_sin = cos.to(torch.float32)[:, :, None], sin.to(torch.float32)[:, :, None]
    return (
        _rotated(query, wide_cos, wide_sin, interleaved),
        _rotated(key, wide_cos, wide_sin, interleaved),
    )


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """`x` `[1, T, H, D]` rotated, with `cos` and `sin` `[1, T, 1, R]` (float32)."""
    rotary = cos.shape[-1]
    even, odd = _pairs(rotary, interleaved)
    wide = x[..., :rotary].to(torch.float32)
    rotated = wide * cos
    rotated[..., even].addcmul_(wide[..., odd], sin[..., even], value=-1)
    rotated[..., odd].addcmul_(wide[..., even], sin[..., odd])
    if rotary < x.shape[-1]:
        out = empty_dense(x)
        out[..., :rotary] = rotated
        out[..., rotary:] = x[..., rotary:]
        return out
    return rotated.to(x.dtype).contiguous()


def _pairs(rotary: int, interleaved: bool) -> tuple[slice, slice]:
    """Where the first elements of the pairs are, and where the second."""
    if interleaved:
        return slice(0, rotary, 2), slice(1, rotary, 2)
    return slice(0, rotary // 2), slice(rotary // 2, rotary)


define_op(
    "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved=False) "
    "-> (Tensor, Tensor)",
    cpu=rotary_embedding,
    fake=lambda query, key, *_: (empty_dense(query), empty_dense(key)),
    cuda="vllmc.kernels.triton.rotary:rotary_embedding",
)
