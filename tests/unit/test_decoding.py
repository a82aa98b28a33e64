"""Plain and speculative decoding against closed forms: toy bases whose every probability is known."""

import itertools

import pytest
import torch

from spectitan.decoding.plain import generate_plain
from spectitan.decoding.sampling import Sampler, Sampling, Stream, draw
from spectitan.decoding.speculative import generate_speculative
from spectitan.errors import UserError
from spectitan.keyed_random import uniform
from tests.unit.toy_models import CountingDrafter, OracleDrafter, TableDrafter, ToyBase

PROMPTS = [[1], [2, 0, 3, 4, 1], [4, 4], [0, 1, 2, 3, 4, 0, 1]]


def greedy_reference(base, prompt, max_new_tokens, eos_id=None):
    """The definition: append the most likely token, over and over, with no cache."""
    text = []
    while len(text) < min(max_new_tokens, base.config.max_position_embeddings - len(prompt)):
        text.append(int(base.logits_after(prompt + text).argmax()))
        if text[-1] == eos_id:
            break
    return text


def text_distribution(base, prompt, length, sampling):
    """float64 [vocab] * length: the exact probability of every continuation."""
    vocab_size = base.config.vocab_size
    joint = torch.zeros((vocab_size,) * length, dtype=torch.float64)
    for text in itertools.product(range(vocab_size), repeat=length):
        probability = 1.0
        for i, token in enumerate(text):
            probability *= float(sampling.probabilities(base.logits_after([*prompt, *text[:i]]))[token])
        joint[text] = probability
    return joint.flatten()


def chi_square_p_value(observed, expected):
    """P(a chi-square as large as this | the counts were drawn from `expected`). Cells expected below 5 are pooled."""
    small = expected < 5
    if small.any():
        observed = torch.cat([observed[~small], observed[small].sum()[None]])
        expected = torch.cat([expected[~small], expected[small].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected.clamp_min(1e-300))[expected > 0].sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), statistic / 2))


def histogram(texts, vocab_size, length):
    codes = torch.tensor([text[:length] for text in texts]) @ vocab_size ** torch.arange(length - 1, -1, -1)
    return torch.bincount(codes, minlength=vocab_size**length).double()


@pytest.mark.parametrize("eos_id", [None, 3])
def test_plain_greedy_is_the_definition(eos_id):
    base = ToyBase(5)
    texts = generate_plain(base, PROMPTS, 23, eos_id=eos_id).tokens
    assert texts == [greedy_reference(base, prompt, 23, eos_id) for prompt in PROMPTS]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("eos_id", [None, 0, 1, 2, 3, 4])
def test_speculative_greedy_is_plain_greedy_for_a_bad_drafter(k, eos_id):
    for seed in range(6):
        base = ToyBase(5, seed=seed)
        drafter = CountingDrafter(5, k, seed=100 + seed)
        speculative = generate_speculative(base, drafter, PROMPTS, 23, k, eos_id=eos_id)
        expected = [greedy_reference(base, prompt, 23, eos_id) for prompt in PROMPTS]
        assert speculative.tokens == expected
        for prompt, text, following in zip(PROMPTS, speculative.tokens, drafter.following):
            known = [*prompt[1:], *text]  # what the drafter was shown is the text, each token once, in order
            assert following[: len(known)] == known[: len(following)]


def test_perfect_drafter_is_accepted_in_full():
    base, k, new = ToyBase(7, order=3, seed=5), 4, 21
    texts = [greedy_reference(base, prompt, new + k) for prompt in PROMPTS]
    oracle = OracleDrafter([prompt + text for prompt, text in zip(PROMPTS, texts)], k)
    generation = generate_speculative(base, oracle, PROMPTS, new, k)
    assert generation.tokens == [text[:new] for text in texts]
    assert generation.accepted == [[k] * 4] * len(PROMPTS)  # the prefill's token, then 20 in rounds of 5
    assert base.passes == 1 + 4


def test_accepted_counts_are_those_of_the_text():
    """accepted is recomputed from the text: the drafts of a table drafter are a function of the last token alone."""
    base, k = ToyBase(4, order=4, seed=3), 3
    drafter = TableDrafter(4, k, seed=9)
    generation = generate_speculative(base, drafter, PROMPTS[:1], 40, k)
    text = greedy_reference(base, PROMPTS[0], 60)
    place, expected = 1, []
    while place < 40:
        drafted, token = [], text[place - 1]
        for _ in range(k):
            token = int(drafter.table[token].argmax())
            drafted.append(token)
        right = [a == b for a, b in zip(drafted, text[place:])]
        expected.append(right.index(False) if False in right else k)
        place += expected[-1] + 1
    assert generation.accepted[0] == expected and len(set(expected)) > 1


