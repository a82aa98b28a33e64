"""The row pass of a chunk of logits, block by block: on a CPU, or on a GPU without Triton.

Compiled, the operations on a block become a few loops over each of its rows, which stay in a core's cache. Otherwise they run one by
one, and all blocks share their memory.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spectitan import compiled
from spectitan.objectives import mixture_pass, row_passes
from spectitan.objectives.kept_memory import kept_memory
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
        copies_teacher: the memory of the logits that `read_teacher` was given is free after it.
    """

    scratch_blocks = 0  # as much memory as a block has, in the dtype of statistics: so many times

    def __init__(self, rows: int, chunk_rows: int, head: Tensor):
        self.head, self.dtype, self.is_compiled = head, torch.promote_types(head.dtype, torch.float32), compiled.is_wanted()
        self.copies_teacher = head.dtype != self.dtype
        block_rows = _BLOCK_LOGITS // len(head)
        if self.is_compiled:
            block_rows = max(block_rows, torch.get_num_threads())  # a thread takes whole rows
        on_cpu = head.device.type == "cpu"  # a GPU takes a chunk at once
        self.block_rows = max(1, min(chunk_rows, block_rows)) if on_cpu else chunk_rows
        count = 0 if self.is_compiled else self.scratch_blocks + self.copies_teacher
        self.memory = [self._memory(min(rows, self.block_rows)) for _ in range(count)]

    def score(self, logits: Tensor, targets: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """Leaves the gradient in the logits' place, but for a factor of each row.

        Args:
            logits: [rows, V], of a chunk.
            targets: int64 [rows, 1]; -1: none.
            place: int64 [rows], each row's among the teachers.

        Returns:
            row_stats: [rows, 3].
            factors: [rows, 1].
        """
        results = []
        for start in range(0, len(logits), self.block_rows):
            rows = slice(start, start + self.block_rows)
            results.append(self._score_block(logits[rows], targets[rows], None if place is None else place[rows]))
        row_stats, factors = (torch.cat(parts) for parts in zip(*results))
        return row_stats, factors

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """`score` of a block."""
        raise NotImplementedError

    def _memory(self, rows: int) -> Tensor:
        return self.head.new_empty(rows, len(self.head), dtype=self.dtype)

    def _run(self, operations: Callable, logits: Tensor, *inputs):
        """operations(scratch, logits, *inputs), compiled if this pass is: then there is no scratch."""
        scratch = [memory[: len(logits)] for memory in self.memory]
        return compiled.call(operations, scratch, logits, *inputs, rows=0)


class CePass(BlockPass):
    def _score_block(self, logits: Tensor, targets: Tensor, place: None) -> tuple[Tensor, Tensor]:
        return self._run(_ce, logits, targets)


class _TeacherPass(BlockPass):
    """Of losses against a teacher. Subclasses say what it is asked once, as `ask_teacher`, with `_run`'s arguments."""

    scratch_blocks = 2

    def __init__(self, rows: int, chunk_rows: int, head: Tensor):
        super().__init__(rows, chunk_rows, head)
        self.copy = kept_memory("teacher", min(rows, chunk_rows), head, self.dtype) if self.copies_teacher else None

    def read_teacher(self, logits: Tensor) -> None:
        """Takes in a chunk's teachers: logits [U, V], which it overwrites."""
        answers = []
        for start in range(0, len(logits), self.block_rows):
            rows = slice(start, min(start + self.block_rows, len(logits)))
            answers.append(self._run(self.ask_teacher, logits[rows], None if self.copy is None else self.copy[rows]))
        kept = logits if self.copy is None else self.copy[: len(logits)]
        self.teacher = kept, *(torch.cat(column) for column in zip(*answers))


class KlDivPass(_TeacherPass):
    @staticmethod
    def ask_teacher(scratch: list[Tensor], logits: Tensor, copy: Tensor | None) -> tuple[Tensor, ...]:
        """Columns of Distributions, whose `unnormalised` takes the place of the copy, or else of the logits."""
        wide = _widen(logits, scratch)
        found = row_passes.distributions(wide, _take(scratch))
        if copy is not None:
            copy.copy_(wide)
        return found[1:]

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(_kl_div, logits, place, *self.teacher)


class MixturePass(_TeacherPass):
    def __init__(self, rows: int, chunk_rows: int, head: Tensor, weights: Mapping[str, float]):
        super().__init__(rows, chunk_rows, head)
        self.weights = dict(weights)

    @staticmethod
    def ask_teacher(scratch: list[Tensor], logits: Tensor, copy: Tensor | None) -> tuple[Tensor, ...]:
        """The largest of the logits."""
        return (row_passes.argmax(logits if copy is None else copy.copy_(logits)),)

    def _score_block(self, logits: Tensor, targets: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        return self._run(_mixture, logits, targets, place, *self.teacher, self.weights)


class RehearsedPass:
    """Takes the memory that TritonPass takes, and does nothing."""

    copies_teacher = False

    def __init__(self, weights: Mapping[str, float], rows: int, chunk_rows: int, head: Tensor):
        pass

    def read_teacher(self, logits: Tensor) -> None:
        pass

    def score(self, logits: Tensor, targets: Tensor, place: Tensor | None) -> tuple[Tensor, Tensor]:
        row_stats = logits.new_empty(len(logits), 3, dtype=torch.float32)
        return row_stats, row_stats.new_ones(len(logits), 1)


# ---- what is done to a block: a pass in the dtype of statistics, with its result back in the logits' place ----


def _ce(scratch: list[Tensor], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = _widen(logits, scratch)
    results = row_passes.ce(wide, targets)
    logits.copy_(wide)
    return results


def _kl_div(scratch: list[Tensor], logits: Tensor, place: Tensor, *teacher: Tensor) -> tuple[Tensor, Tensor]:
    wide, of_rows = _widen(logits, scratch), Distributions(*teacher).select(place, _take(scratch))
    results = row_passes.kl_div(wide, of_rows, _take(scratch))
    logits.copy_(wide)
    return results


def _mixture(
    scratch: list[Tensor], logits: Tensor, targets: Tensor, place: Tensor, teacher_logits: Tensor, best: Tensor, weights: dict[str, float]
) -> tuple[Tensor, Tensor]:
    wide, of_rows = _widen(logits, scratch), torch.index_select(teacher_logits, 0, place, out=_take(scratch))
    row_stats = mixture_pass.mixture(wide, targets, of_rows, best[place], weights)
    logits.copy_(wide)
    return row_stats, torch.ones_like(row_stats[:, :1])


def _widen(logits: Tensor, scratch: list[Tensor]) -> Tensor:
    """In the dtype of statistics: the logits themselves, where they are."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.dtype == dtype:
        return logits
    return scratch.pop().copy_(logits) if scratch else logits.to(dtype)


def _take(scratch: list[Tensor]) -> Tensor | None:
    return scratch.pop() if scratch else None
