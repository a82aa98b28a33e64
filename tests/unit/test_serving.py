"""Speculator folders: layout, read back bit by bit, and refused when damaged."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file

from spectitan.errors import UserError
from spectitan.speculators.mlp import MlpSpeculator
from spectitan.speculators.serving import choose_format, load_speculator, name_of_base, write_folder
from spectitan.types import BaseStates
from tests.unit.test_files import full_disk
from tests.unit.test_recurrent import FIXTURES, HIDDEN, VOCAB, WIDTH, greedy, make_speculator

BASE = SimpleNamespace(hidden_size=HIDDEN, vocab_size=VOCAB)


@pytest.fixture
def folder(tmp_path, base_path) -> Path:
    """An exported tied speculator with 3 heads."""
    write_folder(make_speculator(3, True, True), tmp_path / "out" / "draft", "mlp_speculator", base_path)
    return tmp_path / "out" / "draft"


@pytest.mark.parametrize(("n", "tied", "scaled"), [(1, False, False), (2, True, True), (3, True, False), (5, False, True)])
def test_a_folder_read_back_drafts_the_same_bits(n, tied, scaled, tmp_path, base_path):
    speculator = make_speculator(n, tied, scaled)
    write_folder(speculator, tmp_path / "draft", "mlp_speculator", base_path)
    again = load_speculator(tmp_path / "draft", BASE)
    assert again.state_dict().keys() == speculator.state_dict().keys()
    for name, tensor in speculator.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.scale_input, again.emb_scale, again.steps) == (scaled, speculator.emb_scale, n)
    tokens, states, counts = torch.randint(0, VOCAB, (4, 3)), BaseStates(torch.randn(4, 3, HIDDEN)), torch.tensor([1, 2, 3, 3])
    drafts = [each.draft(None, tokens, states, counts, None, n, greedy).tokens for each in (speculator, again)]
    assert torch.equal(*drafts)
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("case", ["tied_scaled", "untied"])
def test_layout_is_that_of_the_reference_implementation(case, tmp_path, base_path):
    """Names and values are those of fms-extras' state_dict; a de-duplicated file, as other writers make it, is read too."""
    tied = case == "tied_scaled"
    prefix = f"{case}.weights."
    fixture = load_file(FIXTURES / "fms_extras_mlp.safetensors")
    reference = {name.removeprefix(prefix): tensor for name, tensor in fixture.items() if name.startswith(prefix)}
    speculator = make_speculator(3, tied, scaled=tied)
    speculator.load_state_dict({name: reference[name] for name in speculator.state_dict()})
    write_folder(speculator, tmp_path / "draft", "mlp_speculator", base_path)
    written = load_file(tmp_path / "draft" / "model.safetensors")
    assert written.keys() == {f"speculator.{name}" for name in reference}
    assert all(torch.equal(written[f"speculator.{name}"], tensor) for name, tensor in reference.items())
    with safe_open(tmp_path / "draft" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
    if tied:
        few = {name: written[name].clone() for name in written if ".0." in name or name == "speculator.proj.1.weight"}
        assert len(few) < len(written)
        save_file(few, tmp_path / "draft" / "model.safetensors")
        again = load_speculator(tmp_path / "draft", BASE)
        assert all(torch.equal(tensor, reference[name]) for name, tensor in again.state_dict().items())


def test_config_and_readme(folder, base_path):
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["MLPSpeculatorPreTrainedModel"],
        "model_type": "mlp_speculator",
        "vocab_size": VOCAB,
        "emb_dim": HIDDEN,
        "inner_dim": WIDTH,
        "n_predict": 3,
        "top_k_tokens_per_head": [5, 4, 3],
        "n_candidates": 5,
        "tie_weights": True,
        "scale_input": True,
        "base_model_name_or_path": "a-base",
        "base_model_archs": ["Qwen2ForCausalLM"],
        "torch_dtype": "float32",
    }
    readme = (folder / "README.md").read_text()
    assert """vllm serve a-base --speculative-config '{"model": ".", "num_speculative_tokens": 3}'""" in readme
    assert str(base_path.parent) not in readme + (folder / "config.json").read_text()
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1  # all may read all of it


