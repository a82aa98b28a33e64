"""Shards of hidden states: what is whole, what is still written, what a kill leaves, and many of them."""

import errno
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from spectitan.states import cache
from spectitan.states.cache_files import RECORD, DamagedCache, Shard, ShardWriter

TOKEN_BYTES = 6
TEXTS = [{"text": "a"}, {"text": "ß"}]


def states_of(sample: int) -> list[np.ndarray]:
    """Two arrays, together TOKEN_BYTES for each of sample + 1 tokens."""
    content = np.random.default_rng(sample).integers(0, 256, (sample + 1) * TOKEN_BYTES).astype(np.uint8)
    return np.split(content, [sample])


def add(writer: ShardWriter, sample: int) -> None:
    writer.add(sample % 2, sample, 2**63 + sample, sample + 1, states_of(sample))


def shards_in(folder) -> list[Shard]:
    return [Shard(index, TOKEN_BYTES) for index in sorted(folder.glob("*.index"))]


def assert_has(shard: Shard, records: np.ndarray, samples: list[int]) -> None:
    assert records["sample"].tolist() == samples and shard.texts == TEXTS
    for record, sample in zip(records, samples):
        assert (record["text"], record["tokens"], record["ids"]) == (sample % 2, sample + 1, 2**63 + sample)
        assert np.array_equal(shard.read(record), np.concatenate(states_of(sample)))


def test_a_shard_is_read_while_it_grows(tmp_path):
    writer = ShardWriter(tmp_path, TEXTS)
    assert not list(tmp_path.iterdir())
    add(writer, 0)
    (shard,) = shards_in(tmp_path)
    assert_has(shard, shard.follow(), [0])
    assert len(shard.follow()) == 0
    for sample in (5, 3):
        add(writer, sample)
    assert_has(shard, shard.follow(), [5, 3])
    assert not shard.is_whole
    writer.finish()
    assert len(shard.follow()) == 0 and shard.is_whole
    (again,) = shards_in(tmp_path)
    assert_has(again, again.follow(), [0, 5, 3])
    assert again.is_whole


def test_what_a_kill_leaves(tmp_path):
    """Half a record, or a record whose states the disk has lost, is not there."""
    writer = ShardWriter(tmp_path, TEXTS)
    for sample in (4, 7):
        add(writer, sample)
    (shard,) = shards_in(tmp_path)
    with shard.index.open("ab") as file:
        file.write(b"\1" * (RECORD.itemsize - 1))
    assert_has(shard, shard.follow(), [4, 7])
    os.truncate(shard.states, shard.states.stat().st_size - 1)
    (shard,) = shards_in(tmp_path)
    assert_has(shard, shard.follow(), [4])


def test_a_first_line_that_is_still_to_come(tmp_path):
    index = tmp_path / "x.index"
    for content, begun in ((b"", False), (b'{"texts"', False), (b'{"texts": []}\n', True)):
        index.write_bytes(content)
        assert Shard.has_begun(index) == begun


def test_a_file_that_cannot_be_opened(tmp_path, monkeypatch):
    """No descriptor is left for the index: nothing stays, and the writer ends."""
    writer, whole = ShardWriter(tmp_path, TEXTS, shard_bytes=1), Path.open
    add(writer, 0)

    def no_index(path, *mode, **keys):
        if path.suffix == ".index":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return whole(path, *mode, **keys)

    with monkeypatch.context() as full:
        full.setattr(Path, "open", no_index)
        with pytest.raises(OSError):
            add(writer, 1)
        writer.finish()
    add(writer, 2)
    writer.finish()
    assert [shard.follow()["sample"].tolist() for shard in shards_in(tmp_path)] == [[0], [2]]
    assert len(list(tmp_path.glob("*.states"))) == 2


