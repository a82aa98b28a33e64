"""Lossless speculative decoding (Leviathan et al. 2022, Chen et al. 2023): the drafter proposes, one pass of the base decides."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectitan.decoding.generation import EosId, Generation, OnTokens, pad_prompts
from spectitan.decoding.sampling import Sampler, Sampling, Stream, draw
from spectitan.speculators.base import Speculator, last_row
from spectitan.types import Draft


@torch.no_grad()
def generate_speculative(
    base: nn.Module,
    speculator: Speculator,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    num_draft_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    eos_id: EosId = None,
    row_keys: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues each prompt in rounds: draft num_draft_tokens, verify them in one pass of the base, keep what it confirms and
    one token more. Greedy, the text is that of generate_plain; sampled, it has the same distribution. Arguments: see there.
    """
    k, readout, device = num_draft_tokens, base.readout, base.readout.head.weight.device
    text = Generation(prompts, max_new_tokens, base.config, eos_id, on_tokens)
    sampler = Sampler(sampling, torch.tensor(range(len(prompts)) if row_keys is None else row_keys, device=device), k)
    tokens, counts = pad_prompts(prompts, device)
    length = text.longest + 2 * k + 2  # a row's last round, and the idle ones after it, write whole drafts past its end
    cache, draft_cache = base.new_cache(len(prompts), length), speculator.new_cache(len(prompts), length)
    live, offsets = torch.ones_like(counts), torch.arange(k + 1, device=device)

    states = base(tokens, cache=cache, taps=speculator.taps)
    cache.commit(counts)
    last, _ = sampler.picker(Stream.TEXT, 0)(readout.logits(last_row(states.final, counts)), 0)
    ended = text.append(last[:, None].tolist())
    following = tokens.roll(-1, 1).scatter(1, counts[:, None] - 1, last[:, None])  # the token after each state
    round = 0
    while any(text.live):
        if ended:  # a finished row goes on with counts = 0: nothing of it is kept
            live = torch.tensor(text.live, device=device).long()
            counts = counts * live
        draft = speculator.draft(draft_cache, following, states, counts, readout, k, sampler.picker(Stream.DRAFT, round))
        assert draft.tokens.shape[1] == 1, "only a chain is verified: one candidate"
        positions = (cache.lengths[:, None] + offsets).clamp_max(base.config.max_position_embeddings - 1)  # `text` cuts what lies past it
        states = base(torch.cat([last[:, None], draft.tokens[:, 0]], 1), cache=cache, positions=positions, taps=speculator.taps)
        accepted, following = verify(draft, readout.logits(states.final), sampler, round)
        last = following.gather(1, accepted[:, None])[:, 0]
        counts = (accepted + 1) * live
        cache.commit(counts)
        # The round's one wait for results; beside it the host reads the cache's lengths, before the base's forward.
        ended = text.append_round(torch.cat([accepted[:, None], following], 1).tolist())
        round += 1
    return text


def verify(draft: Draft, logits: Tensor, sampler: Sampler, round: int) -> tuple[Tensor, Tensor]:
    """How many drafted tokens the base confirms, and the text that results.

    Args:
        logits: [batch, k + 1, vocab], of the base at the last token of the text and at each drafted one.

    Returns:
        accepted: int64 [batch], 0 .. k.
        emitted: int64 [batch, k + 1], the accepted tokens, then the base's own; what follows it is not to be used.
    """
    tokens = draft.tokens[:, 0]
    if sampler.rule.greedy:
        best = logits.argmax(-1)
        return (best[:, :-1] == tokens).cumprod(1).sum(1), best
    k, rows = tokens.shape[1], torch.arange(len(tokens), device=tokens.device)
    target, proposal = sampler.rule.probabilities(logits), draft.probabilities[:, 0]
    target_of_token, proposal_of_token = (p[:, :k].gather(2, tokens[..., None])[..., 0] for p in (target, proposal))
    quantile = sampler.uniform(Stream.ACCEPT, round, slice(0, k))
    accepted = (quantile * proposal_of_token < target_of_token).cumprod(1).sum(1)
    # After a rejection: what the target has and the proposal lacks. After k acceptances there was no proposal: the target.
    target = target[rows, accepted]
    rest = (target - nn.functional.pad(proposal, (0, 0, 0, 1))[rows, accepted]).clamp_min(0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)  # equal up to rounding
    own = draw(rest, sampler.uniform(Stream.RESAMPLE, round))
    return accepted, nn.functional.pad(tokens, (0, 1)).scatter(1, accepted[:, None], own[:, None])
