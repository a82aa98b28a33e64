"""Is any work of a joint step done twice: base and speculator together, beside each of them alone.

    python benchmarks/joint.py
    python benchmarks/joint.py --rounds 5 --rows 8 --compute-dtype bfloat16

Every way is `spectitan.train` on the base that ships, and the ways take turns. Figures are processor milliseconds of this process,
on one thread: the least of all steps, the first two of a run aside. "parts" is what a joint step should take: the base's step and the
speculator's, with the forward that they share counted once.
"""

import argparse
import json
import os
import platform
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from spectitan import train
from spectitan.states.online import OnlineStates
from spectitan.training.metrics import MetricsLogger

TRAINED_BASE = ["--base.freeze=false"]
WAYS = {
    "base alone": ["--speculator.type=none", *TRAINED_BASE],
    "speculator, base frozen": [],
    "joint": TRAINED_BASE,
    "joint, states not detached": [*TRAINED_BASE, "--training.detach_states=false"],
    "joint, activation checkpointing": [*TRAINED_BASE, "--base.activation_checkpointing"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    parser.add_argument("--steps", type=int, default=7, help="steps of a run")
    parser.add_argument("--rows", type=int, default=4, help="samples of 256 tokens in a step")
    parser.add_argument("--compute-dtype", default="float32")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "joint.json"))
    arguments = parser.parse_args()
    clock = Clock()
    times = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for way in WAYS:
                times[way] += clock.run(flags(way, f"{folder}/{way}{number}", arguments))[2:]
    table = {way: {"step_ms": least(steps, 0), "base_forward_ms": least(steps, 1)} for way, steps in times.items()}
    alone, speculator = table["base alone"], table["speculator, base frozen"]
    parts = alone["step_ms"] + speculator["step_ms"] - speculator["base_forward_ms"]
    for way, row in table.items():
        print(f"{way:34} {row['step_ms']:8.1f} ms a step, {row['base_forward_ms']:7.1f} of them the base's forward")
    print(f"{'parts':34} {parts:8.1f} ms; joint takes {table['joint']['step_ms'] / parts:.3f} of it")
    record = {
        "set_up": {key: value for key, value in vars(arguments).items() if key != "output"},
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "load_average": os.getloadavg()},
        "ways": table,
        "parts_ms": parts,
        "joint_of_parts": table["joint"]["step_ms"] / parts,
    }
    Path(arguments.output).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def flags(way: str, folder: str, arguments: argparse.Namespace) -> list[str]:
    keys = {
        "job.threads": 1,
        "job.dump_folder": folder,
        "base.path": "spectitan:pystdlib",
        "data.path": Path(sysconfig.get_path("stdlib")) / "json",
        "data.seq_length": 256,
        "training.micro_batch_size": arguments.rows,
        "training.num_steps": arguments.steps,
        "training.compute_dtype": arguments.compute_dtype,
        "compile.enabled": "false",
        "checkpoint.interval": arguments.steps,
        "metrics.report_interval": arguments.steps,
        "metrics.loggers": "",
        "eval.at_end": "false",
        "export.format": "none",
    }
    return [f"--{key}={value}" for key, value in keys.items()] + WAYS[way]


class Clock:
    """Processor seconds of steps and of the base's forward, read at the end of each step."""

    def __init__(self):
        self.steps: list[tuple[float, float]] = []
        self.forward, self.began = 0.0, 0.0
        states = OnlineStates.states

        def timed(source, batch):
            start = time.process_time()
            result = states(source, batch)
            self.forward += time.process_time() - start
            return result

        OnlineStates.states = timed
        MetricsLogger.advance = lambda logger, step: self.end_step()

    def end_step(self) -> None:
        now = time.process_time()
        self.steps.append((now - self.began, self.forward))
        self.forward, self.began = 0.0, now

    def run(self, flags: list[str]) -> list[tuple[float, float]]:
        self.steps, self.forward, self.began = [], 0.0, time.process_time()
        if train.main(flags):
            raise SystemExit("a run has failed")
        return self.steps


def least(steps: list[tuple[float, float]], column: int) -> float:
    return 1e3 * min(step[column] for step in steps)


if __name__ == "__main__":
    main()
