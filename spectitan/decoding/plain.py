"""Plain decoding: one token a pass. What speculative decoding is measured against, and must equal."""

from collections.abc import Sequence

import torch
from torch import nn

from spectitan.decoding.generation import EosId, Generation, OnTokens, pad_prompts
from spectitan.decoding.sampling import Sampler, Sampling, Stream
from spectitan.speculators.base import last_row


@torch.no_grad()
def generate_plain(
    base: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling = Sampling(),
    eos_id: EosId = None,
    row_keys: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
) -> Generation:
    """Continues each prompt, one token a pass of the base. The prompts may differ in length.

    Args:
        base: EmbedLLaMA or another base.
        row_keys: one number a prompt that its random numbers hang on, whatever the batch; default: its place in `prompts`.

    The other arguments and errors: see Generation.
    """
    device = base.readout.head.weight.device
    text = Generation(prompts, max_new_tokens, base.config, eos_id, on_tokens)
    sampler = Sampler(sampling, torch.tensor(range(len(prompts)) if row_keys is None else row_keys, device=device))
    tokens, lengths = pad_prompts(prompts, device)
    cache = base.new_cache(len(prompts), text.longest)
    live = torch.ones_like(lengths)

    states = base(tokens, cache=cache).final
    cache.commit(lengths)
    hidden = last_row(states, lengths)
    for position in range(max_new_tokens):
        token, _ = sampler.picker(Stream.TEXT, position)(base.readout.logits(hidden), 0)
        if text.append(token[:, None].tolist()):
            if not any(text.live):
                break
            live = torch.tensor(text.live, device=device).long()
        hidden = base(token[:, None], cache=cache).final[:, 0]
        cache.commit(live)
    return text
