"""Changes of the sources are noticed, and no file is read more often than that takes."""

import hashlib
import os
import random

import pytest

from spectitan.data import corpus, source_hash
from spectitan.data.corpus import tokenise_training
from spectitan.data.documents import Dataset
from spectitan.data.source_hash import Memory, SourceHash, content_hash
from tests.unit.data_fixtures import ByteTokenizer, documents_of, make_data, text, write_texts

TEXTS = {"a.txt": text(1), "b/c.txt": text(2, words=90), "d.txt": "", "e.txt": text(3)}


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(source_hash, "_known", {})


def settle(monkeypatch):
    monkeypatch.setattr(source_hash, "SETTLED_SECONDS", -1.0)


def reads_of(monkeypatch) -> list[str]:
    """What is read only to be hashed."""
    reads = []
    monkeypatch.setattr(corpus, "content_hash", lambda dataset: reads.append(dataset.name) or content_hash(dataset))
    return reads


def documents(data) -> list[list[int]]:
    ((_, shards),) = tokenise_training(data, ByteTokenizer())
    return documents_of(shards)


def expected(folder) -> list[list[int]]:
    contents = [(folder / "text" / name).read_text() for name in sorted(TEXTS)]
    return [ByteTokenizer().document(ByteTokenizer().encode(content)) for content in contents if content]


def change_one_byte(path) -> None:
    """The file keeps its size and its time stamp."""
    stat = path.stat()
    with path.open("r+b") as file:
        assert file.read(1) != b"7"
        file.seek(0)
        file.write(b"7")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_the_hash_is_of_paths_sizes_and_bytes_however_the_reader_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(source_hash, "_BLOCK_BYTES", 7)
    write_texts(tmp_path, TEXTS)
    dataset, whole = Dataset("x", tmp_path, tuple(sorted(TEXTS))), hashlib.blake2b(digest_size=16)
    for name in sorted(TEXTS):
        content = (tmp_path / name).read_bytes()
        whole.update(name.encode() + b"\0" + str(len(content)).encode() + b"\0" + content)
    assert content_hash(dataset) == whole.hexdigest()
    for seed in range(5):
        source = SourceHash(dataset)
        for position in sorted(random.Random(seed).choices(range(2 * dataset.num_bytes()), k=seed)):
            source.advance(position)
            assert source._read >= min(position, dataset.num_bytes()) and source._read < position + 7 + 7 * (position == 0)
        assert source.finish() == whole.hexdigest()


@pytest.mark.parametrize("settled", [False, True])
def test_a_changed_byte_at_the_same_size_and_time_stamp_is_noticed(tmp_path, monkeypatch, settled):
    if settled:
        settle(monkeypatch)
    write_texts(tmp_path / "text", TEXTS)
    data = make_data(tmp_path)
    assert documents(data) == expected(tmp_path)
    change_one_byte(tmp_path / "text" / "b" / "c.txt")
    assert documents(data) == expected(tmp_path)


def test_it_is_noticed_by_the_next_process_also_where_the_file_system_says_nothing_of_it(tmp_path, monkeypatch):
    settle(monkeypatch)
    monkeypatch.setattr(source_hash, "_version", lambda dataset: "always the same")
    write_texts(tmp_path / "text", TEXTS)
    before = documents(make_data(tmp_path))
    change_one_byte(tmp_path / "text" / "a.txt")
    source_hash._known.clear()
    assert documents(make_data(tmp_path)) == expected(tmp_path) != before


def test_stat_goes_by_size_and_time_stamp(tmp_path, monkeypatch):
    settle(monkeypatch)
    write_texts(tmp_path / "text", TEXTS)
    data, reads = make_data(tmp_path, verify="stat"), reads_of(monkeypatch)
    before = documents(data)
    change_one_byte(tmp_path / "text" / "a.txt")
    assert documents(data) == before and not reads, "nothing but sizes and time stamps was looked at"
    os.utime(tmp_path / "text" / "a.txt", ns=(0, 10**18))
    assert documents(data) == expected(tmp_path) != before and len(reads) == 1
    (tmp_path / "text" / "a.txt").write_text(TEXTS["a.txt"])
    assert documents(data) == before, "the shards of both versions are kept"


def test_files_that_have_just_been_written_are_not_remembered(tmp_path, monkeypatch):
    write_texts(tmp_path / "text", TEXTS)
    data, reads = make_data(tmp_path, verify="stat"), reads_of(monkeypatch)
    for _ in range(3):
        documents(data)
    assert len(reads) == 2 and not source_hash._known and not list((tmp_path / "cache").glob("sources-*"))
    settle(monkeypatch)
    for _ in range(3):
        documents(data)
    assert len(reads) == 3
    dataset = Dataset(str(tmp_path / "text"), tmp_path / "text", tuple(sorted(TEXTS)))
    assert Memory(dataset, tmp_path / "cache").recall() == content_hash(dataset)


def test_sources_are_hashed_while_they_are_tokenised_and_once_in_a_process(tmp_path, monkeypatch):
    settle(monkeypatch)
    write_texts(tmp_path / "text", TEXTS)
    reads, made = reads_of(monkeypatch), []
    monkeypatch.setattr(corpus, "SourceHash", lambda dataset: made.append(SourceHash(dataset)) or made[-1])
    monkeypatch.setattr(source_hash, "SourceHash", lambda dataset: made.append(SourceHash(dataset)) or made[-1])
    data = make_data(tmp_path)
    documents(data)
    assert not reads and len(made) == 1
    documents(data)
    documents(make_data(tmp_path, holdout=0.3))
    assert len(reads) == 1 and len(made) == 2, "of another part of them as it is tokenised; else it is known"
    source_hash._known.clear()
    documents(data)
    assert len(made) == 3, "another process reads them"


@pytest.mark.parametrize("verify", ["content", "stat"])
def test_a_cache_that_cannot_be_written_is_read(tmp_path, monkeypatch, verify):
    write_texts(tmp_path / "text", TEXTS)
    data = make_data(tmp_path, verify=verify)
    documents(data)
    settle(monkeypatch)

    def refuse(path, **keys):
        raise PermissionError(13, "Read-only file system", str(path))

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    assert documents(data) == expected(tmp_path)
