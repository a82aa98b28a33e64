"""Every file in train_configs/ resolves, names its own command, and builds its base and speculator on the meta device."""

import re
from pathlib import Path

import pytest
import torch

from spectitan import train
from spectitan.config.manager import load
from spectitan.config.tables import Config
from spectitan.models.registry import choose_config, get_model
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_speculator
from spectitan.speculators.serving import choose_format
from spectitan.states.continued import prompts_per_sample
from spectitan.training.schedule import learning_rate_multiplier

FOLDER = Path(__file__).parents[2] / "train_configs"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SEEDS = ["llama3.1_8b_fms", "llama3.1_8b_arctic", "qwen2.5_0.5b_verl", "llama2_7b_verl_lstm"]
LARGE = [
    "llama3.1_8b_hsdp",
    "llama3.1_8b_tp",
    "llama3.1_70b_fsdp",
    "llama3.1_70b_hsdp",
    "llama3.1_70b_tp",
    "mixtral_8x7b",
    "gptbigcode_20b",
]
PROCESSES = {"llama3.1_8b_fms": 8, "llama3.1_8b_arctic": 8, "qwen2.5_0.5b_verl": 2, "llama2_7b_verl_lstm": 4}
PROCESSES |= {"llama3.1_8b_tp": 4, "llama3.1_70b_tp": 8, "mixtral_8x7b": 8, "gptbigcode_20b": 8}
NODES = {"llama3.1_8b_hsdp": 4, "llama3.1_70b_fsdp": 2, "llama3.1_70b_hsdp": 8}  # of eight GPUs

# Parameters of the base, and of the speculator, by hand from the published modules.
LLAMA_3_V, QWEN_V, LLAMA_2_V = 128256, 151936, 32000
MLP_8B = 2 * LLAMA_3_V * 4096 + 2 * 4096 * 4096 + 2 * 4096  # embedding and head, two projections, a norm
LSTM_8B = 2 * LLAMA_3_V * 4096 + 2 * 4 * 4096 * 4096 + 2 * 2 * 4096  # four gates, two norms
MLP_QWEN = 2 * QWEN_V * 512 + 896 * 512 + 512 * 512 + 2 * 512
LEVEL = 2 * 1024 + 1024 * 2048  # norm of 1024, then 1024 -> 2048
LSTM_7B = (
    LLAMA_2_V * 1024 + LEVEL  # one embedding for the gates
    + 4 * (4096 * 1024 + LEVEL) + 4 * (2048 * 1024 + LEVEL)  # projections of the first step, and of later ones
    + 2 * 2 * 2048  # norms of the cell and of the state
    + 2048 * 1024 + LEVEL  # from the sum to the first of inner_dim, and its level
    + LLAMA_2_V * 2048
)  # fmt: skip
LSTM_70B = 2 * LLAMA_3_V * 6144 + 4 * (8192 * 6144 + 6144 * 6144) + 2 * 2 * 6144
MIXTRAL_V, CODE_V = 32000, 49152
LSTM_MIXTRAL = 2 * MIXTRAL_V * 4096 + 2 * 4 * 4096 * 4096 + 2 * 2 * 4096
MLP_CODE = 2 * CODE_V * 4096 + 6144 * 4096 + 4096 * 4096 + 2 * 4096
LLAMA_70B = 2 * LLAMA_3_V * 8192 + 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192) + 8192
MIXTRAL = 2 * MIXTRAL_V * 4096 + 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096 + 8 * 3 * 4096 * 14336 + 2 * 4096) + 4096
CODE_LAYER = 2 * 6144 * 6144 + 2 * 6144 * 128 + 2 * 6144 * 24576 + 2 * 6144 + 2 * 128 + 24576 + 6144 + 4 * 6144  # matrices, biases, norms
CODE = (CODE_V + 8192) * 6144 + 52 * CODE_LAYER + 2 * 6144
PARAMETERS = {
    "llama3.1_8b_hsdp": (8_030_261_248, MLP_8B),
    "llama3.1_8b_tp": (8_030_261_248, MLP_8B),
    "llama3.1_70b_fsdp": (LLAMA_70B, LSTM_70B),
    "llama3.1_70b_hsdp": (LLAMA_70B, LSTM_70B),
    "llama3.1_70b_tp": (LLAMA_70B, LSTM_70B),
    "mixtral_8x7b": (MIXTRAL, LSTM_MIXTRAL),
    "gptbigcode_20b": (CODE, MLP_CODE),
    "llama3.1_8b_fms": (8_030_261_248, MLP_8B),
    "llama3.1_8b_arctic": (8_030_261_248, LSTM_8B),
    "qwen2.5_0.5b_verl": (494_032_768, MLP_QWEN),
    "llama2_7b_verl_lstm": (6_738_415_616, LSTM_7B),
}


