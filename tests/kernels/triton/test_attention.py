"""Attention on a GPU, as the interpreter runs it, against a float64 reference."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import torch
from attending import Batch, Case, WholeBatch
from kernel_cases import steps_apart

from vllmc.kernels.forward_context import DeviceTables, forward_context, whole_sequences
from vllmc.kernels.quant import quantized_blocks, static_scaled_quant
from vllmc.kernels.triton import attention
from vllmc.kernels.triton.attention import AttentionBlocks, attention_blocks
from vllmc.kernels.triton.kv_cache import store

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def random_case(draw: random.Random) -> Case:
    kv_heads = draw.choice((1, 2))
    kinds = draw.choice(("mixed", "mixed", "decodes"))
    sequences = tuple(
        (draw.randint(0, 30), 1 if kinds == "decodes" else draw.choice((1, 2, 5, 11)))
        for _ in range(draw.randint(1, 3))
    )
    return Case(
        heads=kv_heads * draw.choice((1, 2, 3)),
        kv_heads=kv_heads,
        key_size=draw.randint(1, 24),
        value_size=draw.randint(1, 24),
        window=draw.choice((None, None, 1, 4, 9, 1000)),
        softcap=draw.choice((None, None, 1.5)),
        sinks=draw.random() < 0.3,
        scattered=draw.random() < 0.7,
        block_size=draw.choice((16, 16, 1, 4, 5)),
        dtype=draw.choice(DTYPES),
        sequences=sequences,
    )


def random_blocks(draw: random.Random, case: Case) -> AttentionBlocks:
    group = case.heads // case.kv_heads
    m = draw.choice((16, 32))
    return AttentionBlocks(
        m=m,
        n=draw.choice((16, 32)),
        rows=m // group,
        splits=draw.choice((1, 1, 1, 2, 4)),
        warps=4,
        stages=1,
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, 127 if dtype is torch.int8 else math.nan).to(dtype)


def attended(
    batch: Batch | WholeBatch,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: DeviceTables,
    blocks: AttentionBlocks,
    *,
    dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the kernel writes over poison, an output with other strides than the query's."""
    case = batch.case
    shape = (case.heads, batch.query.shape[1], case.value_size)
    out = poisoned(shape, dtype or case.dtype).transpose(0, 1)
    attention.launch(
        batch.query[0], keys, values, tables, out=out, scale=batch.scale, window=case.window,
        softcap=case.softcap, sinks=batch.sinks, causal=isinstance(batch, Batch),
        output_scale=scale, blocks=blocks,
    )  # fmt: skip
    return out[None]


def check(found: torch.Tensor, batch: Batch | WholeBatch) -> None:
    """Holds `found` against float64: the output is rounded once, and so is each weight.

    Sums are in float32: of the scores, whose error moves the weights, and of the values.
    """
    case = batch.case
    half = torch.finfo(case.dtype).eps / 2
    weights = 0.0 if case.dtype is torch.float32 else half
    reference, absolute = batch.reference(), batch.reference(absolute=True)
    single = 64 * torch.finfo(torch.float32).eps
    # Below the smallest normal number float16 is evenly spaced.
    bound = half * reference.abs() + (weights + single) * absolute + torch.finfo(case.dtype).tiny
    excess = (found.double() - reference).abs() / bound
    assert not found.isnan().any(), "an element was not written"
    assert float(excess.max()) <= 1, (case, float(excess.max()))


@pytest.mark.parametrize("seed", range(200))
def test_random_batches_are_attended_as_defined(seed: int) -> None:
    draw = random.Random(seed)
    case = random_case(draw)
    batch = Batch(case, seed)
    blocks = random_blocks(draw, case)
    if draw.random() < 0.5:
        batch.query = batch.query.transpose(1, 2).contiguous().transpose(1, 2)
        batch.key = batch.key.transpose(1, 2).contiguous().transpose(1, 2)
    store(batch.cache, batch.metadata.slots, batch.key, batch.value)
    held = (batch.cache.key, batch.cache.value, batch.metadata.tables(CPU), blocks)
    plain = attended(batch, *held)
    check(plain, batch)
    if seed % 4 == 0:
        dtype, scale = draw.choice(QUANTIZED), torch.tensor([0.02])
        found = attended(batch, *held, dtype=dtype, scale=scale)
        assert torch.equal(found.float(), static_scaled_quant(plain, scale, dtype).float())


