"""Stage 2: how fast the base samples in batches against one sequence at a time, and what share of a step sampling takes.

    python benchmarks/stage2.py
    python benchmarks/stage2.py --base /models/Llama-3.2-1B --seq-length 1024 --prompts 96

Defaults are fms-fsdp's: 8 samples and 96 prompts a step, 64 tokens a prompt, 256 sampled after each, temperature 1, top_k 10.

1. Sampling alone, by the function that training uses, on batches of several sizes. They take turns; medians of wall clock and
   processor time. Goal: the largest batch at least 5 times the tokens/s of one sequence at a time.
2. Whole steps of spectitan.train with stage2.start_step = 0, an MLP speculator of 3 heads on the modules of the running
   Python's json package and its like, with clocks around its parts; medians.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from spectitan import train
from spectitan.data.loader import Loader
from spectitan.decoding.continuation import continue_prompts
from spectitan.decoding.sampling import Sampling
from spectitan.distributed import utils
from spectitan.distributed.fsdp import resolve_compute_dtype
from spectitan.distributed.mesh import choose_device
from spectitan.keyed_random import uniform
from spectitan.models.registry import get_model
from spectitan.speculators.mlp import MlpSpeculator
from spectitan.states.continued import ContinuedStates
from spectitan.training.metrics import MetricsLogger

GOAL = 5.0
PARTS = ("data", "sampling", "states", "speculator forward", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="spectitan:pystdlib", help="folder in Hugging Face layout, or spectitan:NAME")
    parser.add_argument("--samples", type=int, default=8, help="training.global_batch_size")
    parser.add_argument("--prompts", type=int, default=96, help="stage2.batch_size, and the largest batch that samples")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=256, help="stage2.seq_length")
    parser.add_argument("--seq-length", type=int, default=768, help="data.seq_length")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16], help="batch sizes to measure between 1 and --prompts")
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, and measured steps")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="as training.compute_dtype")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "stage2.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    device = choose_device()
    dtype = resolve_compute_dtype(arguments.dtype, device)
    setup = {key: value for key, value in vars(arguments).items() if key != "output"}
    report = {"machine": describe_machine(device), "setup": setup | {"dtype": str(dtype).removeprefix("torch.")}}
    load = report["machine"]["load_average_before"]
    print(f"{report['machine']['name']}, {arguments.threads} threads, {dtype}, torch {torch.__version__}, load {load:.1f} before the run")
    report["sampling"] = measure_sampling(arguments, device, dtype)
    print_sampling(report["sampling"], arguments.new_tokens)
    report["step"] = measure_steps(arguments)
    print_step(report["step"])
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# ---- sampling alone ----


def measure_sampling(arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    base = get_model("embedllama", "auto", arguments.base, dtype=dtype).requires_grad_(False).to(device)
    sizes = sorted({1, *arguments.batches, arguments.prompts})

    def sample(size: int, turn: int) -> None:
        quantiles = uniform(turn, torch.arange(size)[:, None], torch.arange(arguments.new_tokens))
        prompts = (uniform(turn, torch.arange(size)[:, None], torch.arange(arguments.prompt_length)) * base.config.vocab_size).long()
        continue_prompts(base, prompts.to(device), quantiles.to(device), Sampling(1.0, 10))

    seconds: dict[int, list[dict]] = {size: [] for size in sizes}
    for size in (sizes[0], sizes[-1]):  # warm up
        sample(size, 0)
    for turn in range(arguments.repeats):
        for size in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:  # none always runs after the same one
            seconds[size].append(clocked(partial(sample, size, turn)))
    rows = []
    for size in sizes:
        wall, processor = (statistics.median(measured[clock] for measured in seconds[size]) for clock in ("wall", "processor"))
        tokens = size * arguments.new_tokens
        rows.append({"batch": size, "tokens_per_second": tokens / wall, "tokens_per_processor_second": tokens / processor})
    for row in rows:
        row["of_one_at_a_time"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["of_one_at_a_time_in_processor_time"] = row["tokens_per_processor_second"] / rows[0]["tokens_per_processor_second"]
    return {"rows": rows, "goal": GOAL, "met": rows[-1]["of_one_at_a_time"] >= GOAL}


def clocked(work: Callable) -> dict:
    """Seconds of wall clock and of this process's processors; on a GPU until it is done."""
    wait_for_device()
    wall, processor = time.perf_counter(), time.process_time()
    work()
    wait_for_device()
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_sampling(result: dict, new_tokens: int) -> None:
    print(f"\nsampling {new_tokens} tokens\n{'batch':>7}{'tokens/s':>11}{'of one at a time':>18}{'in processor time':>19}")
    for row in result["rows"]:
        ratios = f"{row['of_one_at_a_time']:>18.2f}{row['of_one_at_a_time_in_processor_time']:>19.2f}"
        print(f"{row['batch']:>7}{row['tokens_per_second']:>11.0f}{ratios}")
    print(f"goal: at least {result['goal']:g} at the largest batch; met: {'yes' if result['met'] else 'no'}", flush=True)


