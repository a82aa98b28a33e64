"""Continuations for training: a batch of prompts of one length, and as many tokens after each, on the device from end to end."""

import torch
from torch import Tensor, nn

from spectitan.decoding.sampling import Sampling


@torch.no_grad()
def continue_prompts(base: nn.Module, prompts: Tensor, quantiles: Tensor, rule: Sampling) -> Tensor:
    """int64 [batch, prompt + new]: each prompt and the tokens that the base samples after it; no token ends a text.

    Rows do not influence each other, and the host never waits for the device: all rows have one length, so it knows their place.

    Args:
        base: EmbedLLaMA or another base. One that is sharded is best gathered before (distributed/fsdp.py: gather_frozen).
        prompts: int64 [batch, prompt].
        quantiles: float64 [batch, new] in (0, 1), one for each token to come.
        rule: temperature and top_k; its seed is not used.
    """
    batch, prompt_length = prompts.shape
    text = torch.cat([prompts, prompts.new_empty(quantiles.shape)], 1)
    cache = base.new_cache(batch, text.shape[1])
    fed = prompts
    for place, quantile in enumerate(quantiles.T, start=prompt_length):
        hidden = base(fed, cache=cache).final[:, -1]
        cache.commit(fed.shape[1])
        fed = rule.choose(base.readout.logits(hidden), quantile)[:, None]
        text[:, place] = fed[:, 0]
    return text
