"""Rows of JSON lines and Parquet: recognised by their columns, nested as VERL nests them, and refused or counted by reason."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from spectitan.data.corpus import tokenise_held_out, tokenise_training
from spectitan.data.documents import HELD_OUT, TRAINING, Found, Ids, Messages, PromptResponse, find_datasets, read_documents
from spectitan.data.rendering import texts_of
from spectitan.data.tokenizer import load_tokenizer
from spectitan.errors import UserError
from tests.unit.chat_fixtures import CHATS, TEMPLATES, TOOLS, chat_folder, template
from tests.unit.data_fixtures import ByteTokenizer, documents_of, make_data, masks_of

BYTES = ByteTokenizer(bos_id=1, eos_id=0)


def write(folder: Path, rows: list[dict], suffix: str, name: str = "a") -> Path:
    path = folder / "text" / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder, **keys):
    """Contents and their rows, and what was found."""
    data, found = make_data(folder, **keys), Found()
    (dataset,) = find_datasets(data)
    documents = list(read_documents(dataset, data, None, found))
    return [document.content for document in documents], [int(document.source.rpartition(":")[2]) for document in documents], found


def tokenised(folder, tokenizer=BYTES, **keys):
    ((_, shards),) = tokenise_training(make_data(folder, **keys), tokenizer)
    return shards


both = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])

QUESTIONS = [{"question": f"größe {i}?", "answer": f"{i} 日本", "other": i} for i in range(7)]


@both
def test_prompt_and_response(tmp_path, suffix):
    write(tmp_path, QUESTIONS, suffix)
    contents, rows, found = read(tmp_path)
    assert contents == [PromptResponse(row["question"], row["answer"]) for row in QUESTIONS] and rows == list(range(1, 8))
    assert found.documents == 7 and found.kinds == {"prompt and response": 7}
    shards = tokenised(tmp_path)
    prompts, responses = ([BYTES.encode(row[key]) for row in QUESTIONS] for key in ("question", "answer"))
    assert documents_of(shards) == [[1, *prompt, *response, 0] for prompt, response in zip(prompts, responses)]
    masks = [[False] * (1 + len(prompt)) + [True] * (len(response) + 1) for prompt, response in zip(prompts, responses)]
    assert masks_of(shards) == masks and shards.meta["supervised"] == sum(map(sum, masks))
    assert shards.meta["bytes"] == sum(len(part) for part in prompts + responses)
    assert shards.meta["longest"] == max(map(len, masks)) and shards.meta["kinds"] == {"prompt and response": 7}


@both
def test_nested_keys_lead_to_prompt_and_response(tmp_path, suffix):
    rows = [{"extra": {"q": [{"text": row["question"]}], "a": row["answer"]}} for row in QUESTIONS]
    write(tmp_path, rows, suffix)
    keys = {"prompt_key": "extra", "prompt_dict_keys": ["q", "text"], "response_key": "extra", "response_dict_keys": ["a"]}
    assert read(tmp_path, **keys)[0] == [PromptResponse(row["question"], row["answer"]) for row in QUESTIONS]
    with pytest.raises(UserError, match=r":1: no 'b' in 'extra' \(data.response_dict_keys\); its keys: 'q', 'a'"):
        read(tmp_path, **keys | {"response_dict_keys": ["b"]})
    with pytest.raises(UserError, match=r":1: no 'b' in 'extra'.'a' \(data.response_dict_keys\); it is of type str"):
        read(tmp_path, **keys | {"response_dict_keys": ["a", "b"]})


@both
def test_text_ids_and_messages(tmp_path, suffix):
    write(tmp_path / "text", [{"content": "größe"}, {"content": "x"}], suffix)
    assert read(tmp_path / "text", text_column="content")[0] == ["größe", "x"]
    write(tmp_path / "ids", [{"input": [5, 6], "output": [7]}, {"input": [], "output": [8, 9]}], suffix)
    contents, _, found = read(tmp_path / "ids")
    assert all(isinstance(content, Ids) for content in contents) and found.kinds == {"ids of prompt and response": 2}
    shards = tokenised(tmp_path / "ids")
    assert documents_of(shards) == [[5, 6, 7], [8, 9]] and masks_of(shards) == [[False, False, True], [True, True]]
    assert shards.meta["bytes"] == 0
    write(tmp_path / "chats", [{"messages": chat} for chat in CHATS], suffix)
    assert read(tmp_path / "chats")[0] == [Messages(chat) for chat in CHATS]


@both
def test_chats_of_sharegpt(tmp_path, suffix):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    chats = [[{"role": "system", "content": "naïve"}, *CHATS[0]], CHATS[1]]
    rows = [{"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in chats]
    write(tmp_path, [*rows, {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]}], suffix)
    contents, _, found = read(tmp_path, messages_key="conversations")
    assert contents == [Messages(chat) for chat in chats] and found.dropped == {"unknown role in 'conversations' (data.messages_key)": 1}


def test_a_parquet_file_has_keys_that_its_messages_do_not(tmp_path):
    calls = [{"name": "f", "arguments": {"x": "1"}}, {"name": "g", "arguments": {"y": [{"z": 2}]}}]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    write(tmp_path, [{"messages": chat}], ".parquet")
    ((content,), _, _) = read(tmp_path)
    assert content.messages == [chat[0], {"role": "assistant", "tool_calls": calls}]


@both
@pytest.mark.parametrize("written", [lambda tools: tools, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
def test_tools_stand_beside_messages(tmp_path, suffix, written):
    rows = [{"messages": CHATS[0], "functions": written(TOOLS)}, {"messages": CHATS[1], "functions": None}]
    write(tmp_path, rows, suffix)
    assert read(tmp_path, tools_key="functions")[0] == [Messages(CHATS[0], TOOLS), Messages(CHATS[1])]
    assert read(tmp_path)[0] == read(tmp_path, tools_key="")[0] == [Messages(CHATS[0]), Messages(CHATS[1])]
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", template("tools", False), TEMPLATES["tools"][1]))
    with_tools = tokenised(tmp_path, tokenizer, tools_key="functions")
    assert with_tools.folder != tokenised(tmp_path, tokenizer).folder
    texts = [tokenizer.decode(ids) for ids in documents_of(with_tools)]
    schema = json.dumps(TOOLS[0])
    assert sorted(schema in text for text in texts) == [False, True]


@pytest.mark.parametrize("tools", ["{", ["{"], [1], {"type": "function"}])
def test_tools_that_are_none_are_refused(tmp_path, tools):
    write(tmp_path, [{"messages": CHATS[0], "tools": tools}], ".jsonl")
    with pytest.raises(UserError, match=r"a.jsonl:1: 'tools' \(data.tools_key\) is (not valid JSON|no list of JSON schemas); mend"):
        read(tmp_path)


def test_chats_and_prompts_and_text_in_one_dataset(tmp_path):
    tokenizer = load_tokenizer(chat_folder(tmp_path / "base", template("ChatML", False), TEMPLATES["ChatML"][1]))
    write(tmp_path, [{"messages": chat} for chat in CHATS], ".jsonl", "a")
    write(tmp_path, QUESTIONS, ".parquet", "b")
    (tmp_path / "text" / "c.txt").write_text("self = x")
    shards = tokenised(tmp_path, tokenizer)
    assert shards.meta["kinds"] == {"messages": 3, "prompt and response": 7} and shards.meta["documents"] == 11
    ids, masks = documents_of(shards), masks_of(shards)
    text = tokenizer.document(tokenizer.encode("self = x"))
    assert ids[-1] == text and masks[-1] == [True] * len(text)
    supervised = [tokenizer.decode([i for i, kept in zip(*pair) if kept]) for pair in zip(ids, masks)]
    said = ["".join(message["content"] for message in chat if message["role"] == "assistant") for chat in CHATS]
    assert supervised == [*said, *(row["answer"] for row in QUESTIONS), "self = x"]


def test_rows_are_held_out_by_hash_in_either_format(tmp_path):
    write(tmp_path, [{"text": f"{i} größe"} for i in range(300)], ".parquet")
    data = make_data(tmp_path, holdout=0.3)
    (dataset,) = find_datasets(data)
    parts = {part: list(read_documents(dataset, data, part, Found())) for part in (TRAINING, HELD_OUT, None)}
    assert sorted(parts[TRAINING] + parts[HELD_OUT], key=lambda d: int(d.content.split()[0])) == parts[None]
    assert 60 < len(parts[HELD_OUT]) < 120
    assert parts[None][-1].bytes_read == dataset.num_bytes()


def test_validation_files_of_any_format(tmp_path):
    write(tmp_path, [{"text": "for training"}], ".jsonl")
    path = write(tmp_path / "other", QUESTIONS, ".parquet", "validation")
    ((name, shards),) = tokenise_held_out(make_data(tmp_path, val_path=str(path)), BYTES)
    assert name == str(path) and shards.meta["documents"] == 7 and shards.masked


@both
def test_answers_that_say_nothing_are_skipped_and_counted(tmp_path, suffix):
    answers = ["yes", "", None, " \n", "no"]
    write(tmp_path, [{"question": "x", "answer": answer} for answer in answers], suffix)
    contents, rows, found = read(tmp_path)
    assert [content.response for content in contents] == ["yes", "no"] and rows == [1, 5] and found.documents == 5
    counts = {"empty 'answer' (data.response_key)": 2, "no string in 'answer' (data.response_key)": 1}
    assert found.dropped == counts == tokenised(tmp_path).meta["dropped"]


@both
def test_a_dataset_whose_answers_are_all_empty_is_refused_with_the_key(tmp_path, suffix):
    write(tmp_path, [{"question": "x", "answer": ""}] * 3, suffix)
    with pytest.raises(UserError, match=r"no training document in it; its documents: 3 empty 'answer' \(data.response_key\)"):
        tokenised(tmp_path)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_chats_that_say_nothing_are_skipped_and_counted(tmp_path):
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    silent = assistant | {"content": ""}
    number, narrator = user | {"content": 5}, user | {"role": "narrator"}
    chats = [[user, assistant], [user], [], [user, narrator, assistant], "x", [user, "x"], None, [number, assistant], [user, silent]]
    write(tmp_path, [{"messages": chat} for chat in chats], ".jsonl")
    contents, rows, found = read(tmp_path)
    assert rows == [1] and contents == [Messages(chats[0])]
    of = "in 'messages' (data.messages_key)"
    expected = {f"no assistant turn {of}": 3, f"unknown role {of}": 1, f"no list of messages {of}": 3, f"a message without text {of}": 1}
    assert found.dropped == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"Question": 1, "text2": 2},
            r"no column 'text' \(data.text_column\), or 'question' and 'answer' .*; its columns: 'Question', 'text2'",
        ),
        ({"question": "x"}, r"no column .*; its columns: 'question'"),
        ({"text": "x", "messages": []}, r"its columns could be text \(data.text_column\) and messages \(data.messages_key\)"),
        ({"text": 5}, r"'text' is of type int; allowed: a string"),
        ({"input": [5], "output": [1.5]}, r"'output' is no list of token ids"),
        ({"input": [True], "output": [1]}, r"'input' is no list of token ids"),
        (
            {"input": "a", "output": "b"},
            r"'input' is no list of token ids; allowed: one, or text that data.prompt_key and data.response_key name",
        ),
        ({"input": [5], "output": [2**80]}, r"'output' is no list of token ids"),
        ({"input": [5], "output": [4, 258]}, r"token id 258; this tokenizer's are 0 .. 257"),
        ({"input": [-1], "output": [4]}, r"token id -1; this tokenizer's are 0 .. 257"),
        ({"question": "\ud800", "answer": "x"}, r"'question' has half of a surrogate pair"),
        ({"messages": [{"role": "assistant", "content": "\udc00"}]}, r"'messages' \(data.messages_key\) has half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_read_names_its_place_or_is_skipped(tmp_path, row, message):
    write(tmp_path, [{"input": [3], "output": [4, 5]}, row], ".jsonl")
    with pytest.raises(UserError, match=rf"text/a\.jsonl:2: {message}.*on_invalid") as error:
        tokenised(tmp_path)
    assert "\n" not in str(error.value)
    shards = tokenised(tmp_path, on_invalid="skip")
    assert documents_of(shards) == [[3, 4, 5]] and shards.meta["dropped"] == {"invalid row": 1}
    assert shards.meta["skipped"] == [f"{tmp_path}/text/a.jsonl:2"]


def test_an_empty_key_names_no_column(tmp_path):
    write(tmp_path, [{"text": "x", "messages": CHATS[0], "input": "a", "output": "b"}], ".jsonl")
    assert read(tmp_path, text_column="", prompt_key="input", response_key="output", messages_key="")[0] == [PromptResponse("a", "b")]


def test_parquet_without_the_columns_names_those_it_has(tmp_path):
    path = write(tmp_path, [{"a": 1, "b c": 2}], ".parquet")
    with pytest.raises(UserError, match=rf"^{path}: no column 'text' .* or 'messages' \(data.messages_key\).*; its columns: 'a', 'b c'$"):
        read(tmp_path, on_invalid="skip")


@pytest.mark.parametrize("damage", ["truncated", "footer", "page", "text"])
def test_damaged_parquet_files_are_named_or_skipped(tmp_path, damage):
    write(tmp_path, QUESTIONS, ".parquet", "good")
    path = write(tmp_path, [{"question": str(np.random.default_rng(i).bytes(99)), "answer": "x"} for i in range(9)], ".parquet", "bad")
    content = bytearray(path.read_bytes())
    if damage == "page":
        content[20:200] = bytes(180)
    path.write_bytes(
        {"truncated": content[:-30], "footer": content[:-100] + bytes(92) + content[-8:], "page": content, "text": b"{}"}[damage]
    )
    with pytest.raises(UserError, match=rf"^{path}: damaged Parquet file: .*on_invalid") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    contents, _, found = read(tmp_path, on_invalid="skip")
    assert contents[-7:] == [PromptResponse(row["question"], row["answer"]) for row in QUESTIONS]
    assert found.dropped == {"damaged file": 1} and found.skipped_names == [str(path)]


def test_without_pyarrow_one_line_says_how_to_install_it(tmp_path):
    path = write(tmp_path, QUESTIONS, ".parquet")
    code = f"""
