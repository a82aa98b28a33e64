"""A training step on one GPU: tokens/s, useful MFU, memory, and its time beside the base's forward alone.

    python benchmarks/gpu.py                                # a random Llama-3.1-8B, mlp and lstm of width 4096, 3 heads; 80 GiB
    python benchmarks/gpu.py --types mlp --loss kl_div
    python benchmarks/gpu.py --small --steps 2              # a toy, also without a GPU: does everything run?

Every case is spectitan.train itself in a process of its own, as its users start it; its own report of the last --steps steps, after as
many to warm up, says how fast it was. benchmarks/README.md says how to read the table.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe_machine, import_all, memory  # its neighbours: this folder is where Python looks first
from small_run import SMALL, Setup, as_flags, run_keys, speculator_keys, write_inputs

from spectitan import train
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.distributed.mesh import choose_device
from spectitan.models.llama import LlamaConfig
from spectitan.models.registry import choose_config
from spectitan.speculators import recurrent
from spectitan.states.online import OnlineStates
from spectitan.training.metrics import MetricsLogger, device_peak_flops
from spectitan.training.optimizer import optimizer_tensors

GOALS = {"mfu": 0.5, "loss_bytes": 2e9}  # at least, at most


class Large(Setup):
    """The published shape, instead of one made of the other fields."""

    def base_config(self) -> LlamaConfig:
        return choose_config("embedllama", "3.1-8b", "")


class Measured(Exception):
    """Ends the run: there is nothing to save."""


class Memory:
    """Bytes of tensors on the GPU; without one, of the process. The host does not wait for the GPU.

    Attributes:
        of_step: at their highest.
        of_loss: at most in a fused loss, above what was there before it and the gradients that it makes.
    """

    def __init__(self):
        self.of_step = self.of_loss = 0

    def watch(self, fused_linear_loss: Callable) -> Callable:
        def watched(hidden, weight, *args, **kwargs):
            self.end_of_part()
            before = torch.cuda.memory_allocated() if torch.cuda.is_available() else memory("VmRSS")
            result = fused_linear_loss(hidden, weight, *args, **kwargs)
            self.of_loss = max(self.of_loss, self._peak() - before - 4 * weight.numel() - hidden.nbytes)
            return result

        return watched

    def end_of_part(self) -> None:
        self.of_step = max(self.of_step, self._peak())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory("VmHWM")


def run(setup: Setup, folder: str, loss: str, steps: int, output: str) -> None:
    """One case, in this process; writes what was found to a file."""
    logging.disable(logging.INFO)  # the table is what is to be read
    import_all()
    reports, seen, peaks, trainers = [], [], Memory(), []
    base_states, train_step = OnlineStates.states, train.Trainer._train_step

    def states(source, batch):
        found = base_states(source, batch)
        seen[:] = [source, batch, sum(tensor.nbytes for tensor in (found.final, *found.taps))]
        return found

    def step(trainer, *args):
        trainers[:] = [trainer]
        train_step(trainer, *args)
        peaks.end_of_part()

    def report(logger, **values):
        reports.append(values)
        if len(reports) < 2:
            peaks.__init__()
            return
        source, batch, states_bytes = seen
        figures = of_report(values) | of_memory(trainers[0], peaks, states_bytes)
        forward = seconds_of(lambda: base_states(source, batch), steps)
        figures |= {"forward_seconds": forward, "step_over_forward": figures["seconds"] / forward / trainers[0].accumulation}
        Path(output).write_text(json.dumps(figures))
        raise Measured

    def of_report(values: dict) -> dict:
        peak = device_peak_flops()
        tokens = setup.rows * setup.seq_length  # of the one micro-batch of a step
        return {
            "tokens_per_second": values["tokens_per_second"],
            "seconds": tokens / values["tokens_per_second"],
            "flops_per_second": values["flops_per_second"],
            "mfu": values["flops_per_second"] / peak if peak else None,
            "waiting": values["waiting"],
        }

    OnlineStates.states, train.Trainer._train_step, MetricsLogger.report = states, step, report
    recurrent.fused_linear_loss = peaks.watch(recurrent.fused_linear_loss)
    with contextlib.suppress(Measured):
        train.main(as_flags(keys_of(setup, folder, loss, steps)))


def keys_of(setup: Setup, folder: str, loss: str, steps: int) -> dict[str, object]:
    """Two reports: of the warm-up, and of what is measured."""
    reports = {"training.num_steps": 3 * steps, "metrics.report_interval": steps, "metrics.loggers": ""}
    batch = {"training.micro_batch_size": setup.rows, "objective.loss": loss}
    return run_keys(setup, folder) | speculator_keys(setup) | reports | batch


def of_memory(trainer: train.Trainer, peaks: Memory, states: int) -> dict:
    """Bytes of what a step cannot do without, of all of it, and of what its loss takes."""
    trained = list(trainer.speculator.parameters())
    compute_dtype = resolve_compute_dtype(trainer.config.training.compute_dtype, trainer.device)
    sizes = {
        "base": sum(tensor.nbytes for tensor in trainer.base.parameters()),
        "masters": sum(tensor.nbytes for tensor in trained),
        "cast_weights": sum(tensor.numel() for tensor in trained) * compute_dtype.itemsize,
        "gradients": sum(tensor.nbytes for tensor in trained),
        "optimizer": sum(tensor.nbytes for tensor in optimizer_tensors(trainer.optimizer).values()),
        "states": states,
    }
    return {"bytes": sizes, "peak_bytes": peaks.of_step, "loss_bytes": peaks.of_loss}


def seconds_of(work, repeats: int) -> float:
    """Of one call, the mean of `repeats` after one more."""
    work()
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    _wait()
    return (time.perf_counter() - start) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["mlp", "lstm"], choices=("mlp", "lstm"))
    parser.add_argument("--loss", default="ce", help="as objective.loss")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step, one micro-batch")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="measured, after as many")
    parser.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="as compile.enabled")
    parser.add_argument("--small", action="store_true", help="a toy model, also on a CPU")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "gpu.json"))
    arguments = parser.parse_args()
    if not arguments.small and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here; --small runs without one")

    given = {"rows": arguments.rows, "seq_length": arguments.seq_length, "dtype": "auto", "compile": arguments.compile}
    setup = Large(vocab_size=128256, hidden_size=4096, width=4096, **given)
    if arguments.small:
        setup = Setup(**given | SMALL | {"rows": 2, "seq_length": 128})
    device = choose_device()
    machine = describe_machine() | {"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none"}
    print(f"{machine['gpu']}, torch {machine['torch']}; V {setup.vocab_size}, {setup.heads} tied heads of width {setup.width}, "
          f"{setup.rows} x {setup.seq_length} tokens, {arguments.loss}")  # fmt: skip
    print("type  tokens/s  useful TFLOP/s   MFU  ms a step  of the base's forward  peak GB  loss GB  waits for data")
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(setup._replace(rows=max(1, setup.rows * arguments.steps // 20)), Path(folder))
        for kind in arguments.types:
            output = f"{folder}/{kind}.json"
            case = multiprocessing.get_context("spawn").Process(
                target=run, args=(setup._replace(type=kind), folder, arguments.loss, arguments.steps, output)
            )
            case.start()
            case.join()
            if not os.path.exists(output):
                raise SystemExit(f"{kind}: its process ended with {case.exitcode}; its messages are above")
            report[kind] = json.loads(Path(output).read_text())
            print_row(kind, report[kind])
    if not arguments.small:
        contents = {"machine": machine, "setup": setup._asdict(), "loss": arguments.loss, "steps": arguments.steps, "cases": report}
        Path(arguments.output).write_text(json.dumps(contents, indent=2) + "\n")
        print(f"goals: MFU at least {GOALS['mfu']:g}, loss at most {GOALS['loss_bytes'] / 1e9:g} GB; written: {arguments.output}")


def print_row(kind: str, row: dict) -> None:
    mfu = f"{row['mfu']:.2f}" if row["mfu"] else "-"
    print(f"{kind:<4}  {row['tokens_per_second']:>8.0f}  {row['flops_per_second'] / 1e12:>14.3g}  {mfu:>4}  {1000 * row['seconds']:>9.0f}  "
          f"{row['step_over_forward']:>21.2f}  {row['peak_bytes'] / 1e9:>7.2f}  {row['loss_bytes'] / 1e9:>7.2f}  "
          f"{row['waiting']:>14.3f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
