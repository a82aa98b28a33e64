"""Lossless speculative decoding with several candidates a round, merged into a tree that one pass of the base verifies.

The base chooses its own token after every node, as plain decoding would there: greedily, or at the random number of that
place in the text. The longest path of drafted tokens that are those choices is kept. The text is therefore that of
generate_plain whatever was drafted, sampled as well as greedy (but for a draw on the very edge between two tokens, where
the rounding of a larger product decides). Candidates are the drafter's likeliest tokens, not draws: there is no ratio of
probabilities to accept by. When sampling, a chain with that rule is accepted more often than a tree without it.

Candidates are merged, and paths followed, on the host: a round waits for the device twice, that of a chain once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectitan.decoding.generation import EosId, Generation, OnTokens, pad_prompts
from spectitan.decoding.sampling import Sampling, Stream, draw
from spectitan.keyed_random import uniform
from spectitan.speculators.base import Speculator, last_row
from spectitan.types import BaseStates


class Tree:
    """The candidates of one row, merged where they begin alike. Node 0 is the last token of the text.

    Nodes come in the order of the candidates: those of the first one, the likeliest, are where a chain's would be.

    Attributes:
        tokens: of each node.
        paths: of each node, the nodes from 0 to itself.
    """

    def __init__(self, last_token: int, candidates: Sequence[Sequence[int]]):
        self.tokens: list[int] = [last_token]
        self.paths: list[list[int]] = [[0]]
        self._children: list[dict[int, int]] = [{}]
        for candidate in candidates:
            node = 0
            for token in candidate:
                node = self._children[node].get(token) or self._add(node, token)

    def _add(self, parent: int, token: int) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.paths.append([*self.paths[parent], node])
        self._children.append({})
        self._children[parent][token] = node
        return node

    def follow(self, chosen: Sequence[int]) -> list[int]:
        """The longest path on which each token is the one `chosen` after its parent."""
        node = 0
        while chosen[node] in self._children[node]:
            node = self._children[node][chosen[node]]
        return self.paths[node]


@torch.no_grad()
def generate_tree(
    base: nn.Module,
    speculator: Speculator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    top_k_tokens_per_head: Sequence[int],
    n_candidates: int,
    *,
    sampling: Sampling = Sampling(),
    eos_id: EosId = None,
    row_keys: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues each prompt in rounds: draft n_candidates chains of len(top_k_tokens_per_head) tokens, verify them in one pass of
    the base, keep the longest path that it confirms and one token more. The text is that of generate_plain; arguments: see there.
    """
    k, readout, device = len(top_k_tokens_per_head), base.readout, base.readout.head.weight.device
    text = Generation(prompts, max_new_tokens, base.config, eos_id, on_tokens)
    length = text.longest + (1 + n_candidates) * k + 1  # past a row's end a whole tree is written, a drafter's behind a whole path
    cache, draft_cache = base.new_cache(len(prompts), length), speculator.new_cache(len(prompts), length)
    tokens, counts = pad_prompts(prompts, device)
    row_keys = torch.tensor(range(len(prompts)) if row_keys is None else row_keys, device=device)
    quantiles = uniform(sampling.seed, Stream.TEXT, row_keys[:, None], torch.arange(max_new_tokens + k + 1, device=device), 0)

    def choose(logits: Tensor, places: Tensor) -> Tensor:
        """The base's own tokens [batch, m], from logits [batch, m, vocab], at places [batch, m] of the generated text."""
        return logits.argmax(-1) if sampling.greedy else draw(sampling.probabilities(logits), quantiles.gather(1, places))

    states = base(tokens, cache=cache, taps=speculator.taps)
    cache.commit(counts)
    last = choose(readout.logits(last_row(states.final, counts))[:, None], torch.zeros_like(counts)[:, None])
    following = tokens.roll(-1, 1).scatter(1, counts[:, None] - 1, last)  # the token after each state
    last_tokens = last[:, 0].tolist()
    text.append([[token] for token in last_tokens])
    while any(text.live):
        draft = speculator.draft_tree(draft_cache, following, states, counts, readout, top_k_tokens_per_head, n_candidates)
        trees = [Tree(last_token, candidates) for last_token, candidates in zip(last_tokens, draft.tokens.tolist())]
        tokens, depths, paths = pad_trees(trees, k, device)
        positions = (cache.lengths[:, None] + depths).clamp_max(base.config.max_position_embeddings - 1)  # `text` cuts what lies past it
        mask = visible_slots(cache.lengths, paths, length)
        states = base(tokens, cache=cache, positions=positions, mask=mask, taps=speculator.taps)
        written = torch.tensor([[len(generated)] for generated in text.tokens], device=device)
        chosen = choose(readout.logits(states.final), written + depths)

        accepted, emitted = [], []
        for tree, choices in zip(trees, chosen.tolist()):
            accepted.append(tree.follow(choices))
            emitted.append([choices[node] for node in accepted[-1]])
        text.append_round([[len(row) - 1, *row] for row in emitted])
        last_tokens = [row[-1] for row in emitted]
        counts = torch.tensor([len(path) * live for path, live in zip(accepted, text.live)], device=device)
        longest = max(map(len, accepted))
        places = torch.tensor([path + [0] * (longest - len(path)) for path in accepted], device=device)
        if all(path[-1] == len(path) - 1 for path in accepted):  # in place already
            cache.commit(counts)
        else:
            cache.keep(places, counts)
        states, following = gather_states(states, places), chosen.gather(1, places)
    return text


def pad_trees(trees: Sequence[Tree], k: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and depths, int64 [batch, nodes], and the path to each node, [batch, nodes, k + 1], padded by its first node.

    Rows are padded to the largest tree by nodes that see the last token of the text alone.
    """
    nodes = max(len(tree.tokens) for tree in trees)
    rows = [
        [[token, len(path) - 1, *path, *[0] * (k + 1 - len(path))] for token, path in zip(tree.tokens, tree.paths)]
        + [[0] * (k + 3)] * (nodes - len(tree.tokens))
        for tree in trees
    ]
    packed = torch.tensor(rows, device=device)
    return packed[..., 0], packed[..., 1], packed[..., 2:]


def visible_slots(lengths: Tensor, paths: Tensor, slots: int) -> Tensor:
    """bool [batch, nodes, slots]: a node sees what is committed (lengths, int64 [batch]) and its path, from slot `lengths` on."""
    committed = torch.arange(slots, device=lengths.device) < lengths[:, None]
    return committed[:, None].repeat(1, paths.shape[1], 1).scatter_(2, lengths[:, None, None] + paths, True)


def gather_states(states: BaseStates, places: Tensor) -> BaseStates:
    """The states [batch, n, ...] at int64 [batch, n] of the m given."""
    rows = torch.arange(len(places), device=places.device)[:, None]
    return BaseStates(states.final[rows, places], tuple(tap[rows, places] for tap in states.taps))
