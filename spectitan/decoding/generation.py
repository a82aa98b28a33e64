"""The host's side of decoding: prompts checked and padded, and the record of what each row has generated."""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectitan import heartbeat
from spectitan.errors import UserError
from spectitan.models.decoder import DecoderConfig

OnTokens = Callable[[int, list[int]], None]
EosId = int | tuple[int, ...] | None


def check_prompts(prompts: Sequence[Sequence[int]], config: DecoderConfig) -> None:
    """Raises UserError for a prompt that is empty, leaves no room for a token, or has a token unknown to the base."""
    context = config.max_position_embeddings
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty: give at least one token to continue")
        if len(prompt) >= context:
            room = f"the base's context of {context} leaves room for at most {context - 1}"
            raise UserError(f"prompt {number} has {len(prompt)} tokens: {room}")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            found = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise UserError(f"prompt {number} has token {found}: the base has tokens 0 to {config.vocab_size - 1}")


def eos_ids(config: DecoderConfig, tokenizer_eos: int | None) -> tuple[int, ...]:
    """All tokens that end a text: those of the base's config.json and the tokenizer's own."""
    of_config = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    return tuple(sorted({token for token in (*of_config, tokenizer_eos) if token is not None}))


def pad_prompts(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [batch, longest] padded on the right with 0, and int64 [batch] lengths."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    return tokens, torch.tensor([len(prompt) for prompt in prompts], device=device)


class Generation:
    """What a batch has generated so far: the loops append to it after every pass of the base.

    A row ends with the eos token (kept), at max_new_tokens, or where prompt and text fill the base's context.

    Args:
        prompts: token ids of each row, at least one.
        config: of the base: max_position_embeddings (its context) and vocab_size.
        eos_id: the token that ends a text, or several that do; None: nothing does.
        on_tokens: called with (row, new tokens) as they come, already cut at the row's end.

    Raises:
        UserError: see `check_prompts`.

    Attributes:
        tokens: the generated tokens of each row.
        accepted: for each row and each draft-verify round in which it was live, how many drafted tokens the base confirmed,
            before the text is cut at its end. Empty for plain decoding.
        seconds: wall-clock time until the last append; prefill_seconds: until the first.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, config: DecoderConfig, eos_id: EosId, on_tokens: OnTokens | None
    ):
        check_prompts(prompts, config)
        self.limits = [min(max_new_tokens, config.max_position_embeddings - len(prompt)) for prompt in prompts]
        self.longest = max(len(prompt) + limit for prompt, limit in zip(prompts, self.limits))
        self.eos_ids = set() if eos_id is None else {eos_id} if isinstance(eos_id, int) else set(eos_id)
        self.on_tokens = on_tokens
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.accepted: list[list[int]] = [[] for _ in prompts]
        self.live = [True] * len(prompts)
        self.prefill_seconds = self.seconds = 0.0
        self._started = time.perf_counter()

    def append(self, new_tokens: list[list[int]]) -> bool:
        """Adds each live row's new tokens up to its end. True if a row ended here, so that `live` has changed."""
        heartbeat.beat()
        ended = False
        for row, new in enumerate(new_tokens):
            if not self.live[row]:
                continue
            text = self.tokens[row]
            new = new[: self.limits[row] - len(text)]
            end = next((i for i, token in enumerate(new) if token in self.eos_ids), None)
            if end is not None:
                new = new[: end + 1]
            text += new
            if end is not None or len(text) == self.limits[row]:
                self.live[row], ended = False, True
            if self.on_tokens is not None:
                self.on_tokens(row, new)
        self.seconds = time.perf_counter() - self._started
        self.prefill_seconds = self.prefill_seconds or self.seconds
        return ended

    def append_round(self, rows: list[list[int]]) -> bool:
        """Adds one draft-verify round. Each row: the number of drafted tokens accepted, then what is emitted (that many and one)."""
        for accepted, (count, *_), live in zip(self.accepted, rows, self.live):
            if live:
                accepted.append(count)
        return self.append([tokens[: count + 1] for count, *tokens in rows])