@pytest.mark.parametrize("context", [8, 9, 12])
def test_generation_stops_at_the_context(context):
    base = ToyBase(5, context=context, seed=2)
    expected = [greedy_reference(base, prompt, 50) for prompt in PROMPTS]
    assert [len(p) + len(text) for p, text in zip(PROMPTS, expected)] == [context] * len(PROMPTS)
    assert generate_plain(base, PROMPTS, 50).tokens == expected
    for drafter in (CountingDrafter(5, 3), OracleDrafter([p + t for p, t in zip(PROMPTS, expected)], 3)):
        assert generate_speculative(base, drafter, PROMPTS, 50, 3).tokens == expected


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, seed=11), Sampling(1.3, top_k=3, seed=12)])
def test_a_row_does_not_depend_on_its_batch(sampling):
    base, drafter = ToyBase(5, sharpness=0.7), TableDrafter(5, 3)
    for generate in (
        lambda prompts, keys: generate_plain(base, prompts, 30, sampling=sampling, eos_id=2, row_keys=keys),
        lambda prompts, keys: generate_speculative(base, drafter, prompts, 30, 3, sampling=sampling, eos_id=2, row_keys=keys),
    ):
        together = generate(PROMPTS, range(10, 14))
        for row, prompt in enumerate(PROMPTS):
            alone = generate([prompt], [10 + row])
            assert (alone.tokens[0], alone.accepted[0]) == (together.tokens[row], together.accepted[row])


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    generate_speculative(ToyBase(5), TableDrafter(5, 2), PROMPTS, 9, 2, sampling=Sampling(1.0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=1), Sampling(0.6, seed=2), Sampling(1.5, top_k=2, seed=3)])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_sampled_text_has_the_exact_distribution(sampling, k):
    """Plain and speculative text against the product of the base's conditionals, with a drafter far from the base."""
    base, drafter, rows, length = ToyBase(4, seed=8), TableDrafter(4, k, seed=6, sharpness=3.0), 8_000, 4
    expected = rows * text_distribution(base, [2, 1], length, sampling)
    speculative = generate_speculative(base, drafter, [[2, 1]] * rows, length, k, sampling=sampling)
    assert chi_square_p_value(histogram(speculative.tokens, 4, length), expected) > 1e-3
    assert expected[histogram(speculative.tokens, 4, length) > 0].min() > 0  # never a text that top_k excludes
    counts = [count for row in speculative.accepted for count in row]
    assert 0.05 < sum(counts) / (k * len(counts)) < 0.7  # accepting and resampling both really happen
    if k == 1:
        plain = generate_plain(base, [[2, 1]] * rows, length, sampling=sampling)
        assert chi_square_p_value(histogram(plain.tokens, 4, length), expected) > 1e-3


def test_chi_square_test_has_power():
    """The same test rejects the rule that takes every draft: it is the drafter's distribution."""
    base, drafter, rows = ToyBase(4, seed=8), TableDrafter(4, 1, seed=6, sharpness=3.0), 20_000
    expected = rows * text_distribution(base, [2, 1], 2, Sampling(1.0))
    first = torch.softmax(base.logits_after([2, 1]), 0)
    wrong = rows * (first[:, None] * torch.softmax(drafter.table.double(), 1)).flatten()
    assert chi_square_p_value(wrong, expected) < 1e-9


def test_draw_takes_the_token_at_the_quantile():
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 1.0, 0.0]])
    quantile = torch.tensor([1e-12, 0.25, 0.4999, 0.5001, 0.74, 0.76, 1 - 1e-16], dtype=torch.float64)
    assert draw(weights.expand(7, -1), quantile).tolist() == [1, 1, 1, 3, 3, 4, 4]


def test_streams_and_steps_draw_different_numbers():
    keys, rounds = torch.arange(50) + 7, (0, 1, 31, 32, 99, 1)
    sampler = Sampler(Sampling(1.0, seed=5), keys, steps=3)
    numbers = {}
    for stream in Stream:
        for round in rounds:
            numbers[stream, round] = sampler.uniform(stream, round, slice(0, 3))
            for step in range(3):
                assert torch.equal(sampler.uniform(stream, round, step), uniform(5, int(stream), keys, round, step))
                assert torch.equal(numbers[stream, round][:, step], sampler.uniform(stream, round, step))
    assert len(torch.cat(list(numbers.values())).flatten().unique()) == 50 * 3 * 5 * len(Stream)


def test_tokens_are_handed_out_as_they_come():
    base, heard = ToyBase(5, seed=4), [[] for _ in PROMPTS]
    generation = generate_speculative(base, TableDrafter(5, 3), PROMPTS, 17, 3, eos_id=1, on_tokens=lambda row, new: heard[row].extend(new))
    assert heard == generation.tokens


@pytest.mark.parametrize(
    "prompts, words",
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 8], "prompt 0 has 8 tokens: the base's context of 8 leaves room for at most 7"),
        ([[1], [2, 5]], "prompt 1 has token 5: the base has tokens 0 to 4"),
        ([[-1]], "prompt 0 has token -1"),
    ],
)
def test_bad_prompts_are_refused_by_name(prompts, words):
    base = ToyBase(5, context=8)
    for generate in (generate_plain, lambda *args: generate_speculative(args[0], TableDrafter(5, 2), *args[1:], 2)):
        with pytest.raises(UserError, match=words):
            generate(base, prompts, 4)
    assert base.passes == 0


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("temperature", [1e-38, 1e-300])  # the second is 0 in float32
def test_a_tiny_temperature_is_greedy(top_k, temperature):
    logits = torch.tensor([[1.0, 4.0, 3.0, 2.0, -5.0], [0.0, -2.0, -1.0, 5.0, 4.0]])
    rule = Sampling(temperature=temperature, top_k=top_k)
    torch.testing.assert_close(rule.probabilities(logits), torch.nn.functional.one_hot(logits.argmax(-1), 5).float())
    assert rule.choose(logits, torch.tensor([0.999, 0.001])).tolist() == [1, 3]
