"""Mistakes: exit status 2, one line that names the file or key, and nothing that was saved is touched."""

import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan.chats import process
from spectitan.data.tokenizer import train_bpe
from spectitan.models.hf_config import read_config
from spectitan.models.registry import register_model
from tests.integration import tiny
from tests.integration.tiny import PROGRAMS, SHORT

# ---- configuration ----


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--training.num_stepz=3", ["training.num_stepz", "training.num_steps"]),
        ("--trainig.num_steps=3", ["trainig.num_steps", "training.num_steps"]),
        ("--speculator.type=mpl", ["speculator.type", "mpl", "mlp"]),
        ("--speculator.type=eagle3", ["speculator.speculator_width is a key of speculator.type = mlp or lstm, but", "is eagle3"]),
        ("--training.num_steps=many", ["training.num_steps", "many", "an integer"]),
        ("--training.num_steps=1.5", ["training.num_steps", "1.5", "an integer"]),
        ("--training.num_steps=0", ["training.num_steps", "0"]),
        ("--training.micro_batch_size=-2", ["training.micro_batch_size", "-2", "at least 1"]),
        ("--training.micro_batch_size=3", ["training.global_batch_size = 4", "training.micro_batch_size"]),
        ("--training.global_batch_size=1000000000000", ["training.global_batch_size", "GB on this machine", "fewer samples"]),
        ("--optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("--optimizer.lr=-1", ["optimizer.lr", "-1", "above 0"]),
        ("--optimizer.lr=inf", ["optimizer.lr", "inf"]),
        ("--job.seed=-1", ["job.seed", "-1"]),
        ("--job.deterministic=maybe", ["job.deterministic", "maybe"]),
        ("--training.compute_dtype=float16", ["training.compute_dtype", "float16", "bfloat16"]),
        ("--training.epochs=2", ["training.num_steps", "training.epochs"]),
        ("--base.init=random", ["base.init", "base.freeze"]),
        ("--training.detach_states=false", ["training.detach_states", "base.freeze = false"]),
        ("--export.format=hf", ["export.format", "hf"]),
        ("--data.weights=1,2", ["data.weights", "data.datasets"]),
        ("--speculator.n_speculator_heads=1", ["speculator.tie_weights", "speculator.n_speculator_heads"]),
        ("--speculator.path=elsewhere", ["speculator.path"]),
        ("--data.seq_length=65", ["data.seq_length = 65", "64"]),
        ("--data.seq_length=4", ["data.seq_length = 4", "step 3", "at least 5"]),
        ("--parallelism.sharding_strategy=ddp", ["parallelism.sharding_strategy", "ddp", "fsdp"]),
        ("--eval.num_draft_tokens=4", ["eval.num_draft_tokens = 4", "3"]),
        ("--eval.top_k_tokens_per_head=2,1", ["eval.top_k_tokens_per_head = [2, 1]", "3"]),
        ("--eval.prompts=nowhere.jsonl", ["nowhere.jsonl"]),
        ("--eval.num_prompts=0", ["eval.num_prompts"]),
        ("--eval.speed_prompts=0", ["eval.speed_prompts"]),
        ("--base.path=nowhere", ["base.path", "nowhere", "no such folder"]),
        ("--base.path=spectitan:nothing", ["base.path", "spectitan:nothing"]),
        ("--base.variant=9b", ["base.variant", "9b"]),
        ("--base.variant=7b", ["base.variant", "7b", "vocab_size"]),
        ("--data.path=nowhere", ["data.path", "nowhere", "no such file or folder"]),
        ("--data.path=python:stdlb", ["data.path", "python:stdlb", "python:stdlib"]),
        ("--data.val_path=nowhere", ["data.val_path", "nowhere"]),
        ("--data.datasets=nowhere", ["data.datasets", "nowhere"]),
        ("--data.suffixes=.c", ["data", "empty dataset", ".c"]),
        ("--data.cache_dir=/dev/null", ["data.cache_dir = '/dev/null'", "File exists"]),
        ("--checkpoint.load_path=nowhere", ["nowhere", "no checkpoint here"]),
    ],
)
def test_configuration(world, run, refused, flag, words):
    """Under "never", which is about to move the folder of the run that is there."""
    line = refused([*world.flags(run, **SHORT, checkpoint__resume="never"), flag])
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "text, words",
    [
        ("[training]\nnum_stepz = 3", ["broken.toml", "training.num_stepz", "training.num_steps"]),
        ("[trainings]\nnum_steps = 3", ["broken.toml", "trainings", "training"]),
        ("[training]\nnum_steps = '3'", ["broken.toml", "training.num_steps", "an integer"]),
        ("[optimizer]\nlr = nan", ["broken.toml", "optimizer.lr", "nan"]),
        ("[training\nnum_steps = 3", ["broken.toml", "line 1"]),
        ("[training]\nnum_steps = 3\n[base]\npath = 'caf\xe9'", ["broken.toml", "UTF-8", "line 4"]),
    ],
)
@pytest.mark.parametrize("program", PROGRAMS)
def test_configuration_file(tmp_path, refused, program, text, words):
    (tmp_path / "broken.toml").write_bytes(text.encode("latin-1"))
    line = refused([f"--job.config_file={tmp_path / 'broken.toml'}"], program)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_given(refused, program):
    line = refused([], program)
    assert ("data.path" if program in ("train", "prepare") else "base.path") in line


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_names_every_key(capsys, program):
    assert PROGRAMS[program].main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and f"spectitan.{program}" in printed.out
    assert all(f"--{key} " in printed.out for key in ("job.config_file", "speculator.n_speculator_heads", "optimizer.lr", "eval.prompts"))


