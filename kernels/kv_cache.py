"""The paged KV cache: per-layer storage in blocks, and the allocator that hands blocks out.

After "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(Kwon et al., 2023). A *slot* is the place of one token: `block id * block size + offset`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels.copies import sent_numbers


class OutOfBlocksError(VllmcError):
    """The KV cache has fewer free blocks than were asked for."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(
            "out-of-blocks",
            f"{needed} KV cache blocks are needed and {free} are free",
            context={"needed": needed, "free": free},
            hint="give the engine more blocks, or shorten the prompts or their continuations",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """What one attention layer stores per token: `num_kv_heads` keys and values of these sizes."""

    layer_name: str
    num_kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    `packed` are the ids as kernels read them (int32, on the CPU). `slots` are the slots of its
    tokens, a range when the block ids are consecutive. Else `gather` holds them as a tensor (int64,
    on the cache's device).
    """

    ids: tuple[int, ...]
    packed: torch.Tensor
    slots: Sequence[int]
    gather: torch.Tensor | None

    @classmethod
    def of(cls, ids: Sequence[int], block_size: int, device: torch.device | str) -> BlockTable:
        """The table of the blocks `ids`, of which there is at least one."""
        first, count = ids[0], len(ids)
        packed = torch.tensor(ids, dtype=torch.int32)
        if list(ids) == list(range(first, first + count)):
            slots = range(first * block_size, (first + count) * block_size)
            return cls(ids=tuple(ids), packed=packed, slots=slots, gather=None)
        scattered = [block * block_size + offset for block in ids for offset in range(block_size)]
        gather = sent_numbers(scattered, device)
        return cls(ids=tuple(ids), packed=packed, slots=scattered, gather=gather)


class LayerCache:
    """One layer's keys and values, for the tokens of all sequences.

    `key` is `[slots, Hkv, Dqk]` and `value` `[slots, Hkv, Dv]`, contiguous and each a storage of
    its own, where block b has the slots from `b * block_size`. What has not been written is
    undefined and never read.
    """

    __slots__ = ("_key_rows", "_keys", "_value_rows", "_values", "key", "value")

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key = key
        self.value = value
        # Made once: a view costs a microsecond, and a step reads each layer for each sequence.
        self._key_rows, self._value_rows = key.unsqueeze(0), value.unsqueeze(0)
        self._keys = self._key_rows.transpose(1, 2)
        self._values = self._value_rows.transpose(1, 2)

    @classmethod
    def allocate(
        cls, spec: KVCacheSpec, slots: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> LayerCache:
        """Storage for `slots` tokens, whose pages are touched as they are written."""
        return cls(
            torch.empty(slots, spec.num_kv_heads, spec.key_size, dtype=dtype, device=device),
            torch.empty(slots, spec.num_kv_heads, spec.value_size, dtype=dtype, device=device),
        )

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores `[1, T, Hkv, Dqk]` and `[1, T, Hkv, Dv]` at `slots` `[T]` (int64)."""
        self._key_rows.index_copy_(1, slots, key)
        self._value_rows.index_copy_(1, slots, value)

    def read(self, table: BlockTable, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[1, Hkv, n, Dqk]` and values `[1, Hkv, n, Dv]` at positions `start` to `stop`.

        Views where the blocks are consecutive, else copies.
        """
        if table.gather is None:
            first, length = table.slots[start], stop - start
            return self._keys.narrow(2, first, length), self._values.narrow(2, first, length)
        return self.read_at(table.gather[start:stop])

    def read_at(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of what is at `slots` `[n]` (int64): `[1, Hkv, n, Dqk]`, `[1, Hkv, n, Dv]`."""
        return self._keys.index_select(2, slots), self._values.index_select(2, slots)

    def read_evenly(
        self, count: int, length: int, slot: int, distance: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of `length` slots from `slot`, and of as many `distance` further, `count` in all.

        Keys are `[count, Hkv, length, Dqk]`, values `[count, Hkv, length, Dv]`.
        """
        return (
            _evenly(self.key, count, length, slot, distance),
            _evenly(self.value, count, length, slot, distance),
        )


def _evenly(
    stored: torch.Tensor, count: int, length: int, slot: int, distance: int
) -> torch.Tensor:
    # One call: of steps to the same view each would cost a microsecond.
    _, heads, size = stored.shape
    per_slot = heads * size
    return stored.as_strided(
        (count, heads, length, size), (distance * per_slot, size, per_slot, 1), slot * per_slot
    )


def blocks_needed(tokens: int, block_size: int) -> int:
    """How many blocks hold `tokens` tokens."""
    return -(-tokens // block_size)


class BlockAllocator:
    """Hands out the ids of free blocks, side by side where it can."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """How many blocks are free."""
        return len(self._free)

    def allocate(self, count: int) -> tuple[int, ...]:
        """Takes `count` blocks: the first consecutive run of that length, else the lowest ids.

        Raises `OutOfBlocksError` when fewer are free.
        """
        free = self._free
        if count > len(free):
            raise OutOfBlocksError(count, len(free))
        # `free` is sorted and without repeats, so a run of `count` ids is one whose ends are
        # `count - 1` apart.
        starts = range(len(free) - count + 1)
        start = next((i for i in starts if free[i + count - 1] - free[i] == count - 1), 0)
        taken = tuple(free[start : start + count])
        del free[start : start + count]
        return taken

    def release(self, block_ids: Iterable[int]) -> None:
        """Takes `block_ids`, all of them handed out before, back."""
        self._free = sorted([*self._free, *block_ids])
        assert len(set(self._free)) == len(self._free), "a block was released twice"
