"""What a drafter is trained on is what it does when it drafts: the test that finds every misalignment.

On the base's own greedy text, the training forward and `draft()` must be right on the same number of tokens in a row at every
state. A token, state or position that is shifted in one of the two gives other numbers.
"""

import sys

import pytest
import torch
from torch import Tensor

from spectitan.config.sections import Objective
from spectitan.decoding.plain import generate_plain
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATORS, build_speculator
from spectitan.types import BaseStates, TokenBatch

VOCAB, LENGTH, PROMPT, ROWS = 61, 40, 8, 6
# The smallest configuration of each family, for n steps.
CONFIGS = {
    "mlp": lambda config, n: config(n_speculator_heads=n, speculator_width=24, tie_weights=n > 1),
    "lstm": lambda config, n: config(n_speculator_heads=n, speculator_width=24, tie_lstm_embs=n % 2 == 0),
    "eagle3": lambda config, n: config(ttt_steps=n, **EAGLE3[n]),
}
EAGLE3 = {
    1: {"norm_before_fc": True, "draft_arch": "qwen3"},
    2: {"num_layers": 2, "target_layer_ids": [1, 2]},
    3: {"norm_output": True, "ttt_tokens": "own"},
    4: {"sliding_window": 7},
    5: {"fc_norm": True, "norm_before_residual": False, "embed_requires_grad": True},
}


def as_batch(tokens: Tensor) -> TokenBatch:
    index = torch.arange(len(tokens))
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index[:, None].expand_as(tokens), index, index)


@pytest.fixture(scope="module")
def base() -> EmbedLLaMA:
    """Random, with weights so large that its greedy text does not fall into a loop."""
    config = LlamaConfig(VOCAB, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, initializer_range=0.4)
    model = EmbedLLaMA(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def greedy_text(base) -> Tensor:
    """int64 [ROWS, LENGTH]: random prompts, continued by the base."""
    prompts = torch.randint(0, VOCAB, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1)).tolist()
    text = generate_plain(base, prompts, LENGTH - PROMPT).tokens
    assert all(len(set(row)) > 8 for row in text), "a text of few tokens shows nothing"
    return torch.tensor([prompt + new for prompt, new in zip(prompts, text)])


def train_until_half_right(speculator: Speculator, batch: TokenBatch, states: BaseStates, base: EmbedLLaMA) -> None:
    """Learns this very text, and stops when the whole chain is right at 3 rows of 10 (with a part of the vocabulary, 2)."""
    enough = 0.12 if getattr(speculator, "reduced", False) else 0.3
    optimizer = torch.optim.AdamW(speculator.parameters(), 1e-2)
    targets = speculator.align(batch)
    for _ in range(300):
        optimizer.zero_grad()
        loss = speculator(batch, states, targets, targets.counts, base.readout)
        if loss.sums[-1, 3] > enough * loss.counts[-1]:
            return
        loss.total.backward()
        optimizer.step()
    raise AssertionError("not learnt in 300 steps")


@pytest.fixture
def right_by_step(monkeypatch):
    """Makes a family's forward report which of its pairs were right: [state rows, steps], -1 where there is no pair."""
    seen = {}

    def watch(speculator: Speculator):
        module = sys.modules[speculator.forward.__func__.__module__]
        collect = module.collect_loss

        def spy(total, row_stats, targets, rows):
            table = torch.full((rows, len(targets.counts)), -1.0)
            table[targets.state, targets.step] = row_stats[:, 1].float()
            seen["table"] = table
            return collect(total, row_stats, targets, rows)

        monkeypatch.setattr(module, "collect_loss", spy)
        return seen

    return watch


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("family", SPECULATORS)
def test_training_and_drafting_are_right_on_the_same_tokens(family, n, base, greedy_text, right_by_step):
    speculator = build_speculator(family, CONFIGS[family](SPECULATORS[family][0], n), base.config, Objective())
    compare_at_every_state(speculator, n, base, greedy_text, right_by_step)


@pytest.mark.parametrize("loss", ["ce", "kl_div"])
def test_a_draft_vocabulary_makes_no_token_right_that_it_lacks(loss, base, greedy_text, right_by_step):
    """Scored against the base's distribution over the draft vocabulary alone, drafts would be right where they cannot be."""
    ids = torch.tensor([token for token in range(VOCAB) if token % 4])
    config = SPECULATORS["eagle3"][0](ttt_steps=3, draft_vocab_size=len(ids), train_head=True)
    speculator = build_speculator("eagle3", config, base.config, Objective(loss=loss))
    speculator.set_vocabulary(ids)
    outside = ~speculator.t2d[greedy_text[:, PROMPT:]]
    assert 0.1 < outside.float().mean() < 0.5
    compare_at_every_state(speculator, 0, base, greedy_text, right_by_step)


def compare_at_every_state(speculator: Speculator, seed: int, base: EmbedLLaMA, greedy_text: Tensor, right_by_step) -> None:
    speculator.init_weights(torch.Generator().manual_seed(seed))
    speculator.init_from_base(base.readout)
    batch = as_batch(greedy_text)
    states = base(batch.tokens, batch.document_ids, taps=speculator.taps)
    train_until_half_right(speculator, batch, states, base)

    seen, targets = right_by_step(speculator), speculator.align(batch)
    with torch.no_grad():
        speculator(batch, states, targets, targets.counts, base.readout)
    trained = seen["table"].view(ROWS, LENGTH, speculator.steps)

    compared, lengths = 0, set()
    for t in range(PROMPT - 1, LENGTH - 1 - speculator.steps):  # x[t + 1] is the base's own greedy token after state t
        # Rows at different places, as in a ragged batch: row r drafts from state t - r, the rest is padding.
        at = [max(t - row, PROMPT - 1) for row in range(ROWS)]
        drafted = draft_at(speculator, base, greedy_text, states, at)
        for row, place in enumerate(at):
            truth = greedy_text[row, place + 2 : place + 2 + speculator.steps]
            right_drafted = int((drafted[row] == truth).long().cumprod(0).sum())
            assert (trained[row, place] >= 0).all()
            right_trained = int(trained[row, place].cumprod(0).sum())
            assert right_drafted == right_trained, f"row {row}, state {place}"
            lengths.add(right_drafted)
            compared += 1
    assert compared >= ROWS * 25
    assert {0, speculator.steps} <= lengths, "a drafter that is always or never right shows nothing"


def draft_at(speculator: Speculator, base: EmbedLLaMA, text: Tensor, states: BaseStates, at: list[int]) -> Tensor:
    """int64 [rows, steps]: greedy drafts after state at[row] of each row."""
    m = max(at) + 1
    following = text.roll(-1, 1)[:, :m]
    visible = BaseStates(states.final[:, :m], tuple(tap[:, :m] for tap in states.taps))
    counts = torch.tensor(at) + 1
    with torch.no_grad():
        cache = speculator.new_cache(len(text), LENGTH + speculator.steps)
        draft = speculator.draft(cache, following, visible, counts, base.readout, speculator.steps, greedy)
    return draft.tokens[:, 0]


def greedy(logits: Tensor, step: int | slice) -> tuple[Tensor, None]:
    return logits.argmax(-1), None
