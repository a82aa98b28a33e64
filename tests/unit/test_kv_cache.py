"""The cache alone: what is written where, what is visible, what survives."""

import pytest
import torch

from spectitan.models.kv_cache import KVCache

HEADS, HEAD_DIM = 2, 3


def numbers(batch: int, m: int, start: int = 0) -> torch.Tensor:
    """[batch, heads, m, head_dim] of distinct numbers."""
    shape = (batch, HEADS, m, HEAD_DIM)
    return torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [4, 4, 4], [1, 5, 0]])
def test_rows_are_written_behind_what_they_hold(lengths):
    cache = KVCache(2, 3, 9, "cpu")
    cache.lengths = torch.tensor(lengths)
    slots = cache.next_slots(2)
    assert slots.index.tolist() == [[length, length + 1] for length in lengths]
    assert slots.stop == max(lengths) + 2
    keys, values = numbers(3, 2, 1), numbers(3, 2, 1000)
    seen_keys, seen_values = cache.write(1, keys, values, slots)
    assert seen_keys.shape == seen_values.shape == (3, HEADS, max(lengths) + 2, HEAD_DIM)
    assert seen_keys.dtype == torch.float64
    for row, length in enumerate(lengths):
        assert torch.equal(seen_keys[row, :, length : length + 2], keys[row])
        assert torch.equal(seen_values[row, :, length : length + 2], values[row])
        assert seen_keys[row].count_nonzero() == keys[row].count_nonzero()  # nothing beside, and no garbage
    assert cache.lengths.tolist() == lengths


def test_uncommitted_slots_are_overwritten_and_a_rollback_forgets():
    cache = KVCache(1, 2, 6, "cpu")
    first, second, third = numbers(2, 3, 1), numbers(2, 2, 100), numbers(2, 1, 200)
    cache.write(0, first, first, cache.next_slots(3))
    cache.commit(torch.tensor([3, 1]))
    keys, _ = cache.write(0, second, second, cache.next_slots(2))
    assert torch.equal(keys[0, :, :5], torch.cat([first[0], second[0]], 1))
    assert torch.equal(keys[1, :, :3], torch.cat([first[1, :, :1], second[1]], 1))
    cache.commit(2)
    assert cache.lengths.tolist() == [5, 3]
    cache.lengths = cache.lengths - torch.tensor([3, 0])
    keys, _ = cache.write(0, third, third, cache.next_slots(1))
    assert torch.equal(keys[0, :, :3], torch.cat([first[0, :, :2], third[0]], 1))
    assert torch.equal(keys[1, :, 3:4], third[1])


def test_a_full_cache_refuses_more():
    cache = KVCache(1, 2, 4, "cpu")
    cache.lengths = torch.tensor([1, 3])
    assert cache.next_slots(1).stop == 4
    with pytest.raises(AssertionError, match="4 slots; 3 are committed and 2 more"):
        cache.next_slots(2)


def test_rows_of_one_length_are_placed_without_reading_their_lengths():
    """On the meta device there is nothing to read: numbers committed for all rows are known to the host, others are not."""
    cache = KVCache(1, 3, 9, "meta")
    for start, m in ((0, 4), (4, 2), (6, 1)):
        slots = cache.next_slots(m)
        assert (slots.start, slots.stop, slots.index.shape) == (start, start + m, (3, m))
        cache.commit(m)
    with pytest.raises(AssertionError, match="9 slots; 7 are committed and 3 more"):
        cache.next_slots(3)
    cache.commit(torch.ones(3, dtype=torch.int64, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        cache.next_slots(1)
    known = KVCache(1, 3, 9, "cpu")
    known.commit(4)
    known.lengths = known.lengths - torch.tensor([1, 0, 2])  # a rollback
    assert known.next_slots(1).start == -1 and known.next_slots(1).index.flatten().tolist() == [3, 4, 2]


@pytest.mark.parametrize("lengths", [[2, 2, 2], [1, 5, 0]])
def test_a_path_through_a_tree_is_moved_together(lengths):
    """Each row keeps another path of the five tokens written, one of them nothing; keys and values of both layers move alike."""
    cache = KVCache(2, 3, 11, "cpu")
    before = [(numbers(3, 6, 1), numbers(3, 6, 1000)), (numbers(3, 6, 2000), numbers(3, 6, 3000))]
    tree = [(-keys[:, :, :5], -values[:, :, :5]) for keys, values in before]
    for layer, (keys, values) in enumerate(before):
        cache.write(layer, keys, values, cache.next_slots(6))
    cache.lengths = torch.tensor(lengths)
    slots = cache.next_slots(5)
    seen = [cache.write(layer, keys, values, slots) for layer, (keys, values) in enumerate(tree)]
    places, counts = torch.tensor([[0, 2, 4], [0, 3, 1], [0, 0, 0]]), torch.tensor([3, 2, 0])
    cache.keep(places, counts)
    assert cache.lengths.tolist() == [length + count for length, count in zip(lengths, counts.tolist())]
    for layer, pair in enumerate(seen):
        for stored, old, new in zip(pair, before[layer], tree[layer]):
            for row, (length, count) in enumerate(zip(lengths, counts.tolist())):
                expected = torch.cat([old[row, :, :length], new[row][:, places[row, :count]]], 1)
                assert torch.equal(stored[row, :, : length + count], expected)
