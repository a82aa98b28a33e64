"""Stage 1, then stage 2, through the trainer: what is counted and reported, and that it continues wherever it stopped."""

import json
import math
from pathlib import Path

import pytest

from spectitan import train
from spectitan.config.sections import Objective
from spectitan.models.llama import EmbedLLaMA
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from tests.integration import processes, tiny

STEPS, START, PROMPTS, PROMPT, NEW = 9, 3, 8, 5, 11
TEXT = {"training__num_steps": STEPS, "checkpoint__interval": 2, "checkpoint__keep_latest_k": 0, "metrics__report_interval": 1}
TEXT |= {"eval__at_end": "false", "export__format": "none", "lr_scheduler__type": "constant"}
LENGTHS = {"stage2__batch_size": PROMPTS, "stage2__prompt_length": PROMPT, "stage2__seq_length": NEW, "stage2__top_k": 4}
RUN = TEXT | LENGTHS | {"stage2__start_step": START}


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The folder of a run that nothing interrupted, with evaluations on the way."""
    changes = {"eval__interval": 4, "eval__prompts": "none"}
    assert train.main(world.flags(world.root / "whole", **RUN | changes)) == 0
    return world.root / "whole"


@pytest.fixture(scope="module")
def on_text(world) -> Path:
    """The same run without a second stage."""
    assert train.main(world.flags(world.root / "on_text", **TEXT)) == 0
    return world.root / "on_text"


def test_the_first_stage_is_that_of_a_run_without_a_second(whole, on_text):
    ours, theirs = tiny.learned(whole), tiny.learned(on_text)
    assert ours[:START] == theirs[:START]
    assert [report["sample_hash"] for report in ours] == [report["sample_hash"] for report in theirs]  # the same samples are consumed
    assert all(left["loss"] != right["loss"] for left, right in zip(ours[START:], theirs[START:]))


def test_what_stage_2_trains_on_is_counted(whole):
    for report in tiny.reports(whole)[START:]:
        assert report["supervised_tokens"] == PROMPTS * (NEW - 3)
        assert sum(report["tokens_by_dataset"].values()) == PROMPTS * NEW


def test_evaluations_are_of_the_text(world, whole, tmp_path):
    """The step-4 checkpoint, which has one step of stage 2, is evaluated alike by a run that knows of no stage 2."""
    values = json.loads((whole / "evaluations.jsonl").read_text().splitlines()[0])
    assert values["step"] == 4
    # A step with next to no learning rate, then an evaluation of what was loaded.
    changes = TEXT | {"training__num_steps": 6, "eval__interval": 1, "eval__prompts": "none", "optimizer__lr": 1e-30}
    assert train.main(world.flags(tmp_path / "run", **changes, checkpoint__load_path=tiny.checkpoint(whole, 4))) == 0
    again = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[0])
    assert again["step"] == 5 and [again[f"heldout_loss/head_{i}"] for i in range(3)] == [
        values[f"heldout_loss/head_{i}"] for i in range(3)
    ]


def two_stage(x: int, start: int) -> float:
    """fms-fsdp's schedule, with warm-ups of one step in stages this short."""
    if 0 < start and x <= start:
        return min(1 - (1 - min(x, 1)) ** 2, 0.1 + 0.45 * (1 + math.cos(math.pi * x / start)))
    x, length = x - start, STEPS - start
    return min(0.1 * (1 - (1 - min(x, 1)) ** 2), 0.01 + 0.045 * (1 + math.cos(math.pi * min(x, length) / length)))


@pytest.mark.parametrize("start", [0, START])
def test_learning_rates_are_those_of_both_stages(world, tmp_path, start):
    changes = {"lr_scheduler__type": "two_stage", "stage2__start_step": start, "checkpoint__interval": 100}
    assert train.main(world.flags(tmp_path / "run", **RUN | changes)) == 0
    reports = tiny.reports(tmp_path / "run")
    assert [report["lr"] for report in reports] == pytest.approx([0.01 * two_stage(x, start) for x in range(STEPS)])
    assert [report["supervised_tokens"] == PROMPTS * (NEW - 3) for report in reports] == [x >= start for x in range(STEPS)]


