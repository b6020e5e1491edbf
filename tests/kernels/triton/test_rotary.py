"""The kernel of rotary embedding, against float64."""

from __future__ import annotations

import torch
from kernel_cases import EPS32, FLOATING, Draw, Poisoned, assert_near, draws, exact_rotation

from vllmc.kernels.triton import rotary


def heads(draw: Draw, tokens: int, count: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[1, tokens, count, size]`, as models hand it on: transposed, part of one product."""
    layout = draw.below(4)
    if layout == 0:
        return draw.tensor((1, count, tokens, size), dtype, "dense").transpose(1, 2)
    if layout == 1:
        both = draw.tensor((1, tokens, (count + 1) * size), dtype, "dense")
        return both[..., size:].view(1, tokens, count, size)
    return draw.tensor((1, tokens, count, size), dtype, "dense" if layout == 2 else "spread")


def test_a_rotation_is_that_of_float64_for_any_shape_stride_and_dtype() -> None:
    for draw in draws(200):
        tokens, size = draw.one_of((0, 1, 2, 3, 7)), draw.one_of((2, 6, 10, 64, 80, 128))
        key_heads, dtype = draw.one_of((1, 2, 3, 5)), draw.one_of(FLOATING)
        query = heads(draw, tokens, key_heads * draw.one_of((1, 3, 8)), size, dtype)
        key = heads(draw, tokens, key_heads, size, dtype)
        rotary_size = draw.one_of((size, size, 2 * ((size // 2 + 1) // 2)))
        angles = (1, tokens, rotary_size)
        cos = draw.tensor(angles, draw.one_of(FLOATING), draw.one_of(("dense", "padded")))
        sin = draw.tensor(angles, cos.dtype, draw.one_of(("dense", "spread")))
        interleaved = draw.one_of((False, True))
        out_query, out_key = (Poisoned.of(tuple(x.shape), dtype) for x in (query, key))
        rotary.launch(
            query,
            key,
            cos,
            sin,
            interleaved,
            out_query=out_query.tensor,
            out_key=out_key.tensor,
        )
        for x, out in ((query, out_query), (key, out_key)):
            slack = 2 * EPS32 * exact_rotation(x.abs(), cos.abs(), -sin.abs(), interleaved).abs()
            slack += 2 * EPS32 * exact_rotation(x.abs(), cos.abs(), sin.abs(), interleaved).abs()
            assert_near(out.written(), exact_rotation(x, cos, sin, interleaved), slack)
            assert torch.equal(out.tensor[..., rotary_size:], x[..., rotary_size:])


def test_many_heads_are_cut_into_blocks() -> None:
    draw = next(draws(1))
    query = draw.tensor((1, 3, 70, 128), torch.bfloat16, "dense")
    key = draw.tensor((1, 3, 33, 128), torch.bfloat16, "dense")
    cos, sin = (draw.tensor((1, 3, 128), torch.float32, "dense") for _ in range(2))
    for x, out in zip(
        (query, key), rotary.rotary_embedding(query, key, cos, sin), strict=True
    ):  # fmt: skip
        exact = exact_rotation(x, cos, sin, False)
        assert_near(out, exact, torch.full_like(exact, 16 * EPS32))


def test_what_is_not_rotated_is_copied_as_it_is() -> None:
    query = torch.full((1, 1, 1, 8), -0.0)
    query[..., 4:] = torch.tensor([float("inf"), float("nan"), -0.0, 65504.0])
    out, _ = rotary.rotary_embedding(query, query, torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert torch.equal(out[..., 4:].view(torch.int32), query[..., 4:].view(torch.int32))
