"""What the ops of one step read besides their arguments: the batch's layout, KV caches, experts.

The forward context is the one ambient value of vllmc. An op cannot take the caches as arguments:
the compiled program would then have them as inputs of every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch.nn.utils.rnn import pad_sequence

from vllmc.core.errors import VllmcError
from vllmc.kernels.copies import sent
from vllmc.kernels.experts import Experts
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
class DecodeGroup:
    """Rows `row` to `row + count`, each a sequence's only new token, which sees `length` tokens.

    Those of the first row are in the slots from `slot`, those of each next row `distance` further.
    A row whose tokens are scattered is a group of its own: they are in the slots `scattered`.
    """

    row: int
    count: int
    length: int
    slot: int
    distance: int
    scattered: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTables:
    """The layout of a batch of B sequences as a GPU's kernels read it: int32, on the GPU.

    `starts` `[B + 1]` is the first row of each sequence, and the number of rows; `totals` `[B]` how
    many tokens each has so far; `blocks` `[B, most]` the ids of its blocks, of `block_size` tokens
    each, then zeros. `longest_query` and `longest_total` are the most rows and tokens of one.
    """

    starts: torch.Tensor
    totals: torch.Tensor
    blocks: torch.Tensor
    block_size: int
    longest_query: int
    longest_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """The layout of a flattened batch of T tokens.

    `slots` `[T]` (int64) is where each token's key and value go, empty where nothing is cached;
    `sequences` cover the T rows in order.
    """

    slots: torch.Tensor
    sequences: tuple[SequenceSpan, ...]
    _decodes: dict[int | None, tuple[tuple[DecodeGroup, ...], tuple[SequenceSpan, ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _tables: dict[torch.device, DeviceTables] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def decodes(
        self, window: int | None
    ) -> tuple[tuple[DecodeGroup, ...], tuple[SequenceSpan, ...]]:
        """The rows that can be attended in groups under this window, and the other sequences.

        It is the same for all layers of a step, so that only the first to ask has it worked out.
        """
        found = self._decodes.get(window)
        if found is None:
            found = self._decodes[window] = _decodes(self.sequences, window)
        return found

    def tables(self, device: torch.device) -> DeviceTables:
        """The layout on `device`. As with `decodes`, only a step's first layer has it made."""
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = _tables(self.sequences, device)
        return found


def _decodes(
    sequences: Sequence[SequenceSpan], window: int | None
) -> tuple[tuple[DecodeGroup, ...], tuple[SequenceSpan, ...]]:
    groups: list[DecodeGroup] = []
    others: list[SequenceSpan] = []
    for span in sequences:
        if span.query_len != 1:
            others.append(span)
            continue
        total, table = span.total_len, span.table
        length = total if window is None else min(window, total)
        slot = table.slots[total - length]
        last = groups[-1] if groups else None
        if table.gather is None and last and _continues(last, span.query_start, length, slot):
            distance = slot - last.slot if last.count == 1 else last.distance
            groups[-1] = replace(last, count=last.count + 1, distance=distance)
        else:
            scattered = None if table.gather is None else table.gather[total - length : total]
            groups.append(
                DecodeGroup(
                    row=span.query_start,
                    count=1,
                    length=length,
                    slot=slot,
                    distance=0,
                    scattered=scattered,
                )
            )
    return tuple(groups), tuple(others)


def _tables(sequences: Sequence[SequenceSpan], device: torch.device) -> DeviceTables:
    count, last = len(sequences), sequences[-1]
    starts = [*(span.query_start for span in sequences), last.query_start + last.query_len]
    totals = [span.total_len for span in sequences]
    blocks = pad_sequence([span.table.packed for span in sequences], batch_first=True)
    # One copy: each costs as much as a small kernel.
    host = torch.cat([torch.tensor(starts + totals, dtype=torch.int32), blocks.flatten()])
    there = sent(host, device)
    return DeviceTables(
        starts=there[: count + 1],
        totals=there[count + 1 : 2 * count + 1],
        blocks=there[2 * count + 1 :].view(blocks.shape),
        block_size=len(last.table.slots) // max(1, len(last.table.ids)),
        longest_query=max(span.query_len for span in sequences),
        longest_total=max(totals),
    )


def _continues(group: DecodeGroup, row: int, length: int, slot: int) -> bool:
    """Whether the row is the group's next: as long, and as far from the last one as that is."""
    if group.scattered is not None or slot < group.slot:
        return False
    if (row, length) != (group.row + group.count, group.length):
        return False
    return group.count == 1 or slot == group.slot + group.count * group.distance


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """The metadata of the step that runs, and by layer name each layer's cache or experts."""

    metadata: AttentionMetadata
    caches: Mapping[str, LayerCache]
    experts: Mapping[str, Experts] = field(default_factory=dict)


_NO_BLOCKS = BlockTable(ids=(), packed=torch.empty(0, dtype=torch.int32), slots=(), gather=None)


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


def running_context() -> ForwardContext | None:
    """The context that ops see now; None outside of `forward_context`."""
    return _CURRENT.get()


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


def current_experts(layer_name: str) -> Experts:
    """The experts of the layer `layer_name`.

    Raises `VllmcError`: `no-forward-context` outside of `forward_context`, `unknown-layer` when
    the context holds no experts of that name.
    """
    context = _current(layer_name)
    experts = context.experts.get(layer_name)
    if experts is None:
        raise VllmcError(
            "unknown-layer",
            f"the forward context holds no experts for the layer '{layer_name}'",
            context={"layer": layer_name, "layers": sorted(context.experts)},
            hint="give the engine the experts of the program: Program.experts",
        )
    return experts


def current_whole_batch(layer_name: str) -> AttentionMetadata:
    """The running step's metadata, for the layer `layer_name`, whose attention goes both ways.

    Raises `VllmcError`: `no-forward-context` outside of `forward_context`, `incomplete-sequence`
    where a sequence has tokens outside of the batch.
    """
    metadata = _current(layer_name).metadata
    for span in metadata.sequences:
        if span.query_len != span.total_len:
            raise VllmcError(
                "incomplete-sequence",
                f"the layer '{layer_name}' attends both ways, and the batch holds "
                f"{span.query_len} of a sequence's {span.total_len} tokens",
                context={"layer": layer_name},
                hint="give a model that attends both ways whole sequences",
            )
    return metadata


def _current(layer_name: str) -> ForwardContext:
    context = _CURRENT.get()
    if context is None:
        raise VllmcError(
            "no-forward-context",
            f"the layer '{layer_name}' ran without a forward context",
            context={"layer": layer_name},
            hint="run the program through vllmc.core.runtime.engine.Engine, or set a context "
            "with vllmc.kernels.forward_context.forward_context",
        )
    return context
