"""speculator.path in training: it starts from the weights there, with their keys; and another base is refused everywhere."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan import evaluate, export, generate, train
from spectitan.distributed import utils
from spectitan.models.llama import EmbedLLaMA
from spectitan.models.weights import fingerprint, save_hf
from spectitan.trained import open_checkpoint
from spectitan.training.checkpoint_reading import read_state, read_tensors
from tests.integration import tiny
from tests.integration.tiny import assert_same_training, checkpoint

QUICK = {"eval__at_end": "false", "eval__prompts": "none", "export__format": "none", "lr_scheduler__type": "constant"}
KEYS = {"n_speculator_heads": 4, "speculator_width": 17, "scale_input": "false"}
FORMATS = {"mlp": ("mlp_speculator", "arctic", "verl"), "lstm": ("arctic", "verl")}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tiny.Tiny:
    """Also base2/, another base of the same shape with the same tokenizer."""
    world = tiny.make(tmp_path_factory.mktemp("tiny"))
    other = EmbedLLaMA(tiny.CONFIG)
    other.init_weights(torch.Generator().manual_seed(1))
    save_hf(other, world.root / "base2", torch.float32, tokenizer_files_from=world.root / "tokenizer")
    return world


@pytest.fixture(scope="module", params=FORMATS)
def source(world, request) -> tuple[str, Path]:
    """speculator.type, and a run that trained one, with keys that are not the defaults."""
    folder = world.root / request.param
    keys = {f"speculator__{name}": value for name, value in KEYS.items()}
    assert train.main(world.flags(folder, **QUICK, **keys, speculator__type=request.param, training__num_steps=2)) == 0
    return request.param, folder


def flags(world: tiny.Tiny, folder: Path, **changes) -> list[str]:
    """As Tiny.flags, which sets a width that the trained ones have not."""
    return [flag for flag in world.flags(folder, **QUICK, **changes) if not flag.startswith("--speculator.speculator_width=20")]


def exported(source: Path, folder: Path, format: str, *more: str) -> Path:
    assert export.main(["--speculator.path", str(source), "--export.path", str(folder), "--export.format", format, *more]) == 0
    return folder


def test_all_ranks_start_from_what_rank_0_has_found(world, source, tmp_path, monkeypatch):
    """Of a run that still goes on another rank may find a newer checkpoint: this one, to which rank 0 says what it has found."""
    _, run = source
    assert train.main(flags(world, tmp_path / "run", speculator__path=run, training__num_steps=3, checkpoint__interval=2)) == 0
    first, newest = (open_checkpoint(checkpoint(tmp_path / "run", step)) for step in (2, 3))
    monkeypatch.setattr(utils, "broadcast", lambda value: first if value == newest else value)
    for name, path in (("told", tmp_path / "run"), ("given", first.path)):
        assert train.main(flags(world, tmp_path / name, speculator__path=path, training__num_steps=1)) == 0
    assert_same_training(tmp_path / "told", tmp_path / "given", 1)


def test_every_source_starts_the_same_training(world, source, tmp_path):
    """A dump_folder, one checkpoint, and a folder of each format; the family and its keys are taken from it."""
    type, run = source
    sources = [run, checkpoint(run, 2), *(exported(run, tmp_path / format, format) for format in FORMATS[type])]
    for number, path in enumerate(sources):
        assert train.main(flags(world, tmp_path / f"run{number}", speculator__path=path, training__num_steps=3)) == 0
        assert_same_training(tmp_path / "run0", tmp_path / f"run{number}", 3)
    state = read_state(checkpoint(tmp_path / "run0", 3))
    assert state["position"] == 3 * 4  # from the first sample on
    assert state["identity"]["speculator.type"] == type and state["identity"]["speculator.n_speculator_heads"] == 4
    assert {"type": type, **KEYS}.items() <= (read_toml(tmp_path / "run0") | {"scale_input": "false"}).items()
    started = read_tensors(checkpoint(tmp_path / "run0", 3), "optimizer.")
    assert all(tensor.item() == 3 for name, tensor in started.items() if name.endswith("step"))


def read_toml(run: Path) -> dict:
    lines = (run / "config.toml").read_text().partition("[speculator]\n")[2].partition("[")[0].splitlines()
    return {name: json.loads(value) for name, _, value in (line.partition(" = ") for line in lines if line)}


def test_it_starts_from_those_weights(world, source, tmp_path):
    """A step too small to change a bit leaves them as they were."""
    _, run = source
    assert train.main(flags(world, tmp_path / "run", speculator__path=run, training__num_steps=1, optimizer__lr=1e-30)) == 0
    before, after = (read_tensors(path, "speculator.") for path in (checkpoint(run, 2), checkpoint(tmp_path / "run", 1)))
    assert before.keys() == after.keys() and all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_stopped_run_goes_on_though_the_source_has_vanished(world, source, tmp_path):
    _, run = source
    shutil.copytree(run, tmp_path / "source")
    for folder, steps in (("whole", 5), ("parts", 3)):
        assert train.main(flags(world, tmp_path / folder, speculator__path=tmp_path / "source", training__num_steps=steps)) == 0
    shutil.rmtree(tmp_path / "source")
    assert train.main(flags(world, tmp_path / "parts", speculator__path=tmp_path / "source", training__num_steps=5)) == 0
    assert_same_training(tmp_path / "whole", tmp_path / "parts", 5)
    # So does the resolved configuration that it wrote.
    assert train.main([f"--job.config_file={tmp_path / 'parts' / 'config.toml'}", "--training.num_steps=6"]) == 0
    assert read_state(checkpoint(tmp_path / "parts", 6))["step"] == 6


def test_keys_that_agree_may_be_given(world, source, tmp_path):
    type, run = source
    given = {"speculator__type": type, "speculator__n_speculator_heads": 4, "speculator__speculator_width": -1}
    assert train.main(flags(world, tmp_path / "run", speculator__path=run, training__num_steps=1, **given)) == 0


@pytest.fixture
def refused(world, capsys):
    return lambda flags, program=train: tiny.refusal(program, flags, capsys, world.root)


def test_keys_that_contradict_the_source(world, source, tmp_path, refused):
    type, run = source
    other = {"mlp": "lstm", "lstm": "mlp"}[type]
    for name, value, theirs in (
        ("n_speculator_heads", 3, "has 4"),
        ("speculator_width", 16, "has 17"),
        ("scale_input", "true", "has false"),
        ("type", other, f'has "{type}"'),
        ("inner_dim", "17.19", "has -1"),
    ):
        line = refused(flags(world, tmp_path / "run", speculator__path=run, **{f"speculator__{name}": value}))
        assert f"speculator.{name} = " in line and theirs in line, line
    assert not (tmp_path / "run").exists()


def test_mistakes(world, source, tmp_path, refused):
    type, run = source
    path = f"--speculator.path={run}"
    line = refused([*flags(world, tmp_path / "run"), path, f"--checkpoint.load_path={run}"])
    assert "speculator.path" in line and "checkpoint.load_path" in line
    assert "speculator.path" in refused([*flags(world, run, checkpoint__resume="never"), path])
    assert 'speculator.type = "none"' in refused([*flags(world, tmp_path / "run", speculator__type="none", base__freeze="false"), path])
    assert "no such folder" in refused(flags(world, tmp_path / "run", speculator__path=tmp_path / "nowhere"))
    format = FORMATS[type][0]
    folder = exported(run, tmp_path / "draft", format)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "head.0" not in name}, folder / "model.safetensors")
    assert "head.0.weight" in refused(flags(world, tmp_path / "run", speculator__path=folder))
    (folder / "config.json").write_text("{}")
    assert "architectures" in refused(flags(world, tmp_path / "run", speculator__path=folder))
    assert not (tmp_path / "run").exists()


def test_a_format_that_cannot_hold_it_is_refused_before_training(world, tmp_path, refused):
    for changes, key in (
        ({"speculator__inner_dim": "20.9"}, "speculator.inner_dim = 20.9"),
        ({"speculator__type": "lstm", "speculator__tie_lstm_embs": "false"}, "speculator.tie_lstm_embs = false"),
    ):
        line = refused([*world.flags(tmp_path / "run", **changes), "--export.format=arctic"])
        assert 'export.format = "arctic"' in line and key in line
    line = refused(world.flags(tmp_path / "run", speculator__type="lstm", export__format="mlp_speculator"))
    assert 'export.format = "mlp_speculator" with speculator.type = "lstm"' in line
    assert not (tmp_path / "run").exists()


# ---- another base ----


def programs(world: tiny.Tiny, path: Path, tmp_path: Path, base: str, *more: str) -> list[tuple]:
    """Every program that takes a trained speculator, with its flags for a base."""
    common = [f"--base.path={world.root / base}", f"--speculator.path={path}", f"--job.dump_folder={tmp_path / 'out'}", *more]
    measured = [
        f"--eval.prompts={world.root / 'prompts.jsonl'}",
        "--eval.max_new_tokens=2",
        "--eval.num_prompts=1",
        "--eval.speed_prompts=1",
    ]
    return [
        (train, [*flags(world, tmp_path / "tuned", training__num_steps=1), *common, f"--job.dump_folder={tmp_path / 'tuned'}"]),
        (evaluate, [*common, *measured]),
        (generate, [*common, "--generate.prompt=def", "--generate.max_new_tokens=2"]),
        (export, [*common, f"--export.path={tmp_path / 'again'}"]),
    ]


@pytest.mark.parametrize("kind", ["checkpoint", "folder"])
def test_another_base_is_refused_unless_it_is_allowed(world, source, tmp_path, refused, kind):
    type, run = source
    path = run if kind == "checkpoint" else exported(run, tmp_path / "draft", FORMATS[type][-1])
    for program, line in programs(world, path, tmp_path, "base2"):
        message = refused(line, program)
        assert "trained for another base" in message and "base.allow_other" in message, message
    assert not (tmp_path / "tuned").exists() and not (tmp_path / "again").exists()
    for program, line in programs(world, path, tmp_path, "base2", "--base.allow_other"):
        assert program.main(line) == 0
    # What it was trained for stays on record.
    recorded = json.loads((tmp_path / "again" / "config.json").read_text())
    assert recorded["base_fingerprint"] == fingerprint(world.root / "base") != fingerprint(world.root / "base2")
    assert recorded["base_model_name_or_path"] == "base2"


def test_a_folder_that_says_nothing_of_its_base_goes_with_any_of_its_shape(world, source, tmp_path):
    type, run = source
    folder = exported(run, tmp_path / "draft", FORMATS[type][0])
    content = json.loads((folder / "config.json").read_text())
    del content["base_fingerprint"]
    (folder / "config.json").write_text(json.dumps(content))
    for program, line in programs(world, folder, tmp_path, "base2"):
        assert program.main(line) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_fingerprint"] == fingerprint(world.root / "base2")


def test_a_run_goes_on_with_another_base_only_if_it_is_allowed(world, source, tmp_path, refused):
    type, run = source
    shutil.copytree(run, tmp_path / "run")
    keys = {f"speculator__{name}": value for name, value in KEYS.items()} | {"speculator__type": type}
    line = world.flags(tmp_path / "run", **QUICK, **keys, base__path=world.root / "base2", training__num_steps=3)
    assert "base.identity was" in refused(line) and "base.allow_other" in refused(line)
    assert train.main([*line, "--base.allow_other"]) == 0
    assert read_state(checkpoint(tmp_path / "run", 3))["identity"]["base.identity"] == fingerprint(world.root / "base2")


def test_a_speculator_trained_with_its_base_belongs_to_that_one(world, tmp_path, refused):
    """Not to the base that the run started from."""
    joint = {"base__freeze": "false", "training__num_steps": 2}
    assert train.main(world.flags(tmp_path / "joint", **QUICK, **joint)) == 0
    folder = exported(tmp_path / "joint", tmp_path / "draft", "arctic")
    trained = exported(tmp_path / "joint", tmp_path / "trained", "hf")
    shutil.copy(world.root / "base" / "tokenizer.json", trained)
    prompt = ["--generate.prompt=def", "--generate.max_new_tokens=2"]
    assert generate.main([f"--speculator.path={tmp_path / 'joint'}", *prompt]) == 0  # both from the checkpoint
    assert generate.main([f"--speculator.path={folder}", f"--base.path={trained}", *prompt]) == 0
    for path in (folder, tmp_path / "joint"):
        assert (
            train.main(flags(world, tmp_path / f"from_{path.name}", speculator__path=path, base__path=trained, training__num_steps=1)) == 0
        )
        line = refused(flags(world, tmp_path / "run", speculator__path=path, training__num_steps=1))
        assert "trained for another base" in line, line
    assert_same_training(tmp_path / "from_draft", tmp_path / "from_joint", 1)
