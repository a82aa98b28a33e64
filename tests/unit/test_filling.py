"""Filling a cache ahead of training: all is on the disk when it ends well, ranks fail together, and it fills what the run reads."""

import errno
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spectitan import filling
from spectitan.distributed import utils
from spectitan.errors import UserError
from spectitan.filling import fill_all
from spectitan.states import cache_files
from spectitan.states.cache import StatesCache
from spectitan.states.cached import CachedStates
from spectitan.types import BaseStates, TokenBatch

DATASET = SimpleNamespace(identity={"text": "a"})
SIZE = 6


class Base:
    """States that are a function of the sample."""

    def begin(self, batch: TokenBatch) -> TokenBatch:
        return batch

    def states(self, batch: TokenBatch) -> BaseStates:
        states = batch.sample_ids[:, None, None] + torch.zeros(*batch.tokens.shape, SIZE)
        return BaseStates(states, (states + 0.5,))


def batch_of(*samples: int) -> TokenBatch:
    tokens = torch.zeros(len(samples), 5, dtype=torch.int64)
    return TokenBatch(tokens, tokens == 0, tokens, torch.tensor(samples), torch.tensor(samples))


def new_source(folder: Path, **changes) -> CachedStates:
    store = StatesCache(folder, "base", (1, -1), SIZE, "float32")
    keys = {"online": Base(), "keep": True} | changes
    return CachedStates(store, [DATASET], (1,), None, torch.float32, torch.device("cpu"), **keys)


def fail(monkeypatch, name: str, after: int) -> None:
    """So many calls go well, slowly; then the disk is full."""
    original, calls = getattr(cache_files, name), []

    def call(*given):
        time.sleep(0.05)
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*given)

    monkeypatch.setattr(cache_files, name, call)


def test_all_is_there_when_it_ends_well(tmp_path):
    fill_all(new_source(tmp_path), [batch_of(0, 1), batch_of(2, 3)])
    again = new_source(tmp_path, online=None, keep=False)
    batch = batch_of(3, 1, 0, 2)
    ours, theirs = again.states(again.begin(batch)), Base().states(batch)
    assert torch.equal(ours.final, theirs.final) and torch.equal(ours.taps[0], theirs.taps[0])
    again.close()
    assert again.store.count(DATASET) == 4 and again.store.count(SimpleNamespace(identity={"text": "b"})) == 0


def test_the_last_sample_that_is_not_written_is_an_error(tmp_path, monkeypatch):
    """Writing goes on beside the base's work: the last of it is waited for."""
    fail(monkeypatch, "_write", after=1 + 2 * 3)
    with pytest.raises(UserError, match=f"{tmp_path}: No space left on device; what was written stays"):
        fill_all(new_source(tmp_path), [batch_of(0, 1), batch_of(2, 3)])
    assert len(StatesCache(tmp_path, "base", (1, -1), SIZE, "float32")) == 3


def test_what_may_not_be_on_the_disk_is_an_error(tmp_path, monkeypatch):
    fail(monkeypatch, "sync", after=0)
    with pytest.raises(OSError, match="No space left on device"):
        fill_all(new_source(tmp_path), [batch_of(0, 1)])


def test_counts_are_of_all_that_was_begun(tmp_path, monkeypatch):
    """The writer's thread is behind."""
    fail(monkeypatch, "_write", after=99)
    source = new_source(tmp_path)
    for first in (0, 2):
        source.fill(batch_of(first, first + 1))
        assert source.take_counts() == {"cached": 0, "generated": 2, "kept": 2, "skipped": 0}
    source.close()


