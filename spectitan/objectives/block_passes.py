"""The row pass of a chunk of logits, block by block, and the memory that it takes: on a CPU, or on a GPU without Triton."""

from collections.abc import Mapping

import torch
from torch import Tensor

from spectitan.objectives import mixture_pass, row_passes
from spectitan.objectives.row_passes import Distributions

_BLOCK_LOGITS = 1 << 20  # in float32 they stay in a CPU's cache


def block_pass(weights: Mapping[str, float], rows: int, chunk_rows: int, head: Tensor) -> "BlockPass":
    """The pass of weighted losses over `rows` rows, in chunks of at most chunk_rows, of the logits that a head [V, w] makes."""
    if weights.keys() == {"ce"}:
        return CePass(rows, chunk_rows, head)
    if weights.keys() == {"kl_div"}:
        return KlDivPass(rows, chunk_rows, head)
    return MixturePass(rows, chunk_rows, head, weights)


class BlockPass:
    """Subclasses say what is done to a block.

    Attributes:
        teacher_dtype: of the teacher's logits, that of statistics.
    """

    def __init__(self, rows: int, chunk_rows: int, head: Tensor):
        self.head, self.teacher_dtype = head, torch.promote_types(head.dtype, torch.float32)
        on_cpu = head.device.type == "cpu"  # a GPU takes a chunk at once
        self.block_rows = max(1, min(chunk_rows, _BLOCK_LOGITS // len(head))) if on_cpu else chunk_rows
        self.memory_rows = min(rows, self.block_rows)
        self.wide = self._memory() if head.dtype != self.teacher_dtype else None

    def _memory(self) -> Tensor:
        return self.head.new_empty(self.memory_rows, len(self.head), dtype=self.teacher_dtype)

    def score(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """Leaves the gradient in the logits' place, but for a factor of each row.

        Args:
            logits: [rows, V], of a chunk.
            targets: int64 [rows, 1]; -1: none.
            teacher_logits: [U, V]; overwritten.
            place: int64 [rows], each row's among them.

        Returns:
            row_stats: [rows, 3].
            factors: [rows, 1].
        """
        if teacher_logits is not None:
            self._read_teacher(teacher_logits)
        results = []
        for start in range(0, len(logits), self.block_rows):
            rows = slice(start, start + self.block_rows)
            block = logits[rows] if self.wide is None else self.wide[: len(logits[rows])].copy_(logits[rows])
            results.append(self._score_block(block, targets[rows], None if place is None else place[rows]))
            if self.wide is not None:
                logits[rows] = block
        row_stats, factors = (torch.cat(parts) for parts in zip(*results))
        return row_stats, factors

    def _read_teacher(self, logits: Tensor) -> None:
        """Prepares all blocks of a chunk."""

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """`score` of a block, in the dtype of statistics."""
        raise NotImplementedError


class CePass(BlockPass):
    def _score_block(self, logits: Tensor, targets: Tensor, place: None) -> tuple[Tensor, Tensor]:
        return row_passes.ce(logits, targets)


class KlDivPass(BlockPass):
    def __init__(self, rows: int, chunk_rows: int, head: Tensor):
        super().__init__(rows, chunk_rows, head)
        self.p, self.scratch = self._memory(), self._memory()

    def _read_teacher(self, logits: Tensor) -> None:
        blocks = [row_passes.distributions(block, self.scratch[: len(block)]) for block in logits.split(self.block_rows)]
        self.teacher = Distributions(logits, *(torch.cat(parts) for parts in list(zip(*blocks))[1:]))

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        return row_passes.kl_div(logits, self.teacher.select(place, self.p[: len(logits)]), self.scratch[: len(logits)])


class MixturePass(BlockPass):
    def __init__(self, rows: int, chunk_rows: int, head: Tensor, weights: Mapping[str, float]):
        super().__init__(rows, chunk_rows, head)
        self.weights, self.selected = dict(weights), self._memory()

    def _read_teacher(self, logits: Tensor) -> None:
        self.teacher_logits, self.best = logits, row_passes.argmax(logits)

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        teacher_logits = torch.index_select(self.teacher_logits, 0, place, out=self.selected[: len(logits)])
        run = mixture_pass.run if len(logits) == self.block_rows else mixture_pass.mixture  # blocks of one size are compiled once
        row_stats = run(logits, targets, teacher_logits, self.best[place], self.weights)
        return row_stats, row_stats.new_ones(len(row_stats), 1)


class RehearsedPass:
    """Takes the memory that TritonPass takes, and does nothing."""

    def __init__(self, weights: Mapping[str, float], rows: int, chunk_rows: int, head: Tensor):
        self.teacher_dtype = head.dtype

    def score(self, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, place: Tensor | None) -> tuple[Tensor, Tensor]:
        row_stats = logits.new_empty(len(logits), 3, dtype=torch.float32)
        return row_stats, row_stats.new_ones(len(logits), 1)
