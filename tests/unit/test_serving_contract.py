"""What a drafter is trained on is what it does when it drafts: the test that finds every misalignment.

On the base's own greedy text, the training forward and `draft()` must be right on the same number of tokens in a row at every
state. A token, state or position that is shifted in one of the two gives other numbers.
"""

import sys
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from spectitan.config.sections import Objective
from spectitan.decoding.plain import generate_plain
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.speculators.base import Speculator
from spectitan.speculators.registry import SPECULATORS, build_speculator
from spectitan.types import BaseStates, TokenBatch

VOCAB, LENGTH, PROMPT, ROWS = 17, 40, 8, 6
# The smallest configuration of each family, for n steps.
CONFIGS = {"mlp": lambda config, n: config(n_speculator_heads=n, speculator_width=24, tie_weights=n > 1)}


def language(rows: int, length: int, seed: int) -> TokenBatch:
    """Each token is a function of the two before it, with 8% noise: learnable, never constant."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (rows, length), generator=generator)
    noise = torch.rand(rows, length, generator=generator) < 0.08
    for j in range(2, length):
        tokens[:, j] = torch.where(noise[:, j], tokens[:, j], (tokens[:, j - 1] * 3 + tokens[:, j - 2] + 1) % VOCAB)
    return as_batch(tokens)


def as_batch(tokens: Tensor) -> TokenBatch:
    index = torch.arange(len(tokens))
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), index[:, None].expand_as(tokens), index, index)


def train(module: Speculator, base: EmbedLLaMA, parameters, batches: Iterable[TokenBatch]) -> None:
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for batch in batches:
        targets = module.align(batch)
        states = base(batch.tokens, batch.document_ids, taps=module.taps)
        optimizer.zero_grad()
        module(batch, states, targets, targets.counts, base.readout).total.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def base() -> EmbedLLaMA:
    """Half trained on the language, so that its greedy text is neither constant nor regular."""
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
    model = EmbedLLaMA(config)
    model.init_weights(torch.Generator().manual_seed(0))
    train(build_speculator("none", None, config, Objective()), model, model.parameters(), (language(12, 24, step) for step in range(60)))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def greedy_text(base) -> Tensor:
    """int64 [ROWS + more, LENGTH]: prompts of the language, continued by the base."""
    prompts = language(5 * ROWS, PROMPT, seed=700).tokens.tolist()
    text = generate_plain(base, prompts, LENGTH - PROMPT)
    return torch.tensor([prompt + new for prompt, new in zip(prompts, text.tokens)])


@pytest.fixture
def right_by_step(monkeypatch):
    """Makes a family's forward report which of its pairs were right: [state rows, steps], -1 where there is no pair."""
    seen = {}

    def watch(speculator: Speculator):
        module = sys.modules[type(speculator).__module__]
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
    speculator.init_weights(torch.Generator().manual_seed(n))
    train(speculator, base, speculator.parameters(), [as_batch(greedy_text[ROWS:])] * 25)

    seen, text = right_by_step(speculator), greedy_text[:ROWS]
    batch = as_batch(text)
    targets = speculator.align(batch)
    with torch.no_grad():
        states = base(batch.tokens, batch.document_ids, taps=speculator.taps)
        speculator(batch, states, targets, targets.counts, base.readout)
    trained = seen["table"].view(ROWS, LENGTH, speculator.steps)

    compared, lengths = 0, set()
    for t in range(PROMPT - 1, LENGTH - 1 - speculator.steps):  # x[t + 1] is the base's own greedy token after state t
        # Rows at different places, as in a ragged batch: row r drafts from state t - r, the rest is padding.
        at = [max(t - row, PROMPT - 1) for row in range(ROWS)]
        drafted = draft_at(speculator, base, text, states, at)
        for row, place in enumerate(at):
            truth = text[row, place + 2 : place + 2 + speculator.steps]
            right_drafted = int((drafted[row] == truth).long().cumprod(0).sum())
            assert (trained[row, place] >= 0).all()
            right_trained = int(trained[row, place].cumprod(0).sum())
            assert right_drafted == right_trained, f"row {row}, state {place}"
            lengths.add(right_drafted)
            compared += 1
    assert compared >= ROWS * 25
    assert 0 in lengths and len(lengths) >= min(3, 1 + speculator.steps), "a drafter that is always or never right shows nothing"


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
