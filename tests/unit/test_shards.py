"""Shards hold every document once, are written whole or not at all, and hold no evaluation prompt."""

import errno
import fcntl
import importlib
import json
import logging
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spectitan.data import encoding, source_hash
from spectitan.data.corpus import tokenise_held_out, tokenise_training
from spectitan.data.meta import BrokenFolder
from spectitan.data.overlap import PromptWindows, count_overlap
from spectitan.data.prompts import load_prompts
from spectitan.data.shards import Shards, ShardWriter
from spectitan.data.tokenizer import load_tokenizer
from spectitan.errors import StopRequested, UserError
from tests.unit.data_fixtures import ByteTokenizer, documents_of, make_data, masks_of, text, tokenizer_folder, write_texts

# A server that has imported everything forks the processes of these tests: they start at once and share nothing with pytest.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["spectitan.train", "spectitan.evaluate", "spectitan.data"])


def start(target, *arguments):
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def flip_a_bit(path: Path) -> None:
    """Of a number; the file keeps its length."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"}") - 20 if path.suffix == ".json" else -2] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))  # another than that of a write in the same tick of the clock


# ---- the files ----


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_what_is_written_is_read(tmp_path, vocab_size, itemsize):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, size).astype(np.uint32) for size in generator.integers(1, 40, 101)]
    documents[5][0] = vocab_size - 1
    writer = ShardWriter(tmp_path, vocab_size, shard_tokens=97)
    for document in documents:
        writer.add(document)
    writer.finish({"anything": [1]})
    shards = Shards(tmp_path)
    assert shards.meta["anything"] == [1] and shards.meta["tokens"] == shards.num_tokens == sum(map(len, documents))
    assert len(shards.tokens) > 10 and all(tokens.itemsize == itemsize for tokens in shards.tokens)
    for opened in (shards, pickle.loads(pickle.dumps(shards))):
        assert documents_of(opened) == [document.tolist() for document in documents]
    assert len(pickle.dumps(shards)) < 500, "a worker gets the folder, not the ids"
    # The fixed order has each document once, and the stream is their lengths in that order.
    assert sorted(shards.order) == list(range(101)) and (shards.order[:-1] != shards.order[1:] - 1).sum() > 90
    assert (np.diff(shards.stream) == [len(documents[i]) for i in shards.order]).all() and shards.stream[0] == 0


def test_masks_are_kept_as_bits_beside_the_ids_that_have_one(tmp_path):
    generator = np.random.default_rng(3)
    lengths = generator.integers(1, 40, 101)
    # The first files have no mask, some begin without one, and then every third document has none.
    masks = [None if i < 20 or i % 3 == 0 else generator.random(length) < 0.5 for i, length in enumerate(lengths)]
    writer = ShardWriter(tmp_path, 300, shard_tokens=97)
    for length, mask in zip(lengths, masks):
        writer.add(np.arange(length, dtype=np.uint32), mask)
    writer.finish({})
    shards = Shards(tmp_path)
    expected = [[True] * length if mask is None else mask.tolist() for length, mask in zip(lengths, masks)]
    assert masks_of(shards) == expected and shards.masked
    assert shards.meta["supervised"] == sum(map(sum, expected))
    flat, ends = sum(expected, []), np.cumsum([0] + [len(tokens) for tokens in shards.tokens])
    for begin, end in generator.integers(0, len(flat), (200, 2)).tolist():
        end = min(end, int(ends[np.searchsorted(ends, begin, side="right")]))  # a read stays in one file
        if begin < end:
            assert np.broadcast_to(shards.read_mask(begin, end), end - begin).tolist() == flat[begin:end]
    names = {path.name for path in tmp_path.iterdir()}
    assert "masks-00000.bin" not in names and "masks-00010.bin" in names
    sizes = [(path.stat().st_size, len(shards.tokens[int(path.name[6:11])])) for path in tmp_path.glob("masks-*")]
    assert all(size == -(-tokens // 8) for size, tokens in sizes)
    (tmp_path / "masks-00010.bin").unlink()
    with pytest.raises(BrokenFolder):
        Shards(tmp_path)


def test_shards_without_masks_supervise_every_id(tmp_path):
    writer = ShardWriter(tmp_path, 300)
    writer.add(np.arange(50, dtype=np.uint32))
    writer.finish({})
    shards = Shards(tmp_path)
    assert not shards.masked and shards.read_mask(3, 9) is True and shards.meta["supervised"] == 50
    assert not list(tmp_path.glob("masks-*"))


def test_indexes_are_made_in_parts(tmp_path, monkeypatch):
    for folder, rows in (("parts", 4), ("whole", 2**20)):
        monkeypatch.setattr("spectitan.data.shards._INDEX_ROWS", rows)
        (tmp_path / folder).mkdir()
        writer = ShardWriter(tmp_path / folder, 300)
        for size in range(1, 18):
            writer.add(np.arange(size, dtype=np.uint32))
        writer.finish({})
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncate", "remove", "meta", "pickle"])
def test_damaged_shards_are_noticed(tmp_path, damage):
    writer = ShardWriter(tmp_path, 300)
    writer.add(np.arange(50, dtype=np.uint32))
    writer.finish({})
    if damage == "truncate":
        os.truncate(tmp_path / "tokens-00000.bin", 98)
    elif damage == "remove":
        (tmp_path / "order.npy").unlink()
    elif damage == "meta":
        (tmp_path / "meta.json").write_text('{"files": ')
    else:
        np.save(tmp_path / "order.npy", np.array([{}], dtype=object), allow_pickle=True)
        meta = json.loads((tmp_path / "meta.json").read_text())
        meta["files"]["order.npy"] = (tmp_path / "order.npy").stat().st_size
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(BrokenFolder):
        Shards(tmp_path)


# ---- from text to shards ----


def tokenised(data, tokenizer) -> Shards:
    ((_, shards),) = tokenise_training(data, tokenizer)
    return shards


@pytest.mark.parametrize(("bos_id", "eos_id"), [(None, None), (1, 0)])
def test_documents_are_tokenised_in_order_with_bos_and_eos(tmp_path, monkeypatch, bos_id, eos_id):
    monkeypatch.setattr(encoding, "CHUNK_CHARACTERS", 300)
    texts = [text(i, words=i % 50) for i in range(60)] + ["", "x", "\n"]
    write_texts(tmp_path / "text", {f"{i:03}.txt": content for i, content in enumerate(texts[:30])})
    write_texts(tmp_path / "text", {"1.jsonl": "".join(json.dumps({"text": content}) + "\n" for content in texts[30:])})
    tokenizer = ByteTokenizer(bos_id, eos_id)
    shards = tokenised(make_data(tmp_path, tokenizer_threads=3), tokenizer)
    expected = [tokenizer.document(tokenizer.encode(content)) for content in [*texts[:30], *texts[30:]] if len(content) > 1]
    by_file = expected[:30] + expected[30:]
    # Files in the order of their names: 000.txt, 001.txt, ..., then 1.jsonl.
    assert documents_of(shards) == by_file
    assert shards.meta["dropped"] == {"empty": 1, "one token": 2}
    assert shards.meta["bytes"] == sum(len(content.encode()) for content in texts) - 2


def test_a_real_tokenizer_gives_the_same_ids_on_any_number_of_threads(tmp_path):
    write_texts(tmp_path / "text", {f"{i}.txt": text(i) for i in range(50)})
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "tokenizer"))
    one, three = (tokenised(make_data(tmp_path, tokenizer_threads=n, cache_dir=str(tmp_path / str(n))), tokenizer) for n in (1, 3))
    assert contents(one.folder) == contents(three.folder)
    names = sorted(f"{i}.txt" for i in range(50))
    ids = [tokenizer.encode((tmp_path / "text" / name).read_text()) for name in names]
    assert documents_of(one) == ids
    assert "TOKENIZERS_PARALLELISM" not in os.environ


# ---- the cache ----


class CountingTokenizer(ByteTokenizer):
    calls = 0

    def encode_batch(self, texts):
        type(self).calls += 1
        return super().encode_batch(texts)


def test_the_cache_is_keyed_by_what_decides_the_ids(tmp_path):
    write_texts(tmp_path / "text", {f"{i}.txt": text(i) for i in range(20)})
    tokenizer = CountingTokenizer()

    def makes_new(**keys):
        before = CountingTokenizer.calls
        tokenised(make_data(tmp_path, **keys), tokenizer)
        return CountingTokenizer.calls > before

    assert makes_new()
    assert not makes_new(seq_length=99, loader_workers=2, tokenizer_threads=1)
    assert makes_new(holdout=0.3)
    (tmp_path / "text" / "3.txt").write_text(text(3).replace("x", "y", 1))
    assert makes_new(), "a changed file of the same size"
    (tmp_path / "text" / "3.txt").write_text(text(3))
    assert not makes_new(), "the content is what counts, not the time"
    (tmp_path / "text" / "3.txt").rename(tmp_path / "text" / "30.txt")
    assert makes_new()
    tokenizer.fingerprint = "another"
    assert makes_new()


def test_a_damaged_cache_is_made_again(tmp_path, caplog):
    write_texts(tmp_path / "text", {f"{i}.txt": text(i) for i in range(9)})
    shards = tokenised(make_data(tmp_path), ByteTokenizer())
    before = contents(shards.folder)
    os.truncate(shards.token_files[0], 10)
    assert contents(tokenised(make_data(tmp_path), ByteTokenizer()).folder) == before
    assert "broken" in caplog.text


@pytest.mark.parametrize("name", ["tokens-00000.bin", "masks-00000.bin", "offsets.npy", "order.npy", "stream.npy", "meta.json"])
def test_a_flipped_bit_in_the_cache_is_found_where_content_is_verified(tmp_path, caplog, name):
    rows = [json.dumps({"question": text(i), "answer": text(i + 50)}) for i in range(9)]
    write_texts(tmp_path / "text", {"rows.jsonl": "\n".join(rows)})
    folder = tokenised(make_data(tmp_path), ByteTokenizer()).folder
    before = contents(folder)
    flip_a_bit(folder / name)
    assert contents(tokenised(make_data(tmp_path, verify="stat"), ByteTokenizer()).folder) != before
    assert contents(tokenised(make_data(tmp_path), ByteTokenizer()).folder) == before and f"{name}: not as it was written" in caplog.text


def test_datasets_without_documents(tmp_path):
    write_texts(tmp_path / "text", {"a.txt": "", "b.txt": "x"})
    with pytest.raises(UserError, match="empty dataset, no training document in it; its documents: 1 empty, 1 one token"):
        tokenise_training(make_data(tmp_path), ByteTokenizer())
    write_texts(tmp_path / "text", {"c.txt": text(1)})
    with pytest.raises(UserError, match=r"no held-out document in it; its documents: 3 not held out \(data.holdout = 1e-06\)"):
        tokenise_held_out(make_data(tmp_path, holdout=1e-6), ByteTokenizer())
    assert not list((tmp_path / "cache").glob("*.tmp"))


# ---- accidents ----


class AccidentTokenizer(ByteTokenizer):
    """Calls `accident` at its third batch."""

    def __init__(self, accident):
        super().__init__()
        self.accident, self.calls = accident, 0

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == 3:
            self.accident()
        return super().encode_batch(texts)


def many_chunks(tmp_path):
    texts = {f"{i}.txt": text(i) * 1000 for i in range(8)}
    assert min(map(len, texts.values())) > encoding.CHUNK_CHARACTERS / 2  # so each is a chunk
    write_texts(tmp_path / "text", texts)
    return make_data(tmp_path, tokenizer_threads=2)


def clean_run(tmp_path):
    """The files of a cache in which nothing has ever gone wrong."""
    tokenised(make_data(tmp_path, cache_dir=str(tmp_path / "clean")), ByteTokenizer())
    return contents(tmp_path / "clean")


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(data, place, call):
    """Killed when the function at a place is called for the nth time; the sources have settled."""
    source_hash.SETTLED_SECONDS = -1.0
    module, _, path = place.partition(":")
    owner, _, name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
    original, calls = getattr(owner, name), []

    def accident(*arguments, **keys):
        calls.append(1)
        if len(calls) == call:
            kill_this_process()
        return original(*arguments, **keys)

    setattr(owner, name, accident)
    tokenise_training(data, ByteTokenizer())


PLACES = [
    ("secrets:token_hex", 1),  # the lock is there and nothing else
    ("spectitan.data.shards:ShardWriter.add", 5),
    ("spectitan.data.shards:_write_npy", 2),
    ("spectitan.data.meta:sync", 3),
    ("pathlib:Path.touch", 1),  # all but what is remembered of the sources
    ("pathlib:Path.rename", 1),  # all is written
    ("spectitan.data.shards:Shards.__init__", 1),  # all is there
]


@pytest.mark.parametrize(("place", "call"), PLACES)
def test_a_killed_run_leaves_what_the_next_makes_into_the_cache_of_a_clean_run(tmp_path, monkeypatch, place, call):
    data = many_chunks(tmp_path)
    monkeypatch.setattr(source_hash, "SETTLED_SECONDS", -1.0)
    process = start(die_at, data, place, call)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    shards = tokenised(data, ByteTokenizer())
    assert contents(shards.folder.parent) == clean_run(tmp_path)


def kill_in(seconds):
    timer = threading.Timer(seconds, kill_this_process)
    timer.daemon = True
    timer.start()


WAITS = "waiting for another process that does it"


def tokenise_slowly(data, log, life=None, others=0):
    """Says in the log what it does, after so many others have said that they wait. With a life, it is killed after so many seconds."""
    logging.basicConfig(filename=log, level=logging.INFO, format=f"{os.getpid()} %(message)s", force=True)
    if life is not None:
        kill_in(life)

    class SlowTokenizer(ByteTokenizer):
        def encode_batch(self, texts):
            time.sleep(0.02)
            while log.read_text().count(WAITS) < others:
                time.sleep(0.005)
            logging.info("tokenising texts")
            return super().encode_batch(texts)

    ((_, shards),) = tokenise_training(data, SlowTokenizer())
    assert len(shards.order) == 8


def test_of_several_processes_one_tokenises_and_the_others_wait(tmp_path):
    data = many_chunks(tmp_path)
    together = [start(tokenise_slowly, data, tmp_path / "log", None, 2) for _ in range(3)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0, 0]
    lines = [line.split(" ", 1) for line in (tmp_path / "log").read_text().splitlines()]
    (writer,) = {pid for pid, line in lines if line == "tokenising texts"}
    waiting = {pid for pid, line in lines if WAITS in line}
    assert waiting == {str(process.pid) for process in together} - {writer}
    assert contents(tmp_path / "cache") == clean_run(tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_runs_killed_at_random_times_leave_the_cache_of_a_clean_run(tmp_path, seed):
    """One process after another is killed at random times, while another waits for the same; the last one lives."""
    data = many_chunks(tmp_path)
    generator = np.random.default_rng(seed)
    together = [start(tokenise_slowly, data, tmp_path / "log", life) for life in generator.uniform(0.0, 0.25, 3)]
    together.append(start(tokenise_slowly, data, tmp_path / "log"))
    for process in together:
        process.join()
    assert together[-1].exitcode == 0 and {process.exitcode for process in together[:3]} <= {0, -signal.SIGKILL}
    assert contents(tmp_path / "cache") == clean_run(tmp_path)


def test_what_a_killed_run_of_other_keys_has_begun_is_removed_and_nothing_that_is_at_work(tmp_path):
    data = many_chunks(tmp_path)
    process = start(die_at, data, "spectitan.data.shards:ShardWriter.add", 5)
    process.join()
    working = tmp_path / "cache" / "alive.0.tmp"
    working.mkdir()
    begun = set((tmp_path / "cache").glob("*.tmp")) - {working}
    with working.with_name("alive.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tokenised(make_data(tmp_path, holdout=0.1), ByteTokenizer())
    assert len(begun) == 1 and list((tmp_path / "cache").glob("*.tmp")) == [working]


def test_without_locks_two_processes_that_write_the_same_disturb_none(tmp_path, monkeypatch, caplog):
    data, other = many_chunks(tmp_path), []

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    def meanwhile():
        other.append(tokenised(data, ByteTokenizer()).folder.stat().st_ino)

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = tokenised(data, AccidentTokenizer(meanwhile)).folder
    assert other == [folder.stat().st_ino], "what is in use is not replaced"
    assert "this file system has no locks (No locks available)" in caplog.text
    assert contents(tmp_path / "cache") == clean_run(tmp_path)


def test_a_stop_request_leaves_nothing_behind(tmp_path):
    data = many_chunks(tmp_path)

    def stop(number, frame):
        raise StopRequested(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(StopRequested):
            tokenise_training(data, AccidentTokenizer(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not list((tmp_path / "cache").glob("*.tmp")) and "TOKENIZERS_PARALLELISM" not in os.environ
    tokenised(data, ByteTokenizer())
    assert contents(tmp_path / "cache") == clean_run(tmp_path)


def fill_the_disk(data, report):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # a file may not grow beyond: the same as a full disk
    try:
        tokenise_training(data, ByteTokenizer())
    except OSError as error:
        Path(report).write_text(f"{error.errno} {error.filename} {error.strerror}")


def test_a_full_disk_names_the_cache_and_leaves_all_as_it_was(tmp_path):
    write_texts(tmp_path / "few", {"a.txt": text(1)})
    tokenised(make_data(tmp_path, path=str(tmp_path / "few")), ByteTokenizer())
    before = contents(tmp_path / "cache")
    process = start(fill_the_disk, many_chunks(tmp_path), tmp_path / "report")
    process.join()
    assert process.exitcode == 0
    number, name, problem = (tmp_path / "report").read_text().split(" ", 2)
    assert (int(number), name) == (errno.EFBIG, str(tmp_path / "cache")) and "data.cache_dir" in problem and "\n" not in problem
    after = contents(tmp_path / "cache")
    assert {name: after[name] for name in before} == before
    assert [Path(name).suffix for name in after.keys() - before] == [".lock"] and not list((tmp_path / "cache").glob("*.tmp"))


def peak_memory(data, report):
    class ShortIds(ByteTokenizer):
        def encode_batch(self, texts):
            return [[3] * (len(content) // 50) for content in texts]

    tokenise_training(data, ShortIds())
    Path(report).write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for size in (100, 1200):
        folder = tmp_path / str(size)
        write_texts(folder / "text", {"lines.jsonl": (json.dumps({"text": "x" * 40_000}) + "\n") * size})
        process = start(peak_memory, make_data(folder, tokenizer_threads=2), tmp_path / "peak")
        process.join()
        assert process.exitcode == 0
        peaks.append(int((tmp_path / "peak").read_text()) * 1024)
    assert peaks[1] - peaks[0] < 8e6, "44 MB more text"


# ---- evaluation prompts ----


def windows(ids, length=64):
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}


def test_overlap_is_that_of_all_windows_of_64_tokens():
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, 2, size).tolist() for size in (10, 63, 64, 65, 300, 700)]
    prompts = [generator.integers(0, 2, size).tolist() for size in (63, 64, 100, 200)]
    documents += [[5] * 9 + prompts[2][11 : 11 + length] + [7] for length in (63, 64, 65)] + [prompts[0] * 2, [1] * 200]
    prompts.append([1] * 64)
    shared = set().union(*map(windows, prompts))
    overlapping = [bool(windows(document) & shared) for document in documents]
    assert overlapping[6:] == [False, True, True, False, True]
    found = PromptWindows(prompts)
    assert [found.overlap(np.array(document, np.uint32)) for document in documents] == overlapping
    assert not PromptWindows([]).overlap(np.arange(100))


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_the_check_of_finished_shards_counts_prompts(tmp_path, vocab_size):
    generator = np.random.default_rng(2)
    prompts = [generator.integers(0, 260, size).tolist() for size in (64, 64, 90, 127, 128, 200, 63, 300)]
    kept = [prompts[0], prompts[1][:63], prompts[2][26:], prompts[3][31:95]]
    kept += [prompts[4][1:], prompts[5][100:163], prompts[6], prompts[7][:64]]
    overlap = sum(len(part) >= 64 for part in kept)
    writer = ShardWriter(tmp_path, vocab_size, shard_tokens=300)
    for part in kept:
        writer.add(np.array([*generator.integers(0, 260, 41), *part, *generator.integers(0, 260, 3)], np.uint32))
    writer.finish({})
    assert count_overlap([Shards(tmp_path)], prompts) == overlap == 5
    assert count_overlap([Shards(tmp_path), Shards(tmp_path)], [prompts[1], [10**6] * 64]) == 0


def test_documents_with_a_prompt_in_them_are_dropped_and_counted(tmp_path):
    texts = {f"{i}.txt": text(i, words=90) for i in range(30)}
    write_texts(tmp_path / "text", texts)
    tokenizer = ByteTokenizer()
    prompts = [{"tokens": tokenizer.encode(texts["3.txt"])[20:90]}, {"text": texts["5.txt"][:80]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    data = make_data(tmp_path, drop_overlap=str(tmp_path / "prompts.jsonl"))
    ids = load_prompts(data.drop_overlap, tokenizer)
    shared = set().union(*map(windows, ids))
    overlapping = {name for name, content in texts.items() if windows(tokenizer.encode(content)) & shared}
    assert {"3.txt", "5.txt"} <= overlapping and len(overlapping) < 30
    shards = tokenised(data, tokenizer)
    assert shards.meta["dropped"] == {"prompt overlap": len(overlapping)} and len(shards.order) == 30 - len(overlapping)
    assert count_overlap([shards], ids) == 0
    assert count_overlap([tokenised(make_data(tmp_path), tokenizer)], ids) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ('{"tokens": [1, 2]}\n{"tokens": []}', ":2: not a prompt"),
        ('{"tokens": [1.5]}', ":1: not a prompt"),
        ('{"text": ""}', ":1: not a prompt"),
        (r'{"text": "a\ud800"}', ":1: 'text' has half of a surrogate pair"),
        ("[1, 2]", ":1: not a prompt"),
        ("{", ":1: not valid JSON"),
        ('{"tokens": [5, 258, -1]}', r":1: token id 258; this tokenizer's are 0 .. 257"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, content, message):
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_prompts(str(tmp_path / "prompts.jsonl"), ByteTokenizer())
    with pytest.raises(UserError, match="spectitan:nothing: prompts file .*No such file"):
        load_prompts("spectitan:nothing", ByteTokenizer())
