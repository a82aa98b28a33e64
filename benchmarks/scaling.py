"""How a training step scales: tokens/s, memory and the share of time in collectives over 1, 2 and 4 processes, in every layout.

    python benchmarks/scaling.py                                  # a 57.9M base, V 32000, MLP speculator, 1, 2 and 4 processes
    python benchmarks/scaling.py --train base                     # the base itself is trained
    python benchmarks/scaling.py --small --repeats 2              # a quick look that everything runs

Weak scaling gives each process as many rows whatever their number, strong scaling divides one batch among them. Every case is
spectitan.train itself, in processes of its own over gloo, each with its share of the processor's cores. benchmarks/README.md says
how to read the table. Linux: memory comes from /proc.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from loading import free_port  # its neighbours: this folder is where Python looks first
from machine import describe_machine, import_all, memory
from small_run import SMALL, Setup, as_flags, run_keys, write_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from spectitan import train
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.training.metrics import MetricsLogger

# Keys of [parallelism] for so many processes; None: not with that number.
STRATEGIES = {
    "none": lambda n: {} if n == 1 else None,
    "fsdp": lambda n: {"sharding_strategy": "fsdp"},
    "hsdp": lambda n: {"sharding_strategy": "hsdp", "dp_replicate": 2} if n % 2 == 0 else None,
    "tp": lambda n: {"sharding_strategy": "tp", "tp_size": n} if n > 1 else None,
    "tp 2 in fsdp": lambda n: {"sharding_strategy": "fsdp", "tp_size": 2} if n > 2 and n % 2 == 0 else None,
}
TRAINED = {
    "speculator": {},
    "base": {"speculator.type": "none", "base.freeze": "false"},
    "both": {"base.freeze": "false"},
}


class Collectives(TorchDispatchMode):
    """Seconds that this process spends in collectives, its waiting for the others included."""

    def __init__(self):
        super().__init__()
        self.seconds = 0.0
        self._wait = dist.Work.wait

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace not in ("c10d", "_c10d_functional"):
            return function(*args, **(kwargs or {}))
        return self._timed(function, *args, **(kwargs or {}))

    def __enter__(self):
        wait = self._wait
        dist.Work.wait = lambda work, *args: self._timed(wait, work, *args)
        return super().__enter__()

    def __exit__(self, *error):
        dist.Work.wait = self._wait
        return super().__exit__(*error)

    def _timed(self, function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def run(rank: int, processes: int, port: int, flags: list[str], threads: int, warm_up: int, repeats: int, output: str) -> None:
    """One process: `repeats` steps with a clock alone, then as many with the collectives timed; writes output.RANK.json."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    logging.disable(logging.INFO)  # the table is what is to be read
    import_all()
    torch.set_num_threads(threads)
    at_start, collectives = memory("VmRSS"), Collectives()
    seconds, shares, original = [], [], train.Trainer._train_step

    def step(trainer, *args):
        number = trainer.step
        if number < warm_up + repeats:
            start = time.perf_counter()
            original(trainer, *args)
            seconds.append(time.perf_counter() - start)
            return
        before, start = collectives.seconds, time.perf_counter()
        with collectives:
            original(trainer, *args)
        shares.append((collectives.seconds - before) / (time.perf_counter() - start))

    train.Trainer._train_step = step
    MetricsLogger.advance = lambda logger, number: None
    assert train.main([*flags, f"--training.num_steps={warm_up + 2 * repeats}"]) == 0
    row = {"seconds": statistics.median(seconds[warm_up:]), "collectives": statistics.median(shares)}
    row |= {"peak": memory("VmHWM"), "above_start": memory("VmHWM") - at_start}
    Path(f"{output}.{rank}.json").write_text(json.dumps(row))


