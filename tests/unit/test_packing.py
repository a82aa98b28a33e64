"""Rows of whole documents, against lists: every token once or counted, no document cut but where it must be."""

import os
import pickle
import resource
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spectitan.config.sections import Data
from spectitan.data import packing, packing_index
from spectitan.data.corpus import TokenisedDataset
from spectitan.data.loader import Loader, collate
from spectitan.data.order import Place
from spectitan.data.packing import PackedDataset, describe, packed
from spectitan.data.shards import Shards, ShardWriter
from spectitan.errors import UserError
from tests.unit.data_fixtures import documents_of, masks_of
from tests.unit.test_best_fit import one_by_one
from tests.unit.test_shards import contents, flip_a_bit, start

whole_documents = pytest.mark.parametrize("packing", ["best_fit", "document"])


def make_shards(folder: Path, lengths, seed: int = 0, masked: bool = True) -> Shards:
    """Documents of these lengths, in many files; a third of them have masks, of which some supervise little or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    writer = ShardWriter(folder, 70_000, shard_tokens=700)
    for number, length in enumerate(lengths):
        mask = None
        if masked and number % 3 == 0:
            mask = generator.random(length) < (0, 0.02, 0.9)[number // 3 % 3]
        writer.add(generator.integers(0, 70_000, length).astype(np.uint32), mask)
    writer.finish({})
    return Shards(folder)


def awkward_lengths(seq_length: int, seed: int = 1) -> list[int]:
    lengths = [1, 2, 3, seq_length - 1, seq_length, seq_length + 1, 2 * seq_length, 2 * seq_length + 1, 3 * seq_length + 2] * 3
    return [length for length in lengths if length] + np.random.default_rng(seed).integers(1, 90, 101).tolist()


def parts_by_definition(shards: Shards, overlong: str, seq_length: int) -> tuple[list, Counter]:
    """(ids, mask) of every document or part of one that has something to supervise, and what happened to the others."""
    parts, counts = [], Counter()
    for ids, mask in zip(documents_of(shards), masks_of(shards)):
        cuts = list(range(0, len(ids), seq_length))
        if len(cuts) > 1:
            counts["documents split" if overlong == "split" else "documents truncated"] += 1
        if overlong == "truncate":
            counts["tokens cut off them"] += max(0, len(ids) - seq_length)
            cuts = cuts[:1]
        for cut in cuts:
            part = ids[cut : cut + seq_length], mask[cut : cut + seq_length]
            if any(part[1][1:]):
                parts.append(part)
            else:
                counts["documents or parts left out, nothing in them is supervised"] += 1
                counts["tokens left out with them"] += len(part[0])
    return parts, +counts


def rows_of(samples: PackedDataset, seq_length: int) -> list[list[tuple]]:
    """The parts in each sample: ids and masks. What is padding must look like it."""
    rows = []
    batch = collate([samples], [Place(0, sample) for sample in range(len(samples))], range(len(samples)), seq_length)
    for tokens, mask, documents in zip(*batch[:3]):
        real = documents >= 0
        assert not bool((real[1:] & ~real[:-1]).any()), "padding is at the end"
        assert not tokens[~real].any() and not mask[~real].any() and bool((documents[~real] == -1).all())
        runs = documents[real].unique_consecutive()
        assert len(runs) == len(documents[real].unique())
        rows.append([(tokens[documents == run].tolist(), mask[documents == run].tolist()) for run in runs])
    return rows


def as_multiset(parts) -> Counter:
    return Counter((tuple(ids), tuple(mask)) for ids, mask in parts)


@whole_documents
@pytest.mark.parametrize("overlong", ["split", "truncate"])
@pytest.mark.parametrize("seq_length", [2, 3, 17, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_every_part_of_a_document_stands_in_one_row(tmp_path, packing, overlong, seq_length, masked):
    shards = make_shards(tmp_path, awkward_lengths(seq_length), masked=masked)
    samples = packed(shards, Data(packing=packing, overlong=overlong, seq_length=seq_length), "name")
    parts, counts = parts_by_definition(shards, overlong, seq_length)
    rows = rows_of(samples, seq_length)
    assert as_multiset(sum(rows, [])) == as_multiset(parts)
    assert samples.counts == dict(sorted(counts.items())) and samples.masked == masked
    assert ("documents split" in counts or "documents truncated" in counts) and counts["tokens left out with them"] > 0
    lost = counts["tokens cut off them"] + counts["tokens left out with them"]
    assert samples.num_tokens == sum(len(ids) for ids, _ in parts) == shards.num_tokens - lost
    assert samples.fill * len(samples) * seq_length == samples.num_tokens
    expected = one_by_one([len(ids) for ids, _ in parts], seq_length) if packing == "best_fit" else parts
    assert len(rows) == len(samples) == len(expected)


def test_best_fit_fills_rows_that_documents_alone_leave_half_empty(tmp_path):
    shards = make_shards(tmp_path, np.random.default_rng(2).integers(2, 65, 2000).tolist(), masked=False)
    fills = [float(packed(shards, Data(packing=packing, seq_length=64), "name").fill) for packing in ("document", "best_fit", "concat")]
    assert fills[0] < 0.6 < 0.98 < fills[1] <= fills[2] and fills[2] > 0.999


@whole_documents
@pytest.mark.parametrize(("lengths", "samples"), [([17], 1), ([2], 1), ([18], 1), ([19], 2), ([35, 36, 34], 7)])
def test_few_documents(tmp_path, packing, lengths, samples):
    shards = make_shards(tmp_path, lengths, masked=False)
    dataset = packed(shards, Data(packing=packing, seq_length=17), "name")
    assert len(dataset) == samples
    lost = dataset.counts.get("tokens left out with them", 0)
    assert lost == sum(length % 17 == 1 for length in lengths), "one token alone is no target"
    assert dataset.num_tokens + lost == sum(lengths)


@whole_documents
def test_empty_documents_are_none(tmp_path, packing):
    shards = make_shards(tmp_path, [0, 5, 0, 0, 1, 600, 0, 0], masked=False)
    for overlong, parts in (("split", 1 + 36), ("truncate", 2)):  # 600 = 35 * 17 + 5
        dataset = packed(shards, Data(packing=packing, overlong=overlong, seq_length=17), "name")
        assert sum(map(len, rows_of(dataset, 17))) == parts
        assert dataset.counts["documents or parts left out, nothing in them is supervised"] == 1


def test_concatenation_says_how_many_documents_it_cuts(tmp_path):
    shards = make_shards(tmp_path, awkward_lengths(17), masked=False)
    begin, cut = 0, 0
    for document in shards.order:
        end = begin + len(documents_of(shards)[document])
        cut += any(begin < border < end for border in range(0, shards.num_tokens, 17))
        begin = end
    dataset = packed(shards, Data(seq_length=17), "name")
    assert dataset.counts == {"documents split": cut} and dataset.num_tokens == shards.num_tokens
    one = packed(shards, Data(seq_length=10**6), "name")
    assert one.counts == {} and describe(one, Data(seq_length=10**6)).startswith("1 sample of 1000000 tokens")
    line = describe(dataset, Data(seq_length=17))
    assert line.startswith(f"{len(dataset):,} samples of 17 tokens (concat), ") and line.endswith(f"filled, {cut} documents split")


@pytest.mark.parametrize("seq_length", [2, 3, 17, 64, 701])
def test_samples_of_a_concatenation_with_nothing_to_supervise_are_left_out(tmp_path, seq_length):
    generator = np.random.default_rng(4)
    writer = ShardWriter(tmp_path, 300, shard_tokens=900)
    for number, length in enumerate(generator.integers(0, 400, 61).tolist()):
        mask = None if number % 7 == 0 else np.arange(length) >= length - generator.integers(0, 9)
        writer.add(generator.integers(0, 300, length).astype(np.uint32), mask)
    writer.finish({})
    shards = Shards(tmp_path)
    ids, masks = documents_of(shards), masks_of(shards)
    stream = [(*token, document) for document in shards.order.tolist() for token in zip(ids[document], masks[document])]
    cuts = [stream[start : start + seq_length] for start in range(0, len(stream), seq_length)]
    expected = [cut for cut in cuts if any(mask and document == before for (_, mask, document), (*_, before) in zip(cut[1:], cut))]
    samples = packed(shards, Data(seq_length=seq_length), "name")
    found = [(sum((part[0] for part in row), []), sum((part[1] for part in row), [])) for row in rows_of(samples, seq_length)]
    assert found == [([token[0] for token in cut], [token[1] for token in cut]) for cut in expected]
    assert samples.num_tokens == sum(map(len, expected)) and samples.counts.get("documents split", 0) > 0
    left_out = len(cuts) - len(expected)
    assert samples.counts.get("samples left out, nothing in them is supervised", 0) == left_out and (left_out > 0) == (seq_length < 701)
    assert samples.counts.get("tokens left out with them", 0) == len(stream) - samples.num_tokens


@whole_documents
def test_indexes_are_made_in_parts(tmp_path, packing, monkeypatch):
    made = {}
    for name, limits in {"whole": (2**18, 2**20, 2**24), "parts": (7, 5, 19), "single": (1, 1, 1)}.items():
        for limit, value in zip(("_BLOCK_DOCUMENTS", "_BLOCK_PARTS", "_BLOCK_TOKENS"), limits):
            monkeypatch.setattr(packing_index, limit, value)
        shards = make_shards(tmp_path / name, awkward_lengths(17))
        for keys in ({"packing": packing}, {"packing": packing, "overlong": "truncate"}, {}):
            packed(shards, Data(seq_length=17, **keys), "name")
        made[name] = contents(shards.folder)
    assert made["whole"] == made["parts"] == made["single"] and len(made["whole"]) > 10
    assert any(name.endswith("concat-split-17/cuts.npy") for name in made["whole"])


def test_neighbours_in_the_files_do_not_share_a_row(tmp_path):
    shards = make_shards(tmp_path, [4] * 4000, masked=False)
    samples = packed(shards, Data(packing="best_fit", seq_length=8), "name")
    number = {tuple(ids): place for place, ids in enumerate(documents_of(shards))}
    distances = [abs(number[tuple(first[0])] - number[tuple(second[0])]) for first, second in rows_of(samples, 8)]
    assert len(distances) == 2000 and 1000 < np.mean(distances) < 1700, "4000 / 3 at random"


@whole_documents
def test_a_worker_gets_the_folder_and_not_the_index(tmp_path, packing):
    shards = make_shards(tmp_path, [5, 9, 30] * 200)
    dataset = packed(shards, Data(packing=packing, seq_length=17), "name")
    content = pickle.dumps(dataset)
    assert len(content) < 800 and rows_of(pickle.loads(content), 17) == rows_of(dataset, 17)


@pytest.mark.parametrize("name", ["meta.json", "rows.npy", "begins.npy", "lengths.npy"])
def test_a_damaged_index_is_made_again(tmp_path, caplog, name):
    shards, data = make_shards(tmp_path, [5, 9, 30] * 20), Data(packing="best_fit", seq_length=17)
    packed(shards, data, "name")
    before = contents(shards.folder)
    (path,) = shards.folder.glob(f"packing-*/{name}")
    os.truncate(path, path.stat().st_size - 8)
    packed(shards, data, "name")
    assert contents(shards.folder) == before and "packing of data name is broken" in caplog.text


@pytest.mark.parametrize("name", ["meta.json", "rows.npy", "begins.npy", "lengths.npy"])
def test_a_flipped_bit_in_an_index_is_found_where_content_is_verified(tmp_path, caplog, name):
    shards, data = make_shards(tmp_path, [5, 9, 30] * 20), Data(packing="best_fit", seq_length=17)
    packed(shards, data, "name")
    before = contents(shards.folder)
    (path,) = shards.folder.glob(f"packing-*/{name}")
    flip_a_bit(path)
    packed(shards, replace(data, verify="stat"), "name")
    assert contents(shards.folder) != before
    packed(shards, data, "name")
    assert contents(shards.folder) == before and f"{name}: not as it was written" in caplog.text


def test_keys_that_decide_samples_have_indexes_of_their_own(tmp_path):
    shards = make_shards(tmp_path, [5, 9, 30] * 20)
    for keys in ({}, {"seq_length": 9}, {"packing": "document"}, {"packing": "best_fit"}, {"packing": "best_fit", "overlong": "truncate"}):
        before = set(shards.folder.glob("packing-*"))
        for _ in range(2):
            packed(shards, Data(**({"seq_length": 17} | keys)), "name")
        assert len(set(shards.folder.glob("packing-*")) - before) == 1


@pytest.mark.parametrize(("packing", "overlong"), [("best_fit", "truncate"), ("document", "truncate"), ("concat", "split")])
def test_a_dataset_with_nothing_to_supervise_is_refused(tmp_path, packing, overlong):
    writer = ShardWriter(tmp_path, 300)
    # Truncated, the answer is lost; cut in two, it is the first of a sample, which nothing predicts.
    writer.add(np.arange(40, dtype=np.uint32), np.arange(40) == 20)
    writer.finish({"bytes": 0, "dropped": {}})
    data = Data(packing=packing, overlong=overlong, seq_length=20)
    keys = {"seed": 0, "global_batch_size": 1, "micro_batch_size": 1, "rank": 0, "world_size": 1, "position": 0}
    with pytest.raises(UserError, match=f"data name: empty dataset, no sample .*data.packing = {packing}, data.overlong = {overlong}"):
        Loader([TokenisedDataset("name", Shards(tmp_path))], data, **keys)


# ---- accidents ----


def kill_while_filling(folder, data):
    packing_index._fill = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    packed(Shards(folder), data, "name")


def kill_before_the_rename(folder, data):
    Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
    packed(Shards(folder), data, "name")


@pytest.mark.parametrize("death", [kill_while_filling, kill_before_the_rename])
def test_a_killed_run_leaves_nothing_half_valid(tmp_path, death):
    data, lengths = Data(packing="best_fit", seq_length=17), awkward_lengths(17)
    shards, clean = make_shards(tmp_path / "killed", lengths), make_shards(tmp_path / "clean", lengths)
    process = start(death, shards.folder, data)
    process.join()
    assert process.exitcode == -signal.SIGKILL and list(shards.folder.glob("packing*.tmp"))
    packed(shards, data, "name"), packed(clean, data, "name")
    assert contents(shards.folder) == contents(clean.folder)


def pack_slowly(folder, data, log):
    def write(*arguments, real=packing_index.write_index):
        time.sleep(0.1)
        with open(log, "a") as file:
            file.write("written\n")
        real(*arguments)

    packing.write_index = write
    assert len(packed(Shards(folder), data, "name")) > 0


def test_of_several_processes_one_packs_and_the_others_wait(tmp_path):
    data, lengths = Data(packing="best_fit", seq_length=17), awkward_lengths(17)
    shards, clean = make_shards(tmp_path / "together", lengths), make_shards(tmp_path / "clean", lengths)
    together = [start(pack_slowly, shards.folder, data, tmp_path / "log") for _ in range(3)]
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0, 0] and (tmp_path / "log").read_text() == "written\n"
    packed(clean, data, "name")
    assert contents(shards.folder) == contents(clean.folder)


def fill_the_disk(folder, data, report):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        packed(Shards(folder), data, "name")
    except OSError as error:
        Path(report).write_text(f"{error.filename}")


def test_a_full_disk_names_the_folder_and_leaves_nothing_behind(tmp_path):
    shards = make_shards(tmp_path / "shards", [9] * 2000, masked=False)
    process = start(fill_the_disk, shards.folder, Data(packing="best_fit", seq_length=17), tmp_path / "report")
    process.join()
    assert process.exitcode == 0 and (tmp_path / "report").read_text().startswith(str(shards.folder))
    assert not list(shards.folder.glob("packing-*"))
