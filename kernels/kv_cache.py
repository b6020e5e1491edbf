"""The paged KV cache: per-layer storage in blocks, and the allocator that hands blocks out.

After "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(Kwon et al., 2023). A *slot* is the place of one token: `block id * block size + offset`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from vllmc.core.errors import VllmcError


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

    `block_ids` is `[n]` int64 on the cache's device; `first_slot` is the slot of the sequence's
    first token when the ids are consecutive (its tokens then lie side by side), else None.
    """

    ids: tuple[int, ...]
    block_ids: torch.Tensor
    block_size: int
    first_slot: int | None

    @classmethod
    def of(cls, ids: Sequence[int], block_size: int, device: torch.device | str) -> BlockTable:
        """The table of the blocks `ids`, of which there is at least one."""
        first = ids[0]
        consecutive = list(ids) == list(range(first, first + len(ids)))
        return cls(
            ids=tuple(ids),
            block_ids=torch.tensor(ids, dtype=torch.int64, device=device),
            block_size=block_size,
            first_slot=first * block_size if consecutive else None,
        )

    def slots(self, start: int, stop: int) -> Iterable[int]:
        """The slots of the tokens at positions `start` to `stop` (exclusive)."""
        if self.first_slot is not None:
            return range(self.first_slot + start, self.first_slot + stop)
        size = self.block_size
        return [self.ids[p // size] * size + p % size for p in range(start, stop)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """The keys `[blocks, block_size, Hkv, Dqk]` and values `[blocks, block_size, Hkv, Dv]` of a layer.

    Both are contiguous. What has not been written is undefined and never read.
    """

    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def allocate(
        cls,
        spec: KVCacheSpec,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LayerCache:
        """Storage for `num_blocks * block_size` tokens; pages are touched as they are written."""
        rows = (num_blocks, block_size, spec.num_kv_heads)
        return cls(
            key=torch.empty((*rows, spec.key_size), dtype=dtype, device=device),
            value=torch.empty((*rows, spec.value_size), dtype=dtype, device=device),
        )

    def write(self, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Stores `key` `[T, Hkv, Dqk]` and `value` `[T, Hkv, Dv]` at `slots` `[T]` (int64)."""
        self.key.flatten(0, 1).index_copy_(0, slots, key)
        self.value.flatten(0, 1).index_copy_(0, slots, value)

    def read(self, table: BlockTable, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[n, Hkv, Dqk]` and values `[n, Hkv, Dv]` at positions `start` to `stop`.

        Views where the blocks are consecutive, else copies.
        """
        if table.first_slot is not None:
            offset, length = table.first_slot + start, stop - start
            return (
                self.key.flatten(0, 1).narrow(0, offset, length),
                self.value.flatten(0, 1).narrow(0, offset, length),
            )
        first_block = start // table.block_size
        blocks = table.block_ids[first_block : blocks_needed(stop, table.block_size)]
        rows = slice(start - first_block * table.block_size, stop - first_block * table.block_size)
        return self.key[blocks].flatten(0, 1)[rows], self.value[blocks].flatten(0, 1)[rows]


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
