"""The export program, on checkpoints and folders, in the process; no training run is needed to have one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectitan.config.sections import Base, Objective, SpeculatorSelection
from spectitan.export import main
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.weights import fingerprint, save_hf
from spectitan.speculators.base import Speculator
from spectitan.speculators.mlp import MlpConfig
from spectitan.speculators.registry import build_speculator
from spectitan.speculators.serving import load_speculator
from spectitan.training.checkpoint import Checkpointer, module_tensors

CONFIG = LlamaConfig(vocab_size=43, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, max_position_embeddings=32)


@pytest.fixture
def base(tmp_path) -> EmbedLLaMA:
    """A base, also in Hugging Face layout at tmp_path / base."""
    model = EmbedLLaMA(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(model, tmp_path / "base", torch.float32)
    return model


def save_run(
    folder: Path, base_path: Path, trained: torch.nn.ModuleDict, type: str, config: MlpConfig, freeze: bool, step: int = 3
) -> Path:
    """A checkpoint as the trainer writes it, with the keys of its run."""
    tables = {
        "base": dataclasses.asdict(Base(path=str(base_path), freeze=freeze)),
        "speculator": dataclasses.asdict(config) | dataclasses.asdict(SpeculatorSelection(type=type)),
        "objective": dataclasses.asdict(Objective()),
    }
    keys = {f"{table}.{name}": value for table, values in tables.items() for name, value in values.items()}
    keys["base.identity"] = fingerprint(base_path)
    return Checkpointer(folder / "checkpoints").save(step, module_tensors(trained), {"identity": keys})


def make_speculator(seed: int = 1, **keys) -> tuple[Speculator, MlpConfig]:
    config = MlpConfig(speculator_width=8, **keys)
    speculator = build_speculator("mlp", config, CONFIG, Objective())
    speculator.init_weights(torch.Generator().manual_seed(seed))
    return speculator, config


def run_of_speculator(tmp_path: Path, name: str = "run", seed: int = 1, step: int = 3) -> tuple[Path, Speculator]:
    speculator, config = make_speculator(seed, n_speculator_heads=4, scale_input=False)
    checkpoint = save_run(
        tmp_path / name, tmp_path / "base", torch.nn.ModuleDict({"speculator": speculator}), "mlp", config, freeze=True, step=step
    )
    return checkpoint, speculator


def same(folder: Path, speculator: Speculator) -> bool:
    again = load_speculator(folder, CONFIG).state_dict()
    return all(torch.equal(again[name], tensor) for name, tensor in speculator.state_dict().items())


def test_checkpoint_dump_folder_and_folder_give_the_same_bytes(tmp_path, base, capsys):
    run_of_speculator(tmp_path, seed=9, step=1)  # an older one: the newest is taken
    checkpoint, speculator = run_of_speculator(tmp_path)
    outputs = []
    for number, source in enumerate([checkpoint, tmp_path / "run", tmp_path / "run" / "checkpoints", tmp_path / "out0"]):
        target = tmp_path / f"out{number}"
        # The run knows its base; an exported folder does not hold it.
        base_path = ["--base.path", str(tmp_path / "base")] if source.name == "out0" else []
        assert main(["--speculator.path", str(source), "--export.path", str(target), *base_path]) == 0
        outputs.append({file.name: file.read_bytes() for file in target.iterdir()})
        printed = capsys.readouterr().out
        served = tmp_path / "base"
        assert f'vllm serve {served} --speculative-config \'{{"model": "{target}", "num_speculative_tokens": 4}}\'' in printed
    assert outputs.count(outputs[0]) == 4
    assert same(tmp_path / "out0", speculator)
    assert load_speculator(tmp_path / "out0", CONFIG).steps == 4


def test_by_config_file(tmp_path, base, capsys):
    _, speculator = run_of_speculator(tmp_path)
    config_file = tmp_path / "run.toml"
    config_file.write_text(
        f'[job]\ndump_folder = "{tmp_path / "run"}"\n[base]\npath = "{tmp_path / "base"}"\n[export]\nbase_name = "org/base-1b"\n'
    )
    assert main(["--job.config_file", str(config_file)]) == 0
    assert same(tmp_path / "run" / "export", speculator)
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["base_model_name_or_path"] == "org/base-1b"


def test_formats_and_what_is_said_of_them(tmp_path, base, capsys):
    """From one format to the other, by the program; the command carries the base's path, the folder its name and no path of this machine."""
    checkpoint, speculator = run_of_speculator(tmp_path)
    source, arguments = checkpoint, ["--base.path", str(tmp_path / "base")]
    for format, command in (
        ("arctic", 'ARCTIC_INFERENCE_ENABLED=1 vllm serve {} --speculative-config \'{{"method": "arctic", "model": "{}", '),
        ("verl", ""),
        ("mlp_speculator", 'VLLM_USE_V1=0 vllm serve {} --speculative-config \'{{"model": "{}", '),
    ):
        target = tmp_path / format
        assert main(["--speculator.path", str(source), "--export.path", str(target), "--export.format", format, *arguments]) == 0
        printed = capsys.readouterr().out
        readme = (target / "README.md").read_text()
        assert command.format(tmp_path / "base", target) in printed and command.format("base", ".") in readme
        assert ("vllm serve" in printed) == ("vllm serve" in readme) == bool(command)
        written = b"".join(file.read_bytes() for file in target.iterdir())
        assert str(tmp_path).encode() not in written and same(target, speculator)
        source = target
    name = ["--export.base_name", "/models/base", "--export.format", "arctic", "--export.path", str(tmp_path / "named")]
    assert main(["--speculator.path", str(source), *arguments, *name]) == 0
    assert "vllm serve /models/base" in (tmp_path / "named" / "README.md").read_text()


