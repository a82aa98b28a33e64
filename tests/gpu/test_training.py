"""Runs of the trainer on one GPU: precisions, FSDP2 on one rank, compiled code, and the memory that the plan says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from spectitan import train
from spectitan.config.manager import load
from spectitan.models.registry import choose_config
from spectitan.planning.rehearsal import plan_run
from spectitan.speculators.registry import SPECULATOR_CONFIGS, new_speculator
from tests.integration import tiny

DEVICE = "cuda"
STEPS = 6
CONFIG = replace(tiny.CONFIG, hidden_size=64, intermediate_size=104, num_heads=4, num_kv_heads=2)  # heads of 16, as kernels want them
RUN = {"training__num_steps": STEPS, "checkpoint__interval": STEPS, "metrics__report_interval": 1, "job__deterministic": "false"}
RUN |= {"eval__at_end": "false", "export__format": "none", "objective__loss": "kl_div"}
JOINT = {"base__freeze": "false", "training__detach_states": "false"}
KINDS = {
    "mlp": {},
    "lstm": {"speculator__type": "lstm", "objective__loss": "ce"},
    "eagle3": {"speculator__type": "eagle3", "optimizer__name": "muon"},
    "joint": JOINT,
    "stage 2": {"stage2__start_step": 2, "stage2__batch_size": 8, "stage2__prompt_length": 5, "stage2__seq_length": 7},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    return tiny.make(tmp_path_factory.mktemp("tiny"), CONFIG)


def losses(world: tiny.Tiny, folder: Path, monkeypatch, device: str, **keys) -> torch.Tensor:
    """[steps, columns]: of each report the losses and the gradient norms."""
    monkeypatch.setenv("SPECTITAN_DEVICE", device)
    assert train.main(world.flags(folder, **RUN | keys)) == 0
    columns = ("loss", "grad_norm", "base_loss", "base_grad_norm")
    return torch.tensor([[*report["loss"], *(report[name] for name in columns[1:] if name in report)] for report in tiny.reports(folder)])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_trains_as_a_cpu_and_in_bfloat16_nearly_so(world, tmp_path, monkeypatch, kind):
    float32, bfloat16 = {"training__compute_dtype": "float32"}, {"training__compute_dtype": "bfloat16"}
    on_cpu = losses(world, tmp_path / "cpu", monkeypatch, "cpu", **KINDS[kind] | float32)
    on_gpu = losses(world, tmp_path / "gpu", monkeypatch, DEVICE, **KINDS[kind] | float32)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-3, atol=0)
    narrow = losses(world, tmp_path / "narrow", monkeypatch, DEVICE, **KINDS[kind] | bfloat16)
    torch.testing.assert_close(narrow, on_gpu, rtol=0.1 if kind == "stage 2" else 5e-2, atol=0)  # other text may be sampled


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["joint", "lstm", "eagle3"])
def test_compiled_runs_equal_eager_ones(world, tmp_path, monkeypatch, kind):
    """Of a trained base in bfloat16, FSDP2 on one rank makes the casts: its hooks go around compiled blocks."""
    keys, wrapped = KINDS[kind] | {"training__compute_dtype": "bfloat16"}, []
    train_step = train.Trainer._train_step

    def noting_step(trainer, *args):
        wrapped.append(isinstance(trainer.base, FSDPModule))
        train_step(trainer, *args)

    monkeypatch.setattr(train.Trainer, "_train_step", noting_step)
    torch.compiler.reset()
    eager, compiled = (losses(world, tmp_path / mode, monkeypatch, DEVICE, **keys, compile__enabled=mode) for mode in ("false", "true"))
    # Compiled code rounds to bfloat16 less often; a joint run, which learns fast, has gone apart by a tenth after six steps.
    torch.testing.assert_close(compiled[:2], eager[:2], rtol=5e-2, atol=0)
    assert wrapped == [kind == "joint"] * 2 * STEPS


LARGE = replace(
    tiny.CONFIG, vocab_size=32_003, hidden_size=1024, intermediate_size=2816, num_layers=4, num_heads=16, num_kv_heads=4,
    max_position_embeddings=512, tie_embeddings=False,
)  # fmt: skip
PLANNED = {
    "eval__prompts": "none",
    "speculator__speculator_width": 1024,
    "data__seq_length": 512,
    "training__micro_batch_size": 8,
    "training__global_batch_size": -1,
    "training__num_steps": 3,
}
PLANNED |= {"data__holdout": 0.0, "checkpoint__interval": 100, "training__compute_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tiny.Tiny:
    """Large enough that a step's tensors are most of what is allocated. Its text is of few words."""
    return tiny.make(tmp_path_factory.mktemp("large"), LARGE)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mlp", "lstm", "joint"])
def test_a_step_takes_the_memory_that_was_planned(large, tmp_path, monkeypatch, kind):
    flags = large.flags(tmp_path / "run", **RUN | KINDS[kind] | PLANNED)
    config = load([*flags, "--plan.world_size=1"], "train", SPECULATOR_CONFIGS)
    base_config = choose_config("auto", "auto", config.base.path)
    with torch.device("meta"):
        speculator = new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
    plan = plan_run(config, base_config, speculator)
    monkeypatch.setenv("SPECTITAN_DEVICE", DEVICE)
    before, peaks, train_step = torch.cuda.memory_allocated(), [], train.Trainer._train_step

    def measured(trainer, *args):
        torch.cuda.reset_peak_memory_stats()
        train_step(trainer, *args)
        peaks.append(torch.cuda.max_memory_allocated() - before)

    monkeypatch.setattr(train.Trainer, "_train_step", measured)
    assert train.main(flags) == 0
    (stage,) = plan.stages
    assert peaks[-1] == pytest.approx(plan.peak(stage), rel=0.1)
