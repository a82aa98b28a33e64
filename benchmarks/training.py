"""Training speed and memory: our step, the usual step, and the floor that this machine's matrix products set.

    python benchmarks/training.py                       # the goals' set-up: a 57.9M base, V 32000, 4 x 512 tokens a step
    python benchmarks/training.py --type lstm           # the LSTM speculator instead of the MLP
    python benchmarks/training.py --small --repeats 2   # a quick look that everything runs

Three ways, each in a process of its own, one step at a time in turn, so that whatever else the machine does meets all alike:

ours   spectitan.train itself, as its users start it, with clocks around its functions.
plain  what most trainers of such speculators do: the base's logits computed and dropped, n full tensors of logits stacked, one
       cross_entropy a head, AdamW as PyTorch makes it by default.
floor  the base's forward, and the speculator's matrix products on supervised rows into buffers that are there already.

Everything runs twice: with the system's allocator as it is, and with glibc's MALLOC thresholds raised. benchmarks/README.md
says how to read the table. Linux: memory and the processor's description come from /proc.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import describe_machine, import_all, memory  # its neighbours: this folder is where Python looks first
from plain_speculators import PLAIN
from small_run import ENDLESS, SMALL, Setup, as_flags, run_keys, speculator_keys, write_inputs
from torch import Tensor, nn

from spectitan import train
from spectitan.data.loader import Loader
from spectitan.distributed import utils
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.models.registry import get_model
from spectitan.speculators.registry import SPECULATORS
from spectitan.states.online import OnlineStates
from spectitan.training.allocator import use_huge_pages
from spectitan.training.metrics import MetricsLogger

RAISED_THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": str(16 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
PARTS = ("data", "base forward", "speculator forward", "backward", "optimizer")


# ---- the three ways: each is a function that runs steps and calls `end_of_step(seconds of each part)` after every one ----


class Clock:
    """Seconds of each part of a step."""

    def __init__(self):
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def time(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed

    def read(self) -> dict[str, float]:
        seconds = self.seconds.copy()
        self.seconds.update(dict.fromkeys(PARTS, 0.0))
        return seconds


def run_ours(setup: Setup, folder: str, end_of_step: Callable) -> None:
    """spectitan.train on that base and text, with clocks in its namespaces."""
    clock = Clock()
    family = SPECULATORS[setup.type][1]
    Loader.__next__ = clock.time("data", Loader.__next__)
    family.align = clock.time("data", family.align)
    OnlineStates.states = clock.time("base forward", OnlineStates.states)
    family.__call__ = clock.time("speculator forward", family.__call__)
    utils.backward = clock.time("backward", utils.backward)
    utils.clip_grad_norm = clock.time("optimizer", utils.clip_grad_norm)
    train.step_if_finite = clock.time("optimizer", train.step_if_finite)
    MetricsLogger.advance = lambda logger, step: end_of_step(clock.read())
    keys = run_keys(setup, folder) | speculator_keys(setup) | {"training.micro_batch_size": setup.rows, "training.num_steps": ENDLESS}
    sys.exit(train.main(as_flags(keys)))


def run_plain(setup: Setup, folder: str, end_of_step: Callable) -> None:
    torch.set_num_threads(setup.threads)
    clock = Clock()
    base = frozen_base(setup, folder)
    speculator = PLAIN[setup.type](setup)
    optimizer = torch.optim.AdamW(speculator.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def base_forward(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = base(tokens).final
            base.readout.logits(hidden)  # of no use to the loss, as in those trainers: the base's forward makes them
        return hidden

    def speculator_forward(tokens: Tensor, hidden: Tensor) -> Tensor:
        rows = setup.seq_length - setup.heads - 1
        # Mixed precision as their FSDP and DeepSpeed make it: float32 masters, cast once a step.
        weights = {name: parameter.to(setup.compute_dtype) for name, parameter in speculator.named_parameters()}
        logits = torch.func.functional_call(speculator, weights, (hidden[:, :rows], tokens[:, 1:]))
        targets = [tokens[:, 2 + step : 2 + step + rows].flatten() for step in range(setup.heads)]
        return sum(F.cross_entropy(logits[step].flatten(0, 1), targets[step]) for step in range(setup.heads))

    def update() -> None:
        nn.utils.clip_grad_norm_(speculator.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    base_forward, speculator_forward = clock.time("base forward", base_forward), clock.time("speculator forward", speculator_forward)
    backward, update = clock.time("backward", Tensor.backward), clock.time("optimizer", update)
    while True:
        tokens = torch.randint(setup.vocab_size, (setup.rows, setup.seq_length))
        backward(speculator_forward(tokens, base_forward(tokens)))
        update()
        end_of_step(clock.read())


def run_floor(setup: Setup, folder: str, end_of_step: Callable) -> None:
    use_huge_pages()
    torch.set_num_threads(setup.threads)
    clock = Clock()
    base = frozen_base(setup, folder)
    base_forward = clock.time("base forward", torch.no_grad()(base.forward))
    forward, backward = products(setup)
    forward, backward = clock.time("speculator forward", forward), clock.time("backward", backward)
    while True:
        base_forward(torch.randint(setup.vocab_size, (setup.rows, setup.seq_length)))
        forward()
        backward()
        end_of_step(clock.read())


def products(setup: Setup) -> tuple[Callable, Callable]:
    """Functions that multiply as a step's forward, and as its backward, must: outputs have their memory already.

    Heads go by blocks of rows, because one product of all rows is slower where its logits leave the cache.
    """
    dtype, width, gates = setup.compute_dtype, setup.width, PLAIN[setup.type].gates * setup.width
    supervised = [setup.rows * (setup.seq_length - 2 - step) for step in range(setup.heads)]
    sizes = [setup.hidden_size] + [width] * (setup.heads - 1)
    state, projected = (torch.randn(supervised[0], size).to(dtype) for size in (max(sizes), gates))
    matrix = torch.randn(max(sizes), gates).to(dtype)
    d_state, projected_out, d_matrix = torch.empty_like(state), torch.empty_like(projected), torch.empty_like(matrix)
    head, d_head = torch.randn(setup.vocab_size, width).to(dtype), torch.empty(setup.vocab_size, width, dtype=dtype)
    block = 1024
    logits = torch.randn(block, setup.vocab_size).to(dtype)
    hidden, d_hidden = torch.randn(block, width).to(dtype), torch.empty(block, width, dtype=dtype)
    blocks = [block] * (sum(supervised) // block) + [sum(supervised) % block]

    def forward() -> None:
        for size, rows in zip(sizes, supervised):
            torch.mm(state[:rows, :size], matrix[:size], out=projected_out[:rows])
        for rows in blocks:
            torch.mm(hidden[:rows], head.T, out=logits[:rows])

    def backward() -> None:
        for rows in blocks:
            torch.mm(logits[:rows], head, out=d_hidden[:rows])
            torch.mm(logits[:rows].T, hidden[:rows], out=d_head)
        for step, (size, rows) in enumerate(zip(sizes, supervised)):
            torch.mm(state[:rows, :size].T, projected[:rows], out=d_matrix[:size])
            if step:  # the base's states need no gradient
                torch.mm(projected[:rows], matrix[:size].T, out=d_state[:rows, :size])

    return forward, backward


def frozen_base(setup: Setup, folder: str) -> nn.Module:
    return get_model("embedllama", "auto", f"{folder}/base", dtype=setup.compute_dtype).requires_grad_(False)


WAYS = {"ours": run_ours, "plain": run_plain, "floor": run_floor}


# ---- processes ----


def worker(way: str, setup: Setup, folder: str, connection: Connection) -> None:
    """One way: a step each time the parent asks, until it hangs up."""
    import_all()
    at_start = memory("VmRSS")
    started = processor_started = 0.0

    def end_of_step(parts: dict[str, float]) -> None:
        times = {"step": time.perf_counter() - started, "processor": time.process_time() - processor_started}
        peak = memory("VmHWM")
        connection.send({**times, **parts, "peak": peak, "above_start": peak - at_start})
        wait()

    def wait() -> None:
        nonlocal started, processor_started
        try:
            connection.recv()
        except EOFError:
            sys.exit(0)
        started, processor_started = time.perf_counter(), time.process_time()

    wait()
    WAYS[way](setup, folder, end_of_step)


def measure(setup: Setup, folder: str, repeats: int, warm_up: int, environment: dict[str, str]) -> dict[str, list[dict]]:
    """`repeats` steps of each way, in turn, in processes with these environment variables."""
    spawn = multiprocessing.get_context("spawn")
    processes, connections = {}, {}
    os.environ.update(environment)
    for way in WAYS:
        connections[way], theirs = spawn.Pipe()
        processes[way] = spawn.Process(target=worker, args=(way, setup, folder, theirs), daemon=True)
        processes[way].start()
        theirs.close()
    for name in environment:
        del os.environ[name]
    steps = {way: [] for way in WAYS}
    try:
        for number in range(warm_up + repeats):
            for way, connection in connections.items():
                connection.send("step")
                step = connection.recv()
                if number >= warm_up:
                    steps[way].append(step)
    except EOFError:
        raise SystemExit(f"{way}: its process ended; its messages are above") from None
    finally:
        for way, process in processes.items():
            connections[way].close()
            process.join(5)
            process.terminate()
    return steps


# ---- what is said about them ----


def summarize(setup: Setup, steps: dict[str, list[dict]], amx: bool) -> dict:
    """Medians of each way, and of the ratios of steps that followed each other."""
    rows = {}
    for way, measured in steps.items():
        medians = {name: statistics.median(step[name] for step in measured) for name in measured[0]}
        other = medians["step"] - sum(medians[part] for part in PARTS)
        rows[way] = {
            "tokens_per_second": setup.rows * setup.seq_length / medians["step"],
            "milliseconds": {name: 1000 * medians[name] for name in ("step", *PARTS)} | {"other": 1000 * other},
            "processor_milliseconds": 1000 * medians["processor"],
            "peak_bytes": medians["peak"],
            "peak_bytes_above_start": medians["above_start"],
        }

    def ratio(way: str, to: str, clock: str = "step") -> float:
        return statistics.median(one[clock] / other[clock] for one, other in zip(steps[way], steps[to]))

    memory_ratio = rows["ours"]["peak_bytes_above_start"] / rows["plain"]["peak_bytes_above_start"]
    goals = [
        ("step / floor", ratio("ours", "floor"), "at most", 1.25, ratio("ours", "floor", "processor")),
        ("tokens/s, ours / plain", ratio("plain", "ours"), "at least", 2.0 if amx else 1.5, ratio("plain", "ours", "processor")),
        ("peak memory, ours / plain", memory_ratio, "at most", 0.40, None),
    ]
    ratios = [
        {
            "name": name,
            "value": value,
            "goal": f"{kind} {goal:g}",
            "met": value <= goal if kind == "at most" else value >= goal,
            "in_processor_time": in_processor_time,
        }
        for name, value, kind, goal, in_processor_time in goals
    ]
    return {"rows": rows, "ratios": ratios}


def print_summary(title: str, summary: dict) -> None:
    print(f"\n{title}")
    columns = ("step", *PARTS, "other")
    print(f"{'':<8}{'tokens/s':>9} |{'ms: step':>9}" + "".join(f"{name:>{len(name) + 2}}" for name in columns[1:]), end="")
    print(" | processor ms | peak MB, above start")
    for way, row in summary["rows"].items():
        milliseconds = row["milliseconds"]
        times = f"{milliseconds['step']:>9.0f}" + "".join(f"{milliseconds[name]:>{len(name) + 2}.0f}" for name in columns[1:])
        peaks = f"{row['peak_bytes'] / 1e6:>8.0f}{row['peak_bytes_above_start'] / 1e6:>13.0f}"
        print(f"{way:<8}{row['tokens_per_second']:>9.0f} |{times} |{row['processor_milliseconds']:>13.0f} |{peaks}")
    for ratio in summary["ratios"]:
        met, processor = "yes" if ratio["met"] else "no", ratio["in_processor_time"]
        beside = f"   (in processor time {processor:.2f})" if processor else ""
        print(f"{ratio['name']:<26}{ratio['value']:>6.2f}   goal {ratio['goal']}   goal met: {met}{beside}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="mlp", choices=tuple(PLAIN), help="as speculator.type")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="as training.compute_dtype")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step, in rows of 512")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=9, help="measured steps of each way")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of each way before those")
    parser.add_argument("--compile", default="auto", choices=("auto", "true", "false"), help="as compile.enabled")
    parser.add_argument("--allocator", default="both", choices=("both", "default", "raised"))
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--output", help="default: results/training.json or training_lstm.json")
    arguments = parser.parse_args()

    dtype = str(resolve_compute_dtype(arguments.dtype, torch.device("cpu"))).removeprefix("torch.")
    setup = Setup(type=arguments.type, rows=arguments.tokens // 512, dtype=dtype, compile=arguments.compile, threads=arguments.threads)
    setup = setup._replace(**SMALL) if arguments.small else setup
    machine = describe_machine()
    amx, load = "yes" if machine["amx"] else "no", machine["load_average_before"]
    print(f"{machine['cpu']}, {machine['cores']} cores, AMX {amx}, torch {machine['torch']}, load {load:.1f} before the run")
    shape = f"{setup.type}, V {setup.vocab_size}, n {setup.heads}, width {setup.width}, {setup.rows} x {setup.seq_length} tokens"
    print(f"{shape}, {dtype}, {setup.threads} threads")
    report = {"machine": machine, "setup": setup._asdict(), "repeats": arguments.repeats, "allocators": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(setup, Path(folder))
        for name, environment in {"default": {}, "raised": RAISED_THRESHOLDS}.items():
            if arguments.allocator in ("both", name):
                steps = measure(setup, folder, arguments.repeats, arguments.warm_up, environment)
                report["allocators"][name] = {"environment": environment, **summarize(setup, steps, machine["amx"])}
                print_summary(f"allocator: {name} {environment or ''}", report["allocators"][name])
    name = "training.json" if setup.type == "mlp" else f"training_{setup.type}.json"
    output = Path(arguments.output or Path(__file__).parent / "results" / name)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
