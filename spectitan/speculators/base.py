"""What every drafter is: the interface of trainer, decoder and export, and the one alignment of targets."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectitan.config.sections import Objective
from spectitan.models.config_file import ConfigFile
from spectitan.models.kv_cache import KVCache
from spectitan.models.readout import Readout
from spectitan.types import BaseStates, Draft, Loss, Targets, TokenBatch, to_device

# pick(logits [batch, vocab] , step) -> (tokens int64 [batch], probabilities float32 [batch, vocab] or None when greedy).
# A family that drafts k tokens in one pass calls it with logits [batch, k, vocab] and slice(0, k).
Pick = Callable[[Tensor, int | slice], tuple[Tensor, Tensor | None]]


def align_targets(batch: TokenBatch, steps: int, lookahead: int = 1, keep: Tensor | None = None) -> Targets:
    """The supervised pairs: state row t at step k predicts token t + 1 + lookahead + k.

    A drafter has `lookahead = 1`, because the base itself has already predicted token t + 1; the base's own loss has 0.
    A pair is valid if state and target lie in one document, the target is supervised and `state_mask` lets a drafter start
    from the state. Runs on the host; no other code shifts tokens or reads the masks.

    Args:
        batch: all on the CPU, but for the tokens, which are not read.
        steps: number of steps (heads).
        keep: bool [batch, seq, steps], a family's own choice among (state row, step) pairs; None keeps all.
    """
    documents, loss_mask = batch.document_ids, batch.loss_mask
    length = documents.shape[1]
    teacher, state, step = [], [], []
    for k in range(steps):
        distance = 1 + lookahead + k  # from state row to target
        if distance >= length:
            break
        valid = loss_mask[:, distance:] & (documents[:, distance:] == documents[:, :-distance]) & (documents[:, distance:] >= 0)
        if batch.state_mask is not None:
            valid = valid & batch.state_mask[:, :-distance]
        if keep is not None:
            valid = valid & keep[:, : length - distance, k]
        rows, columns = valid.nonzero(as_tuple=True)
        state.append(rows * length + columns)
        teacher.append(state[-1] + distance - 1)
        step.append(torch.full_like(rows, k))
    if not state:
        empty = torch.empty(0, dtype=torch.int64)
        return Targets(empty, empty, empty, torch.zeros(steps, dtype=torch.int64))
    teacher, state, step = torch.cat(teacher), torch.cat(state), torch.cat(step)
    order = torch.argsort(teacher, stable=True)
    return Targets(teacher[order], state[order], step[order], torch.bincount(step, minlength=steps))


def last_index(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of [batch, m, ...], the last real row of each sequence, the first where counts is 0: rows[last_index(counts)]."""
    return torch.arange(len(counts), device=counts.device), (counts - 1).clamp_min(0)


def last_row(rows: Tensor, counts: Tensor) -> Tensor:
    """[batch, m, ...] -> [batch, ...]: see `last_index`."""
    return rows[last_index(counts)]


def collect_loss(total: Tensor, row_stats: Tensor, targets: Targets, rows: int) -> Loss:
    """Sums per-row statistics by step and adds the count of pairs that are right at all steps so far.

    Args:
        total: [] weighted, normalised loss.
        row_stats: [N, 3 or more] loss, correct (0 or 1), alpha, then a family's own columns.
        targets: the N pairs, on the device of row_stats.
        rows: batch * seq.
    """
    right_so_far = _right_so_far(row_stats[:, 1], targets, rows)[targets.state, targets.step]
    columns = torch.cat([row_stats[:, :3], right_so_far[:, None], row_stats[:, 3:]], 1)
    sums = torch.zeros(len(targets.counts), columns.shape[1], dtype=columns.dtype, device=columns.device)
    return Loss(total, sums.index_add_(0, targets.step, columns), targets.counts)


def right_before(correct: Tensor, targets: Targets, rows: int) -> Tensor:
    """[N]: 1 for each pair that is reached, because all steps before it are right. Arguments as in `collect_loss`."""
    right_so_far = _right_so_far(correct, targets, rows)
    return F.pad(right_so_far, (1, 0), value=1.0)[targets.state, targets.step]


def _right_so_far(correct: Tensor, targets: Targets, rows: int) -> Tensor:
    """[rows, steps], 1 where all steps up to this one are right; steps without a target do not count against."""
    right = torch.ones(rows, len(targets.counts), dtype=correct.dtype, device=correct.device)
    right[targets.state, targets.step] = correct
    return right.cumprod(1)


