"""Checkpoints and evaluations by epochs, and the best of them, through the programs."""

import json
import math

import pytest

from spectitan import evaluate, train
from tests.integration import processes, tiny

LOSS = {"checkpoint__save_best": "loss", "optimizer__lr": 30.0, "lr_scheduler__type": "constant", "lr_scheduler__warmup_steps": 19}


def evaluations(run) -> list[dict]:
    path = run / "evaluations.jsonl"
    return [] if not path.exists() else [json.loads(line) for line in path.read_text().splitlines()]


def steps_there(run) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def test_the_best_is_kept_by_epochs_and_can_be_used(world, tmp_path):
    """The learning rate grows until the loss does: an earlier checkpoint is the best."""
    run = tmp_path / "run"
    changes = LOSS | {
        "training__num_steps": -1,
        "training__epochs": 1,
        "eval__interval_epochs": 0.2,
        "checkpoint__interval_epochs": 0.1,
        "checkpoint__interval": 1000,
    }
    changes |= {"checkpoint__keep_latest_k": 1, "eval__at_end": "false", "export__format": "none", "eval__prompts": "none"}
    assert train.main(world.flags(run, **changes)) == 0
    records = evaluations(run)
    total = tiny.reports(run)[-1]["step"]
    samples = total * 4  # the last batch may go into the next epoch
    possible = [[math.ceil(k * 0.2 * epoch / 4 - 1e-9) for k in range(1, 6)] for epoch in range(samples - 3, samples + 1)]
    assert [record["step"] for record in records] in possible
    best = min(records, key=lambda record: record["heldout_loss"])["step"]
    assert best < total and steps_there(run) == [best, total]
    assert json.loads((run / "checkpoints" / "best" / "state.json").read_text())["step"] == best
    for record in records:
        heads = [record[f"heldout_loss/head_{head}"] for head in range(3)]
        assert record["heldout_loss"] == pytest.approx(sum(heads))
        full, conditional = ([record[f"heldout_{name}_accuracy/head_{head}"] for head in range(3)] for name in ("full", "cond"))
        assert all(0 <= right <= given <= 1 for right, given in zip(full, conditional)) and full[0] == conditional[0]
    assert evaluate.main(world.flags(tmp_path / "report", speculator__path=run / "checkpoints" / "best", eval__prompts="none")) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    measured = next(record for record in records if record["step"] == best)
    assert report["step"] == best and report["heldout_full_accuracy"][1] == pytest.approx(measured["heldout_full_accuracy/head_1"])
    assert report["heldout_loss"] == pytest.approx([measured[f"heldout_loss/head_{head}"] for head in range(3)], rel=1e-5)


def test_an_evaluation_that_was_cut_short_is_made_up_for(world, tmp_path):
    changes = {"training__num_steps": 4, "eval__interval": 2, "checkpoint__save_best": "acceptance", "checkpoint__keep_latest_k": 1}
    changes |= {"eval__at_end": "false", "export__format": "none"}
    assert train.main(world.flags(tmp_path / "whole", **changes)) == 0
    run = tmp_path / "run"
    for evaluation in (1, 2):  # of the first start; of the second, which first makes up for that one, the last step's
        accident = "spectitan.run.evaluating", "checkpoint_acceptance", evaluation
        processes.run_killed("train", world.flags(run, **changes), tmp_path / "output", *accident)
        assert len(evaluations(run)) == evaluation - 1
    assert train.main(world.flags(run, **changes)) == 0
    assert evaluations(run) == evaluations(tmp_path / "whole") and [record["step"] for record in evaluations(run)] == [2, 4]
    assert steps_there(run) == steps_there(tmp_path / "whole")
    assert (run / "checkpoints" / "best").readlink() == (tmp_path / "whole" / "checkpoints" / "best").readlink()
