"""Batches for attention ops, and what attention is of each, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllmc.kernels import attention as _attention  # noqa: F401  (defines the op)
from vllmc.kernels.forward_context import (
    AttentionMetadata,
    ForwardContext,
    SequenceSpan,
    forward_context,
    whole_sequences,
)
from vllmc.kernels.kv_cache import BlockTable, LayerCache
from vllmc.kernels.layer_name import LayerName

OP = torch.ops.vllmc.unified_attention_with_output
BLOCK_SIZE = 4
LAYER = LayerName("layer")
# (tokens before this step, tokens of this step): whole prompts, chunks and decodes.
MIXED = ((0, 5), (7, 1), (0, 1), (12, 6), (30, 1), (3, 2))
LENGTHS = (5, 1, 9, 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked of attention. Without `scattered` a sequence's blocks are side by side."""

    heads: int = 4
    kv_heads: int = 2
    key_size: int = 8
    value_size: int = 8
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scattered: bool = False
    block_size: int = BLOCK_SIZE
    dtype: torch.dtype = torch.float32
    sequences: tuple[tuple[int, int], ...] = MIXED


class Batch:
    """A step over caches that hold the earlier tokens, poisoned with NaN wherever they do not."""

    def __init__(self, case: Case, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        self.case, size = case, case.block_size
        self.scale = 0.7 / math.sqrt(case.key_size)
        self.sinks = rand(case.heads) if case.sinks else None
        counts = [-(-(c + q) // size) for c, q in case.sequences]
        blocks = list(range(1, sum(counts) + 1))
        if case.scattered:
            blocks = (torch.randperm(len(blocks), generator=generator) + 1).tolist()
        key_cache = torch.full(
            (sum(counts) + 2, size, case.kv_heads, case.key_size), math.nan, dtype=case.dtype
        )
        value_cache = torch.full(
            (sum(counts) + 2, size, case.kv_heads, case.value_size),
            math.nan,
            dtype=case.dtype,
        )
        self.keys, self.values, spans, slots, begin = [], [], [], [], 0
        for (context, new), count in zip(case.sequences, counts, strict=True):
            ids, blocks = blocks[:count], blocks[count:]
            total = context + new
            keys = rand(total, case.kv_heads, case.key_size)
            values = rand(total, case.kv_heads, case.value_size)
            for position in range(total):
                block, offset = ids[position // size], position % size
                if position < context:
                    key_cache[block, offset] = keys[position]
                    value_cache[block, offset] = values[position]
                else:
                    slots.append(block * size + offset)
            table = BlockTable.of(ids, size, "cpu")
            spans.append(
                SequenceSpan(query_start=begin, query_len=new, total_len=total, table=table)
            )
            begin += new
            self.keys.append(keys)
            self.values.append(values)
        self.query = rand(1, begin, case.heads, case.key_size)
        new_keys = [k[c:] for k, (c, _) in zip(self.keys, case.sequences, strict=True)]
        new_values = [v[c:] for v, (c, _) in zip(self.values, case.sequences, strict=True)]
        self.key, self.value = torch.cat(new_keys)[None], torch.cat(new_values)[None]
        self.metadata = AttentionMetadata(slots=torch.tensor(slots), sequences=tuple(spans))
        self.cache = LayerCache(key_cache.flatten(0, 1), value_cache.flatten(0, 1))

    @property
    def context(self) -> ForwardContext:
        return ForwardContext(metadata=self.metadata, caches={"layer": self.cache})

    def poisoned(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output of which every element is wrong."""
        case = self.case
        shape = (1, self.query.shape[1], case.heads, case.value_size)
        dtype = dtype or case.dtype
        return torch.full(shape, 127 if dtype is torch.int8 else math.nan).to(dtype)

    def run(
        self,
        layer_name: LayerName | str = LAYER,
        output: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        case = self.case
        output = self.poisoned() if output is None else output
        op = OP.str if isinstance(layer_name, str) else OP.default
        with forward_context(self.context):
            op(
                self.query, self.key, self.value, output, layer_name,
                self.scale, case.window, case.softcap, self.sinks, **options,
            )  # fmt: skip
        return output

    def reference(self, *, absolute: bool = False) -> torch.Tensor:
        """What the op should give; with `absolute` of the values without their signs."""
        case = self.case
        rows = []
        queries = iter(self.query[0].cpu().double())
        stored = zip(self.keys, self.values, case.sequences, strict=True)
        for keys, values, (context, new) in stored:
            values = values.abs() if absolute else values
            for position in range(context, context + new):
                seen = [
                    p
                    for p in range(position + 1)
                    if case.window is None or position - p < case.window
                ]
                query = next(queries)
                rows.append(attended(case, query, keys, values, seen, self.scale, self.sinks))
        return torch.stack(rows)[None]


def attended(
    case: Case,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: list[int],
    scale: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query attending to the tokens `seen`, a head at a time, in float64."""
    heads = []
    for head in range(case.heads):
        group = head * case.kv_heads // case.heads
        logits = []
        for p in seen:
            score = scale * float(query[head] @ keys[p, group].double())
            if case.softcap is not None:
                score = case.softcap * math.tanh(score / case.softcap)
            logits.append(score)
        total = sum(math.exp(x) for x in logits)
        if sinks is not None:
            total += math.exp(float(sinks[head]))
        weights = torch.tensor([math.exp(x) / total for x in logits]).double()
        heads.append(weights @ values[seen, group].double())
    return torch.stack(heads)


class WholeBatch:
    """Whole sequences of `lengths` tokens, of which nothing is cached."""

    def __init__(self, case: Case, seed: int = 0, lengths: Sequence[int] = LENGTHS) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        self.case, self.lengths = case, tuple(lengths)
        self.scale = 0.7 / math.sqrt(case.key_size)
        self.sinks = rand(case.heads) if case.sinks else None
        self.query = rand(1, sum(self.lengths), case.heads, case.key_size)
        self.key = rand(1, sum(self.lengths), case.kv_heads, case.key_size)
        self.value = rand(1, sum(self.lengths), case.kv_heads, case.value_size)

    def run(self) -> torch.Tensor:
        case = self.case
        shape = (1, sum(self.lengths), case.heads, case.value_size)
        output = torch.full(shape, math.nan, dtype=case.dtype, device=self.query.device)
        with forward_context(whole_sequences(self.lengths)):
            OP.default(
                self.query, self.key, self.value, output, LAYER,
                self.scale, case.window, case.softcap, self.sinks, False,
            )  # fmt: skip
        return output

    def reference(self, *, absolute: bool = False) -> torch.Tensor:
        rows = []
        parts = (t[0].split(self.lengths) for t in (self.query, self.key, self.value))
        for queries, keys, values in zip(*parts, strict=True):
            values = values.abs() if absolute else values
            for position, query in enumerate(queries.double()):
                window = self.case.window or len(keys)
                seen = [p for p in range(len(keys)) if abs(position - p) < window]
                rows.append(attended(self.case, query, keys, values, seen, self.scale, self.sinks))
        return torch.stack(rows)[None]
