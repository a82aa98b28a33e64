"""Plans: shares against FSDP's own, sizes and links against closed forms, and what does not fit. Whole steps: tests/distributed/test_plan.py."""

import re
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from spectitan import train
from spectitan.config.manager import load
from spectitan.config.sections import Objective, Plan
from spectitan.distributed.fsdp import apply_fsdp
from spectitan.distributed.mesh import init_distributed
from spectitan.distributed.tensor_parallel import apply_tp
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.planning.plan import RunPlan
from spectitan.planning.rehearsal import plan_run
from spectitan.planning.report import Floor
from spectitan.planning.sharding import share
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.registry import SPECULATOR_CONFIGS, new_speculator

CONFIG = LlamaConfig(499, 48, 88, num_layers=2, num_heads=4, num_kv_heads=2)
FLAGS = ["--base.arch=embedllama", "--data.path=nowhere", "--base.path=nowhere", "--eval.at_end=false"]


def build(config: LlamaConfig) -> tuple[EmbedLLaMA, MlpSpeculator]:
    with torch.device("meta"):
        return EmbedLLaMA(config), MlpSpeculator(MlpConfig(speculator_width=56), config, Objective())


def plan_of(*flags: str, base_config: LlamaConfig = CONFIG) -> RunPlan:
    config = load(
        [*FLAGS, "--training.num_steps=1", "--speculator.speculator_width=56", "--data.seq_length=32", *flags], "train", SPECULATOR_CONFIGS
    )
    with torch.device("meta"):
        speculator = new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
    return plan_run(config, base_config, speculator)


@contextmanager
def nobody_else(ranks: int):
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("strategy, ranks, tp_size", [("fsdp", 7, 1), ("hsdp", 12, 1), ("tp", 4, 4), ("hsdp", 24, 2)])
def test_a_share_is_what_fsdp_keeps(strategy, ranks, tp_size):
    replicate = 3 if strategy == "hsdp" else -1
    with nobody_else(ranks):
        world = init_distributed(strategy, "cpu", tp_size=tp_size, dp_replicate=replicate)
        (base, speculator), (whole_base, whole_speculator) = build(CONFIG), build(CONFIG)
        for module in (base, whole_base):
            if tp_size > 1:
                apply_tp(module, "embedllama", world.tp_mesh)
        apply_fsdp(base, speculator, world.mesh, torch.bfloat16, freeze_base=False, speculator_mesh=world.speculator_mesh)
        for kept, whole, mesh in ((base, whole_base, world.mesh), (speculator, whole_speculator, world.speculator_mesh)):
            for (name, part), parameter in zip(kept.named_parameters(), whole.parameters(), strict=True):
                assert tuple(part.to_local().shape) == share(parameter, mesh.size(-1)), name
    keys = [f"--plan.world_size={ranks}", f"--parallelism.sharding_strategy={strategy}", f"--parallelism.tp_size={tp_size}"]
    plan = plan_of(*keys, f"--parallelism.dp_replicate={replicate}", "--base.freeze=false", "--training.compute_dtype=bfloat16")
    for name, module in (("base", base), ("speculator", speculator)):
        elements = sum(part.to_local().numel() for part in module.parameters())
        tensors = sum(1 for _ in module.parameters())
        assert plan.held["parameters"][name] == plan.held["gradients"][name] == 4 * elements
        assert plan.held["optimizer"][name] == 8 * elements + 4 * tensors


