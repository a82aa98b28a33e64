"""Which checkpoint is kept as the best, and for how long."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

from spectitan.training.best import Best
from spectitan.training.checkpoint import Checkpointer
from spectitan.training.checkpoint_reading import find_checkpoint

RECORDS = [1.5, 2.25, math.nan, 2.25, 1.0, 3.5, None, 3.25]


def saved(folder: Path, step: int) -> Path:
    return Checkpointer(folder).save(step, {"a": torch.full((3,), float(step))}, {})


def leads_to(folder: Path) -> str:
    return json.loads((folder / "best" / "state.json").read_text())["step"]


@pytest.mark.parametrize(("save_best", "name", "expected"), [("acceptance", "acceptance_length", 6), ("loss", "heldout_loss", 5)])
def test_the_best_so_far_survives_pruning(tmp_path, save_best, name, expected):
    best, checkpointer = Best(save_best, tmp_path), Checkpointer(tmp_path, keep_latest_k=2)
    sign, records = (1 if save_best == "acceptance" else -1), []
    for step, value in enumerate(RECORDS, 1):
        checkpoint = checkpointer.save(step, {"a": torch.zeros(3)}, {})
        records.append({"step": step, name: value, "other": 9.0})
        best.offer(checkpoint, records[-1], writes=True)
        checkpointer.protected = best.checkpoint
        measured = {step: sign * value for step, value in enumerate(RECORDS[:step], 1) if value is not None and not math.isnan(value)}
        winner = max(sorted(measured), key=measured.get)  # of equals, the earliest
        assert best.checkpoint.name == f"step-{winner:08d}" and leads_to(tmp_path) == winner
        there = {int(path.name[5:]) for path in tmp_path.glob("step-*")}
        assert {winner, *range(max(1, step - 1), step + 1)} <= there and len(there) <= 4  # the one before is pruned by the next save
    assert winner == expected and find_checkpoint(tmp_path / "best") == tmp_path / "best"
    checkpointer.save(9, {"a": torch.zeros(3)}, {})
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == sorted({expected, 8, 9})
    again = Best(save_best, tmp_path, records)
    assert again.checkpoint == best.checkpoint


def test_a_run_that_goes_on_knows_its_best_of_those_that_are_there(tmp_path):
    values = {step: random.Random(step).uniform(1, 4) for step in (2, 4, 6, 8)}
    for step in (2, 6, 8):
        saved(tmp_path, step)
    best = Best("acceptance", tmp_path, [{"step": step, "acceptance_length": value} for step, value in values.items()])
    assert int(best.checkpoint.name[5:]) == max((2, 6, 8), key=values.get)
    best.offer(saved(tmp_path, 10), {"acceptance_length": 4.5}, writes=False)
    assert best.checkpoint.name == "step-00000010" and not (tmp_path / "best").exists()
    assert Best("loss", tmp_path, [{"step": 2, "acceptance_length": 2.0}]).checkpoint is None


def test_where_no_link_can_be_made_training_goes_on(tmp_path, caplog, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    best = Best("loss", tmp_path)
    best.offer(saved(tmp_path, 3), {"heldout_loss": 2.0}, writes=True)
    assert best.checkpoint.name == "step-00000003" and "no links here" in caplog.text