@pytest.mark.parametrize("gone", [".index", ".states"])
@pytest.mark.parametrize("known", [False, True])
def test_a_shard_that_is_discarded_while_another_process_looks(tmp_path, monkeypatch, gone, known):
    """What it had is there no more; a shard that is whole may not go."""
    writers = [ShardWriter(tmp_path, TEXTS) for _ in range(2)]
    for sample, writer in enumerate(writers):
        add(writer, sample)
    writers[0].finish()
    (index,) = (file for file in tmp_path.glob("*.index") if not file.with_suffix(".json").exists())
    listed = sorted(tmp_path.glob("*.index"))
    made = cache.StatesCache(tmp_path, "base", (-1,), 3, "bfloat16") if known else None
    index.with_suffix(gone).unlink()
    monkeypatch.setattr(Path, "glob", lambda *_: listed)
    made = made or cache.StatesCache(tmp_path, "base", (-1,), 3, "bfloat16")
    made.refresh()
    assert len(made) == 1
    (whole,) = (file for file in listed if file != index)
    whole.with_suffix(".states").unlink()
    with pytest.raises(DamagedCache, match=r"\.states: it is gone; remove "):
        cache.StatesCache(tmp_path, "base", (-1,), 3, "bfloat16")


def test_what_is_looked_for_is_not_taken_for_what_is_there(tmp_path):
    made = cache.StatesCache(tmp_path, "base", (-1,), 3, "bfloat16")
    assert made.find(SimpleNamespace(identity={"text": "mine"}), 0) is None and made.texts == []


def test_shards_are_begun_anew(tmp_path):
    writer = ShardWriter(tmp_path, TEXTS, shard_bytes=50)
    for sample in range(13):
        add(writer, sample)
    writer.finish()
    found = []
    for shard in shards_in(tmp_path):
        found += shard.follow()["sample"].tolist()
        assert shard.is_whole
    assert found == list(range(13)) and len(shards_in(tmp_path)) > 5


@pytest.mark.parametrize("room", [10, 100, 200, 230])
def test_a_full_disk_leaves_what_was_there(tmp_path, room):
    """A file may not grow beyond a limit: the same as a full disk. Nothing of the sample that does not fit stays."""
    writer, added = ShardWriter(tmp_path, TEXTS), 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError):
            for sample in range(20):
                add(writer, sample)
                added += 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    add(writer, 2)  # there is room again
    writer.finish()
    found = [sample for shard in shards_in(tmp_path) for sample in shard.follow()["sample"].tolist()]
    assert found == [*range(added), 2] and all(shard.follow() is not None and shard.is_whole for shard in shards_in(tmp_path))
    assert (added > 0) == (room > 10)


def test_nothing_added_leaves_nothing(tmp_path):
    ShardWriter(tmp_path, TEXTS).finish()
    assert not list(tmp_path.iterdir())


def test_altered_states_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, TEXTS)
    for sample in range(4):
        add(writer, sample)
    writer.finish()
    (shard,) = shards_in(tmp_path)
    content = bytearray(shard.states.read_bytes())
    content[3 * TOKEN_BYTES] ^= 4  # of sample 2, after samples of one token and of two
    shard.states.write_bytes(content)
    records = shard.follow()
    assert_has(shard, records[:2], [0, 1])
    with pytest.raises(DamagedCache, match=r"\.states: the states of sample 2 \(byte 18\).*remove .*\.\*"):
        shard.read(records[2])


def test_more_shards_than_descriptors(tmp_path, monkeypatch):
    """Only a few stay mapped."""
    monkeypatch.setattr(cache, "_MAPPED", 3)
    writer = ShardWriter(tmp_path, TEXTS, shard_bytes=1)
    for sample in range(20):
        add(writer, sample)
    made = cache.StatesCache(tmp_path, "base", (-1,), 3, "bfloat16")
    assert len(made) == 20
    before = len(os.listdir("/proc/self/fd"))
    for place in [*made._places.values()] * 2:
        made._limit_maps(place.shard)
        assert np.array_equal(place.shard.read(place.record), np.concatenate(states_of(int(place.record["sample"]))))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
