"""Batches: every token once an epoch, one global order on any number of ranks and workers, resumed from any sample at once."""

import gc
import json
import multiprocessing
import os
import resource
import subprocess
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch

from spectitan.config.sections import Data
from spectitan.data.corpus import tokenise_training
from spectitan.data.loader import Loader, build_loader, collate
from spectitan.data.order import Place
from spectitan.data.packing import packed
from spectitan.data.shards import Shards, ShardWriter
from spectitan.data.validation import build_validation
from spectitan.types import TokenBatch
from tests.unit.data_fixtures import ByteTokenizer, documents_of, make_data, text, write_texts
from tests.unit.test_shards import start

SEED = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """text/a of 23 files and text/b of 5."""
    folder = tmp_path_factory.mktemp("loader")
    write_texts(folder / "text", {f"a/{i}.txt": text(i, words=3 + i) for i in range(23)} | {f"b/{i}.txt": text(100 + i) for i in range(5)})
    return folder


def load(data, **keys) -> Loader:
    return build_loader(data, ByteTokenizer(), **({"seed": SEED, "global_batch_size": 1, "micro_batch_size": 1} | keys))


def rows(batches) -> list[tuple]:
    """One record a sample: everything that a batch says of it."""
    fields = ((*batch[:2], batch.document_ids >= 0, batch.index, batch.sample_ids) for batch in batches)
    return [tuple(np.asarray(part).tolist() for part in row) for batch in fields for row in zip(*batch)]


@pytest.mark.parametrize("seq_length", [2, 17, 64, 100_000])
def test_packing_is_the_documents_in_their_order_cut_every_seq_length(folder, seq_length):
    data = make_data(folder, seq_length=seq_length)
    ((_, shards),) = tokenise_training(data, ByteTokenizer())
    stream, owners = [], []
    for ordinal, document in enumerate(shards.order):
        ids = documents_of(shards)[document]
        stream += ids
        owners += [ordinal] * len(ids)
    samples = packed(shards, data, "text")
    assert len(samples) == -(-len(stream) // seq_length)
    for sample in range(len(samples)):
        tokens, documents = np.full((2, seq_length), 77)
        mask = np.zeros(seq_length, bool)
        samples.read_into(sample, tokens, documents, mask)
        unmasked = np.zeros_like(tokens), np.zeros_like(documents)
        samples.read_into(sample, *unmasked, None)
        assert (unmasked[0] == tokens).all() and (unmasked[1] == documents).all()
        expected = stream[sample * seq_length : (sample + 1) * seq_length]
        owner = owners[sample * seq_length : (sample + 1) * seq_length]
        padding = seq_length - len(expected)
        assert tokens.tolist() == expected + [0] * padding
        assert documents.tolist() == [document - owner[0] for document in owner] + [-1] * padding
        assert mask.tolist() == [True] * len(expected) + [False] * padding
        assert padding == 0 or sample == len(samples) - 1


@pytest.mark.parametrize("seq_length", [2, 17, 100_000])
def test_masks_are_packed_with_their_ids(tmp_path, seq_length):
    generator = np.random.default_rng(4)
    writer = ShardWriter(tmp_path, 300, shard_tokens=61)
    for length in generator.integers(1, 40, 37):
        ids = generator.integers(0, 150, length).astype(np.uint32)
        writer.add(2 * ids + 1, None) if length % 3 else writer.add(2 * ids, np.zeros(length, bool))  # an odd id is supervised
    writer.finish({})
    samples = packed(Shards(tmp_path), Data(seq_length=seq_length), "text")
    batch = collate([samples], [Place(0, sample) for sample in range(len(samples))], range(len(samples)), seq_length)
    assert torch.equal(batch.loss_mask, (batch.tokens % 2 == 1) & (batch.document_ids >= 0)) and (batch.tokens % 2).any()


def test_a_cache_of_before_there_were_masks_supervises_every_token(tmp_path):
    write_texts(tmp_path / "text", {f"{i}.txt": text(i) for i in range(9)})
    data = make_data(tmp_path)
    ((_, shards),) = tokenise_training(data, ByteTokenizer())
    meta = json.loads((shards.folder / "meta.json").read_text())
    old = {name: value for name, value in meta.items() if name not in ("supervised", "longest", "kinds", "noted")}
    (shards.folder / "meta.json").write_text(json.dumps(old))
    loader = load(data)
    assert loader.counts[data.path]["supervised"] == meta["tokens"] == meta["supervised"]
    batch = next(loader)
    assert torch.equal(batch.loss_mask, batch.document_ids >= 0)


def test_batches_are_what_the_trainer_was_promised(folder):
    loader = load(make_data(folder, datasets=["a", "b"]), global_batch_size=6, micro_batch_size=6)
    batch = next(loader)
    assert isinstance(batch, TokenBatch) and batch.tokens.shape == (6, 17)
    assert [tensor.dtype for tensor in batch[:5]] == [torch.int64, torch.bool, torch.int64, torch.int64, torch.int64]
    assert batch.state_mask is None
    assert batch.index.tolist() == list(range(6))
    for _ in range(60):
        batch = next(loader)
        real = batch.document_ids >= 0
        assert torch.equal(batch.loss_mask, real) and not (batch.tokens[~real]).any()
        # Unique in the batch: no document's id stands in two rows, and each is one run.
        runs = [torch.unique_consecutive(row[row >= 0]).tolist() for row in batch.document_ids]
        flat = sum(runs, [])
        assert len(flat) == len(set(flat))
    datasets, samples = batch.sample_ids >> 40, batch.sample_ids & (2**40 - 1)
    sizes = [loader.counts[name]["samples"] for name in loader.datasets]
    assert all(0 <= sample < sizes[dataset] for dataset, sample in zip(datasets.tolist(), samples.tolist()))


PACKINGS = {"concat": {}} | {
    f"{packing}, {overlong}": {"packing": packing, "overlong": overlong}
    for packing in ("best_fit", "document")
    for overlong in ("split", "truncate")
}
each_packing = pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS)


