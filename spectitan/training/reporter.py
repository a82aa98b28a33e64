"""What a run counts while it trains, and the reports that it makes of it."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectitan.errors import UserError
from spectitan.training.metrics import MetricsLogger
from spectitan.training.report_sums import ReportSums


class Reporter:
    """Makes a report of the steps since the one before it.

    Args:
        metrics: writes the reports.
        rows: what the rows of Loss.sums are of: "head 0", ...
        columns: what their columns are: loss, accuracy, ...
        datasets: names.
        tokens_per_step: of an optimizer step, over all ranks.
        flops: (targets of each row, tokens) -> useful floating-point operations.
        dtype, device: of the losses.
        step: optimizer steps done.

    Attributes:
        sums: of the steps since the last report.
    """

    def __init__(
        self,
        metrics: MetricsLogger,
        rows: Sequence[str],
        columns: Sequence[str],
        datasets: Sequence[str],
        tokens_per_step: int,
        flops: Callable[[list[int], int], int],
        dtype: torch.dtype,
        device: torch.device,
        step: int,
    ):
        self.metrics, self.rows, self.columns, self.datasets = metrics, rows, columns, datasets
        self.tokens_per_step, self.flops, self.dtype, self.device = tokens_per_step, flops, dtype, device
        self._begin(step)

    def _begin(self, step: int) -> None:
        self.sums = ReportSums((len(self.rows), len(self.columns)), len(self.datasets), self.dtype, self.device, step)
        self.seconds_waiting, self.timed_from, self.timed_step = 0.0, time.perf_counter(), step

    def report(self, step: int, learning_rate: float, grad_norm: Tensor) -> None:
        """Writes the report of the steps up to `step`: the one place where the host waits for the device. All ranks call it together."""
        self.refuse_bad()
        sums, counts = self.sums.total(), self.sums.counts
        seconds, steps = time.perf_counter() - self.timed_from, step - self.sums.first_step
        tokens = steps * self.tokens_per_step
        here = (step - self.timed_step) / steps / seconds  # after a resume, not all of the steps were timed
        means = sums[:, :4] / counts.clamp_min(1)[:, None]
        self.metrics.report(
            step=step,
            lr=learning_rate,
            **dict(zip(self.columns[:4], means.T.tolist())),
            grad_norm=grad_norm.item(),
            supervised_tokens=int(counts[0]),
            tokens_by_dataset=dict(zip(self.datasets, self.sums.tokens_by_dataset.tolist())),
            sample_hash=f"{self.sums.sample_hash:016x}",
            tokens_per_second=tokens * here,
            waiting=self.seconds_waiting / seconds,
            flops_per_second=self.flops(counts.tolist(), tokens) * here,
        )
        self._begin(step)

    def refuse_bad(self) -> None:
        """Ends a run whose loss is not finite; optimizer steps have skipped themselves since, and the last checkpoint stands."""
        bad = self.sums.first_bad()
        if bad:
            raise UserError(
                f"loss of {self.rows[bad[1]]} is not finite at step {bad[0]}; the checkpoint before it is kept. "
                "Lower optimizer.lr, or look for damaged data or weights"
            )
