"""`vllmc::rotary_embedding`, through torch's dispatcher."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import EPS32, FLOATING, assert_near, draws, exact_rotation
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vllmc.kernels.rotary  # noqa: F401, defines the op

ROTATE = torch.ops.vllmc.rotary_embedding


def test_a_rotation_is_that_of_float64(device: torch.device) -> None:
    for draw in draws(200):
        tokens, size = draw.one_of((0, 1, 2, 7)), draw.one_of((2, 6, 10, 64, 80, 128))
        key_heads, dtype = draw.one_of((1, 2, 5)), draw.one_of(FLOATING)
        # As models hand them on: transposed views.
        query, key = (
            draw.tensor((1, heads, tokens, size), dtype, "dense").transpose(1, 2).to(device)
            for heads in (key_heads * draw.one_of((1, 3)), key_heads)
        )
        rotary_size = draw.one_of((size, 2 * ((size // 2 + 1) // 2)))
        cos, sin = (
            draw.tensor((1, tokens, rotary_size), draw.one_of(FLOATING), layout).to(device)
            for layout in ("padded", "spread")
        )
        interleaved = draw.one_of((False, True))
        for x, got in zip((query, key), ROTATE(query, key, cos, sin, interleaved), strict=True):
            assert got.dtype is dtype
            assert got.is_contiguous()
            slack = 2 * EPS32 * exact_rotation(x.abs(), cos.abs(), -sin.abs(), interleaved).abs()
            slack += 2 * EPS32 * exact_rotation(x.abs(), cos.abs(), sin.abs(), interleaved).abs()
            assert_near(got, exact_rotation(x, cos, sin, interleaved), slack)
            assert torch.equal(got[..., rotary_size:], x[..., rotary_size:])


def test_it_is_what_a_llama_of_transformers_computes(device: torch.device) -> None:
    query, key = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)
    angles = torch.randn(1, 7, 8).repeat(1, 1, 2)
    expected = apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    args = (query.transpose(1, 2), key.transpose(1, 2), angles.cos(), angles.sin())
    got = ROTATE(*(tensor.to(device) for tensor in args))
    for result, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted.transpose(1, 2))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATING)
def test_the_op_is_what_it_says(
    device: torch.device, dtype: torch.dtype, interleaved: bool
) -> None:
    query = torch.randn(1, 4, 7, 16, device=device).to(dtype).transpose(1, 2)
    key = torch.randn(1, 7, 2, 16, device=device).to(dtype)
    for rotary_size in (16, 8):
        cos, sin = torch.randn(2, 1, 7, rotary_size, device=device)
        torch.library.opcheck(ROTATE.default, (query, key, cos, sin, interleaved))
