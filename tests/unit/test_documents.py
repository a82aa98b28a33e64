"""Documents are found, divided into training and held-out parts, and refused with file and line when they cannot be read."""

import hashlib
import json
import os
import sysconfig
from pathlib import Path

import pytest

from spectitan.config.sections import Data
from spectitan.data.documents import HELD_OUT, TRAINING, Found, find_datasets, read_documents, validation_datasets
from spectitan.errors import UserError
from tests.unit.data_fixtures import write_texts


def read(data, part=None):
    """{source below data.path: text} of every dataset, and what was found."""
    found, texts = Found(), {}
    root = Path(data.path) if Path(data.path).is_dir() else Path(data.path).parent
    for dataset in find_datasets(data):
        for document in read_documents(dataset, data, part, found):
            texts[Path(document.source).relative_to(root).as_posix()] = document.content
    return texts, found


def test_a_tree_is_read_by_suffix_in_sorted_order(tmp_path):
    files = {"b/z.txt": "1", "a.md": "2", "b/a.txt": "3", "c.bin": "4", ".hidden/x.txt": "5", "b/.x.txt": "6", "d.jsonl": '{"text": "7"}'}
    write_texts(tmp_path, files)
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert list(read(Data(path=str(tmp_path)))[0].items()) == [("a.md", "2"), ("b/a.txt", "3"), ("b/z.txt", "1"), ("d.jsonl:1", "7")]
    assert list(read(Data(path=str(tmp_path), format="text", suffixes=[".bin"]))[0].values()) == ["4"]
    assert list(read(Data(path=str(tmp_path), format="jsonl"))[0].values()) == ["7"]
    assert read(Data(path=str(tmp_path / "c.bin")))[0] == {"c.bin": "4"}, "a file that is named is read whatever its suffix"
    assert list(read(Data(path=str(tmp_path), datasets=["b", "a.md"]))[0]) == ["b/a.txt", "b/z.txt", "a.md"]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.tsv"])
def test_a_table_that_is_not_read_is_no_text_by_mistake(tmp_path, name):
    path = tmp_path / name
    path.write_text('{"text": "7"}\n')
    with pytest.raises(UserError, match=f"^data.path = '{path}': a table that is not read, and no text; allowed: JSON lines"):
        find_datasets(Data(path=str(path)))
    assert read(Data(path=str(path), format="text"))[0] == {name: '{"text": "7"}\n'}
    assert read(Data(path=str(path), format="jsonl"))[0] == {f"{name}:1": "7"}
    assert read(Data(path=str(path), suffixes=[path.suffix]))[0] == {name: '{"text": "7"}\n'}


def test_links_are_followed_but_not_back(tmp_path):
    write_texts(tmp_path, {"elsewhere/deep/b.txt": "b", "root/a.txt": "a", "file.txt": "c"})
    for link, target in {"linked": "elsewhere", "again/linked": "elsewhere/deep", "c.txt": "file.txt", "loop": "root", "up/x": "."}.items():
        (tmp_path / "root" / link).parent.mkdir(exist_ok=True)
        (tmp_path / "root" / link).symlink_to(tmp_path / target)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    assert read(Data(path=str(tmp_path / "root")))[0] == {"a.txt": "a", "again/linked/b.txt": "b", "c.txt": "c", "linked/deep/b.txt": "b"}


def test_a_file_whose_name_is_no_text_is_named(tmp_path):
    write_texts(tmp_path, {"a.txt": "a", os.fsdecode(b"\xff.txt"): b"\xff"})
    with pytest.raises(UserError, match=r"\\udcff\.txt:1: byte 0xff is not UTF-8"):
        read(Data(path=str(tmp_path)))
    found = read(Data(path=str(tmp_path), on_invalid="skip"))[1]
    assert found.skipped_names == [f"{tmp_path}/\\udcff.txt:1"]


def test_progress_counts_the_bytes_of_all_files(tmp_path):
    write_texts(tmp_path, {"a.txt": "größe", "b.jsonl": '{"text": "ä"}\n\n{"text": "b"}\n', "c.txt": "c"})
    (dataset,) = find_datasets(Data(path=str(tmp_path)))
    positions = [document.bytes_read for document in read_documents(dataset, Data(path=str(tmp_path)), None, Found())]
    assert positions == [7, 7 + 15, 7 + 15 + 1 + 14, 7 + 30 + 1] and positions[-1] == dataset.num_bytes()


def test_byte_order_marks_are_no_text(tmp_path):
    write_texts(tmp_path, {"a.txt": b"\xef\xbb\xbfa", "b.jsonl": b'\xef\xbb\xbf{"text": "b"}\r\n'})
    assert read(Data(path=str(tmp_path)))[0] == {"a.txt": "a", "b.jsonl:1": "b"}


def held_out_by_definition(key: bytes, share: float) -> bool:
    return int(hashlib.blake2b(key, digest_size=8).hexdigest(), 16) / 2**64 < share


