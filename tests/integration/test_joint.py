"""Base and speculator trained together: against the base alone, bit for bit, and against a plain loop."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectitan import evaluate, export, train
from spectitan.config.manager import load
from spectitan.data.loader import build_loader
from spectitan.data.tokenizer import load_tokenizer
from spectitan.models.llama import EmbedLLaMA
from spectitan.models.registry import get_model
from spectitan.models.weights import fingerprint
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_speculator
from spectitan.training.checkpoint_reading import read_tensors
from spectitan.training.schedule import learning_rate_multiplier
from tests.integration import processes, tiny
from tests.integration.test_train import NO_END, documents_of, lines, plain_loss

JOINT = {"base__freeze": "false", "training__max_grad_norm": 0.3, "metrics__report_interval": 1, "checkpoint__keep_latest_k": 0}
STEPS = 7


@pytest.fixture(scope="module", params=["random", "pretrained"])
def alone(world, request) -> tuple[str, Path]:
    """base.init, and the run of a base without a speculator."""
    folder = world.root / f"alone_{request.param}"
    assert train.main(world.flags(folder, **JOINT, **NO_END, speculator__type="none", base__init=request.param)) == 0
    return request.param, folder


@pytest.fixture(scope="module")
def joint(world) -> Path:
    """A joint run of a pretrained base whose gradient does reach the base, evaluated on the way and at the end, and exported."""
    changes = JOINT | {"training__detach_states": "false", "eval__interval": 4, "optimizer__base_lr": 0.004}
    assert train.main(world.flags(world.root / "joint", **changes)) == 0
    return world.root / "joint"


def test_in_bfloat16_masters_stay_float32_and_losses_near_those_of_float32(world, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = tmp_path / dtype
        assert train.main(world.flags(run, **JOINT, **NO_END, training__compute_dtype=dtype, training__detach_states="false")) == 0
        losses[dtype] = torch.tensor([[*report["loss"], report["base_loss"]] for report in tiny.learned(run)])
        assert {tensor.dtype for tensor in read_tensors(tiny.checkpoint(run, STEPS)).values()} == {torch.float32}
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0)
    assert not torch.equal(losses["bfloat16"], losses["float32"])


def of_base(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Its weights, and its optimizer's state."""
    tensors = read_tensors(tiny.checkpoint(run, step))
    return {name: tensor for name, tensor in tensors.items() if name.removeprefix("optimizer.").startswith("base.")}


@pytest.mark.parametrize(
    "changes",
    [
        {"training__detach_states": "true"},
        {"speculator__type": "lstm", "objective__loss": "kl_div", "training__speculator_loss_coeff": 0.5},
        {"training__detach_states": "false", "training__speculator_loss_coeff": 0},
        {"training__detach_states": "false", "training__speculator_loss_coeff": 0, "objective__loss": "kl_div"},
    ],
    ids=["detached", "detached_lstm_kl", "coefficient_0", "coefficient_0_kl"],
)
def test_a_speculator_leaves_the_base_as_it_is_alone_bit_for_bit(world, alone, tmp_path, changes):
    init, folder = alone
    assert train.main(world.flags(tmp_path / "run", **JOINT, **NO_END, **changes, base__init=init)) == 0
    for step in (3, 6, STEPS):
        ours, theirs = of_base(tmp_path / "run", step), of_base(folder, step)
        assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), (step, name)
    for report, of_alone in zip(tiny.learned(tmp_path / "run"), tiny.learned(folder), strict=True):
        assert [report[f"base_{name}"] for name in ("loss", "accuracy", "grad_norm", "lr")] == [
            of_alone["loss"][0], of_alone["accuracy"][0], of_alone["grad_norm"], of_alone["lr"]
        ]  # fmt: skip
        assert report["grad_norm"] > 0 or changes.get("training__speculator_loss_coeff") == 0
    first, last = (read_tensors(tiny.checkpoint(tmp_path / "run", step), "speculator.") for step in (3, STEPS))
    assert all(not torch.equal(tensor, last[name]) for name, tensor in first.items() if tensor.dim() == 2)  # of coefficient 0: decay


