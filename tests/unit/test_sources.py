"""Files as other programs write them: every id and mask is the writer's, memory does not grow, and damage is named."""

import itertools
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from spectitan.data.corpus import tokenise_held_out, tokenise_training
from spectitan.data.cut_prompts import cut_prompts
from spectitan.data.documents import Document, Found, Ids, PromptResponse, find_datasets, read_documents
from spectitan.data.encoding import encode
from spectitan.data.loader import build_loader
from spectitan.errors import UserError
from tests.unit.data_fixtures import ByteTokenizer, documents_of, make_data, masks_of, write_texts
from tests.unit.source_fixtures import packed, save_splits, save_to_disk, write_fms_shard, write_stream

BYTES, PLAIN = ByteTokenizer(bos_id=1, eos_id=0), ByteTokenizer(bos_id=None, eos_id=None)


def tokenised(folder, tokenizer=PLAIN, **keys):
    ((_, shards),) = tokenise_training(make_data(folder, **keys), tokenizer)
    return shards


def read(folder, **keys):
    data, found = make_data(folder, **keys), Found()
    return [document for dataset in find_datasets(data) for document in read_documents(dataset, data, None, found)], found


def ids(number: int, size: int) -> list[int]:
    return ((np.arange(size) * 7919 + number * 104729) % 256 + 2).tolist()


DOCUMENTS = [ids(number, size) for number, size in enumerate([5, 2, 131, 17, 1000, 3, 64])]


# ---- fms-fsdp's shards ----


def fms_folder(folder: Path) -> Path:
    """Two datasets, one with a sub-folder, and the file of counts beside them."""
    write_fms_shard(folder / "text/lang=en/dataset=a/full.arrow", DOCUMENTS[:3])
    write_fms_shard(folder / "text/b/quarter_1.arrow", DOCUMENTS[3:5])
    write_fms_shard(folder / "text/b/sub/quarter_2.arrow", DOCUMENTS[5:])
    write_texts(folder, {"text/meta/combined_counts.csv": "dataset/filename,documents,tokens\n/b/quarter_1.arrow,2,1017\n"})
    return folder


def test_a_record_batch_of_numbers_is_a_document(tmp_path):
    shards = tokenised(fms_folder(tmp_path))
    assert documents_of(shards) == DOCUMENTS[3:] + DOCUMENTS[:3] and not shards.masked
    assert (shards.meta["formats"], shards.meta["kinds"], shards.meta["bytes"]) == ({"Arrow": 3}, {"ids": 7}, 0)


def test_sub_folders_are_datasets_where_they_are_named(tmp_path):
    data = make_data(fms_folder(tmp_path), datasets=["b", "lang=en/dataset=a"])
    found = {name: documents_of(shards) for name, shards in tokenise_training(data, PLAIN)}
    assert found == {"b": DOCUMENTS[3:], "lang=en/dataset=a": DOCUMENTS[:3]}
    data.datasets[1] = "lang=en/datset=a"
    with pytest.raises(UserError, match="^data.datasets: no 'lang=en/datset=a' below data.path = .*; the nearest is 'lang=en/dataset=a'$"):
        find_datasets(data)


def test_ids_of_a_text_are_framed_as_a_text_is(tmp_path):
    """fms-fsdp puts its end after every document; a document that has it already gets no second one."""
    documents = [[7, 8], [1, 7, 8], [7, 8, 0], [1, 7, 8, 0], [0, 7, 8, 1]]
    write_fms_shard(tmp_path / "text/a.arrow", documents)
    assert documents_of(tokenised(tmp_path, BYTES)) == [[1, 7, 8, 0]] * 4 + [[1, 0, 7, 8, 1, 0]]


def test_documents_of_nothing_are_dropped_and_counted(tmp_path):
    write_fms_shard(tmp_path / "text/a.arrow", [[7, 8], [], [9], [1, 9, 0], [1, 0], [0]])
    shards = tokenised(tmp_path, BYTES)
    assert documents_of(shards) == [[1, 7, 8, 0]]
    assert shards.meta["dropped"] == {"empty 'tokens' (data.tokens_column)": 1, "one token": 2, "empty": 2}