def resolved(name: str, program: str = "train", *flags: str) -> Config:
    return load(["--job.config_file", str(FOLDER / f"{name}.toml"), *flags], program, SPECULATOR_CONFIGS)


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    return "\n".join(line for line in lines[: lines.index("")] if line.startswith("#"))


def count(module: torch.nn.Module) -> int:
    assert all(parameter.is_meta for parameter in module.parameters())
    return sum(parameter.numel() for parameter in module.parameters())


def speculator_of(config: Config, base_config):
    with torch.device("meta"):
        return build_speculator(config.speculator.type, config.speculator, base_config, config.objective)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_and_says_how_it_is_run(name):
    config = resolved(name)
    assert config.job.dump_folder == f"outputs/{name}"
    assert all(word in header(name) for word in ("Trains", "Hardware:", "Command:")) or name == "pystdlib_base"
    assert f"spectitan.train --job.config_file train_configs/{name}.toml" in header(name)


def test_the_figures_of_the_field():
    assert round(LSTM_8B / 1e9, 3) == 1.185 and round(MLP_8B / 1e9, 3) == 1.084


@pytest.mark.parametrize("name", SEEDS + LARGE)
def test_a_recipe_builds(name):
    config = resolved(name)
    base = get_model(config.base.arch, config.base.variant, init="random", device="meta")
    speculator = speculator_of(config, base.config)
    assert (count(base), count(speculator)) == PARAMETERS[name]
    millions = PARAMETERS[name][1] / 1e6
    said = re.search(r"([\d.]+)([MB]) parameters are trained", header(name))
    assert float(said[1]) * {"M": 1, "B": 1000}[said[2]] == pytest.approx(millions, rel=0.005)
    assert choose_format(speculator, config.export.format) == config.export.format
    assert config.base.freeze and config.base.init == "pretrained"


@pytest.mark.parametrize("name", PROCESSES)
def test_its_batch_divides_among_the_processes_of_its_command(name):
    config, processes = resolved(name), PROCESSES[name]
    assert f"torchrun --nproc_per_node {processes} -m" in header(name)
    assert config.training.global_batch_size % (processes * config.training.micro_batch_size) == 0


@pytest.mark.parametrize("name", [*LARGE, "llama3.1_8b_fms", "llama3.1_8b_eagle3"])
def test_its_plan_fits_the_hardware_that_it_names(name, capsys):
    assert train.main(["--job.config_file", str(FOLDER / f"{name}.toml"), "--job.plan"]) == 0
    plan, config = capsys.readouterr().out, resolved(name)
    gpus = NODES[name] * 8 if name in NODES else PROCESSES.get(name, 8)
    assert config.plan.world_size == gpus and plan.startswith(f"{gpus} GPUs, ")
    assert ("stage 2, " in plan) == (config.stage2.start_step >= 0) and ("evaluation, " in plan) == config.eval.at_end
    if name in NODES:
        assert f"torchrun --nnodes {NODES[name]} --nproc_per_node 8 " in header(name)
        assert f"sbatch --nodes {NODES[name]} scripts/train.slurm train_configs/{name}.toml" in header(name)


def test_fms_fsdp_cuts_12_prompts_of_a_sample():
    config = resolved("llama3.1_8b_fms")
    base_config = choose_config(config.base.arch, config.base.variant, "")
    batch_size = config.training.global_batch_size
    assert prompts_per_sample(config.stage2, batch_size, config.data.seq_length, base_config.max_position_embeddings, 3) == 96 // 8
    rates = [learning_rate_multiplier(step, 21000, config.lr_scheduler, 15000) for step in (375, 750, 15000, 20999)]
    assert rates == pytest.approx([0.75, 0.1 + 0.45 * (1 + 0.9876883), 0.1, 0.01], abs=1e-6)  # warm-up of 750 steps


def test_arctic_data_is_cut_into_all_windows_of_its_samples():
    """The keys of the recipe's data command."""
    flags = re.findall(r"--(?:data.seq_length|training\.\w+|stage2\.\w+) \d+", header("llama3.1_8b_arctic"))
    flags = [part for flag in flags for part in flag.split()]
    config = resolved("llama3.1_8b_arctic", "prepare", "--prepare.generate", "0.jsonl", *flags)
    base_config = choose_config(config.base.arch, config.base.variant, "")
    prompts = prompts_per_sample(config.stage2, config.training.global_batch_size, 2048, base_config.max_position_embeddings, 1)
    assert prompts * config.stage2.prompt_length == config.data.seq_length == 2048
    assert resolved("llama3.1_8b_arctic").data.seq_length == config.stage2.prompt_length + config.stage2.seq_length
