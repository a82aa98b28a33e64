import math

import pytest

from spectitan.config.sections import LRScheduler
from spectitan.training.schedule import learning_rate_multiplier


def reference_two_stage(num_steps: int, start: int):
    """fms-fsdp's schedule, transcribed: `start` is stage2.start_step."""
    warmup1 = min(2000, start // 20)
    length = num_steps - start
    warmup2 = min(2000, length // 20)

    def stage1(x: int) -> float:
        return min(1 - (1 - min(x, warmup1) / warmup1) ** 2, 0.1 + 0.5 * (1 - 0.1) * (1 + math.cos(x / start * math.pi)))

    def stage2(x: int) -> float:
        cosine = 0.01 + 0.05 * (1 - 0.1) * (1 + math.cos(min(x, length) / length * math.pi))
        return min(0.1 * (1 - (1 - min(x, warmup2) / warmup2) ** 2), cosine)

    return lambda x: stage1(x) if x <= start else stage2(x - start)


@pytest.mark.parametrize("num_steps, start", [(21000, 15000), (1000, 200), (60, 37), (100_000, 60_000)])
def test_two_stage_is_the_reference(num_steps, start):
    config = LRScheduler(type="two_stage")
    expected = reference_two_stage(num_steps, start)
    for step in {*range(0, num_steps, max(1, num_steps // 997)), start - 1, start, start + 1, num_steps - 1, num_steps}:
        assert learning_rate_multiplier(step, num_steps, config, start) == pytest.approx(expected(step), rel=1e-12, abs=1e-15)


def test_two_stage_at_points_computed_by_hand():
    config = LRScheduler(type="two_stage")

    def rate(step: int) -> float:
        return learning_rate_multiplier(step, 21000, config, 15000)

    assert rate(0) == 0
    assert rate(375) == pytest.approx(0.75)  # warm-up is 750 steps: 1 - (1/2)^2
    assert rate(7500) == pytest.approx(0.55)  # half of the cosine from 1 to 0.1
    assert rate(15000) == pytest.approx(0.1)  # still stage 1
    assert rate(15001) == pytest.approx(0.1 * (1 - (299 / 300) ** 2))  # stage 2 warms up for 300 steps
    assert rate(18000) == pytest.approx(0.055)
    assert rate(21000) == pytest.approx(0.01)


@pytest.mark.parametrize("start", [-1, 0, 1, 2, 19, 20, 29, 30, 31])
def test_two_stage_of_short_stages_is_finite_and_positive_after_the_first_step(start):
    config = LRScheduler(type="two_stage")
    rates = [learning_rate_multiplier(step, 30, config, start) for step in range(30)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert sum(rate == 0 for rate in rates) <= 2  # the first step of each stage


def test_two_stage_without_a_first_or_a_second_stage():
    config = LRScheduler(type="two_stage")
    for step in range(100):
        first = learning_rate_multiplier(step, 100, config, -1)
        expected = min(1 - (1 - min(step, 5) / 5) ** 2, 0.1 + 0.45 * (1 + math.cos(math.pi * step / 100)))
        assert first == pytest.approx(expected)
        assert learning_rate_multiplier(step, 100, config, 0) == pytest.approx(0.1 * first)


def test_linear_by_hand():
    config = LRScheduler(type="linear", warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate_multiplier(step, 14, config) for step in range(15)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # no step is wasted at rate 0
    assert rates[4:] == pytest.approx([1 - 0.9 * k / 10 for k in range(11)])
    assert rates[14] == pytest.approx(0.1)


def test_cosine_by_hand():
    config = LRScheduler(type="cosine", warmup_steps=0, min_lr_ratio=0.2)
    assert [learning_rate_multiplier(step, 8, config) for step in (0, 2, 4, 6, 8)] == pytest.approx(
        [1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]
    )
    two_waves = LRScheduler(type="cosine", warmup_steps=0, num_cosine_cycles=2)
    assert [learning_rate_multiplier(step, 8, two_waves) for step in (0, 2, 4, 6, 8)] == pytest.approx([1, 0, 1, 0, 1])


@pytest.mark.parametrize("type", ["linear", "cosine"])
def test_total_steps_of_its_own(type):
    """Shorter than the run: as a run of that length, then the last rate stays. Longer: as the beginning of such a run."""
    keys = {"type": type, "min_lr_ratio": 0.3, "decay_ratio": 0.7}
    alone = [learning_rate_multiplier(step, 40, LRScheduler(**keys)) for step in range(41)]
    assert alone[40] == pytest.approx(0.3) and len(set(alone)) > 25
    for run in (17, 40, 90):
        rates = [learning_rate_multiplier(step, run, LRScheduler(**keys, total_steps=40)) for step in range(run)]
        assert rates == [*alone[:run], *[alone[40]] * (run - 41)][:run]


def test_rate_holds_before_the_decay():
    config = LRScheduler(type="linear", warmup_steps=10, decay_ratio=0.2)
    rates = [learning_rate_multiplier(step, 100, config) for step in range(100)]
    assert rates[10:81] == [1.0] * 71 and rates[90] == pytest.approx(0.5) and rates[99] == pytest.approx(0.05)
    late = LRScheduler(type="linear", warmup_steps=90, decay_ratio=0.2)  # the warm-up reaches into the decay: it goes first
    assert [learning_rate_multiplier(step, 100, late) for step in (89, 90, 95)] == pytest.approx([90 / 91, 1.0, 0.5])


def test_default_warmup_is_a_twentieth_of_the_run_and_at_most_2000_steps():
    constant = LRScheduler(type="constant")
    assert [learning_rate_multiplier(step, 100, constant) for step in (0, 4, 5, 99)] == pytest.approx([1 / 6, 5 / 6, 1, 1])
    assert learning_rate_multiplier(1999, 10**6, constant) < 1 == learning_rate_multiplier(2000, 10**6, constant)


@pytest.mark.parametrize("type", ["linear", "cosine", "constant", "two_stage"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_tiny_runs(type, total):
    for step in range(total + 2):
        assert 0 <= learning_rate_multiplier(step, total, LRScheduler(type=type)) <= 1
