"""Keys and values put into a layer's paged cache, on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllmc.kernels.kv_cache import LayerCache
from vllmc.kernels.triton.blocks import power_of_two

_LARGEST = 1024


def store(cache: LayerCache, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """As `LayerCache.write`: `[1, T, Hkv, Dqk]` and `[1, T, Hkv, Dv]` at `slots` `[T]` (int64)."""
    _, tokens, heads, key_size = key.shape
    value_size = value.shape[3]
    widest = heads * max(key_size, value_size)
    columns = min(power_of_two(widest), _LARGEST)
    if tokens == 0:
        return
    _store_kernel[(tokens, triton.cdiv(widest, columns))](
        key,
        value,
        cache.key,
        cache.value,
        slots,
        *key.stride()[1:],
        *value.stride()[1:],
        HEADS=heads,
        KEY_SIZE=key_size,
        VALUE_SIZE=value_size,
        COLUMNS=columns,
    )


@triton.jit
def _store_kernel(
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    key_token: tl.tensor,
    key_head: tl.tensor,
    key_element: tl.tensor,
    value_token: tl.tensor,
    value_head: tl.tensor,
    value_element: tl.tensor,
    HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    head, element = column // KEY_SIZE, column % KEY_SIZE
    mask = column < HEADS * KEY_SIZE
    at = token * key_token + head * key_head + element * key_element
    tl.store(keys + slot * (HEADS * KEY_SIZE) + column, tl.load(key + at, mask=mask), mask=mask)
    head, element = column // VALUE_SIZE, column % VALUE_SIZE
    mask = column < HEADS * VALUE_SIZE
    at = token * value_token + head * value_head + element * value_element
    tl.store(
        values + slot * (HEADS * VALUE_SIZE) + column, tl.load(value + at, mask=mask), mask=mask
    )