@pytest.mark.parametrize("numbers", [pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.uint64()])
@pytest.mark.parametrize("lists", [pa.list_, pa.large_list])
def test_lists_of_any_integers_in_any_format(tmp_path, numbers, lists):
    column = {"tokens": pa.array([*DOCUMENTS, None], lists(numbers))}
    write_stream(tmp_path / "text/a.arrow", column)
    pa.parquet.write_table(pa.table(column), tmp_path / "text/b.parquet", row_group_size=2)
    shards = tokenised(tmp_path, on_invalid="skip")
    assert documents_of(shards) == DOCUMENTS * 2 and shards.meta["dropped"] == {"invalid row": 2}
    assert shards.meta["skipped"] == [f"{tmp_path}/text/{name}:8" for name in ("a.arrow", "b.parquet")]


def test_prompts_are_cut_from_ids_of_texts():
    long, short = ids(3, 700), ids(4, 64)
    documents = [Document(Ids(np.array(content), None), f"{len(content)}", 0) for content in ([1, *long, 0], short)]
    prompts = [json.loads(line) for line in cut_prompts(documents, BYTES, 20, seed=0).splitlines()]
    assert prompts and {prompt["source"] for prompt in prompts} == {"702"}
    text = " ".join(map(str, long))
    for prompt in prompts:
        assert prompt["tokens"][0] == 1 and 64 <= len(prompt["tokens"]) <= 128
        assert " ".join(map(str, prompt["tokens"][1:])) in text


def test_documents_after_enough_prompts_are_tokenised_once():
    encoded = []

    class Noting(ByteTokenizer):
        def encode(self, text):
            encoded.append(text[:4])
            return super().encode(text)

    documents = [Document(f"{number:04} " * 60, f"{number}", 0) for number in range(100)]
    prompts = [json.loads(line) for line in cut_prompts(documents, Noting(), 16, seed=0).splitlines()]
    assert len({prompt["source"] for prompt in prompts}) == 16, "documents take turns"
    times = [3] * 7 + [2] * 8 + [1] * 85  # from the 8th on there are 16 of the first two turns, from the 16th on of the first
    assert encoded == [f"{number:04}" for number, count in enumerate(times) for _ in range(count)]


# ---- what `datasets` saves ----


def masked_rows(first: int, count: int) -> dict[str, pa.Array]:
    """As speculators prepares data."""
    rows = [ids(number, 3 + number * 13 % 41) for number in range(first, first + count)]
    masks = [[int((place * 31 + number) % 5 > 1) for place in range(len(row))] for number, row in enumerate(rows)]
    return {"input_ids": pa.array(rows), "loss_mask": pa.array(masks), "seq_len": pa.array(list(map(len, rows)))}


def oracle(*tables: dict[str, pa.Array]) -> tuple[list, list]:
    rows = [table[name].to_pylist() for name in ("input_ids", "loss_mask") for table in tables]
    both = list(itertools.chain(*rows[: len(tables)])), list(itertools.chain(*rows[len(tables) :]))
    return both[0], [[value == 1 for value in mask] for mask in both[1]]


def test_a_saved_dataset_is_its_shards_and_nothing_else(tmp_path):
    shards = [masked_rows(0, 11), masked_rows(11, 7)]
    save_to_disk(tmp_path / "text", shards)
    write_stream(tmp_path / "text/cache-0123456789abcdef.arrow", masked_rows(50, 2))  # datasets' map leaves such files
    write_stream(tmp_path / "text/data-00002-of-00003.arrow", masked_rows(60, 2))  # of an earlier save
    found = tokenised(tmp_path, BYTES)
    assert (documents_of(found), masks_of(found)) == oracle(*shards), "no token is put around them"
    assert found.meta["kinds"] == {"ids with a mask": 18} and found.meta["formats"] == {"Arrow": 2}


