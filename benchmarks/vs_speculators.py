"""EAGLE-3 trained here and by vLLM's package speculators: the same base, hidden states on disk, first weights, order and steps.

    tests/serving/environment.sh speculators DIR
    python benchmarks/vs_speculators.py --environment DIR                                    # a random 57.9M base, V 32000: speed
    python benchmarks/vs_speculators.py --environment DIR --draft-vocab-size 8000
    python benchmarks/vs_speculators.py --environment DIR --base spectitan:pystdlib --steps 300   # what is learned as well
    python benchmarks/vs_speculators.py --environment DIR --small --steps 6                  # does everything run?

Three processes take a step each in turn, so that whatever else the machine does meets all alike:

ours         spectitan.train on hidden states of the disk
speculators  its own trainer on the same files, attention and loss as they run on a CPU (speculators_on_cpu.py says what was changed)
floor        the matrix products of that step, into buffers that are there already

Then both drafters, each as its trainer has written it, are measured by spectitan.evaluate on the same held-out text and prompts.
benchmarks/README.md says how to read the table. Linux: memory comes from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from eagle3_products import products_of  # its neighbours: this folder is where Python looks first
from machine import describe_machine, import_all, memory
from small_run import SMALL, Setup, as_flags, write_inputs
from vs_speculators_run import HELD_OUT, SEED, Run, train_main, write_rows

from spectitan import evaluate
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.models.weights import resolve_base_path
from spectitan.training.allocator import use_huge_pages
from spectitan.training.metrics import MetricsLogger

WAYS = ("ours", "speculators", "floor")


# ---- the three ways ----


def run_ours(run: Run, wait: Callable, tell: Callable) -> None:
    def end_of_step(logger: MetricsLogger, step: int) -> None:
        tell()
        if step < run.steps:
            wait()

    MetricsLogger.advance = end_of_step
    states = f"{run.folder}/ours/hidden_states"
    wait()
    train_main(
        run, Path(run.folder, "run"), f"--data.path={run.folder}/ours", f"--speculator.path={run.folder}/first/export",
        "--states.source=offline", "--states.on_missing=raise", f"--states.hidden_states_path={states}",
    )  # fmt: skip


def run_floor(run: Run, wait: Callable, tell: Callable) -> None:
    """The products of a step's forward and backward, each into memory that it has had before."""
    use_huge_pages()
    torch.set_num_threads(run.threads)
    products = products_of(run)
    for _ in range(run.steps):
        wait()
        for left, right, out in products:
            torch.mm(left, right, out=out)
        tell()


# ---- processes ----


class Worker:
    """A process that makes a step when it is told to."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self.log = log
        with open(log, "w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment
            )

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.record()

    def record(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a process has ended with status {self.process.wait()}: {self.log.read_text()[-3000:]}")


def worker(way: str, run: Run) -> None:
    """Of this script's own ways: steps between lines that come in."""
    import_all()
    at_start, started = memory("VmRSS"), [0.0, 0.0]

    def wait() -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        started[:] = time.perf_counter(), time.process_time()

    def tell() -> None:
        times = {"step": time.perf_counter() - started[0], "processor": time.process_time() - started[1]}
        peak = memory("VmHWM")
        print("@" + json.dumps({**times, "peak": peak, "above_start": peak - at_start}), flush=True)

    {"ours": run_ours, "floor": run_floor}[way](run, wait, tell)


