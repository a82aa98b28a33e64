"""Families that are not implemented here, through transformers: our adapter against the untouched model."""

import dataclasses
import json
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from spectitan.config.sections import Objective
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.speculative import generate_speculative
from spectitan.distributed.fsdp import free_frozen, gather_frozen, shard_frozen
from spectitan.errors import UserError
from spectitan.models.families import build_on_meta
from spectitan.models.registry import choose_config, fill_model, get_model
from spectitan.models.weights import fingerprint
from spectitan.speculators.eagle3 import Eagle3Config
from spectitan.speculators.registry import new_speculator
from tests.unit.model_fixtures import SMALL, VOCAB, assert_cached_ragged_rows_equal, random_tokens, relative_error, save_oracle

TOLERANCE = 1e-5
_GEMMA = {"num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8}
# Parallel blocks; capped scores and logits, windows in every other layer; learned positions; norms behind; one window for all; experts.
FAMILIES = {
    "gpt_neox": (transformers.GPTNeoXConfig, {"rotary_pct": 0.5}, True),
    "gemma2": (transformers.Gemma2Config, _GEMMA, False),
    "gpt2": (transformers.GPT2Config, {"n_inner": 40}, True),
    "olmo2": (transformers.Olmo2Config, {}, True),
    "starcoder2": (transformers.Starcoder2Config, {"num_key_value_heads": 2, "sliding_window": 4}, True),
    "qwen3_moe": (transformers.Qwen3MoeConfig, _EXPERTS, True),
    "phi": (transformers.PhiConfig, {"num_attention_heads": 3}, False),
}


def oracle(family: str) -> nn.Module:
    config_class, options, _ = FAMILIES[family]
    config = config_class(**(SMALL | {"pad_token_id": None} | options))
    eager = {"attn_implementation": "eager"} if family == "gemma2" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, **eager).eval()
        for parameter in model.parameters():
            parameter.data += 0.25 * torch.randn(parameter.shape)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Ours and transformers' model of the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = oracle(request.param)
    theirs.save_pretrained(folder)
    return get_model("hf", "auto", folder).requires_grad_(False), theirs, FAMILIES[request.param][2]


def test_logits_and_taps_equal_transformers(pair):
    ours, theirs, plain = pair
    tokens = random_tokens(3, 17)
    expected = theirs(tokens, output_hidden_states=True)
    states = ours(tokens, taps=(0, 1, 2))
    for found, wanted in zip((*states.taps, states.final), expected.hidden_states, strict=True):
        assert relative_error(found, wanted) < TOLERANCE
    assert relative_error(ours.readout.logits(states.final), expected.logits) < TOLERANCE
    assert ours.readout.plain_head == plain
    product = states.final @ ours.readout.head.weight.T
    assert (relative_error(product, expected.logits) < TOLERANCE) == plain
    before_norm = ours(tokens, taps=(3,)).taps[0]
    assert relative_error(ours.readout.final(before_norm), expected.hidden_states[-1]) < TOLERANCE


def test_packed_documents_equal_each_alone_in_transformers(pair):
    ours, theirs, _ = pair
    tokens = random_tokens(2, 19)
    documents = torch.tensor([[0] * 7 + [1] + [2] * 11, [5] * 12 + [-1] * 7])
    packed = ours(tokens, documents)
    logits = ours.readout.logits(packed.final)
    for row, start, stop in [(0, 0, 7), (0, 7, 8), (0, 8, 19), (1, 0, 12)]:
        alone = theirs(tokens[row : row + 1, start:stop]).logits[0]
        assert relative_error(logits[row, start:stop], alone) < TOLERANCE
    assert packed.final.isfinite().all()


def test_cached_ragged_rows_and_trees_equal_each_row_in_transformers(pair):
    ours, theirs, _ = pair
    cache, text = assert_cached_ragged_rows_equal(ours, theirs, TOLERANCE)
    nodes = random_tokens(3, 3, seed=1)  # a root and its two children
    mask = torch.zeros(3, 3, 30, dtype=torch.bool)
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    for row, length in enumerate(cache.lengths.tolist()):
        mask[row, :, :length] = True
        mask[row, :, length : length + 3] = sees
    positions = cache.lengths[:, None] + torch.tensor([0, 1, 1])
    found = ours.readout.logits(ours(nodes, cache=cache, positions=positions, mask=mask).final)
    for row, length in enumerate(cache.lengths.tolist()):
        for leaf in (1, 2):
            chain = torch.cat([text[row, :length], nodes[row, [0, leaf]]])
            assert relative_error(found[row, [0, leaf]], theirs(chain[None]).logits[0, length:]) < TOLERANCE


