"""The kernels of attention: what one program of each computes.

The softmax is computed online, in float32 and in powers of two (FlashAttention-2, Dao,
arXiv:2307.08691). Where few programs would run, the keys of a sequence are divided among several,
whose parts are put together afterwards (Flash-Decoding, Dao et al., 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllmc.kernels.triton.elements import quantized

LOG2E = tl.constexpr(1.4426950408889634)
# As far as exp goes: 1 / (1 + exp(80)) is nothing beside 1.
_FARTHEST = tl.constexpr(80.0)


@triton.jit(
    do_not_specialize=["sequences", "bits", "window", "table_stride"],
    # They lie behind each other in memory: see `forward_context.DeviceTables`.
    do_not_specialize_on_alignment=["totals", "blocks"],
)
def attention_kernel(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    sinks: tl.tensor,
    output_scale: tl.tensor,
    starts: tl.tensor,
    totals: tl.tensor,
    blocks: tl.tensor,
    sequences: tl.tensor,
    bits: tl.tensor,
    window: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    query_element: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    key_element: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    value_element: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_element: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    ONE_EACH: tl.constexpr,
    DIVIDED: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """A block of a sequence's queries, and all heads of a group, attend to the keys of that group.

    The M rows of a program are ROWS queries with GROUP heads each. `PAGE` is the cache's block
    size, 0 where keys and values are those of the batch. The program is (block of queries, key
    head, part of the keys). Scores are `factor * q.k`; capped ones `cap * tanh(factor * q.k / 2)`.
    """
    block, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if ONE_EACH:
        sequence = block
        start = tl.load(starts + sequence)
        first = 0
    else:
        # Sequence s begins at block starts[s] // ROWS + s, at which all before it have ended.
        sequence = block * 0
        for bit in range(bits):
            candidate = sequence + (1 << (bits - 1 - bit))
            there = candidate < sequences
            begins = tl.load(starts + candidate, mask=there, other=0) // ROWS + candidate
            sequence = tl.where(there & (begins <= block), candidate, sequence)
        start = tl.load(starts + sequence)
        first = (block - start // ROWS - sequence) * ROWS
    length = tl.load(starts + sequence + 1) - start
    if first >= length:
        return
    total = tl.load(totals + sequence)
    row = tl.arange(0, M)
    own, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    present = (row // GROUP < ROWS) & (own < length)
    token = (start + own).to(tl.int64)
    position = total - length + own
    k, d = tl.arange(0, K), tl.arange(0, D)
    q = tl.load(
        query + (token * query_token + head * query_head)[:, None] + (k * query_element)[None, :],
        mask=present[:, None] & (k < KEY_SIZE)[None, :],
        other=0.0,
    )
    low, high = _keys_seen(total, length, first, window, ROWS, CAUSAL, WINDOWED)
    if DIVIDED:
        each = tl.cdiv(tl.cdiv(high - low, N), tl.num_programs(2)) * N
        low += part * each
        high = tl.minimum(high, low + each)
    top = tl.full((M,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((M,), dtype=tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=present, other=0.0).to(tl.float32) * LOG2E
        top = tl.where(part == 0, sink, top)
        weight = tl.where(part == 0, 1.0, weight)
    result = tl.zeros((M, D), dtype=tl.float32)
    for begin in range(low, high, N):
        at = begin + tl.arange(0, N)
        seen = at < high
        if PAGE:
            page = tl.load(blocks + sequence * table_stride + at // PAGE, mask=seen, other=0)
            slot = page.to(tl.int64) * PAGE + at % PAGE
        else:
            slot = (start + at).to(tl.int64)
        key = tl.load(
            keys + (slot * key_row + kv_head * key_head)[None, :] + (k * key_element)[:, None],
            mask=seen[None, :] & (k < KEY_SIZE)[:, None],
            other=0.0,
        )
        scores = tl.dot(q, key, input_precision="ieee") * factor
        if CAPPED:
            scores = tl.minimum(scores, _FARTHEST, propagate_nan=tl.PropagateNan.ALL)
            scores = cap * (1.0 - 2.0 / (1.0 + tl.exp(scores)))
        ahead = at[None, :] - position[:, None]
        allowed = seen[None, :]
        if CAUSAL:
            allowed = allowed & (ahead <= 0)
        if WINDOWED:
            allowed = allowed & (ahead > -window) & (ahead < window)
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # A row that sees none of these keys, nor any before, has no top yet.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        weight = weight * fade + tl.sum(weights, 1)
        value = tl.load(
            values
            + (slot * value_row + kv_head * value_head)[:, None]
            + (d * value_element)[None, :],
            mask=seen[:, None] & (d < VALUE_SIZE)[None, :],
            other=0.0,
        )
        result = tl.dot(
            weights.to(value.dtype), value, result * fade[:, None], input_precision="ieee"
        )
        top = higher
    mask = present[:, None] & (d < VALUE_SIZE)[None, :]
    if DIVIDED:
        place = (token * (tl.num_programs(1) * GROUP) + head) * tl.num_programs(2) + part
        tl.store(tops + place, top, mask=present)
        tl.store(sums + place, weight, mask=present)
        tl.store(parts + place[:, None] * VALUE_SIZE + d[None, :], result, mask=mask)
    else:
        result = result / tl.where(present, weight, 1.0)[:, None]
        place = (token * out_token + head * out_head)[:, None] + (d * out_element)[None, :]
        _write(result, place, mask, out, output_scale, query.dtype.element_ty)


@triton.jit
def _keys_seen(
    total: tl.tensor,
    length: tl.tensor,
    first: tl.tensor,
    window: tl.tensor,
    ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """From and to which position of the sequence some query of the block sees keys."""
    context = total - length
    # One beyond the block's last query.
    end = context + tl.minimum(first + ROWS, length)
    low, high = total * 0, total
    if CAUSAL:
        high = end
    if WINDOWED:
        low = tl.maximum(context + first - window + 1, 0)
        # The sum would pass what int32 holds where the window is beyond all.
        high = end + tl.minimum(window - 1, high - end)
    return low, high


@triton.jit(do_not_specialize=["splits"])
def combining_kernel(
    parts: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    query: tl.tensor,
    out: tl.tensor,
    output_scale: tl.tensor,
    splits: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_element: tl.tensor,
    VALUE_SIZE: tl.constexpr,
    MOST: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Puts the parts of a token's head, up to MOST, together: the program is (token, head).

    Of `query` only the dtype counts.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part, d = tl.arange(0, MOST), tl.arange(0, D)
    there = part < splits
    place = (token * tl.num_programs(1) + head) * splits + part
    top = tl.load(tops + place, mask=there, other=float("-inf"))
    fade = tl.exp2(top - tl.max(top, 0))
    weight = tl.sum(tl.load(sums + place, mask=there, other=0.0) * fade, 0)
    results = tl.load(
        parts + place[:, None] * VALUE_SIZE + d[None, :],
        mask=there[:, None] & (d < VALUE_SIZE)[None, :],
        other=0.0,
    )
    result = tl.sum(results * fade[:, None], 0) / weight
    at = token * out_token + head * out_head + d * out_element
    _write(result, at, d < VALUE_SIZE, out, output_scale, query.dtype.element_ty)


@triton.jit
def _write(
    result: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    out: tl.tensor,
    output_scale: tl.tensor,
    ROUNDED: tl.constexpr,
) -> None:
    if output_scale is not None:
        scaled = tl.div_rn(result.to(ROUNDED).to(tl.float32), tl.load(output_scale))
        tl.store(out + at, quantized(scaled, out.dtype.element_ty), mask=mask)
    else:
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def block_quant_kernel(
    plain: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    out_token: tl.tensor,
    out_head: tl.tensor,
    out_element: tl.tensor,
    scale_token: tl.tensor,
    scale_block: tl.tensor,
    smallest: tl.tensor,
    LARGEST: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Quantises WIDTH elements of a token's heads by their largest: the program is (token, block).

    `plain` is contiguous, SIZE the size of a head.
    """
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    plain += (token * tl.num_programs(1) + block) * WIDTH
    # As integers the bits of positive floats have the floats' order, and a NaN is the largest.
    most = tl.full((COLUMNS,), smallest, dtype=tl.float32).to(tl.int32, bitcast=True)
    for begin in range(0, WIDTH, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        values = tl.load(plain + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(values).to(tl.int32, bitcast=True))
    scale = tl.div_rn(tl.max(most, 0).to(tl.float32, bitcast=True), LARGEST)
    tl.store(scales + token * scale_token + block * scale_block, scale)
    for begin in range(0, WIDTH, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        values = tl.load(plain + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        element = block * WIDTH + column
        at = token * out_token + element // SIZE * out_head + element % SIZE * out_element
        tl.store(
            out + at,
            quantized(tl.div_rn(values, scale), out.dtype.element_ty),
            mask=column < WIDTH,
        )
