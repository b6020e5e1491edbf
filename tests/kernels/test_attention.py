import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllmc.core.errors import VllmcError
from vllmc.kernels import attention
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


@dataclass(frozen=True, kw_only=True)
class Case:
    heads: int = 4
    kv_heads: int = 2
    key_size: int = 8
    value_size: int = 8
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scattered: bool = False
    dtype: torch.dtype = torch.float32
    sequences: tuple[tuple[int, int], ...] = MIXED


CASES = {
    "plain": Case(),
    "one head each": Case(heads=3, kv_heads=3),
    "one key head": Case(heads=6, kv_heads=1),
    "smaller values": Case(key_size=12, value_size=8),
    "larger values": Case(key_size=8, value_size=20),
    "window of one": Case(window=1),
    "window": Case(window=5),
    "window beyond every sequence": Case(window=1000),
    "softcap": Case(softcap=1.5),
    "softcap and window": Case(softcap=1.5, window=4),
    "sinks": Case(sinks=True),
    "sinks and window": Case(sinks=True, window=3, heads=8, kv_heads=2),
    "everything": Case(sinks=True, softcap=2.0, window=6, value_size=4, scattered=True),
    "scattered blocks": Case(scattered=True),
    "scattered blocks and window": Case(scattered=True, window=6),
    "float64": Case(dtype=torch.float64),
    "bfloat16": Case(dtype=torch.bfloat16),
    "bfloat16 softcap": Case(dtype=torch.bfloat16, softcap=1.5),
    "decodes only": Case(sequences=((5, 1), (1, 1), (17, 1))),
    "decodes of one length": Case(sequences=((7, 1),) * 4),
    "decodes of one length in a window": Case(sequences=((9, 1),) * 3, window=3, value_size=12),
    "decodes under one window": Case(sequences=((9, 1), (6, 1), (11, 1)), window=3),
    "decodes of one length between others": Case(
        sequences=((7, 1), (7, 1), (0, 5), (7, 1), (3, 1), (4, 1)), heads=6
    ),
    "scattered decodes": Case(sequences=((7, 1),) * 3, scattered=True, window=6),
    "bfloat16 decodes": Case(sequences=((7, 1),) * 3, dtype=torch.bfloat16),
    "one token": Case(sequences=((0, 1),)),
    "one prompt": Case(sequences=((0, 9),)),
}


