"""What a run says while it trains: a console line a report, a progress bar, metrics.jsonl, evaluations.jsonl, other loggers."""

import json
import logging
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TextIO

import torch

from spectitan.config.sections import Metrics
from spectitan.distributed import utils
from spectitan.files import write_whole
from spectitan.training.loggers import Run, open_loggers, read_names, write_names

logger = logging.getLogger(__name__)

# Dense bfloat16 FLOP/s of GPUs, from their data sheets, by what their name contains.
_PEAK_FLOPS = {"B200": 2250e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


class MetricsLogger:
    """Writes reports; on ranks other than 0 it does nothing.

    metrics.jsonl has one object a report, evaluations.jsonl one an evaluation. On resume both are cut back to the checkpoint,
    so that every step appears once. What cannot be written is an OSError on every rank.

    Args:
        config: loggers beside console and the two files, their folder and project.
        folder: the run's dump_folder.
        total_steps: of the whole run.
        start_step: steps done before this process.
        run_name: what the run is called there, when it begins; one that goes on keeps its name.
        about: section.key -> value, what the loggers are told of the run.

    Attributes:
        evaluations: the records of evaluations.jsonl, those of earlier starts first.
    """

    def __init__(
        self,
        config: Metrics,
        folder: str | os.PathLike,
        *,
        total_steps: int,
        start_step: int,
        run_name: str = "",
        about: dict | None = None,
    ):
        self.folder, self.total_steps, self.file, self.loggers, self.bar = Path(folder), total_steps, None, [], None
        self.evaluations = utils.on_main(lambda: self._open(config, start_step, run_name, about or {})) or []

    def _open(self, config: Metrics, start_step: int, run_name: str, about: dict) -> list[dict]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            truncate_after(self.folder / name, start_step)
        self.file = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
        self._open_loggers(config, start_step, run_name, about)
        if sys.stderr.isatty():
            self.bar = ProgressBar(self.total_steps, start_step)
        self.peak_flops = device_peak_flops()
        logger.info(
            "useful FLOP/s = matrix products that the step needs (2 a multiply-add) / time, over all ranks%s",
            f"; MFU = useful FLOP/s / (ranks x {self.peak_flops / 1e12:.0f} TFLOP/s, dense bfloat16)" if self.peak_flops else "",
        )
        path = self.folder / "evaluations.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _open_loggers(self, config: Metrics, start_step: int, run_name: str, about: dict) -> None:
        known = read_names(self.folder) if start_step else {}
        run = Run(known.pop("name", run_name), self.folder, about, start_step, known)
        self.loggers = open_loggers(config, run)
        if run.name or run.known:
            write_names(self.folder, {"name": run.name, **run.known})

    def _log(self, values: dict[str, float], step: int) -> None:
        for each in self.loggers:
            each.log(values, step)

    def advance(self, step: int) -> None:
        """A step is done: moves the progress bar, where there is a terminal."""
        if self.bar:
            self.bar.draw(step)

    def report(
        self,
        *,
        step: int,
        lr: float,
        grad_norm: float,
        beside: dict[str, float],
        skipped_steps: int,
        unsupervised_steps: int,
        supervised_tokens: int,
        tokens_by_dataset: dict[str, int],
        sample_hash: str,
        data_counts: dict[str, int],
        tokens_per_second: float,
        waiting: float,
        flops_per_second: float,
        state_counts: dict[str, int] | None = None,
        **per_head: list[float],
    ) -> None:
        """One report, about the steps since the one before.

        Args:
            step: optimizer steps done.
            grad_norm: of the last step, before clipping.
            beside: of a base trained with a speculator base_loss, base_accuracy, base_grad_norm, base_lr; of what Muon trains muon_lr.
            skipped_steps: how many of the steps changed nothing, because a gradient norm was not finite.
            unsupervised_steps: how many of the steps had no target at all; they add nothing to the means.
            supervised_tokens: targets of the first head.
            tokens_by_dataset: tokens that the loss mask lets be targets.
            sample_hash: of the samples trained on, in hexadecimal.
            data_counts: documents dropped, split or truncated before training, by reason; the same in every report of a run.
            state_counts: samples by where their hidden states came from; None where all come from the base in this job.
            tokens_per_second: over all ranks, padding left out.
            waiting: share of the time spent waiting for data, 0 to 1.
            flops_per_second: useful ones, over all ranks.
            per_head: means over supervised targets, one number a head: loss and accuracy at least.
        """
        memory = peak_memory()
        scalars = {"lr": lr, "grad_norm": grad_norm, **beside, "skipped_steps": skipped_steps, "unsupervised_steps": unsupervised_steps}
        scalars |= {"supervised_tokens": supervised_tokens}
        scalars |= {"tokens_per_second": tokens_per_second, "waiting": waiting, "flops_per_second": flops_per_second, "peak_memory": memory}
        record = {"step": step, **per_head, **scalars, "tokens_by_dataset": tokens_by_dataset, "sample_hash": sample_hash}
        record["data_counts"] = data_counts
        if state_counts:
            record["state_counts"] = state_counts
        heads = {f"{name}/head_{head}": value for name, values in per_head.items() for head, value in enumerate(values)}

        def write() -> None:
            _append(self.file, record)
            self._log(scalars | heads, step)
            logger.info("%s", self._line(step, scalars, per_head, state_counts))

        utils.on_main(write)

    def _line(self, step: int, scalars: dict[str, float], per_head: dict[str, list[float]], state_counts: dict[str, int] | None) -> str:
        flops = f"{scalars['flops_per_second'] / 1e12:.3g} TFLOP/s"
        if self.peak_flops:
            flops += f", MFU {100 * scalars['flops_per_second'] / (utils.world_size() * self.peak_flops):.1f}%"
        parts = [f"step {step}/{self.total_steps}"]
        parts += [f"{name} " + " ".join(f"{value:.3f}" for value in per_head[name]) for name in ("loss", "accuracy")]
        parts += [f"grad norm {scalars['grad_norm']:.3g}", f"lr {scalars['lr']:.2e}"]
        if "muon_lr" in scalars:
            parts[-1] += f", Muon's {scalars['muon_lr']:.2e}"
        if "base_loss" in scalars:
            parts.append("base: loss {base_loss:.3f}, accuracy {base_accuracy:.3f}, grad norm {base_grad_norm:.3g}".format(**scalars))
        if scalars["skipped_steps"]:
            parts.append(f"{scalars['skipped_steps']} steps skipped: a gradient norm was not finite")
        if scalars["unsupervised_steps"]:
            parts.append(f"{scalars['unsupervised_steps']} steps without a supervised token")
        if state_counts:
            parts.append("states: " + ", ".join(f"{count} {name}" for name, count in state_counts.items() if count))
        parts += [f"{scalars['tokens_per_second']:,.0f} tokens/s", f"data {100 * scalars['waiting']:.1f}%"]
        return " | ".join([*parts, f"{scalars['peak_memory'] / 1e9:.2f} GB", flops])

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """An evaluation's results, by name: console, evaluations.jsonl and loggers."""
        utils.on_main(lambda: self._evaluation(step, values))
        self.evaluations.append({"step": step, **values})

    def _evaluation(self, step: int, values: dict[str, float]) -> None:
        with open(self.folder / "evaluations.jsonl", "a", encoding="utf-8") as file:
            _append(file, {"step": step, **values})
        short = {name: value for name, value in values.items() if "/" not in name or name.startswith(("heldout_loss", "heldout_accuracy"))}
        logger.info("step %d evaluation | %s", step, " | ".join(f"{name} {value:.4g}" for name, value in short.items()))
        self._log({f"evaluation/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        if self.bar:
            self.bar.clear()
        for each in self.loggers:
            each.close()
        if self.file:
            self.file.close()


class ProgressBar:
    """A line on the terminal (stderr) with the share done and the time left. Log lines may be printed over it."""

    WIDTH, INTERVAL = 30, 0.2  # characters; seconds between drawings

    def __init__(self, total: int, start: int):
        self.total, self.start, self.started, self.drawn = total, start, time.monotonic(), 0.0

    def draw(self, step: int) -> None:
        now = time.monotonic()
        if now - self.drawn < self.INTERVAL and step < self.total:
            return
        self.drawn = now
        seconds = (now - self.started) / max(1, step - self.start)
        left = int(seconds * (self.total - step))
        filled = self.WIDTH * step // max(1, self.total)
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        text = f"[{'#' * filled:<{self.WIDTH}}] {step}/{self.total}  {seconds:.2f} s/step  {clock} left"
        # The cursor goes back to the line's start: the next log line is written over the bar.
        print(f"\r{text}\x1b[K\r", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def truncate_after(path: str | os.PathLike, step: int) -> None:
    """Removes the records after `step` from a file of JSON lines, and lines that a crash left half-written."""
    path = Path(path)
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        write_whole(path, b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _append(file: TextIO, record: dict) -> None:
    file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
    file.flush()


def _finite(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory() -> int:
    """Bytes, at their highest since the process began: of tensors on the GPU, else of the whole process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of this process's GPU, if it is a known one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in _PEAK_FLOPS.items() if all(word in name for word in part.split())), None)
