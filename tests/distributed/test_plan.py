"""A plan against the run itself: what a step of real processes holds, multiplies and sends, each to a tenth of what was planned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spectitan.config.manager import load
from spectitan.models.families import build_on_meta
from spectitan.models.gpt_bigcode import GPTBigCodeConfig
from spectitan.models.mixtral import MixtralConfig
from spectitan.models.registry import choose_config
from spectitan.models.weights import save_hf
from spectitan.objectives import fused_linear
from spectitan.objectives.block_passes import block_pass
from spectitan.planning.plan import RunPlan
from spectitan.planning.rehearsal import plan_run
from spectitan.speculators.registry import SPECULATOR_CONFIGS, new_speculator
from tests.distributed import measured_steps
from tests.integration import processes, tiny

SHAPE = {"max_position_embeddings": tiny.CONTEXT, "eos_token_id": 0}
BASES = {
    "llama": replace(
        tiny.CONFIG, hidden_size=64, intermediate_size=104, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, tie_embeddings=False
    ),
    "mixtral": MixtralConfig(tiny.VOCAB, 64, 104, num_layers=3, num_heads=4, num_kv_heads=2, num_experts=5, **SHAPE),
    "gpt_bigcode": GPTBigCodeConfig(tiny.VOCAB, 64, num_layers=3, num_heads=4, **SHAPE),
}
RUN = {"training__num_steps": 2, "training__micro_batch_size": 4, "training__global_batch_size": -1, "job__deterministic": "false"}
RUN |= {"eval__at_end": "false", "export__format": "none", "speculator__speculator_width": 72, "objective__chunk_rows": 256}
BFLOAT16, FLOAT32 = {"training__compute_dtype": "bfloat16"}, {"training__compute_dtype": "float32"}
MLP, LSTM = {}, {"speculator__type": "lstm"}
# On a CPU rows are padded to multiples of 64, which are no useful work: so many that little is.
EAGLE3 = {"speculator__type": "eagle3", "speculator__num_layers": 1, "training__micro_batch_size": 16}
BASE = {key: value for key, value in tiny.BASE_ALONE.items() if key not in ("export__format", "eval__prompts")}
JOINT = {"base__freeze": "false", "training__detach_states": "false"}
KL = {"objective__loss": "kl_div"}
STAGE2 = {"stage2__start_step": 0, "stage2__batch_size": 16, "stage2__prompt_length": 5, "stage2__seq_length": 23}
TWICE = {"training__global_batch_size": 16, "training__micro_batch_size": 2}  # in micro-batches of two of 4 ranks, four of two
AGAIN = {"base__activation_checkpointing": "true"}
ALONE = {
    "mlp": FLOAT32,
    "mlp bfloat16 kl_div": BFLOAT16 | KL,
    "lstm bfloat16": BFLOAT16 | LSTM,
    "eagle3": FLOAT32 | EAGLE3 | {"states__noise_std": 0.05},
    "lstm muon, losses mixed": FLOAT32 | LSTM | {"optimizer__name": "muon", "objective__loss": '{"ce": 0.1, "tv": 0.9}'},
    "base": FLOAT32 | BASE,
    "base bfloat16 again": BFLOAT16 | BASE | AGAIN,
    "joint": FLOAT32 | JOINT | KL,
    "stage 2": FLOAT32 | STAGE2,
    "mixtral": FLOAT32 | {"base": "mixtral"},
    "gpt_bigcode bfloat16": BFLOAT16 | {"base": "gpt_bigcode"},
}
FSDP = {"parallelism__sharding_strategy": "fsdp"}
HSDP = {"parallelism__sharding_strategy": "hsdp", "parallelism__dp_replicate": 2}
TP = {"parallelism__sharding_strategy": "tp", "parallelism__tp_size": 2}
TOGETHER = {
    2: {
        "fsdp mlp bfloat16": FSDP | BFLOAT16,
        "fsdp mlp bfloat16 twice": FSDP | BFLOAT16 | TWICE,
        "fsdp lstm kl_div": FSDP | FLOAT32 | LSTM | KL,
        "fsdp eagle3 bfloat16": FSDP | BFLOAT16 | EAGLE3,
        "fsdp base bfloat16": FSDP | BFLOAT16 | BASE,
        "fsdp joint again": FSDP | FLOAT32 | JOINT | AGAIN,
        "fsdp stage 2": FSDP | BFLOAT16 | STAGE2,
        "fsdp mixtral base": FSDP | FLOAT32 | BASE | {"base": "mixtral"},
        "tp mlp": TP | FLOAT32,
        "tp joint": TP | FLOAT32 | JOINT | KL,
    },
    4: {
        "hsdp mlp bfloat16": HSDP | BFLOAT16,
        "hsdp base": HSDP | FLOAT32 | BASE | TWICE,
        "tp fsdp eagle3": FSDP | {"parallelism__tp_size": 2} | FLOAT32 | EAGLE3,
        "tp fsdp base bfloat16": FSDP | {"parallelism__tp_size": 2} | BFLOAT16 | BASE,
    },
}
CASES = [(1, name) for name in ALONE] + [(ranks, name) for ranks, runs in TOGETHER.items() for name in runs]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    world = tiny.make(tmp_path_factory.mktemp("plan"), BASES["llama"])
    for name in ("mixtral", "gpt_bigcode"):
        base = build_on_meta(BASES[name]).to_empty(device="cpu")
        base.init_weights(torch.Generator().manual_seed(0))
        save_hf(base, world.root / name, torch.float32, tokenizer_files_from=world.root / "tokenizer")
    return world


def flags(world: tiny.Tiny, name: str, changes: dict) -> list[str]:
    changes = RUN | changes
    base = changes.pop("base", "base")
    has_width = changes.get("speculator__type", "mlp") in ("mlp", "lstm")
    given = world.flags(world.root / name, base__path=world.root / base, **changes)
    return [flag for flag in given if has_width or "speculator_width" not in flag]


def planned(run: list[str], ranks: int) -> RunPlan:
    config = load([*run, f"--plan.world_size={ranks}"], "train", SPECULATOR_CONFIGS)
    base_config = choose_config("auto", "auto", config.base.path)
    with torch.device("meta"):
        speculator = new_speculator(config.speculator.type, config.speculator, base_config, config.objective)
    return plan_run(config, base_config, speculator)


@pytest.fixture(autouse=True)
def losses_as_on_a_cpu(monkeypatch):
    """Elsewhere a plan takes Triton's."""
    monkeypatch.setattr(fused_linear, "RehearsedPass", block_pass)