def measure(setup: Setup, folder: str, keys: dict, processes: int, rows: int, repeats: int, warm_up: int) -> dict:
    """Of all processes: the slowest one's step, the largest one's memory, the mean share of collectives."""
    threads = max(1, setup.threads // processes)
    apart = {
        "job.dump_folder": tempfile.mkdtemp(dir=folder),
        "job.threads": threads,
        "checkpoint.resume": "never",
        "metrics.loggers": "",
        "compile.enabled": "false",
    }
    flags = as_flags(run_keys(setup, folder) | apart | keys | {"training.micro_batch_size": rows})
    spawn, output, port = multiprocessing.get_context("spawn"), f"{folder}/measured", free_port()
    started = [
        spawn.Process(target=run, args=(rank, processes, port, flags, threads, warm_up, repeats, output)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise SystemExit(f"{keys}: a process ended with {[process.exitcode for process in started]}; its messages are above")
    of_ranks = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(processes)]
    seconds = max(row["seconds"] for row in of_ranks)
    return {
        "processes": processes,
        "threads_each": threads,
        "rows_each": rows,
        "milliseconds": 1000 * seconds,
        "tokens_per_second": processes * rows * setup.seq_length / seconds,
        "peak_bytes": max(row["peak"] for row in of_ranks),
        "peak_bytes_above_start": max(row["above_start"] for row in of_ranks),
        "share_in_collectives": statistics.mean(row["collectives"] for row in of_ranks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--modes", nargs="+", default=["weak", "strong"], choices=("weak", "strong"))
    parser.add_argument("--train", default="speculator", choices=tuple(TRAINED))
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="as training.compute_dtype")
    parser.add_argument("--rows", type=int, default=4, help="rows of 512 tokens: of a process (weak), of all together (strong)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all processes together")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of a case, and as many again for the collectives")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "scaling.json"))
    arguments = parser.parse_args()

    dtype = str(resolve_compute_dtype(arguments.dtype, torch.device("cpu"))).removeprefix("torch.")
    setup = Setup(rows=arguments.rows, dtype=dtype, threads=arguments.threads)
    setup = setup._replace(**SMALL) if arguments.small else setup
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, load {machine['load_average_before']:.1f} before the run")
    print(f"{arguments.train} trained, V {setup.vocab_size}, hidden {setup.hidden_size}, {dtype}, {setup.threads} threads together\n")
    heads = {"speculator.n_speculator_heads": setup.heads, "speculator.speculator_width": setup.width}
    keys = ({} if arguments.train == "base" else heads) | TRAINED[arguments.train]
    print("mode    strategy      processes  ms a step  tokens/s  of one's  peak MB  above start  in collectives")
    report = []
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(setup._replace(rows=max(arguments.processes) * arguments.rows), Path(folder))
        for mode in arguments.modes:
            one = None
            for processes in arguments.processes:
                for strategy in arguments.strategies:
                    layout = STRATEGIES[strategy](processes)
                    rows, rest = (arguments.rows, 0) if mode == "weak" else divmod(arguments.rows, processes)
                    if layout is None or rest or not rows:
                        continue
                    layout = {f"parallelism.{name}": value for name, value in layout.items()}
                    row = {"mode": mode, "strategy": strategy}
                    row |= measure(setup, folder, keys | layout, processes, rows, arguments.repeats, arguments.warm_up)
                    one = one or row["tokens_per_second"]
                    row["tokens_per_second_of_one"] = row["tokens_per_second"] / one
                    report.append(row)
                    print_row(row)
    contents = {"machine": machine, "train": arguments.train, "setup": setup._asdict(), "repeats": arguments.repeats, "rows": report}
    Path(arguments.output).write_text(json.dumps(contents, indent=2) + "\n")
    print(f"\nwritten: {arguments.output}")


def print_row(row: dict) -> None:
    peaks = f"{row['peak_bytes'] / 1e6:>7.0f}  {row['peak_bytes_above_start'] / 1e6:>11.0f}"
    speed = f"{row['milliseconds']:>9.0f}  {row['tokens_per_second']:>8.0f}  {row['tokens_per_second_of_one']:>8.2f}"
    print(f"{row['mode']:<6}  {row['strategy']:<12}  {row['processes']:>9}  {speed}  {peaks}  {row['share_in_collectives']:>14.2f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
