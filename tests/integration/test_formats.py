"""Every row of the tables of formats in docs/data.md: prepare and train take an example of it, and ids and masks are those that were written."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from spectitan import prepare, train
from spectitan.data.shards import Shards
from spectitan.data.tokenizer import load_tokenizer
from spectitan.training.checkpoint_reading import read_tensors
from tests.integration import tiny
from tests.unit.data_fixtures import documents_of, masks_of
from tests.unit.source_fixtures import hub_snapshot, packed, save_to_disk, write_fms_shard, write_stream

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TEXTS = [tiny.text(number) for number in (100, 101, 102)]
IDS = [[(number * 37 + place * 11) % (tiny.VOCAB - 1) + 1 for place in range(5 + 13 * number)] for number in range(1, 5)]
MASKS = [[(place + len(ids)) % 3 > 0 for place in range(len(ids))] for ids in IDS]
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}{{ '</' + message.role + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHATS = [[{"role": "user", "content": f"größe {n}"}, {"role": "assistant", "content": f"return {n}"}] for n in (1, 22, 333)]

# What is read of a document: either its ids and mask, or its text and the part that is supervised.
Expected = list[tuple[list[int], list[bool]]] | list[tuple[str, str]]
AS_TEXT = [(text, text) for text in TEXTS]
AS_PROMPT = [(f"<user>größe {n}</user><assistant>return {n}", f"return {n}") for n in (1, 22, 333)]
AS_CHAT = [(f"{text}</assistant>", said) for text, said in AS_PROMPT]
AS_IDS = [(ids, [True] * len(ids)) for ids in IDS]
WITH_MASKS = list(zip(IDS, MASKS))

TEXT_ROWS = [{"text": text} for text in TEXTS]
CHAT_ROWS = [{"messages": chat} for chat in CHATS]
QUESTION_ROWS = [{"question": chat[0]["content"], "answer": chat[1]["content"]} for chat in CHATS]
ARCTIC_ROWS = [{"input": ids[:3], "output": ids[3:]} for ids in IDS]
TOKEN_ROWS = [{"tokens": ids} for ids in IDS]
MASK_ROWS = [{"input_ids": ids, "loss_mask": list(map(int, mask)), "seq_len": len(ids)} for ids, mask in WITH_MASKS]


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def columns(rows: list[dict]) -> dict[str, pa.Array]:
    return {name: pa.array([row[name] for row in rows]) for name in rows[0]}


def write_texts(folder: Path) -> Expected:
    for suffix, text in zip((".md", ".py", ".txt"), TEXTS):
        (folder / f"a{suffix}").write_text(text, encoding="utf-8")
    return AS_TEXT


def write_jsonl(folder: Path, rows: list[dict] = TEXT_ROWS, expected: Expected = AS_TEXT) -> Expected:
    (folder / "a.jsonl").write_bytes(jsonl(rows[:2]))
    (folder / "b.ndjson").write_bytes(jsonl(rows[2:]))
    return expected


def write_packed(folder: Path) -> Expected:
    for name, row in zip(("a.json.gz", "b.jsonl.gz", "c.jsonl.zst"), TEXT_ROWS):
        (folder / name).write_bytes(packed(jsonl([row]), name[-4:] if name.endswith("zst") else ".gz"))
    return AS_TEXT


def write_parquet(folder: Path) -> Expected:
    pa.parquet.write_table(pa.Table.from_pylist(CHAT_ROWS), folder / "a.parquet")
    return AS_CHAT


def write_arrow(folder: Path) -> Expected:
    write_stream(folder / "a.arrow", columns(QUESTION_ROWS), rows_a_batch=2)
    return AS_PROMPT


def write_fms(folder: Path) -> Expected:
    write_fms_shard(folder / "one.arrow", IDS[:3])
    write_fms_shard(folder / "sub/two.arrow", IDS[3:])
    return AS_IDS


def write_pt(folder: Path) -> Expected:
    for number, (ids, mask) in enumerate(WITH_MASKS):
        torch.save({"input_ids": torch.tensor(ids), "loss_mask": torch.tensor(mask)}, folder / f"data_{number}.pt")
    return WITH_MASKS


def write_saved(folder: Path) -> Expected:
    save_to_disk(folder, [columns(MASK_ROWS[:3]), columns(MASK_ROWS[3:])])
    return WITH_MASKS


def of_rows(rows: list[dict], expected: Expected) -> Callable[[Path], Expected]:
    return lambda folder: write_jsonl(folder, rows, expected)


HUB, PT = "`organisation/name`", "`.pt`"
EXAMPLES = {
    "`.txt`, `.md`, `.py` (`data.suffixes`)": write_texts,
    "`.jsonl`, `.ndjson`": write_jsonl,
    "`.jsonl.gz`, `.jsonl.zst`, also `.ndjson` and `.json`": write_packed,
    "`.parquet`": write_parquet,
    "`.arrow`": write_arrow,
    PT: write_pt,
    "`.arrow` of single numbers": write_fms,
    "a folder that `datasets` saved": write_saved,
    HUB: write_packed,
    "`data.text_column` (text)": of_rows(TEXT_ROWS, AS_TEXT),
    "`data.prompt_key` and `data.response_key` (question, answer)": of_rows(QUESTION_ROWS, AS_PROMPT),
    "`data.messages_key` (messages)": of_rows(CHAT_ROWS, AS_CHAT),
    "input and output": of_rows(ARCTIC_ROWS, [(ids, [False] * 3 + [True] * (len(ids) - 3)) for ids in IDS]),
    "`data.tokens_column` (tokens)": of_rows(TOKEN_ROWS, AS_IDS),
    "`data.input_ids_column` and `data.loss_mask_column` (input_ids, loss_mask)": of_rows(MASK_ROWS, WITH_MASKS),
}


# What the log says of those that are not JSON lines of text.
PACKED = "2 files of JSON lines (.gz), 1 file of JSON lines (.zst)"
SEEN = {
    "`.txt`, `.md`, `.py` (`data.suffixes`)": ("3 files of text", "tokens"),
    "`.jsonl.gz`, `.jsonl.zst`, also `.ndjson` and `.json`": (PACKED, "3 rows of text"),
    "`.parquet`": ("1 file of Parquet", "3 rows of messages"),
    "`.arrow`": ("1 file of Arrow", "3 rows of prompt and response"),
    PT: ("4 files of PyTorch", "4 rows of ids with a mask"),
    "`.arrow` of single numbers": ("2 files of Arrow", "4 rows of ids"),
    "a folder that `datasets` saved": ("2 files of Arrow", "4 rows of ids with a mask"),
    HUB: (PACKED, "3 rows of text"),
}
KINDS = {
    "`data.prompt_key` and `data.response_key` (question, answer)": "3 rows of prompt and response",
    "`data.messages_key` (messages)": "3 rows of messages",
    "input and output": "4 rows of ids of prompt and response",
    "`data.tokens_column` (tokens)": "4 rows of ids",
    "`data.input_ids_column` and `data.loss_mask_column` (input_ids, loss_mask)": "4 rows of ids with a mask",
}


def first_cells(head: str) -> list[str]:
    table = PAGE[PAGE.index(head) :].partition("\n\n")[0]
    return [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]


def test_every_row_of_the_tables_has_its_example():
    rows = first_cells("| files | hold |") + first_cells("| a row has the columns |")
    assert len(rows) == 15 and rows == list(EXAMPLES)
    formats = re.search(r"\| files \| hold \|.*?\n\n", PAGE, re.DOTALL)[0]
    named = {line.split(" | ")[-1].rstrip(" |") for line in formats.splitlines()[2:] if line}
    assert named == {"text", "jsonl", "parquet", "arrow", "pt", "all"}


@pytest.fixture(scope="module")
def base(world) -> Path:
    (world.root / "base" / "chat_template.jinja").write_text(TEMPLATE)
    return world.root / "base"


def formats(row: str) -> list[str]:
    """auto, but for what it leaves alone, and the format that the page says."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row} |")]
    said = line.split(" | ")[-1].rstrip(" |")
    return [said] if row == PT else ["auto", said] if said in ("text", "jsonl", "parquet", "arrow") else ["auto"]


