"""A base model, text and configuration small enough to train in a second, for tests of whole programs."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from spectitan import evaluate, export, generate, prepare, train
from spectitan.data.tokenizer import train_bpe
from spectitan.keyed_random import uniform
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.weights import save_hf
from spectitan.training.checkpoint_files import describe
from spectitan.training.checkpoint_reading import read_state, read_tensors

PROGRAMS = {"train": train, "evaluate": evaluate, "export": export, "generate": generate, "prepare": prepare}

VOCAB, CONTEXT, FILES = 291, 64, 13  # nothing divides by anything
CONFIG = LlamaConfig(VOCAB, 24, 40, num_layers=2, num_heads=3, max_position_embeddings=CONTEXT, eos_token_id=0, tie_embeddings=True)
TOML = """
[job]
threads = 1
deterministic = true
dump_folder = "{root}/run"

[base]
path = "{root}/base"

[data]
path = "{root}/data"
seq_length = 31
holdout = 0.2

[training]
num_steps = 7
global_batch_size = 4
micro_batch_size = 2
compute_dtype = "float32"

[optimizer]
lr = 0.01

[checkpoint]
interval = 3
async_mode = "async"  # what is hard about saving

[metrics]
report_interval = 2
loggers = []

[compile]
enabled = "false"

[eval]
prompts = "{root}/prompts.jsonl"
max_new_tokens = 8
speed_prompts = 1
loss_samples = 6
"""


class Tiny(NamedTuple):
    """base/, data/, prompts.jsonl and config.toml below one folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    def flags(self, dump_folder: Path, **changes) -> list[str]:
        """Command line of a run; `training__num_steps=9` is --training.num_steps=9, lists are given as text."""
        if changes.get("speculator__type", "mlp") in ("mlp", "lstm"):
            changes = {"speculator__speculator_width": 20} | changes
        texts = {name.replace("__", "."): value for name, value in changes.items()}
        flags = {"job.config_file": self.config, "job.dump_folder": dump_folder} | texts
        return [f"--{key}={value}" for key, value in flags.items()]

    def other_base(self, folder: Path, name: str, change) -> Path:
        """A copy of the base after change(tensor) of one of its tensors."""
        shutil.copytree(self.root / "base", folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors[name])
        save_file(tensors, folder / "model.safetensors")
        return folder


def text(number: int) -> str:
    """A small program; the same for the same number."""
    names = ["größe", "häuser", "count", "naïve", "total", "日本"]
    lines = [f"# {number}"]
    for line in range(12):
        first, second = (names[int(uniform(number, line, place) * len(names))] for place in range(2))
        lines += [f"def {first}_{line}({second}):", f"    return {second} + {line}", ""]
    return "\n".join(lines)


def make(root: Path, config: LlamaConfig = CONFIG) -> Tiny:
    texts = [text(number) for number in range(FILES)]
    for name in ("tokenizer", "data"):
        (root / name).mkdir(parents=True)
    (root / "tokenizer" / "tokenizer.json").write_text(train_bpe(texts, VOCAB), encoding="utf-8")
    base = EmbedLLaMA(config)
    base.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        base.readout.embedding.weight *= 10  # far from uniform, so that greedy text has no ties
    save_hf(base, root / "base", torch.float32, tokenizer_files_from=root / "tokenizer")
    for number, content in enumerate(texts):
        (root / "data" / f"{number:02}.txt").write_text(content, encoding="utf-8")
    prompts = [{"text": "def größe"}, {"tokens": [5, 6, 7]}, {"text": "    return count + 1"}]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    (root / "config.toml").write_text(TOML.format(root=root), encoding="utf-8")
    return Tiny(root)


# A run that is measured and exported nowhere.
SHORT = {"training__num_steps": 4, "checkpoint__interval": 2, "eval__at_end": "false", "export__format": "none"}

# The base itself is trained, from random weights.
BASE_ALONE = {"speculator__type": "none", "base__init": "random", "base__freeze": "false", "eval__prompts": "none", "export__format": "hf"}


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def put_into(checkpoint: Path, name: str, content: bytes) -> None:
    """Replaces a file of a checkpoint, and what its manifest says of it: whoever writes a checkpoint signs it as well."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = describe(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def assert_same_training(left: Path, right: Path, step: int) -> None:
    """Weights, optimizer state and position at a step are equal, bit for bit."""
    ours, theirs = (read_tensors(checkpoint(run, step)) for run in (left, right))
    assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert read_state(checkpoint(left, step))["position"] == read_state(checkpoint(right, step))["position"]


def reports(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[dict]:
    """The reports without what the clock says."""
    timed = ("tokens_per_second", "waiting", "flops_per_second", "peak_memory")
    return [{key: value for key, value in report.items() if key not in timed} for report in reports(run)]


def refusal(program, flags: list[str], capsys, untouched: Path) -> str:
    """The one line in which a program refuses, with exit status 2; below `untouched` everything stays as it was."""
    before = contents(untouched)
    capsys.readouterr()
    assert program.main(flags) == 2
    lines = capsys.readouterr().err
    assert contents(untouched) == before
    assert lines.count("\n") == 1 and lines.startswith(f"{program.__name__}: "), lines
    return lines


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with time and content."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