def test_splits_of_a_saved_dataset_are_not_mixed(tmp_path):
    splits = {"train": masked_rows(0, 5), "test": masked_rows(9, 4)}
    save_splits(tmp_path / "text", splits)
    with pytest.raises(UserError, match="text: a saved DatasetDict of the splits train, test; allowed: one split's folder, or splits in"):
        tokenised(tmp_path)
    assert documents_of(tokenised(tmp_path, datasets=["train"])) == oracle(splits["train"])[0]
    ((_, held_out),) = tokenise_held_out(make_data(tmp_path, val_path=str(tmp_path / "text/test")), PLAIN)
    assert (documents_of(held_out), masks_of(held_out)) == oracle(splits["test"])
    save_splits(tmp_path / "one/text", {"train": splits["train"]})
    assert documents_of(tokenised(tmp_path / "one")) == oracle(splits["train"])[0]


def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path):
    folder = save_to_disk(tmp_path / "text", [masked_rows(0, 3), masked_rows(3, 3)])
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(UserError, match=r"state\.json: its rows are chosen by a file of indices, as datasets before 1\.16"):
        tokenised(tmp_path)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow: no such file, but state\.json names it"):
        tokenised(tmp_path)


def test_other_files_of_these_names_say_nothing(tmp_path):
    write_texts(tmp_path / "text", {"state.json": "[1]", "dataset_dict.json": "no JSON", "a.txt": "text"})
    assert read(tmp_path)[0][0].content == "text"


# ---- ids with a mask, and of prompt and response, in every format ----


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        write_stream(path, {name: pa.array([row[name] for row in rows]) for name in rows[0]})
    else:
        path.write_bytes(packed(lines, path.suffix) if path.suffix in (".gz", ".zst") else lines)


every_table = pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".ndjson.zst", ".json.gz", ".parquet", ".arrow"])


@every_table
@pytest.mark.parametrize("kind", [int, bool])
def test_ids_and_masks_in_every_table(tmp_path, suffix, kind):
    rows = [{"x": ids(n, n + 2), "m": [kind(place % 3 > 0) for place in range(n + 2)], "y": "other"} for n in range(23)]
    write_rows(tmp_path / f"text/a{suffix}", rows)
    shards = tokenised(tmp_path, BYTES, input_ids_column="x", loss_mask_column="m")
    assert documents_of(shards) == [row["x"] for row in rows]
    assert masks_of(shards) == [[value == 1 for value in row["m"]] for row in rows]


@every_table
def test_text_and_prompts_in_every_table(tmp_path, suffix):
    rows = [{"question": {"q": f"größe {n}"}, "answer": f"{n} 日本"} for n in range(17)]
    write_rows(tmp_path / f"text/a{suffix}", rows)
    documents, found = read(tmp_path, prompt_dict_keys=["q"])
    assert [document.content for document in documents] == [PromptResponse(row["question"]["q"], row["answer"]) for row in rows]
    assert [document.source for document in documents] == [f"{tmp_path}/text/a{suffix}:{n + 1}" for n in range(17)]
    positions = [document.bytes_read for document in documents]
    assert positions == sorted(positions) and 0 < positions[0] and positions[-1] <= (tmp_path / f"text/a{suffix}").stat().st_size
    names = {".jsonl": "JSON lines", ".jsonl.gz": "JSON lines (.gz)", ".ndjson.zst": "JSON lines (.zst)", ".json.gz": "JSON lines (.gz)"}
    assert found.formats == {names.get(suffix, suffix[1:].title()): 1}


@every_table
def test_arctic_rows_keep_their_prompt_and_mask_it(tmp_path, suffix):
    rows = [{"input": ids(n, n % 5), "output": ids(n + 9, 1 + n % 7)} for n in range(19)]
    write_rows(tmp_path / f"text/a{suffix}", rows)
    shards = tokenised(tmp_path, BYTES)
    whole = [row for row in rows if len(row["input"] + row["output"]) > 1]
    assert documents_of(shards) == [row["input"] + row["output"] for row in whole]
    assert masks_of(shards) == [[False] * len(row["input"]) + [True] * len(row["output"]) for row in whole]


