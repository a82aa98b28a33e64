"""What a checkpoint costs a training run: written beside the next steps (checkpoint.async_mode = async), or waited for.

    python benchmarks/saving.py                     # 33M trained parameters, a checkpoint of 0.4 GB
    python benchmarks/saving.py --small --turns 1   # a toy: does everything run?

spectitan.train itself, as its users start it, with clocks around its functions; the two ways take turns. `during` is a step that
began while files were being written; `stall` is what the loop waits for at a checkpoint, `finish` included, when all are written.
Goal: a step during a save at most 1.15 of the usual one. Linux.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import describe_machine  # its neighbours: this folder is where Python looks first
from small_run import SMALL, Setup, as_flags, run_keys, speculator_keys, write_inputs

from spectitan import train
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.training.checkpoint import Checkpointer
from spectitan.training.checkpoint_writing import TensorWriter

WAYS = ("async", "disabled")
WARM_UP = 3


def run(way: str, setup: Setup, folder: str, steps: int, interval: int, queue: multiprocessing.Queue) -> None:
    measured = {"usual": [], "during": [], "stall": [], "writing": []}
    train_step, write = train.Trainer._train_step, TensorWriter.write

    def timed_step(self, *args):
        kind = "usual" if self.checkpointer.written else "during"
        start = time.perf_counter()
        train_step(self, *args)
        if self.step - self.first_step >= WARM_UP:
            measured[kind].append(time.perf_counter() - start)

    def timed_write(self):
        start = time.perf_counter()
        result = write(self)
        measured["writing"].append(time.perf_counter() - start)
        return result

    def stalling(function, is_new):
        def timed(self, *args):
            start = time.perf_counter()
            result = function(self, *args)
            seconds = time.perf_counter() - start
            if is_new:
                measured["stall"].append(seconds)
            else:
                measured["stall"][-1] += seconds
            return result

        return timed

    train.Trainer._train_step, TensorWriter.write = timed_step, timed_write
    if way == "async":
        Checkpointer.begin, Checkpointer.finish = stalling(Checkpointer.begin, True), stalling(Checkpointer.finish, False)
    else:
        Checkpointer.save = stalling(Checkpointer.save, True)
    keys = run_keys(setup, folder) | speculator_keys(setup) | {"training.micro_batch_size": setup.rows, "training.num_steps": steps}
    keys |= {"checkpoint.interval": interval, "checkpoint.async_mode": way}
    start = time.perf_counter()
    assert train.main(as_flags(keys)) == 0
    seconds = time.perf_counter() - start
    queue.put(measured | {"run": [seconds], "peak": [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]})


def measure(setup: Setup, folder: str, turns: int, steps: int, interval: int) -> dict[str, dict[str, list[float]]]:
    """All figures of all turns, by way."""
    spawn = multiprocessing.get_context("spawn")
    figures = {way: {} for way in WAYS}
    for _ in range(turns):
        for way in WAYS:
            queue = spawn.Queue()
            process = spawn.Process(target=run, args=(way, setup, folder, steps, interval, queue))
            process.start()
            for name, values in queue.get().items():
                figures[way].setdefault(name, []).extend(values)
            process.join()
    return figures


def summarize(figures: dict[str, dict[str, list[float]]]) -> dict:
    rows = {way: {name: statistics.median(values) for name, values in named.items() if values} for way, named in figures.items()}
    rows["async"]["during_of_usual"] = rows["async"]["during"] / rows["async"]["usual"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--turns", type=int, default=3, help="runs of each way")
    parser.add_argument("--saves", type=int, default=4, help="checkpoints in a run")
    parser.add_argument("--interval", type=int, default=12, help="steps between checkpoints")
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "saving.json"))
    arguments = parser.parse_args()

    setup = Setup(dtype=str(resolve_compute_dtype("auto", torch.device("cpu"))).removeprefix("torch."), threads=arguments.threads)
    setup = setup._replace(**SMALL) if arguments.small else setup
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores, {setup.threads} threads, {setup.dtype}, load {machine['load_average_before']:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(setup, Path(folder))
        steps = WARM_UP + arguments.saves * arguments.interval
        figures = measure(setup, folder, arguments.turns, steps, arguments.interval)
        size = sum(file.stat().st_size for file in next(Path(folder).glob("outputs/*/checkpoints/step-*")).iterdir())
    rows = summarize(figures)
    print(f"a checkpoint of {size / 1e6:.0f} MB every {arguments.interval} steps, medians")
    print(f"{'':<10}{'ms: step':>10}{'during a save':>15}{'stall':>8}{'writing':>9}{'a run, s':>10}{'peak MB':>9}")
    for way, row in rows.items():
        times = "".join(
            f"{1000 * row.get(name, 0):>{width}.0f}" for name, width in (("usual", 10), ("during", 15), ("stall", 8), ("writing", 9))
        )
        print(f"{way:<10}{times}{row['run']:>10.1f}{row['peak'] / 1e6:>9.0f}")
    ratio = rows["async"]["during_of_usual"]
    print(f"step during a save / usual step {ratio:.2f}   goal at most 1.15   goal met: {'yes' if ratio <= 1.15 else 'no'}")
    report = {"machine": machine, "setup": setup._asdict(), "checkpoint_bytes": size, "interval": arguments.interval, "rows": rows}
    Path(arguments.output).write_text(json.dumps(report | {"figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
