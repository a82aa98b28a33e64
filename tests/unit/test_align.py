"""align_targets against a loop over every pair."""

import pytest
import torch

from spectitan.speculators.base import align_targets
from spectitan.types import Targets, TokenBatch


def make_batch(batch_size: int, length: int, seed: int) -> TokenBatch:
    """Rows of documents of random length, padding at the end of some, and a random loss mask."""
    generator = torch.Generator().manual_seed(seed)
    document_ids = torch.empty(batch_size, length, dtype=torch.int64)
    document = 0
    for row in range(batch_size):
        place = 0
        while place < length:
            stop = place + int(torch.randint(1, 8, (), generator=generator))
            document_ids[row, place:stop] = document
            document, place = document + 1, stop
        if row % 2:
            document_ids[row, length - min(3, length) :] = -1
    loss_mask = torch.rand(batch_size, length, generator=generator) < 0.7
    tokens = torch.randint(0, 50, (batch_size, length), generator=generator)
    return TokenBatch(tokens, loss_mask, document_ids, torch.arange(batch_size), torch.arange(batch_size))


def pairs_by_loop(batch: TokenBatch, steps: int, lookahead: int, keep: torch.Tensor | None = None) -> list[tuple[int, int, int]]:
    """(teacher, state, step) of every supervised pair, in teacher order, then by step."""
    batch_size, length = batch.tokens.shape
    pairs = []
    for row in range(batch_size):
        for t in range(length):
            for k in range(steps):
                target = t + 1 + lookahead + k
                if target >= length or not batch.loss_mask[row, target]:
                    continue
                if batch.document_ids[row, t] != batch.document_ids[row, target] or batch.document_ids[row, t] < 0:
                    continue
                if keep is None or keep[row, t, k]:
                    pairs.append((row * length + target - 1, row * length + t, k))
    return sorted(pairs, key=lambda pair: (pair[0], pair[2]))


def as_pairs(targets: Targets) -> list[tuple[int, int, int]]:
    return list(zip(targets.teacher.tolist(), targets.state.tolist(), targets.step.tolist()))


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize(("batch_size", "length", "steps"), [(3, 31, 3), (1, 13, 5), (5, 17, 1), (2, 4, 7), (2, 2, 3), (3, 1, 2)])
def test_pairs_are_those_of_the_loop(batch_size, length, steps, lookahead):
    for seed in range(3):
        batch = make_batch(batch_size, length, seed)
        targets = align_targets(batch, steps, lookahead)
        expected = pairs_by_loop(batch, steps, lookahead)
        assert as_pairs(targets) == expected
        assert targets.counts.tolist() == [sum(pair[2] == k for pair in expected) for k in range(steps)]
        assert all(tensor.dtype == torch.int64 for tensor in (targets.teacher, targets.state, targets.step, targets.counts))


def test_a_familys_own_choice_of_pairs():
    batch = make_batch(3, 19, seed=5)
    keep = torch.rand(3, 19, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    assert as_pairs(align_targets(batch, 4, keep=keep)) == pairs_by_loop(batch, 4, 1, keep)


@pytest.mark.parametrize("what", ["masked", "padding", "one-token documents"])
def test_nothing_to_supervise(what):
    batch = make_batch(2, 11, seed=0)
    if what == "masked":
        batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
    elif what == "padding":
        batch = batch._replace(document_ids=torch.full_like(batch.document_ids, -1))
    else:
        batch = batch._replace(document_ids=torch.arange(22).view(2, 11))
    targets = align_targets(batch, 3)
    assert as_pairs(targets) == []
    assert targets.counts.tolist() == [0, 0, 0]


def test_every_target_of_full_text_is_used_once_a_step():
    length, steps = 29, 4
    batch = make_batch(2, length, seed=0)._replace(
        loss_mask=torch.ones(2, length, dtype=torch.bool), document_ids=torch.arange(2)[:, None].expand(2, length)
    )
    targets = align_targets(batch, steps)
    assert targets.counts.tolist() == [2 * (length - 2 - k) for k in range(steps)]
    assert bool((targets.teacher.diff() >= 0).all())


def test_targets_stay_on_the_host_beside_those_on_the_device():
    zeros = torch.zeros(1, 5, dtype=torch.int64)
    batch = TokenBatch(zeros, torch.ones(1, 5, dtype=torch.bool), zeros, zeros[:, 0], zeros[:, 0])
    targets = align_targets(batch, steps=2)
    moved = targets.to(torch.device("meta"))
    assert moved.host is targets and moved.counts is targets.counts
    assert moved.teacher.device.type == moved.state.device.type == moved.step.device.type == "meta"
