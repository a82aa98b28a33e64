import builtins
import io
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from spectitan.distributed import fsdp
from spectitan.distributed.mesh import ParallelDims, choose_device, init_distributed
from spectitan.errors import UserError
from spectitan.models.llama import EmbedLLaMA, LlamaConfig

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def world():
    world = init_distributed("none", device="cpu")
    yield world
    world.close()


def test_one_process_makes_its_own_group_and_ends_it():
    assert not dist.is_initialized()
    world = init_distributed("none", device="cpu")
    assert (world.rank, world.world_size, world.device) == (0, 1, CPU)
    assert world.mesh.mesh_dim_names == ("shard",) and world.mesh.size() == 1
    world.close()
    world.close()
    assert not dist.is_initialized()


def test_the_callers_group_is_used_and_left_open(world):
    embedded = init_distributed("fsdp", device="cpu")
    embedded.close()
    assert dist.is_initialized()


def test_several_processes_without_sharding_are_refused_before_anyone_waits(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="parallelism.sharding_strategy = none takes one process, 3 were started"):
        init_distributed("none", device="cpu")
    assert not dist.is_initialized()


@pytest.mark.parametrize("port, words", [(None, "MASTER_PORT expected, but not set"), ("x", "'x'"), ("taken", "EADDRINUSE")])
def test_processes_that_cannot_meet_are_told_in_one_line(monkeypatch, port, words):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        given |= {"MASTER_PORT": str(taken.getsockname()[1]) if port == "taken" else port} if port else {}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^the processes of this run do not find each other: .*{words}.*; allowed: RANK, WORLD_SIZE"):
            init_distributed("none", device="cpu")
    assert not dist.is_initialized()


def test_degrees_must_make_up_the_processes():
    with pytest.raises(UserError, match=r"replicate x shard x tp = 1 x 2 x 1 must equal the number of processes \(3\)"):
        ParallelDims(world_size=3, shard=2)


@pytest.mark.parametrize(
    "strategy, world_size, keys, degrees",
    [
        ("none", 1, {}, (1, 1, 1)),
        ("fsdp", 5, {}, (1, 5, 1)),
        ("fsdp", 12, {"tp_size": 4}, (1, 3, 4)),
        ("hsdp", 12, {"dp_replicate": 3}, (3, 4, 1)),
        ("hsdp", 12, {"machines": 2}, (2, 6, 1)),
        ("hsdp", 12, {"machines": 2, "tp_size": 3}, (2, 2, 3)),
        ("hsdp", 4, {}, (1, 4, 1)),
        ("tp", 6, {"tp_size": 6}, (1, 1, 6)),
        ("tp", 6, {"tp_size": 2}, (3, 1, 2)),
    ],
)
def test_degrees_of_a_strategy(strategy, world_size, keys, degrees):
    assert ParallelDims.from_strategy(strategy, world_size, **keys).degrees == degrees


@pytest.mark.parametrize(
    "strategy, world_size, keys, message",
    [
        ("fsdp", 6, {"tp_size": 4}, "= fsdp: 6 processes were started; allowed: multiples of parallelism.tp_size = 4"),
        ("tp", 2, {"tp_size": 4}, "= tp: 2 processes were started; allowed: multiples of parallelism.tp_size = 4"),
        ("hsdp", 6, {"tp_size": 3, "dp_replicate": 4}, "multiples of parallelism.tp_size = 3 x parallelism.dp_replicate = 4"),
    ],
)
def test_degrees_that_do_not_divide_the_processes_are_named(strategy, world_size, keys, message):
    with pytest.raises(UserError, match=message):
        ParallelDims.from_strategy(strategy, world_size, **keys)


def test_the_device_can_be_chosen(monkeypatch):
    monkeypatch.setenv("SPECTITAN_DEVICE", "cpu")
    assert choose_device() == CPU
    monkeypatch.setenv("SPECTITAN_DEVICE", "tpu")
    assert choose_device("cpu") == CPU
    with pytest.raises(UserError, match="'tpu': allowed are cpu and cuda"):
        choose_device()


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", torch.float32),
        ("flags\t\t: fpu avx512_bf16 avx2", torch.bfloat16),
        ("flags\t\t: fpu amx_bf16 amx_tile", torch.bfloat16),
        ("Features\t: fp asimd bf16 i8mm", torch.bfloat16),
        ("Features\t: fp asimd", torch.float32),
        ("no such line", torch.float32),
    ],
)
def test_auto_is_bfloat16_only_where_the_cpu_multiplies_it(monkeypatch, flags, expected):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(builtins, "open", lambda path: io.StringIO(f"processor\t: 0\n{flags}\n"))
    assert fsdp.resolve_compute_dtype("auto", CPU) == expected


def test_named_dtypes():
    assert fsdp.resolve_compute_dtype("float64", CPU) == fsdp.master_dtype(torch.float64) == torch.float64
    assert fsdp.resolve_compute_dtype("bfloat16", CPU) == torch.bfloat16 and fsdp.master_dtype(torch.bfloat16) == torch.float32


