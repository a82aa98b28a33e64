"""Candidate trees: verification against plain forwards, text against plain decoding, candidates against their definition."""

import pytest
import torch

from spectitan.config.sections import Objective
from spectitan.data.prompts import load_prompts
from spectitan.data.tokenizer import load_tokenizer
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampling
from spectitan.decoding.speculative import generate_speculative
from spectitan.decoding.tree import Tree, generate_tree, pad_trees, visible_slots
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.models.registry import get_model
from spectitan.models.weights import resolve_base_path
from spectitan.speculators.lstm import LstmConfig, LstmSpeculator
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.types import BaseStates
from tests.unit.model_fixtures import VOCAB, random_tokens
from tests.unit.test_decoding import PROMPTS, chi_square_p_value, greedy_reference, histogram, text_distribution
from tests.unit.toy_models import CountingDrafter, OracleDrafter, TableDrafter, ToyBase, likeliest_chains

CANDIDATES = [[5, 6, 7], [5, 6, 8], [5, 9, 7], [3, 6, 7], [5, 6, 7]]


def real_base(**options) -> EmbedLLaMA:
    config = LlamaConfig(VOCAB, 24, 40, num_layers=3, num_heads=6, num_kv_heads=2, initializer_range=0.3, **options)
    base = EmbedLLaMA(config).double()
    base.init_weights(torch.Generator().manual_seed(0))
    return base.requires_grad_(False)


def recurrent(kind: str, tied: bool, steps: int = 3):
    config = LlamaConfig(VOCAB, 24, 40, num_layers=1, num_heads=6)
    family, keys = {"mlp": (MlpSpeculator, MlpConfig), "lstm": (LstmSpeculator, LstmConfig)}[kind]
    drafter = family(keys(steps, 17, tied), config, Objective()).double()
    drafter.init_weights(torch.Generator().manual_seed(2))
    return drafter.requires_grad_(False)


def test_candidates_merge_where_they_begin_alike():
    tree = Tree(4, CANDIDATES)
    assert tree.tokens == [4, 5, 6, 7, 8, 9, 7, 3, 6, 7]  # the last candidate, a repeat, adds nothing
    assert [[tree.tokens[node] for node in tree.paths[node]] for node in (0, 3, 4, 6, 9)] == [
        [4], [4, 5, 6, 7], [4, 5, 6, 8], [4, 5, 9, 7], [4, 3, 6, 7]
    ]  # fmt: skip
    for node, path in enumerate(tree.paths):
        chosen = [0] * len(tree.tokens)  # 0 is drafted nowhere: it ends the path
        for parent, child in zip(path, path[1:]):
            chosen[parent] = tree.tokens[child]
        assert tree.follow(chosen) == path and path[-1] == node


@pytest.mark.parametrize("window", [-1, 2, 6])
def test_every_node_has_the_logits_of_its_own_chain(window):
    """Rows of different length with trees of different size; then each keeps a path, and goes on from it."""
    base, lengths, prompt = real_base(sliding_window=window), torch.tensor([8, 5, 1]), random_tokens(3, 8)
    cache = base.new_cache(3, 30)
    base(prompt, cache=cache)
    cache.commit(lengths)
    trees = [Tree(4, CANDIDATES), Tree(9, [[1, 2, 3], [1, 3, 2]]), Tree(0, [[0, 0, 0]])]
    tokens, depths, paths = pad_trees(trees, 3, torch.device("cpu"))
    mask = visible_slots(cache.lengths, paths, 30)
    states = base(tokens, cache=cache, positions=cache.lengths[:, None] + depths, mask=mask)
    found = base.readout.logits(states.final)
    texts = [prompt[row, :length].tolist() for row, length in enumerate(lengths.tolist())]
    for row, tree in enumerate(trees):
        for node, path in enumerate(tree.paths):
            chain = torch.tensor([texts[row] + [tree.tokens[n] for n in path]])
            assert torch.allclose(found[row, node], base.readout.logits(base(chain).final[0, -1]), atol=1e-11)

    places, counts = torch.tensor([[0, 7, 8, 9], [0, 1, 4, 5], [0, 1, 2, 3]]), torch.tensor([4, 3, 0])
    cache.keep(places, counts)
    following = torch.tensor([[11, 12], [13, 14], [15, 16]])
    found = base.readout.logits(base(following, cache=cache).final)
    for row, count in enumerate(counts.tolist()):
        chain = torch.tensor([texts[row] + [trees[row].tokens[n] for n in places[row, :count]] + following[row].tolist()])
        assert torch.allclose(found[row], base.readout.logits(base(chain).final[0, -2:]), atol=1e-11)


