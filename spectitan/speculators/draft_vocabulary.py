"""A draft vocabulary: the tokens that a drafter can draft, as speculators and vLLM write it.

`d2t` int64 [draft vocab] holds token id - draft id, `t2d` bool [vocab] whether a token is among them; draft ids ascend with token ids.
"""

import torch
from torch import Tensor


def maps_of(token_ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """d2t and t2d of token ids, int64 [draft vocab], ascending."""
    t2d = torch.zeros(vocab_size, dtype=torch.bool, device=token_ids.device)
    t2d[token_ids] = True
    return token_ids - torch.arange(len(token_ids), device=token_ids.device), t2d


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """int64 [size], ascending: the tokens with the highest counts, int64 [vocab]; of equals, the lowest ids."""
    return torch.sort(counts, descending=True, stable=True).indices[:size].sort().values
