"""One curve: a run gives the same losses and gradient norms on one process and in every layout, through the trainer.

Each layout's processes start once and make all runs, one after the other, in one process group.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group as resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from spectitan import train
from spectitan.models.families import build_on_meta
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.mixtral import MixtralConfig
from spectitan.models.weights import save_hf
from spectitan.speculators.draft_vocabulary import maps_of, write_maps
from tests.integration import processes, tiny

STEPS = 20
RUN = {"training__num_steps": STEPS, "checkpoint__interval": STEPS, "metrics__report_interval": 1, "training__micro_batch_size": 1}
RUN |= {"training__compute_dtype": "float64", "eval__at_end": "false", "export__format": "none", "objective__loss": "kl_div"}
STAGE2 = {"stage2__start_step": 3, "stage2__batch_size": 8, "stage2__prompt_length": 5, "stage2__seq_length": 7}
JOINT = {"base__freeze": "false", "training__detach_states": "false", "training__speculator_loss_coeff": 0.7}
FEW = {"training__num_steps": 5, "checkpoint__interval": 5}
EAGLE3 = {"speculator__type": "eagle3"}
# Tokens of its own, a draft vocabulary, and validation between the steps.
REDUCED = EAGLE3 | FEW | {"speculator__ttt_tokens": "own", "speculator__ttt_steps": 2, "eval__interval": 2, "eval__prompts": "none"}
KINDS = {
    "mlp": STAGE2,
    "lstm": STAGE2 | {"speculator__type": "lstm"},
    "eagle3": EAGLE3 | FEW | {"speculator__train_head": "true", "speculator__ttt_step_loss_decay": 0.8, "optimizer__name": "muon"},
    "eagle3_reduced": REDUCED,
    "joint": JOINT,
    "mixtral": JOINT | FEW | {"speculator__type": "lstm", "optimizer__name": "muon"},
    "gpt_bigcode": JOINT | FEW,
    "float32": JOINT | FEW | {"training__compute_dtype": "float32", "objective__loss": "ce"},
}
WITHOUT_EAGLE3 = [kind for kind in KINDS if not kind.startswith("eagle3")]
# Number of processes, [parallelism], and the runs that are made. Of the last one of hsdp_2x2 and tp_2_fsdp_2 collectives are counted.
LAYOUTS = {
    "fsdp_2": (2, {"sharding_strategy": "fsdp"}, KINDS),
    "fsdp_4": (4, {"sharding_strategy": "fsdp"}, WITHOUT_EAGLE3[:-1]),
    "hsdp_2x2": (4, {"sharding_strategy": "hsdp", "dp_replicate": 2}, KINDS),
    "tp_2": (2, {"sharding_strategy": "tp", "tp_size": 2}, list(KINDS)[:-1]),
    "tp_2_fsdp_2": (4, {"sharding_strategy": "fsdp", "tp_size": 2}, WITHOUT_EAGLE3),
    "tp_4_dp_1": (4, {"sharding_strategy": "tp", "tp_size": 4}, ["joint"]),
    "tp_2_dp_2": (4, {"sharding_strategy": "tp", "tp_size": 2}, ["joint", "mixtral"]),
    "hsdp_4x1": (4, {"sharding_strategy": "hsdp", "dp_replicate": 4, "shard_speculator": "false"}, ["joint"]),
}
# Query heads divide by two, and nothing else does.
CONFIG = replace(tiny.CONFIG, num_heads=4, num_kv_heads=2)
SHAPE = {"num_layers": 2, "num_heads": 4, "max_position_embeddings": tiny.CONTEXT, "eos_token_id": 0, "initializer_range": 0.2}
BASES = {
    "mixtral": MixtralConfig(tiny.VOCAB, 24, 40, num_kv_heads=2, num_experts=5, **SHAPE),
    "gpt_bigcode": GPTBigCodeConfig(tiny.VOCAB, 24, **SHAPE),
}


class Collectives(TorchDispatchMode):
    """Counts collectives by name and by the ranks that take part."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come by themselves
        if function.namespace in ("c10d", "_c10d_functional"):
            groups = [group for group in map(self._ranks, args) if group]
            self.counts[(function.overloadpacket.__name__.strip("_"), *groups)] += 1
        return function(*args, **(kwargs or {}))

    def _ranks(self, argument) -> tuple[int, ...]:
        try:
            group = dist.ProcessGroup.unbox(argument) if isinstance(argument, torch.ScriptObject) else argument
            group = resolve_process_group(group) if isinstance(group, str) else group
            return tuple(dist.get_process_group_ranks(group)) if isinstance(group, dist.ProcessGroup) else ()
        except (RuntimeError, LookupError):  # another kind of object, or of name: the reduction, say
            return ()


def worker(rank: int, output: str, runs: list[list[str]], refused: list[str]) -> None:
    """Makes the runs; the last one with its collectives counted, in output.RANK.json. First what is to be refused, if anything."""
    assert not refused or train.main(refused) == 2
    for flags in runs[:-1]:
        assert train.main(flags) == 0
    with Collectives() as collectives:
        assert train.main(runs[-1]) == 0
    Path(f"{output}.{rank}.json").write_text(json.dumps([[*key, count] for key, count in collectives.counts.items()]))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    world = tiny.make(tmp_path_factory.mktemp("layouts"), CONFIG)
    write_bases(world)
    write_maps(world.root, *maps_of(torch.arange(0, tiny.VOCAB, 3), tiny.VOCAB))
    return world


