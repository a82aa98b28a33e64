"""Mixtral's experts against a loop over tokens; the whole model is tested beside Llama's relatives (test_llama, test_weights)."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from spectitan.errors import UserError
from spectitan.models import mixtral
from spectitan.models.hf_layout import HFLayout
from spectitan.models.mixtral import EmbedMixtral, MixtralConfig, SparseMLP, grouped_product
from spectitan.models.registry import get_model
from tests.unit.model_fixtures import VOCAB, assert_packed_equal_alone, backward_of_both, random_tokens, relative_error, save_oracle

CONFIG = MixtralConfig(VOCAB, 24, 40, num_layers=3, num_heads=6, num_kv_heads=2, num_experts=5, initializer_range=0.3)


def build(dtype: torch.dtype = torch.float64, **options) -> EmbedMixtral:
    model = EmbedMixtral(MixtralConfig(**{**vars(CONFIG), **options})).to(dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.mark.parametrize("rows", [[3, 0, 1, 5], [0, 0, 9, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(
    "dtype, sizes", [(torch.bfloat16, (8, 16)), (torch.bfloat16, (6, 16)), (torch.float32, (8, 4)), (torch.float64, (3, 5))]
)
def test_the_grouped_product_is_a_product_for_each_group(rows, dtype, sizes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(rows), sizes[0], generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(rows), sizes[1], sizes[0], generator=generator).to(dtype).requires_grad_()
    group = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows))
    expected = (weight.double()[group] @ x.double()[..., None])[..., 0]
    found = grouped_product(x, weight.transpose(1, 2), torch.tensor(rows).cumsum(0).int())
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert found.dtype == dtype and torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance)
    direction = torch.randn(expected.shape, generator=generator).double()
    wanted = torch.autograd.grad((expected * direction).sum(), (x, weight))
    for gradient, want in zip(torch.autograd.grad((found * direction).sum(), (x, weight)), wanted):
        assert torch.allclose(gradient.double(), want.double(), atol=10 * tolerance, rtol=tolerance)


def test_bfloat16_takes_the_grouped_kernel_and_equals_the_loop(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "grouped_mm", lambda *args, kernel=F.grouped_mm, **keys: (calls.append(1), kernel(*args, **keys))[1])
    model, tokens = build(torch.bfloat16), random_tokens(2, 11)
    grouped = model(tokens).final
    assert len(calls) == 3 * CONFIG.num_layers
    monkeypatch.setattr(mixtral, "_is_grouped", lambda x, matrices: False)
    assert relative_error(model(tokens).final.float(), grouped.float()) < 0.02
    assert len(calls) == 3 * CONFIG.num_layers


@pytest.mark.parametrize("k", [1, 2, 5])
def test_each_token_gets_its_likeliest_experts(k):
    torch.manual_seed(0)
    layer = SparseMLP(6, 7, 5, k).double()
    torch.nn.init.normal_(layer.experts.gate_proj.weight)
    torch.nn.init.normal_(layer.experts.up_proj.weight)
    torch.nn.init.normal_(layer.experts.down_proj.weight)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    found = layer(x)
    for token, y in zip(x.view(-1, 6), found.view(-1, 6)):
        probabilities = (layer.gate.weight @ token).softmax(0)
        chosen = sorted(range(5), key=lambda expert: -probabilities[expert])[:k]
        expected = sum(
            probabilities[expert] / probabilities[chosen].sum() * (matrices[2] @ (F.silu(matrices[0] @ token) * (matrices[1] @ token)))
            for expert in chosen
            for matrices in [[getattr(layer.experts, f"{name}_proj").weight[expert] for name in ("gate", "up", "down")]]
        )
        assert torch.allclose(y, expected, atol=1e-12)


def test_gradients_equal_transformers(tmp_path):
    ours, expected = backward_of_both("mixtral", tmp_path)
    for name, parameter in ours.layers.named_parameters(prefix="model.layers"):
        if ".experts." in name:
            gate_up, down = (expected[f"{name.rpartition('.experts.')[0]}.experts.{part}"] for part in ("gate_up_proj", "down_proj"))
            gate, up = gate_up.chunk(2, 1)
            wanted = {"gate_proj": gate, "up_proj": up, "down_proj": down}[name.split(".")[-2]]
        else:
            wanted = expected[name]
        assert relative_error(parameter.grad, wanted) < 1e-5, name


def test_packed_documents_do_not_meet():
    assert_packed_equal_alone(build(), [[0] * 5 + [1] * 8, [2] * 12 + [-1]], [[5, 8], [12]])


def test_flops_count_the_experts_that_a_token_meets():
    model, tokens = build(), random_tokens(3, 11)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    products = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    attention = 3 * 2 * 2 * 3 * sum(range(1, 12)) * 24
    assert model.flops(33, 11) == products + attention


def test_compiled_layers_equal_eager_ones():
    model, plain = build(torch.bfloat16), build(torch.bfloat16)
    for layer in model.layers:
        layer.compile(backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for rows, length in ((2, 9), (3, 7), (4, 13)):
        text = random_tokens(rows, length)
        assert torch.equal(model(text).final, plain(text).final)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_checkpoints_hold_an_expert_a_tensor(tmp_path):
    """As on the hub, and as transformers writes it."""
    save_oracle("mixtral", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    layout = HFLayout(build())
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == layout.shapes
    assert sum(bool(re.search(r"layers\.0\.block_sparse_moe\.experts\.\d\.w[123]\.weight$", name)) for name in stored) == 15

    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    save_file({key: tensor for key, tensor in stored.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 tensors that config.json asks for are missing: {name}$"):
        get_model("auto", "auto", tmp_path)
    more = name.replace("experts.3", "experts.5")
    save_file(stored | {more: stored[name].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"1 tensors that config.json does not know: {more}$"):
        get_model("auto", "auto", tmp_path)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(1, 5), slice(4, 4)])
def test_a_rank_reads_its_experts_alone(tmp_path, rows):
    save_oracle("mixtral", tmp_path)
    stored, ours = load_file(tmp_path / "model.safetensors"), get_model("auto", "auto", tmp_path)
    name = "layers.2.mlp.experts.down_proj.weight"
    full = ours.get_parameter(name).detach()
    place = (rows, slice(3, 9), slice(0, 40))
    local, read = torch.zeros_like(full[place]), []
    for key, where, part in HFLayout(ours).parts(name, local, place):
        read.append(int(re.search(r"experts\.(\d)\.w2", key)[1]))
        part.copy_(stored[key][where])
    assert torch.equal(local, full[place]) and read == list(range(rows.start, rows.stop))


def test_configs_and_archs_that_are_refused(tmp_path):
    save_oracle("mixtral", tmp_path)
    with pytest.raises(UserError, match="base.arch = 'embedllama': config.json in .* is of embedmixtral; allowed there: that, or auto$"):
        get_model("embedllama", "auto", tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_experts_per_tok": 6}))
    with pytest.raises(UserError, match="num_experts_per_tok = 6: at most num_local_experts = 5$"):
        get_model("auto", "auto", tmp_path)
    with pytest.raises(UserError, match="experts_per_token = 3: allowed: 1 to num_experts = 2"):
        MixtralConfig(VOCAB, 24, 40, num_layers=1, num_heads=2, num_experts=2, experts_per_token=3)


@pytest.mark.parametrize("variant, billions", [("8x7b", 46.70), ("8x22b", 140.62)])
def test_registered_variants_have_the_published_size(variant, billions):
    model = get_model("auto", variant, init="random", device="meta")
    assert isinstance(model, EmbedMixtral)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions
