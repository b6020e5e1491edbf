"""`vllmc::rotary_embedding` on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllmc.kernels.quant import empty_dense
from vllmc.kernels.triton.blocks import head_blocks


def rotary_embedding(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `vllmc.kernels.rotary.rotary_embedding`."""
    out_query, out_key = empty_dense(query), empty_dense(key)
    launch(query, key, cos, sin, interleaved, out_query=out_query, out_key=out_key)
    return out_query, out_key


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    *,
    out_query: torch.Tensor,
    out_key: torch.Tensor,
) -> None:
    """Writes the rotated `query` and `key`: one program for each token and block of heads."""
    _, tokens, query_heads, size = query.shape
    key_heads = key.shape[2]
    if tokens == 0:
        return
    blocks = head_blocks(size, query_heads)
    query_blocks = triton.cdiv(query_heads, blocks.rows)
    grid = (tokens, query_blocks + triton.cdiv(key_heads, blocks.rows))
    _rotary_kernel[grid](
        query,
        key,
        cos,
        sin,
        out_query,
        out_key,
        query_heads,
        key_heads,
        query_blocks,
        *query.stride()[1:],
        *key.stride()[1:],
        *cos.stride()[1:],
        *sin.stride()[1:],
        INTERLEAVED=interleaved,
        ROTARY=cos.shape[-1],
        SIZE=size,
        HEADS=blocks.rows,
        COLUMNS=blocks.columns,
        num_warps=blocks.warps,
    )


@triton.jit
def _rotary_kernel(
    query: tl.tensor,
    key: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    out_query: tl.tensor,
    out_key: tl.tensor,
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    query_blocks: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    query_element: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    key_element: tl.tensor,
    cos_token: tl.tensor,
    cos_element: tl.tensor,
    sin_token: tl.tensor,
    sin_element: tl.tensor,
    INTERLEAVED: tl.constexpr,
    ROTARY: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    turned = column < ROTARY
    c = tl.load(cos + token * cos_token + column * cos_element, mask=turned, other=1.0)
    s = tl.load(sin + token * sin_token + column * sin_element, mask=turned, other=0.0)
    c, s = c.to(tl.float32)[None, :], s.to(tl.float32)[None, :]
    if INTERLEAVED:
        partner = column ^ 1
        first = column % 2 == 0
    else:
        partner = tl.where(column < ROTARY // 2, column + ROTARY // 2, column - ROTARY // 2)
        first = column < ROTARY // 2
    s = tl.where(first[None, :], -s, s)
    head = tl.arange(0, HEADS)[:, None]
    if block < query_blocks:
        head += block * HEADS
        at = query + token * query_token + head * query_head
        mask = (head < query_heads) & (column < SIZE)[None, :]
        values = _rotated(at, column, partner, query_element, turned, mask, c, s)
        to = (token * query_heads + head) * SIZE + column[None, :]
        tl.store(out_query + to, values, mask=mask)
    else:
        head += (block - query_blocks) * HEADS
        at = key + token * key_token + head * key_head
        mask = (head < key_heads) & (column < SIZE)[None, :]
        values = _rotated(at, column, partner, key_element, turned, mask, c, s)
        to = (token * key_heads + head) * SIZE + column[None, :]
        tl.store(out_key + to, values, mask=mask)


@triton.jit
def _rotated(
    at: tl.tensor,
    column: tl.tensor,
    partner: tl.tensor,
    stride: tl.tensor,
    turned: tl.tensor,
    mask: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
) -> tl.tensor:
    """Heads that begin at `at`, rotated where `turned`; `s` has the sign of the pair's element."""
    own = tl.load(at + (column * stride)[None, :], mask=mask, other=0.0)
    others = tl.load(at + (partner * stride)[None, :], mask=mask & turned[None, :], other=0.0)
    rotated = own.to(tl.float32) * c + others.to(tl.float32) * s
    return tl.where(turned[None, :], rotated.to(own.dtype), own)
