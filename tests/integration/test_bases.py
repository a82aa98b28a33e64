"""Every family of bases but Llama, through whole programs: it drafts, is evaluated, exported and trained."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectitan import evaluate, export, generate, train
from spectitan.models.gpt_bigcode import EmbedGPTBigCode, GPTBigCodeConfig
from spectitan.models.mixtral import EmbedMixtral, MixtralConfig
from spectitan.models.registry import get_model
from spectitan.models.weights import fingerprint, save_hf
from spectitan.training.checkpoint import read_tensors
from tests.integration import tiny
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