# ---- data ----


def data_folder(tmp_path: Path, **files: bytes) -> str:
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / "data" / name.replace("__", ".")).write_bytes(content)
    return f"--data.path={tmp_path / 'data'}"


LINE = json.dumps({"text": "def f(): return 1"}).encode() + b"\n"


def parquet(**columns: list) -> bytes:
    content = io.BytesIO()
    pa.parquet.write_table(pa.table(columns), content)
    return content.getvalue()


def arrow(**columns: list) -> bytes:
    content, table = io.BytesIO(), pa.table(columns)
    with pa.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table)
    return content.getvalue()


@pytest.mark.parametrize(
    "files, words",
    [
        ({"a__txt": b"fine\n", "b__txt": b"one\ntwo\nthr\xffee\n"}, ["b.txt:3", "UTF-8", "0xff"]),
        ({"a__jsonl": LINE * 4 + b'{"text": \n'}, ["a.jsonl:5", "not valid JSON"]),
        ({"a__jsonl": LINE * 2 + b'{"content": "x"}\n'}, ["a.jsonl:3", "'text'", "data.text_column"]),
        ({"a__jsonl": LINE + b'["text"]\n'}, ["a.jsonl:2", "list"]),
        ({"a__jsonl": LINE + b'{"text": 3}\n'}, ["a.jsonl:2", "int"]),
        ({"a__jsonl": LINE + b'{"text": "\xff"}\n'}, ["a.jsonl:2", "UTF-8"]),
        ({"a__jsonl": LINE + b"[" * 100_000 + b"\n"}, ["a.jsonl:2"]),
        ({"a__txt": b"", "b__txt": b""}, ["empty dataset", "2 "]),
        ({}, ["empty dataset", ".txt"]),
        ({"a__csv": b"text", "b__bin": b"text"}, ["empty dataset", ".txt", ".bin, .csv"]),
        ({"a__jsonl": LINE * 7890 + LINE[:-2] + b"\n" + LINE}, ["a.jsonl:7891", "not valid JSON"]),
        ({"a__parquet": parquet(x=["1"], y=[2])}, ["a.parquet", "no column 'text'", "its columns: 'x', 'y'"]),
        ({"a__parquet": parquet(text=["größe"] * 999)[:-30]}, ["a.parquet", "damaged Parquet file"]),
        ({"a__arrow": arrow(text=["größe"] * 999)[:-30]}, ["a.arrow", "damaged Arrow file"]),
        ({"a__arrow": arrow(tokens=[[1, 2], [3, tiny.VOCAB]])}, ["a.arrow:2", f"token id {tiny.VOCAB}", f"0 .. {tiny.VOCAB - 1}"]),
        ({"a__jsonl": b'{"input_ids": [1, 2], "loss_mask": [1]}\n'}, ["a.jsonl:1", "'loss_mask' has 1 numbers and 'input_ids' 2"]),
        (
            {"a__jsonl": b'{"messages": [{"role": "assistant", "content": "x"}]}\n'},
            ["a.jsonl:1", "the base has none", "chat_template.jinja"],
        ),
    ],
)
@pytest.mark.parametrize("program", ["train", "prepare"])
def test_data(world, run, refused, tmp_path, files, words, program):
    flags = [*world.flags(run, **SHORT, checkpoint__resume="never"), data_folder(tmp_path, **files), "--data.holdout=0"]
    line = refused(flags, program)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("program", ["train", "prepare"])
