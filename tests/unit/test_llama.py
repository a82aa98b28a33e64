"""The base model against transformers, and against itself where transformers has no such thing (documents, trees)."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spectitan.errors import UserError
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.registry import get_model
from spectitan.models.weights import fingerprint, load_hf, save_hf
from tests.unit.model_fixtures import (
    FAMILIES,
    VOCAB,
    assert_cached_ragged_rows_equal,
    assert_packed_equal_alone,
    backward_of_both,
    random_tokens,
    relative_error,
    save_oracle,
)

TOLERANCE = 1e-5  # the promise is 1e-4
CONFIG = LlamaConfig(VOCAB, 24, 40, num_layers=3, num_heads=6, num_kv_heads=2)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """Ours and transformers' model of the same weights."""
    folder = tmp_path_factory.mktemp("model")
    theirs = save_oracle(request.param, folder)
    return get_model("auto", "auto", folder).requires_grad_(False), theirs


def final_norm(theirs: torch.nn.Module) -> torch.nn.Module:
    return theirs.transformer.ln_f if hasattr(theirs, "transformer") else theirs.model.norm


def build(seed: int = 0, dtype: torch.dtype = torch.float64, **options) -> EmbedLLaMA:
    """A model whose attention is far from uniform."""
    config = LlamaConfig(**{**vars(CONFIG), "initializer_range": 0.3, **options})
    model = EmbedLLaMA(config).to(dtype)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


def test_logits_equal_transformers(pair):
    ours, theirs = pair
    tokens = random_tokens(3, 17)
    assert relative_error(ours.readout.logits(ours(tokens).final), theirs(tokens).logits) < TOLERANCE


def test_cached_ragged_rows_equal_each_row_in_transformers(pair):
    assert_cached_ragged_rows_equal(*pair, TOLERANCE)


def test_taps_are_the_states_entering_each_layer(pair):
    ours, theirs = pair
    tokens = random_tokens(2, 9)
    before_norm = []
    handle = final_norm(theirs).register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    expected = theirs(tokens, output_hidden_states=True).hidden_states
    handle.remove()
    states = ours(tokens, taps=(0, 2, 3))
    for found, wanted in zip(states.taps, (expected[0], expected[2], before_norm[0])):
        assert relative_error(found, wanted) < TOLERANCE
    assert relative_error(states.final, expected[-1]) < TOLERANCE


def test_gradients_equal_transformers(tmp_path):
    ours, expected = backward_of_both("llama3.1", tmp_path)
    for name, parameter in ours.layers.named_parameters(prefix="model.layers"):
        assert relative_error(parameter.grad, expected[name]) < TOLERANCE, name
    assert relative_error(ours.readout.embedding.weight.grad, expected["model.embed_tokens.weight"]) < TOLERANCE


@pytest.mark.parametrize("window", [-1, 4])
def test_packed_documents_equal_each_alone(window):
    model = build(sliding_window=window)
    tokens, packed = assert_packed_equal_alone(model, [[0] * 7 + [1] + [2] * 11, [5] * 12 + [-1] * 7], [[7, 1, 11], [12]])
    assert packed.isfinite().all()
    one_each = model(tokens, torch.tensor([[3] * 19, [4] * 19])).final  # takes the path without a mask
    assert torch.allclose(one_each, model(tokens).final, atol=1e-12)
    padded = torch.tensor([[3] * 13 + [-1] * 6, [4] * 19])  # so does this: padding is seen by nothing
    assert (model._document_attention(tokens, padded, None, torch.float64)[1] is None) == (window < 0)
    one_each = model(tokens, padded).final
    assert torch.allclose(one_each[0, :13], model(tokens[:1, :13]).final[0], atol=1e-12)
    assert torch.allclose(one_each[1], model(tokens[1:]).final[0], atol=1e-12) and one_each.isfinite().all()


def test_equal_ids_apart_are_two_documents_only_in_position():
    """Positions restart with each run of ids; ids are unique in a batch, so no run's id comes again."""
    model = build()
    tokens = random_tokens(1, 6)
    documents = torch.tensor([[0, 0, 1, 1, 1, -1]])
    explicit = model(tokens, documents, positions=torch.tensor([[0, 1, 0, 1, 2, 0]])).final
    assert torch.equal(model(tokens, documents).final, explicit)


@pytest.mark.parametrize("window", [-1, 1, 2, 5])
def test_a_tree_of_candidates_equals_its_chains(window):
    """Two rows of different length verify the tree root -> (a -> (c, d), b -> e) in one pass."""
    model = build(sliding_window=window)
    prompt, nodes = random_tokens(2, 8), random_tokens(2, 6, seed=1)
    parents = [-1, 0, 0, 1, 1, 2]
    chains = [[0, 1, 3], [0, 1, 4], [0, 2, 5]]
    lengths = torch.tensor([8, 5])
    cache = model.new_cache(2, 20)
    model(prompt, cache=cache)
    cache.commit(lengths)

    sees = torch.eye(6, dtype=torch.bool)
    depth = torch.zeros(6, dtype=torch.int64)
    for node, parent in enumerate(parents[1:], 1):
        sees[node] |= sees[parent]
        depth[node] = depth[parent] + 1
    mask = torch.zeros(2, 6, 20, dtype=torch.bool)
    for row, length in enumerate(lengths.tolist()):
        mask[row, :, :length] = True
        mask[row, :, length : length + 6] = sees
    tree = model(nodes, cache=cache, positions=lengths[:, None] + depth, mask=mask).final

    for (row, length), chain in itertools.product(enumerate(lengths.tolist()), chains):
        text = torch.cat([prompt[row, :length], nodes[row, chain]])
        expected = model(text[None]).final[0, length:]
        assert torch.allclose(tree[row, chain], expected, atol=1e-12)
    assert torch.equal(tree, model(nodes, cache=cache, positions=lengths[:, None] + depth, mask=mask[..., :14]).final)


