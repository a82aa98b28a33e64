"""prepare tokenises ahead, says what it found, shows what is supervised, and makes tokenizers."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from spectitan.config.sections import Data
from spectitan.data import corpus
from spectitan.data.documents import HELD_OUT, TRAINING, Found, find_datasets, read_documents
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer, train_bpe
from spectitan.prepare import main, show_sample, uses_colour
from tests.unit.chat_fixtures import CHATS, TEMPLATES, chat_folder, template
from tests.unit.data_fixtures import ByteTokenizer, make_data, text, tokenizer_folder, write_texts


@pytest.fixture
def folder(tmp_path):
    """text/code and text/prose, and a base that is only a tokenizer."""
    write_texts(tmp_path / "text", {f"code/{i}.txt": text(i) for i in range(30)} | {f"prose/{i}.md": text(i, 90) for i in range(30)})
    write_texts(tmp_path / "text", {f"code/empty{i}.txt": "" for i in range(4)} | {"code/broken.txt": b"\xff"})
    tokenizer_folder(tmp_path / "base")
    return tmp_path


def flags(folder, **changes):
    keys = {"base.path": folder / "base", "data.path": folder / "text", "data.cache_dir": folder / "cache", "data.seq_length": 31}
    keys |= {"data.on_invalid": "skip", "data.holdout": 0.2, "prepare.show": 0}
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{key}={value}" for key, value in keys.items()]


def test_what_was_found_is_printed(folder, capsys):
    assert main(flags(folder, data__datasets="code,prose", data__weights="3,1")) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: re.split(r"\s{2,}", line.replace(",", "")) for line in output.splitlines()[1:3]}
    tokenizer = load_tokenizer(folder / "base")
    data = Data(path=str(folder / "text"), datasets=["code", "prose"], holdout=0.2, on_invalid="skip")
    for dataset, share in zip(find_datasets(data), ("75.00%", "25.00%")):
        expected = []
        for part in (TRAINING, HELD_OUT):
            texts = [document.content for document in read_documents(dataset, data, part, Found()) if document.content]
            tokens = sum(len(tokenizer.encode(content)) for content in texts)
            expected += [len(texts), tokens, sum(len(content.encode()) for content in texts)]
        documents, tokens, size, held_out, held_out_tokens, _ = expected
        row = rows[dataset.name]
        assert row[1:5] == [str(documents), str(tokens), str(tokens), str(size)] and float(row[5]) == pytest.approx(size / tokens, abs=1e-3)
        assert row[6:] == [str(-(-tokens // 31)), share, str(held_out), str(held_out_tokens)]
    code = find_datasets(data)[0]
    empty = sum(not document.content for document in read_documents(code, data, TRAINING, Found()))
    assert empty > 0 and f"code: dropped {empty} (empty)" in output and "code: dropped 1 (invalid UTF-8)" in output
    assert f"code: skipped {folder}/text/code/broken.txt:1" in output


def test_counts_of_targets_are_written(folder, capsys):
    path = folder / "new" / "token_freq.pt"
    keys = {"data__datasets": "code,prose", "data__weights": "1,0", "prepare__token_freq": path}
    for _ in range(2):  # a file that is there is replaced
        assert main(flags(folder, **keys)) == 0
    tokenizer = load_tokenizer(folder / "base")
    data = Data(path=str(folder / "text"), datasets=["code"], holdout=0.2, on_invalid="skip")
    texts = [document.content for document in read_documents(find_datasets(data)[0], data, TRAINING, Found()) if document.content]
    expected = Counter(token for text in texts for token in tokenizer.document(tokenizer.encode(text))[1:])
    assert torch.load(path, weights_only=True) == expected
    counted = f"{len(expected)} of {tokenizer.vocab_size} tokens are targets, {sum(expected.values()):,} times together: {path}"
    assert counted in capsys.readouterr().out


def test_training_finds_everything_in_the_cache(folder, monkeypatch):
    assert main(flags(folder)) == 0
    monkeypatch.setattr(corpus, "_write_shards", None)
    data = make_data(folder, seq_length=31, on_invalid="skip", holdout=0.2)
    build_loader(data, load_tokenizer(folder / "base"), seed=1, global_batch_size=1, micro_batch_size=1)


def test_an_example_shows_what_is_supervised(tmp_path):
    write_texts(tmp_path / "text", {"a.txt": "One\x1b[2J", "b.txt": "Two größe"})
    tokenizer = ByteTokenizer()
    batch = next(build_loader(make_data(tmp_path, seq_length=21), tokenizer, seed=0, global_batch_size=1, micro_batch_size=1))
    plain = show_sample(batch, tokenizer, ["name"], colour=False)
    # 18 bytes and 2 ends; the first of each document is no target, and there is one token of padding.
    first, second = "--- document of 8 tokens\n[[O]]ne\\x1b[2J", "--- document of 12 tokens\n[[T]]wo größe"
    header = "--- name, sample 0: 21 tokens, 18 supervised, documents: 2"
    assert plain in (f"{header}\n{first}\n{second}", f"{header}\n{second}\n{first}")
    coloured = show_sample(batch, tokenizer, ["name"], colour=True)
    assert "O\x1b[32mne\\x1b[2J\x1b[0m" in coloured and "T\x1b[32mwo größe\x1b[0m" in coloured


def test_an_example_shows_special_tokens(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", template("ChatML", False), TEMPLATES["ChatML"][1]))
    write_texts(tmp_path / "text", {"a.jsonl": json.dumps({"messages": CHATS[1]})})
    batch = next(build_loader(make_data(tmp_path, seq_length=90), tokenizer, seed=0, global_batch_size=1, micro_batch_size=1))
    shown = show_sample(batch, tokenizer, ["name"], colour=False)
    turns = ["[[<|im_start|>user\n日本語?<|im_end|>\n<|im_start|>assistant\n]]return self 😀<|im_end|>"]
    turns.append("[[\n<|im_start|>user\n  naïve\n<|im_end|>\n<|im_start|>assistant\n]]count\n    return x<|im_end|>[[\n]]")
    assert shown.endswith("tokens\n" + "".join(turns))


@pytest.mark.parametrize(("variables", "coloured"), [({}, False), ({"FORCE_COLOR": "1"}, True)])
def test_the_example_is_printed(folder, capsys, monkeypatch, variables, coloured):
    set_colours(monkeypatch, variables)
    assert main(flags(folder, prepare__show=2)) == 0
    output = capsys.readouterr().out
    assert output.count(" supervised, documents: ") == 2 and ("[[" in output, "\x1b[32m" in output) == (not coloured, coloured)


def set_colours(monkeypatch, variables):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("terminal", "variables", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_are_for_terminals_and_as_the_user_wants(monkeypatch, terminal, variables, expected):
    set_colours(monkeypatch, variables)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: terminal))
    assert uses_colour() is expected


def test_a_tokenizer_is_made_of_the_training_part(folder, capsys):
    for path in (folder / "base").iterdir():
        path.unlink()
    assert main(flags(folder, prepare__tokenizer_vocab_size=290)) == 0
    data = Data(path=str(folder / "text"), holdout=0.2, on_invalid="skip")
    (dataset,) = find_datasets(data)
    expected = train_bpe([document.content for document in read_documents(dataset, data, TRAINING, Found())], 290)
    assert (folder / "base" / "tokenizer.json").read_text(encoding="utf-8") == expected
    tokenizer = load_tokenizer(folder / "base")
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (290, 0, None)
    assert json.loads((folder / "base" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    capsys.readouterr()
    assert main(flags(folder, prepare__tokenizer_vocab_size=291)) == 2
    assert "tokenizer.json exists" in capsys.readouterr().err
    assert (folder / "base" / "tokenizer.json").read_text(encoding="utf-8") == expected


def test_prompts_are_cut_from_held_out_lines(folder, capsys):
    write_texts(folder / "text", {f"long/{i}.txt": text(i, 400) for i in range(30)})
    path = folder / "new" / "prompts.jsonl"
    cut = {"eval__prompts": path, "prepare__num_prompts": 20}
    assert main(flags(folder, **cut)) == 0
    data = Data(path=str(folder / "text"), holdout=0.2, on_invalid="skip")
    (dataset,) = find_datasets(data)
    held_out = {document.source: document.content for document in read_documents(dataset, data, HELD_OUT, Found())}
    tokenizer = load_tokenizer(folder / "base")
    prompts = [json.loads(line) for line in path.read_text().splitlines()]
    for prompt in prompts:
        lines, size = held_out[str(folder / "text" / prompt["source"])].splitlines(keepends=True), len(prompt["tokens"])
        rests = [tokenizer.encode("".join(lines[first:])) for first in range(len(lines))]
        assert 64 <= size <= 128 and any(rest[:size] == prompt["tokens"] and len(rest) > size for rest in rests)
    sources = [prompt["source"] for prompt in prompts]
    assert len(sources) == 20 and len(set(sources[:4])) == 4  # documents take turns
    before = path.read_bytes()
    assert main(flags(folder, **cut)) == 2
    assert "prepare.num_prompts writes a new file" in capsys.readouterr().err and path.read_bytes() == before
    path.unlink()
    assert main(flags(folder, **cut)) == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "nowhere"}, "data.path = 'nowhere': no such file or folder"),
        ({"data__path": ""}, "data.path is missing"),
        ({"prepare__token_freq": "{folder}/text/code/0.txt/a.pt"}, "prepare.token_freq = '{folder}/text/code/0.txt'"),
        ({"data__datasets": "coda"}, "no 'coda' below data.path"),
        ({"data__datasets": "code", "data__weights": "1,2"}, "data.weights has 2 numbers"),
        ({"data__on_invalid": "error"}, "code/broken.txt:1: byte 0xff is not UTF-8"),
        ({"data__suffixes": ".none"}, "empty dataset, no file with suffix .none"),
        ({"base__path": "nowhere"}, "base.path = 'nowhere'"),
        ({"base__path": "{folder}/text"}, "no tokenizer in this folder"),
        ({"data__drop_overlap": "nowhere.jsonl"}, "nowhere.jsonl: prompts file nowhere.jsonl: No such file or directory"),
        ({"data__cache_dir": "{folder}/text/code/0.txt"}, "data.cache_dir = '{folder}/text/code/0.txt': File exists; allowed: a folder"),
        (
            {"base__path": "{folder}/text", "prepare__tokenizer_vocab_size": 256},
            "prepare.tokenizer_vocab_size = 256; allowed: 0, or above 256",
        ),
        ({"base__path": "{folder}/text", "prepare__tokenizer_vocab_size": 5000}, "prepare.tokenizer_vocab_size = 5000: the text gives"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, capsys, monkeypatch, changes, message):
    monkeypatch.setattr("spectitan.prepare._in_a_process", lambda function, *arguments: function(*arguments))
    before = {path: path.stat().st_mtime_ns for path in (folder / "text").rglob("*")}
    changes = {key: str(value).format(folder=folder) for key, value in changes.items()}
    assert main(flags(folder, **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spectitan.prepare: ") and message.format(folder=folder) in line
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "text").rglob("*")}, "nothing is touched"
    assert not list(folder.glob("cache/*.tmp"))


def test_the_program_really_starts(folder):
    run = subprocess.run(
        [sys.executable, "-m", "spectitan.prepare", *flags(folder, data__path=folder / "nowhere")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"spectitan.prepare: data.path = '{folder}/nowhere': no such file or folder\n"
