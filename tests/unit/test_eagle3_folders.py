"""EAGLE-3 in speculators' format: what that package computes from our folders, and folders and vocabularies read, written and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from spectitan.config.manager import load
from spectitan.config.sections import Objective
from spectitan.errors import UserError
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.weights import save_hf
from spectitan.speculators.draft_vocabulary import read_counts, read_vocabulary, write_maps
from spectitan.speculators.eagle3 import Eagle3Config, Eagle3Speculator
from spectitan.speculators.registry import SPECULATOR_CONFIGS, new_speculator
from spectitan.speculators.serving import describe_folder, load_speculator, write_folder
from spectitan.speculators.ttt_attention import TTTAttention, document_spans
from spectitan.types import BaseStates, TokenBatch

FIXTURE = load_file(Path(__file__).parent / "fixtures" / "speculators_eagle3.safetensors")
BASE = LlamaConfig(53, 24, intermediate_size=40, num_layers=9, num_heads=6, num_kv_heads=2, rope_theta=100.0, initializer_range=0.3)
CASES = {  # as the fixture's folders were made
    "llama": dict(norm_before_residual=False),
    "qwen3_reduced": dict(draft_arch="qwen3", num_layers=2, norm_before_fc=True, norm_output=True, draft_vocab_size=31, ttt_steps=4),
    "fc_norm_own_head": dict(fc_norm=True, train_head=True, draft_hidden_act="gelu", target_layer_ids=[0, 9]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[EmbedLLaMA, Path]:
    model = EmbedLLaMA(BASE)
    model.init_weights(torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("base")
    save_hf(model.requires_grad_(False), folder, torch.float32)
    return model, folder


def make(base, seed: int = 7, **keys) -> Eagle3Speculator:
    """Norms, and an own head, that are not what they start as."""
    speculator = Eagle3Speculator(Eagle3Config(**keys), BASE, Objective())
    generator = torch.Generator().manual_seed(seed)
    speculator.init_weights(generator)
    if speculator.reduced:
        speculator.set_vocabulary(torch.randperm(53, generator=generator)[: speculator.draft_vocab_size].sort().values)
    speculator.init_from_base(base[0].readout)
    with torch.no_grad():
        for name, parameter in speculator.named_parameters():
            if "norm" in name or "lm_head" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return speculator


def export(speculator, base, folder: Path) -> Path:
    write_folder(speculator, folder, "speculators", base[1], readout=base[0].readout)
    return folder


def edit(folder: Path, change) -> None:
    """change(content) of config.json."""
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_package_speculators(case):
    """Its forward read our folder; its row i takes in the token that our row i finds at i + 1."""
    data = {name.removeprefix(f"{case}."): tensor for name, tensor in FIXTURE.items() if name.startswith(case)}
    weights = {name.removeprefix("weights."): tensor for name, tensor in data.items() if name.startswith("weights.")}
    speculator = Eagle3Speculator(Eagle3Config(**CASES[case]), BASE, Objective())
    head = weights["lm_head.weight"] if speculator.config.train_head else weights.pop("lm_head.weight")
    speculator.load_state_dict(weights)
    ids, length = data["input_ids"], data["input_ids"].shape[1]
    tokens = torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids[:, :-1]], 1)
    document_ids = (torch.arange(length) >= 10).long()[None]
    batch = TokenBatch(tokens, tokens >= 0, document_ids, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    readout = EmbedLLaMA(BASE).readout.requires_grad_(False)
    readout.embedding.weight.copy_(FIXTURE["embed_tokens.weight"])
    taps = data["hidden_states"].chunk(len(speculator.taps), -1)
    rows = torch.arange(length)
    attention = TTTAttention("auto", document_ids, document_spans(document_ids), rows)
    with torch.no_grad():
        outputs = speculator._unroll(batch, BaseStates(taps[0], taps), rows, attention, readout)
        logits = (outputs @ head.T).view(speculator.steps, length, -1)
    for step in range(speculator.steps):
        seen = slice(0, length - 1 - step)  # the last rows take in a token past the end
        torch.testing.assert_close(logits[step, seen], data["logits"][step, seen], rtol=1e-4, atol=1e-4)


KEPT = {
    **CASES,
    "own_embedding": dict(embed_requires_grad=True, ttt_steps=5),
    "window": dict(num_layers=3, sliding_window=6, sliding_window_indices=[0, 2]),
    "window_qwen3": dict(draft_arch="qwen3", sliding_window=9),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_folder_read_back_is_the_speculator(case, base, tmp_path):
    speculator = make(base, **KEPT[case])
    folder = export(speculator, base, tmp_path / "folder")
    again = load_speculator(folder, BASE)
    assert again.state_dict().keys() == speculator.state_dict().keys()
    for name, tensor in speculator.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (again.taps, again.steps, again.decoder) == (speculator.taps, speculator.steps, speculator.decoder)
    assert [layer.window for layer in again.layers] == [layer.window for layer in speculator.layers]
    written, readout = load_file(folder / "model.safetensors"), base[0].readout
    if not speculator.config.embed_requires_grad:
        assert torch.equal(written["embed_tokens.weight"], readout.embedding.weight)
    if not speculator.config.train_head:
        ids = speculator.draft_ids if speculator.reduced else slice(None)
        assert torch.equal(written["lm_head.weight"], readout.head.weight[ids])
    assert ("d2t" in written) == ("t2d" in written) == speculator.reduced
    export(again, base, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_names_of_tensors_are_those_of_speculators(case, base, tmp_path):
    folder = export(make(base, **CASES[case]), base, tmp_path / "folder")
    theirs = {name.split(".weights.")[1] for name in FIXTURE if name.startswith(f"{case}.weights.")} | {"embed_tokens.weight"}
    assert set(load_file(folder / "model.safetensors")) == theirs


def test_what_a_server_is_told(base, tmp_path):
    """With a model_type vLLM would take the folder for a model of transformers. Every flag is there: readers' defaults differ."""
    folder = export(make(base, ttt_steps=5), base, tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    assert "model_type" not in config and config["speculators_model_type"] == "eagle3"
    flags = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad", "tie_word_embeddings")
    assert [config[name] for name in flags] == [True, False, False, False, False, False]
    (method,) = config["speculators_config"]["proposal_methods"]
    assert (method["speculative_tokens"], config["draft_vocab_size"], config["target_hidden_size"]) == (5, 53, 24)
    command = '{"method": "eagle3", "model": ".", "num_speculative_tokens": 5}'
    assert f"    vllm serve {base[1].name} --speculative-config '{command}'\n" in (folder / "README.md").read_text()


def test_a_folder_of_others_without_our_flags_keeps_its_own_head(base, tmp_path):
    speculator = make(base, norm_before_residual=True, train_head=True)
    folder = export(speculator, base, tmp_path / "folder")
    edit(folder, lambda content: [content.pop(name) for name in ("train_head", "fc_norm", "norm_output", "target_hidden_size")])
    again = load_speculator(folder, BASE)
    assert again.config.train_head and torch.equal(again.lm_head.weight, speculator.lm_head.weight)
    edit(folder, lambda content: content.pop("norm_before_residual"))  # absent is false there
    assert not load_speculator(folder, BASE).config.norm_before_residual


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.update(speculators_model_type="dflash"), "speculators_model_type"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 2, 4]), "eagle_aux_hidden_state_layer_ids"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=None), "eagle_aux_hidden_state_layer_ids"),
        (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 4, 10]), "from 0 to the base's 9"),
        (lambda c: c.update(target_hidden_size=48), "target_hidden_size"),
        (lambda c: c.update(draft_vocab_size=54), "draft_vocab_size"),
        (lambda c: c.update(transformer_layer_config=3), "transformer_layer_config"),
        (lambda c: c["transformer_layer_config"].update(model_type="gpt2"), "transformer_layer_config.model_type"),
        (lambda c: c["transformer_layer_config"].update(hidden_act="swish"), "hidden_act"),
        (lambda c: c["transformer_layer_config"].update(num_hidden_layers=2), "missing"),
        (lambda c: c["transformer_layer_config"].update(layer_types=["sparse"]), "layer_types"),
        (lambda c: c["speculators_config"]["proposal_methods"][0].update(speculative_tokens=0), "speculative_tokens"),
        (lambda c: c.update(norm_before_fc=True, fc_norm=True), "norm_before_fc"),
    ],
)
def test_a_config_that_cannot_be(change, words, base, tmp_path):
    folder = export(make(base), base, tmp_path / "folder")
    edit(folder, change)
    with pytest.raises(UserError, match=words) as error:
        load_speculator(folder, BASE)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_whose_maps_contradict_each_other(base, tmp_path):
    folder = export(make(base, draft_vocab_size=20), base, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    tensors["t2d"] = tensors["t2d"].roll(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match="d2t and t2d contradict each other"):
        load_speculator(folder, BASE)


def draft_config(**changes) -> dict:
    content = dict(
        model_type="llama", hidden_size=24, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=10, hidden_act="gelu", rms_norm_eps=1e-5, rope_theta=500.0, max_position_embeddings=99, vocab_size=7,
        sliding_window=8, layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    return content | changes


@pytest.mark.parametrize("form", ["file", "folder", "whole speculator", "inline"])
def test_the_decoder_of_a_draft_config(form, tmp_path):
    content = draft_config()
    if form == "whole speculator":
        content = {"speculators_model_type": "eagle3", "transformer_layer_config": content}
    (tmp_path / "config.json").write_text(json.dumps(content))
    value = {"folder": str(tmp_path), "inline": json.dumps(content)}.get(form, str(tmp_path / "config.json"))
    config = Eagle3Config(draft_config=value)
    speculator = new_speculator("eagle3", config, BASE, Objective())
    decoder = speculator.decoder
    assert (decoder.num_heads, decoder.head_dim, decoder.intermediate_size, decoder.hidden_act) == (4, 10, 56, "gelu")
    assert decoder.vocab_size == 53 and [layer.window for layer in speculator.layers] == [-1, 8]
    # The keys now say all of it: from them alone, as they stand in a checkpoint, comes the same.
    again = Eagle3Speculator(Eagle3Config(**vars(config)), BASE, Objective())
    assert again.decoder == decoder and [layer.window for layer in again.layers] == [-1, 8]
    assert config.draft_config.startswith("{") and config.num_layers == 2


@pytest.mark.parametrize(
    "content, words",
    [
        (draft_config(hidden_size=32), "hidden_size = 32"),
        (draft_config(model_type="mixtral"), "model_type"),
        (draft_config(num_key_value_heads=3), "num_key_value_heads"),
        (draft_config(head_dim=9), "head_dim"),
        ([1], "a JSON object is expected"),
    ],
)
def test_a_draft_config_that_does_not_fit(content, words, tmp_path):
    file = tmp_path / "decoder.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        new_speculator("eagle3", Eagle3Config(draft_config=str(file)), BASE, Objective())


def test_a_draft_config_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="speculator.draft_config"):
        new_speculator("eagle3", Eagle3Config(draft_config=str(tmp_path / "none.json")), BASE, Objective())


@pytest.mark.parametrize("flag", ["num_layers=1", "draft_arch=llama", "sliding_window=4", "sliding_window_indices=0", "path=x"])
def test_a_draft_config_and_keys_that_it_decides(flag):
    argv = ["--speculator.type=eagle3", "--speculator.draft_config=x.json", f"--speculator.{flag}", "--base.path=b", "--data.path=d"]
    with pytest.raises(UserError, match=f"speculator.{flag.partition('=')[0]}.*allowed: one of them"):
        load([*argv, "--training.num_steps=1"], "train", SPECULATOR_CONFIGS)


def test_the_most_frequent_tokens(tmp_path):
    """By count, ties by id; where fewer were seen, the lowest of the others."""
    counts = torch.zeros(53, dtype=torch.int64)
    counts[torch.tensor([50, 7, 9, 30])] = torch.tensor([5, 2, 9, 2])
    torch.save(counts, tmp_path / "token_freq.pt")
    torch.save({9: 9, 50: 5, 7: 2, 30: 2}, tmp_path / "dictionary.pt")
    for size, expected in {1: [9], 2: [9, 50], 3: [7, 9, 50], 4: [7, 9, 30, 50], 7: [0, 1, 2, 7, 9, 30, 50]}.items():
        for file in ("token_freq.pt", "dictionary.pt"):
            keys = Eagle3Config(draft_vocab_size=size, token_freq_path=str(tmp_path / file))
            speculator = new_speculator("eagle3", keys, BASE, Objective())
            assert speculator.draft_ids.tolist() == expected
            assert speculator.t2d.nonzero()[:, 0].tolist() == expected
            speculator.check()


def test_maps_are_read_and_written(tmp_path):
    ids = torch.tensor([0, 3, 4, 52])
    speculator = Eagle3Speculator(Eagle3Config(draft_vocab_size=4), BASE, Objective())
    speculator.set_vocabulary(ids)
    speculator.write_files(tmp_path)
    assert np.load(tmp_path / "d2t.npy").tolist() == [0, 2, 2, 49] and np.load(tmp_path / "t2d.npy").dtype == bool
    paths = dict(d2t_path=str(tmp_path / "d2t.npy"), t2d_path=str(tmp_path / "t2d.npy"))
    again = new_speculator("eagle3", Eagle3Config(**paths), BASE, Objective())
    assert torch.equal(again.draft_ids, ids) and again.config.draft_vocab_size == 4
    assert again.identity() == speculator.identity()
    other = Eagle3Speculator(Eagle3Config(draft_vocab_size=4), BASE, Objective())
    other.set_vocabulary(ids - torch.tensor([0, 0, 0, 1]))
    assert other.identity() != speculator.identity()


@pytest.mark.parametrize(
    "keys, words",
    [
        (dict(draft_vocab_size=9), "needs speculator.token_freq_path"),
        (dict(token_freq_path="f"), "without speculator.draft_vocab_size"),
        (dict(d2t_path="a"), "allowed: both, or neither"),
        (dict(d2t_path="a", t2d_path="b", token_freq_path="c"), "allowed: one of them"),
        (dict(d2t_path="a", t2d_path="b"), "speculator.d2t_path"),
        (dict(draft_vocab_size=9, token_freq_path="nowhere/token_freq.pt"), "speculator.token_freq_path"),
    ],
)
def test_vocabulary_keys_that_cannot_be(keys, words):
    with pytest.raises(UserError, match=words):
        read_vocabulary(Eagle3Config(**keys), 53)


@pytest.mark.parametrize(
    "d2t, t2d, keys, words",
    [
        ([0, 2, 49], [0, 3, 51], dict(draft_vocab_size=4), "holds 3"),
        ([0, 2, 49], [0, 3, 50], {}, "contradict each other: 3 and 3 tokens, 2 in both"),
        ([0, 2, 49], [0, 3, 51, 52], {}, "3 and 4 tokens"),
        ([0, 2, 1], [0, 3], {}, "d2t does not ascend: draft id 2"),
        ([0, 2, 51], [0, 3], {}, "tokens 0 to 53"),
        ([-1, 2], [0, 3], {}, "tokens -1 to 3"),
    ],
)
def test_maps_that_cannot_be(d2t, t2d, keys, words, tmp_path):
    write_maps(tmp_path, torch.tensor(d2t), torch.isin(torch.arange(53), torch.tensor(t2d)))
    paths = dict(d2t_path=str(tmp_path / "d2t.npy"), t2d_path=str(tmp_path / "t2d.npy"))
    with pytest.raises(UserError, match=words):
        read_vocabulary(Eagle3Config(**paths, **keys), 53)
    with pytest.raises(UserError, match="53 tokens; the base has 54"):
        read_vocabulary(Eagle3Config(**paths), 54)


@pytest.mark.parametrize(
    "stored", [torch.ones(52, dtype=torch.int64), {53: 1}, [1, 2], torch.ones(53), {"a": 1}, {}, {3: 0}, {5: -1, 6: 3}]
)
def test_counts_that_cannot_be(stored, tmp_path):
    torch.save(stored, tmp_path / "counts.pt")
    with pytest.raises(UserError, match="counts.pt"):
        read_counts(tmp_path / "counts.pt", 53)


def test_a_negative_count_is_named(tmp_path):
    torch.save({5: -1, 6: 3}, tmp_path / "counts.pt")
    with pytest.raises(UserError, match="token 5 is counted -1 times"):
        read_counts(tmp_path / "counts.pt", 53)


def test_a_damaged_file_of_counts(tmp_path):
    (tmp_path / "counts.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match="counts.pt"):
        read_counts(tmp_path / "counts.pt", 53)


def test_describe_folder_names_the_family(base, tmp_path):
    description = describe_folder(export(make(base, ttt_steps=5), base, tmp_path / "folder"))
    assert (description.type, description.format, description.config.ttt_steps) == ("eagle3", "speculators", 5)
    assert description.base_shape == (24, 53)
