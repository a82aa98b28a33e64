"""Every family of bases but Llama, and transformers' own models, through whole programs: it drafts, is evaluated, exported and trained."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig

from spectitan import evaluate, export, generate, train
from spectitan.models.gpt_bigcode import EmbedGPTBigCode, GPTBigCodeConfig
from spectitan.models.mixtral import EmbedMixtral, MixtralConfig
from spectitan.models.registry import get_model
from spectitan.models.weights import fingerprint, save_hf
from spectitan.training.checkpoint_reading import read_tensors
from spectitan.types import BaseStates
from tests.integration import processes, tiny
from tests.integration.test_train import NO_END, losses, plain_training

_SHAPE = {"max_position_embeddings": tiny.CONTEXT, "eos_token_id": 0, "initializer_range": 0.2}
BASES = {
    "mixtral": lambda: EmbedMixtral(MixtralConfig(tiny.VOCAB, 24, 40, num_layers=2, num_heads=3, num_experts=5, **_SHAPE)),
    "gpt_bigcode": lambda: EmbedGPTBigCode(GPTBigCodeConfig(tiny.VOCAB, 24, num_layers=2, num_heads=3, **_SHAPE)),
}


@pytest.fixture(scope="module", params=BASES)
def base(request, world) -> Path:
    model = BASES[request.param]()
    model.init_weights(torch.Generator().manual_seed(0))
    folder = world.root / request.param
    save_hf(model, folder, torch.float32, tokenizer_files_from=world.root / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def run(world, base) -> Path:
    folder = world.root / f"run_{base.name}"
    assert train.main(world.flags(folder, base__path=base, training__num_steps=3, objective__loss="kl_div")) == 0
    return folder


def test_its_text_is_that_of_plain_decoding_and_a_folder_is_written(run, base, world, tmp_path, capsys):
    report = json.loads((run / "report.json").read_text())
    assert report["identical"] is True and report["sequences"] == 3 and report["base_heldout_loss"] > 0
    assert tiny.reports(run)[-1]["flops_per_second"] > 0
    assert json.loads((run / "export" / "config.json").read_text())["model_type"] == "mlp_speculator"
    flags = world.flags(tmp_path / "tree", base__path=base, speculator__path=run / "export", eval__top_k_tokens_per_head="3,2,1")
    assert evaluate.main([*flags, "--eval.batch_size=2"]) == 0
    tree = json.loads((tmp_path / "tree" / "report.json").read_text())["tree"]
    assert tree["identical"] is True
    texts = []
    for speculator in ([], [f"--speculator.path={run}"]):
        capsys.readouterr()
        assert generate.main([f"--base.path={base}", "--generate.prompt=def count", "--generate.max_new_tokens=9", *speculator]) == 0
        texts.append(capsys.readouterr().out.split("\n\n")[0])
    assert texts[0].splitlines()[0] == texts[1].splitlines()[0]


def test_training_equals_a_plain_loop(world, base, tmp_path):
    changes = NO_END | {"base__path": base, "training__compute_dtype": "float64", "metrics__report_interval": 1, "training__num_steps": 2}
    trained, values = plain_training(world.flags(tmp_path, **changes))
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    torch.testing.assert_close(losses(tmp_path / "run").sum(1), torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=0)
    saved = read_tensors(tiny.checkpoint(tmp_path / "run", 2), "speculator.")
    for name, parameter in trained.named_parameters():
        torch.testing.assert_close(saved[name], parameter.data, rtol=1e-9, atol=1e-12, msg=name)


def test_the_base_itself_is_trained_like_a_plain_loop_and_transformers_reads_it(world, base, tmp_path):
    changes = tiny.BASE_ALONE | NO_END | {"base__path": base, "training__compute_dtype": "float64", "training__num_steps": 2}
    changes |= {"metrics__report_interval": 1, "base__init": "pretrained", "base__activation_checkpointing": "true"}
    trained, values = plain_training(world.flags(tmp_path, **changes))
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    torch.testing.assert_close(losses(tmp_path / "run").sum(1), torch.tensor(values, dtype=torch.float64), rtol=1e-9, atol=0)
    saved = read_tensors(tiny.checkpoint(tmp_path / "run", 2), "base.")
    for name, parameter in trained.named_parameters():
        if name.endswith("k_proj.bias"):  # no score depends on it: its gradient is rounding, which AdamW makes large
            continue
        torch.testing.assert_close(saved[name], parameter.data, rtol=1e-9, atol=1e-12, msg=name)
    assert export.main([*world.flags(tmp_path / "run", **changes), "--export.format=hf"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
    ours = get_model("auto", "auto", tmp_path / "run" / "export")
    tokens = torch.randint(0, tiny.VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.readout.logits(ours(tokens).final), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert fingerprint(ours) == fingerprint(tmp_path / "run" / "export") != fingerprint(base)


# ---- transformers' own models ----

HF_CONFIGS = {
    "gpt_neox": lambda sizes: GPTNeoXConfig(**sizes),
    "gemma2": lambda sizes: Gemma2Config(**sizes, head_dim=8, num_key_value_heads=1, query_pre_attn_scalar=8, sliding_window=5),
}


@pytest.fixture(scope="module", params=HF_CONFIGS)
def hf_base(request, world) -> Path:
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"max_position_embeddings": tiny.CONTEXT, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(HF_CONFIGS[request.param](sizes))
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    folder = world.root / request.param
    model.save_pretrained(folder)
    for file in (world.root / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def test_a_model_of_transformers_drafts_and_is_evaluated_and_stage_2_samples_from_it(world, hf_base, tmp_path, capsys):
    changes = {"base__path": hf_base, "base__arch": "hf", "training__num_steps": 3, "metrics__report_interval": 1}
    changes |= {"stage2__start_step": 2, "stage2__prompt_length": 4, "stage2__seq_length": 9, "compile__enabled": "auto"}
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["identical"] is True and report["sequences"] == 3 and report["heldout_loss"][0] > 0
    assert ("base_heldout_loss" in report) == (hf_base.name == "gpt_neox")  # Gemma 2 caps its logits
    assert tiny.reports(tmp_path / "run")[-1]["flops_per_second"] > 0
    written = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert written["base_model_archs"] == ["GPTNeoXForCausalLM" if hf_base.name == "gpt_neox" else "Gemma2ForCausalLM"]
    flags = world.flags(tmp_path / "tree", base__path=hf_base, base__arch="hf", speculator__path=tmp_path / "run" / "export")
    assert evaluate.main([*flags, "--eval.batch_size=2", "--eval.top_k_tokens_per_head=3,2,1"]) == 0
    assert json.loads((tmp_path / "tree" / "report.json").read_text())["tree"]["identical"] is True
    assert train.main(world.flags(tmp_path / "run", **changes | {"training__num_steps": 4})) == 0  # resumed
    texts = []
    for speculator in ([], [f"--speculator.path={tmp_path / 'run'}"]):
        capsys.readouterr()
        flags = [f"--base.path={hf_base}", "--base.arch=hf", "--generate.prompt=def count", "--generate.max_new_tokens=9"]
        assert generate.main([*flags, *speculator]) == 0
        texts.append(capsys.readouterr().out.split("\n\n")[0].splitlines()[0])
    assert texts[0] == texts[1]
    assert export.main([f"--speculator.path={tmp_path / 'run'}", f"--export.path={tmp_path / 'again'}"]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path / "run" / "export"))
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("hf_base", ["gpt_neox"], indirect=True)
def test_two_processes_shard_it_and_train_as_one(world, hf_base, tmp_path):
    changes = NO_END | {"base__path": hf_base, "base__arch": "hf", "training__compute_dtype": "float64", "training__num_steps": 3}
    changes |= {"metrics__report_interval": 1, "training__micro_batch_size": 1, "objective__loss": "kl_div"}
    changes |= {"stage2__start_step": 2, "stage2__prompt_length": 4, "stage2__seq_length": 9}
    assert train.main(world.flags(tmp_path / "one", **changes)) == 0
    processes.train_in_ranks(2, world.flags(tmp_path / "two", **changes, parallelism__sharding_strategy="fsdp"), tmp_path / "output")
    ours, theirs = (losses(tmp_path / folder) for folder in ("two", "one"))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_a_loop_over_transformers_itself_gives_the_same_losses(world, hf_base, tmp_path):
    changes = NO_END | {"base__path": hf_base, "base__arch": "hf", "training__compute_dtype": "float32", "training__num_steps": 2}
    changes |= {"metrics__report_interval": 1}
    _, values = plain_training(world.flags(tmp_path, **changes), base_of=lambda path: Untouched(path))
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    torch.testing.assert_close(losses(tmp_path / "run").sum(1), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=0)


class Untouched(torch.nn.Module):
    """transformers' model as it comes: a document at a time, its last hidden state."""

    def __init__(self, path: Path):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float64)
        sizes = self.model.config
        self.config = SimpleNamespace(hidden_size=sizes.hidden_size, vocab_size=sizes.vocab_size)

    def forward(self, tokens: torch.Tensor) -> BaseStates:
        return BaseStates(self.model(tokens, output_hidden_states=True).hidden_states[-1].double())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base__freeze": "false"}, "base.freeze = false"),
        ({"compile__enabled": "true"}, "compile.enabled = true"),
        ({"base__variant": "7b"}, "base.variant = '7b'"),
        ({"parallelism__sharding_strategy": "tp", "parallelism__tp_size": 2}, "tensor parallelism"),
    ],
)
def test_what_transformers_models_cannot_do_is_said_before_weights_load(world, capsys, tmp_path, changes, message):
    flags = world.flags(tmp_path / "run", base__arch="hf", base__path=tmp_path / "nothing is here", **changes)
    assert train.main(flags) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and f'{message} with base.arch = "hf"' in line


def test_logits_that_are_capped_are_no_teacher(world, hf_base, capsys, tmp_path):
    changes = NO_END | {"base__path": hf_base, "base__arch": "hf", "objective__loss": "kl_div", "training__num_steps": 1}
    assert train.main(world.flags(tmp_path / "run", **changes)) == (0 if hf_base.name == "gpt_neox" else 2)
    assert ("scales, caps or biases its logits" in capsys.readouterr().err) == (hf_base.name == "gemma2")
