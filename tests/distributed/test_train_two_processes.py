"""Two gloo processes against one, through the trainer: the same losses and weights, and one's checkpoints for the other."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from spectitan import train
from spectitan.training.checkpoint_reading import read_tensors
from tests.integration import processes, tiny

STEPS = 5
RUN = {"training__num_steps": STEPS, "checkpoint__interval": 3, "checkpoint__keep_latest_k": 0, "metrics__report_interval": 1}
RUN |= {"training__compute_dtype": "float64", "training__micro_batch_size": 1, "eval__at_end": "false", "export__format": "none"}
SHARDED = RUN | {"parallelism__sharding_strategy": "fsdp"}
STAGE2 = {"stage2__start_step": 2, "stage2__batch_size": 8, "stage2__prompt_length": 5, "stage2__seq_length": 11}
KINDS = {
    "mlp": {},
    "kl_div": {"objective__loss": "kl_div"},
    "stage2": STAGE2 | {"objective__loss": "kl_div"},
    "eagle3": {"speculator__type": "eagle3", "speculator__ttt_steps": "2", "speculator__train_head": "true"}
    | {"speculator__embed_requires_grad": "true", "objective__loss": "kl_div"},
    "base": tiny.BASE_ALONE | {"export__format": "none"},
    "muon": {"optimizer__name": "muon", "speculator__type": "lstm"},
}
KINDS["joint"] = KINDS["kl_div"] | {"base__freeze": "false", "training__detach_states": "false", "base__activation_checkpointing": "true"}
KINDS["joint"] |= {"training__speculator_loss_coeff": 0.7, "optimizer__base_lr": 0.004}


@pytest.fixture(scope="module")
def whole(world) -> dict[str, Path]:
    """The folder of an uninterrupted run of one process, by kind."""
    for kind, changes in KINDS.items():
        assert train.main(world.flags(world.root / kind, **RUN | changes)) == 0
    return {kind: world.root / kind for kind in KINDS}


def assert_close(run: Path, whole: Path, steps=range(1, STEPS + 1)) -> None:
    """Every loss of every head, gradient norms, and at the end weights and optimizer state, to 1e-9; the samples exactly."""
    expected = tiny.reports(whole)[steps[0] - 1 :]
    assert [report["step"] for report in tiny.reports(run)] == list(steps)
    for ours, theirs in zip(tiny.reports(run), expected):
        for key in ("sample_hash", "supervised_tokens", "tokens_by_dataset", "accuracy", "lr", "muon_lr"):
            assert ours.get(key) == theirs.get(key), (ours["step"], key)
        for key in ("loss", "alpha", "grad_norm", *(key for key in theirs if key.startswith("base_"))):
            torch.testing.assert_close(torch.tensor(ours[key]), torch.tensor(theirs[key]), rtol=1e-9, atol=0)
    ours, theirs = (read_tensors(tiny.checkpoint(folder, STEPS)) for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", ["kl_div", "stage2", "eagle3", "base", "joint", "muon"])
def test_two_processes_train_as_one(world, whole, tmp_path, kind):
    processes.train_in_ranks(2, world.flags(tmp_path / "run", **SHARDED | KINDS[kind]), tmp_path / "output")
    assert_close(tmp_path / "run", whole[kind])
    assert sorted(path.name for path in tiny.checkpoint(tmp_path / "run", STEPS).glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


@pytest.mark.parametrize("kind", ["untied", "joint"])
def test_where_one_rank_or_both_have_nothing_supervised(world, tmp_path, kind):
    """Documents of two samples: of most, one token is supervised, the second's second one, which a base predicts and no drafter."""
    masks = [[1] * 62 if row % 5 == 0 else [0] * 32 + [1] + [0] * 29 for row in range(20)]
    rows = [{"input_ids": [2 + (7 * row + i) % 250 for i in range(62)], "loss_mask": mask} for row, mask in enumerate(masks)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"untied": {"speculator__tie_weights": "false"}, "joint": KINDS["joint"]}[kind]
    run = RUN | changes | {"data__path": tmp_path / "ids.jsonl", "data__holdout": 0.0, "training__global_batch_size": 2}
    assert train.main(world.flags(tmp_path / "one", **run)) == 0
    processes.train_in_ranks(2, world.flags(tmp_path / "two", **run, parallelism__sharding_strategy="fsdp"), tmp_path / "output")
    assert_close(tmp_path / "two", tmp_path / "one")
    reports = tiny.reports(tmp_path / "two")
    empty = [report["loss"] == [0.0] * 3 for report in reports]
    assert 0 < sum(empty) < STEPS and [report["grad_norm"] == 0 for report in reports] == empty
    assert [report["supervised_tokens"] == 0 for report in reports] == empty
    assert [bool(report["unsupervised_steps"]) for report in reports] == [kind == "untied" and without for without in empty]


