"""Test doubles for decoding: a base whose every probability is known, and drafters from perfect to useless."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from spectitan.speculators.base import Speculator, last_row
from spectitan.types import BaseStates, Draft


class ToyCache:
    """Slots of tokens in place of keys and values."""

    def __init__(self, batch: int, length: int):
        self.slots = torch.full((batch, length), -1)
        self.lengths = torch.zeros(batch, dtype=torch.int64)

    def commit(self, counts: Tensor) -> None:
        self.lengths = self.lengths + counts

    def keep(self, places: Tensor, counts: Tensor) -> None:
        for row, (length, kept, count) in enumerate(zip(self.lengths.tolist(), places, counts.tolist())):
            self.slots[row, length : length + count] = self.slots[row, length + kept[:count]]
        self.commit(counts)


class ToyBase(nn.Module):
    """Logits are a table of the last `order` tokens, so that an error of the cache changes them; the state is the logits.

    Its `position_limit` asserts what a table of positions would: no position at or past max_position_embeddings.
    """

    def __init__(self, vocab_size: int, order: int = 2, context: int = 10**6, seed: int = 0, sharpness: float = 1.0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=context)
        self.order = order
        generator = torch.Generator().manual_seed(seed)
        self.table = sharpness * torch.randn(vocab_size**order, vocab_size, generator=generator, dtype=torch.float64)
        self.readout = SimpleNamespace(logits=lambda hidden: hidden, head=SimpleNamespace(weight=torch.zeros(1)))
        self.passes = 0

    def new_cache(self, batch: int, length: int) -> ToyCache:
        return ToyCache(batch, length)

    def logits_after(self, tokens: list[int]) -> Tensor:
        """[vocab] after a sequence of tokens; what is before its first token reads as 0."""
        code = 0
        for token in [*[0] * self.order, *tokens][-self.order :]:
            code = code * self.config.vocab_size + token
        return self.table[code]

    def forward(
        self, tokens: Tensor, document_ids=None, *, cache: ToyCache, positions: Tensor | None = None, mask: Tensor | None = None, taps=()
    ) -> BaseStates:
        self.passes += 1
        slots = cache.lengths[:, None] + torch.arange(tokens.shape[1])
        positions = slots if positions is None else positions
        live = positions[:, 0] < self.config.max_position_embeddings
        assert (positions[live] < self.config.max_position_embeddings).all(), "a position past the context"
        cache.slots.scatter_(1, slots, tokens)
        all_slots = torch.arange(cache.slots.shape[1])
        visible = all_slots <= slots[..., None] if mask is None else mask
        seen = torch.where(visible, all_slots, -1).topk(min(self.order, len(all_slots))).values  # the last ones, its own first
        if mask is not None:
            inside = positions < self.config.max_position_embeddings - 1
            assert torch.equal(visible.sum(-1)[inside], positions[inside] + 1), (
                "a token sees another number of slots than its position says"
            )
        code = torch.zeros_like(tokens)
        for at in reversed(seen.unbind(-1)):
            code = code * self.config.vocab_size + torch.where(at >= 0, cache.slots.gather(1, at.clamp_min(0)), 0)
        return BaseStates(self.table[code])


def likeliest_chains(log_probabilities: Callable[[list[int]], Tensor], top_k: Sequence[int], n: int) -> list[list[int]]:
    """By definition: of all chains whose token i is among the top_k[i] likeliest after those before it, the n likeliest."""
    chains = [([], 0.0)]
    for k in top_k:
        chains = [
            (chain + [token], score + float(scores[token]))
            for chain, score in chains
            for scores in [log_probabilities(chain)]
            for token in scores.topk(k).indices.tolist()
        ]
    return [chain for chain, _ in sorted(chains, key=lambda scored: -scored[1])[:n]]


class TableDrafter(Speculator):
    """Draws each token from its own table of the last token: not at all the base's distribution."""

    drafts_trees = True

    def __init__(self, vocab_size: int, steps: int, seed: int = 1, sharpness: float = 2.0):
        super().__init__()
        self.steps = steps
        self.table = sharpness * torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(seed))
        self.trees = {}  # (top_k_tokens_per_head, n_candidates) -> candidates after each token

    def draft(self, cache, tokens, states, counts, readout, k, pick) -> Draft:
        token, drafted, probabilities = last_row(tokens, counts), [], []
        for step in range(k):
            token, probability = pick(self.table[token], step)
            drafted.append(token)
            probabilities.append(probability)
        greedy = probabilities[0] is None
        return Draft(torch.stack(drafted, 1)[:, None], None if greedy else torch.stack(probabilities, 1)[:, None])

    def draft_tree(self, cache, tokens, states, counts, readout, top_k_tokens_per_head, n_candidates) -> Draft:
        key = (tuple(top_k_tokens_per_head), n_candidates)
        if key not in self.trees:
            scores = self.table.log_softmax(-1)
            self.trees[key] = torch.tensor(
                [likeliest_chains(lambda chain: scores[[token, *chain][-1]], *key) for token in range(len(scores))]
            )
        return Draft(self.trees[key][last_row(tokens, counts)], None)


class CountingDrafter(TableDrafter):
    """Checks the contract of `draft` on the way: it keeps every verified state's following token, as a drafter with a cache would."""

    def new_cache(self, batch: int, length: int) -> list[list[int]]:
        self.length = length
        self.following = [[] for _ in range(batch)]
        return self.following

    def draft(self, cache, tokens, states, counts, readout, k, pick) -> Draft:
        self.take_in(cache, tokens, states, counts, k)
        return super().draft(cache, tokens, states, counts, readout, k, pick)

    def draft_tree(self, cache, tokens, states, counts, readout, top_k_tokens_per_head, n_candidates) -> Draft:
        self.take_in(cache, tokens, states, counts, len(top_k_tokens_per_head) * n_candidates)
        return super().draft_tree(cache, tokens, states, counts, readout, top_k_tokens_per_head, n_candidates)

    def take_in(self, cache, tokens, states, counts, drafted: int) -> None:
        assert cache is self.following and tokens.shape == states.final.shape[:2]
        for row, (new, count) in enumerate(zip(tokens.tolist(), counts.tolist())):
            assert len(cache[row]) + tokens.shape[1] + drafted <= self.length, "the drafter's cache would overflow"
            cache[row] += new[:count]


class OracleDrafter(Speculator):
    """Knows the texts: row r's k next tokens, by how many tokens it has been shown. Past a text's end it drafts token 0."""

    def __init__(self, sequences: list[list[int]], steps: int, vocab_size: int = 10**9):
        super().__init__()
        self.sequences, self.steps, self.vocab_size = sequences, steps, vocab_size

    def new_cache(self, batch: int, length: int) -> list[int]:
        return [1] * batch

    def draft(self, cache, tokens, states, counts, readout, k, pick) -> Draft:
        rows = []
        for row, count in enumerate(counts.tolist()):
            cache[row] += count
            rows.append((self.sequences[row][cache[row] : cache[row] + k] + [0] * k)[:k])
        return Draft(torch.tensor(rows)[:, None], None)

    def draft_tree(self, cache, tokens, states, counts, readout, top_k_tokens_per_head, n_candidates) -> Draft:
        """The truth comes last, behind candidates that leave it at ever later tokens."""
        truth = self.draft(cache, tokens, states, counts, readout, len(top_k_tokens_per_head), None).tokens
        candidates = truth.repeat(1, n_candidates, 1)
        for candidate in range(n_candidates - 1):
            candidates[:, candidate, candidate % truth.shape[2] :] += 1 + candidate
        return Draft(candidates % self.vocab_size, None)
