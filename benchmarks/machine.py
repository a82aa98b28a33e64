"""What a benchmark says of the machine, and the memory that it takes there. Linux: both come from /proc."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch


def import_all() -> None:
    """What PyTorch imports at the first use of FSDP, an optimizer or the compiler: it counts as program, not as the step's memory."""
    importlib.import_module("torch._inductor.compile_fx")
    importlib.import_module("torch.utils.tensorboard")


def memory(field: str) -> int:
    """VmRSS, bytes resident now, or VmHWM, the most there ever were."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def describe_machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "cpu": fields.get("model name", "unknown"),
        "amx": any(flag.startswith("amx") for flag in flags),
        "avx512_bf16": "avx512_bf16" in flags,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "huge_pages": pages.read_text().strip() if pages.exists() else "none",
        "torch": torch.__version__,
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip() or "unknown",
    }
