"""Keyed randomness against splitmix64 in Python's integers, and its statistics."""

import torch

from spectitan import keyed_random
from spectitan.keyed_random import hash_keys, uniform

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """One output for the state before the increment (Vigna's public-domain description)."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def oracle(*keys: int) -> int:
    state = 0
    for key in keys:
        state = splitmix64((state + key) & MASK)
    return state


def unsigned(x: torch.Tensor) -> int:
    return int(x) & MASK


def test_published_outputs_of_splitmix64():
    gamma = 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = [(1234567 + i * gamma) & MASK for i in range(5)]
    assert [splitmix64(state) for state in states] == expected
    assert [unsigned(hash_keys(state - 2**64 if state >= 2**63 else state)) for state in states] == expected


def test_hash_equals_the_oracle_at_awkward_keys():
    awkward = [0, 1, -1, 42, 2**31, 2**40 + 3, 2**63 - 1, -(2**63)]
    for seed in awkward:
        for key in awkward:
            assert unsigned(hash_keys(seed, key)) == oracle(seed, key)
            assert unsigned(hash_keys(seed, torch.tensor([key]), key)) == oracle(seed, key, key)


def test_keys_broadcast():
    rows, columns = torch.tensor([[0], [5], [-7]]), torch.arange(4)
    hashed = hash_keys(3, rows, 9, columns)
    assert hashed.shape == (3, 4) and hashed.dtype == torch.int64
    for i, row in enumerate(rows.flatten().tolist()):
        for j in range(4):
            assert unsigned(hashed[i, j]) == oracle(3, row, 9, j)


def test_each_key_and_their_order_matter():
    different = [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2), (1, 5), (1, 2), (1, 2, 3, 0), (1,), (6,), (0,)]
    values = [unsigned(hash_keys(*keys)) for keys in different]
    assert len(set(values)) == len(values)


def test_streams_of_neighbouring_seeds_do_not_overlap():
    indices = torch.arange(20_000)
    streams = torch.cat([hash_keys(seed, indices) for seed in range(5)])
    assert len(streams.unique()) == len(streams)


def test_uniform_is_even_and_independent():
    count = 200_000
    index = torch.arange(count)
    for keys in [(index,), (0, index), (index << 40,), (torch.arange(500)[:, None], torch.arange(400))]:
        u = uniform(42, *keys).flatten()
        assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
        histogram = torch.histc(u, 100, 0, 1)
        chi_square = ((histogram - count / 100) ** 2 / (count / 100)).sum()
        assert 45 < chi_square < 175  # 99 degrees of freedom: mean 99, standard deviation 14
        serial = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
        assert serial.abs() < 5 / count**0.5


def test_uniform_stays_inside_the_open_interval(monkeypatch):
    monkeypatch.setattr(keyed_random, "hash_keys", lambda *keys: torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    u = uniform(0)
    assert u[0] == 2**-53 and u[1] == 1 - 2**-53
    assert ((u > 0) & (u < 1)).all()


def test_same_on_any_slice_of_the_batch():
    """What a rank computes for its rows is what one process computes for them."""
    index = torch.arange(13)
    whole = uniform(7, index[:, None], torch.arange(5))
    parts = torch.cat([uniform(7, part[:, None], torch.arange(5)) for part in index.split([1, 4, 8])])
    assert torch.equal(whole, parts)
