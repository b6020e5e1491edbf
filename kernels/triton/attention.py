"""`vllmc::unified_attention_with_output` on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllmc.kernels.forward_context import DeviceTables, current_layer, current_whole_batch
from vllmc.kernels.quant import LARGEST, SMALLEST_AMAX, empty_dense
from vllmc.kernels.triton.attention_kernels import (
    LOG2E,
    attention_kernel,
    block_quant_kernel,
    combining_kernel,
)
from vllmc.kernels.triton.blocks import power_of_two
from vllmc.kernels.triton.elements import storable
from vllmc.kernels.triton.kv_cache import store

# Programs that a multiprocessor should have, tiles that a part of the keys should, and most parts.
_PROGRAMS = 2
_TILES = 4
_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlocks:
    """How attention is cut: `m` rows (queries times heads) by `n` keys, `rows` queries.

    The keys of a sequence are divided among `splits` programs. All but `rows` are powers of two.
    """

    m: int
    n: int
    rows: int
    splits: int
    warps: int
    stages: int


def attend_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    causal: bool,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
    *,
    stored: bool,
) -> None:
    """As `vllmc.kernels.attention.unified_attention_with_output`, whose arguments are checked.

    With `stored` the batch's keys and values are in the cache already.
    """
    if causal:
        metadata, cache = current_layer(layer_name)
        if not stored:
            store(cache, metadata.slots, key, value)
        keys, values = cache.key, cache.value
    else:
        metadata = current_whole_batch(layer_name)
        keys, values = key[0], value[0]
    plain = output if output_block_scale is None else empty_dense(output, query.dtype)
    launch(
        query[0],
        keys,
        values,
        metadata.tables(query.device),
        out=plain[0],
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        causal=causal,
        output_scale=output_scale,
    )
    if output_block_scale is not None:
        quantize_blocks(plain[0], out=output[0], scales=output_block_scale[0])


def launch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: DeviceTables,
    *,
    out: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
    output_scale: torch.Tensor | None = None,
    blocks: AttentionBlocks | None = None,
) -> None:
    """Writes to `out` `[T, Hq, Dv]` what `query` `[T, Hq, Dqk]` attends to.

    Causal, `keys` `[slots, Hkv, Dqk]` and `values` `[slots, Hkv, Dv]` are a layer's cache; else
    they are the batch's, `[T, ...]`. Any strides are taken. `blocks` are chosen where not given.
    """
    tokens, heads, key_size = query.shape
    _, kv_heads, value_size = values.shape
    sequences = tables.totals.shape[0]
    seen = tables.longest_total if window is None else min(window, tables.longest_total)
    one_each = tables.longest_query == 1
    blocks = blocks or attention_blocks(
        group=heads // kv_heads,
        head_bytes=max(key_size, value_size) * query.element_size(),
        one_each=one_each,
        programs=sequences * kv_heads,
        seen=seen,
        multiprocessors=_multiprocessors(query.device),
    )
    parts = tops = sums = None
    if blocks.splits > 1:
        shape = (tokens, heads, blocks.splits)
        parts = torch.empty((*shape, value_size), dtype=torch.float32, device=query.device)
        tops, sums = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
    if softcap is None:
        factor, cap = scale * LOG2E.value, 0.0
    else:
        factor, cap = 2 * scale / softcap, softcap * LOG2E.value
    written = storable(out)
    query_blocks = sequences if one_each else tokens // blocks.rows + sequences
    attention_kernel[(query_blocks, kv_heads, blocks.splits)](
        query,
        keys,
        values,
        written,
        parts,
        tops,
        sums,
        sinks,
        output_scale,
        tables.starts,
        tables.totals,
        tables.blocks,
        sequences,
        (sequences - 1).bit_length(),
        seen,
        factor,
        cap,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *written.stride(),
        tables.blocks.stride(0),
        GROUP=heads // kv_heads,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        PAGE=tables.block_size if causal else 0,
        CAUSAL=causal,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        ONE_EACH=one_each,
        DIVIDED=blocks.splits > 1,
        ROWS=blocks.rows,
        M=blocks.m,
        N=blocks.n,
        K=max(16, power_of_two(key_size)),
        D=max(16, power_of_two(value_size)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if blocks.splits > 1:
        width = power_of_two(value_size)
        combining_kernel[(tokens, heads)](
            parts,
            tops,
            sums,
            query,
            written,
            output_scale,
            blocks.splits,
            *written.stride(),
            VALUE_SIZE=value_size,
            MOST=_SPLITS,
            D=width,
            num_warps=min(16, max(4, width // 32)),
        )


def quantize_blocks(plain: torch.Tensor, *, out: torch.Tensor, scales: torch.Tensor) -> None:
    """Quantises each of G equal blocks of a token's elements, and writes its scale.

    `plain` `[T, Hq, Dv]` (contiguous) to `out` `[T, Hq, Dv]` and `scales` `[T, G]`.
    """
    tokens, heads, size = plain.shape
    count = scales.shape[1]
    width = heads * size // count
    written = storable(out)
    block_quant_kernel[(tokens, count)](
        plain,
        written,
        scales,
        *written.stride(),
        *scales.stride(),
        SMALLEST_AMAX,
        LARGEST=LARGEST[out.dtype],
        SIZE=size,
        WIDTH=width,
        COLUMNS=min(power_of_two(width), 1024),
    )


def attention_blocks(
    *,
    group: int,
    head_bytes: int,
    one_each: bool,
    programs: int,
    seen: int,
    multiprocessors: int,
) -> AttentionBlocks:
    """How to cut attention of `programs` sequences times key heads, of up to `seen` keys.

    `group` is how many heads share a key head, `head_bytes` what a key or value takes, whichever is
    larger; `one_each` says that each sequence has one query. Queries, keys and values that a
    program holds must fit a multiprocessor's shared memory.
    """
    padded = power_of_two(max(head_bytes, 32))
    n = 64 if padded <= 256 else 32 if padded <= 1024 else 16
    least = max(16, power_of_two(group))
    m = least if one_each else max(least, 64 if padded <= 512 else 16)
    splits = 1
    if one_each:
        wanted = _PROGRAMS * multiprocessors // programs
        splits = min(wanted, seen // (_TILES * n), _SPLITS)
        splits = 1 << (splits.bit_length() - 1) if splits > 1 else 1
    return AttentionBlocks(
        m=m,
        n=n,
        rows=m // group,
        splits=splits,
        warps=8 if m * padded >= 32768 else 4,
        stages=2 if padded <= 512 else 1,
    )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
