"""The fused output head and loss against the plain ones, and against their matrix products alone: time and memory.

    python benchmarks/fused_loss.py
    python benchmarks/fused_loss.py --shapes 32000x512x6144 --chunk-rows 128 256 512 1024
    python benchmarks/fused_loss.py --shapes 32000x512x6144 --losses tv lk_hybrid '{"ce": 0.1, "tv": 0.9}' --eager

A call is forward and backward, both gradients, nothing of a training step beside it. Ways:

fused     fused_linear_loss
unfused   objectives/losses.py under autograd, all logits at once
products  the floor: logits, both gradients and, but for ce, the logits of the distinct teacher rows; each one matrix product of
          all rows into memory that is there already

fused is compiled, as in training where there is a C++ compiler; with --eager it is not.

Each way runs in a process of its own and they take turns, so that whatever else the machine does meets all alike; figures are
medians. On a machine that others use too, compare processor time, with one thread. Memory is the peak of resident memory in a
call above what was resident before the first, and above the head's gradient; of `products` nothing. Three rows in a row have the
same teacher row, as with three heads. Linux: memory comes from /proc.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spectitan.compiled import compile_loops
from spectitan.config.loss_mixture import needs_teacher
from spectitan.objectives import losses
from spectitan.objectives.fused_linear import Teacher, fused_linear_loss

ALLOCATORS = {
    "glibc": {"THP_MEM_ALLOC_ENABLE": "0"},
    "as in training": {"THP_MEM_ALLOC_ENABLE": "1", "MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20)},
    "raised thresholds": {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_MMAP_THRESHOLD_": str(16 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)},
}
HEADS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["32000x512x6144", "4096x256x6144", "128000x512x2048"], help="vocabulary x width x rows"
    )
    parser.add_argument("--losses", nargs="+", default=["ce", "kl_div"])
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--chunk-rows", nargs="+", type=int, default=[-1])
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=list(ALLOCATORS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "fused_loss.json"))
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a process that measures
    arguments = parser.parse_args()
    if arguments.way:
        return measure(arguments)

    report = {
        "rows": [
            row
            for allocator in arguments.allocators
            for shape in arguments.shapes
            for loss in arguments.losses
            for row in compare(arguments, allocator, shape, loss)
        ],
        "compiled": not arguments.eager,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "machine": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "load_average": os.getloadavg()[2],
    }
    Path(arguments.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(arguments: argparse.Namespace, allocator: str, shape: str, loss: str) -> list[dict]:
    """All ways at one shape, in turns; prints and returns their rows of the table."""
    eager = ["--eager"] if arguments.eager else []
    ways = [("products", -1), ("unfused", -1), *(("fused", chunk_rows) for chunk_rows in arguments.chunk_rows)]
    options = ["--threads", str(arguments.threads), "--dtype", arguments.dtype, "--shapes", shape, "--losses", loss]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--way", way, "--chunk-rows", str(chunk_rows), *options, *eager],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ALLOCATORS[allocator],
        )
        for way, chunk_rows in ways
    ]
    calls = [[call(process) for process in processes] for _ in range(arguments.repeats + 1)]
    for process in processes:
        process.stdin.close()
        process.wait()
    rows = []
    print(f"\n{loss}, vocabulary x width x rows {shape}, {arguments.dtype}, {arguments.threads} threads, {allocator}")
    print(f"{'':<14}{'chunk rows':>11}{'seconds':>10}{'of products':>13}{'processor s':>13}{'of products':>13}{'memory, MiB':>13}")
    for i, (way, chunk_rows) in enumerate(ways):
        row = {"loss": loss, "shape": shape, "allocator": allocator, "way": way, "chunk_rows": chunk_rows}
        for clock in ("seconds", "processor_seconds"):
            row[clock] = statistics.median(turn[i][clock] for turn in calls[1:])
            row[f"{clock}_of_products"] = statistics.median(turn[i][clock] / turn[0][clock] for turn in calls[1:])
        vocabulary, width, _ = map(int, shape.split("x"))
        gradient = vocabulary * width * getattr(torch, arguments.dtype).itemsize
        row["memory_mib"] = max(max(turn[i]["bytes"] for turn in calls) - gradient, 0) / 2**20
        print(
            f"{way:<14}{chunk_rows if chunk_rows > 0 else '':>11}{row['seconds']:>10.3f}{row['seconds_of_products']:>13.2f}"
            f"{row['processor_seconds']:>13.3f}{row['processor_seconds_of_products']:>13.2f}{row['memory_mib']:>13.0f}"
        )
        rows.append(row)
    return rows


def call(process: subprocess.Popen) -> dict:
    """Has a measuring process run once."""
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def measure(arguments: argparse.Namespace) -> None:
    """A measuring process: one call for each line of standard input."""
    torch.set_num_threads(arguments.threads)
    compile_loops(not arguments.eager)
    vocabulary, width, rows = map(int, arguments.shapes[0].split("x"))
    run = prepare(arguments.way, arguments.losses[0], vocabulary, width, rows, getattr(torch, arguments.dtype), arguments.chunk_rows[0])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in sys.stdin:
        start, processor_start = time.perf_counter(), time.process_time()
        run()
        seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
        result = {"seconds": seconds, "processor_seconds": processor_seconds, "bytes": resident("VmHWM") - before}
        print(json.dumps(result), flush=True)


def prepare(way: str, loss: str, vocabulary: int, width: int, rows: int, dtype: torch.dtype, chunk_rows: int) -> Callable[[], None]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    row_weights, targets = torch.full((rows,), 1 / rows), torch.randint(vocabulary, (rows,))
    teacher_rows = torch.arange(rows) // HEADS
    teacher_hidden, teacher_weight = torch.randn(-(-rows // HEADS), width), torch.randn(vocabulary, width) / width**0.5
    teacher = Teacher(teacher_hidden.to(dtype), teacher_weight.to(dtype), teacher_rows)

    def fused() -> None:
        hidden.grad = weight.grad = None
        fused_linear_loss(hidden, weight, row_weights, loss=loss, targets=targets, teacher=teacher, chunk_rows=chunk_rows)[0].backward()

    def unfused() -> None:
        hidden.grad = weight.grad = None
        logits = (hidden @ weight.T).float()
        teacher_logits = (teacher.hidden @ teacher.weight.T).float()[teacher_rows] if needs_teacher(loss) else None
        row_losses, _ = losses.mixture(loss, logits, targets, teacher_logits)
        (row_losses @ row_weights).backward()

    if way != "products":
        return {"fused": fused, "unfused": unfused}[way]
    inputs, head = hidden.detach(), weight.detach()
    logits, teacher_logits = torch.zeros(rows, vocabulary, dtype=dtype), torch.zeros(len(teacher.hidden), vocabulary, dtype=dtype)
    d_hidden, d_weight = torch.zeros_like(inputs), torch.zeros_like(head)

    def products() -> None:
        if needs_teacher(loss):
            torch.mm(teacher.hidden, teacher.weight.T, out=teacher_logits)
        torch.mm(inputs, head.T, out=logits)
        torch.mm(logits, head, out=d_hidden)
        torch.mm(logits.T, inputs, out=d_weight)

    return products


def resident(field: str) -> int:
    """Bytes of /proc/self/status: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def processor() -> str:
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
