"""A run that goes on in another layout, four times: each loads what the one before had, and it trains as if nothing had happened."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from spectitan import train
from spectitan.training.checkpoint import Checkpointer
from tests.integration import processes, tiny

BATCH = 12  # divides by every number of ranks
# Number of processes, [parallelism], and the step at which it ends.
LAYOUTS = [
    (4, {"sharding_strategy": "fsdp"}, 1),
    (4, {"sharding_strategy": "hsdp", "dp_replicate": 2}, 2),
    (1, {"sharding_strategy": "none"}, 3),
    (2, {"sharding_strategy": "tp", "tp_size": 2}, 4),
    (3, {"sharding_strategy": "fsdp"}, 5),
]
STEPS = LAYOUTS[-1][2]
RUN = {"training__global_batch_size": BATCH, "training__micro_batch_size": 1, "metrics__report_interval": 1, "data__seq_length": 61}
RUN |= {"base__freeze": "false", "training__detach_states": "false", "objective__loss": "kl_div"}
RUN |= {"lr_scheduler__type": "constant", "eval__at_end": "false", "export__format": "none"}
OWN_ENDS = {"speculator__train_head": "true", "speculator__embed_requires_grad": "true"}
FAMILIES = {
    "mlp": {},
    # In float64: Muon iterates in bfloat16, whose rounding makes much of the last digits of float32.
    "eagle3": {"speculator__type": "eagle3", "optimizer__name": "muon", "training__compute_dtype": "float64"} | OWN_ENDS,
}
# Heads divide by two, and nothing by three or four.
CONFIG = replace(tiny.CONFIG, num_heads=4, num_kv_heads=2)


def worker(rank: int, folder: str, ports: list[int], runs: list[list[str]]) -> None:
    """Takes part in the layouts that have so many ranks."""
    processes.redirect(f"{folder}/output.{rank}")
    watch(folder, rank)
    for (world_size, _, _), port, flags in zip(LAYOUTS, ports, runs):
        if rank < world_size:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            dist.init_process_group("gloo")
            assert train.main(flags) == 0
            dist.barrier()
            dist.destroy_process_group()


def watch(folder: str, rank: int) -> None:
    """Notes the samples that are trained on; compares all that is loaded with what there was when it was saved."""
    save, load, train_step = Checkpointer._begin, Checkpointer.load, train.Trainer._train_step

    def noting_save(self, step, tensors, *args, **kwargs):
        whole = gathered(tensors)
        if dist.get_rank() == 0:
            torch.save(whole, f"{folder}/whole-{step}.pt")
        return save(self, step, tensors, *args, **kwargs)

    def comparing_load(self, path, tensors):
        state = load(self, path, tensors)
        expected, found = torch.load(f"{folder}/whole-{state['step']}.pt"), gathered(tensors)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
        Path(f"{folder}/compared-{state['step']}.{rank}").write_text(str(len(found)))
        return state

    def noting_step(self, batches, *args):
        train_step(self, batches, *args)
        with open(f"{folder}/samples.{rank}", "a") as file:
            for batch in batches:
                print(json.dumps([self.step, batch.index.tolist(), batch.sample_ids.tolist()]), file=file)

    Checkpointer._begin, Checkpointer.load, train.Trainer._train_step = noting_save, comparing_load, noting_step


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone() for name, tensor in tensors.items()}


@pytest.fixture
def world(tmp_path) -> tiny.Tiny:
    return tiny.make(tmp_path / "elasticity", CONFIG)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_moves_through_five_layouts(world, family):
    undisturbed, moved, run = world.root / "undisturbed", world.root / "moved", RUN | FAMILIES[family]
    assert train.main(world.flags(undisturbed, **run, training__num_steps=STEPS)) == 0
    runs = [
        world.flags(moved, **run, training__num_steps=last, **{f"parallelism__{name}": value for name, value in keys.items()})
        for _, keys, last in LAYOUTS
    ]
    codes = processes.join(processes.call_in_each(4, worker, str(world.root), [processes.free_port() for _ in LAYOUTS], runs))
    assert codes == [0] * 4, "".join((world.root / f"output.{rank}").read_text() for rank in range(4))

    for (_, _, step), (world_size, _, _) in zip(LAYOUTS, LAYOUTS[1:]):
        compared = [int((world.root / f"compared-{step}.{rank}").read_text()) for rank in range(world_size)]
        assert len(set(compared)) == 1 and compared[0] > 50  # parameters, two moments and a count of steps each

    ours, theirs = tiny.reports(moved), tiny.reports(undisturbed)
    assert [report["step"] for report in ours] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert our["sample_hash"] == their["sample_hash"] and our["supervised_tokens"] == their["supervised_tokens"]
        for key in ("loss", "grad_norm", "base_loss", "base_grad_norm"):
            torch.testing.assert_close(torch.tensor(our[key]), torch.tensor(their[key]), rtol=1e-5, atol=0)

    audit([json.loads(line) for rank in range(4) for line in (world.root / f"samples.{rank}").read_text().splitlines()])


def audit(trained: list[tuple[int, list[int], list[int]]]) -> None:
    """Every place of the global order once, in its own step; every sample of the data once before any comes again."""
    places = sorted((place, step, sample) for step, indices, samples in trained for place, sample in zip(indices, samples, strict=True))
    assert [(place, step) for place, step, _ in places] == [(place, place // BATCH) for place in range(STEPS * BATCH)]
    ids = [sample for _, _, sample in places]
    epoch = len(set(ids))
    assert BATCH < epoch < len(ids), "the test wants more than one pass over the data"
    assert set(Counter(ids[:epoch]).values()) == {1} and set(ids[:epoch]) == set(ids)