def test_writing_twice_gives_the_same_bytes_and_leaves_other_files(folder, tmp_path, base_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "notes.txt").write_text("mine")
    write_folder(make_speculator(3, True, True, seed=1), folder, "mlp_speculator", base_path)
    assert (folder / "model.safetensors").read_bytes() != before["model.safetensors"]
    write_folder(make_speculator(3, True, True), folder, "mlp_speculator", base_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before | {"notes.txt": b"mine"}
    write_folder(make_speculator(3, True, True), tmp_path / "elsewhere", "mlp_speculator", base_path)
    assert {file.name: file.read_bytes() for file in (tmp_path / "elsewhere").iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["draft"]  # nothing temporary stays


@pytest.mark.parametrize("format", ["mlp_speculator", "arctic", "verl"])
@pytest.mark.parametrize("room", [0, 100])
def test_a_full_disk_leaves_the_old_folder_and_is_told_with_its_name(folder, base_path, format, room):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with full_disk(room), pytest.raises(OSError) as caught:
        write_folder(make_speculator(3, True, True, seed=1), folder, format, base_path)
    assert caught.value.filename == str(folder) and ("disk full" if format == "verl" else "File too large") in caught.value.strerror
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["draft"]


def test_the_bases_name(base_path):
    def stored(name: str) -> str:
        content = json.loads((base_path / "config.json").read_text())
        (base_path / "config.json").write_text(json.dumps(content | {"_name_or_path": name}))
        return name_of_base(base_path)

    assert stored("org/model-7b") == "org/model-7b"
    assert stored("/home/someone/model") == stored("C:\\models\\x") == stored("./here") == stored("") == "a-base"
    assert name_of_base(base_path, "/explicit/path") == "/explicit/path"


def test_a_format_that_there_is_not():
    with pytest.raises(UserError, match='export.format = "hf" with speculator.type = "mlp"; allowed: auto, mlp_speculator, arctic, verl'):
        choose_format(make_speculator(3, True, True), "hf")


def test_another_base(folder):
    with pytest.raises(UserError, match=f"hidden size {HIDDEN} and vocabulary {VOCAB}; this base has {HIDDEN} and 32000"):
        load_speculator(folder, SimpleNamespace(hidden_size=HIDDEN, vocab_size=32000))


def refused(folder: Path, file: str, *words: str) -> None:
    """The folder is refused by one line that names the file."""
    with pytest.raises(UserError) as error:
        load_speculator(folder, BASE)
    message = str(error.value)
    assert "\n" not in message and str(folder / file) in message, message
    for word in words:
        assert word in message, message


def change_config(folder: Path, **changes) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_predict": 4096}, ("n_predict = 4096", "1 to 64")),
        ({"n_predict": True}, ("n_predict = true",)),
        ({"n_predict": None}, ("n_predict is missing",)),
        ({"n_predict": 1}, ("tie_weights",)),
        ({"vocab_size": -29}, ("vocab_size = -29",)),
        ({"vocab_size": 2**40}, ("vocab_size",)),
        ({"inner_dim": 13.0}, ("inner_dim = 13.0",)),
        ({"tie_weights": "yes"}, ('tie_weights = "yes"', "true or false")),
        ({"architectures": ["LlamaForCausalLM"]}, ("LlamaForCausalLM", "allowed: MLPSpeculatorPreTrainedModel")),
        ({"architectures": []}, ("a list with one name",)),
    ],
)
def test_config_values_that_cannot_be(folder, changes, words):
    change_config(folder, **changes)
    refused(folder, "config.json", *words)


def test_config_files_that_cannot_be_read(folder):
    for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100000):
        (folder / "config.json").write_bytes(content)
        refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json", "no such file")


def test_tensors_that_do_not_fit_the_config(folder):
    change_config(folder, inner_dim=WIDTH + 1)
    refused(folder, "model.safetensors", f"config.json asks for [{VOCAB}, {WIDTH + 1}]")
    change_config(folder, inner_dim=WIDTH, n_predict=2)
    refused(folder, "model.safetensors", "does not know", "emb.2.weight")


def test_damaged_tensors(folder):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    tensors = load(content)  # load_file's would be views of a file that is cut here

    file.write_bytes(content[:-5])
    refused(folder, "model.safetensors", "truncated")
    file.write_bytes(struct.pack("<Q", 2**60) + content[8:])
    refused(folder, "model.safetensors", "header")
    file.write_bytes(b"abc")
    refused(folder, "model.safetensors")
    file.unlink()
    refused(folder, "")

    save_file({name: tensor for name, tensor in tensors.items() if "head.0" not in name}, file)
    refused(folder, "model.safetensors", "missing", "head.0.weight")
    save_file(tensors | {"speculator.more": torch.zeros(1)}, file)
    refused(folder, "model.safetensors", "does not know: more")
    save_file(tensors | {"speculator.ln.1.bias": torch.zeros(WIDTH)}, file)
    refused(folder, "model.safetensors", "ln.1.bias differs from ln.0.bias", "one weight")
    save_file(tensors | {"speculator.ln.1.bias": torch.zeros(WIDTH + 1)}, file)
    refused(folder, "model.safetensors", "ln.1.bias differs")


def test_untied_steps_must_all_be_there(tmp_path, base_path):
    write_folder(make_speculator(3, False, True), tmp_path / "draft", "mlp_speculator", base_path)
    file = tmp_path / "draft" / "model.safetensors"
    save_file({name: tensor for name, tensor in load(file.read_bytes()).items() if "emb.2" not in name}, file)
    refused(tmp_path / "draft", "model.safetensors", "missing", "emb.2.weight")


def test_half_precision_folders_of_other_writers(folder):
    """Read into float32, exactly."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    speculator = load_speculator(folder, BASE)
    assert isinstance(speculator, MlpSpeculator)
    assert all(torch.equal(parameter, tensors[f"speculator.{name}"].float()) for name, parameter in speculator.named_parameters())