def test_the_nearest_dataset_is_named(world, run, refused, tmp_path, program):
    for name in ("code", "prose"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("def f(): return 1")
    line = refused(world.flags(run, **SHORT, data__path=tmp_path, data__datasets="code,porse", checkpoint__resume="never"), program)
    assert f"data.datasets: no 'porse' below data.path = {tmp_path}; the nearest is 'prose'" in line


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "it has not ended within 0.2 s"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "not a chat template: "),
    ],
)
def test_templates(world, run, refused, tmp_path, monkeypatch, template, problem):
    monkeypatch.setattr(process, "LIMIT_SECONDS", 0.2)
    shutil.copytree(world.root / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    data = data_folder(tmp_path, a__jsonl=json.dumps(row).encode())
    line = refused([*world.flags(run, **SHORT, base__path=tmp_path / "base", checkpoint__resume="never"), data])
    assert problem in line and "chat_template.jinja" in line


# ---- a base's files ----


@pytest.fixture
def base(world, tmp_path) -> Path:
    shutil.copytree(world.root / "base", tmp_path / "base")
    return tmp_path / "base"


def truncated(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def absurd_header(base: Path) -> None:
    file = base / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes()[8:])


def leaving_index(base: Path) -> None:
    names = load_file(base / "model.safetensors").keys()
    (base / "model.safetensors").rename(base.parent / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors")


def pickled(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({}, base / "pytorch_model.bin")


def large_tokenizer(base: Path) -> None:
    truncated(base)  # weights are not looked at
    (base / "tokenizer.json").write_text(train_bpe(map(tiny.text, range(tiny.FILES)), tiny.VOCAB + 7), encoding="utf-8")


def odd_heads(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))


def no_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").unlink()


def broken_tokenizer(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")


def no_config(base: Path) -> None:
    (base / "config.json").unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncated, ["model.safetensors", "truncated"]),
        (absurd_header, ["model.safetensors", str(2**62)]),
        (leaving_index, ["model.safetensors.index.json", "../outside.safetensors", "leaves the folder"]),
        (missing_tensor, ["model.safetensors", "model.norm.weight"]),
        (pickled, ["pytorch_model.bin", "pickle"]),
        (large_tokenizer, ["the tokenizer has 298 tokens, the model 291"]),
        (odd_heads, ["config.json", "num_key_value_heads"]),
        (no_tokenizer, ["no tokenizer"]),
        (broken_tokenizer, ["tokenizer.json"]),
        (no_config, ["config.json", "no such file"]),
    ],
)
@pytest.mark.parametrize("program", ["train", "evaluate", "generate"])
def test_a_base_that_cannot_be_read(world, run, refused, base, damage, words, program):
    damage(base)
    changes = SHORT | ({"checkpoint__resume": "never"} if program == "train" else {"generate__prompt": "def"})
    line = refused(world.flags(run, **changes, base__path=base), program)
    assert all(word in line for word in words), line


def test_a_base_by_its_variant_whose_export_could_not_name_it(world, run, refused, base):
    register_model("embedllama", "tiny", read_config(base))
    no_config(base)
    line = refused(
        world.flags(run, **SHORT | {"export__format": "auto"}, checkpoint__resume="never", base__path=base, base__variant="tiny")
    )
    assert f"{base}/config.json: no such file" in line


# ---- really started (evaluate, generate and export: in their own tests) ----


@pytest.mark.parametrize("program", ["train", "prepare"])
def test_really_started(program):
    command = [sys.executable, "-m", f"spectitan.{program}"]
    done = subprocess.run([*command, "--trainig.num_steps", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "trainig.num_steps" in done.stderr and "training.num_steps" in done.stderr
