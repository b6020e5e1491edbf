import pytest
import torch

from vllmc.core.errors import VllmcError
from vllmc.kernels.kv_cache import (
    BlockAllocator,
    BlockTable,
    KVCacheSpec,
    LayerCache,
    OutOfBlocksError,
    blocks_needed,
)


def test_blocks_are_handed_out_side_by_side() -> None:
    allocator = BlockAllocator(10)
    assert allocator.allocate(3) == (0, 1, 2)
    assert allocator.allocate(4) == (3, 4, 5, 6)
    assert allocator.num_free == 3


def test_a_hole_that_is_too_small_is_passed_over() -> None:
    allocator = BlockAllocator(10)
    first, _ = allocator.allocate(2), allocator.allocate(3)
    allocator.release(first)
    assert allocator.allocate(3) == (5, 6, 7)
    assert allocator.allocate(2) == (0, 1)


def test_holes_are_used_when_there_is_no_run() -> None:
    allocator = BlockAllocator(6)
    held = [allocator.allocate(1) for _ in range(6)]
    for blocks in held[::2]:
        allocator.release(blocks)
    assert allocator.allocate(2) == (0, 2)
    assert allocator.allocate(1) == (4,)
    assert allocator.num_free == 0


def test_too_few_free_blocks_are_an_error_that_takes_none() -> None:
    allocator = BlockAllocator(4)
    allocator.allocate(2)
    with pytest.raises(OutOfBlocksError) as caught:
        allocator.allocate(3)
    assert isinstance(caught.value, VllmcError)
    assert caught.value.context == {"needed": 3, "free": 2}
    assert allocator.num_free == 2


def test_a_block_released_twice_is_a_defect() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(blocks)


@pytest.mark.parametrize(("tokens", "blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_partial_block_counts(tokens: int, blocks: int) -> None:
    assert blocks_needed(tokens, 4) == blocks


@pytest.mark.parametrize("ids", [(3, 4, 5), (5, 2, 7)], ids=["consecutive", "scattered"])
def test_a_table_finds_the_slot_of_each_token(ids: tuple[int, ...]) -> None:
    table = BlockTable.of(ids, 4, "cpu")
    expected = [block * 4 + offset for block in ids for offset in range(4)]
    assert list(table.slots) == expected
    assert list(table.slots[3:9]) == expected[3:9]


@pytest.mark.parametrize("ids", [(1, 2, 3), (3, 0, 2)], ids=["consecutive", "scattered"])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 4), (3, 9), (4, 5), (9, 10)])
def test_what_is_written_is_read(ids: tuple[int, ...], start: int, stop: int) -> None:
    spec = KVCacheSpec(layer_name="layer", num_kv_heads=2, key_size=3, value_size=5)
    cache = LayerCache.allocate(spec, 16, dtype=torch.float32, device="cpu")
    table = BlockTable.of(ids, 4, "cpu")
    key, value = torch.randn(10, 2, 3), torch.randn(10, 2, 5)
    cache.write(torch.tensor(table.slots[:10]), key[None], value[None])
    keys, values = cache.read(table, start, stop)
    assert torch.equal(keys, key[start:stop].transpose(0, 1)[None])
    assert torch.equal(values, value[start:stop].transpose(0, 1)[None])


def test_consecutive_blocks_are_read_without_a_copy() -> None:
    spec = KVCacheSpec(layer_name="layer", num_kv_heads=1, key_size=2, value_size=2)
    cache = LayerCache.allocate(spec, 16, dtype=torch.float32, device="cpu")
    keys, values = cache.read(BlockTable.of((1, 2), 4, "cpu"), 1, 6)
    assert keys.data_ptr() == cache.key[5].data_ptr()
    assert values.data_ptr() == cache.value[5].data_ptr()


def test_slots_at_even_distances_are_read_as_one_view() -> None:
    spec = KVCacheSpec(layer_name="layer", num_kv_heads=2, key_size=3, value_size=5)
    cache = LayerCache.allocate(spec, 16, dtype=torch.float32, device="cpu")
    key, value = torch.randn(1, 16, 2, 3), torch.randn(1, 16, 2, 5)
    cache.write(torch.arange(16), key, value)
    keys, values = cache.read_evenly(count=3, length=4, slot=1, distance=5)
    for row, slot in enumerate((1, 6, 11)):
        assert torch.equal(keys[row], key[0, slot : slot + 4].transpose(0, 1))
        assert torch.equal(values[row], value[0, slot : slot + 4].transpose(0, 1))
    assert keys.data_ptr() == cache.key[1].data_ptr()