@pytest.mark.parametrize("top_k, n", [([1, 1, 1], 1), ([2, 2], 3), ([3, 1, 2], 6), ([4], 4), ([5, 4, 3], 5)])
@pytest.mark.parametrize("eos_id", [None, 0, 3])
def test_greedy_text_is_plain_text_for_a_bad_drafter(top_k, n, eos_id):
    for seed in range(3):
        base, drafter = ToyBase(5, seed=seed), CountingDrafter(5, len(top_k), seed=100 + seed)
        generation = generate_tree(base, drafter, PROMPTS, 23, top_k, n, eos_id=eos_id)
        assert generation.tokens == [greedy_reference(base, prompt, 23, eos_id) for prompt in PROMPTS]
        for prompt, text, following in zip(PROMPTS, generation.tokens, drafter.following):
            known = [*prompt[1:], *text]  # what the drafter was shown is the text, each token once, in order
            assert following[: len(known)] == known[: len(following)]


@pytest.mark.parametrize("sampling", [Sampling(0.7, seed=1), Sampling(1.4, top_k=3, seed=2)])
def test_sampled_text_is_plain_text(sampling):
    """Token for token: the base draws at the same random numbers."""
    base, drafter = ToyBase(5, seed=3), TableDrafter(5, 3, seed=5)
    for eos_id in (None, 2):
        plain = generate_plain(base, PROMPTS, 40, sampling=sampling, eos_id=eos_id, row_keys=range(7, 11))
        tree = generate_tree(base, drafter, PROMPTS, 40, [3, 2, 2], 7, sampling=sampling, eos_id=eos_id, row_keys=range(7, 11))
        assert tree.tokens == plain.tokens


@pytest.mark.parametrize("top_k, n", [([1], 1), ([2, 2, 1], 3), ([3, 3], 9)])
def test_sampled_text_has_the_exact_distribution(top_k, n):
    """Against the product of the base's conditionals, with a drafter far from the base (whose own text this test refuses)."""
    sampling, rows, length = Sampling(1.0, seed=1), 2_000, 3
    base, drafter = ToyBase(4, seed=8), TableDrafter(4, len(top_k), seed=6, sharpness=3.0)
    expected = rows * text_distribution(base, [2, 1], length, sampling)
    generation = generate_tree(base, drafter, [[2, 1]] * rows, length, top_k, n, sampling=sampling)
    assert chi_square_p_value(histogram(generation.tokens, 4, length), expected) > 1e-3
    counts = [count for row in generation.accepted for count in row]
    assert 0.05 < sum(counts) / (len(top_k) * len(counts)) < 0.95  # accepting and refusing both really happen


def test_rounds_accept_the_longest_candidate_that_the_text_confirms():
    """Recomputed from the text: the candidates of a table drafter are a function of the last token alone."""
    base, drafter, top_k, n = ToyBase(4, order=4, seed=3), TableDrafter(4, 3, seed=9), [2, 2, 1], 4
    scores = drafter.table.log_softmax(-1)
    text = greedy_reference(base, PROMPTS[0], 60)

    def confirmed(candidate: list[int], place: int) -> int:
        right = [a == b for a, b in zip(candidate, text[place:])]
        return right.index(False) if False in right else len(candidate)

    place, expected, of_chain = 1, [], []
    while place < 40:
        last = text[place - 1]
        candidates = likeliest_chains(lambda chain: scores[[last, *chain][-1]], top_k, n)
        of_chain.append(confirmed(likeliest_chains(lambda chain: scores[[last, *chain][-1]], [1, 1, 1], 1)[0], place))
        expected.append(max(confirmed(candidate, place) for candidate in candidates))
        place += expected[-1] + 1
    assert generate_tree(base, drafter, PROMPTS[:1], 40, top_k, n).accepted[0] == expected
    # All products of the heads' choices are candidates here, so the chain is one of them.
    assert all(tree >= chain for tree, chain in zip(expected, of_chain)) and sum(expected) > sum(of_chain)


def test_one_candidate_is_the_chain():
    base, toy = ToyBase(5, order=3, seed=4), TableDrafter(5, 3)
    for prompts in (PROMPTS, PROMPTS[1:2]):
        chain, tree = generate_speculative(base, toy, prompts, 40, 3), generate_tree(base, toy, prompts, 40, [1, 1, 1], 1)
        assert (tree.tokens, tree.accepted) == (chain.tokens, chain.accepted)
    base = real_base()
    for kind in ("mlp", "lstm"):
        drafter, prompts = recurrent(kind, True), random_tokens(3, 6).tolist()
        chain, tree = generate_speculative(base, drafter, prompts, 25, 3), generate_tree(base, drafter, prompts, 25, [1, 1, 1], 1)
        assert (tree.tokens, tree.accepted) == (chain.tokens, chain.accepted)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]])