@pytest.mark.parametrize(("row", "format"), [(row, format) for row in EXAMPLES for format in formats(row)])
def test_prepare_takes_it(world, base, tmp_path, monkeypatch, capsys, caplog, row, format):
    caplog.set_level("INFO")
    path = folder = tmp_path / "data"
    if row == HUB:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        path, folder = "team/texts", hub_snapshot(tmp_path / "hub", "dataset", "team/texts", {"README.md": b"# A card"})
    folder.mkdir(exist_ok=True)
    expected = EXAMPLES[row](folder)
    keys = {"base.path": base, "data.path": path, "data.format": format, "data.cache_dir": tmp_path / "cache", "data.seq_length": 31}
    assert prepare.main([f"--{key}={value}" for key, value in keys.items()]) == 0
    assert f"\n{path} " in capsys.readouterr().out
    (said,) = [record.getMessage() for record in caplog.records if " documents, " in record.getMessage()]
    files, rows = SEEN.get(row, ("2 files of JSON lines", KINDS.get(row, "3 rows of text")))
    assert said.startswith(f"data {path}: {files}, {len(expected)} documents, ") and rows in said
    (shards,) = [Shards(meta.parent) for meta in (tmp_path / "cache").glob("*/meta.json")]
    tokenizer, end = load_tokenizer(base), [tiny.CONFIG.eos_token_id]
    found = list(zip(documents_of(shards), masks_of(shards), strict=True))
    if isinstance(expected[0][0], str):
        decode = tokenizer.decode
        assert [(decode(ids), decode([i for i, kept in zip(ids, mask) if kept])) for ids, mask in found] == expected
    else:
        framed = expected is AS_IDS  # with the end of a text
        assert found == [(ids + end * framed, mask + [True] * framed) for ids, mask in expected]


def test_train_takes_all_of_them_together(world, base, tmp_path):
    names = {f"{number:02}": write for number, (row, write) in enumerate(EXAMPLES.items()) if row not in (HUB, PT)}
    for name, write in names.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        write(tmp_path / "data" / name)
    changes = tiny.SHORT | {"data__path": tmp_path / "data", "data__datasets": ",".join(names), "data__holdout": 0, "eval__prompts": "none"}
    flags = world.flags(tmp_path / "run", **changes, data__weights=",".join("1" for _ in names), training__global_batch_size=26)
    assert train.main(flags) == 0
    last = tiny.reports(tmp_path / "run")[-1]
    assert last["step"] == 4 and {name for name, tokens in last["tokens_by_dataset"].items() if tokens} == set(names)


def test_train_takes_a_base_of_the_hub_and_the_export_says_its_name(world, base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_snapshot(tmp_path / "hub", "model", "team/Tiny-1B", {path.name: path.read_bytes() for path in base.iterdir()})
    changes = tiny.SHORT | {"base__path": "team/Tiny-1B", "export__format": "mlp_speculator"}
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "team/Tiny-1B"
    tensors = checkpoint_tensors(tmp_path / "run")
    assert train.main(world.flags(tmp_path / "other", **changes | {"base__path": base})) == 0
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in checkpoint_tensors(tmp_path / "other").items())


def checkpoint_tensors(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(tiny.checkpoint(run, 4), "speculator.")