def test_a_trained_base_in_hugging_face_layout(tmp_path, base, capsys):
    trained = EmbedLLaMA(CONFIG)
    trained.init_weights(torch.Generator().manual_seed(5))
    save_run(tmp_path / "run", tmp_path / "base", torch.nn.ModuleDict({"base": trained}), "none", MlpConfig(), freeze=False)
    arguments = ["--speculator.path", str(tmp_path / "run"), "--export.path", str(tmp_path / "hf")]
    assert main(arguments) == 0  # auto: there is no speculator
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9))
    with torch.no_grad():
        expected = trained.bfloat16().float()
        logits = expected.readout.logits(expected(tokens).final)
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert main([*arguments, "--export.format", "mlp_speculator"]) == 2
    assert "holds a base and no speculator" in capsys.readouterr().err


def test_mistakes(tmp_path, base, capsys):
    checkpoint, _ = run_of_speculator(tmp_path)

    def mistake(*arguments: str, path: str = "out") -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([*arguments, "--export.path", str(tmp_path / path)]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1, captured.err
        return captured.err

    assert "no such folder" in mistake("--speculator.path", str(tmp_path / "nothing"))
    line = mistake("--speculator.path", str(checkpoint), path="base/config.json")
    assert line.startswith(f"spectitan.export: export.path = '{tmp_path}/base/config.json': ") and line.endswith("it is no folder\n")
    assert "no checkpoint" in mistake("--speculator.path", str(tmp_path / "base" / ".."))
    assert "architectures" in mistake("--speculator.path", str(tmp_path / "base"), "--base.path", str(tmp_path / "base"))
    assert 'export.format = "hf"' in mistake("--speculator.path", str(checkpoint), "--export.format", "hf")
    assert 'export.format = "none"' in mistake("--speculator.path", str(checkpoint), "--export.format", "none")
    assert "speculator.path is empty" in mistake("--base.path", str(tmp_path / "base"))

    save_hf(EmbedLLaMA(dataclasses.replace(CONFIG, vocab_size=47)), tmp_path / "other", torch.float32)
    line = mistake("--speculator.path", str(checkpoint), "--base.path", str(tmp_path / "other"))
    assert "emb.0.weight" in line and "[43, 8]" in line and "[47, 8]" in line
    assert main(["--speculator.path", str(checkpoint), "--export.path", str(tmp_path / "draft")]) == 0
    capsys.readouterr()
    assert "base.path is empty" in mistake("--speculator.path", str(tmp_path / "draft"))
    line = mistake("--speculator.path", str(tmp_path / "draft"), "--base.path", str(tmp_path / "other"))
    assert "vocabulary 43; this base has 16 and 47" in line

    for file in checkpoint.iterdir():
        if file.suffix == ".distcp":
            file.write_bytes(file.read_bytes()[:-1])
    assert "broken" in mistake("--speculator.path", str(checkpoint))
    assert "broken" in mistake("--speculator.path", str(tmp_path / "run")).replace("are broken", "broken")


def test_the_base_is_not_written_over(tmp_path, base, capsys):
    checkpoint, _ = run_of_speculator(tmp_path)
    speculator, config = make_speculator()
    parts = torch.nn.ModuleDict({"speculator": speculator, "base": base})
    joint = save_run(tmp_path / "joint", tmp_path / "base", parts, "mlp", config, freeze=False)
    files = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    (tmp_path / "name_base").symlink_to(tmp_path / "base")
    for source, target, *more in (
        (checkpoint, "base"),
        (checkpoint, "name_base"),
        (joint, "base", "--export.format", "hf"),
        (joint, "name"),
    ):
        assert main(["--speculator.path", str(source), "--export.path", str(tmp_path / target), *more]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1 and "is the base's own folder" in captured.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == files and not (tmp_path / "name").exists()
    assert main(["--speculator.path", str(checkpoint), "--export.path", str(tmp_path / "name")]) == 0  # a frozen one is not written


def test_started_as_a_program(tmp_path):
    command = [sys.executable, "-m", "spectitan.export", "--speculator.path", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == f"spectitan.export: speculator.path = '{tmp_path / 'nothing'}': no such folder\n"
