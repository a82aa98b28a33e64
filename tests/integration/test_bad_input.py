"""Mistakes: exit status 2, one line that names the file or key, and nothing that was saved is touched."""

import errno
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan import evaluate, export, generate, prepare, train
from spectitan.config.manager import load
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer, train_bpe
from spectitan.speculators.base import align_targets
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.training import checkpoint as checkpoint_module
from spectitan.training.checkpoint import Checkpointer, read_tensors
from tests.integration import tiny

PROGRAMS = {"train": train, "evaluate": evaluate, "export": export, "generate": generate, "prepare": prepare}
SHORT = {"training__num_steps": 4, "checkpoint__interval": 2, "eval__at_end": "false", "export__format": "none"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(world) -> Path:
    """A finished run, whose folder no mistake may touch."""
    assert train.main(world.flags(world.root / "run", **SHORT)) == 0
    return world.root / "run"


@pytest.fixture
def refused(world, run, capsys):
    """Calls a program, which must refuse in one line, and returns that line."""

    def call(flags: list[str], program: str = "train") -> str:
        before, files_before = tiny.contents(run), set(world.root.iterdir())
        capsys.readouterr()
        assert PROGRAMS[program].main(flags) == 2
        printed = capsys.readouterr()
        assert tiny.contents(run) == before and set(world.root.iterdir()) == files_before
        assert printed.err.count("\n") == 1 and printed.err.startswith(f"spectitan.{program}: "), printed.err
        return printed.err

    return call


# ---- configuration ----


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--training.num_stepz=3", ["training.num_stepz", "training.num_steps"]),
        ("--trainig.num_steps=3", ["trainig.num_steps", "training.num_steps"]),
        ("--speculator.type=mpl", ["speculator.type", "mpl", "mlp"]),
        ("--training.num_steps=many", ["training.num_steps", "many", "an integer"]),
        ("--training.num_steps=1.5", ["training.num_steps", "1.5", "an integer"]),
        ("--training.num_steps=0", ["training.num_steps", "0"]),
        ("--training.micro_batch_size=-2", ["training.micro_batch_size", "-2", "at least 1"]),
        ("--training.micro_batch_size=3", ["training.global_batch_size = 4", "training.micro_batch_size"]),
        ("--optimizer.lr=nan", ["optimizer.lr", "nan"]),
        ("--optimizer.lr=-1", ["optimizer.lr", "-1", "above 0"]),
        ("--optimizer.lr=inf", ["optimizer.lr", "inf"]),
        ("--job.seed=-1", ["job.seed", "-1"]),
        ("--job.deterministic=maybe", ["job.deterministic", "maybe"]),
        ("--training.compute_dtype=float16", ["training.compute_dtype", "float16", "bfloat16"]),
        ("--training.epochs=2", ["training.num_steps", "training.epochs"]),
        ("--base.init=random", ["base.init", "base.freeze"]),
        ("--base.freeze=false", ["base.freeze", "speculator.type"]),
        ("--export.format=hf", ["export.format", "hf"]),
        ("--data.weights=1,2", ["data.weights", "data.datasets"]),
        ("--speculator.n_speculator_heads=1", ["speculator.tie_weights", "speculator.n_speculator_heads"]),
        ("--speculator.path=elsewhere", ["speculator.path"]),
        ("--data.seq_length=65", ["data.seq_length = 65", "64"]),
        ("--parallelism.sharding_strategy=ddp", ["parallelism.sharding_strategy", "ddp", "fsdp"]),
        ("--eval.num_draft_tokens=4", ["eval.num_draft_tokens = 4", "3"]),
        ("--eval.prompts=nowhere.jsonl", ["nowhere.jsonl"]),
        ("--eval.num_prompts=0", ["eval.num_prompts"]),
        ("--base.path=nowhere", ["base.path", "nowhere", "no such folder"]),
        ("--base.path=spectitan:nothing", ["base.path", "spectitan:nothing"]),
        ("--base.variant=9b", ["base.variant", "9b"]),
        ("--base.variant=7b", ["base.variant", "7b", "vocab_size"]),
        ("--data.path=nowhere", ["data.path", "nowhere", "no such file or folder"]),
        ("--data.path=python:stdlb", ["data.path", "python:stdlb", "python:stdlib"]),
        ("--data.val_path=nowhere", ["data.val_path", "nowhere"]),
        ("--data.datasets=nowhere", ["data.datasets", "nowhere"]),
        ("--data.suffixes=.c", ["data", "empty dataset", ".c"]),
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
    ],
)
def test_data(world, run, refused, tmp_path, files, words):
    line = refused([*world.flags(run, **SHORT, checkpoint__resume="never"), data_folder(tmp_path, **files), "--data.holdout=0"])
    assert all(word in line for word in words), line


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


# ---- checkpoints ----


