"""The package speculators' own trainer on a CPU, a step each time a line comes in: vs_speculators.py runs this in its environment.

    python speculators_on_cpu.py STEPS FLAG...     # the flags of `speculators train`

Prints "@" and a JSON object after each step, and after the validation. Changed, because it knows accelerators only: where tensors go
("cpu"), the device of its autocast, and that there is nothing to synchronise with.
"""

import json
import logging
import sys
import time
from pathlib import Path

import torch
from speculators.train import cli, trainer
from speculators.train.config import TrainConfig

STEPS = int(sys.argv[1])
trainer.get_local_rank = lambda: "cpu"
torch.accelerator.synchronize = lambda *_: None


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class LastMetrics(logging.Handler):
    """What its metric logger was told last."""

    def emit(self, record: logging.LogRecord) -> None:
        self.metrics = record.msg


class OnCpu(trainer.Trainer):
    def setup_trainer(self) -> None:
        super().setup_trainer()
        self.device_type, self.told, self.done = "cpu", LastMetrics(), 0
        logging.getLogger("speculators.metrics").addHandler(self.told)
        logging.getLogger("speculators.metrics").setLevel(logging.INFO)

    def train_epoch(self, epoch: int) -> None:
        self.wait()
        super().train_epoch(epoch, step_callback=self.end_of_step)

    def end_of_step(self) -> None:
        times = {"step": time.perf_counter() - self.started, "processor": time.process_time() - self.processor_started}
        loss = [value for name, value in sorted(self.told.metrics["train"].items()) if name.removeprefix("loss_").isdigit()]
        tell({**times, "loss": loss, "peak": memory("VmHWM"), "above_start": memory("VmHWM") - AT_START})
        self.done += 1
        if self.done < STEPS:
            self.wait()

    def wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.started, self.processor_started = time.perf_counter(), time.process_time()

    def val_epoch(self, epoch: int) -> dict[str, float] | None:
        metrics = super().val_epoch(epoch)
        tell({"validation": metrics})
        return metrics


def tell(record: dict) -> None:
    print("@" + json.dumps(record), flush=True)


AT_START = memory("VmRSS")
cli.Trainer = OnCpu
cli.main(TrainConfig.resolve(sys.argv[2:]))