@pytest.mark.parametrize("loss", ["ce", "kl_div", '{"ce": 0.1, "tv": 0.9}'])
def test_micro_batches_of_any_size_train_the_same(world, tmp_path, loss):
    changes = RUN | {"training__num_steps": 5, "training__compute_dtype": "float64", "objective__loss": loss, "checkpoint__interval": 100}
    for size in (1, 4):
        assert train.main(world.flags(tmp_path / str(size), **changes, training__micro_batch_size=size)) == 0
    ours, theirs = (tiny.learned(tmp_path / size) for size in "14")
    for left, right in zip(ours, theirs):
        for key in ("supervised_tokens", "tokens_by_dataset", "sample_hash", "accuracy"):
            assert left[key] == right[key]
        for key in ("loss", "alpha", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-9)


def test_killed_in_stage_2_it_ends_as_if_nothing_had_been(world, whole, tmp_path):
    run = tmp_path / "run"
    for call in (6, 3):  # after step 4, and again after step 6, which is saved while training goes on
        processes.run_killed("train", world.flags(run, **RUN), tmp_path / "output", "spectitan.train", "step_if_finite", call)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] in ("step-00000004", "step-00000006")
    assert train.main(world.flags(run, **RUN)) == 0
    tiny.assert_same_training(run, whole, STEPS)
    assert tiny.learned(run) == tiny.learned(whole)


def test_a_finished_run_goes_on_with_a_second_stage(world, whole, tmp_path, caplog):
    run = tmp_path / "run"
    assert train.main(world.flags(run, **TEXT | {"training__num_steps": START, "lr_scheduler__warmup_steps": 0})) == 0
    caplog.set_level("INFO", logger="spectitan")
    assert train.main(world.flags(run, **RUN | {"lr_scheduler__warmup_steps": 0})) == 0
    tiny.assert_same_training(run, whole, STEPS)  # the default warm-up of so short a run is 0 too
    assert f"stage2.start_step: -1 -> {START}" in caplog.text and "stage2.top_k" not in caplog.text


@pytest.mark.parametrize("key, value", [("batch_size", 12), ("prompt_length", 6), ("seq_length", 10), ("temperature", 0.5), ("top_k", 5)])
def test_another_stage_2_is_refused_by_key(world, whole, capsys, key, value):
    line = tiny.refusal(train, world.flags(whole, **RUN | {f"stage2__{key}": value}), capsys, whole)
    assert f"stage2.{key} was " in line and "checkpoint.resume = never" in line


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage2__batch_size": 6}, "stage2.batch_size = 6; allowed: -1, or a multiple of training.global_batch_size = 4"),
        ({"stage2__batch_size": 28}, "data.seq_length = 31"),
        ({"stage2__seq_length": 60}, "stage2.prompt_length + stage2.seq_length = 65: the base allows at most 64"),
        ({"stage2__seq_length": 3}, "stage2.seq_length = 3: the speculator looks 3 tokens ahead"),
        ({"training__num_steps": -1, "training__epochs": 0.001}, "stage2.start_step = 3; allowed: below the run's 1 steps"),
    ],
)
def test_what_does_not_fit_is_refused(world, tmp_path, capsys, changes, named):
    assert named in tiny.refusal(train, world.flags(tmp_path / "run", **RUN | changes), capsys, tmp_path)


def test_reported_work_is_that_of_both_stages(world, tmp_path):
    """One report over steps 0 .. 5, three of each stage. Operations a token, as the clock cancels out."""
    changes = {"training__num_steps": 6, "metrics__report_interval": 6, "checkpoint__interval": 100}
    assert train.main(world.flags(tmp_path / "run", **RUN | changes)) == 0
    (report,) = tiny.reports(tmp_path / "run")
    base = EmbedLLaMA(tiny.CONFIG)
    speculator = MlpSpeculator(MlpConfig(speculator_width=20), tiny.CONFIG, Objective())
    on_text, sampled, length = 3 * 4 * 31, 3 * PROMPTS, PROMPT + NEW
    tokens = on_text + sampled * length
    sampling = base.flops(sampled * (length - 1), length - 1) + 2 * sampled * NEW * 24 * tiny.VOCAB
    of_base = base.flops(on_text, 31) + sampling + base.flops(sampled * length, length)
    of_speculator = speculator.flops([report["supervised_tokens"]] * 3, tokens)  # later heads have a few targets less
    assert report["flops_per_second"] / report["tokens_per_second"] == pytest.approx((of_base + of_speculator) / tokens, rel=0.03)
