"""What vs_speculators.py trains: the run, its data for either trainer, and our side of it."""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from small_run import ENDLESS, as_flags  # a neighbour: this folder is where Python looks first
from torch import Tensor

from spectitan import train
from spectitan.config.sections import Data
from spectitan.data.loader import build_loader
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.draft_vocabulary import maps_of, most_frequent, write_maps

SEED, HELD_OUT = 42, 32  # rows that nobody trains on


class Run(NamedTuple):
    """What is trained, as the processes get it."""

    folder: str
    base: str
    steps: int
    rows: int
    seq_length: int
    draft_vocab_size: int
    dtype: str
    lr: float
    threads: int

    @property
    def reduced(self) -> bool:
        return self.draft_vocab_size > 0


def drafter_flags(run: Run) -> list[str]:
    maps = [f"--speculator.d2t_path={run.folder}/d2t.npy", f"--speculator.t2d_path={run.folder}/t2d.npy"] if run.reduced else []
    return ["--speculator.type=eagle3", "--speculator.ttt_steps=3", *maps]


def train_main(run: Run, dump_folder: Path, *flags: str) -> None:
    keys = {
        "job.dump_folder": dump_folder,
        "job.seed": SEED,
        "job.threads": run.threads,
        "base.path": run.base,
        "data.seq_length": run.seq_length,
        "data.packing": "document",
        "data.cache_dir": f"{run.folder}/cache",
        "training.num_steps": run.steps,
        "training.micro_batch_size": run.rows,
        "training.compute_dtype": run.dtype,
        "compile.enabled": "true",
        "objective.loss": "kl_div",
        "optimizer.lr": run.lr,
        "optimizer.betas": "0.9,0.999",
        "optimizer.weight_decay": 0.01,
        "lr_scheduler.type": "linear",
        "lr_scheduler.warmup_steps": max(1, run.steps // 100),
        "lr_scheduler.decay_ratio": 1 - max(1, run.steps // 100) / run.steps,
        "checkpoint.interval": ENDLESS,
        "metrics.report_interval": 1,
        "metrics.loggers": "",
        "eval.prompts": "none",
        "eval.at_end": "false",
        "export.format": "speculators",
        "export.base_name": resolve_base_path(run.base),  # there it finds its verifier
    }
    status = train.main([*as_flags(keys), *flags])
    if status:
        sys.exit(status)


# ---- data: rows of tokens, their states, and the order in which each trainer meets them ----


def write_rows(run: Run) -> None:
    """ours/ and theirs/, Arrow datasets with hidden_states/ in them; validation/; maps of the draft vocabulary; first/, untrained."""
    folder, base_path = Path(run.folder), resolve_base_path(run.base)
    base = get_model("auto", "auto", base_path, dtype=getattr(torch, run.dtype)).requires_grad_(False)
    count = run.steps * run.rows
    rows = rows_of_text(run, base_path, count + HELD_OUT) if run.base.startswith("spectitan:") else random_rows(run, base, count + HELD_OUT)
    if run.reduced:
        counts = torch.bincount(rows[:count].flatten(), minlength=base.config.vocab_size)
        write_maps(folder, *maps_of(most_frequent(counts, run.draft_vocab_size), base.config.vocab_size))
    train_main(
        run, folder / "first", "--job.init_only=true", *drafter_flags(run), f"--data.path={write_dataset(folder / 'seed', rows[:8])}"
    )
    taps = json.loads((folder / "first" / "export" / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]

    write_dataset(folder / "ours", rows[:count])
    write_dataset(folder / "validation", rows[count:])
    order = order_of_ours(run, base_path, rows[:count])
    assert sorted(order) == list(range(count)), "an epoch"
    place = np.random.default_rng(SEED).permutation(count)  # theirs: step by step, the row of its dataset that its sampler takes
    theirs = torch.empty_like(rows)
    theirs[torch.from_numpy(place)] = rows[torch.tensor(order)]
    theirs[count:] = rows[count:]
    write_dataset(folder / "theirs", theirs)
    for name in ("ours", "theirs"):
        (folder / name / "hidden_states").mkdir()
    row_of_theirs = {order[step]: int(place[step]) for step in range(count)} | {row: row for row in range(count, len(rows))}
    for first in range(0, len(rows), 8):
        tokens = rows[first : first + 8]
        states = base(tokens, torch.zeros_like(tokens), taps=(*taps, base.config.num_layers))
        stacked = torch.stack(states.taps, 2)  # [rows, seq, taps + 1, hidden]
        for row, of_row in enumerate(stacked, first):
            file = folder / "ours" / "hidden_states" / f"hs_{row}.safetensors"
            save_file({"hidden_states": of_row.contiguous(), "token_ids": rows[row].clone()}, file)
            os.link(file, folder / "theirs" / "hidden_states" / f"hs_{row_of_theirs[row]}.safetensors")


def rows_of_text(run: Run, base_path: Path, count: int) -> Tensor:
    """int64 [count, seq_length] of Python's standard library, of which the prompts of the base are no part."""
    tokenizer = load_tokenizer(base_path, json.loads((base_path / "config.json").read_text())["vocab_size"])
    data = Data(path="python:stdlib", seq_length=run.seq_length, holdout=0.05, on_invalid="skip", drop_overlap="spectitan:pystdlib")
    loader = build_loader(data, tokenizer, seed=0, global_batch_size=1, micro_batch_size=1)
    assert load_prompts("spectitan:pystdlib", tokenizer) and count <= loader.samples_per_epoch, (
        f"--steps: text for {loader.samples_per_epoch} rows"
    )
    return torch.cat([next(loader).tokens for _ in range(count)])


def random_rows(run: Run, base, count: int) -> Tensor:
    return torch.randint(base.config.vocab_size, (count, run.seq_length), generator=torch.Generator().manual_seed(0))


def write_dataset(folder: Path, rows: Tensor) -> Path:
    """As datasets.Dataset.save_to_disk lays it out."""
    folder.mkdir(parents=True)
    ids = pa.array(list(rows.numpy()), pa.list_(pa.int64()))
    columns = {"input_ids": ids, "loss_mask": pa.array(list(np.ones_like(rows.numpy())), pa.list_(pa.int64()))}
    table = pa.table(columns | {"seq_len": pa.array([rows.shape[1]] * len(rows), pa.int64())})
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0" * 16, "_format_columns": None}
    state |= {"_format_kwargs": {}, "_format_type": "torch", "_output_all_columns": False, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    number = {"dtype": "int64", "_type": "Value"}
    features = {name: {"feature": number, "_type": "List"} for name in columns} | {"seq_len": number}
    (folder / "dataset_info.json").write_text(json.dumps({"citation": "", "description": "", "features": features}))
    return folder


def order_of_ours(run: Run, base_path: Path, rows: Tensor) -> list[int]:
    """The row that each place of our run's first epoch has."""
    tokenizer = load_tokenizer(base_path, json.loads((base_path / "config.json").read_text())["vocab_size"])
    data = Data(path=f"{run.folder}/ours", seq_length=run.seq_length, packing="document", cache_dir=f"{run.folder}/cache")
    loader = build_loader(data, tokenizer, seed=SEED, global_batch_size=run.rows, micro_batch_size=run.rows)
    place = {row.numpy().tobytes(): number for number, row in enumerate(rows)}
    return [place[sample.numpy().tobytes()] for _ in range(run.steps) for sample in next(loader).tokens]
