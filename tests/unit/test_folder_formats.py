"""Folders of every format, read without spectitan: names, shapes and logits are those of the format's definition."""

import json
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATORS, build_speculator
from spectitan.speculators.serving import choose_format, describe_folder, load_speculator, write_folder
from spectitan.types import BaseStates
from tests.unit.test_recurrent import FIXTURES, greedy

HIDDEN, VOCAB, WIDTH = 11, 29, 7
BASE = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)
LEVELS = {"emb_dim": "5.7", "proj_dim": "3.4.7", "inner_dim": "6.9"}


def make(type: str, seed: int = 0, **keys) -> Speculator:
    """One whose norms are not the identity."""
    config = SPECULATORS[type][0](**({"speculator_width": WIDTH} | keys))
    speculator = build_speculator(type, config, BASE, Objective())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(WIDTH))
    return speculator


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# ---- the formats in float64, by their names ----


def norm(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def alpha(n: int, width: int) -> float:
    state_weight = 0.5 ** (0.5 / n)
    return math.sqrt((1 - state_weight**2) * width / 2) / state_weight


def plain(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json, and the tensors in float64."""
    safe = folder / "model.safetensors"
    tensors = load_file(safe) if safe.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    return json.loads((folder / "config.json").read_text()), {name: tensor.double() for name, tensor in tensors.items()}


def first_state(config: dict, hidden: Tensor) -> Tensor:
    return norm(hidden) / math.sqrt(2) if config["scale_input"] else hidden


def sum_rnn(config: dict, tensors: dict[str, Tensor], hidden: Tensor, tokens: Tensor, name) -> Tensor:
    """Logits [steps, rows, vocab]; `name(kind, step, part)` is a tensor's name."""
    state, logits, weight = first_state(config, hidden), [], alpha(config["n_predict"], config["inner_dim"])
    for step in range(config["n_predict"]):
        total = state @ tensors[name("proj", step, "weight")].T + weight * tensors[name("emb", step, "weight")][tokens[step]]
        state = gelu(norm(total) * tensors[name("ln", step, "weight")] + tensors[name("ln", step, "bias")])
        logits.append(state @ tensors[name("head", step, "weight")].T)
    return torch.stack(logits)


def ibm_name(kind: str, step: int, part: str) -> str:
    return f"speculator.{kind}.{step}.{part}"


def arctic_name(tied: bool):
    """The names of ArcticLSTMSpeculatorPreTrainedModel with method sum_rnn."""

    def name(kind: str, step: int, part: str) -> str:
        if kind == "head":
            return f"head.{step}.weight"
        index = step if not tied else min(step, 1) if kind == "proj" else 0
        return f"{kind}.{index}.0.{part}"

    return name


def sum_lstm(config: dict, tensors: dict[str, Tensor], hidden: Tensor, tokens: Tensor) -> Tensor:
    """As ArcticInference reads it: the four projections fused, forget, input, output, cell; shared weights under their first name."""
    width, weight = config["proj_dim"], alpha(config["n_predict"], config["inner_dim"])
    gates = ("forget", "input", "output", "cell")
    projections = [torch.cat([tensors[f"{gate}_proj.{index}.weight"] for gate in gates]) for index in range(2)]
    embedding_of = dict.fromkeys(gates, "forget") if config["tie_lstm_embs"] else dict(zip(gates, gates))
    state, cell, logits = first_state(config, hidden), 0.0, []
    for step in range(config["n_predict"]):
        embedded = torch.cat([tensors[f"{embedding_of[gate]}_emb.0.weight"][tokens[step]] for gate in gates], -1)
        total = state @ projections[min(step, 1)].T + weight * embedded
        forget, input, output = total[:, : 3 * width].sigmoid().split(width, dim=-1)
        candidate = gelu(norm(total[:, 3 * width :]) * tensors["cell_ln.0.weight"] + tensors["cell_ln.0.bias"])
        cell = cell * forget + candidate * input
        state = gelu(norm(cell) * tensors["state_ln.0.weight"] + tensors["state_ln.0.bias"]) * output
        logits.append(state @ tensors["head.0.weight"].T)
    return torch.stack(logits)


def transcribed(folder: Path, hidden: Tensor, tokens: Tensor) -> Tensor:
    config, tensors = plain(folder)
    if config["architectures"] != ["ArcticLSTMSpeculatorPreTrainedModel"]:
        assert config["emb_dim"] == HIDDEN
        return sum_rnn(config, tensors, hidden, tokens, ibm_name)
    assert config["input_hidden_dim"] == HIDDEN
    if config["method"] == "sum_lstm":
        return sum_lstm(config, tensors, hidden, tokens)
    return sum_rnn(config, tensors, hidden, tokens, arctic_name(config["tie_weights"]))


CASES = [
    ("mlp", {}),
    ("mlp", {"tie_weights": False, "scale_input": False, "n_speculator_heads": 2}),
    ("mlp", {"tie_weights": False, "n_speculator_heads": 1}),
    ("lstm", {"n_speculator_heads": 5}),
    ("lstm", {"n_speculator_heads": 1, "scale_input": False}),
    ("lstm", {"tie_lstm_embs": False}),
]
WRITTEN = [
    (type, keys, format)
    for type, keys in CASES
    for format in SPECULATORS[type][1].formats
    if keys.get("tie_lstm_embs", True) or format == "verl"
]


@pytest.mark.parametrize(("type", "keys", "format"), WRITTEN)
def test_the_files_alone_give_the_same_logits(type, keys, format, tmp_path, base_path):
    speculator = make(type, **keys)
    write_folder(speculator, tmp_path / "draft", format, base_path)
    hidden, tokens = torch.randn(5, HIDDEN, dtype=torch.float64), torch.randint(0, VOCAB, (speculator.steps, 5))
    expected = transcribed(tmp_path / "draft", hidden, tokens)
    states = speculator.double().unroll(hidden, tokens)
    logits = torch.stack([speculator.head[min(step, len(speculator.head) - 1)](states[step]) for step in range(speculator.steps)])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("type", "keys", "format"), [*WRITTEN, *((type, keys | LEVELS, "verl") for type, keys in CASES), ("mlp", {"inner_dim": 9}, "verl")]
)
def test_a_folder_read_back_drafts_the_same_bits_and_is_written_in_the_same_bytes(type, keys, format, tmp_path, base_path):
    speculator = make(type, **keys)
    write_folder(speculator, tmp_path / "first", format, base_path, base_fingerprint="ab" * 32)
    again = load_speculator(tmp_path / "first", BASE)
    assert again.state_dict().keys() == speculator.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in speculator.state_dict().items())
    states, counts = BaseStates(torch.randn(4, 3, HIDDEN)), torch.tensor([1, 2, 3, 3])
    drafts = [
        each.draft(None, torch.ones(4, 3, dtype=torch.int64), states, counts, None, again.steps, greedy) for each in (speculator, again)
    ]
    assert torch.equal(drafts[0].tokens, drafts[1].tokens)
    assert describe_folder(tmp_path / "first").base_fingerprint == "ab" * 32
    write_folder(again, tmp_path / "second", format, base_path, base_fingerprint="ab" * 32)
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_names_and_config_of_arctic(tmp_path, base_path):
    """What ArcticInference's loader asks for: no prefix, one name for what is shared, single numbers."""
    write_folder(make("lstm"), tmp_path / "draft", "arctic", base_path, "org/base")
    config, tensors = plain(tmp_path / "draft")
    gates, norms = ("forget", "input", "cell", "output"), ("cell_ln.0", "state_ln.0")
    projections = {f"{gate}_proj.{index}.weight": [WIDTH, [HIDDEN, WIDTH][index]] for gate in gates for index in range(2)}
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == projections | {
        "forget_emb.0.weight": [VOCAB, WIDTH],
        "head.0.weight": [VOCAB, WIDTH],
        **{f"{norm}.{part}": [WIDTH] for norm in norms for part in ("weight", "bias")},
    }
    assert config == {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": VOCAB,
        "n_predict": 3,
        "top_k_tokens_per_head": [5, 4, 3],
        "n_candidates": 5,
        "tie_weights": True,
        "scale_input": True,
        "input_hidden_dim": HIDDEN,
        "emb_dim": WIDTH,
        "proj_dim": WIDTH,
        "inner_dim": WIDTH,
        "method": "sum_lstm",
        "tie_lstm_embs": True,
        "base_model_name_or_path": "org/base",
        "base_model_archs": ["Qwen2ForCausalLM"],
        "torch_dtype": "float32",
    }
    readme = (tmp_path / "draft" / "README.md").read_text()
    command = '{"method": "arctic", "model": ".", "num_speculative_tokens": 3}'
    assert f"    ARCTIC_INFERENCE_ENABLED=1 vllm serve org/base --speculative-config '{command}'\n" in readme