def test_what_is_sent_has_a_closed_form():
    """FSDP over 4 of a frozen base in bfloat16: each micro-batch gathers its layers once and its ends twice; the speculator once each
    time, and its gradients are reduced in float32 once."""
    keys = ["--parallelism.sharding_strategy=fsdp", "--plan.world_size=4", "--training.compute_dtype=bfloat16"]
    plan = plan_of(*keys, "--training.micro_batch_size=2", "--training.global_batch_size=24")
    base, speculator = build(CONFIG)
    layers = sum(parameter.numel() for parameter in base.layers.parameters())
    ends = sum(
        parameter.numel() + (-len(parameter) % 4) * parameter[0].numel()
        for parameter in (base.readout.embedding.weight, base.readout.norm.weight)
    )
    own = sum(parameter.numel() + (-len(parameter) % 4) * parameter[0].numel() for parameter in speculator.parameters())
    (stage,) = plan.stages
    assert stage.sent == {"base shard": 3 * 2 * (layers + 2 * ends) * 3 // 4, "speculator shard": (3 * 2 + 4) * own * 3 // 4}
    assert stage.tokens == 24 * 32 and plan.world["accumulation"] == 3


def test_flops_of_a_frozen_and_of_a_trained_base():
    frozen, trained = plan_of().stages[0], plan_of("--base.freeze=false", "--base.activation_checkpointing=true").stages[0]
    per_token = 2 * 2 * (48 * 48 * 2 + 2 * 48 * 24 + 3 * 48 * 88) + 2 * 2 * 48 * 33  # two layers: matrices, and half of the scores
    assert frozen.base_flops == 8 * 32 * per_token and trained.base_flops == 3 * frozen.base_flops
    assert frozen.repeated_flops == 0 and trained.repeated_flops == frozen.base_flops
    base_head = 6 * 8 * 31 * 48 * 499
    assert trained.speculator_flops == frozen.speculator_flops + base_head


def test_links():
    """A ring over two nodes of four GPUs has four network links; one of a GPU a node has its own; tensor parallelism waits, FSDP need not."""
    cluster = Plan(gpus_per_node=4, gpu_flops=1e-3, node_bandwidth=400.0, network_bandwidth=50.0)
    plan = plan_of(
        "--parallelism.sharding_strategy=hsdp", "--parallelism.dp_replicate=2", "--parallelism.tp_size=2", "--plan.world_size=16"
    )
    (stage,) = plan.stages
    floor = Floor(plan, stage, cluster)
    expected = {"tp": 400, "base shard": 2 * 50, "speculator shard": 4 * 50, "speculator replicate": 50}
    assert stage.sent.keys() == expected.keys()
    for name, rate in expected.items():
        assert floor.links[name] == pytest.approx(stage.sent[name] / (rate * 1e9))
    compute = (stage.base_flops + stage.speculator_flops) / 16 / 1e9
    assert floor.seconds == pytest.approx(compute + floor.links["tp"])
    slow = Plan(gpus_per_node=4, gpu_flops=1e9, node_bandwidth=1e9, network_bandwidth=1e-9)
    floor = Floor(plan, stage, slow)
    assert floor.seconds == pytest.approx(sum(seconds for name, seconds in floor.links.items() if name != "tp"))


EIGHT = [
    "--base.variant=3.1-8b",
    "--base.arch=auto",
    "--parallelism.sharding_strategy=fsdp",
    "--plan.world_size=8",
    "--training.num_steps=1",
]
PLANNED = ["--job.plan", *EIGHT, "--training.micro_batch_size=1", "--data.seq_length=64", "--eval.at_end=false"]


def test_the_program_prints_a_plan_and_touches_nothing(capsys, tmp_path):
    assert train.main([*PLANNED, f"--job.dump_folder={tmp_path / 'run'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("8 GPUs, 8 a node: replicate 1 x shard 8 x tp 1; each 79 GiB")
    assert lines[1].startswith("parameters: base 8.030e9, speculator 1.084e9; a step: 8 samples of 64 tokens")
    bfloat16 = 2 * (8_030_261_248 - 128256 * 4096) / 8 / 2**30  # its head is not asked for
    speculator = (2 * 128256 * 4096 + 2 * 4096 * 4096 + 2 * 4096) / 8 / 2**30
    assert lines[4].split() == ["parameters", f"{bfloat16:.2f}", f"{4 * speculator:.2f}"]
    assert lines[6].split() == ["optimizer", "0.00", f"{8 * speculator:.2f}"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["--plan.gpu_memory=9"],
            r"the layout replicate 1 x shard 8 x tp 1 with training.micro_batch_size = 1 does not fit: step needs [\d.]+ GiB ",
        ),
        (
            ["--eval.at_end=true", "--plan.gpu_memory=24"],
            r"the evaluation does not fit: rank 0 .* 33.95 GiB .* allowed: eval.at_end = false",
        ),
        (["--parallelism.tp_size=3"], "8 processes were started; allowed: multiples of parallelism.tp_size = 3"),
        (["--parallelism.tp_size=8", "--base.variant=qwen2.5-0.5b"], "the base's num_heads = 14 does not divide by it"),
        (["--training.global_batch_size=12"], "training.global_batch_size = 12: allowed are multiples of .* 1 x 8"),
        (["--parallelism.sharding_strategy=none"], "parallelism.sharding_strategy = none takes one process, 8 were started"),
        (["--base.variant=auto"], "base.path is empty"),
        (["--plan.world_size=0"], "plan.world_size = 0; allowed: -1, or above 0"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, changes, message):
    assert train.main([*PLANNED, *changes]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and re.search(message, line), line


def test_after_a_plan_no_group_is_left():
    plan_of()
    assert not dist.is_initialized()
