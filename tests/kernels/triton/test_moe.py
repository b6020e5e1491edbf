"""Mixtures of experts under the interpreter, against a float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
import torch

from vllmc.kernels.experts import Experts
from vllmc.kernels.triton.moe import blocks_for, height_for, mixture, mixture_through, route

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = 240
EPS32 = torch.finfo(torch.float32).eps

Gate = Callable[[torch.Tensor], torch.Tensor]


def gated_silu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def larger_of_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x[..., ::2], x[..., 1::2])


GATES: tuple[Gate, ...] = (gated_silu, torch.relu, larger_of_pairs)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of the op, and the gate of its experts."""

    experts: Experts
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


def strided(random: Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, in memory of a layout drawn at random."""
    generator = torch.Generator().manual_seed(random.getrandbits(32))
    wide = torch.randn(*shape[:-1], shape[-1] + random.choice((0, 3)), generator=generator)
    return wide.to(dtype)[..., : shape[-1]]


def draw(seed: int) -> Case:
    random = Random(seed)
    dtype, gate = DTYPES[seed % 3], GATES[seed // 3 % 3]
    count = random.choice((1, 2, 3, 5, 8))
    topk = random.randint(1, min(count, 4))
    tokens = random.choice((1, 1, 2, 3, 7, 16, 33))
    size, width = (random.choice((1, 2, 15, 16, 31, 64, 65, 70)) for _ in range(2))
    inner = width if gate is torch.relu else 2 * width
    biased, transposed = random.random() < 0.5, random.random() < 0.5

    def matrices(rows: int, columns: int) -> torch.Tensor:
        scale = columns**-0.5
        if transposed:
            return strided(random, count, columns, rows, dtype=dtype).mul_(scale).mT
        return strided(random, count, rows, columns, dtype=dtype).mul_(scale)

    experts = Experts(
        up=matrices(inner, size),
        down=matrices(size, width),
        gate=gate,
        gated_silu=gate is gated_silu,
        up_bias=strided(random, count, inner, dtype=dtype) if biased else None,
        down_bias=strided(random, count, size, dtype=dtype) if biased else None,
    )
    ids = torch.stack([torch.tensor(random.sample(range(count), topk)) for _ in range(tokens)])
    return Case(
        experts=experts,
        hidden=strided(random, tokens, size, dtype=dtype),
        ids=ids.to(random.choice((torch.int32, torch.int64))),
        weights=strided(random, tokens, topk, dtype=random.choice((dtype, torch.float32))),
    )


def product(
    x: torch.Tensor, error: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`matrix @ x + bias`, and how far a sum in float32 may be off, where `x` is off by `error`."""
    exact, most = matrix.double() @ x, matrix.double().abs() @ (x.abs() + error)
    if bias is not None:
        exact, most = exact + bias.double(), most + bias.double().abs()
    # A sum of n products is off by n roundings of the sum of their sizes at most.
    summed = (x.numel() + 3) * EPS32 * most
    return exact, matrix.double().abs() @ error + summed


def gated(
    gate: Gate, x: torch.Tensor, error: torch.Tensor, half_ulp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the gate makes of `x`, and how far off it may be, with its rounding."""
    result = gate(x)
    if gate is gated_silu:
        (first, second), (e1, e2) = x.chunk(2), error.chunk(2)
        # SiLU is nowhere steeper than 1.1.
        silu = torch.nn.functional.silu(first).abs()
        off = 1.1 * e1 * (second.abs() + e2) + silu * e2 + 8 * EPS32 * (result.abs() + e1 + e2)
    else:
        # The product was rounded before; neither gate goes further apart than its arguments.
        error = error + half_ulp * (x.abs() + error)
        off = error if gate is torch.relu else torch.maximum(error[::2], error[1::2])
    return result, off + half_ulp * (result.abs() + off)


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and by how much each element may differ from it."""
    experts, dtype = case.experts, case.hidden.dtype
    half_ulp = torch.finfo(dtype).eps / 2
    results = torch.zeros(case.hidden.shape, dtype=torch.float64)
    errors = torch.zeros_like(results)
    for token, row in enumerate(case.hidden.double()):
        for slot, expert in enumerate(case.ids[token].tolist()):
            biases = [
                None if b is None else b[expert] for b in (experts.up_bias, experts.down_bias)
            ]
            x, error = product(row, torch.zeros_like(row), experts.up[expert], biases[0])
            x, error = gated(experts.gate, x, error, half_ulp)
            x, error = product(x, error, experts.down[expert], biases[1])
            weight = case.weights[token, slot].double()
            results[token] += weight * x
            errors[token] += weight.abs() * (error + 6 * EPS32 * (x.abs() + error))
    smallest = torch.finfo(dtype).smallest_normal * 2 * half_ulp
    return results, errors + half_ulp * (results.abs() + errors) + smallest


@pytest.mark.parametrize("part", range(8))
def test_results_are_those_of_float64_within_the_error_of_the_dtype(part: int) -> None:
    for seed in range(part * CASES // 8, (part + 1) * CASES // 8):
        case = draw(seed)
        experts, rows = case.experts, case.ids.numel()
        width = experts.down.shape[2] if experts.gated_silu else experts.up.shape[1]
        inner = torch.full((rows, width), float("nan"), dtype=case.hidden.dtype)
        parts = torch.full((rows, case.hidden.shape[1]), float("nan"))
        found = mixture_through(
            experts, case.hidden, case.ids, case.weights, inner=inner, parts=parts
        )
        assert not inner.isnan().any(), f"seed {seed}: not all was written"
        assert not parts.isnan().any(), f"seed {seed}: not all was written"
        assert found.dtype == case.hidden.dtype
        expected, allowed = reference(case)
        off = (found.double() - expected).abs()
        assert (off <= allowed).all(), f"seed {seed}: {(off / allowed).max():.2f} of what it may be"


def test_the_bound_is_not_met_by_a_wrong_expert() -> None:
    case = draw(9)
    expected, allowed = reference(case)
    ids = (case.ids + 1) % len(case.experts.up)
    found = mixture(case.experts, case.hidden, ids, case.weights)
    assert ((found.double() - expected).abs() > allowed).any()


@pytest.mark.parametrize("tokens", [5, 40, 200])
def test_blocks_of_all_heights_compute_the_same(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = Experts(
        up=torch.randn(2, 12, 5, generator=generator),
        down=torch.randn(2, 5, 6, generator=generator),
        gate=gated_silu,
        gated_silu=True,
    )
    hidden = torch.randn(tokens, 5, generator=generator)
    ids = torch.randint(0, 2, (tokens, 1), generator=generator)
    found = mixture(experts, hidden, ids, torch.ones(tokens, 1))
    expected = torch.stack(
        [
            experts.down[e] @ gated_silu(experts.up[e] @ row)
            for row, e in zip(hidden, ids[:, 0].tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(found, expected)


def test_no_tokens_give_no_rows() -> None:
    case = draw(0)
    found = mixture(case.experts, case.hidden[:0], case.ids[:0], case.weights[:0])
    assert found.shape == (0, case.hidden.shape[1])


@pytest.mark.parametrize("height", [16, 64])
def test_each_row_is_in_one_block_and_that_block_is_its_expert_s(height: int) -> None:
    random = Random(height)
    for _ in range(100):
        count, topk = random.choice((1, 3, 16, 60)), random.randint(1, 3)
        hit = random.randint(1, count)
        ids = torch.tensor(
            [[random.randrange(hit) for _ in range(topk)] for _ in range(random.randint(1, 150))]
        )
        routing = route(ids, count, height)
        seen = []
        for expert, start in zip(
            routing.block_expert.tolist(), routing.block_start.tolist(), strict=True
        ):
            if expert < count:
                rows = routing.rows[start : min(start + height, int(routing.ends[expert]))]
                assert len(rows) > 0
                assert (ids.reshape(-1)[rows] == expert).all()
                seen += rows.tolist()
        assert sorted(seen) == list(range(ids.numel()))


def test_blocks_are_as_high_as_experts_have_rows() -> None:
    assert height_for(8, 128, torch.bfloat16) == 16
    assert height_for(4096, 128, torch.bfloat16) == 32
    assert height_for(65536, 8, torch.float16) == 128
    assert height_for(65536, 8, torch.float32) == 64


def test_a_gated_product_which_is_two_has_narrower_blocks() -> None:
    for height in (16, 32, 64, 128):
        for dtype in DTYPES:
            gated, plain = (blocks_for(height, dtype, gated=gated) for gated in (True, False))
            assert gated.rows == plain.rows == height
            assert gated.columns == 64
            assert plain.columns == (128 if height >= 64 and dtype != torch.float32 else 64)
