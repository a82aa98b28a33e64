"""Hidden states as bytes and back, against the same written down."""

import numpy as np
import pytest
import torch

from spectitan.states.precision import DTYPES, Stored, bytes_per_token, copy_bytes, decode, encode, first_bad, to_bytes


def random_states(columns: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator) * 10.0 ** (column - 1) for column in range(columns)]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("tokens, hidden", [(1, 1), (7, 5), (13, 24)])
def test_there_and_back(name, tokens, hidden):
    dtype, columns = DTYPES[name], random_states(3, 2, 13, hidden)
    stored = encode(columns, dtype)
    row = Stored(*(part if part is None else part[:, 1, :tokens] for part in stored))
    raw = np.concatenate(to_bytes(row))
    assert len(raw) == tokens * bytes_per_token(3, hidden, dtype)
    into = encode([torch.zeros(2, 13, hidden)] * 2, dtype)
    copy_bytes(raw, 3, [2, 0], 1, into)
    for ours, theirs in zip(into, stored):
        if ours is not None:
            assert torch.equal(ours[:, 1, :tokens], theirs[[2, 0], 1, :tokens]) and not ours[:, 0].any() and not ours[:, :, tokens:].any()
    found = decode(into, torch.float32)
    for ours, column in zip(found, (columns[2], columns[0])):
        expected = column[1, :tokens]
        if dtype != torch.int8:
            assert torch.equal(ours[1, :tokens], expected.to(dtype).float())
        else:  # rounded to the nearest of 255 steps of each token's largest number
            step = expected.abs().amax(-1, keepdim=True) / 127
            assert ((ours[1, :tokens] - expected).abs() <= step * 0.5001).all()


def test_int8_is_half_the_size():
    assert bytes_per_token(4, 4096, torch.int8) / bytes_per_token(4, 4096, torch.bfloat16) == pytest.approx(0.5, abs=0.001)


def test_int8_of_nothing_is_nothing():
    assert not decode(encode([torch.zeros(1, 3, 5)], torch.int8), torch.bfloat16)[0].any()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found(name, bad):
    columns = random_states(2, 11, 7)
    assert first_bad(encode(columns, DTYPES[name])) is None
    columns[1][4, 3] = bad
    columns[1][9, 0] = bad
    assert first_bad(encode(columns, DTYPES[name])) == (1, 4)


def test_what_float16_cannot_hold_is_found():
    columns = random_states(2, 11, 7)
    columns[0][6, 6] = 7e4
    assert first_bad(encode(columns, torch.float16)) == (0, 6)
    assert first_bad(encode(columns, torch.bfloat16)) is None
