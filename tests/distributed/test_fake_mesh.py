"""Published shapes on 64 ranks, 2 x 8 x 4, in one process: nothing is sent and no tensor has memory, placements and shapes are real."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from spectitan.config.sections import Objective, Optimizer
from spectitan.distributed import utils
from spectitan.distributed.fsdp import apply_fsdp
from spectitan.distributed.mesh import init_distributed
from spectitan.distributed.tensor_parallel import apply_tp, check_tensor_parallel
from spectitan.models.decoder import DecoderConfig
from spectitan.models.families import arch_of, build_on_meta
from spectitan.models.registry import choose_config
from spectitan.objectives import vocab_parallel
from spectitan.objectives.fused_linear import fused_linear_loss
from spectitan.speculators.mlp import MlpConfig
from spectitan.speculators.registry import build_speculator
from spectitan.training.optimizer import build_optimizer, step_if_finite
from tests.integration import processes

RANKS, TP, STEPPED = 64, 4, 3  # layers of a step: they are alike, and 80 take long
# base.arch and variant -> layers, and of some parameters the dimension that tp divides (None: whole) and the shape on a rank
SHAPES = {
    ("embedllama", "3.1-70b"): (
        80,
        {
            "self_attn.q_proj": (0, (8192 // 32, 8192)),
            "self_attn.k_proj": (0, (1024 // 32, 8192)),
            "self_attn.o_proj": (1, (8192 // 8, 8192 // 4)),
            "mlp.gate_proj": (0, (28672 // 32, 8192)),
            "mlp.down_proj": (1, (8192 // 8, 28672 // 4)),
            "input_layernorm": (None, (8192 // 8,)),
        },
    ),
    ("embedmixtral", "8x7b"): (
        32,
        {
            "mlp.gate": (None, (8 // 8, 4096)),
            "mlp.experts.up_proj": (1, (8 // 8, 14336 // 4, 4096)),
            "mlp.experts.down_proj": (2, (8 // 8, 4096, 14336 // 4)),
        },
    ),
    ("embedgptbigcode", "20b"): (
        52,
        {
            "self_attn.v_proj": (None, (128 // 8, 6144)),
            "mlp.up_proj": (0, (24576 // 32, 6144)),
            "mlp.down_proj": (1, (6144 // 8, 24576 // 4)),
        },
    ),
}


def worker(rank: int, output: str, arch: str, variant: str) -> None:
    processes.redirect(output)
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    world = init_distributed("hsdp", device="cpu", tp_size=TP, dp_replicate=2)
    check_mesh(world)
    num_layers, shapes = SHAPES[arch, variant]
    config = choose_config(arch, variant, "")
    check_tensor_parallel(arch, config, TP)
    base, speculator = sharded(world, config)
    assert len(base.layers) == num_layers
    check_placements(base, speculator, shapes)
    vocab_parallel.largest_in_group = lambda numbers, mesh: numbers  # a fake number has no value
    base, speculator = sharded(world, replace(config, num_layers=STEPPED))
    with FakeTensorMode(allow_non_fake_inputs=True):
        step(base.to_empty(device="cpu"), speculator.to_empty(device="cpu"))


def sharded(world, config: DecoderConfig) -> tuple[nn.Module, nn.Module]:
    """Base and speculator, on the meta device."""
    base = build_on_meta(config)
    with torch.device("meta"):
        speculator = build_speculator("mlp", MlpConfig(), config, Objective())
    apply_tp(base, arch_of(config), world.tp_mesh)
    apply_fsdp(base, speculator, world.mesh, torch.bfloat16, freeze_base=False, speculator_mesh=world.speculator_mesh)
    return base, speculator


def check_mesh(world) -> None:
    assert world.mesh.mesh_dim_names == ("replicate", "shard") and tuple(world.mesh.shape) == (2, 8)
    assert world.tp_mesh.mesh_dim_names == ("tp",) and world.tp_mesh.mesh.tolist() == [0, 1, 2, 3]
    assert world.speculator_mesh.mesh_dim_names == ("replicate", "shard") and tuple(world.speculator_mesh.shape) == (2, 32)
    assert world.mesh.mesh.tolist() == [[4 * shard + 32 * copy for shard in range(8)] for copy in range(2)]


def check_placements(base: nn.Module, speculator: nn.Module, shapes: dict) -> None:
    for name, (dim, shape) in shapes.items():
        parameter = base.layers[-1].get_submodule(name).weight
        assert parameter.placements[2] == (Replicate() if dim is None else Shard(dim)), name
        assert tuple(parameter.to_local().shape) == shape, name
    for name, parameter in base.named_parameters():
        assert parameter.device_mesh.mesh_dim_names == ("replicate", "shard", "tp") and parameter.device_mesh.shape == (2, 8, 4), name
        replicate, shard, tp = parameter.placements
        assert replicate == Replicate() and shard.dim == 0, name
        assert parameter.to_local().numel() == parameter.numel() // (32 if tp.is_shard() else 8), name
        assert tp.is_shard() or parameter.dim() == 1 or name.endswith(("k_proj.weight", "v_proj.weight", "mlp.gate.weight")), name
    for parameter in speculator.parameters():
        assert parameter.placements == (Replicate(), Shard(0)) and len(parameter.to_local()) == -(-len(parameter) // 32)


def step(base: nn.Module, speculator: nn.Module) -> None:
    """Base loss and the first head's loss on one row of 128 tokens; backward, clipping, AdamW."""
    optimizer = build_optimizer(nn.ModuleDict({"base": base, "speculator": speculator}), Optimizer())
    tokens, rows = torch.zeros(1, 128, dtype=torch.int64), torch.arange(100)
    states = base(tokens)
    assert states.final.shape == (1, 128, base.config.hidden_size) and states.final.dtype == torch.bfloat16
    hidden, targets, weights = states.final[0, rows], tokens[0, rows], torch.ones(100)

    def loss_of_base(readout, hidden):
        return fused_linear_loss(hidden, readout.head.weight, weights, loss="ce", targets=targets)[0]

    speculator.forward = lambda hidden: fused_linear_loss(
        speculator.unroll(hidden, tokens[:, :100].expand(3, -1))[0], speculator.heads[0].weight, weights, loss="ce", targets=targets
    )[0]
    (base.readout.call(loss_of_base, hidden) + speculator(hidden)).backward()
    for parameter in (*base.parameters(), *speculator.parameters()):
        if parameter.grad is not None:  # not the later heads' own parts
            assert parameter.grad.placements == parameter.placements and parameter.grad.to_local().shape == parameter.to_local().shape
    assert all(parameter.grad is not None for parameter in base.parameters())
    norms = [utils.clip_grad_norm(part.parameters(), 0) for part in (base, speculator)]  # measured only: a fake norm cannot be compared
    step_if_finite(optimizer, 1.0, *norms)


@pytest.mark.parametrize("arch, variant", SHAPES)
def test_64_ranks_build_shard_and_step(tmp_path, arch, variant):
    output = tmp_path / "output"
    assert processes.join(processes.call_in_each(1, worker, str(output), arch, variant)) == [0], Path(output).read_text()
