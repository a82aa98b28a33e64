"""A run of spectitan.train that benchmarks measure: a random base of 57.9M parameters, text of random words, and the keys."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch

from spectitan.models.llama import LlamaConfig
from spectitan.models.registry import get_model, register_model
from spectitan.models.weights import save_hf

ENDLESS = 10**6


class Setup(NamedTuple):
    """What is trained. The base is a random Llama with untied embeddings, the speculator a tied one."""

    type: str = "mlp"
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1536
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    heads: int = 3
    width: int = 512
    rows: int = 4
    seq_length: int = 512
    dtype: str = "float32"
    compile: str = "auto"
    threads: int = 2

    def base_config(self) -> LlamaConfig:
        shape = (self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads, self.num_kv_heads)
        return LlamaConfig(*shape, max_position_embeddings=max(2048, self.seq_length))

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


SMALL = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "width": 64}


def run_keys(setup: Setup, folder: str) -> dict[str, object]:
    """Of a run on what `write_inputs` has written: nothing but its steps, no report, checkpoint or evaluation."""
    return {
        "job.dump_folder": f"{folder}/outputs/{os.getpid()}",
        "job.threads": setup.threads,
        "base.path": f"{folder}/base",
        "data.path": f"{folder}/text",
        "data.cache_dir": f"{folder}/cache",
        "data.seq_length": setup.seq_length,
        "training.compute_dtype": setup.dtype,
        "compile.enabled": setup.compile,
        "checkpoint.interval": ENDLESS,
        "metrics.report_interval": ENDLESS,
        "eval.prompts": "none",
        "eval.at_end": "false",
        "eval.loss_samples": 0,
        "export.format": "none",
    }


def speculator_keys(setup: Setup) -> dict[str, object]:
    return {
        "speculator.type": setup.type,
        "speculator.n_speculator_heads": setup.heads,
        "speculator.speculator_width": setup.width,
    }


def as_flags(keys: dict[str, object]) -> list[str]:
    return [f"--{key}={value}" for key, value in keys.items()]


def write_inputs(setup: Setup, folder: Path) -> None:
    """base/, random weights and a tokenizer of as many words as there are ids; text/, one long document of random words."""
    register_model("embedllama", "benchmark", setup.base_config())
    save_hf(get_model("embedllama", "benchmark", init="random"), folder / "base", torch.bfloat16)
    (folder / "text").mkdir()
    vocabulary = {f"w{i}": i for i in range(setup.vocab_size)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    parts = {"normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **parts, "model": model}
    (folder / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = torch.randint(setup.vocab_size, (100 * setup.rows * setup.seq_length,), generator=torch.Generator().manual_seed(0))
    (folder / "text" / "words.txt").write_text(" ".join(f"w{i}" for i in words.tolist()))
