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
    first = slice(0, None, 2) if interleaved else slice(0, cos.shape[-1] // 2)
    signed = sin.to(torch.float32, copy=True)
    signed[..., first].neg_()
    factors = (cos.to(torch.float32).unsqueeze(2), signed.unsqueeze(2))
    return _rotated(query, factors, interleaved), _rotated(key, factors, interleaved)


def _rotated(
    x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], interleaved: bool
) -> torch.Tensor:
    """`x` `[1, T, H, D]`, by `factors` `[1, T, 1, R]` of each element and of its partner."""
    own, others = factors
    rotary, size = own.shape[-1], x.shape[-1]
    wide = (x if rotary == size else x[..., :rotary]).to(torch.float32)
    if interleaved:
        partners = wide.unflatten(-1, (rotary // 2, 2)).flip(-1).flatten(-2)
    else:
        partners = wide.roll(rotary // 2, -1)
    rotated = (wide * own).addcmul_(partners, others)
    if rotary == size:
        return rotated.to(x.dtype).contiguous()
    out = empty_dense(x)
    out[..., :rotary] = rotated
    out[..., rotary:] = x[..., rotary:]
    return out


define_op(
    "rotary_embedding(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved=False) "
    "-> (Tensor, Tensor)",
    cpu=rotary_embedding,
    fake=lambda query, key, *_: (empty_dense(query), empty_dense(key)),
    cuda="vllmc.kernels.triton.rotary:rotary_embedding",
)