def test_what_a_file_is_packed_with_is_seen_in_its_first_bytes(tmp_path):
    line = b'{"text": "gr\xc3\xb6\xc3\x9fe"}\n'
    write_texts(tmp_path / "text", {"a.jsonl": packed(line, ".gz"), "b.jsonl": packed(line, ".zst"), "c.jsonl": line})
    assert [document.content for document in read(tmp_path)[0]] == ["größe"] * 3


# ---- what is said, and which datasets are read ----


def test_the_log_says_what_each_dataset_is(tmp_path, caplog):
    fms_folder(tmp_path)
    write_rows(tmp_path / "text/c/a.jsonl.zst", [{"text": "one"}, {"text": "two"}])
    write_texts(tmp_path, {"text/c/b.txt": "three", "text/c/d.txt": "four"})
    with caplog.at_level(logging.INFO):
        tokenise_training(make_data(tmp_path, datasets=["b", "c"]), BYTES)
    lines = [record.getMessage() for record in caplog.records if "documents" in record.getMessage()]
    assert lines[0].startswith("data b: 2 files of Arrow, 4 documents, ") and ", 4 rows of ids" in lines[0]
    assert lines[1].startswith("data c: 1 file of JSON lines (.zst), 2 files of text, 4 documents, ") and ", 2 rows of text" in lines[1]


def test_a_dataset_of_weight_0_is_not_even_opened(tmp_path):
    write_fms_shard(tmp_path / "text/a/a.arrow", [ids(n, 60) for n in range(40)])
    write_texts(tmp_path, {"text/broken/a.arrow": b"no Arrow file"})
    data = make_data(tmp_path, datasets=["a", "broken"], weights=[3.0, 0.0], holdout=0.3)
    (_, used), (name, unused) = tokenise_training(data, PLAIN)
    assert unused is None and name == "broken" and used.meta["documents"] < 40
    assert [name for name, _ in tokenise_held_out(data, PLAIN)] == ["a"]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([], (2 / 3, 1 / 3)),
        ([1, 1], (0.5, 0.5)),
        ([0.25, 0], (1, 0)),
        ([1e-9, 3e-9], (0.25, 0.75)),
        ([1e308, 1e308], (0.5, 0.5)),
        ([7725, 25], (7725 / 7750, 25 / 7750)),
    ],
)
def test_shares_are_those_of_the_weights_or_of_the_tokens(tmp_path, weights, shares):
    for name, count in {"a": 20, "b": 10}.items():
        write_fms_shard(tmp_path / f"text/{name}/a.arrow", [ids(n, 34) for n in range(count)])
    data = make_data(tmp_path, datasets=["a", "b"], weights=[float(weight) for weight in weights])
    loader = build_loader(data, PLAIN, seed=0, global_batch_size=60, micro_batch_size=60)
    assert tuple(loader.shares.values()) == pytest.approx(shares)
    drawn = (next(loader).sample_ids >> 40).tolist()
    assert drawn.count(0) == round(60 * shares[0]) and drawn.count(1) == round(60 * shares[1])


# ---- bad input ----


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_line_7891_is_named(tmp_path, suffix):
    lines = [b'{"text": "line %d"}\n' % number for number in range(1, 9001)]
    lines[7890] = b'{"text": "line 7891"\n'
    content = b"".join(lines)
    path = tmp_path / f"text/a.jsonl{suffix}"
    write_texts(tmp_path / "text", {path.name: packed(content, suffix) if suffix else content})
    with pytest.raises(
        UserError, match=rf"^{path}:7891: not valid JSON: .* at column 21; mend the file, or set data.on_invalid = "
    ) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    documents, found = read(tmp_path, on_invalid="skip")
    assert len(documents) == 8999 and found.skipped_names == [f"{path}:7891"]