class Batch:
    """A step over caches that hold the earlier tokens, poisoned with NaN wherever they do not."""

    def __init__(self, case: Case, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        self.case = case
        self.scale = 0.7 / math.sqrt(case.key_size)
        self.sinks = rand(case.heads) if case.sinks else None
        counts = [-(-(c + q) // BLOCK_SIZE) for c, q in case.sequences]
        blocks = list(range(1, sum(counts) + 1))
        if case.scattered:
            blocks = (torch.randperm(len(blocks), generator=generator) + 1).tolist()
        key_cache = torch.full(
            (sum(counts) + 2, BLOCK_SIZE, case.kv_heads, case.key_size), math.nan, dtype=case.dtype
        )
        value_cache = torch.full(
            (sum(counts) + 2, BLOCK_SIZE, case.kv_heads, case.value_size),
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
                block, offset = ids[position // BLOCK_SIZE], position % BLOCK_SIZE
                if position < context:
                    key_cache[block, offset] = keys[position]
                    value_cache[block, offset] = values[position]
                else:
                    slots.append(block * BLOCK_SIZE + offset)
            table = BlockTable.of(ids, BLOCK_SIZE, "cpu")
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

    def run(self, layer_name: LayerName | str = LAYER) -> torch.Tensor:
        case = self.case
        shape = (1, self.query.shape[1], case.heads, case.value_size)
        output = torch.full(shape, math.nan, dtype=case.dtype)
        op = OP.str if isinstance(layer_name, str) else OP.default
        context = ForwardContext(metadata=self.metadata, caches={"layer": self.cache})
        with forward_context(context):
            op(
                self.query, self.key, self.value, output, layer_name,
                self.scale, case.window, case.softcap, self.sinks,
            )  # fmt: skip
        return output

    def reference(self) -> torch.Tensor:
        case = self.case
        rows = []
        queries = iter(self.query[0].double())
        stored = zip(self.keys, self.values, case.sequences, strict=True)
        for keys, values, (context, new) in stored:
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


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_op_computes_attention_as_defined(case: Case, seed: int) -> None:
    batch = Batch(case, seed)
    tolerance = 3e-2 if case.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        batch.run().double(), batch.reference(), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case(sequences=((7, 1),) * 4), [4]),
        (Case(sequences=((7, 1), (7, 1), (20, 1), (7, 1))), [2, 1, 1]),
        (Case(sequences=((7, 1), (7, 1), (0, 5), (7, 1))), [2, 1]),
        (Case(sequences=((4, 1), (7, 1), (5, 1), (30, 1)), window=4), [2, 2]),
        (Case(sequences=((4, 1), (8, 1), (12, 1)), window=4), [2, 1]),
        (Case(sequences=((7, 1),) * 3, scattered=True), [1, 1, 1]),
    ],
)
def test_decodes_as_long_and_as_far_apart_are_attended_at_once(
    case: Case, counts: list[int]
) -> None:
    metadata = Batch(case, seed=0).metadata
    groups, others = metadata.decodes(case.window)
    assert [group.count for group in groups] == counts
    assert [span.query_len for span in others] == [q for _, q in case.sequences if q > 1]
    assert metadata.decodes(case.window)[0] is groups, "worked out again for each layer"


@pytest.mark.parametrize("feature", [{}, {"window": 4}, {"softcap": 2.0}, {"sinks": True}])
def test_queries_of_several_blocks_give_the_same(
    feature: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 3)
    batch = Batch(Case(sequences=((0, 10), (5, 8)), **feature), seed=0)
    torch.testing.assert_close(batch.run().double(), batch.reference(), rtol=2e-6, atol=2e-6)


LENGTHS = (5, 1, 9, 2)
BOTH_WAYS = {
    "plain": Case(kv_heads=4),
    "grouped heads": Case(),
    "larger values": Case(value_size=20),
    "window of one": Case(window=1),
    "window": Case(window=3),
    "window as long as a sequence": Case(window=5),
    "window beyond every sequence": Case(window=1000),
    "softcap and window": Case(softcap=1.5, window=4),
    "sinks": Case(sinks=True),
    "float64": Case(dtype=torch.float64, window=4),
    "bfloat16": Case(dtype=torch.bfloat16, window=4),
}


class WholeBatch:
    """Whole sequences of LENGTHS tokens, of which nothing is cached."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        self.case = case
        self.scale = 0.7 / math.sqrt(case.key_size)
        self.sinks = rand(case.heads) if case.sinks else None
        self.query = rand(1, sum(LENGTHS), case.heads, case.key_size)
        self.key = rand(1, sum(LENGTHS), case.kv_heads, case.key_size)
        self.value = rand(1, sum(LENGTHS), case.kv_heads, case.value_size)

    def run(self) -> torch.Tensor:
        case = self.case
        shape = (1, sum(LENGTHS), case.heads, case.value_size)
        output = torch.full(shape, math.nan, dtype=case.dtype)
        with forward_context(whole_sequences(LENGTHS)):
            OP.default(
                self.query, self.key, self.value, output, LAYER,
                self.scale, case.window, case.softcap, self.sinks, False,
            )  # fmt: skip
        return output

    def reference(self) -> torch.Tensor:
        rows = []
        parts = (t[0].split(LENGTHS) for t in (self.query, self.key, self.value))
        for queries, keys, values in zip(*parts, strict=True):
            for position, query in enumerate(queries.double()):
                window = self.case.window or len(keys)
                seen = [p for p in range(len(keys)) if abs(position - p) < window]
                rows.append(attended(self.case, query, keys, values, seen, self.scale, self.sinks))
        return torch.stack(rows)[None]


@pytest.mark.parametrize("block", [1024, 4, 3])
@pytest.mark.parametrize("case", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_attention_both_ways_sees_all_of_a_sequence_within_the_window_on_either_side(
    case: Case, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERY_BLOCK", block)
    batch = WholeBatch(case)
    tolerance = 3e-2 if case.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(
        batch.run().double(), batch.reference(), rtol=tolerance, atol=tolerance
    )


def test_attention_both_ways_takes_transposed_inputs_as_they_are() -> None:
    batch = WholeBatch(Case(value_size=6, window=3))
    expected = batch.run()
    for name in ("query", "key", "value"):
        tensor = getattr(batch, name)
        setattr(batch, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(batch.run(), expected)


def test_attention_both_ways_refuses_a_part_of_a_sequence() -> None:
    batch = Batch(Case(), seed=0)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    context = ForwardContext(metadata=batch.metadata, caches={"layer": batch.cache})
    args = (batch.query, batch.key, batch.value, output, LAYER, 1.0, None, None, None, False)
    with forward_context(context), pytest.raises(VllmcError, match="1 of a sequence's 8") as caught:
        OP.default(*args)
    assert caught.value.code == "incomplete-sequence"
    with pytest.raises(VllmcError) as caught:
        OP.default(*args)
    assert caught.value.code == "no-forward-context"


def test_causal_attention_refuses_a_context_without_caches() -> None:
    batch = WholeBatch(Case())
    output = torch.zeros(1, sum(LENGTHS), 4, 8)
    with forward_context(whole_sequences(LENGTHS)), pytest.raises(VllmcError) as caught:
        OP.default(batch.query, batch.key, batch.value, output, LAYER, 1.0)
    assert caught.value.code == "unknown-layer"


def test_the_steps_keys_and_values_are_stored_where_the_metadata_says() -> None:
    batch = Batch(Case(scattered=True, value_size=6), seed=3)
    batch.run()
    slots = batch.metadata.slots
    assert torch.equal(batch.cache.key[slots], batch.key[0])
    assert torch.equal(batch.cache.value[slots], batch.value[0])
    stored = sum(context + new for context, new in MIXED)
    written = ~batch.cache.key.isnan().any(dim=(1, 2))
    assert int(written.sum()) == stored, "a slot of no token was written"


def test_a_string_and_a_layer_name_name_the_same_layer() -> None:
    first, second = Batch(Case(), seed=5), Batch(Case(), seed=5)
    assert torch.equal(first.run("layer"), second.run(LayerName("layer")))


def test_transposed_inputs_and_outputs_are_taken_as_they_are() -> None:
    batch = Batch(Case(value_size=6), seed=6)
    expected = batch.run()
    for name in ("query", "key", "value"):
        tensor = getattr(batch, name)
        setattr(batch, name, tensor.transpose(1, 2).contiguous().transpose(1, 2))
    assert not batch.query.is_contiguous()
    torch.testing.assert_close(batch.run(), expected)


def test_without_a_forward_context_the_error_names_the_layer() -> None:
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(VllmcError, match=r"model\.layers\.3") as caught:
        OP.str(tensor, tensor, tensor, tensor.clone(), "model.layers.3", 1.0)
    assert caught.value.code == "no-forward-context"


def test_a_layer_without_a_cache_is_named() -> None:
    with pytest.raises(VllmcError, match="other") as caught:
        Batch(Case(), seed=0).run(LayerName("other"))
    assert caught.value.code == "unknown-layer"
    assert caught.value.context["layers"] == ["layer"]


def test_a_forward_context_ends_with_its_block_also_after_an_error() -> None:
    batch = Batch(Case(), seed=0)
    with pytest.raises(VllmcError, match="other"):
        batch.run(LayerName("other"))
    tensor = torch.zeros(1, 1, 1, 4)
    with pytest.raises(VllmcError) as caught:
        OP.default(tensor, tensor, tensor, tensor.clone(), LayerName("layer"), 1.0)
    assert caught.value.code == "no-forward-context"


class Seen(TorchDispatchMode):
    """Notes the ops that the dispatcher is given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [LayerName("layer"), "layer"], ids=["opaque", "string"])
def test_past_the_dispatcher_the_op_does_the_same(name: LayerName | str) -> None:
    overload = OP.str if isinstance(name, str) else OP.default
    call = attention.past_dispatcher(overload)
    assert call is not overload
    first, second = (Batch(Case(window=5, value_size=6), seed=4) for _ in range(2))
    outputs = []
    for function, batch in ((overload, first), (call, second)):
        output = torch.full((1, batch.query.shape[1], 4, 6), math.nan)
        context = ForwardContext(metadata=batch.metadata, caches={"layer": batch.cache})
        with torch.no_grad(), forward_context(context):
            function(batch.query, batch.key, batch.value, output, name, batch.scale, 5, sinks=None)
        outputs.append(output)
    assert torch.equal(*outputs)
    assert torch.equal(first.cache.key.nan_to_num(), second.cache.key.nan_to_num())


@pytest.mark.parametrize("watched", [True, False])
def test_the_dispatcher_is_passed_by_only_where_nobody_looks(
    watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not watched:
        monkeypatch.setattr(attention, "is_watched", lambda _: False)
    batch = Batch(Case(), seed=0)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    context = ForwardContext(metadata=batch.metadata, caches={"layer": batch.cache})
    call = attention.past_dispatcher(OP.default)
    with torch.no_grad(), forward_context(context), Seen() as seen:
        call(batch.query, batch.key, batch.value, output, LAYER, 1.0)
    assert ("vllmc::unified_attention_with_output" in seen.names) is watched


def test_other_ops_and_other_kernels_of_the_op_go_through_the_dispatcher() -> None:
    assert attention.past_dispatcher(torch.ops.aten.mm.default) is torch.ops.aten.mm.default
    library = torch.library.Library("vllmc", "IMPL")
    library.impl("unified_attention_with_output", lambda *_: None, "CUDA")
    assert attention.past_dispatcher(OP.default) is OP.default
    library._destroy()
    assert attention.past_dispatcher(OP.default) is not OP.default


@pytest.mark.parametrize("overload", [OP.default, OP.str])
def test_the_schema_says_that_the_output_alone_is_written(overload: torch._ops.OpOverload) -> None:
    schema = overload._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["output"]
    assert schema.name == "vllmc::unified_attention_with_output"
    assert not schema.returns


@pytest.mark.parametrize("name", [LayerName("layer"), "layer"])
def test_torchs_own_checks_of_an_op_pass(name: LayerName | str) -> None:
    batch = Batch(Case(sinks=True, window=3), seed=1)
    output = torch.zeros(1, batch.query.shape[1], 4, 8)
    op = OP.str if isinstance(name, str) else OP.default
    args = (batch.query, batch.key, batch.value, output, name, 1.0, 3, None, batch.sinks)
    context = ForwardContext(metadata=batch.metadata, caches={"layer": batch.cache})
    with forward_context(context):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