@each_packing
@pytest.mark.parametrize("datasets", [[], ["a", "b"]])
def test_every_token_of_an_epoch_exactly_once(folder, datasets, packing):
    data = make_data(folder, datasets=datasets, **packing)
    tokenizer = ByteTokenizer()
    loader = load(data)
    documents = [tokenizer.document(tokenizer.encode(file.read_text())) for file in sorted((folder / "text").rglob("*.txt"))]
    if packing:  # of what does not fit, each row is a part, or the first is all; one token alone cannot be supervised
        rows = [ids[i : i + 17] for ids in documents for i in (range(0, len(ids), 17) if packing["overlong"] == "split" else [0])]
        lost = Counter(i for ids in documents for i in ids) - Counter(i for ids in rows for i in ids if len(ids) > 1)
    else:
        lost = Counter()
    for _ in range(2):
        epoch = [next(loader) for _ in range(loader.samples_per_epoch)]
        used = Counter(torch.cat([batch.tokens[batch.loss_mask] for batch in epoch]).tolist())
        assert used + lost == Counter(i for ids in documents for i in ids)
        assert len({int(batch.sample_ids) for batch in epoch}) == len(epoch) == sum(c["samples"] for c in loader.counts.values())
    counted = [sum(c["packed"].get(f"tokens {what}", 0) for c in loader.counts.values()) for what in ("cut off them", "left out with them")]
    assert sum(counted) == sum(lost.values()) and (counted[0] > 0) == (packing.get("overlong") == "truncate")
    assert sum(counts["tokens"] for counts in loader.counts.values()) == sum(used.values()) + sum(counted)


@each_packing
def test_samples_keep_their_number_whatever_the_seed_and_epoch(folder, packing):
    data = make_data(folder, **packing)
    first, second = (load(data, seed=seed) for seed in (1, 2))
    tokens, orders = {}, []
    for loader in (first, second):
        batches = [next(loader) for _ in range(3 * loader.samples_per_epoch)]
        orders.append([int(batch.sample_ids) for batch in batches])
        for batch in batches:
            known = tokens.setdefault(int(batch.sample_ids), batch.tokens)
            assert torch.equal(known, batch.tokens)
    assert orders[0] != orders[1]


LAYOUTS = [(world_size, workers, "concat") for world_size in (1, 2, 3, 4) for workers in (0, 1, 3)]
LAYOUTS += [(*layout, packing) for layout in ((1, 3), (2, 1), (3, 0), (4, 3)) for packing in ("best_fit, split", "document, truncate")]