def test_flops_count_the_experts_that_a_token_meets(pair):
    ours, _, _ = pair
    per_token = 0
    for name, parameter in ours.backbone.named_parameters():
        if parameter.dim() >= 2 and ("layers." in name or name.startswith("h.")):
            per_token += parameter.numel() // (2 if ".experts." in name else 1)  # 2 of 4 are chosen
    heads = ours.config.num_heads * ours.config.head_dim
    assert ours.flops(33, 11) == 33 * 2 * per_token + 3 * 2 * 2 * 3 * sum(range(1, 12)) * heads


@pytest.mark.parametrize("pair", ["gemma2", "gpt2"], indirect=True)
def test_it_is_built_without_weights_sharded_by_block_filled_and_decodes(pair, one_rank_mesh):
    plain, theirs, _ = pair
    model = build_on_meta(plain.config)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    shard_frozen(model, [*model.layers, model.readout], one_rank_mesh, torch.float32)
    torch.distributed.fsdp.register_fsdp_forward_method(model.readout, "call")
    fill_model(model.to_empty(device="cpu"), plain.config.folder)
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        states = model(tokens, taps=(1, 3))
        assert relative_error(model.readout.logits(states.final), theirs(tokens).logits) < TOLERANCE
        assert relative_error(states.taps[1], plain(tokens, taps=(3,)).taps[0]) < TOLERANCE
        gather_frozen(model)
        assert torch.allclose(model(tokens).final, states.final)
        free_frozen(model)


def test_an_eagle3_drafter_takes_after_it_and_changes_no_token(pair):
    base, theirs, _ = pair
    shape, config = new_speculator("eagle3", Eagle3Config(), base.config, Objective()).decoder, theirs.config
    assert (shape.hidden_size, shape.num_heads, shape.vocab_size) == (24, config.num_attention_heads, VOCAB)
    assert shape.num_kv_heads == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert shape.intermediate_size == getattr(config, "intermediate_size", 72) and shape.norm_eps == getattr(config, "rms_norm_eps", 1e-6)
    speculator = new_speculator("eagle3", Eagle3Config(ttt_steps=2), base.config, Objective())
    speculator.init_weights(torch.Generator().manual_seed(0))
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    plain = generate_plain(base, prompts, 9)
    drafted = generate_speculative(base, speculator, prompts, 9, 2)
    assert drafted.tokens == plain.tokens and sum(map(len, drafted.accepted)) > 0


def test_fingerprints_are_of_the_folder(pair):
    config = pair[0].config
    other = dataclasses.replace(config, content=config.content | {"hidden_act": "other"})
    assert fingerprint(pair[0]) == fingerprint(config.folder, config) != fingerprint(config.folder, other)


def refusal(*args, **keys) -> str:
    with pytest.raises(UserError) as error:
        get_model("hf", "auto", *args, **keys)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch):
    oracle("olmo2").save_pretrained(tmp_path)
    assert "random" in refusal(tmp_path, init="random") and 'base.arch = "hf"' in refusal(tmp_path, init="random")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, tmp_path / "model.safetensors")
    assert "1 tensors that config.json asks for are missing: model.layers.1.mlp.up_proj.weight" in refusal(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "transformers cannot load it" in refusal(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for changes, message in [
        ({"quantization_config": {"bits": 4}}, "quantised weights cannot be read"),
        ({"model_type": "never_heard_of"}, "transformers cannot load it with base.arch"),
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "has linear_attention"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        assert message in refusal(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal(tmp_path) == 'base.arch = "hf" needs transformers: pip install "spectitan[hf]"'


def test_no_code_of_a_folder_is_run(tmp_path):
    oracle("olmo2").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "runs no code of a folder" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_family_that_computes_otherwise_is_found_when_its_weights_are_read(tmp_path):
    """Local attention with a mask of the model's own, which knows nothing of rows of different length."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=3,
        max_position_embeddings=64, intermediate_size=40,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.25 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    assert "cannot run model_type = 'gpt_neo': its cached rows differ" in refusal(tmp_path)
    bloom = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=1, n_head=3))
    bloom.save_pretrained(tmp_path)
    assert 'model_type = "bloom": transformers\' config has no max_position_embeddings' in refusal(tmp_path)


def test_our_own_families_run_through_it_too(tmp_path):
    theirs = save_oracle("llama3.1", tmp_path)
    ours, tokens = get_model("hf", "auto", tmp_path), random_tokens(2, 9)
    assert relative_error(ours.readout.logits(ours(tokens).final), theirs(tokens).logits) < TOLERANCE
    assert choose_config("hf", "auto", tmp_path).vocab_size == VOCAB