class Speculator(nn.Module):
    """A drafter. A subclass is one file, with its Config dataclass, registered in speculators/registry.py."""

    taps: tuple[int, ...] = ()  # layer ids of the base whose states it reads, ascending; the final state is always there
    steps: int = 1  # tokens it is trained to look ahead
    needs_base_head: bool = True  # its training forward reads the base's output head
    drafts_trees: bool = False  # has draft_tree
    metrics: tuple[str, ...] = ("loss", "accuracy", "alpha", "full_accuracy")  # columns of Loss.sums; the first four are fixed
    formats: tuple[str, ...] = ()  # of export.format, that can hold it; auto is the first that holds all of it
    head_modules: tuple[str, ...] = ("head", "lm_head")  # modules of its own whose outputs are tokens' scores
    borrowed: tuple[str, ...] = ()  # tensors of its folders that may be the base's own: see base_tensors

    @classmethod
    def new(cls, config, base_config, objective: Objective) -> "Speculator":
        """One that is not read from anywhere: reads the files that its keys name, and replaces such keys by what stands there.

        Raises:
            UserError: keys that do not go together, or files that cannot be read.
        """
        return cls(config, base_config, objective)

    def identity(self) -> dict[str, object]:
        """`speculator.key` -> value of what its function depends on beside its keys and parameters."""
        return {}

    def check(self) -> None:
        """Raises UserError if tensors that were read contradict each other."""

    def check_given(self, config, given: Collection[str]) -> None:
        """Raises UserError if a file that one of the `given` keys names contradicts what was read."""

    def check_device(self, device: torch.device) -> None:
        """Raises UserError if a key asks for what cannot be trained there."""

    def write_files(self, folder: Path) -> None:
        """Writes into a run's folder what other programs read beside the weights."""

    def init_weights(self, generator: torch.Generator) -> None:
        """Draws every parameter in full from one generator, in a fixed order: all layouts start from the same numbers."""
        raise NotImplementedError

    def init_from_base(self, readout: Readout) -> None:
        """Copies what starts as the base's own weights, of a new speculator. Both may be sharded; all ranks call it together."""

    def inner_matrices(self) -> set[str]:
        """Names of the parameters that map features to features: matrices that are neither an embedding nor a head."""
        tables = {
            f"{name}.weight"
            for name, part in self.named_modules()
            if isinstance(part, nn.Embedding) or name.partition(".")[0] in self.head_modules
        }
        return {name for name, parameter in self.named_parameters() if parameter.dim() == 2} - tables

    def backbone(self) -> list[tuple[nn.Module, str]]:
        """Modules and the names of their methods that rows go through in training, up to the loss: what torch.compile takes."""
        return []

    @property
    def rows(self) -> tuple[str, ...]:
        """What the rows of Loss.sums are of, for reports."""
        return tuple(f"head {step}" for step in range(self.steps))

    def align(self, batch: TokenBatch) -> Targets:
        """The supervised pairs of a batch: pure, on the host, from its masks, document_ids and index only."""
        return align_targets(batch, self.steps)

    def step_weight(self) -> Tensor:
        """float32 or float64 [steps], on the CPU: weight of each step's mean loss in the total."""
        return torch.ones(self.steps)

    def row_weights(self, targets: Targets, denominators: Tensor) -> Tensor:
        """[N] weight of each pair in the total: step_weight / global count of the step, so that ranks and micro-batches add."""
        weights = to_device(self.step_weight().double(), denominators.device) / denominators.clamp_min(1)
        return to_device(weights, targets.step.device)[targets.step]

    def forward(self, batch: TokenBatch, states: BaseStates, targets: Targets, denominators: Tensor, readout: Readout) -> Loss:
        """One micro-batch's share of the loss. `denominators`: int64 [steps], counts over all ranks and micro-batches."""
        raise NotImplementedError

    def new_cache(self, batch: int, length: int) -> KVCache | None:
        """The drafter's own cache for `length` slots a row, or None if it keeps nothing."""
        return None

    def draft(
        self, cache: KVCache | None, tokens: Tensor, states: BaseStates, counts: Tensor, readout: Readout, k: int, pick: Pick
    ) -> Draft:
        """Proposes k tokens a row.

        Args:
            tokens: int64 [batch, m], the token after each of the m newly verified states, right-padded.
            states: their states, [batch, m, ...].
            counts: int64 [batch], how many of the m are real; 0: the row is done, its draft is ignored.
        """
        raise NotImplementedError

    def draft_tree(
        self,
        cache: KVCache | None,
        tokens: Tensor,
        states: BaseStates,
        counts: Tensor,
        readout: Readout,
        top_k_tokens_per_head: Sequence[int],
        n_candidates: int,
    ) -> Draft:
        """Proposes n_candidates chains of len(top_k_tokens_per_head) tokens a row, likeliest first; no two are the same.

        Token i of a chain is among the top_k_tokens_per_head[i] likeliest after those before it. Nothing is drawn, so the
        draft has no probabilities. The other arguments: see `draft`.
        """
        raise NotImplementedError

    def flops(self, targets_per_step: list[int], tokens: int) -> int:
        """Floating-point operations of forward and backward that a step needs: 2 a multiply-add, matrix products only."""
        raise NotImplementedError

    def serving(self, format: str) -> tuple[dict, dict[str, Tensor]]:
        """config.json and tensors of a folder (spectitan/speculators/serving.py writes and reads it).

        The tensors are the parameters or views of them, so that a folder can be read into them; a weight with several names
        is one object under all of them.

        Args:
            format: one of `formats`.

        Raises:
            UserError: the format cannot hold this one, naming the key that is in the way.
        """
        raise NotImplementedError

    def base_tensors(self, readout: Readout) -> dict[str, Tensor]:
        """Tensors of a folder that are the base's own, by name: written for servers, and not read back."""
        return {}

    @staticmethod
    def config_from_folder(file: ConfigFile, format: str) -> tuple[object, int, int]:
        """The family's keys, the base's hidden size and its vocabulary size, as `serving` wrote them."""
        raise NotImplementedError