# ---- whole steps ----


def measure_steps(arguments: argparse.Namespace) -> dict:
    """Median seconds of the parts of a step, through spectitan.train; one step before them warms up."""
    seconds, steps = dict.fromkeys(PARTS, 0.0), []

    def timed(part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            wait_for_device()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for_device()
            seconds[part] += time.perf_counter() - start
            return result

        return call

    def end_of_step(logger: MetricsLogger, step: int) -> None:
        steps.append({"step": time.perf_counter(), **seconds})
        seconds.update(dict.fromkeys(PARTS, 0.0))

    Loader.__next__ = timed("data", Loader.__next__)
    ContinuedStates.begin = timed("sampling", ContinuedStates.begin)
    ContinuedStates.states = timed("states", ContinuedStates.states)
    MlpSpeculator.__call__ = timed("speculator forward", MlpSpeculator.__call__)
    utils.backward = timed("backward", utils.backward)
    utils.clip_grad_norm = timed("optimizer", utils.clip_grad_norm)
    train.step_if_finite = timed("optimizer", train.step_if_finite)
    MetricsLogger.advance = end_of_step
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text")
        keys = {
            "job.dump_folder": f"{folder}/run",
            "job.threads": arguments.threads,
            "base.path": arguments.base,
            "data.path": f"{folder}/text",
            "data.cache_dir": f"{folder}/cache",
            "data.seq_length": arguments.seq_length,
            "training.num_steps": 1 + arguments.repeats,
            "training.global_batch_size": arguments.samples,
            "training.micro_batch_size": arguments.samples,
            "training.compute_dtype": arguments.dtype,
            "stage2.start_step": 0,
            "stage2.batch_size": arguments.prompts,
            "stage2.prompt_length": arguments.prompt_length,
            "stage2.seq_length": arguments.new_tokens,
            "eval.prompts": "none",
            "eval.at_end": "false",
            "eval.loss_samples": 0,
            "export.format": "none",
            "metrics.loggers": "",
            "compile.enabled": "false",
        }
        if train.main([f"--{key}={value}" for key, value in keys.items()]):
            sys.exit("the training run failed")
    whole = [later["step"] - earlier["step"] for earlier, later in zip(steps, steps[1:])]
    medians = {part: statistics.median(step[part] for step in steps[1:]) for part in PARTS}
    step = statistics.median(whole)
    share = statistics.median(measured["sampling"] / seconds for measured, seconds in zip(steps[1:], whole))
    tokens = arguments.prompts * (arguments.prompt_length + arguments.new_tokens)
    other = step - sum(medians.values())
    return {"seconds": {"step": step, **medians, "other": other}, "sampling_share": share, "tokens_per_second": tokens / step}


def write_text(folder: Path) -> None:
    """Some of the running Python's own modules, half a megabyte."""
    folder.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("[a-d]*.py")):
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")


def print_step(result: dict) -> None:
    print("\na step of training, seconds\n" + "".join(f"{part:>{len(part) + 3}}" for part in result["seconds"]))
    print("".join(f"{seconds:>{len(part) + 3}.2f}" for part, seconds in result["seconds"].items()))
    print(f"share of sampling: {100 * result['sampling_share']:.0f}%; {result['tokens_per_second']:,.0f} tokens/s", flush=True)


def describe_machine(device: torch.device) -> dict:
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        name = next((value.strip() for field, value in fields.items() if field.startswith("model name")), platform.machine())
    return {
        "name": name,
        "cores": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()