@pytest.mark.parametrize("online", [Base(), None])
def test_memory_is_of_a_few_micro_batches(tmp_path, online):
    """However many a step has; what is read is right for each of them."""
    fill_all(new_source(tmp_path), [batch_of(*range(first, first + 3)) for first in range(0, 39, 3)])
    source = new_source(tmp_path, online=online, keep=False)
    for _ in range(2):
        batches = [batch_of(first, (first * 5) % 39, first + 2) for first in range(37)]
        if online:
            batches[7] = batches[20] = batch_of(3, 99, 4)  # which is not there
        begun = [source.begin(batch) for batch in batches]
        made = set()
        for batch in begun:
            states = source.states(batch)
            expected = Base().states(batch)
            assert torch.equal(states.final, expected.final) and torch.equal(states.taps[0], expected.taps[0])
            reading = [begun.reading.buffer for begun in source._begun if begun.reading is not None]
            made |= {id(each) for each in source._reader._free + source._reader._used + reading}
        assert len(made) <= 3
    source.close()


def test_writing_holds_little_in_memory(tmp_path, monkeypatch):
    fail(monkeypatch, "_write", after=99)
    source, pending = new_source(tmp_path), []
    batches = [source.begin(batch_of(sample)) for sample in range(7)]
    for batch in batches:
        source.states(batch)
        pending.append(sum(not write.done() for write in source.adder._writing))
    assert max(pending) <= 2
    source.close()
    assert len(StatesCache(tmp_path, "base", (1, -1), SIZE, "float32")) == 7


class Failure(UserError):
    """Of another rank."""


@pytest.mark.parametrize("online", [Base(), None])
def test_what_fails_on_another_rank_fails_here(tmp_path, monkeypatch, online):
    """No rank is left waiting for another one's answer."""
    fill_all(new_source(tmp_path), [batch_of(0, 1)])
    source = new_source(tmp_path, online=online, keep=False)
    source.begin(batch_of(0, 1))
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    monkeypatch.setattr(utils, "gather", lambda value: [value, (None, Failure("theirs"))])
    with pytest.raises(Failure, match="theirs"):
        source.begin(batch_of(0, 1))
    source.close()


def test_what_fails_here_is_told_to_other_ranks(tmp_path, monkeypatch):
    told = []
    fill_all(new_source(tmp_path), [batch_of(0, 1)])
    source = new_source(tmp_path, online=None, keep=False)
    monkeypatch.setattr(utils, "world_size", lambda: 2)
    monkeypatch.setattr(utils, "gather", lambda value: told.append(value) or [(False, None), value])
    source.begin(batch_of(0, 1))
    with pytest.raises(UserError, match="no hidden states of sample 7 of dataset 0"):
        source.begin(batch_of(0, 7))
    assert told[0] == (False, None) and isinstance(told[1][1], UserError)
    source.close()


@pytest.mark.parametrize(
    "num_steps, epochs, batch, weights, samples",
    [
        (2, -1, 4, [], 8),
        (5, -1, 4, [], 11),
        (5, -1, 4, [1, 2], 20),
        (-1, 0.5, 4, [], 8),  # 1.4 steps: 2
        (-1, 0.5, 4, [1, 2], 8),
        (-1, 1, 4, [1, 2], 12),
        (-1, 3, 4, [], 11),
        (-1, 2, -1, [], 11),
        (-1, -1, -1, [], 11),
    ],
)
def test_samples_that_a_run_reads(num_steps, epochs, batch, weights, samples):
    training = SimpleNamespace(num_steps=num_steps, epochs=epochs, global_batch_size=batch)
    config = SimpleNamespace(training=training, data=SimpleNamespace(weights=weights))
    assert filling._samples(config, SimpleNamespace(samples_per_epoch=11)) == samples


@pytest.mark.parametrize("samples, distinct, there, expected", [(8, 11, 0, 8), (100, 11, 0, 11), (8, 11, 3, 5), (8, 11, 11, 0)])
def test_room_is_needed_for_what_is_not_there(samples, distinct, there, expected):
    assert filling._to_add(samples, distinct, there) == expected


def test_files_that_go_while_they_are_counted(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    listed = [tmp_path / "a", tmp_path / "gone.tmp"]
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed))
    assert filling._size(tmp_path) == 5
