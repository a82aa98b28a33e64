"""Learning rate over time, as one pure function of the step."""

import math

from spectitan.config.sections import LRScheduler


def learning_rate_multiplier(step: int, total_steps: int, config: LRScheduler, stage2_start_step: int = -1) -> float:
    """Learning rate of an optimizer step over the peak rate.

    `linear`, `cosine`, `constant`: w warm-up steps rise as (step + 1) / (w + 1), so that no step is wasted at rate 0; the
    rate then holds at the peak until the last `decay_ratio` of the run, in which it falls from 1 towards `min_lr_ratio`,
    reached at `total_steps` (one after the last step). A cosine makes `num_cosine_cycles` waves on the way. If
    `config.total_steps` is set, all this takes so many steps; the rate then stays where it is.
    `two_stage` is fms-fsdp's schedule for speculators.

    Args:
        step: optimizer steps done before this one, from 0.
        total_steps: steps of the whole run.
        stage2_start_step: `stage2.start_step`, for two_stage; -1: no second stage.
    """
    if config.type == "two_stage":
        return _two_stage(step, total_steps, stage2_start_step)
    total_steps = config.total_steps if config.total_steps > 0 else total_steps
    warmup = config.warmup_steps if config.warmup_steps >= 0 else min(2000, total_steps // 20)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    decay_start = max(warmup, total_steps - round(config.decay_ratio * total_steps))
    if config.type == "constant" or step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1, total_steps - decay_start))
    shape = 1 - progress if config.type == "linear" else 0.5 * (1 + math.cos(2 * math.pi * config.num_cosine_cycles * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def _two_stage(step: int, total_steps: int, stage2_start_step: int) -> float:
    """fms-fsdp's rate: a stage from 0 by a parabola to 1 and by a cosine to 0.1, then another a tenth as high.

    The rate of step `stage2_start_step`, which is the first on the base's own text, is still that of the first stage, as
    there; a run whose second stage begins at step 0 has no first. Warm-up is at least 1 step, where fms-fsdp divides by zero in stages shorter than 20.
    """
    if stage2_start_step < 0:
        return _stage(step, total_steps)
    if stage2_start_step > 0 and step <= stage2_start_step:
        return _stage(step, stage2_start_step)
    return 0.1 * _stage(step - stage2_start_step, total_steps - stage2_start_step)


def _stage(step: int, length: int) -> float:
    warmup = max(1, min(2000, length // 20))
    rise = 1 - (1 - min(step, warmup) / warmup) ** 2
    return min(rise, 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / max(1, length), 1))))