def test_arctic_of_an_mlp_is_ibms_layout_with_another_name(tmp_path, base_path):
    for format in ("mlp_speculator", "arctic"):
        write_folder(make("mlp"), tmp_path / format, format, base_path)
    (ibm, tensors), (arctic, same) = plain(tmp_path / "mlp_speculator"), plain(tmp_path / "arctic")
    assert arctic == ibm | {"architectures": ["ArcticMLPSpeculatorPreTrainedModel"]}
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[name], tensor) for name, tensor in same.items())


@pytest.mark.parametrize(("type", "keys"), [("mlp", {}), ("lstm", {}), ("lstm", {"tie_lstm_embs": False})])
def test_verl_holds_all_names_and_each_weight_once(type, keys, tmp_path, base_path):
    speculator = make(type, **keys)
    write_folder(speculator, tmp_path / "draft", "verl", base_path)
    assert sorted(files(tmp_path / "draft")) == ["README.md", "config.json", "pytorch_model.bin"]
    config, tensors = plain(tmp_path / "draft")
    heads = {f"head.{step}.weight" for step in range(3)}
    gates, norms = ("forget", "input", "cell", "output"), ("cell_ln.0", "state_ln.0")
    if type == "mlp":
        expected = {"emb.0.0.weight", "proj.0.0.weight", "proj.1.0.weight", "ln.0.0.weight", "ln.0.0.bias"} | heads
    else:
        expected = {f"{gate}_emb.0.weight" for gate in gates} | {f"{gate}_proj.{index}.weight" for gate in gates for index in range(2)}
        expected |= {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")} | heads
    assert tensors.keys() == expected
    assert config["method"] == {"mlp": "sum_rnn", "lstm": "sum_lstm"}[type]
    weights = 4 * sum(parameter.numel() for parameter in speculator.parameters())
    assert weights < (tmp_path / "draft" / "pytorch_model.bin").stat().st_size < weights + 10_000
    assert "vllm serve" not in (tmp_path / "draft" / "README.md").read_text()


def test_what_a_format_cannot_hold_is_refused_by_name():
    def refusal(speculator: Speculator, format: str) -> str:
        with pytest.raises(UserError) as error:
            choose_format(speculator, format)
        return str(error.value)

    levels, untied = make("mlp", **LEVELS), make("lstm", tie_lstm_embs=False)
    for format in ("mlp_speculator", "arctic"):
        assert refusal(levels, format).startswith(f'export.format = "{format}": speculator.emb_dim = 5.7;')
    assert "speculator.inner_dim = 9" in refusal(make("mlp", inner_dim=9), "mlp_speculator")
    assert "speculator.proj_dim = 4.7" in refusal(make("lstm", proj_dim="4.7"), "arctic")
    assert "speculator.tie_lstm_embs = false" in refusal(untied, "arctic")
    line = 'export.format = "mlp_speculator" with speculator.type = "lstm"; allowed: auto, arctic, verl'
    assert refusal(make("lstm"), "mlp_speculator") == line
    chosen = [choose_format(each, "auto") for each in (make("mlp"), make("lstm"), levels, untied)]
    assert chosen == ["mlp_speculator", "arctic", "verl", "verl"]


def test_writing_another_format_leaves_no_old_weights(tmp_path, base_path):
    write_folder(make("lstm", seed=1), tmp_path / "draft", "arctic", base_path)
    (tmp_path / "draft" / "notes.txt").write_text("mine")
    write_folder(make("lstm", seed=2), tmp_path / "draft", "verl", base_path)
    assert sorted(files(tmp_path / "draft")) == ["README.md", "config.json", "notes.txt", "pytorch_model.bin"]
    assert torch.equal(load_speculator(tmp_path / "draft", BASE).head[0].weight, make("lstm", seed=2).head[0].weight)


# ---- folders of other writers ----


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def same_weights(folder: Path, speculator: Speculator) -> bool:
    again = load_speculator(folder, BASE).state_dict()
    return all(torch.equal(again[name], tensor) for name, tensor in speculator.state_dict().items())


def test_widths_as_other_systems_write_them(tmp_path, base_path):
    speculator = make("mlp")
    write_folder(speculator, tmp_path / "draft", "verl", base_path)
    for width in (str(WIDTH), [WIDTH], f"[{WIDTH}]"):
        change_config(tmp_path / "draft", emb_dim=width, proj_dim=width, inner_dim=width, method=...)
        assert same_weights(tmp_path / "draft", speculator)
    levels = make("mlp", **LEVELS)
    write_folder(levels, tmp_path / "draft", "verl", base_path)
    change_config(tmp_path / "draft", emb_dim=[5, 7], proj_dim="[3, 4, 7]")
    assert same_weights(tmp_path / "draft", levels)


@pytest.mark.parametrize("case", ["lstm_tied_embs", "lstm_untied_embs", "rnn_levels_tied", "rnn_levels_untied"])
def test_arctic_trainings_own_folder_gives_its_own_logits(case, tmp_path):
    """Weights under the names of its module, the config.json that it writes; no code of ours made them."""
    fixture = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(FIXTURES / "arctic_speculator.safetensors").items()}
    weights = {name.removeprefix("weights."): tensor.clone() for name, tensor in fixture.items() if name.startswith("weights.")}
    width, is_lstm = ("13", True) if case.startswith("lstm") else ("13.13", False)
    config = {
        "architectures": ["ArcticLSTMSpeculatorPreTrainedModel"],
        "base_model_name_or_path": "org/base",
        "input_hidden_dim": 19,
        **dict.fromkeys(("inner_dim", "proj_dim", "emb_dim"), width),
        "model_type": "mlp_speculator",
        "n_candidates": 3,
        "n_predict": 3,
        "scale_input": "untied" not in case,
        "tie_weights": not case.endswith("levels_untied"),
        "tie_lstm_embs": case == "lstm_tied_embs",
        "top_k_tokens_per_head": [1, 1, 1],
        "torch_dtype": "bfloat16",
        "vocab_size": 29,
        "method": "sum_lstm" if is_lstm else "sum_rnn",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    speculator = load_speculator(tmp_path, SimpleNamespace(hidden_size=19, vocab_size=29))
    after = torch.stack([fixture["inds"][:, step : step + 5].flatten() for step in range(3)])
    with torch.no_grad():
        states = speculator.unroll(fixture["state"].flatten(0, 1), after)
        logits = torch.stack([speculator.head[min(step, len(speculator.head) - 1)](states[step]) for step in range(3)])
    torch.testing.assert_close(logits.view(3, 2, 5, 29), fixture["logits"], rtol=1e-5, atol=1e-5)


def test_arctic_trainings_mlp_folder(tmp_path, base_path):
    """A name in place of the list, a pickle, names without the prefix."""
    speculator = make("mlp")
    write_folder(speculator, tmp_path / "draft", "mlp_speculator", base_path)
    folder = tmp_path / "draft"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(
        {name.removeprefix("speculator."): tensor.bfloat16().float() for name, tensor in tensors.items()}, folder / "pytorch_model.bin"
    )
    change_config(folder, architectures="MLPSpeculatorPreTrainedModel")
    with torch.no_grad():
        for parameter in speculator.parameters():
            parameter.copy_(parameter.bfloat16())
    assert same_weights(folder, speculator)


def test_shards_with_an_index(tmp_path, base_path):
    speculator, folder = make("lstm"), tmp_path / "draft"
    write_folder(speculator, folder, "arctic", base_path)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(folder, speculator)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map | {names[0]: "../a.safetensors"}}))
    refused(folder, "model.safetensors.index.json", "leaves the folder")


