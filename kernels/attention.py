"""`vllmc::unified_attention_with_output`: attention over the paged KV cache, as one op.

The op that compiled graphs are split at. After vLLM's op of that name (vllm/attention/layer.py):
the output is an argument that the op fills, so that a piece of the graph allocates it and the op
itself returns nothing. It has two overloads, which differ in how they take the layer's name:
`default` as an opaque `LayerName`, `str` as a string.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllmc.kernels.forward_context import SequenceSpan, current_layer
from vllmc.kernels.kv_cache import LayerCache
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName

# Queries are attended in blocks of this many rows, which bounds the mask and the score matrix.
_QUERY_BLOCK = 1024

# Defined through `Library`, not `custom_op`: a call costs 2.3 instead of 6.6 microseconds.
_LIBRARY = torch.library.Library("vllmc", "FRAGMENT")


def unified_attention_with_output(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    layer_name: LayerName | str,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Stores the batch's keys and values in the layer's cache, and attends each sequence to its own.

    The batch is flattened: `query` `[1, T, Hq, Dqk]`, `key` `[1, T, Hkv, Dqk]`, `value`
    `[1, T, Hkv, Dv]`, with `Hq` a multiple of `Hkv`; `output` `[1, T, Hq, Dv]` is overwritten. All
    are of the cache's floating dtype. Which rows belong to which sequence, and where the
    sequence's earlier tokens are, says the forward context.

    Attention is causal. With `sliding_window` w a token sees itself and the w - 1 before it. Scores
    are `scale * q.k`, then `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118), then
    masked. `sinks` `[Hq]` is a logit per head that takes part in the softmax and is dropped (as in
    gpt-oss; arXiv:2309.17453).

    Raises `VllmcError`: `no-forward-context`, `unknown-layer`.
    """
    name = layer_name.value if isinstance(layer_name, LayerName) else layer_name
    metadata, cache = current_layer(name)
    cache.write(metadata.slots, key[0], value[0])
    for span in metadata.sequences:
        rows = slice(span.query_start, span.query_start + span.query_len)
        queries, outputs = query[0, rows], output[0, rows]
        window = sliding_window if sliding_window is not None else span.total_len
        if softcap is None and sinks is None and _is_plain_prefill(span, window):
            keys, values = cache.read(span.table, 0, span.total_len)
            outputs.copy_(_attend_causal(queries, keys, values, scale))
        else:
            _attend_blocks(queries, outputs, span, cache, window, scale, softcap, sinks)


def _is_plain_prefill(span: SequenceSpan, window: int) -> bool:
    """Whether the queries are a whole sequence, of which no key lies outside of the window."""
    return 1 < span.query_len == span.total_len <= window


def _attend_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """`[L, Hq, Dqk]`, `[L, Hkv, Dqk]`, `[L, Hkv, Dv]` to `[L, Hq, Dv]`."""
    out: torch.Tensor = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def _attend_blocks(
    query: torch.Tensor,
    output: torch.Tensor,
    span: SequenceSpan,
    cache: LayerCache,
    window: int,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Attends block by block of queries, each to the keys that some query of the block sees."""
    context = span.total_len - span.query_len
    for begin in range(0, span.query_len, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, span.query_len)
        first_key = max(0, context + begin - window + 1)
        key, value = cache.read(span.table, first_key, context + end)
        mask = None
        if end - begin > 1:
            positions = torch.arange(first_key, context + end, device=query.device)
            distance = positions[begin - end :, None] - positions[None, :]
            mask = (distance >= 0) & (distance < window)
        rows = query[begin:end]
        if softcap is None and sinks is None:
            result = _attend_masked(rows, key, value, mask, scale)
        else:
            result = _attend_explicitly(rows, key, value, mask, scale, softcap, sinks)
        output[begin:end].copy_(result)


def _attend_masked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`[L, Hq, Dqk]`, `[S, Hkv, Dqk]`, `[S, Hkv, Dv]` and a mask `[L, S]` to `[L, Hq, Dv]`.

    A single query needs no mask, and its heads that share a key head can be that head's queries:
    on a CPU this takes half the time of grouped heads in float32, a tenth in bfloat16.
    """
    length, heads, _ = query.shape
    kv_heads = key.shape[1]
    single = length == 1
    if single:
        queries = query.reshape(1, kv_heads, heads // kv_heads, -1)
    else:
        queries = query.transpose(0, 1)[None]
    out: torch.Tensor = scaled_dot_product_attention(
        queries,
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=not single and heads != kv_heads,
    )
    return out.reshape(1, heads, -1) if single else out[0].transpose(0, 1)


def _attend_explicitly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As `_attend_masked`, with the scores in sight: for what the fused kernels do not do.

    Half-precision inputs are computed in float32.
    """
    length, heads, _ = query.shape
    size, kv_heads, _ = key.shape
    group = heads // kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Rows that share a key head go into one product: [Hkv, G * L, D] x [Hkv, D, S].
    queries = query.to(dtype).view(length, kv_heads, group, -1).permute(1, 2, 0, 3)
    keys = key.to(dtype).permute(1, 2, 0)
    scores = queries.reshape(kv_heads, group * length, -1) @ keys * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(kv_heads, group, length, size)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype).view(kv_heads, group, 1, 1).expand(-1, -1, length, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., :size].reshape(kv_heads, group * length, size)
    out = weights @ value.to(dtype).transpose(0, 1)
    return out.view(kv_heads, group, length, -1).permute(2, 0, 1, 3).reshape(length, heads, -1)


def _fake(*_: object) -> None:
    """Nothing is returned, and no argument's shape changes."""


def _define(overload: str, name_type: str) -> None:
    """Adds the overload whose layer name is of `name_type` to the library."""
    _LIBRARY.define(
        f"unified_attention_with_output{overload}(Tensor query, Tensor key, Tensor value, "
        f"Tensor(a!) output, {name_type} layer_name, float scale, int? sliding_window=None, "
        "float? softcap=None, Tensor? sinks=None) -> ()",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    qualified = f"unified_attention_with_output{overload}"
    _LIBRARY.impl(qualified, unified_attention_with_output, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllmc::{qualified}", _fake, lib=_LIBRARY)


_define("", LAYER_NAME_TYPE)
_define(".str", "str")