def test_the_truth_among_candidates_is_accepted_in_full(prompts):
    base, k, new = ToyBase(7, order=3, seed=5), 4, 21
    texts = [greedy_reference(base, prompt, new + k) for prompt in prompts]
    oracle = OracleDrafter([prompt + text for prompt, text in zip(prompts, texts)], k, vocab_size=7)
    generation = generate_tree(base, oracle, prompts, new, [6] * k, 6)
    assert generation.tokens == [text[:new] for text in texts]
    assert generation.accepted == [[k] * 4] * len(prompts)
    assert base.passes == 1 + 4


@pytest.mark.parametrize("context", [8, 9, 12])
def test_generation_stops_at_the_context(context):
    base = ToyBase(5, context=context, seed=2)
    expected = [greedy_reference(base, prompt, 50) for prompt in PROMPTS]
    for drafter in (CountingDrafter(5, 3), OracleDrafter([p + t for p, t in zip(PROMPTS, expected)], 3, vocab_size=5)):
        assert generate_tree(base, drafter, PROMPTS, 50, [2, 2, 2], 4).tokens == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=11)])
def test_a_row_does_not_depend_on_its_batch(sampling):
    base, drafter = ToyBase(5, sharpness=0.7), TableDrafter(5, 3)

    def generate(prompts, keys):
        return generate_tree(base, drafter, prompts, 30, [3, 2, 1], 4, sampling=sampling, eos_id=2, row_keys=keys)

    together = generate(PROMPTS, range(10, 14))
    for row, prompt in enumerate(PROMPTS):
        alone = generate([prompt], [10 + row])
        assert (alone.tokens[0], alone.accepted[0]) == (together.tokens[row], together.accepted[row])


@pytest.mark.parametrize("kind, tied", [("mlp", True), ("mlp", False), ("lstm", True)])
def test_recurrent_drafters_propose_the_likeliest_chains(kind, tied):
    drafter, top_k, n = recurrent(kind, tied, steps=4), [3, 1, 4, 2], 11
    final = torch.randn(2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tokens, counts = random_tokens(2, 3), torch.tensor([3, 1])
    found = drafter.draft_tree(None, tokens, BaseStates(final), counts, None, top_k, n)
    assert found.probabilities is None and found.tokens.shape == (2, n, 4)
    for row, last in enumerate((counts - 1).tolist()):

        def log_probabilities(chain):
            """Of the step after a chain, by the training forward."""
            known = torch.tensor([tokens[row, last], *chain, *[0] * (3 - len(chain))])[:, None]
            step = len(chain)
            head = drafter.head[min(step, len(drafter.head) - 1)]
            return head(drafter.unroll(final[row, last][None], known)[step, 0]).log_softmax(-1)

        assert found.tokens[row].tolist() == likeliest_chains(log_probabilities, top_k, n)
    assert len(set(map(tuple, found.tokens[0].tolist()))) == n


@pytest.mark.parametrize("window", [-1, 2, 9])
def test_a_real_base_writes_its_plain_text(window):
    base, prompts = real_base(sliding_window=window, max_position_embeddings=40), [[1] * 9, [5, 6, 7], [8] * 30]
    texts = generate_plain(base, prompts, 30).tokens
    oracle = OracleDrafter([p + t + [0] * 3 for p, t in zip(prompts, texts)], 3, vocab_size=VOCAB)
    for drafter in (oracle, TableDrafter(VOCAB, 3), recurrent("mlp", True)):
        generation = generate_tree(base, drafter, prompts, 30, [2, 2, 2], 5)
        assert generation.tokens == texts
        assert drafter is not oracle or generation.accepted[0][:7] == [3] * 7
        assert generate_tree(base, drafter, prompts[1:2], 30, [3, 1, 1], 3).tokens == texts[1:2]


def test_the_base_that_ships_writes_its_plain_text():
    """In float32, drafts right and wrong in turn."""
    path = resolve_base_path("spectitan:pystdlib")
    base = get_model("embedllama", "auto", path).requires_grad_(False).float()
    prompts = [prompt[-40:] for prompt in load_prompts("spectitan:pystdlib", load_tokenizer(path))[:3]]
    texts = generate_plain(base, prompts, 24).tokens
    corrupted = [prompt + [token if place % 5 else 1 for place, token in enumerate(text)] + [0] * 3 for prompt, text in zip(prompts, texts)]
    generation = generate_tree(base, OracleDrafter(corrupted, 3, vocab_size=4096), prompts, 24, [2, 2, 2], 4)
    assert generation.tokens == texts
    assert len(set(sum(generation.accepted, []))) > 1