# ---- folders that cannot be ----


def refused(folder: Path, file: str, *words: str) -> None:
    """The folder is refused by one line that names the file."""
    with pytest.raises(UserError) as error:
        load_speculator(folder, BASE)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(folder / file)), message
    assert all(word in message for word in words), message


@pytest.fixture
def verl(tmp_path, base_path) -> Path:
    write_folder(make("lstm"), tmp_path / "draft", "verl", base_path)
    return tmp_path / "draft"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inner_dim": "1024."}, ('inner_dim = "1024."', "a width")),
        ({"inner_dim": "0.5"}, ("inner_dim",)),
        ({"emb_dim": 0.5}, ("emb_dim = 0.5",)),
        ({"emb_dim": True}, ("emb_dim = true",)),
        ({"emb_dim": ...}, ("emb_dim = null",)),
        ({"proj_dim": "7" * 40}, ("proj_dim",)),
        ({"proj_dim": {"a": 1}}, ("proj_dim",)),
        ({"emb_dim": 8}, ("speculator.emb_dim ends in 8 and speculator.proj_dim in 7",)),
        ({"method": "sum_gru"}, ('method = "sum_gru"', "sum_rnn, sum_lstm")),
        ({"method": 3}, ("method = 3",)),
        ({"tie_weights": False}, ("speculator.tie_weights = false",)),
        ({"tie_lstm_embs": 1}, ("tie_lstm_embs = 1", "true or false")),
        ({"architectures": ["MLPSpeculatorPreTrainedModel"]}, ("method", "sum_rnn")),
        ({"architectures": ["MLPSpeculatorPreTrainedModel"] * 2}, ("a list with one name",)),
        ({"base_fingerprint": 3}, ("base_fingerprint = 3",)),
    ],
)
def test_configs_that_cannot_be(verl, changes, words):
    change_config(verl, **changes)
    refused(verl, "config.json", *words)


