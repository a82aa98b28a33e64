"""How often something is done in a run: every so many steps, or passes over the data, or parts of one."""

import math
from fractions import Fraction


def steps_of(epochs: float, samples_per_epoch: int, global_batch_size: int) -> Fraction:
    """Optimizer steps in so many passes over the data. 0.1 is a tenth, so that ten of them are one pass."""
    return Fraction(str(epochs)) * samples_per_epoch / global_batch_size


def steps_of_run(epochs: float, samples_per_epoch: int, global_batch_size: int) -> int:
    """Steps of a run over so many epochs: whole ones, at least one."""
    return max(1, math.ceil(steps_of(epochs, samples_per_epoch, global_batch_size)))


def is_due(step: int, interval: Fraction | int) -> bool:
    """Whether a multiple of `interval`, in steps, has been passed in the step that makes it `step` steps done."""
    return step // interval > (step - 1) // interval


def next_due(step: int, interval: Fraction | int) -> int:
    """The first step after `step` that is due."""
    return max(step + 1, math.ceil((step // interval + 1) * interval))
