"""Counts of targets against a loop over documents; the file is speculators'."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from spectitan.data import token_counts
from spectitan.data.shards import Shards, ShardWriter
from spectitan.data.token_counts import count_targets, write_token_freq
from spectitan.errors import UserError
from spectitan.speculators.draft_vocabulary import most_frequent
from tests.unit.data_fixtures import documents_of, masks_of

VOCAB = 101


def make_shards(folder: Path, seed: int) -> Shards:
    folder.mkdir()
    generator = np.random.default_rng(seed)
    writer = ShardWriter(folder, VOCAB, shard_tokens=61)
    for number, length in enumerate([1, 2, 0, *generator.integers(1, 40, 57).tolist()]):
        ids = (generator.random(length) ** 3 * (VOCAB - 9)).astype(np.uint32)
        writer.add(ids, None if number % 3 else generator.random(length) < 0.5)
    writer.finish({})
    return Shards(folder)


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_counts_are_those_of_a_loop(tmp_path, monkeypatch, block):
    monkeypatch.setattr(token_counts, "_BLOCK_TOKENS", block)
    corpus = [make_shards(tmp_path / str(seed), seed) for seed in range(2)]
    expected = Counter()
    for shards in corpus:
        for ids, mask in zip(documents_of(shards), masks_of(shards)):
            expected.update(token for token, supervised in list(zip(ids, mask))[1:] if supervised)
    counts = count_targets(corpus, VOCAB)
    assert counts.dtype == np.int64 and counts.tolist() == [expected[token] for token in range(VOCAB)]
    write_token_freq(tmp_path / "new" / "token_freq.pt", counts)
    written = torch.load(tmp_path / "new" / "token_freq.pt", weights_only=True)
    assert written == expected and 0 < len(written) < VOCAB and {type(count) for count in written.values()} == {int}
    # A draft vocabulary from it: the highest counts, of equals the lowest ids.
    best = sorted(sorted(range(VOCAB), key=lambda token: (-expected[token], token))[:40])
    assert most_frequent(torch.from_numpy(counts), 40).tolist() == best


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "token_freq.pt").mkdir()
    with pytest.raises(UserError, match=r"prepare.token_freq = '.*token_freq.pt': Is a directory"):
        write_token_freq(tmp_path / "token_freq.pt", np.ones(3, np.int64))
    assert list(tmp_path.iterdir()) == [tmp_path / "token_freq.pt"]


def test_of_no_shards_there_is_nothing():
    assert count_targets([], 5).tolist() == [0] * 5
