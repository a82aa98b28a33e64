"""What goes wrong with a run's own files, disk and numbers: one line, exit status 2, and what was saved stays."""

import errno
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from spectitan import train
from spectitan.config.manager import load
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer
from spectitan.speculators.base import align_targets
from spectitan.speculators.registry import SPECULATOR_CONFIGS
from spectitan.training import checkpoint, checkpoint_writing
from spectitan.training.checkpoint import Checkpointer
from spectitan.training.checkpoint_reading import read_tensors
from tests.integration import tiny
from tests.integration.tiny import SHORT

# ---- checkpoints ----


def test_a_checkpoint_of_another_model(world, run, refused, tmp_path):
    other = tiny.make(tmp_path / "other")
    assert train.main(other.flags(tmp_path / "run", **SHORT, speculator__n_speculator_heads=2)) == 0
    line = refused(world.flags(run, **SHORT, checkpoint__resume="never", checkpoint__load_path=tmp_path / "run"))
    assert "was " in line and "in the checkpoint and is" in line and "data.path" in line
    changes = SHORT | {"checkpoint__resume": "never", "checkpoint__load_path": tmp_path / "run"}
    line = refused(world.flags(run, **changes, data__path=tmp_path / "other" / "data"))
    assert "speculator.n_speculator_heads was 2 in the checkpoint and is 3 now" in line


class Malice:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("program", ["train", "evaluate", "export", "generate"])
def test_metadata_that_would_run_code(world, run, refused, tmp_path, program):
    shutil.copytree(run, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        tiny.put_into(folder, ".metadata", pickle.dumps(Malice(tmp_path / "victim")))
    changes = SHORT if program == "train" else {"speculator__path": tmp_path / "run", "generate__prompt": "def"}
    line = refused(world.flags(tmp_path / "run", **changes), program)
    assert ".metadata" in line and "mkdir" in line and not (tmp_path / "victim").exists()


# ---- the disk ----


@pytest.mark.parametrize("module, function", [(checkpoint, "write_json"), (checkpoint_writing, "describe")])
def test_a_full_disk_at_a_checkpoint(world, tmp_path, monkeypatch, capsys, module, function):
    run, original, calls = tmp_path / "run", getattr(module, function), []

    def full_from_step_4(path, *rest):
        calls.append(path)
        if any("step-00000004" in part for part in Path(path).parts):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *rest)

    monkeypatch.setattr(module, function, full_from_step_4)
    assert train.main(world.flags(run, **SHORT)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert calls and "No space left on device" in line and "step-00000004" in line and "earlier ones are unchanged" in line
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert train.main(world.flags(run, **SHORT)) == 0
    assert [report["step"] for report in tiny.reports(run)] == [2, 4]


def test_no_room_for_a_checkpoint(world, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5000))
    assert train.main(world.flags(tmp_path / "run", **SHORT)) == 2
    assert "no space left on device" in capsys.readouterr().err


def test_a_dump_folder_that_is_a_file(world, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        line = refused(world.flags(folder, **SHORT))
        assert "job.dump_folder" in line and f"{tmp_path / 'file'}: it is no folder" in line
    assert (tmp_path / "file").read_text() == "mine"


# ---- numbers ----


def first_bad(flags: list[str], token: int) -> tuple[int, int]:
    """Step and head of the first loss with a state that has seen the token, by walking the batches."""
    config = load(flags, "train", SPECULATOR_CONFIGS)
    loader = build_loader(config.data, load_tokenizer(config.base.path), seed=config.job.seed, global_batch_size=4, micro_batch_size=4)
    for step in range(1, 100):
        batch = next(loader)
        targets = align_targets(batch, steps=3)
        documents, tokens = batch.document_ids.flatten(), batch.tokens.flatten()
        bad = [
            head
            for state, head in zip(targets.state.tolist(), targets.step.tolist())
            if (tokens[: state + 1][documents[: state + 1] == documents[state]] == token).any()
        ]
        if bad:
            return step, min(bad)


@pytest.mark.parametrize("report_interval", [1, 50])
def test_a_loss_that_is_not_finite(world, tmp_path, capsys, report_interval):
    """A base with a NaN in the embedding of one token."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rare.txt").write_text(tiny.text(50) + "\n# ж ж ж\n" + tiny.text(51), encoding="utf-8")
    token = load_tokenizer(world.root / "base").encode("ж")[0]  # its first byte, which stands nowhere else
    base = world.other_base(tmp_path / "base", "model.embed_tokens.weight", lambda weight: weight[token, 5].fill_(float("nan")))

    changes = SHORT | {"training__num_steps": 12, "checkpoint__interval": 1, "job__seed": 45, "data__path": tmp_path / "data"}
    changes |= {"data__holdout": 0, "base__path": base, "metrics__report_interval": report_interval}
    flags = world.flags(tmp_path / "run", **changes)
    step, head = first_bad(flags, token)
    assert 1 < step < 10
    assert train.main(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"loss of head {head} is not finite at step {step}" in line
    saved = Checkpointer(tmp_path / "run" / "checkpoints").newest_valid()
    assert saved.name == f"step-{step - 1:08d}"
    assert all(tensor.isfinite().all() for tensor in read_tensors(saved).values())


@pytest.mark.parametrize(
    "rates, words",
    [
        ({"optimizer__lr": 1e37}, "loss of head 0 is not finite at step"),
        ({"base__freeze": "false", "optimizer__base_lr": 1e15}, "loss of base is not finite at step"),
        # So large that norms make 0 of every hidden state: a finite loss, and a gradient of NaN.
        ({"base__freeze": "false", "optimizer__base_lr": 1e37}, "steps were skipped: losses are finite, the gradient norm is not"),
    ],
    ids=["head", "base", "skipped"],
)
def test_a_learning_rate_that_breaks_the_weights(world, tmp_path, capsys, rates, words):
    changes = SHORT | {"training__num_steps": 20, "checkpoint__interval": 100, "training__max_grad_norm": 0}
    assert train.main(world.flags(tmp_path / "run", **changes, **rates)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "optimizer.lr" in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_gradients_that_overflow_though_losses_are_finite(world, tmp_path, capsys, monkeypatch):
    clip_grad_norm, norms = train.utils.clip_grad_norm, iter([1, math.nan, 1, 1, math.inf, math.inf, *[math.inf] * 30])
    monkeypatch.setattr(train.utils, "clip_grad_norm", lambda *args: clip_grad_norm(*args) * next(norms))
    changes = SHORT | {"metrics__report_interval": 3, "checkpoint__interval": 6, "training__num_steps": 20}
    # Steps 5 to 14 make ten in a row; the report after step 15 finds eleven. Step 12 has saved how many there were.
    for _ in range(2):  # a resumed run counts on
        assert train.main(world.flags(tmp_path / "run", **changes)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "the last 11 steps were skipped: losses are finite, the gradient norm is not" in line
        assert [report["step"] for report in tiny.reports(tmp_path / "run")] == [3, 6, 9, 12]
    assert [report["skipped_steps"] for report in tiny.reports(tmp_path / "run")] == [1, 2, 3, 3]
    before, after = (read_tensors(tiny.checkpoint(tmp_path / "run", step)) for step in (6, 12))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert after["optimizer.speculator.head.0.weight.step"] == 3
