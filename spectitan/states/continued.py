"""Stage 2: the speculator learns from text that the base itself has sampled, as it will meet it when it serves.

As fms-fsdp does it: prompts are cut from the text, the base continues each by a fixed number of tokens, and one forward over
prompt and continuation gives the states.
"""

import torch
from torch import Tensor

from spectitan.config.sections import Stage2
from spectitan.decoding.continuation import continue_prompts
from spectitan.decoding.sampling import Sampling, Stream, draw
from spectitan.distributed.fsdp import free_frozen, gather_frozen
from spectitan.errors import UserError
from spectitan.keyed_random import uniform
from spectitan.states.online import OnlineStates
from spectitan.types import BaseStates, StateSource, TokenBatch, to_device


def prompts_per_sample(config: Stage2, global_batch_size: int, data_seq_length: int, max_positions: int, steps: int) -> int:
    """How many prompts are cut from a sample.

    Args:
        global_batch_size: samples in an optimizer step.
        data_seq_length: tokens in a sample.
        max_positions: the base's context.
        steps: tokens that the speculator looks ahead.

    Raises:
        UserError: prompts do not fit into samples, the text not into the context, or the targets not into the text.
    """
    prompts, rest = divmod(global_batch_size if config.batch_size == -1 else config.batch_size, global_batch_size)
    if rest or not prompts:
        raise UserError(
            f"stage2.batch_size = {config.batch_size}; allowed: -1, or a multiple of training.global_batch_size = {global_batch_size}"
        )
    if data_seq_length < prompts * config.prompt_length:
        raise UserError(
            f"data.seq_length = {data_seq_length}: stage2.batch_size / training.global_batch_size = {prompts} prompts of "
            f"stage2.prompt_length = {config.prompt_length} are cut from a sample; allowed: at least {prompts * config.prompt_length}"
        )
    length = config.prompt_length + config.seq_length
    if length > max_positions:
        raise UserError(f"stage2.prompt_length + stage2.seq_length = {length}: the base allows at most {max_positions}")
    if config.seq_length <= steps:
        raise UserError(
            f"stage2.seq_length = {config.seq_length}: the speculator looks {steps} tokens ahead; allowed: at least {steps + 1}"
        )
    return prompts


class ContinuedStates:
    """The base's states on the text, and from one sample on, on its own continuations of the text.

    What is sampled is a function of (seed, a sample's place in the global order) alone, on every layout. Supervised are the rows
    j = 0 .. new - steps - 1 of a continuation y, row 0 being the prompt's last token, at all steps: step i takes in y_j .. y_{j+i}
    and predicts y_{j+i+1}.

    A sharded base is gathered when a step's first micro-batch begins, and kept until the states of its last one.

    Args:
        source: the states of the text.
        online: the frozen base, which samples; None: it is the source as well.
        config: lengths and sampling.
        first_sample: place in the global order of stage 2's first sample; the first of an optimizer step.
        prompts: cut from each sample; see `prompts_per_sample`.
        steps: tokens that the speculator looks ahead.
        seed: of all random numbers.
    """

    def __init__(
        self, source: StateSource, config: Stage2, *, first_sample: int, prompts: int, steps: int, seed: int,
        online: OnlineStates | None = None,
    ):  # fmt: skip
        self.source, self.config, self.first_sample, self.prompts, self.seed = source, config, first_sample, prompts, seed
        self.online = online or source
        place = torch.arange(config.prompt_length + config.seq_length) - config.prompt_length
        self.is_new = place >= 0  # bool [prompt + new]
        self.is_start = (place >= -1) & (place < config.seq_length - steps - 1)  # bool [prompt + new]
        self._awaited = 0  # micro-batches begun whose states are still to come

    def begin(self, batch: TokenBatch) -> TokenBatch:
        """The batch itself before stage 2; then [prompts * samples, prompt + new], its tokens on the base's device."""
        if batch.index[0] < self.first_sample:
            return self.source.begin(batch)
        keys, tokens, usable = self.cut(batch)
        new = torch.arange(self.config.seq_length)
        tokens = self._continued(tokens, uniform(self.seed, Stream.CONTINUATION, keys[:, None], new))
        self._awaited += 1
        return TokenBatch(
            tokens=tokens,
            loss_mask=usable[:, None] & self.is_new,
            document_ids=torch.arange(len(keys))[:, None].repeat(1, tokens.shape[1]),
            index=keys,
            sample_ids=batch.sample_ids.repeat_interleave(self.prompts),
            state_mask=self.is_start.repeat(len(keys), 1),
        )

    def states(self, batch: TokenBatch) -> BaseStates:
        if not self._awaited:
            return self.source.states(batch)
        states = self.online.states(batch._replace(document_ids=None))  # one document a row: attention needs no mask
        self._awaited -= 1
        if not self._awaited:
            free_frozen(self.online.base)
        return states

    def work(self, samples: int) -> tuple[int, int]:
        """Tokens that are made of this many samples, and the base's floating-point operations: to sample them, and for their states."""
        prompts, new, length = samples * self.prompts, self.config.seq_length, self.config.prompt_length + self.config.seq_length
        base, tokens = self.online.base, prompts * length
        sampling = base.flops(tokens - prompts, length - 1)  # the last token is not fed
        vocab_size, hidden_size = base.config.vocab_size, base.config.hidden_size
        return tokens, sampling + 2 * prompts * new * hidden_size * vocab_size + base.flops(tokens, length)

    def cut(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, int64 [samples * prompts], prompts, int64 [samples * prompts, prompt], and whether each is free of padding.

        A sample is divided into as many equal parts as prompts are cut from it, and each prompt is drawn from its part: among
        the windows that lie in one document, where there are any, else among all that have no padding.
        """
        samples, seq_length = batch.tokens.shape
        keys = (batch.index[:, None] * self.prompts + torch.arange(self.prompts)).flatten()
        part, length = seq_length // self.prompts, self.config.prompt_length
        first = torch.arange(self.prompts)[:, None] * part + torch.arange(part - length + 1)  # [prompts, windows]
        documents, last_documents = batch.document_ids[:, first], batch.document_ids[:, first + length - 1]
        whole = (documents >= 0) & (last_documents >= 0)
        of_one = whole & (documents == last_documents)
        usable = torch.where(of_one.any(-1, keepdim=True), of_one, whole).flatten(0, 1)  # [samples * prompts, windows]
        window = draw(usable, uniform(self.seed, Stream.PROMPT, keys))
        begin = first.repeat(samples, 1).gather(1, window[:, None])
        rows = torch.arange(samples).repeat_interleave(self.prompts)[:, None]
        return keys, batch.tokens[rows, begin + torch.arange(length)], usable.any(1)

    def _continued(self, prompts: Tensor, quantiles: Tensor) -> Tensor:
        base, config = self.online.base, self.config
        device = base.readout.norm.weight.device
        rule = Sampling(config.temperature, config.top_k)
        try:
            if not self._awaited:
                gather_frozen(base)
            return continue_prompts(base, to_device(prompts, device), to_device(quantiles, device), rule)
        except torch.OutOfMemoryError:
            raise UserError(
                f"stage2: the whole base and its cache for {len(prompts)} prompts at once do not fit into the device's memory: "
                "lower training.micro_batch_size, or split the base with parallelism.sharding_strategy = tp"
            ) from None
