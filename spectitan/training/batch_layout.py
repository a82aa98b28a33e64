"""How the samples of an optimizer step are divided among ranks and micro-batches."""

import os

from spectitan.config.sections import Training
from spectitan.errors import UserError

# On the host: token id, mask and document of a token; teacher, state and step of a target.
_TOKEN_BYTES, _TARGET_BYTES = 17, 24


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


def check_batch_fits(global_batch_size: int, ranks: int, sample_tokens: int, steps: int) -> None:
    """Refuses samples that a machine cannot hold: those of an optimizer step are all there before it begins, since their targets' count
    normalises every loss.

    Args:
        ranks: of the run, equally many on each machine.
        sample_tokens: tokens that are made of a sample.
        steps: tokens that the speculator looks ahead.

    Raises:
        UserError: with the memory that they take, and that there is.
    """
    samples = global_batch_size // ranks * int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    needed = samples * sample_tokens * (_TOKEN_BYTES + steps * _TARGET_BYTES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"training.global_batch_size = {global_batch_size}: a step begins when all its samples and targets are in memory, "
            f"{needed / 1e9:.3g} GB on this machine, which has {memory / 1e9:.3g} GB; allowed: fewer samples"
        )