def write_bases(world: tiny.Tiny) -> None:
    for name, config in BASES.items():
        base = build_on_meta(config).to_empty(device="cpu")
        base.init_weights(torch.Generator().manual_seed(0))
        save_hf(base, world.root / f"base_{name}", torch.float32, tokenizer_files_from=world.root / "tokenizer")


def without_weights(world: tiny.Tiny) -> Path:
    """A base that cannot be split in two, and of which there is no more to read than the shape."""
    folder = world.root / "base_without_weights"
    save_hf(build_on_meta(tiny.CONFIG).to_empty(device="cpu"), folder, torch.float32, tokenizer_files_from=world.root / "tokenizer")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


def flags(world: tiny.Tiny, kind: str, run: Path, **layout) -> list[str]:
    base = {"base__path": world.root / f"base_{kind}"} if kind in BASES else {}
    maps = {f"speculator__{name}_path": world.root / f"{name}.npy" for name in ("d2t", "t2d") if kind == "eagle3_reduced"}
    return world.flags(run, **RUN | KINDS[kind] | base | maps | layout)


@pytest.fixture(scope="module")
def one(world) -> dict[str, list[dict]]:
    """The reports of one process, by kind."""
    for kind in KINDS:
        assert train.main(flags(world, kind, world.root / kind)) == 0
    return {kind: tiny.reports(world.root / kind) for kind in KINDS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_curve(world, one, layout):
    world_size, keys, kinds = LAYOUTS[layout]
    keys = {f"parallelism__{name}": value for name, value in keys.items()}
    runs = {kind: world.root / f"{kind}_{layout}" for kind in kinds}
    commands = []
    for kind, run in runs.items():
        size = 2 if layout == "tp_2" and kind != "joint" else 1  # gradients accumulate in fsdp_2, and under tp in this one
        commands.append(flags(world, kind, run, **keys, training__micro_batch_size=size))
    output = world.root / layout
    refused = flags(world, "mlp", world.root / "refused", base__path=without_weights(world), **keys) if layout == "tp_2" else []
    processes.run_group(world_size, output, worker, str(output), commands, refused)
    for kind, run in runs.items():
        compare(tiny.reports(run), one[kind], 1e-9 if kind != "float32" else 1e-5)
    if layout == "hsdp_2x2":
        check_collectives_of_hsdp(output)
    if layout == "tp_2":
        line = "parallelism.tp_size = 2: the base's num_heads = 3 does not divide by it; allowed: a divisor of that"
        assert f"spectitan.train: {line}\n" in Path(f"{output}.0").read_text() and not (world.root / "refused").exists()
    if layout == "tp_2_fsdp_2":
        check_collectives_of_tp_and_fsdp(output)


def compare(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert [report["step"] for report in ours] == [report["step"] for report in theirs]
    for our, their in zip(ours, theirs):
        assert our["sample_hash"] == their["sample_hash"] and our["supervised_tokens"] == their["supervised_tokens"]
        for key in ("loss", "grad_norm", *(key for key in their if key in ("base_loss", "base_grad_norm"))):
            torch.testing.assert_close(
                torch.tensor(our[key], dtype=torch.float64), torch.tensor(their[key], dtype=torch.float64), rtol=tolerance, atol=0
            )


def collectives_of(output: Path, rank: int) -> dict[tuple, int]:
    """By name and ranks that take part."""
    return {(name, *map(tuple, groups)): count for name, *groups, count in json.loads(Path(f"{output}.{rank}.json").read_text())}


def check_collectives_of_hsdp(output: Path) -> None:
    """Gathers and scatters stay within the two groups that shard; gradients are summed over the pairs that hold the same shard."""
    for rank in range(4):
        counts = collectives_of(output, rank)
        shard, replicate = ((0, 1) if rank < 2 else (2, 3)), ((0, 2) if rank % 2 == 0 else (1, 3))
        gathers = {key[1]: count for key, count in counts.items() if key[0] == "allgather_base"}
        scatters = {key[1]: count for key, count in counts.items() if key[0] == "reduce_scatter_base"}
        assert gathers.keys() == scatters.keys() == {shard}, counts
        reduced = counts["allreduce", replicate]
        parts = CONFIG.num_layers + 3  # each layer, the speculator, and the readout in two: at its norm and at its embedding
        assert reduced == 5 * parts, counts


def check_collectives_of_tp_and_fsdp(output: Path) -> None:
    """FSDP gathers the base among ranks that hold the same part of its layers, activations go between those that split them."""
    for rank in range(4):
        counts = collectives_of(output, rank)
        split, shard = ((0, 1) if rank < 2 else (2, 3)), ((0, 2) if rank % 2 == 0 else (1, 3))
        for name in ("allgather_base", "reduce_scatter_base"):
            assert {key[1] for key in counts if key[0] == name} == {shard, (0, 1, 2, 3)}, counts  # base and speculator
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            assert {key[1] for key in counts if key[0] == name} == {split}, counts
        # Of the embedding; after attention and MLP, and in their backward before them; of the loss's gradient.
        assert counts["reduce_scatter_tensor", split] == 5 * (1 + 4 * CONFIG.num_layers + 1), counts