@pytest.mark.parametrize(("suffix", "name"), [(".gz", "gzip"), (".zst", "Zstandard")])
@pytest.mark.parametrize("damage", ["cut", "cut at the end", "empty", "changed", "no such format"])
def test_damaged_packed_files_are_named(tmp_path, suffix, name, damage):
    numbers = np.random.default_rng(0).integers(0, 2**60, 3000).tolist()
    lines = [b'{"text": "%d"}\n' % number for number in numbers]
    content = bytearray(packed(b"".join(lines), suffix))
    middle = len(content) // 4
    if damage == "changed":
        content[middle : middle + 50] = bytes(50)
    broken = {"cut": content[: len(content) // 3], "cut at the end": content[:-1], "empty": b"", "no such format": b"".join(lines)}
    path = tmp_path / f"text/b.jsonl{suffix}"
    write_texts(tmp_path / "text", {"a.txt": "good", path.name: bytes(broken.get(damage, content))})
    with pytest.raises(UserError, match=rf"^{path}(:\d+)?: (damaged {name} file|not valid JSON|.*UTF-8).*on_invalid") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    documents, found = read(tmp_path, on_invalid="skip")
    assert str(path) in found.skipped_names and found.dropped["damaged file"] == 1
    said = [document.content for document in documents]
    assert said[0] == "good" and len(said) <= 3001
    assert damage == "changed" or said[1:] == list(map(str, numbers[: len(said) - 1])), "what came before the damage is read"


@pytest.mark.parametrize("shape", ["file", "stream"])
@pytest.mark.parametrize("damage", ["cut", "cut between batches", "cut at the end", "empty", "head", "text"])
def test_damaged_arrow_files_are_named(tmp_path, shape, damage):
    path = tmp_path / "text/b.arrow"
    write_fms_shard(path, DOCUMENTS * 20) if shape == "file" else write_stream(path, {"tokens": pa.array(DOCUMENTS * 20)})
    content = path.read_bytes()
    batches = content.rindex(b"\xff\xff\xff\xff", 0, len(content) - 20)
    cuts = {"cut": content[: len(content) // 3], "cut between batches": content[:batches], "cut at the end": content[:-5]}
    cuts |= {"empty": b"", "head": bytes(16) + content[16:], "text": b"no Arrow file at all"}
    path.write_bytes(cuts.get(damage, content))
    write_texts(tmp_path / "text", {"a.txt": "good"})
    with pytest.raises(UserError, match=rf"^{path}: damaged Arrow file: .*on_invalid") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    documents, found = read(tmp_path, on_invalid="skip")
    assert documents[0].content == "good" and found.dropped == {"damaged file": 1} and found.skipped_names == [str(path)]


def test_lists_that_leave_their_numbers_are_damage(tmp_path):
    """pyarrow itself would read whatever lies in memory there."""
    path = write_stream(tmp_path / "text/a.arrow", {"tokens": pa.array([[5, 6, 7], [8] * 64])})
    places = np.array([0, 3, 67], np.int32)
    content = path.read_bytes()
    assert content.count(places.tobytes()) == 1
    path.write_bytes(content.replace(places.tobytes(), np.array([0, 3, 2**30], np.int32).tobytes()))
    with pytest.raises(UserError, match=rf"^{path}: damaged Arrow file: .*on_invalid"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_file_without_the_column_names_those_it_has(tmp_path, suffix):
    write_rows(tmp_path / f"text/a{suffix}", [{"token": [3], "seq len": 1}])
    message = rf"^{tmp_path}/text/a{suffix}: no column 'text' .* or 'tokens' \(data.tokens_column\).*; its columns: 'token', 'seq len'$"
    with pytest.raises(UserError, match=message):
        read(tmp_path, on_invalid="skip")


@every_table
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [3, 258], "loss_mask": [1, 1]}, "token id 258; this tokenizer's are 0 .. 257"),
        ({"input_ids": [3, -1], "loss_mask": [1, 1]}, "token id -1; this tokenizer's are 0 .. 257"),
        ({"input_ids": [3, 4, 5], "loss_mask": [1, 1]}, "'loss_mask' has 2 numbers and 'input_ids' 3; allowed: as many"),
        ({"input_ids": [3, 4], "loss_mask": [1, 2]}, "'loss_mask' is no list of 0 and 1 (data.loss_mask_column)"),
        ({"input_ids": [3, 4], "loss_mask": None}, "'loss_mask' is no list of 0 and 1 (data.loss_mask_column)"),
        ({"input_ids": None, "loss_mask": [1]}, "'input_ids' is no list of token ids"),
    ],
)
def test_ids_and_masks_that_cannot_be_are_named_by_row(tmp_path, suffix, row, message):
    good = {"input_ids": [3, 4], "loss_mask": [0, 1]}
    write_rows(tmp_path / f"text/a{suffix}", [good, good, row, good])
    with pytest.raises(UserError) as error:
        tokenised(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/text/a{suffix}:3: {message}") and "\n" not in str(error.value)
    assert documents_of(tokenised(tmp_path, on_invalid="skip")) == [[3, 4]] * 3


def test_an_id_outside_the_vocabulary_in_a_shard_of_fms(tmp_path):
    write_fms_shard(tmp_path / "text/a.arrow", [*DOCUMENTS, [5, 2**32 - 1, 6]])
    with pytest.raises(UserError, match=rf"^{tmp_path}/text/a\.arrow:8: token id 4294967295; this tokenizer's are 0 \.\. 257; mend"):
        tokenised(tmp_path)


class NeverTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        raise AssertionError("nothing should be tokenised")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b/z.jsonl", b'{"text": "x"\n', r"b/z\.jsonl:1: not valid JSON"),
        ("b/z.jsonl", b'{"txt": "x"}\n', r"b/z\.jsonl:1: no column 'text'"),
        ("b/z.jsonl.gz", b'{"text": "x"}\n', r"b/z\.jsonl\.gz: damaged gzip file"),
        ("b/z.parquet", b"PAR1", r"b/z\.parquet: damaged Parquet file"),
        ("b/z.arrow", b"ARROW1", r"b/z\.arrow: damaged Arrow file"),
        ("val/z.arrow", b"ARROW1", r"val/z\.arrow: damaged Arrow file"),
        ("other.txt", b"x", r"data\.val_path = .*val': no such file or folder"),
    ],
)
def test_all_tables_are_looked_at_before_anything_is_tokenised(tmp_path, name, content, message):
    write_texts(tmp_path / "text", {"a/a.txt": "a good text", "b/a.jsonl": '{"text": "another"}'})
    write_texts(tmp_path, {name if name.startswith(("val", "other")) else f"text/{name}": content})
    data = make_data(tmp_path, datasets=["a", "b"], val_path=str(tmp_path / "val") if name[0] in "vo" else "")
    with pytest.raises(UserError, match=message):
        tokenise_training(data, NeverTokenizer())
    assert not [path for path in (tmp_path / "cache").glob("*") if path.is_dir()]