def test_under_torchrun(world, whole, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "spectitan.train"]
    done = subprocess.run([*command, *world.flags(tmp_path / "run", **SHARDED)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", whole["mlp"])
    assert done.stderr.count(f"step {STEPS}/{STEPS} | loss") == 1  # only one of them speaks


@pytest.mark.parametrize("kind", ["mlp", "base", "muon"])
def test_a_stop_of_two_and_the_rest_on_one(world, whole, tmp_path, kind):
    """Of mlp in a step after which all evaluate."""
    run, flags = tmp_path / "run", SHARDED | KINDS[kind] | {"checkpoint__interval": 100, "eval__interval": 2 if kind == "mlp" else 0}
    started = processes.start_ranks(2, world.flags(run, **flags), tmp_path / "output", partial(processes.hold_at, 2, tmp_path))
    for rank in range(2):
        processes.wait_for((tmp_path / f"held{rank}").exists, started[rank])
    os.kill(started[1].pid, signal.SIGTERM)  # one is told, both end
    (tmp_path / "go").touch()
    assert processes.join(started) == [0, 0]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert train.main(world.flags(run, **RUN | KINDS[kind] | {"training__micro_batch_size": 2})) == 0
    assert_close(run, whole[kind])


def test_one_process_to_two(world, whole, tmp_path):
    """From the folder of a run that still saves: both from what rank 0 finds there."""
    third, fifth = (tiny.checkpoint(whole["mlp"], step) for step in (3, 5))
    shutil.copytree(third, tmp_path / "other" / third.name)
    flags = world.flags(tmp_path / "run", **SHARDED, checkpoint__load_path=tmp_path / "other", job__timeout=600)
    processes.train_in_ranks(2, flags, tmp_path / "output", partial(processes.save_meanwhile, fifth, tmp_path / "other"))
    assert_close(tmp_path / "run", whole["mlp"], steps=range(4, STEPS + 1))


def test_evaluation_and_export_at_the_end_of_two_processes(world, whole, tmp_path):
    changes = {"eval__at_end": "true", "export__format": "auto", "eval__interval": 2}
    processes.train_in_ranks(2, world.flags(tmp_path / "run", **SHARDED | changes), tmp_path / "output")
    assert_close(tmp_path / "run", whole["mlp"])
    assert (tmp_path / "run" / "report.json").exists() and (tmp_path / "run" / "export" / "model.safetensors").exists()
    output = (tmp_path / "output0").read_text()
    assert output.count(" evaluation | ") == 2 and " evaluation | " not in (tmp_path / "output1").read_text()


def test_a_mistake_is_said_once(world, tmp_path):
    started = processes.start_ranks(2, world.flags(tmp_path / "run", **SHARDED, training__global_batch_size=3), tmp_path / "output")
    started[0].join()
    started[1].terminate()  # as torchrun does
    started[1].join()
    assert processes.join(started) == [2, -signal.SIGTERM]
    assert (tmp_path / "output0").read_text() == (
        "spectitan.train: training.global_batch_size = 3: allowed are multiples of training.micro_batch_size x processes = 1 x 2\n"
    )
    assert (tmp_path / "output1").read_text() == "" and not (tmp_path / "run").exists()
