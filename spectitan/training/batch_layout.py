"""How the samples of an optimizer step are divided among ranks and micro-batches."""

from spectitan.config.sections import Training
from spectitan.errors import UserError


def batch_layout(config: Training, ranks: int) -> tuple[int, int]:
    """Samples in an optimizer step over all ranks, and micro-batches of a rank in it.

    Raises:
        UserError: they do not divide.
    """
    micro_batch_size = config.micro_batch_size
    global_batch_size = config.global_batch_size if config.global_batch_size > 0 else ranks * micro_batch_size
    accumulation, rest = divmod(global_batch_size, ranks * micro_batch_size)
    if rest:
        raise UserError(
            f"training.global_batch_size = {global_batch_size}: allowed are multiples of "
            f"training.micro_batch_size x processes = {micro_batch_size} x {ranks}"
        )
    return global_batch_size, accumulation
