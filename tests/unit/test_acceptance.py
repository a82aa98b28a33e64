"""Figures of acceptance against closed forms, the report of `measure`, and greedy identity on real models."""

import json
import math
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import torch.nn.functional as F

from spectitan.config.sections import Eval, Objective
from spectitan.decoding.acceptance import first_difference, measure, measure_acceptance, summarize_acceptance
from spectitan.decoding.generation import Generation
from spectitan.decoding.heldout import heldout_report, heldout_sums
from spectitan.decoding.plain import generate_plain
from spectitan.decoding.report import acceptance_picture, table, write_report
from spectitan.decoding.sampling import Sampling
from spectitan.decoding.speculative import generate_speculative
from spectitan.decoding.tree import generate_tree
from spectitan.errors import UserError
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.speculators.next_token import NextToken
from spectitan.states.online import OnlineStates
from spectitan.types import TokenBatch
from tests.unit.toy_models import OracleDrafter, TableDrafter, ToyBase

VOCAB = 61


def text_batch(index, rows=16, length=24):
    """Counting in a few step widths, with noise: easy enough that a tiny drafter is right sometimes."""
    generator = torch.Generator().manual_seed(index)
    start, width = torch.randint(VOCAB, (rows, 1), generator=generator), torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = (start + width * torch.arange(length)) % VOCAB
    noise = torch.rand(tokens.shape, generator=generator) < 0.05
    tokens = torch.where(noise, torch.randint(VOCAB, tokens.shape, generator=generator), tokens)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows)[:, None].expand_as(tokens).clone(),
                      torch.arange(rows), torch.arange(rows))  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A tiny base and an mlp drafter, both trained a little: acceptance is neither 0 nor full."""
    config = LlamaConfig(VOCAB, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, max_position_embeddings=96)
    base, drafter = EmbedLLaMA(config), MlpSpeculator(MlpConfig(3, 24, True, True), config, Objective())
    base.init_weights(torch.Generator().manual_seed(0))
    drafter.init_weights(torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([*base.parameters(), *drafter.parameters()], lr=1e-2)
    for step in range(60):
        batch = text_batch(step)
        states = base(batch.tokens)
        loss = F.cross_entropy(base.readout.logits(states.final[:, :-1]).flatten(0, 1), batch.tokens[:, 1:].flatten())
        targets = drafter.align(batch)
        loss = loss + drafter(batch, states.detach(), targets, targets.counts, base.readout).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base.requires_grad_(False), drafter.requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    rows = text_batch(999, rows=21, length=17).tokens.tolist()
    return [row[: 1 + i % 17] for i, row in enumerate(rows)]


def test_summary_of_counts():
    report = summarize_acceptance([[3, 0, 1], [], [2]], 3)
    assert report["acceptance_length"] == 1 + 6 / 4
    assert report["acceptance_length_mean"] == ((1 + 4 / 3) + 3) / 2
    assert report["acceptance_by_position"] == [3 / 4, 2 / 4, 1 / 4]
    assert report["conditional_acceptance"] == [3 / 4, 2 / 3, 1 / 2]
    assert (report["rounds"], report["sequences"], report["accepted_draft_tokens"]) == (4, 3, 6)
    assert math.isclose(report["acceptance_length"], 1 + sum(report["acceptance_by_position"]))


def test_summary_where_nothing_was_accepted_or_drafted():
    assert summarize_acceptance([[0, 0]], 2)["conditional_acceptance"] == [0.0, None]
    empty = summarize_acceptance([[]], 2)
    assert (empty["acceptance_length"], empty["acceptance_length_mean"], empty["acceptance_by_position"]) == (1.0, 1.0, [0.0, 0.0])


def test_rounds_count_before_the_text_is_cut():
    """A perfect drafter of 4 has tau 5, though eos and max_new_tokens cut its last rounds."""
    base = ToyBase(7, order=3, seed=5)
    text = generate_plain(base, [[1, 2]], 40).tokens[0]
    oracle = OracleDrafter([[1, 2, *text]], 4)
    report = measure(base, oracle, [[1, 2]], Eval(max_new_tokens=8, batch_size=1), eos_id=None)
    assert (report["acceptance_length"], report["rounds"], report["identical"]) == (5.0, 2, True)


def test_greedy_text_of_a_trained_drafter_is_that_of_plain_decoding(trained, prompts):
    base, drafter = trained
    for eos_id in (None, 7, 30):
        for rows in (prompts, *([prompt] for prompt in prompts[:2])):
            plain = generate_plain(base, rows, 40, eos_id=eos_id)
            speculative = generate_speculative(base, drafter, rows, 40, 3, eos_id=eos_id)
            assert speculative.tokens == plain.tokens
    counts = [count for row in speculative.accepted + generate_speculative(base, drafter, prompts, 40, 3).accepted for count in row]
    assert set(counts) == {0, 1, 2, 3}  # every length of acceptance was tried


def test_greedy_text_of_bad_and_perfect_drafters_is_that_of_plain_decoding(trained, prompts):
    base, _ = trained
    plain = generate_plain(base, prompts, 40)
    for k in (1, 4):
        oracle = OracleDrafter([prompt + text + [0] * k for prompt, text in zip(prompts, plain.tokens)], k)
        for drafter in (TableDrafter(VOCAB, k), oracle):
            assert generate_speculative(base, drafter, prompts, 40, k).tokens == plain.tokens


def test_plain_greedy_is_the_base_without_a_cache(trained, prompts):
    base, _ = trained
    for prompt, text in zip(prompts, generate_plain(base, prompts, 12).tokens):
        logits = base.readout.logits(base(torch.tensor([[*prompt, *text[:-1]]])).final)[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == text


def test_generation_fills_the_context_of_a_real_base(trained):
    base, drafter = trained
    prompts = [[1] * 95, [2] * 90, [3] * 10]
    plain, speculative = generate_plain(base, prompts, 30), generate_speculative(base, drafter, prompts, 30, 3)
    assert [len(text) for text in plain.tokens] == [1, 6, 30] and speculative.tokens == plain.tokens


def test_sampled_acceptance_is_the_overlap_of_the_distributions(trained):
    """P(first draft accepted) = sum_v min(p, q), here over many rows of one prompt."""
    base, drafter = trained
    rows, sampling = 4000, Sampling(1.0, seed=4)
    generation = generate_speculative(base, drafter, [[5, 7, 9]] * rows, 2, 1, sampling=sampling)
    states = base(torch.tensor([[5, 7, 9]])).final[:, -1].expand(VOCAB, -1)
    first = base.readout.logits(states[:1]).softmax(-1)[0].double()
    second = torch.cat([torch.tensor([[5, 7, 9]]).expand(VOCAB, -1), torch.arange(VOCAB)[:, None]], 1)
    target = base.readout.logits(base(second).final[:, -1]).softmax(-1).double()
    q = drafter.head[0](drafter.advance(0, drafter.first_state(states), drafter.emb[0](torch.arange(VOCAB))).hidden).softmax(-1).double()
    expected = float((first * torch.minimum(target, q).sum(-1)).sum())
    measured = sum(count for row in generation.accepted for count in row) / rows
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)


def test_report_of_measure(trained, prompts, tmp_path):
    base, drafter = trained
    training, random_state = base.training, torch.get_rng_state()
    config = Eval(max_new_tokens=24, batch_size=4, speed_prompts=3, num_prompts=9)
    report = measure(base, drafter, prompts, config, eos_id=None, overlap=0)
    assert report["identical"] and report["first_difference"] is None and report["overlap"] == 0
    assert (report["sequences"], report["num_draft_tokens"], report["dtype"], report["speed_prompts"]) == (9, 3, "float32", 3)
    assert report["prompt_tokens"] == {"min": 1, "mean": 5.0, "max": 9}
    assert math.isclose(report["acceptance_length"], 1 + sum(report["acceptance_by_position"]))
    assert math.isclose(report["speedup"], report["speculative_tokens_per_second"] / report["plain_tokens_per_second"])
    assert 1 < report["acceptance_length"] < 4 and report["round_cost"] > 0.5
    alone = measure_acceptance(base, drafter, prompts, config, eos_id=None)
    assert alone == {name: report[name] for name in alone}
    assert base.training == training and torch.equal(random_state, torch.get_rng_state())

    assert json.loads(write_report(report, tmp_path / "run").read_text()) == report
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["acceptance.svg", "report.json"]
    drawing = ElementTree.fromstring(acceptance_picture(report))
    assert len(drawing.findall("{http://www.w3.org/2000/svg}path")) == 3
    assert f"{report['acceptance_length']:.3f}" in table(report)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_tree_is_reported_beside_the_chain(trained, prompts, tmp_path, temperature):
    base, drafter = trained
    config = Eval(max_new_tokens=24, batch_size=4, speed_prompts=2, num_prompts=9, temperature=temperature)
    alone = measure(base, drafter, prompts, config, eos_id=3, seed=5)
    config.top_k_tokens_per_head = [2, 2, 1]
    report = measure(base, drafter, prompts, config, eos_id=3, seed=5)
    tree = report["tree"]
    assert report.keys() - alone.keys() == {"tree"} and alone.keys() <= report.keys()
    timed = {"plain_tokens_per_second", "speculative_tokens_per_second", "speedup", "round_cost"}
    assert all(report[name] == alone[name] for name in alone.keys() - timed)
    assert (tree["top_k_tokens_per_head"], tree["n_candidates"]) == ([2, 2, 1], 4)  # all, as they are fewer than 5
    assert tree["identical"] is report["identical"] is (True if temperature == 0 else None)
    generation = generate_tree(base, drafter, prompts[:9], 24, [2, 2, 1], 4, sampling=Sampling(temperature, seed=5), eos_id=3)
    expected = summarize_acceptance(generation.accepted, 3)
    assert {name: tree[name] for name in expected} == expected != {name: report[name] for name in expected}
    assert math.isclose(tree["speedup"], tree["speculative_tokens_per_second"] / tree["plain_tokens_per_second"])
    assert tree["round_cost"] > 0.3 and timed <= tree.keys()

    assert json.loads(write_report(report, tmp_path).read_text()) == report
    lines = table(report).splitlines()
    assert [f"{report[name]['acceptance_length'] if name else report['acceptance_length']:.3f}" for name in ("", "tree")] == [
        line.split()[1] for line in lines if line.startswith("acceptance_length ")
    ]
    assert sum(line.startswith("conditional_acceptance") for line in lines) == 2 and "[2, 2, 1]" in table(report)


def test_one_draft_token_and_sampling_in_measure(trained, prompts):
    base, drafter = trained
    report = measure(base, drafter, prompts, Eval(temperature=0.9, num_draft_tokens=1, num_prompts=4, max_new_tokens=9), eos_id=3, seed=8)
    assert report["identical"] is None and len(report["acceptance_by_position"]) == 1


def test_acceptance_does_not_depend_on_the_batch_size(trained, prompts):
    base, drafter = trained
    for temperature in (0.0, 0.8):
        reports = [
            measure_acceptance(base, drafter, prompts, Eval(temperature=temperature, batch_size=size, max_new_tokens=20), eos_id=2)
            for size in (2, 21)
        ]
        assert reports[0] == reports[1]


def test_first_difference_is_named_with_its_margin(trained):
    base, _ = trained
    text = generate_plain(base, [[4, 5]], 6).tokens[0]
    other = [*text[:3], (text[3] + 1) % VOCAB, *text[4:]]
    found = first_difference(base, [[1], [4, 5]], [[2], text], [[2], other])
    best = base.readout.logits(base(torch.tensor([[4, 5, *text[:3]]])).final[0, -1]).sort(descending=True).values
    assert (found["prompt"], found["position"], found["plain"], found["speculative"]) == (1, 3, text[3], other[3])
    assert math.isclose(found["top2_margin"], float(best[0] - best[1]), rel_tol=1e-4)
    assert first_difference(base, [[4, 5]], [text], [text[:2]])["speculative"] is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_draft_tokens": 4}, "eval.num_draft_tokens = 4; allowed: -1, or 1 to the 3 steps"),
        ({"prompts": "x"}, "at least one"),
        ({"top_k_tokens_per_head": [2, 2]}, r"eval.top_k_tokens_per_head = \[2, 2\] has 2 numbers; allowed: 3"),
        ({"top_k_tokens_per_head": [2, 2, 2], "num_draft_tokens": 2}, "has 3 numbers; allowed: 2"),
        ({"top_k_tokens_per_head": [1, 62, 1]}, "up to the 61 tokens"),
    ],
)
def test_settings_that_cannot_be(trained, changes, words):
    with pytest.raises(UserError, match=words):
        measure(*trained, [] if "prompts" in changes else [[1]], Eval(**changes), eos_id=None)


def test_a_tree_of_a_drafter_of_chains_is_refused(trained):
    base, _ = trained
    with pytest.raises(UserError, match="one chain only"):
        measure(base, OracleDrafter([[1]], 2), [[1]], Eval(top_k_tokens_per_head=[2, 2]), eos_id=None)


def test_heldout_loss_is_the_plain_mean(trained):
    base, drafter = trained
    batches = [text_batch(500, rows=3, length=11), text_batch(501, rows=2, length=23)]
    sums, counts = heldout_sums(drafter, OnlineStates(base, drafter.taps, frozen=True), batches, base.readout)
    report = heldout_report(drafter.metrics, sums, counts)
    next_token = NextToken(32, VOCAB, Objective())
    own = heldout_report(next_token.metrics, *heldout_sums(next_token, OnlineStates(base, (), True), batches, base.readout))
    losses, hits, base_losses = [[], [], []], [[], [], []], []
    for batch in batches:
        final = base(batch.tokens).final
        logits = base.readout.logits(final[:, :-1]).flatten(0, 1)
        base_losses.append(F.cross_entropy(logits, batch.tokens[:, 1:].flatten(), reduction="none"))
        state = drafter.first_state(final)
        for step in range(3):
            known = batch.tokens.roll(-1 - step, 1)
            state = drafter.advance(step, state, drafter.emb[0](known))
            logits = drafter.head[0](state.hidden)[:, : -2 - step].flatten(0, 1)
            targets = batch.tokens[:, 2 + step :].flatten()
            losses[step].append(F.cross_entropy(logits, targets, reduction="none"))
            hits[step].append((logits.argmax(-1) == targets).double())
    for step in range(3):
        assert math.isclose(report["heldout_loss"][step], float(torch.cat(losses[step]).mean()), rel_tol=1e-5)
        assert math.isclose(report["heldout_accuracy"][step], float(torch.cat(hits[step]).mean()), rel_tol=1e-9)
    assert math.isclose(own["heldout_loss"][0], float(torch.cat(base_losses).mean()), rel_tol=1e-5)
    assert own["heldout_tokens"] == 3 * 10 + 2 * 22


def test_time_of_the_prefill_is_part_of_the_time(trained):
    base, _ = trained
    generation = generate_plain(base, [[1, 2, 3]], 5)
    assert isinstance(generation, Generation) and 0 < generation.prefill_seconds < generation.seconds