def commands(run: Run, environment: Path) -> dict[str, list[str]]:
    ours = [sys.executable, __file__, "--run", json.dumps(run)]
    count = run.steps * run.rows
    maps = {"d2t-path": f"{run.folder}/d2t.npy", "t2d-path": f"{run.folder}/t2d.npy"} if run.reduced else {}
    flags = {
        "verifier-name-or-path": resolve_base_path(run.base),
        "from-pretrained": f"{run.folder}/first/export",
        "data-path": f"{run.folder}/theirs",
        "save-path": f"{run.folder}/speculators",
        "log-dir": f"{run.folder}/logs",
        "on-missing": "raise",
        "speculator-type": "eagle3",
        "draft-attn-impl": "sdpa",
        "loss-implementation": "eager",
        "hidden-states-dtype": run.dtype,
        "total-seq-len": run.rows * run.seq_length,
        "train-data-ratio": (count + 0.5) / (count + HELD_OUT),
        "num-workers": 0,
        "ttt-steps": 3,
        "optimizer": "adamw",
        "lr": run.lr,
        "weight-decay": 0.01,
        "scheduler-type": "linear",
        "scheduler-warmup-steps": max(1, run.steps // 100),
        "max-steps": run.steps,
        "epochs": 1,
        "seed": SEED,
        **maps,
    }
    theirs = [environment / "bin" / "python", Path(__file__).with_name("speculators_on_cpu.py"), run.steps]
    theirs += [word for name, value in flags.items() for word in (f"--{name}", value)]
    return {"ours": [*ours, "--way", "ours"], "speculators": [str(word) for word in theirs], "floor": [*ours, "--way", "floor"]}


def measure(run: Run, environment: Path) -> tuple[dict[str, list[dict]], dict]:
    """The steps of each way, taken in turn; and what speculators says of its own validation."""
    variables = {"OMP_NUM_THREADS": str(run.threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    workers = {way: Worker(command, Path(run.folder, f"{way}.log"), variables) for way, command in commands(run, environment).items()}
    steps = {way: [] for way in WAYS}
    for _ in range(run.steps):
        for way, of_way in workers.items():
            steps[way].append(of_way.step())
    validation = workers["speculators"].record()["validation"]
    for of_way in workers.values():
        of_way.process.stdin.close()
        of_way.process.stdout.read()
        assert of_way.process.wait() == 0, of_way.log.read_text()[-3000:]
    reports = [json.loads(line) for line in Path(run.folder, "run", "metrics.jsonl").read_text().splitlines()]
    for step, report in zip(steps["ours"], reports):
        step["loss"] = report["loss"]
    return steps, validation


def quality(run: Run, folder: Path, name: str) -> dict:
    """Of an exported folder: held-out figures and acceptance, by spectitan.evaluate."""
    prompts = [] if run.base.startswith("spectitan:") else ["--eval.prompts=none"]
    flags = {
        "job.dump_folder": f"{run.folder}/evaluated_{name}",
        "job.threads": run.threads,
        "base.path": run.base,
        "base.allow_other": "true",
        "speculator.path": folder,
        "data.val_path": f"{run.folder}/validation",
        "data.seq_length": run.seq_length,
        "data.packing": "document",
        "data.cache_dir": f"{run.folder}/cache",
        "objective.loss": "kl_div",
        "eval.loss_samples": HELD_OUT,
        "eval.speed_prompts": 1,
    }
    if evaluate.main([*as_flags(flags), *prompts]):
        raise SystemExit(f"{folder} could not be evaluated")
    report = json.loads(Path(flags["job.dump_folder"], "report.json").read_text())
    keys = (
        "acceptance_length",
        "acceptance_by_position",
        "identical",
        "heldout_loss",
        "heldout_accuracy",
        "heldout_full_accuracy",
        "heldout_alpha",
    )
    return {key: report[key] for key in keys if key in report}


# ---- what is said about them ----


def summarize(run: Run, steps: dict[str, list[dict]], warm_up: int, amx: bool) -> dict:
    measured = {way: of_way[warm_up:] for way, of_way in steps.items()}
    tokens, rows = run.rows * run.seq_length, {}
    for way, of_way in measured.items():
        median = {name: statistics.median(step[name] for step in of_way) for name in ("step", "processor")}
        rows[way] = {
            "tokens_per_second": tokens / median["step"],
            "milliseconds": 1000 * median["step"],
            "processor_milliseconds": 1000 * median["processor"],
            "peak_bytes": steps[way][-1]["peak"],
            "peak_bytes_above_start": steps[way][-1]["above_start"],
        }

    def ratio(way: str, to: str) -> float:
        return statistics.median(one["step"] / other["step"] for one, other in zip(measured[way], measured[to]))

    memory_ratio = rows["ours"]["peak_bytes_above_start"] / rows["speculators"]["peak_bytes_above_start"]
    speed = (4 if amx else 2) if run.reduced else (7 if amx else 3)
    goals = [
        ("step / floor", ratio("ours", "floor"), "at most", 1.4 if run.reduced else 1.3),
        ("tokens/s, ours / speculators", ratio("speculators", "ours"), "at least", speed),
        ("peak memory above start, GiB", rows["ours"]["peak_bytes_above_start"] / 2**30, "at most", 1.5),
        ("peak memory, ours / speculators", memory_ratio, "at most", 1 / 3),
    ]
    ratios = [
        {"name": name, "value": value, "goal": f"{kind} {goal:.3g}", "met": bool(value <= goal if kind == "at most" else value >= goal)}
        for name, value, kind, goal in goals
    ]
    return {"rows": rows, "ratios": ratios}


def print_report(report: dict) -> None:
    print(f"\n{'':<13}{'tokens/s':>9}{'step ms':>9}{'processor ms':>14}{'peak MB':>9}{'above start':>13}")
    for way, row in report["rows"].items():
        print(
            f"{way:<13}{row['tokens_per_second']:>9.0f}{row['milliseconds']:>9.0f}{row['processor_milliseconds']:>14.0f}"
            f"{row['peak_bytes'] / 1e6:>9.0f}{row['peak_bytes_above_start'] / 1e6:>13.0f}"
        )
    for ratio in report["ratios"]:
        print(f"{ratio['name']:<34}{ratio['value']:>7.2f}   goal {ratio['goal']}   goal met: {'yes' if ratio['met'] else 'no'}")
    for name, figures in report["quality"].items():
        print(f"{name}: " + json.dumps(figures))


def command_of(arguments: argparse.Namespace) -> str:
    """Without the paths of this machine."""
    given = {"base": arguments.base, "draft-vocab-size": arguments.draft_vocab_size, "steps": arguments.steps, "threads": arguments.threads}
    flags = " ".join(f"--{name} {value}" for name, value in given.items() if value not in ("", -1))
    return f"python benchmarks/vs_speculators.py --environment DIR {flags}{' --small' if arguments.small else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="the virtual environment that has the package speculators")
    parser.add_argument(
        "--base", default="", help="a folder or spectitan:NAME, whose text is Python's standard library; default: random weights"
    )
    parser.add_argument("--draft-vocab-size", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--warm-up", type=int, default=2, help="steps of these that no figure of speed counts")
    parser.add_argument("--tokens", type=int, default=2048, help="a step, in rows of 512")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--output", help="default: results/vs_speculators.json, with what differs from its set-up in its name")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        worker(arguments.way, Run(*json.loads(arguments.run)))
        return
    if arguments.environment is None:
        parser.error("--environment is needed: tests/serving/environment.sh speculators DIR makes one")

    dtype = str(resolve_compute_dtype(arguments.dtype, torch.device("cpu"))).removeprefix("torch.")
    machine = describe_machine() | {"command": command_of(arguments)}
    with tempfile.TemporaryDirectory() as folder:
        base, seq_length = arguments.base, 512
        if not base:
            write_inputs(Setup(**SMALL | {"num_layers": 8} if arguments.small else {}), Path(folder))
            base = f"{folder}/base"
        if arguments.small:
            seq_length = 64
        run = Run(
            folder, base, steps=arguments.steps, rows=arguments.tokens // 512, seq_length=seq_length,
            draft_vocab_size=arguments.draft_vocab_size, dtype=dtype, lr=arguments.lr, threads=arguments.threads,
        )  # fmt: skip
        torch.set_num_threads(run.threads)
        with torch.no_grad():
            write_rows(run)
        steps, validation = measure(run, arguments.environment.absolute())
        theirs = next(path for path in sorted(Path(folder, "speculators").iterdir()) if (path / "config.json").is_file())
        report = {"machine": machine, "run": run._asdict() | {"folder": "", "base": arguments.base or "random"}}
        report |= summarize(run, steps, min(arguments.warm_up, arguments.steps - 1), machine["amx"])
        report["loss"] = {way: [step["loss"] for step in steps[way]] for way in ("ours", "speculators")}
        report["speculators_own_validation"] = validation
        report["quality"] = {
            "ours": quality(run, Path(folder, "run", "export"), "ours"),
            "speculators": quality(run, theirs, "speculators"),
        }
    print_report(report)
    differs = {"_reduced": run.reduced, "_pystdlib": arguments.base, "_small": arguments.small}
    name = "vs_speculators" + "".join(part for part, does in differs.items() if does)
    output = Path(arguments.output or Path(__file__).parent / "results" / f"{name}.json")
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
