"""Where a run's hidden states come from: of the text, of held-out text, and of what is trained on, with stage 2's own text and with noise."""

import logging

import torch

from spectitan.config.tables import Config
from spectitan.distributed.mesh import Distributed
from spectitan.run.data import RunData
from spectitan.run.inputs import Inputs
from spectitan.run.model import Model
from spectitan.states.cache import FINAL
from spectitan.states.cached import CachedStates
from spectitan.states.continued import ContinuedStates
from spectitan.states.document_files import DocumentFiles
from spectitan.states.noisy import NoisyStates
from spectitan.states.online import OnlineStates
from spectitan.states.sources import on_missing

logger = logging.getLogger(__name__)


class RunStates:
    """The sources of one run.

    Attributes:
        of_text, of_held_out: the base's states on each.
        trained_on: what the loop reads.
        state_counts: takes the counts of where states came from, over all ranks; None where all come from the base.
    """

    def __init__(self, config: Config, inputs: Inputs, data: RunData, model: Model, world: Distributed, compute_dtype: torch.dtype):
        self.config, self.base, self.global_batch_size = config, model.base, inputs.global_batch_size
        store, taps, readout = inputs.store, model.speculator.taps, model.base.readout
        if isinstance(store, DocumentFiles):
            store.check_norm(readout.norm)
        layers = taps if store is None else tuple(column for column in store.columns if column != FINAL)
        online = OnlineStates(model.base, layers, config.base.freeze)

        def cached(samples: list, keep: bool) -> CachedStates:
            hybrid = config.states.source == "hybrid"
            return CachedStates(
                store, samples, taps, readout, compute_dtype, world.device, online=online if hybrid else None,
                keep=keep and hybrid and config.states.on_generate == "cache", on_missing=on_missing(config.states),
            )  # fmt: skip

        self.of_text = self.of_held_out = online
        if store is not None:
            self.of_text = cached(data.loader.samples, keep=True)
            self.of_held_out = cached(data.held_out.samples, keep=world.rank == 0)  # all ranks run all of them
        self.state_counts = None if store is None else self.of_text.take_counts
        self.trained_on, self._stage2 = self.of_text, None
        if config.stage2.start_step >= 0:
            self.trained_on = self._stage2 = ContinuedStates(
                self.of_text, config.stage2, first_sample=config.stage2.start_step * inputs.global_batch_size,
                prompts=inputs.prompts_per_sample, steps=model.speculator.steps, seed=config.job.seed,
                online=OnlineStates(model.base, taps, frozen=True),
            )  # fmt: skip
        if config.states.noise_std:
            self.trained_on = NoisyStates(self.trained_on, config.states.noise_std, config.job.seed)

    def flops(self, first_step: int, last_step: int, tokens: int) -> int:
        """Useful floating-point operations of the base in the steps first_step .. last_step - 1 on so many tokens, padding left out;
        a trained base counts three times, for its backward."""
        start, continued_tokens, flops = self.config.stage2.start_step, 0, 0
        continued = last_step - min(max(start, first_step), last_step) if start >= 0 else 0
        if continued:
            continued_tokens, flops = self._stage2.work(continued * self.global_batch_size)
        of_text = self.base.flops(tokens - continued_tokens, self.config.data.seq_length)
        if isinstance(self.of_text, CachedStates):
            of_text = int(of_text * self.of_text.base_share())
        return flops + (1 if self.config.base.freeze else 3) * of_text

    def close(self) -> None:
        """Makes durable what was cached."""
        for source in (self.of_text, self.of_held_out):
            if isinstance(source, CachedStates):
                try:
                    source.close()
                except OSError as error:
                    logger.warning("what was cached last is not sure to be on the disk: %s: %s", source.store.folder, error.strerror)