def test_of_tables_that_are_looked_at_only_those_that_are_used_count(tmp_path):
    write_texts(tmp_path / "text", {"a/a.jsonl": '{"text": "good"}', "a/b.jsonl": "{", "c/a.parquet": "PAR1"})
    data = make_data(tmp_path, datasets=["a", "c"], weights=[1.0, 0.0], on_invalid="skip")
    (_, shards), (_, unused) = tokenise_training(data, PLAIN)
    assert documents_of(shards) == [PLAIN.encode("good")] and unused is None and shards.meta["dropped"] == {"invalid row": 1}


def test_rows_with_text_and_ids_must_be_told_which_is_meant(tmp_path):
    write_rows(tmp_path / "text/a.jsonl", [{"text": "ab", "tokens": [5, 6]}])
    with pytest.raises(UserError, match=r"its columns could be text \(data.text_column\) and ids \(data.tokens_column\); allowed: one of"):
        tokenised(tmp_path)
    assert documents_of(tokenised(tmp_path, tokens_column="")) == [PLAIN.encode("ab")]
    assert documents_of(tokenised(tmp_path, text_column="")) == [[5, 6]]


def test_a_folder_without_a_readable_file_says_what_is_there(tmp_path):
    write_texts(tmp_path / "text", {"a.csv": "x", "b/c.bin": "x", ".hidden.txt": "x", "LICENSE": "x"})
    with pytest.raises(UserError, match=r"text: empty dataset, no file with suffix \.txt, .*; there are: \.bin, \.csv, LICENSE$"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("on_invalid", ["error", "skip"])
def test_what_the_system_refuses_is_no_damage(tmp_path, name, on_invalid):
    path = tmp_path / "text" / name
    path.parent.mkdir()
    path.write_text("x") if path.suffix == ".txt" else write_rows(path, [{"text": "x"}])
    data = make_data(tmp_path, on_invalid=on_invalid)
    (dataset,) = find_datasets(data)
    path.unlink()
    with pytest.raises(FileNotFoundError) as error:
        list(read_documents(dataset, data, None, Found()))
    assert error.value.filename in (path, str(path))
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        list(read_documents(dataset, data, None, Found()))


@pytest.mark.parametrize(
    ("module", "package", "name", "extra"),
    [
        ("jsonl", "backports", "a.jsonl.zst", 'backports.zstd: pip install "spectitan[zstd]"'),
        ("arrow", "pyarrow", "a.arrow", 'pyarrow: pip install "spectitan[parquet]"'),
    ],
)
def test_without_its_package_one_line_says_how_to_install_it(tmp_path, monkeypatch, module, package, name, extra):
    write_rows(tmp_path / f"text/{name}", [{"text": "x"}])
    for each in (package, "compression"):  # Python's own, of 3.14
        monkeypatch.setitem(sys.modules, each, None)
        monkeypatch.setitem(sys.modules, f"{each}.zstd", None)
    with pytest.raises(UserError, match=rf"^{tmp_path}/text/{name}: reading it needs the package ") as error:
        read(tmp_path)
    assert str(error.value).endswith(extra)


# ---- memory ----

MEMORY = """
import re, sys
from pathlib import Path
from spectitan.config.sections import Data
from spectitan.data.documents import Found, find_datasets, read_documents

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

for path in sys.argv[1:]:
    (dataset,) = find_datasets(Data(path=path))
    before = peak()
    read = 0
    for document in read_documents(dataset, Data(path=path), None, Found()):
        assert document.content.ids.max() < 256  # the pages of a mapped file are there once they are touched
        read += document.content.ids.nbytes
    print(read, peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Each 96 MB of ids: as one batch, many, one a document; as one row group. A small one first, for what libraries take."""
    size = 24 * 2**20
    flat = np.random.default_rng(0).integers(0, 256, size, np.uint32)

    def write(name: str, count: int) -> str:
        path, numbers = tmp_path / name, flat[:count]
        lists = pa.ListArray.from_arrays(np.arange(count // 1024 + 1, dtype=np.int32) * 1024, numbers)
        if path.suffix == ".parquet":
            pa.parquet.write_table(pa.table({"tokens": lists}), path, row_group_size=count, compression="none", use_dictionary=False)
        elif "fms" in name:
            write_fms_shard(path, numbers.reshape(-1, 2**18))
        else:
            write_stream(path, {"tokens": lists}, count if "one" in name else 1000)
        return str(path)

    names = ["one.arrow", "many.arrow", "fms.arrow", "rows.parquet"]
    small, large = ([write(f"{size}-{name}", size) for name in names] for size in (2**19, size))
    run = subprocess.run([sys.executable, "-c", MEMORY, *small, *large], capture_output=True, text=True, check=True)
    figures = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert [read for read, _ in figures[4:]] == [4 * size] * 4
    assert max(grown for _, grown in figures[4:]) < 48 * 2**20, figures


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_unpacked_as_they_are_read(tmp_path, suffix):
    """Of 24 MB of lines, in 1 MB or less, little is held at a time."""
    import tracemalloc

    line = json.dumps({"text": "x" * 2000}).encode() + b"\n"
    write_texts(tmp_path / "text", {f"a.jsonl{suffix}": packed(line * 12_000, suffix)})
    data = make_data(tmp_path)
    (dataset,) = find_datasets(data)
    tracemalloc.start()
    count = sum(1 for _ in read_documents(dataset, data, None, Found()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_000 and peak < 2**22


def test_a_text_of_ids_is_encoded_as_it_is():
    content = Ids(np.array([5, 6], np.uint32), None)
    ids, mask = encode(content, PLAIN)
    assert ids.tolist() == [5, 6] and ids.dtype == np.uint32 and mask is None