@pytest.fixture(scope="module")
def steps(world) -> dict[tuple[int, str], list[dict]]:
    """What the last step of each rank took."""
    found = {(1, name): [measured_steps.measure(flags(world, name, changes))] for name, changes in ALONE.items()}
    for ranks, runs in TOGETHER.items():
        output, commands = world.root / f"output_{ranks}", {name: flags(world, name, changes) for name, changes in runs.items()}
        processes.run_group(ranks, output, measured_steps.worker, str(output), commands)
        of_ranks = [json.loads(Path(f"{output}.{rank}.json").read_text()) for rank in range(ranks)]
        found |= {(ranks, name): [of_rank[name] for of_rank in of_ranks] for name in runs}
    return found


@pytest.mark.parametrize("ranks, name", CASES)
def test_a_step_takes_what_was_planned(world, steps, ranks, name):
    changes = ALONE[name] if ranks == 1 else TOGETHER[ranks][name]
    plan = planned(flags(world, name, changes), ranks)
    (stage,) = plan.stages
    last = steps[ranks, name]
    assert max(step["peak"] for step in last) == pytest.approx(plan.peak(stage), rel=0.1)
    flops = stage.base_flops + stage.speculator_flops + stage.repeated_flops
    if "muon" not in name:  # its own products are the optimizer's, and not in the plan
        assert sum(step["flops"] for step in last) == pytest.approx(flops, rel=0.1)
    sent = sum(stage.sent.values())
    # Beside counts of rows, of a few bytes; a divided head's rows are gathered, and where documents end there are fewer than planned.
    assert all(step["sent"] == pytest.approx(sent, rel=0.02 if "tp" in name else 0, abs=64) for step in last)
