"""What a report says of the steps since the one before it: sums, on the device where they are made."""

import torch
from torch import Tensor

from spectitan.distributed import utils


class ReportSums:
    """Sums over the steps after `first_step`. They are part of a checkpoint, so that a resumed run reports what it would have.

    Args:
        shape: rows (heads) and columns of Loss.sums.
        num_datasets: of the run.
        dtype, device: of the losses.
        first_step: optimizer steps done before.
        skipped_in_a_row: [] on the device, steps skipped up to then without one between them that was not.

    Attributes:
        counts: int64 [rows], targets over all ranks, on the CPU.
        tokens_by_dataset: int64 [num_datasets], tokens that the loss mask lets be targets, over all ranks, on the CPU.
        tokens: int, over all ranks, padding left out.
        sample_hash: int, modulo 2**64, of the samples.
        unsupervised_steps: optimizer steps without a single target on any rank.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        num_datasets: int,
        dtype: torch.dtype,
        device: torch.device,
        first_step: int,
        skipped_in_a_row: Tensor | None = None,
    ):
        self.first_step, self.tokens, self.sample_hash, self.unsupervised_steps = first_step, 0, 0, 0
        self.counts, self.tokens_by_dataset = torch.zeros(shape[0], dtype=torch.int64), torch.zeros(num_datasets, dtype=torch.int64)
        self._sums = torch.zeros(shape, dtype=dtype, device=device)
        self._first_bad_step = torch.full(shape[:1], -1, device=device)
        self._skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device) if skipped_in_a_row is None else skipped_in_a_row

    def add_samples(self, counts: Tensor, tokens_by_dataset: Tensor, tokens: int, sample_hash: int) -> None:
        """The targets, tokens and samples of one optimizer step, over all ranks."""
        self.counts += counts
        self.unsupervised_steps += not counts.any()
        self.tokens_by_dataset += tokens_by_dataset
        self.tokens += tokens
        self.sample_hash = (self.sample_hash + sample_hash) % 2**64

    def add_losses(self, sums: Tensor, step: int) -> None:
        """Loss.sums of a micro-batch of optimizer step `step` on this rank; the host does not wait for them."""
        self._sums += sums
        bad = ~sums[:, 0].isfinite() & (self._first_bad_step < 0)
        self._first_bad_step = torch.where(bad, step, self._first_bad_step)

    def add_step(self, skipped: Tensor) -> None:
        """Whether an optimizer step was skipped, 1 or 0, [] on the device, the same on all ranks; the host does not wait for it."""
        self._skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def skipped(self) -> int:
        """Optimizer steps that were skipped; the host waits."""
        return int(self._skipped)

    def first_bad(self) -> tuple[int, int] | None:
        """Step and row of the first loss that was not finite on any rank. All ranks call it together; the host waits."""
        of_ranks = utils.gather(self._first_bad_step.tolist())
        return min(((step, row) for of_rank in of_ranks for row, step in enumerate(of_rank) if step >= 0), default=None)

    def total(self) -> Tensor:
        """Sums over all ranks, float64 [rows, columns], on the CPU. All ranks call it together; the host waits."""
        return utils.sum_over_ranks(self._sums).double().cpu()

    def state(self) -> dict:
        """JSON values of which `load` makes the same sums. All ranks call it together."""
        return {
            "first_step": self.first_step,
            "sums": self.total().tolist(),
            "counts": self.counts.tolist(),
            "tokens_by_dataset": self.tokens_by_dataset.tolist(),
            "tokens": self.tokens,
            "sample_hash": self.sample_hash,
            "unsupervised_steps": self.unsupervised_steps,
            "skipped": self.skipped(),
            "skipped_in_a_row": int(self.skipped_in_a_row),
        }

    def load(self, state: dict) -> None:
        """A counter that the checkpoint does not know is new since the version that wrote it, and begins at 0; tokens were all that may be
        targets."""
        self.first_step, self.sample_hash = state["first_step"], state["sample_hash"]
        self.unsupervised_steps = state.get("unsupervised_steps", 0)
        self.counts, self.tokens_by_dataset = torch.tensor(state["counts"]), torch.tensor(state["tokens_by_dataset"])
        self.tokens = state.get("tokens", sum(state["tokens_by_dataset"]))
        self._skipped.fill_(state.get("skipped", 0))
        self.skipped_in_a_row.fill_(state.get("skipped_in_a_row", 0))
        if utils.rank() == 0:  # the other ranks' shares are in it
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
