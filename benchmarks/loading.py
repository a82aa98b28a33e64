"""Peak host memory of each rank while a sharded base is built and its weights are read.

    python benchmarks/loading.py                                    # 2 GB on 4 processes
    python benchmarks/loading.py --gigabytes 0.25 --strategies fsdp

Goal: at most a rank's share of the weights plus one tensor. `grown` is the process's largest resident memory from before the base is
built on, above what was resident then, mapped files included. Linux: it comes from /proc.
"""

import argparse
import json
import os
import re
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from torch import nn

from spectitan.distributed import utils
from spectitan.distributed.fsdp import apply_fsdp
from spectitan.distributed.mesh import init_distributed
from spectitan.distributed.tensor_parallel import apply_tp
from spectitan.models.layers import own_part
from spectitan.models.llama import LlamaConfig
from spectitan.models.registry import fill_model, get_model, register_model
from spectitan.models.weights import save_hf

STRATEGIES = {"fsdp": {}, "hsdp": {"dp_replicate": 2}, "tp": {"tp_size": 4}}
_TINY = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "loading.json"))
    arguments = parser.parse_args()
    report = []
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder) / "base", int(arguments.gigabytes * 1e9))
        print("strategy  rank  share MB  largest tensor MB  grown MB  goal MB  seconds")
        for strategy in arguments.strategies:
            given = arguments.processes, free_port(), folder, strategy
            multiprocessing.spawn(measure, given, nprocs=arguments.processes)
            for rank in range(arguments.processes):
                row = json.loads((Path(folder) / f"{strategy}_{rank}.json").read_text())
                report.append(row)
                sizes = (row[name] / 1e6 for name in ("share", "largest", "grown"))
                goal = (row["share"] + row["largest"]) / 1e6
                print(f"{strategy:8}  {rank:4}  " + "  ".join(f"{size:8.0f}" for size in sizes) + f"  {goal:8.0f}  {row['seconds']:.1f}")
    Path(arguments.output).write_text(json.dumps({"torch": torch.__version__, "rows": report}, indent=2) + "\n")


def write_base(folder: Path, size: int) -> LlamaConfig:
    """A base of about so many bytes in bfloat16, whose weights are all 1."""
    hidden = 1024
    layer = 2 * (4 * hidden * hidden + 3 * hidden * 4 * hidden)
    config = LlamaConfig(8000, hidden, 4 * hidden, num_layers=max(1, round((size - 4 * 8000 * hidden) / layer)), num_heads=16)
    register_model("embedllama", "loading", config)
    model = get_model("embedllama", "loading", init="random", dtype=torch.bfloat16, device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    save_hf(model, folder, torch.bfloat16)
    return config


def measure(rank: int, processes: int, port: int, folder: str, strategy: str) -> None:
    """One rank: reads folder/base in a layout, and writes what that took to folder/STRATEGY_RANK.json."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world = init_distributed(strategy, device="cpu", **STRATEGIES[strategy])
    register_model("embedllama", "tiny", _TINY)
    load(world, "tiny", "", "random")  # what is imported and set up once is not the base's memory
    before = reset_peak()
    start = time.perf_counter()
    base = load(world, "auto", Path(folder) / "base", "pretrained")
    seconds, grown = time.perf_counter() - start, peak() - before
    parts = [own_part(parameter)[0] for parameter in base.parameters()]
    share = sum(part.numel() * part.element_size() for part in parts)
    largest = max(parameter.numel() * parameter.element_size() for parameter in base.parameters())
    row = {"strategy": strategy, "rank": rank, "share": share, "largest": largest, "grown": grown, "seconds": seconds}
    row["all_read"] = all(bool((part == 1).all()) for part in parts)
    (Path(folder) / f"{strategy}_{rank}.json").write_text(json.dumps(row))
    utils.any_rank(False)  # nobody leaves while another still needs the group
    world.close()


def load(world, variant: str, path: str | Path, init: str) -> nn.Module:
    """As spectitan.train builds its base."""
    base = get_model("embedllama", variant, path, init=init, dtype=torch.bfloat16, device="meta")
    if world.tp_mesh is not None:
        apply_tp(base, "embedllama", world.tp_mesh)
    apply_fsdp(base, nn.Module(), world.mesh, torch.bfloat16, freeze_base=True)
    base.to_empty(device=world.device)
    fill_model(base, path, init)
    return base


def reset_peak() -> int:
    """Bytes resident now, which the peak counts from."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    main()
