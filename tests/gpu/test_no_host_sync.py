"""A training step never makes the host wait for the GPU."""

import pytest
import torch

from spectitan.config.sections import Objective, Stage2
from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.speculators.mlp import MlpConfig, MlpSpeculator
from spectitan.states.continued import ContinuedStates
from spectitan.states.online import OnlineStates
from spectitan.types import TokenBatch


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["ce", "kl_div", '{"ce": 0.1, "tv": 0.9}'])
def test_a_step_of_a_tied_drafter_does_not_wait(loss):
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    base = EmbedLLaMA(LlamaConfig(vocab_size=1009, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2))
    base.init_weights(generator)
    base.requires_grad_(False).to(device)
    speculator = MlpSpeculator(MlpConfig(), base.config, Objective(loss=loss))
    speculator.init_weights(generator)
    speculator.to(device)
    source = OnlineStates(base, (), frozen=True)
    tokens = torch.randint(1009, (3, 61), generator=generator)
    documents = (torch.arange(61) > 40).long().expand(3, -1) + 2 * torch.arange(3)[:, None]
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), documents, torch.arange(3), torch.arange(3))
    targets = speculator.align(batch)

    def step() -> None:
        on_device, moved = batch.to(device), targets.to(device)
        speculator(on_device, source.states(on_device), moved, targets.counts, base.readout).total.backward()

    step()  # libraries load and memory is taken
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_sampling_the_text_of_stage_2_does_not_wait():
    device = torch.device("cuda")
    base = EmbedLLaMA(LlamaConfig(vocab_size=1009, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2))
    base.init_weights(torch.Generator().manual_seed(0))
    base.requires_grad_(False).to(device)
    config = Stage2(start_step=0, prompt_length=7, seq_length=11)
    source = ContinuedStates(OnlineStates(base, (), frozen=True), config, first_sample=0, prompts=2, steps=3, seed=0)
    tokens = torch.randint(1009, (3, 61))
    batch = TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens), torch.arange(3), torch.arange(3))
    source.states(source.begin(batch).to(device))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        begun = source.begin(batch)
        assert begun.tokens.is_cuda and not begun.loss_mask.is_cuda
        source.states(begun.to(device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
