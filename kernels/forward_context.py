"""What the ops of one step read besides their arguments: the batch's layout and the KV caches.

The forward context is the one ambient value of vllmc. An op cannot take the caches as arguments:
the compiled program would then have them as inputs of every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels.kv_cache import BlockTable, LayerCache


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence's part of a flattened batch.

    Its new tokens are the rows `query_start` to `query_start + query_len` of the batch, and the
    last `query_len` of its `total_len` tokens so far.
    """

    query_start: int
    query_len: int
    total_len: int
    table: BlockTable


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """The layout of a flattened batch of T tokens.

    `slots` `[T]` (int64) is where each token's key and value go, empty where nothing is cached;
    `sequences` cover the T rows in order.
    """

    slots: torch.Tensor
    sequences: tuple[SequenceSpan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """The metadata of the step that runs, and each attention layer's cache by layer name."""

    metadata: AttentionMetadata
    caches: Mapping[str, LayerCache]


_NO_BLOCKS = BlockTable(ids=(), slots=(), gather=None)


def whole_sequences(lengths: Sequence[int]) -> ForwardContext:
    """The context of a batch of whole sequences, of `lengths` tokens, of which nothing is cached.

    It is for layers whose attention goes both ways.
    """
    spans = []
    start = 0
    for length in lengths:
        spans.append(
            SequenceSpan(query_start=start, query_len=length, total_len=length, table=_NO_BLOCKS)
        )
        start += length
    metadata = AttentionMetadata(slots=torch.empty(0, dtype=torch.int64), sequences=tuple(spans))
    return ForwardContext(metadata=metadata, caches={})


_CURRENT: ContextVar[ForwardContext | None] = ContextVar("vllmc_forward_context", default=None)


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Makes `context` the one that ops see inside the `with` block."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_layer(layer_name: str) -> tuple[AttentionMetadata, LayerCache]:
    """The running step's metadata and the cache of the layer `layer_name`.

    Raises `VllmcError`: `no-forward-context` outside of `forward_context`, `unknown-layer` when
    the context holds no cache of that name.
    """
    context = _current(layer_name)
    cache = context.caches.get(layer_name)
    if cache is None:
        raise VllmcError(
            "unknown-layer",
            f"the forward context holds no KV cache for the attention layer '{layer_name}'",
            context={"layer": layer_name, "layers": sorted(context.caches)},
            hint="give the engine a KVCacheSpec for each attention layer of the program",
        )
    return context.metadata, cache


def current_whole_sequences(layer_name: str) -> tuple[SequenceSpan, ...]:
    """The running step's sequences, for the layer `layer_name`, whose attention goes both ways.

    Raises `VllmcError`: `no-forward-context` outside of `forward_context`, `incomplete-sequence`
    where a sequence has tokens outside of the batch.
    """
    sequences = _current(layer_name).metadata.sequences
    for span in sequences:
        if span.query_len != span.total_len:
            raise VllmcError(
                "incomplete-sequence",
                f"the layer '{layer_name}' attends both ways, and the batch holds "
                f"{span.query_len} of a sequence's {span.total_len} tokens",
                context={"layer": layer_name},
                hint="give a model that attends both ways whole sequences",
            )
    return sequences


def _current(layer_name: str) -> ForwardContext:
    context = _CURRENT.get()
    if context is None:
        raise VllmcError(
            "no-forward-context",
            f"the attention layer '{layer_name}' ran without a forward context",
            context={"layer": layer_name},
            hint="run the program through vllmc.core.runtime.engine.Engine, or set a context "
            "with vllmc.kernels.forward_context.forward_context",
        )
    return context