import sys
sys.modules["pyarrow"] = None
from spectitan.data.documents.parquet import rows
try:
    next(rows(__import__("pathlib").Path({str(path)!r}), []))
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f'UserError {path}: reading it needs the package pyarrow: pip install "spectitan[parquet]"\n'


def test_the_cache_is_keyed_by_how_rows_are_read(tmp_path):
    rows = [row | {"answer2": row["answer"] + "!"} for row in QUESTIONS]
    write(tmp_path, rows, ".jsonl")
    one, again, other = tokenised(tmp_path), tokenised(tmp_path, seq_length=99), tokenised(tmp_path, response_key="answer2")
    assert one.folder == again.folder != other.folder
    sources = {name: (template(name, True), TEMPLATES[name][1]) for name in ("ChatML", "brackets")}
    folders = [tokenised(tmp_path, load_tokenizer(chat_folder(tmp_path / name, *source))).folder for name, source in sources.items()]
    assert folders[0] != folders[1]
    write(tmp_path / "plain", [], ".txt")
    (tmp_path / "plain" / "text" / "a.txt").write_text("plain text")
    one, other = (load_tokenizer(chat_folder(tmp_path / f"{source}", source, {})) for source in ("one", "other"))
    assert tokenised(tmp_path / "plain", one).folder == tokenised(tmp_path / "plain", other).folder, "no chat template decides plain text"


def test_texts_of_a_content():
    assert texts_of("a") == ["a"] and texts_of(PromptResponse("a", "b")) == ["a", "b"]
    assert texts_of(Messages(CHATS[0])) == ["count größe", "x = 0.5"] and texts_of(Ids(np.ones(1), np.ones(1))) == []
