"""What a run counts while it trains, and the reports that it makes of it."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectitan.errors import UserError
from spectitan.training.metrics import MetricsLogger
from spectitan.training.report_sums import ReportSums
from spectitan.types import add_conditional

# So many steps skipped in a row, with losses that are finite, are no accident: nothing is learned any more.
MAX_SKIPPED_IN_A_ROW = 10


class Reporter:
    """Makes a report of the steps since the one before it.

    Args:
        metrics: writes the reports.
        rows: what the rows of Loss.sums are of: "base" or "head 0", ...; or both, the base first.
        columns: what their columns are: loss, accuracy, ...
        datasets: names.
        data_counts: what happened to documents before training -> how often.
        work: (first step, the step after the last, targets of each row, tokens) -> useful floating-point operations of these
            optimizer steps, over all ranks.
        dtype, device: of the losses.
        step: optimizer steps done.
        state_counts: takes the counts of where hidden states came from, over all ranks; None where all come from the base.

    Attributes:
        sums: of the steps since the last report.
    """

    def __init__(
        self,
        metrics: MetricsLogger,
        rows: Sequence[str],
        columns: Sequence[str],
        datasets: Sequence[str],
        data_counts: dict[str, int],
        work: Callable[[int, int, list[int], int], int],
        dtype: torch.dtype,
        device: torch.device,
        step: int,
        state_counts: Callable[[], dict[str, int]] | None = None,
    ):
        self.state_counts = state_counts
        self.metrics, self.rows, self.columns, self.datasets = metrics, rows, columns, datasets
        self.data_counts, self.work, self.dtype, self.device = data_counts, work, dtype, device
        self._begin(step)

    def _begin(self, step: int, skipped_in_a_row: Tensor | None = None) -> None:
        shape = len(self.rows), len(self.columns)
        self.sums = ReportSums(shape, len(self.datasets), self.dtype, self.device, step, skipped_in_a_row)
        self.seconds_waiting, self.timed_from, self.timed_step = 0.0, time.perf_counter(), step

    def report(self, step: int, learning_rates: dict[str, float], grad_norms: dict[str, Tensor]) -> None:
        """Writes the report of the steps up to `step`: the one place where the host waits for the device. All ranks call it together.

        Args:
            learning_rates, grad_norms: of the last step, for "speculator", "base" or both; a rate for "muon" too, where it is used.
        """
        self.refuse_bad()
        sums, counts = self.sums.total(), self.sums.counts
        seconds, steps = time.perf_counter() - self.timed_from, step - self.sums.first_step
        flops = self.work(self.sums.first_step, step, self.sums.counts.tolist(), self.sums.tokens)
        here = (step - self.timed_step) / steps / seconds  # after a resume, not all of the steps were timed
        means = add_conditional(dict(zip(self.columns, (sums / counts.clamp_min(1)[:, None]).T.tolist())))
        part, beside = next(iter(grad_norms)), {}
        if len(grad_norms) == 2:  # a joint run: the report is of the speculator, with the base's row beside it
            part, counts = "speculator", counts[1:]
            beside = {f"base_{name}": means[name][0] for name in ("loss", "accuracy")} | {"base_grad_norm": grad_norms["base"].item()}
            means = {name: rows[1:] for name, rows in means.items()}
        beside |= {f"{name}_lr": rate for name, rate in learning_rates.items() if name != part}
        self.metrics.report(
            step=step,
            lr=learning_rates[part],
            **means,
            grad_norm=grad_norms[part].item(),
            beside=beside,
            skipped_steps=self.sums.skipped(),
            unsupervised_steps=self.sums.unsupervised_steps,
            supervised_tokens=int(counts[0]),
            tokens_by_dataset=dict(zip(self.datasets, self.sums.tokens_by_dataset.tolist())),
            sample_hash=f"{self.sums.sample_hash:016x}",
            data_counts=self.data_counts,
            state_counts=self.state_counts() if self.state_counts else None,
            tokens_per_second=self.sums.tokens * here,
            waiting=self.seconds_waiting / seconds,
            flops_per_second=flops * here,
        )
        self._begin(step, self.sums.skipped_in_a_row)

    def refuse_bad(self) -> None:
        """Ends a run that learns nothing; its optimizer steps have skipped themselves since, and the last checkpoint stands."""
        advice = "the checkpoint before it is kept. Lower optimizer.lr, or look for damaged data or weights"
        bad = self.sums.first_bad()
        if bad:
            raise UserError(f"loss of {self.rows[bad[1]]} is not finite at step {bad[0]}; {advice}")
        in_a_row = int(self.sums.skipped_in_a_row)
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(f"the last {in_a_row} steps were skipped: losses are finite, the gradient norm is not; {advice}")