def test_a_checkpoint_of_another_model(world, run, refused, tmp_path):
    other = tiny.make(tmp_path / "other")
    assert train.main(other.flags(tmp_path / "run", **SHORT, speculator__n_speculator_heads=2)) == 0
    line = refused(world.flags(run, **SHORT, checkpoint__resume="never", checkpoint__load_path=tmp_path / "run"))
    assert "was " in line and "in the checkpoint and is" in line and "data.path" in line
    line = refused(world.flags(run, **SHORT, checkpoint__resume="never", checkpoint__load_path=tmp_path / "run", data__path=tmp_path / "other" / "data"))
    assert "speculator.n_speculator_heads was 2 in the checkpoint and is 3 now" in line


class Malice:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("program", ["train", "evaluate", "export", "generate"])
def test_metadata_that_would_run_code(world, run, refused, tmp_path, program):
    shutil.copytree(run, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / ".metadata").write_bytes(pickle.dumps(Malice(tmp_path / "victim")))
        manifest = json.loads((folder / "manifest.json").read_text())  # whoever sends a checkpoint signs it as well
        manifest["files"][".metadata"] = checkpoint_module.describe(folder / ".metadata")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    changes = SHORT if program == "train" else {"speculator__path": tmp_path / "run", "generate__prompt": "def"}
    line = refused(world.flags(tmp_path / "run", **changes), program)
    assert ".metadata" in line and "mkdir" in line and not (tmp_path / "victim").exists()


# ---- the disk ----


@pytest.mark.parametrize("function", ["write_json", "_write_tensors"])
def test_a_full_disk_at_a_checkpoint(world, tmp_path, monkeypatch, capsys, function):
    run, original, calls = tmp_path / "run", getattr(checkpoint_module, function), []

    def full_from_step_4(path, *rest):
        calls.append(path)
        if any("step-00000004" in part for part in Path(path).parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *rest)

    monkeypatch.setattr(checkpoint_module, function, full_from_step_4)
    assert train.main(world.flags(run, **SHORT)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert calls and "No space left on device" in line and "step-00000004" in line and "earlier ones are unchanged" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert train.main(world.flags(run, **SHORT)) == 0
    assert [report["step"] for report in tiny.reports(run)] == [2, 4]


def test_no_room_for_a_checkpoint(world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    assert train.main(world.flags(tmp_path / "run", **SHORT)) == 2
    assert "no space left on device" in capsys.readouterr().err


def test_a_dump_folder_that_is_a_file(world, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refused(world.flags(folder, **SHORT))
        assert "job.dump_folder" in line and f"{tmp_path / 'file'}: it is no folder" in line
    assert (tmp_path / "file").read_text() == "mine"


# ---- numbers ----


def first_bad(flags: list[str], token: int) -> tuple[int, int]:
    """Step and head of the first loss with a state that has seen the token, by walking the batches."""
    config = load(flags, "train", SPECULATOR_CONFIGS)
    loader = build_loader(config.data, load_tokenizer(config.base.path), seed=config.job.seed, global_batch_size=4, micro_batch_size=4)
    for step in range(1, 100):
        batch = next(loader)
        targets = align_targets(batch, steps=3)
        documents, tokens = batch.document_ids.flatten(), batch.tokens.flatten()
        bad = [
            head
            for state, head in zip(targets.state.tolist(), targets.step.tolist())
            if (tokens[: state + 1][documents[: state + 1] == documents[state]] == token).any()
        ]
        if bad:
            return step, min(bad)


@pytest.mark.parametrize("report_interval", [1, 50])
def test_a_loss_that_is_not_finite(world, base, tmp_path, capsys, report_interval):
    """A base with a NaN in the embedding of one token."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rare.txt").write_text(tiny.text(50) + "\n# ж ж ж\n" + tiny.text(51), encoding="utf-8")
    token = load_tokenizer(base).encode("ж")[0]  # its first byte, which stands nowhere else
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token, 5] = float("nan")
    save_file(tensors, base / "model.safetensors")

    changes = SHORT | {"training__num_steps": 12, "checkpoint__interval": 1, "job__seed": 45, "data__path": tmp_path / "data"}
    changes |= {"data__holdout": 0, "base__path": base, "metrics__report_interval": report_interval}
    flags = world.flags(tmp_path / "run", **changes)
    step, head = first_bad(flags, token)
    assert 1 < step < 10
    assert train.main(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"loss of head {head} is not finite at step {step}" in line
    saved = Checkpointer(tmp_path / "run" / "checkpoints").newest_valid()
    assert saved.name == f"step-{step - 1:08d}"
    assert all(tensor.isfinite().all() for tensor in read_tensors(saved).values())


def test_a_learning_rate_that_breaks_the_weights(world, tmp_path, capsys):
    changes = SHORT | {"training__num_steps": 20, "checkpoint__interval": 100, "training__max_grad_norm": 0}
    assert train.main(world.flags(tmp_path / "run", **changes, optimizer__lr=1e37)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is not finite at step" in line and "optimizer.lr" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- really started (evaluate, generate and export: in their own tests) ----


@pytest.mark.parametrize("program", ["train", "prepare"])
def test_really_started(program):
    command = [sys.executable, "-m", f"spectitan.{program}"]
    done = subprocess.run([*command, "--trainig.num_steps", "3"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "trainig.num_steps" in done.stderr and "training.num_steps" in done.stderr