@pytest.mark.parametrize("seed", range(60))
def test_random_whole_batches_are_attended_both_ways(seed: int) -> None:
    draw = random.Random(seed)
    case = dataclasses.replace(random_case(draw), sinks=draw.random() < 0.3)
    lengths = [draw.choice((1, 2, 7, 20)) for _ in range(draw.randint(1, 3))]
    batch = WholeBatch(case, seed, lengths)
    tables = whole_sequences(lengths).metadata.tables(CPU)
    blocks = random_blocks(draw, case)
    check(attended(batch, batch.key[0], batch.value[0], tables, blocks), batch)


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_a_token_are_quantised_by_their_largest_element(seed: int) -> None:
    draw = random.Random(seed)
    heads, size, dtype = draw.randint(1, 6), draw.randint(1, 40), draw.choice(QUANTIZED)
    count = draw.choice([g for g in range(1, heads * size + 1) if heads * size % g == 0])
    tokens = draw.choice((1, 5))
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(tokens, heads, size, generator=generator).to(draw.choice(DTYPES))
    out = poisoned((heads, tokens, size), dtype).transpose(0, 1)
    scales = poisoned((count, tokens), torch.float32).t()
    attention.quantize_blocks(plain, out=out, scales=scales)
    blocks, expected = quantized_blocks(plain.view(tokens, count, -1), dtype)
    assert torch.equal(scales, expected)
    assert torch.equal(out.float(), blocks.view(plain.shape).float())


def test_a_nan_in_a_block_shows_in_its_scale() -> None:
    plain = torch.ones(2, 2, 4)
    plain[1, 0, 2] = math.nan
    out, scales = torch.zeros(2, 2, 4, dtype=torch.int8), torch.zeros(2, 2)
    attention.quantize_blocks(plain, out=out, scales=scales)
    assert scales.isnan().tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_query_that_is_no_number_gives_none(softcap: float | None) -> None:
    batch = Batch(Case(softcap=softcap), seed=0)
    expected = batch.run()
    batch.query[0, 3], expected[0, 3] = math.nan, math.nan
    blocks = AttentionBlocks(m=16, n=16, rows=8, splits=1, warps=4, stages=1)
    tables = batch.metadata.tables(CPU)
    found = attended(batch, batch.cache.key, batch.cache.value, tables, blocks)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_a_transposed_output_is_quantised_block_by_block(dtype: torch.dtype) -> None:
    batch = Batch(Case(), seed=0)
    blocks, expected = quantized_blocks(batch.run().view(1, 16, 4, -1), dtype)
    output = poisoned((1, 4, 16, 8), dtype).transpose(1, 2)
    scales = poisoned((1, 16, 4), torch.float32)
    with forward_context(batch.context):
        attention.attend_step(
            batch.query, batch.key, batch.value, output, "layer", batch.scale, None, None, None,
            True, None, scales, stored=False,
        )  # fmt: skip
    torch.testing.assert_close(scales, expected)
    assert steps_apart(output, blocks.view(output.shape)) <= 1


@pytest.mark.parametrize("seed", range(20))
def test_keys_and_values_are_stored_where_the_slots_say_and_nowhere_else(seed: int) -> None:
    draw = random.Random(seed)
    case = random_case(draw)
    batch, other = Batch(case, seed), Batch(case, seed)
    store(batch.cache, batch.metadata.slots, batch.key, batch.value)
    other.cache.write(other.metadata.slots, other.key, other.value)
    for found, expected in (
        (batch.cache.key, other.cache.key),
        (batch.cache.value, other.cache.value),
    ):
        assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def chosen(**given: int) -> AttentionBlocks:
    usual = {
        "group": 4,
        "head_bytes": 256,
        "one_each": 1,
        "programs": 8,
        "seen": 4096,
        "multiprocessors": 132,
    }
    return attention_blocks(**{**usual, **given})  # type: ignore[arg-type]


def test_keys_are_divided_where_few_programs_would_read_many() -> None:
    assert chosen().splits == 16
    assert chosen(seen=100).splits == 1
    assert chosen(programs=264).splits == 1
    assert chosen(programs=132).splits == 2
    assert chosen(programs=1, seen=10**6).splits == 64
    assert chosen(one_each=0).splits == 1


@pytest.mark.parametrize("head_bytes", [1, 64, 160, 256, 512, 1024, 2048])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
@pytest.mark.parametrize("one_each", [0, 1])
def test_blocks_are_powers_of_two_that_fit_a_multiprocessor(
    one_each: int, group: int, head_bytes: int
) -> None:
    blocks = chosen(one_each=one_each, group=group, head_bytes=head_bytes)
    for number in (blocks.m, blocks.n, blocks.splits, blocks.warps):
        assert number & (number - 1) == 0
    assert blocks.m >= 16 <= blocks.n
    assert 1 <= blocks.rows * group <= blocks.m
    padded = max(16, 1 << (head_bytes - 1).bit_length())
    # Keys and values of each stage, and the queries: an A100 has 163 KiB for a program.
    assert padded * (blocks.m + 2 * blocks.n * blocks.stages) <= 163 * 1024