class Gathers(TorchDispatchMode):
    """Counts those that have begun."""

    def __init__(self):
        super().__init__()
        self.begun = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.begun += function.overloadpacket.__name__.strip("_") == "allgather_base"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("freeze", [True, False])
def test_each_block_is_gathered_while_the_one_before_it_computes(freeze):
    """Of four ranks this is one, and the others are not there."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        world = init_distributed("fsdp", device="cpu")
        base = EmbedLLaMA(LlamaConfig(61, 16, 24, num_layers=4, num_heads=2))
        fsdp.apply_fsdp(base, nn.Module(), world.mesh, torch.float32, freeze_base=freeze)
        gathers, begun = Gathers(), []
        for layer in base.layers:
            layer.register_forward_pre_hook(lambda layer, args: begun.append(gathers.begun))  # after FSDP's own
        with gathers:
            base(torch.zeros(2, 5, dtype=torch.int64))
        assert begun == [3, 4, 5, 6 if freeze else 5]  # the readout, the layer, and the next; a trained readout stays gathered
    finally:
        dist.destroy_process_group()


class Scaled(nn.Module):
    """A layer with a float buffer, and a float argument that must not be rounded on the way in."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(9, 5)
        self.register_buffer("frequencies", torch.rand(3))

    def forward(self, hidden, weights):
        assert weights.dtype == self.frequencies.dtype == torch.float32 and self.linear.weight.dtype == hidden.dtype
        return (self.linear(hidden).float().sum(1) * weights).sum()


@pytest.mark.parametrize("hold", ["fsdp", "cast on use"])
def test_bfloat16_has_float32_masters_and_adds_micro_batches_in_float32(world, hold):
    torch.manual_seed(0)
    plain = Scaled()
    held = Scaled()
    held.load_state_dict(plain.state_dict())
    if hold == "fsdp":
        fsdp.shard_trained(held, [], world.mesh, torch.bfloat16)
    else:
        fsdp.hold_trained(held, CPU, torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in held.parameters())
    plain.linear.to(torch.bfloat16)

    micro_batches = [(torch.randn(4, 9).bfloat16(), torch.tensor([1001.0, 1.0, 0.5, 3.0])) for _ in range(3)]
    expected = {name: torch.zeros(parameter.shape) for name, parameter in plain.named_parameters()}
    for i, (hidden, weights) in enumerate(micro_batches):
        plain.zero_grad()
        loss = plain(hidden, weights)
        loss.backward()
        for name, parameter in plain.named_parameters():
            expected[name] += parameter.grad.float()
        fsdp.set_gradient_sync([held], enabled=i == 2)
        held_loss = held(hidden, weights)
        assert torch.equal(held_loss, loss)
        held_loss.backward()
    assert list(held.state_dict()) == list(plain.state_dict())
    for name, parameter in held.named_parameters():
        gradient = parameter.grad.full_tensor() if hold == "fsdp" else parameter.grad
        assert parameter.dtype == gradient.dtype == torch.float32 and torch.equal(gradient, expected[name])


def test_an_embedding_is_cast_after_the_lookup_and_a_tied_weight_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 5)
            self.first, self.second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, tokens):
            assert self.embedding.weight.dtype == torch.float32 and self.first.weight is self.second.weight
            if tokens.numel() == 0:
                raise ValueError("no tokens")
            return self.second(self.first(self.embedding(tokens)))

    module = Tied()
    fsdp.hold_trained(module, CPU, torch.bfloat16)
    tokens = torch.tensor([1, 6, 1])
    out = module(tokens)
    weight = module.first.weight.bfloat16()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, module.embedding.weight.bfloat16()[tokens] @ weight.T @ weight.T)
    out.sum().backward()
    assert module.embedding.weight.grad.dtype == torch.float32 and module.embedding.weight.grad[2:6].eq(0).all()
    with pytest.raises(ValueError):  # parameters are themselves again also after a failure
        module(torch.tensor([], dtype=torch.int64))
    assert isinstance(module.first.weight, nn.Parameter) and module.first.weight.dtype == torch.float32


def test_a_frozen_base_of_one_process_is_held_in_the_compute_dtype():
    base = Scaled()
    base.alias = base.linear
    frequencies = base.frequencies.clone()
    fsdp.hold_frozen(base, CPU, torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 and not parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(base.frequencies, frequencies) and base.alias.weight is base.linear.weight


def test_large_tensors_ask_for_huge_pages():
    """Linux marks memory that asked for them with the flag hg."""
    script = """
import torch
from spectitan.training.allocator import use_huge_pages
use_huge_pages()
tensor, inside = torch.ones(1 << 22), False
for line in open("/proc/self/smaps"):
    words = line.split()
    if "-" in words[0]:
        first, last = (int(end, 16) for end in words[0].split("-"))
        inside = first <= tensor.data_ptr() + (1 << 23) < last
    elif words[0] == "VmFlags:" and inside:
        print("hg" in words)
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.strip() == str(Path("/sys/kernel/mm/transparent_hugepage").exists())