@pytest.mark.parametrize(("world_size", "workers", "packing"), LAYOUTS)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_one_global_order_on_any_number_of_ranks_and_workers(folder, world_size, workers, packing):
    mixture = {"datasets": ["a", "b"], "weights": [1, 3]} | PACKINGS[packing]
    alone = load(make_data(folder, **mixture))
    expected = rows(next(alone) for _ in range(48))

    data = make_data(folder, **mixture, loader_workers=workers)
    global_batch_size, micro_batch_size = 24, 2
    micro_batches = global_batch_size // (world_size * micro_batch_size)
    seen = []
    for rank in range(world_size):
        keys = {"global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size, "rank": rank, "world_size": world_size}
        loader = load(data, **keys)
        for step in range(2):
            for j in range(micro_batches):
                assert loader.position == step * global_batch_size
                batch = next(loader)
                first = step * global_batch_size + (j * world_size + rank) * micro_batch_size
                assert batch.index.tolist() == [first, first + 1]
                seen += rows([batch])
        assert loader.position == 2 * global_batch_size
    assert sorted(seen, key=lambda row: row[3]) == expected


@each_packing
@pytest.mark.parametrize("position", [1, 13, 50, 59, 200])
def test_resuming_at_any_sample_goes_on_as_if_nothing_had_happened(folder, position, packing):
    data = make_data(folder, datasets=["a", "b"], **packing)
    loader = load(data)
    expected = rows(next(loader) for _ in range(position + 20))[position:]
    resumed = load(data, position=position)
    assert resumed.position == position
    assert rows(next(resumed) for _ in range(20)) == expected


@each_packing
def test_resuming_costs_the_same_anywhere(folder, packing):
    data = make_data(folder, **packing)

    def seconds(position):
        begin = time.process_time()
        assert next(load(data, position=position)).index.item() == position
        return time.process_time() - begin

    near, far = (min(seconds(position + i) for i in range(4)) for position in (0, 10**12))
    assert far < 4 * near


@each_packing
def test_shares_of_tokens_hold_within_a_thousandth_over_ten_thousand_samples(folder, packing):
    weights = [0.29, 0.71]
    data = make_data(folder, datasets=["a", "b"], weights=weights, seq_length=97, **packing)
    loader = load(data, global_batch_size=100, micro_batch_size=100)
    tokens, samples = np.zeros((2, 2))
    for _ in range(100):
        batch = next(loader)
        datasets = (batch.sample_ids >> 40).numpy()
        samples += np.bincount(datasets, minlength=2)
        tokens += np.bincount(datasets, (batch.document_ids >= 0).sum(1).numpy(), minlength=2)
    assert np.abs(tokens / tokens.sum() - weights).max() < 0.001
    assert list(loader.shares.values()) == pytest.approx(weights)
    # To the sample: the weights divided by the share of each dataset's rows that is no padding.
    fills = [loader.counts[name]["fill"] for name in "ab"]
    assert samples[1] == round(10_000 * weights[1] / fills[1] / (weights[0] / fills[0] + weights[1] / fills[1]))
    if packing.get("packing") == "document":
        assert abs(fills[0] - fills[1]) > 0.02 and abs(samples[1] / 10_000 - weights[1]) > 0.003, "or the test could not fail"


def test_a_dataset_of_weight_zero_is_not_even_tokenised(folder, tmp_path):
    write_texts(tmp_path / "text", {"a/1.txt": text(1), "broken/1.txt": b"\xff", "c/1.txt": text(2)})
    loader = load(make_data(tmp_path, datasets=["a", "broken", "c"], weights=[1, 0, 1]))
    assert loader.datasets == ["a", "broken", "c"] and loader.shares["broken"] == 0 == loader.counts["broken"]["samples"]
    assert {int(next(loader).sample_ids) >> 40 for _ in range(20)} == {0, 2}


def test_held_out_text_is_in_no_training_sample(folder):
    data, tokenizer = make_data(folder, holdout=0.4, seq_length=50), ByteTokenizer()
    loader = load(data)
    batches = build_validation(data, tokenizer, 10_000, 4)
    held_out = sum(batch.loss_mask.sum().item() for batch in batches)
    files = sorted((folder / "text").rglob("*.txt"))
    assert 0 < loader.counts[data.path]["held_out"] == len(files) - loader.counts[data.path]["documents"]
    assert held_out + loader.counts[data.path]["tokens"] == sum(len(tokenizer.encode(file.read_text())) + 1 for file in files)

    def beginnings(batches):
        """The first 5 tokens of each document that begins within a sample: each test file begins with its own number."""
        found = set()
        for batch in batches:
            for tokens, documents in zip(batch.tokens, batch.document_ids):
                starts = (documents[1:] != documents[:-1]).nonzero()[:, 0] + 1
                found |= {tuple(tokens[i : i + 4].tolist()) for i in starts.tolist() if documents[i] >= 0 and i + 4 <= len(tokens)}
        return found

    training, evaluation = beginnings(next(loader) for _ in range(loader.samples_per_epoch)), beginnings(batches)
    assert training and evaluation and not training & evaluation


def test_validation_samples_are_the_same_for_every_run_and_as_many_as_asked_for(folder):
    data = make_data(folder, holdout=0.4, datasets=["a", "b"], weights=[1, 0])
    everything = build_validation(data, ByteTokenizer(), 10_000, 4)
    some = build_validation(data, ByteTokenizer(), 7, 4)
    assert [len(batch.tokens) for batch in some] == [4, 3]
    assert rows(some) == rows(everything)[:7] and len({row[4] for row in rows(everything)}) == sum(map(len, (b.tokens for b in everything)))
    assert build_validation(data, ByteTokenizer(), 0, 4) == []
    assert build_validation(make_data(folder), ByteTokenizer(), 7, 4) == [], "nothing is held out"
    own = build_validation(make_data(folder, val_path=str(folder / "text" / "b")), ByteTokenizer(), 10_000, 4)
    assert sum(batch.loss_mask.sum().item() for batch in own) == sum(len(f.read_bytes()) + 1 for f in (folder / "text" / "b").iterdir())


# ---- worker processes ----


def leave_without_closing(folder):
    multiprocessing.set_start_method("fork", force=True)
    loader = load(make_data(folder, loader_workers=2))
    next(loader)
    globals()["kept"] = loader  # alive until the interpreter ends


def test_workers_end_with_the_program(folder):
    process = start(leave_without_closing, folder)
    process.join()
    assert process.exitcode == 0


def survive_signals(folder):
    multiprocessing.set_start_method("fork", force=True)
    # As when a job manager or Ctrl-C signals the whole group: the trainer decides when its workers end.
    loader = load(make_data(folder, loader_workers=2))
    expected = rows(next(load(make_data(folder))) for _ in range(1))
    assert rows([next(loader)]) == expected
    workers = psutil.Process().children()
    assert len(workers) == 2
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(50):
        next(loader)
    del loader
    assert psutil.wait_procs(workers, timeout=30)[1] == []


def test_workers_leave_signals_to_the_trainer(folder):
    process = start(survive_signals, folder)
    process.join()
    assert process.exitcode == 0


def keep_many(folder):
    multiprocessing.set_start_method("fork", force=True)
    loader = load(make_data(folder, loader_workers=1))
    kept = [next(loader)]
    soft = psutil.Process().num_fds() + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    kept += [next(loader) for _ in range(100)]
    assert [batch.index.tolist() for batch in kept] == [[i] for i in range(101)]


def test_micro_batches_of_workers_keep_no_descriptors(folder):
    process = start(keep_many, folder)
    process.join()
    assert process.exitcode == 0


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_inherit_no_garbage(folder):
    """A process group in it, whose threads are not forked, would never end."""
    finalised = []

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            finalised.append(os.getpid())

    gc.disable()
    try:
        Cycle()
        loader = load(make_data(folder, loader_workers=1))
    finally:
        gc.enable()
    assert finalised == [os.getpid()] and next(loader).index.tolist() == [0]


def test_fingerprints_say_which_text_has_changed(tmp_path):
    write_texts(tmp_path / "text", {"a/1.txt": text(1), "b/1.txt": text(2), "c/1.txt": text(3)})
    data = make_data(tmp_path, datasets=["a", "b", "c"], weights=[1.0, 1.0, 0.0])
    before = load(data).fingerprints
    assert load(data, seed=SEED + 1).fingerprints == before and before["a"] != before["b"] and before["c"] == ""
    write_texts(tmp_path / "text", {"b/1.txt": text(4), "c/1.txt": text(5)})
    after = load(data).fingerprints
    assert {name for name in before if before[name] != after[name]} == {"b"}
