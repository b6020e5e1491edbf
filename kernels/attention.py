"""Attention over the paged KV cache: as one op, or as one that stores and one that attends.

`vllmc::unified_attention_with_output` is the op that compiled graphs are split at. After vLLM's op
of that name (vllm/attention/layer.py): the output is an argument that the op fills, so that a piece
of the graph allocates it and the op itself returns nothing. `vllmc::unified_kv_cache_update` is the
part of it that stores keys and values. Each has two overloads, which differ in how they take the
layer's name: `default` as an opaque `LayerName`, `str` as a string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllmc.core.errors import VllmcError
from vllmc.core.torch_compat.dispatch import has_backend_kernel, is_watched
from vllmc.kernels.forward_context import (
    DecodeGroup,
    SequenceSpan,
    current_layer,
    current_whole_batch,
)
from vllmc.kernels.kv_cache import LayerCache
from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName
from vllmc.kernels.library import LIBRARY, imported_when_called
from vllmc.kernels.quant import LARGEST, quantized, quantized_blocks

_Read: TypeAlias = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""From a range of a sequence's positions to its keys and values, as `LayerCache.read` has them."""

# Queries are attended in blocks of this many rows, which bounds the mask and the score matrix.
_QUERY_BLOCK = 1024

_attend_on_gpu = imported_when_called("vllmc.kernels.triton.attention:attend_step")
_store_on_gpu = imported_when_called("vllmc.kernels.triton.kv_cache:store")


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
    causal: bool = True,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
    kv_cache_dummy_dep: torch.Tensor | None = None,
) -> None:
    """Stores the batch's keys and values, and lets each sequence attend to its own so far.

    The batch is flattened: `query` `[1, T, Hq, Dqk]`, `key` `[1, T, Hkv, Dqk]`, `value`
    `[1, T, Hkv, Dv]`, with `Hq` a multiple of `Hkv`; `output` `[1, T, Hq, Dv]` is overwritten. All
    are of the cache's floating dtype. Which rows belong to which sequence, and where the
    sequence's earlier tokens are, says the forward context. On a GPU a Triton kernel computes it,
    in float32, bfloat16 and float16.

    Attention is causal, or else goes both ways: then sequences are whole, and nothing is stored or
    read. With `sliding_window` w a token sees itself and the w - 1 before it, and after it where
    attention goes both ways. Scores are `scale * q.k`, then `softcap * tanh(scores / softcap)`
    (Gemma 2, arXiv:2408.00118), then masked. `sinks` `[Hq]` is a logit per head that takes part in
    the softmax and is dropped (as in gpt-oss; arXiv:2309.17453).

    A quantised `output` (`float8_e4m3fn` or `int8`) holds the result, rounded to the query's dtype,
    as `vllmc.kernels.quant` quantises it. With `output_scale` `[1]` (float32) that is the scale.
    With `output_block_scale` `[1, T, G]` (float32) each of `G` equal blocks of a token's `Hq * Dv`
    elements has a scale of its own, by which its largest element is the type's: it is written
    there.

    With `kv_cache_dummy_dep`, which `unified_kv_cache_update` returned for this batch and layer,
    nothing is stored: it has been.

    Raises `VllmcError`: `no-forward-context`, `unknown-layer`, `incomplete-sequence`,
    `bad-attention-output`.
    """
    name = layer_name.value if isinstance(layer_name, LayerName) else layer_name
    if output.dtype in LARGEST or output_scale is not None or output_block_scale is not None:
        _check_output(query, output, output_scale, output_block_scale)
        if not query.is_cuda:
            plain = torch.empty(output.shape, dtype=query.dtype, device=query.device)
            unified_attention_with_output(
                query, key, value, plain, name, scale, sliding_window, softcap, sinks, causal,
                kv_cache_dummy_dep=kv_cache_dummy_dep,
            )  # fmt: skip
            _quantize_into(output, plain, output_scale, output_block_scale)
            return
    if query.is_cuda:
        _attend_on_gpu(
            query, key, value, output, name, scale, sliding_window, softcap, sinks, causal,
            output_scale, output_block_scale, stored=kv_cache_dummy_dep is not None,
        )  # fmt: skip
        return
    if not causal:
        for span in current_whole_batch(name).sequences:
            rows = slice(span.query_start, span.query_start + span.query_len)
            read = partial(_read, key[:, rows].transpose(1, 2), value[:, rows].transpose(1, 2))
            reach = (span.total_len if sliding_window is None else sliding_window) - 1
            _attend_blocks(query, output, span, read, (reach, reach), scale, softcap, sinks)
        return
    metadata, cache = current_layer(name)
    if kv_cache_dummy_dep is None:
        cache.write(metadata.slots, key, value)
    fused = softcap is None and sinks is None
    others = metadata.sequences
    if fused:
        groups, others = metadata.decodes(sliding_window)
        if groups:
            _decode(query, output, groups, cache, scale)
    for span in others:
        window = span.total_len if sliding_window is None else sliding_window
        if fused and span.query_len == span.total_len <= window:
            rows = slice(span.query_start, span.query_start + span.query_len)
            keys, values = cache.read(span.table, 0, span.total_len)
            result = _attend(query[:, rows], keys, values, scale, is_causal=True)
            output[:, rows].copy_(result)
        else:
            read = partial(cache.read, span.table)
            _attend_blocks(query, output, span, read, (window - 1, 0), scale, softcap, sinks)