class Code:
    """Unpickled, it would run a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_with_code_are_refused_and_not_run(verl, tmp_path):
    file, evidence = verl / "pytorch_model.bin", tmp_path / "ran"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {"more": Code(f"touch {evidence}")}, file)
    refused(verl, "pytorch_model.bin", "system", "can run code")
    file.write_bytes(pickle.dumps(Code(f"touch {evidence}")))
    refused(verl, "pytorch_model.bin")
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    refused(verl, "pytorch_model.bin", "_use_new_zipfile_serialization")
    assert not evidence.exists()


def test_pickles_of_anything_but_plain_tensors(verl):
    file = verl / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    for content in (list(tensors.values()), tensors | {3: torch.ones(1)}, tensors | {"step": 7}, torch.ones(3)):
        torch.save(content, file)
        refused(verl, "pytorch_model.bin", "a dictionary from names to tensors")
    for odd, word in (
        (torch.ones(7).to_sparse(), "sparse"),
        (torch.ones(7, dtype=torch.int64), "int64"),
        (torch.ones(7, device="meta"), "meta"),
    ):
        torch.save(tensors | {"cell_ln.0.bias": odd}, file)
        refused(verl, "pytorch_model.bin", word)


def test_damaged_pickles(verl):
    file = verl / "pytorch_model.bin"
    content = file.read_bytes()
    for kept in (0, 3, 100, len(content) // 2, len(content) - 9):
        file.write_bytes(content[:kept])
        refused(verl, "pytorch_model.bin", "truncated, damaged")
    file.unlink()
    refused(verl, "", "no weights")


def test_tensors_that_do_not_fit(verl):
    file = verl / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    for gate in ("input", "cell"):
        missing = {name: tensor for name, tensor in tensors.items() if name != f"{gate}_proj.1.weight"}
        torch.save(missing, file)
        refused(verl, "pytorch_model.bin", "missing", f"{gate}_proj.1.weight")
    torch.save(tensors | {"forget_bias": torch.ones(7)}, file)
    refused(verl, "pytorch_model.bin", "does not know", "forget_bias")
    torch.save(tensors | {"cell_ln.0.bias": torch.ones(8)}, file)
    refused(verl, "pytorch_model.bin", "cell_ln.0.bias is [8]", "[7]")
    torch.save(tensors | {"cell_emb.0.weight": tensors["cell_emb.0.weight"] + 1}, file)
    refused(verl, "pytorch_model.bin", "cell_emb.0.weight differs from forget_emb.0.weight")
    torch.save(tensors | {"speculator.head.0.weight": tensors["head.0.weight"]}, file)
    refused(verl, "pytorch_model.bin", "prefix")
    torch.save({name: tensor for name, tensor in tensors.items() if name not in ("input_emb.0.weight", "head.2.weight")}, file)
    assert same_weights(verl, make("lstm"))  # names of what is shared may be left out