def test_files_and_lines_are_held_out_by_hash(tmp_path):
    write_texts(tmp_path / "x", {f"{i % 3}/{i}.txt": str(i) for i in range(400)})
    lines = "\n".join(json.dumps({"text": str(i)}) for i in range(400))
    write_texts(tmp_path / "x", {"lines.jsonl": lines})
    data = Data(path=str(tmp_path / "x"), holdout=0.3)
    (training, found), (held_out, other) = read(data, TRAINING), read(data, HELD_OUT)
    assert training | held_out == read(data)[0] and not training.keys() & held_out.keys()
    assert (found.documents, found.other_part) == (len(training), len(held_out)) == (other.other_part, other.documents)
    by_definition = {name for name in read(data)[0] if held_out_by_definition(name.replace("jsonl:", "jsonl\n").encode(), 0.3)}
    assert held_out.keys() == by_definition and 0.25 < len(by_definition) / 800 < 0.35
    # The same files through one of their folders, and at another place.
    assert read(Data(path=data.path, datasets=["1"], holdout=0.3), HELD_OUT)[0].keys() == {n for n in held_out if n.startswith("1/")}
    os.rename(tmp_path / "x", tmp_path / "y")
    assert read(Data(path=str(tmp_path / "y"), holdout=0.3), HELD_OUT)[0] == held_out
    assert read(Data(path=str(tmp_path / "y"), holdout=0.0), HELD_OUT)[0] == {}


def test_the_standard_library_is_its_source_without_tests():
    root = Path(sysconfig.get_path("stdlib"))

    def wanted(excluded, folder=root):
        names = [path.relative_to(root).as_posix() for path in folder.glob("[!.]*.py") if path.is_file()]
        below = [path for path in folder.glob("[!.]*/") if path.is_dir() and not path.is_symlink() and path.name not in excluded]
        return names + [name for path in below for name in wanted(excluded, path)]

    never = {"site-packages", "dist-packages", "__pycache__"}
    (dataset,) = find_datasets(Data(path="python:stdlib"))
    (with_tests,) = find_datasets(Data(path="python:stdlib+tests"))
    assert list(dataset.files) == sorted(wanted(never | {"test", "tests"})) and "json/decoder.py" in dataset.files
    assert list(with_tests.files) == sorted(wanted(never)) and set(dataset.files) <= set(with_tests.files)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\xff\n", r"a\.txt:2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3"}', r"a\.jsonl:2: byte 0xc3 is not UTF-8"),
        ("a.jsonl", b'\n{"text": "x"', r"a\.jsonl:2: not valid JSON: .* at column 13"),
        ("a.jsonl", b'["text"]', r"a\.jsonl:1: a JSON list; allowed: an object"),
        ("a.jsonl", b'{"txt": 1, "other": 2}', r"a\.jsonl:1: no column 'text' \(data.text_column\), or .*; its columns: 'txt', 'other'"),
        ("a.jsonl", b'{"' + b"k" * 9000 + b'": 1}', r"a\.jsonl:1: no column 'text' .*; its columns: 'k{79}; mend"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: 'text' is of type NoneType; allowed: a string"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: 'text' has half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, r"a\.jsonl:1: "),
        ("a.jsonl", b'{"text": ' + b"1" * 10_000 + b"}", r"a\.jsonl:1: "),
    ],
)
def test_undecodable_text_is_an_error_or_skipped_named_and_counted(tmp_path, name, content, message):
    write_texts(tmp_path, {name: content, "good.txt": "good"})
    with pytest.raises(UserError, match=message) as error:
        read(Data(path=str(tmp_path)))
    assert "\n" not in str(error.value) and 'data.on_invalid = "skip"' in str(error.value)
    texts, found = read(Data(path=str(tmp_path), on_invalid="skip"))
    assert texts["good.txt"] == "good" and sum(found.dropped.values()) == 1 == len(found.skipped_names)
    assert str(tmp_path / name) in found.skipped_names[0] and found.documents == len(texts) + 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "{root}/nowhere"}, "data.path = .*nowhere': no such file or folder"),
        ({"path": ""}, "data.path = '': no such file or folder"),
        ({"path": "python:std"}, "unknown corpus; allowed: python:stdlib, python:stdlib"),
        ({"datasets": ["cod"]}, "no 'cod' below data.path = .*; the nearest is 'code'"),
        ({"datasets": ["../root"]}, "'../root' leaves data.path"),
        ({"datasets": ["code", "code/deep"]}, "'code/deep' lies in 'code'"),
        ({"path": "{root}/code/a.txt", "datasets": ["x"]}, "is a file, it has no sub-folders"),
        ({"datasets": ["code", "empty"]}, r"empty: empty dataset, no file with suffix .txt, .md, .py, .jsonl, .*; there are: .bin$"),
        ({"format": "jsonl"}, "empty dataset, no file with suffix .jsonl, .ndjson"),
    ],
)
def test_mistakes_in_the_keys_are_named(tmp_path, keys, message):
    root = tmp_path / "root"
    write_texts(root, {"code/a.txt": "a", "code/deep/a.txt": "a", "text/a.txt": "a", "empty/a.bin": "a"})
    keys = {"path": "{root}"} | keys
    with pytest.raises(UserError, match=message) as error:
        find_datasets(Data(**(keys | {"path": keys["path"].format(root=root)})))
    assert "\n" not in str(error.value)


def test_evaluation_text_of_its_own(tmp_path):
    write_texts(tmp_path, {"train/a.txt": "a", "val/b.txt": "b"})
    data = Data(path=str(tmp_path / "train"), val_path=str(tmp_path / "val"))
    assert [dataset.files for dataset in validation_datasets(data)] == [("b.txt",)]
    data.val_path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data.val_path = .*nowhere': no such file or folder"):
        validation_datasets(data)