def test_a_token_that_sees_nothing_stays_finite():
    model = build(dtype=torch.float32)
    cache = model.new_cache(1, 4)
    states = model(random_tokens(1, 2), cache=cache, mask=torch.tensor([[[True, False], [False, False]]]))
    assert states.final.isfinite().all()


def test_bfloat16_stays_near_float32():
    exact = build(dtype=torch.float32)
    rounded = build(dtype=torch.bfloat16)
    tokens = random_tokens(2, 13)
    documents = torch.tensor([[0] * 5 + [1] * 8, [2] * 13])
    found = rounded(tokens, documents).final
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), exact(tokens, documents).final) < 0.05


def test_random_weights_follow_the_seed_and_the_rule():
    model = build(seed=3, initializer_range=0.02, hidden_size=96, intermediate_size=160, num_layers=8, qkv_bias=True)
    again, other = (build(seed=seed, **vars(model.config)) for seed in (3, 4))
    for (name, parameter), same, different in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(parameter, same)
        if "norm" in name:
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert not torch.equal(parameter, different)
            std = 0.02 / 4 if "o_proj" in name or "down_proj" in name else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.1, name


def test_a_tied_head_shares_its_memory_through_every_conversion():
    model = get_model("embedllama", "3.2-1b", init="random", device="meta")
    assert model.readout.head.weight is model.readout.embedding.weight
    model = build(tie_embeddings=True).to(torch.float32)
    assert model.readout.head.weight is model.readout.embedding.weight
    assert sum("head" in name for name, _ in model.named_parameters()) == 0


def test_flops_count_the_matrix_products():
    model = build(qk_norm=True, head_dim=10)
    tokens = random_tokens(3, 11)
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    by_name = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    projections = sum(flops for name, flops in by_name.items() if "attention" not in name)
    attention = sum(2 * 2 * 3 * sum(range(1, 12)) * 60 for _ in range(3))  # causal half: 1 + ... + 11 keys, 60 = heads x head_dim
    assert model.flops(33, 11) == projections + attention


def test_compiled_layers_decode_eagerly():
    """The number of slots grows with every token; compiled code would be made anew each time."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, plain = build(), build()
    for layer in model.layers:
        layer.compile(backend=backend)
    text = random_tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [2] * 9])
    assert torch.allclose(model(text, documents).final, plain(text, documents).final, atol=1e-12)
    compiled = len(graphs)
    assert compiled > 0
    cache = model.new_cache(2, 9)
    for i in range(9):
        state = model(text[:, i : i + 1], cache=cache).final
        cache.commit(1)
    assert torch.allclose(state[:, 0], plain(text).final[:, -1], atol=1e-12)
    assert len(graphs) == compiled


def test_compiled_layers_stay_whole_when_the_length_changes():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = build(), build()
    for layer in model.layers:
        layer.compile(backend="eager")
    for rows, length in ((2, 9), (3, 7), (4, 13)):  # the second time on, sizes are symbols
        text = random_tokens(rows, length)
        assert torch.allclose(model(text).final, plain(text).final, atol=1e-12)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_sharded_by_fsdp_it_trains_and_decodes_the_same(one_rank_mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    plain = build(tie_embeddings=True).requires_grad_(True)
    model = EmbedLLaMA(plain.config)  # float32 masters, computed in float64
    policy = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64, cast_forward_inputs=False)
    for unit in (*model.layers, model.readout, model):
        fully_shard(unit, mesh=one_rank_mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(model.readout, "call")
    model.init_weights(torch.Generator().manual_seed(0))

    tokens = random_tokens(2, 7)
    documents = torch.tensor([[0] * 3 + [1] * 4, [2] * 7])
    grads = []
    for each in (plain, model):
        states = each(tokens, documents, taps=(1,))
        (each.readout.logits(states.final).square().mean() + states.taps[0].square().mean()).backward()
        full = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in each.parameters())
        grads.append([grad.double() for grad in full])
    assert len(grads[0]) == len(grads[1])
    assert all(relative_error(found, wanted) < 1e-5 for wanted, found in zip(*grads))

    with torch.no_grad():
        cache = model.new_cache(2, 7)
        for i in range(7):
            state = model(tokens[:, i : i + 1], cache=cache).final
            cache.commit(1)
        assert relative_error(state[:, 0], plain(tokens).final[:, -1]) < 1e-5


def test_sharded_weights_are_written_read_and_identified(one_rank_mesh, tmp_path):
    from torch.distributed.fsdp import fully_shard

    plain = build(tie_embeddings=True, dtype=torch.float32)
    model = EmbedLLaMA(plain.config)
    for unit in (*model.layers, model.readout, model):
        fully_shard(unit, mesh=one_rank_mesh)
    model.init_weights(torch.Generator().manual_seed(0))
    save_hf(model, tmp_path / "written", torch.float32)
    model.init_weights(torch.Generator().manual_seed(1))
    assert fingerprint(model) != fingerprint(plain)
    load_hf(model, tmp_path / "written")
    assert fingerprint(model) == fingerprint(plain) == fingerprint(tmp_path / "written")
    assert all(torch.equal(shard.full_tensor(), full) for shard, full in zip(model.parameters(), plain.parameters()))


@pytest.mark.parametrize(
    "options, message",
    [({"num_kv_heads": 4}, "must divide"), ({"head_dim": 3}, "even"), ({"num_layers": 0}, "at least 1")],
)
def test_impossible_shapes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LlamaConfig(**{**vars(CONFIG), **options})
