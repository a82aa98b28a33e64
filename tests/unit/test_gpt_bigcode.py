"""What GPTBigCode has that Llama has not; the whole model is tested beside Llama's relatives (test_llama, test_weights)."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from spectitan.errors import UserError
from spectitan.models.gpt_bigcode import EmbedGPTBigCode, GPTBigCodeConfig
from spectitan.models.hf_config import read_config
from spectitan.models.hf_layout import HFLayout
from spectitan.models.registry import get_model
from tests.unit.model_fixtures import VOCAB, assert_packed_equal_alone, backward_of_both, random_tokens, relative_error, save_oracle

CONFIG = GPTBigCodeConfig(VOCAB, 24, num_layers=3, num_heads=6, max_position_embeddings=13, initializer_range=0.3)


def build(dtype: torch.dtype = torch.float64) -> EmbedGPTBigCode:
    model = EmbedGPTBigCode(CONFIG).to(dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def test_gradients_equal_transformers(tmp_path):
    ours, expected = backward_of_both("gpt_bigcode", tmp_path)
    for parameter in ours.parameters():
        parameter.data = parameter.grad
    found = dict(HFLayout(ours).stored_tensors(ours))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


def test_packed_documents_do_not_meet_and_begin_at_position_0():
    """Rows are longer than the table of positions, whose rows documents share."""
    assert_packed_equal_alone(build(), [[0] * 7 + [1] * 12, [2] * 8 + [3] * 10 + [-1]], [[7, 12], [8, 10]])


def test_a_tree_of_candidates_equals_its_chains():
    model, prompt, nodes = build(), random_tokens(1, 5), random_tokens(1, 3, seed=1)
    cache = model.new_cache(1, 10)
    model(prompt, cache=cache)
    cache.commit(5)
    mask = torch.zeros(1, 3, 10, dtype=torch.bool)
    mask[..., :5] = True
    mask[0, :, 5:8] = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])
    found = model(nodes, cache=cache, positions=torch.tensor([[5, 6, 6]]), mask=mask).final[0]
    for leaf in (1, 2):
        expected = model(torch.cat([prompt, nodes[:, [0, leaf]]], 1)).final[0, 5:]
        assert torch.allclose(found[[0, leaf]], expected, atol=1e-12)


def test_flops_count_the_matrix_products():
    model, tokens = build(), random_tokens(3, 11)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    products = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    assert model.flops(33, 11) == products + 3 * 2 * 2 * 3 * sum(range(1, 12)) * 24


def test_random_weights_are_norms_of_one_and_biases_of_nothing():
    for name, parameter in build().named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0 < parameter.std() < 0.4, name


def test_a_part_of_a_stored_matrix_goes_to_its_place(tmp_path):
    """Queries, key and value are one matrix there; a rank may want a few rows and columns of each."""
    save_oracle("gpt_bigcode", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours = get_model("auto", "auto", tmp_path)
    layout = HFLayout(ours)
    for name, parameter in ours.named_parameters():
        place = (slice(len(parameter) // 3, len(parameter) // 2 + 1), *(slice(1, size) for size in parameter.shape[1:]))
        local = torch.zeros_like(parameter.detach()[place])
        for key, where, part in layout.parts(name, local, place):
            part.copy_(stored[key][where])
        assert local.numel() and torch.equal(local, parameter.detach()[place]), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"multi_query": False}, "multi_query = false: allowed: true"),
        ({"scale_attn_weights": False}, "scale_attn_weights = false: allowed: true"),
        ({"activation_function": "relu"}, 'activation_function = "relu": allowed: gelu_pytorch_tanh'),
        ({"n_head": 5}, "n_head = 5: it must divide n_embd = 24"),
        ({"n_positions": None}, "n_positions is missing"),
        ({"n_embd": 30}, r"transformer.wte.weight is \[97, 24\], config.json asks for \[97, 30\]"),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    save_oracle("gpt_bigcode", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match=message):
        get_model("auto", "auto", tmp_path)


def test_missing_tensors_and_defaults(tmp_path):
    save_oracle("gpt_bigcode", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.bias"
    save_file({key: tensor for key, tensor in stored.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 tensors that config.json asks for are missing: {name}$"):
        get_model("auto", "auto", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("tie_word_embeddings", "n_inner", "multi_query", "scale_attn_weights", "activation_function"):
        content.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = read_config(tmp_path)
    assert config.tie_embeddings is True and config.intermediate_size == 96


@pytest.mark.parametrize(
    "variant, billions",
    [("starcoder-1b", 1.1), ("starcoder-3b", 3.0), ("starcoder-7b", 7.3), ("starcoder", 15.5), ("20b", 20.1), ("34b", 33.7)],
)
def test_registered_variants_have_the_published_size(variant, billions):
    model = get_model("auto", variant, init="random", device="meta")
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 1) == billions
