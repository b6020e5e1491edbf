"""Mixtures of experts on a GPU: two products of rows that are grouped by expert.

Rows (a token and one of its experts) are sorted by expert, and each expert's are cut into blocks.
Which block is whose is worked out on the device: nothing waits for it, and shapes say all that a
launch needs. The products sum in float32, those of float32 operands without TF32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllmc.kernels.experts import Experts
from vllmc.kernels.layer_name import LayerName
from vllmc.kernels.moe import experts_named


def fused_moe(
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    layer_name: LayerName | str,
) -> torch.Tensor:
    """See `vllmc.kernels.moe.fused_moe`; the dtypes are float32, bfloat16 and float16.

    What a token's experts give is added up in the order of `topk_ids`.
    """
    return mixture(experts_named(layer_name), hidden, topk_ids, topk_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The sizes of a kernel's blocks: rows, columns and the step of the sum; and its warps."""

    rows: int
    columns: int
    step: int
    warps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which rows go to which expert. S rows; row r is the token `r // k` and its expert `r % k`.

    `rows` `[S]` are the rows sorted by expert. `block_expert` and `block_start` (one for each
    block) are the expert of each block, E where it is empty, and where among the sorted rows it
    starts; `ends` `[E]` is where each expert's rows end. A block has up to `height` rows; `topk` is
    k.
    """

    rows: torch.Tensor
    block_expert: torch.Tensor
    block_start: torch.Tensor
    ends: torch.Tensor
    height: int
    topk: int


def mixture(
    experts: Experts, hidden: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """What `fused_moe` returns, of these experts."""
    width = experts.up.shape[1]
    inner = hidden.new_empty(topk_ids.numel(), width // 2 if experts.gated_silu else width)
    parts = hidden.new_empty(topk_ids.numel(), hidden.shape[1], dtype=torch.float32)
    return mixture_through(experts, hidden, topk_ids, topk_weights, inner=inner, parts=parts)


def mixture_through(
    experts: Experts,
    hidden: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    inner: torch.Tensor,
    parts: torch.Tensor,
) -> torch.Tensor:
    """As `mixture`, overwriting `inner` (see `multiply_up`) and `parts` (see `multiply_down`)."""
    (tokens, size), topk = hidden.shape, topk_ids.shape[1]
    if tokens:
        count = experts.up.shape[0]
        routing = route(topk_ids, count, height_for(tokens * topk, count, hidden.dtype))
        multiply_up(hidden, experts, routing, out=inner)
        gated = inner if experts.gated_silu else experts.gate(inner)
        multiply_down(gated, experts, topk_weights.reshape(-1), routing, out=parts)
    return parts.view(tokens, topk, size).sum(dim=1).to(hidden.dtype)


def height_for(rows: int, experts: int, dtype: torch.dtype) -> int:
    """How many rows a block has, of `rows` over so many experts: about as many as an expert."""
    each = triton.next_power_of_2(max(1, rows // experts))
    return min(max(each, 16), 64 if dtype == torch.float32 else 128)


def blocks_for(height: int, dtype: torch.dtype, *, gated: bool) -> Blocks:
    """The blocks of a product, or of the two that a gated one is, for blocks of `height` rows.

    What a multiprocessor holds of them stays below 100 KB and 255 registers (for sm_90, by ptxas).
    """
    full = dtype == torch.float32
    return Blocks(
        rows=height,
        columns=128 if height >= 64 and not (gated or full) else 64,
        step=32 if full else 64,
        warps=8 if height >= 64 else 4,
    )


def route(topk_ids: torch.Tensor, experts: int, height: int) -> Routing:
    """Sorts the rows of `topk_ids` `[T, k]` by expert, in blocks of up to `height` rows."""
    flat = topk_ids.reshape(-1).to(torch.int64)
    device = flat.device
    counts = torch.zeros(experts, dtype=torch.int64, device=device)
    # Unlike `bincount`, this need not know the largest beforehand.
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends = counts.cumsum(0)
    blocks = (counts + height - 1) // height
    block_ends = blocks.cumsum(0)
    # Each expert that is hit has at most one block that is not full.
    most = len(flat) // height + min(experts, len(flat))
    numbers = torch.arange(most, device=device)
    block_expert = torch.searchsorted(block_ends, numbers, right=True)
    own = block_expert.clamp(max=experts - 1)
    first = (block_ends - blocks)[own]
    return Routing(
        rows=flat.argsort(stable=True),
        block_expert=block_expert,
        block_start=(ends - counts)[own] + (numbers - first) * height,
        ends=ends,
        height=height,
        topk=topk_ids.shape[1],
    )


def multiply_up(
    hidden: torch.Tensor, experts: Experts, routing: Routing, *, out: torch.Tensor
) -> None:
    """Fills `out` `[S, N]`: sorted rows of `hidden` `[T, H]`, times `up`, plus its bias.

    Where `experts.gated_silu`, with its activation: `[S, I]`, rounded after it only.
    """
    _launch(hidden, experts.up, experts.up_bias, None, routing, out, experts.gated_silu)


def multiply_down(
    inner: torch.Tensor,
    experts: Experts,
    weights: torch.Tensor,
    routing: Routing,
    *,
    out: torch.Tensor,
) -> None:
    """Fills `out` `[S, H]` (float32): sorted rows `[S, I]`, times `down`, plus its bias, weighted.

    `weights` `[S]` and `out` are in the order of the rows before they were sorted.
    """
    _launch(inner, experts.down, experts.down_bias, weights, routing, out, gated=False)


def _launch(
    source: torch.Tensor,
    matrices: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor | None,
    routing: Routing,
    out: torch.Tensor,
    gated: bool,
) -> None:
    columns = out.shape[1]
    blocks = blocks_for(routing.height, source.dtype, gated=gated)
    _grouped_product[(len(routing.block_expert), triton.cdiv(columns, blocks.columns))](
        source,
        matrices,
        source if bias is None else bias,
        source if weights is None else weights,
        out,
        routing.rows,
        routing.block_expert,
        routing.block_start,
        routing.ends,
        len(routing.ends),
        columns,
        source.shape[1],
        routing.topk,
        *source.stride(),
        *matrices.stride(),
        *((0, 0) if bias is None else bias.stride()),
        0 if weights is None else weights.stride(0),
        out.stride(0),
        columns * matrices.stride(1),
        GATED=gated,
        BIASED=bias is not None,
        WEIGHTED=weights is not None,
        BLOCK_ROWS=blocks.rows,
        BLOCK_COLUMNS=blocks.columns,
        BLOCK_STEP=blocks.step,
        num_warps=blocks.warps,
    )


@triton.jit
def _grouped_product(
    source: tl.tensor,
    matrices: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    sorted_rows: tl.tensor,
    block_expert: tl.tensor,
    block_start: tl.tensor,
    ends: tl.tensor,
    experts: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    topk: tl.tensor,
    source_row: tl.tensor,
    source_column: tl.tensor,
    matrix_expert: tl.tensor,
    matrix_row: tl.tensor,
    matrix_column: tl.tensor,
    bias_expert: tl.tensor,
    bias_column: tl.tensor,
    weight_stride: tl.tensor,
    out_row: tl.tensor,
    half: tl.tensor,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
) -> None:
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert >= experts:
        return
    places = tl.load(block_start + block) + tl.arange(0, BLOCK_ROWS)
    there = places < tl.load(ends + expert)
    rows = tl.load(sorted_rows + places, mask=there, other=0)
    # The first product reads tokens and writes sorted rows, the second does the reverse.
    if WEIGHTED:
        read, write = places, rows
    else:
        read, write = rows // topk, places
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    held = column < columns
    wide = column.to(tl.int64)
    step = tl.arange(0, BLOCK_STEP)
    left = source + read[:, None] * source_row + step[None, :] * source_column
    right = (
        matrices
        + expert * matrix_expert
        + wide[None, :] * matrix_row
        + step[:, None] * matrix_column
    )
    first = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    second = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for begin in range(0, depth, BLOCK_STEP):
        inside = begin + step < depth
        x = tl.load(left, mask=there[:, None] & inside[None, :], other=0.0)
        filled = inside[:, None] & held[None, :]
        y = tl.load(right, mask=filled, other=0.0)
        first = tl.dot(x, y, first, input_precision="ieee")
        if GATED:
            z = tl.load(right + half, mask=filled, other=0.0)
            second = tl.dot(x, z, second, input_precision="ieee")
        left += BLOCK_STEP * source_column
        right += BLOCK_STEP * matrix_column
    if BIASED:
        own = bias + expert * bias_expert + column * bias_column
        first += tl.load(own, mask=held, other=0.0).to(tl.float32)[None, :]
        if GATED:
            own += columns * bias_column
            second += tl.load(own, mask=held, other=0.0).to(tl.float32)[None, :]
    if GATED:
        first = first * tl.sigmoid(first) * second
    if WEIGHTED:
        weight = tl.load(weights + rows * weight_stride, mask=there, other=0.0)
        first *= weight.to(tl.float32)[:, None]
    target = out + write[:, None] * out_row + wide[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask=there[:, None] & held[None, :])