def unified_kv_cache_update(
    key: torch.Tensor, value: torch.Tensor, layer_name: LayerName | str
) -> torch.Tensor:
    """Stores the batch's keys and values, as `unified_attention_with_output` does by itself.

    `key` is `[1, T, Hkv, Dqk]` and `value` `[1, T, Hkv, Dv]`, of the cache's dtype. The layer's
    cache, which the forward context holds, is written to; no compiler sees that. The result, an
    empty tensor of the key's dtype, stands for it: attention takes it, and so comes after.

    Raises `VllmcError`: `no-forward-context`, `unknown-layer`.
    """
    name = layer_name.value if isinstance(layer_name, LayerName) else layer_name
    metadata, cache = current_layer(name)
    if key.is_cuda:
        _store_on_gpu(cache, metadata.slots, key, value)
    else:
        cache.write(metadata.slots, key, value)
    return key.new_empty(0)


def past_dispatcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """For the op of this module, a function that does the same for less; any other as it is.

    The dispatcher is a quarter of what the op costs for one token. It is passed by where nothing
    would see the call (`is_watched`), and where no kernel was registered beside this module's,
    which serves all devices.
    """
    packet = torch.ops.vllmc.unified_attention_with_output
    overload = next((op for op in (packet.default, packet.str) if op is function), None)
    if overload is None or has_backend_kernel(overload):
        return function

    def call(query: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        run = overload if is_watched(query) else unified_attention_with_output
        run(query, *args, **kwargs)

    return call


def _check_output(
    query: torch.Tensor,
    output: torch.Tensor,
    output_scale: torch.Tensor | None,
    output_block_scale: torch.Tensor | None,
) -> None:
    """Whether the output is of a quantised type, and one scale says how it is quantised."""
    scales = {"output_scale": output_scale, "output_block_scale": output_block_scale}
    given = [name for name, scale in scales.items() if scale is not None]
    _, tokens, heads, size = output.shape
    if len(given) == 2:
        cause = "both output_scale and output_block_scale are given"
    elif not given:
        cause = f"the output is of {output.dtype}, and neither {' nor '.join(scales)} is given"
    elif output.dtype not in LARGEST:
        cause = f"{given[0]} is given, and the output is of {output.dtype}"
    elif output_scale is not None and output_scale.numel() != 1:
        cause = f"output_scale holds {output_scale.numel()} numbers, not 1"
    elif output_block_scale is not None and (
        output_block_scale.ndim != 3
        or output_block_scale.shape[:2] != (1, tokens)
        or not output_block_scale.shape[2]
        or heads * size % output_block_scale.shape[2]
    ):
        cause = (
            f"output_block_scale is {list(output_block_scale.shape)}, not [1, {tokens}, G] with G "
            f"a divisor of {heads * size}"
        )
    else:
        return
    raise VllmcError(
        "bad-attention-output",
        f"attention cannot quantise its output: {cause}",
        context={"output": str(output.dtype), "query": str(query.dtype)},
        hint=f"give an output of {' or '.join(map(str, LARGEST))} with one of the scales, or an "
        "output of the query's dtype with none",
    )


def _quantize_into(
    output: torch.Tensor,
    plain: torch.Tensor,
    scale: torch.Tensor | None,
    block_scale: torch.Tensor | None,
) -> None:
    """Fills `output` with what `plain`, its contiguous floating form, is by one of the scales."""
    if scale is not None:
        output.copy_(quantized(plain, scale, output.dtype))
        return
    assert block_scale is not None
    blocks, scales = quantized_blocks(plain.view(*block_scale.shape, -1), output.dtype)
    block_scale.copy_(scales)
    output.copy_(blocks.view(output.shape))


def _decode(
    query: torch.Tensor,
    output: torch.Tensor,
    groups: Sequence[DecodeGroup],
    cache: LayerCache,
    scale: float,
) -> None:
    """Attends single queries, which need no mask, each group of them at once.

    The query heads that share a key head are taken for queries of that head: on a CPU this costs
    half of what grouped heads do in float32, a tenth in bfloat16.
    """
    _, tokens, heads, _ = query.shape
    kv_heads = cache.key.shape[1]
    queries = query.view(tokens, kv_heads, heads // kv_heads, -1)
    results = output.view(tokens, kv_heads, heads // kv_heads, -1)
    for group in groups:
        row, count = group.row, group.count
        if group.scattered is not None:
            keys, values = cache.read_at(group.scattered)
        else:
            keys, values = cache.read_evenly(count, group.length, group.slot, group.distance)
        result = scaled_dot_product_attention(
            queries if count == tokens else queries.narrow(0, row, count),
            keys,
            values,
            scale=scale,
        )
        (results if count == tokens else results.narrow(0, row, count)).copy_(result)


def _read(
    keys: torch.Tensor, values: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return keys[:, :, start:stop], values[:, :, start:stop]


def _attend_blocks(
    query: torch.Tensor,
    output: torch.Tensor,
    span: SequenceSpan,
    read: _Read,
    reach: tuple[int, int],
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    """Attends block by block of queries, each to the keys that some query of the block sees.

    `reach` is how many tokens a token sees before itself, and after.
    """
    before, after = reach
    context, total = span.total_len - span.query_len, span.total_len
    for begin in range(0, span.query_len, _QUERY_BLOCK):
        end = min(begin + _QUERY_BLOCK, span.query_len)
        first, last = max(0, context + begin - before), min(total, context + end + after)
        keys, values = read(first, last)
        mask = None
        if end - begin > 1 and min(before, after) < total - 1:
            positions = torch.arange(first, last, device=query.device)
            own = positions[context + begin - first : context + end - first]
            distance = own[:, None] - positions[None, :]
            mask = (distance >= -after) & (distance <= before)
        rows = slice(span.query_start + begin, span.query_start + end)
        if softcap is None and sinks is None:
            result = _attend(query[:, rows], keys, values, scale, mask=mask)
        else:
            result = _attend_explicitly(query[:, rows], keys, values, mask, scale, softcap, sinks)
        output[:, rows].copy_(result)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """`[1, L, Hq, Dqk]`, `[1, Hkv, S, Dqk]`, `[1, Hkv, S, Dv]` to `[1, L, Hq, Dv]`."""
    result: torch.Tensor = scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[2] != keys.shape[1],
    )
    return result.transpose(1, 2)


def _attend_explicitly(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """As `_attend`, with the scores in sight: for what the fused kernels do not do.

    Half-precision inputs are computed in float32.
    """
    _, length, heads, size = query.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    # Rows that share a key head go into one product: [Hkv, G * L, D] x [Hkv, D, S].
    queries = query.to(dtype).view(length, kv_heads, group, size).permute(1, 2, 0, 3)
    queries = queries.reshape(kv_heads, group * length, size)
    scores = queries @ keys[0].to(dtype).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(kv_heads, group, length, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype).view(kv_heads, group, 1, 1).expand(-1, -1, length, 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    result = weights.reshape(kv_heads, group * length, -1) @ values[0].to(dtype)
    result = result.view(kv_heads, group, length, -1).permute(2, 0, 1, 3)
    return result.reshape(1, length, heads, -1)


def _fake_attention(*_: object, **__: object) -> None:
    """Nothing is returned, and no argument's shape changes."""


def _fake_update(key: torch.Tensor, _value: torch.Tensor, _layer_name: object) -> torch.Tensor:
    return key.new_empty(0)


def _define(overload: str, name_type: str) -> None:
    """Adds the overloads whose layer name is of `name_type` to the library."""
    attention = (
        f"unified_attention_with_output{overload}(Tensor query, Tensor key, Tensor value, "
        f"Tensor(a!) output, {name_type} layer_name, float scale, int? sliding_window=None, "
        "float? softcap=None, Tensor? sinks=None, bool causal=True, Tensor? output_scale=None, "
        "Tensor(b!)? output_block_scale=None, Tensor? kv_cache_dummy_dep=None) -> ()"
    )
    update = (
        f"unified_kv_cache_update{overload}(Tensor key, Tensor value, {name_type} layer_name) "
        "-> Tensor"
    )
    # A CUDA graph would go on reading what the forward context held when it was recorded.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    for schema, function, fake in (
        (attention, unified_attention_with_output, _fake_attention),
        (update, unified_kv_cache_update, _fake_update),
    ):
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=tags)
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vllmc::{name}", fake, lib=LIBRARY)


_define("", LAYER_NAME_TYPE)
_define(".str", "str")