def plain_joint_training(flags: list[str]) -> tuple[dict, list[list[float]]]:
    """The trained parameters and each step's two losses, by autograd, torch.optim.AdamW and torch's clipping, in float64."""
    config = load(flags, "train", SPECULATOR_CONFIGS)
    base = get_model("embedllama", "auto", config.base.path, dtype=torch.float32).double()
    speculator = build_speculator("mlp", config.speculator, base.config, config.objective)
    speculator.init_weights(torch.Generator().manual_seed(config.job.seed))
    speculator.double()
    groups = []
    for part, peak in ((base, config.optimizer.base_lr), (speculator, config.optimizer.lr)):
        for dim, decay in ((2, config.optimizer.weight_decay), (1, 0.0)):
            groups.append({"params": [p for p in part.parameters() if p.dim() == dim], "weight_decay": decay, "lr": peak, "peak": peak})
    optimizer = torch.optim.AdamW(groups, betas=tuple(config.optimizer.betas), eps=config.optimizer.eps)
    tokenizer = load_tokenizer(config.base.path)
    loader = build_loader(config.data, tokenizer, seed=config.job.seed, global_batch_size=4, micro_batch_size=4)
    losses = []
    for step in range(config.training.num_steps):
        batch = next(loader)
        lengths = [len(tokens) for _, tokens in documents_of(batch)]
        counts = [sum(max(0, length - 1 - distance) for length in lengths) for distance in range(4)]
        base_loss = plain_loss(base, None, batch, counts[:1], 1)
        states = (lambda tokens: base(tokens).detach()) if config.training.detach_states else base
        speculator_loss = plain_loss(states, speculator, batch, counts[1:], 3)
        optimizer.zero_grad()
        (base_loss + config.training.speculator_loss_coeff * speculator_loss).backward()
        for part in (base, speculator):
            torch.nn.utils.clip_grad_norm_(part.parameters(), config.training.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_multiplier(step, config.training.num_steps, config.lr_scheduler)
        optimizer.step()
        losses.append([base_loss.item(), speculator_loss.item()])
    parameters = {f"base.{name}": parameter.data for name, parameter in base.named_parameters()}
    return parameters | {f"speculator.{name}": parameter.data for name, parameter in speculator.named_parameters()}, losses


@pytest.mark.parametrize("detach, micro_batch_size, packing", [("true", 4, "concat"), ("false", 1, "concat"), ("false", 2, "document")])
def test_joint_training_equals_a_plain_loop(world, tmp_path, detach, micro_batch_size, packing):
    changes = JOINT | NO_END | {"training__compute_dtype": "float64", "training__num_steps": 3, "training__detach_states": detach}
    changes |= {"training__speculator_loss_coeff": 0.7, "optimizer__base_lr": 0.003, "optimizer__weight_decay": 0.6}
    changes |= {"training__micro_batch_size": micro_batch_size, "data__packing": packing}
    if packing == "document":  # of short ones: rows are mostly padding
        changes |= {"data__path": lines(world, tmp_path)}
    flags = world.flags(tmp_path / "run", **changes)
    expected, losses = plain_joint_training(flags)
    assert train.main(flags) == 0
    reports = tiny.reports(tmp_path / "run")
    found = torch.tensor([[report["base_loss"], sum(report["loss"])] for report in reports], dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=0)
    saved = read_tensors(tiny.checkpoint(tmp_path / "run", 3))
    assert {name for name in saved if not name.startswith("optimizer.")} == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    assert reports[-1]["base_lr"] / reports[-1]["lr"] == pytest.approx(0.3)


def test_the_base_runs_once_a_micro_batch(world, tmp_path, monkeypatch):
    calls, forward = [], EmbedLLaMA.forward
    monkeypatch.setattr(EmbedLLaMA, "forward", lambda self, *args, **keywords: (calls.append(1), forward(self, *args, **keywords))[1])
    changes = JOINT | NO_END | {"training__num_steps": 2, "objective__loss": "kl_div"}
    assert train.main(world.flags(tmp_path / "run", **changes)) == 0
    assert len(calls) == 2 * 2


def test_activations_computed_again_change_no_bit(world, tmp_path):
    """In bfloat16, where FSDP wraps the blocks on one process too."""
    changes = JOINT | NO_END | {"training__compute_dtype": "bfloat16", "training__num_steps": 3, "training__detach_states": "false"}
    assert train.main(world.flags(tmp_path / "kept", **changes)) == 0
    assert train.main(world.flags(tmp_path / "again", **changes, base__activation_checkpointing="true")) == 0
    tiny.assert_same_training(tmp_path / "again", tmp_path / "kept", 3)
    exact = JOINT | NO_END | {"training__compute_dtype": "float64", "training__num_steps": 3, "training__detach_states": "false"}
    assert train.main(world.flags(tmp_path / "exact", **exact)) == 0
    for ours, theirs in zip(tiny.reports(tmp_path / "again"), tiny.reports(tmp_path / "exact"), strict=True):
        assert [ours["base_loss"], *ours["loss"]] == pytest.approx([theirs["base_loss"], *theirs["loss"]], rel=0.03)


# ---- the rest of a run ----


def test_killed_and_continued_it_ends_as_if_nothing_had_been(world, joint, tmp_path):
    changes = JOINT | NO_END | {"training__detach_states": "false", "optimizer__base_lr": 0.004}
    flags = world.flags(tmp_path / "run", **changes)
    processes.run_killed("train", flags, tmp_path / "output", "spectitan.train", "step_if_finite", 6)
    assert [report["step"] for report in tiny.reports(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert train.main(flags) == 0
    tiny.assert_same_training(tmp_path / "run", joint, STEPS)
    assert tiny.learned(tmp_path / "run") == tiny.learned(joint)


def test_what_weighs_the_losses_may_change_and_what_is_trained_may_not(world, joint, tmp_path, caplog, capsys):
    caplog.set_level("INFO", logger="spectitan")
    changes = JOINT | NO_END | {"checkpoint__load_path": tiny.checkpoint(joint, 6)}
    changed = {"training__speculator_loss_coeff": 0.5, "optimizer__base_lr": 0.002, "base__activation_checkpointing": "true"}
    assert train.main(world.flags(tmp_path / "run", **changes, **changed)) == 0
    for line in (
        "training.speculator_loss_coeff: 1.0 -> 0.5",
        "training.detach_states: False -> True",
        "optimizer.base_lr: 0.004 -> 0.002",
    ):
        assert line in caplog.text
    line = tiny.refusal(train, world.flags(tmp_path / "other", **changes | {"base__freeze": "true"}), capsys, joint)
    assert "base.freeze was False in the checkpoint and is True now" in line


def test_evaluations_are_of_the_base_as_it_is_now(joint):
    """On the way by the modules in training, at the end by what the checkpoint holds."""
    (evaluation,) = [json.loads(line) for line in (joint / "evaluations.jsonl").read_text().splitlines()]
    assert evaluation["step"] == 4 and evaluation["acceptance_length"] >= 1
    assert {"base_heldout_loss", "base_heldout_accuracy", "heldout_loss/head_0", "heldout_loss/head_2"} <= evaluation.keys()
    report = json.loads((joint / "report.json").read_text())
    assert report["step"] == STEPS and report["identical"] is True
    # Three steps later the base has learned more, and at neither time was it what it began as.
    assert report["base_heldout_loss"] < evaluation["base_heldout_loss"] < tiny.reports(joint)[0]["base_loss"]


def test_what_was_trained_together_is_exported_together(world, joint, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(joint / "export_base", dtype=torch.float32)
    saved = read_tensors(tiny.checkpoint(joint, STEPS), "base.")
    torch.testing.assert_close(base.model.norm.weight.data, saved["readout.norm.weight"].bfloat16().float(), rtol=0, atol=0)
    config = json.loads((joint / "export" / "config.json").read_text())
    assert config["base_model_name_or_path"] == "export_base" and config["base_fingerprint"] == fingerprint(joint / "export_base")

    # The pair drafts and verifies, and the folder goes with no other base: not with the one that training began with.
    flags = [*world.flags(tmp_path / "out"), f"--speculator.path={joint / 'export'}"]
    assert evaluate.main([*flags, f"--base.path={joint / 'export_base'}"]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["identical"] is True
    capsys.readouterr()
    assert evaluate.main(flags) == 2
    assert "the speculator was trained for another base" in capsys.readouterr().err

    again = [f"--speculator.path={joint}", f"--export.path={tmp_path / 'again'}"]
    assert export.main(again) == 0
    assert f"vllm serve {tmp_path / 'again_base'} " in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again_base" / name).read_bytes() == (joint / "export_base" / name).read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (joint / "export" / "model.safetensors").read_bytes()
    for format, files in (("hf", "export_base"), ("mlp_speculator", "export")):
        assert export.main([f"--speculator.path={joint}", f"--export.path={tmp_path / format}", f"--export.format={format}"]) == 0
        assert (tmp_path / format / "model.safetensors").read_bytes() == (joint / files / "model.safetensors").read_bytes()
        assert not (tmp_path / f"{format}_base").exists()


def test_a_base_from_a_checkpoint_computes_as_its_run_did(world, joint, tmp_path, capsys):
    shutil.copytree(world.root / "base", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert evaluate.main([f"--speculator.path={joint}", f"--base.path={tmp_path / 'other'}"]) == 2
    assert "norm_eps = 0.5; the base in" in capsys.readouterr().err
