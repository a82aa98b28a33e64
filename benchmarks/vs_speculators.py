"""EAGLE-3 trained here and by vLLM's package speculators: the same base, hidden states on disk, first weights, order and steps.

    tests/serving/environment.sh speculators DIR
    python -m benchmarks.vs_speculators --environment DIR                                    # a random 57.9M base, V 32000: speed
    python -m benchmarks.vs_speculators --environment DIR --draft-vocab-size 8000
    python -m benchmarks.vs_speculators --environment DIR --base spectitan:pystdlib --steps 300   # what is learned as well
    python -m benchmarks.vs_speculators --environment DIR --small --steps 6                  # does everything run?

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
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.training import Setup, describe_machine, import_all, memory, write_inputs
from spectitan import evaluate, train
from spectitan.config.sections import Data
from spectitan.data.loader import build_loader
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.draft_vocabulary import maps_of, most_frequent, write_maps
from spectitan.training.allocator import use_huge_pages
from spectitan.training.metrics import MetricsLogger

SEED, HELD_OUT = 42, 32  # rows that nobody trains on
WAYS = ("ours", "speculators", "floor")


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


# ---- the three ways ----


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
        "objective.loss": "kl_div",
        "optimizer.lr": run.lr,
        "optimizer.betas": "0.9,0.999",
        "optimizer.weight_decay": 0.01,
        "lr_scheduler.type": "linear",
        "lr_scheduler.warmup_steps": max(1, run.steps // 100),
        "lr_scheduler.decay_ratio": 1 - max(1, run.steps // 100) / run.steps,
        "checkpoint.interval": 10**6,
        "metrics.report_interval": 1,
        "metrics.loggers": "",
        "eval.prompts": "none",
        "eval.at_end": "false",
        "export.format": "speculators",
        "export.base_name": resolve_base_path(run.base),  # there it finds its verifier
    }
    status = train.main([*(f"--{key}={value}" for key, value in keys.items()), *flags])
    if status:
        sys.exit(status)


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


def products_of(run: Run) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(left, right, out) of each, of EAGLE-3 with one layer and three steps, every row supervised.

    Heads go by blocks of rows, because one product of all rows is slower where its logits leave the cache.
    """
    config = json.loads((resolve_base_path(run.base) / "config.json").read_text())
    hidden, intermediate, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys = heads * hidden // heads, kv_heads * hidden // heads
    vocab = run.draft_vocab_size if run.reduced else vocab
    dtype, all_rows, products = getattr(torch, run.dtype), run.rows * run.seq_length, []
    buffers: dict[tuple, Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> Tensor:
        return buffers.setdefault((name, rows, columns), torch.randn(rows, columns).to(dtype))

    def linear(rows: int, inputs: int, outputs: int, from_states: bool = False) -> None:
        """A linear layer: its output, the gradient of its weight, and that of its input unless this needs none."""
        x, y, weight = matrix("x", rows, inputs), matrix("y", rows, outputs), matrix("weight", outputs, inputs)
        products.append((x, weight.T, y))
        products.append((y.T, x, weight))
        if not from_states:
            products.append((y, weight, x))

    linear(all_rows, 3 * hidden, hidden, from_states=True)
    for step in range(3):
        rows = all_rows if step == 0 else run.rows * (run.seq_length - 3)
        for outputs in (queries, keys, keys):
            linear(rows, hidden, outputs, from_states=True)  # what comes of the embedding, which is frozen
            linear(rows, hidden, outputs)
        linear(rows, queries, hidden)
        linear(rows, hidden, intermediate)
        linear(rows, hidden, intermediate)
        linear(rows, intermediate, hidden)
    block, pairs = 512, sum(run.rows * (run.seq_length - 2 - step) for step in range(3))
    head, logits = matrix("head", vocab, hidden), matrix("logits", block, vocab)
    teacher_rows = run.rows * (run.seq_length - 2)
    for count, backward in ((teacher_rows, False), (pairs, True)):
        for first in range(0, count, block):
            rows = min(block, count - first)
            x = matrix("block", block, hidden)[:rows]
            products.append((x, head.T, logits[:rows]))
            if backward:
                products.append((logits[:rows], head, x))
    return products


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
    ours = [sys.executable, "-m", "benchmarks.vs_speculators", "--run", json.dumps(run)]
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
    if evaluate.main([*(f"--{key}={value}" for key, value in flags.items()), *prompts]):
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
    goals = [
        ("step / floor", ratio("ours", "floor"), "at most", 1.4 if run.reduced else 1.3),
        (
            "tokens/s, ours / speculators",
            ratio("speculators", "ours"),
            "at least",
            (4 if run.reduced else 7) if amx else (2 if run.reduced else 3),
        ),
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
    return f"python -m benchmarks.vs_speculators --environment DIR {flags}{' --small' if arguments.small else ''}"


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
            setup = Setup()._replace(
                **(
                    {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2}
                    if arguments.small
                    else {}
                )
            )
            write_inputs(setup, Path(folder))
            base = f"{folder}/base"
        if arguments.small:
            seq_length = 64
        run = Run(
            folder,
            base,
            arguments.steps,
            arguments.tokens // 512,
            seq_length,
            arguments.draft_vocab_size,
            dtype,
            arguments.lr,
            arguments.threads,
        )
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
