import pytest
import torch

from spectitan.models.llama import EmbedLLaMA, LlamaConfig
from spectitan.training.activation_checkpointing import apply_activation_checkpointing

CONFIG = LlamaConfig(vocab_size=53, hidden_size=24, intermediate_size=40, num_layers=3, num_heads=3, num_kv_heads=1)


def run(base: EmbedLLaMA, taps: tuple[int, ...] = (1,)) -> tuple[int, list[torch.Tensor]]:
    """Bytes that a forward on packed documents keeps for its backward, weights aside, and the gradients."""
    tokens = torch.randint(CONFIG.vocab_size, (2, 19), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(19) > 7).long().expand(2, -1) + 2 * torch.arange(2)[:, None]
    weights = {parameter.data_ptr() for parameter in base.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = base(tokens, documents, taps=taps)
    base.zero_grad()
    (states.final.square().sum() + states.taps[0].sin().sum()).backward()
    return sum(kept.values()), [parameter.grad.clone() for parameter in base.parameters() if parameter.grad is not None]


def build(again: bool, compiled: bool) -> EmbedLLaMA:
    base = EmbedLLaMA(CONFIG)
    base.init_weights(torch.Generator().manual_seed(0))
    if again:
        apply_activation_checkpointing(base.layers)
    if compiled:
        torch.compiler.reset()
        for layer in base.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    return base


@pytest.mark.parametrize("compiled", [False, True])
def test_less_is_kept_and_no_bit_of_a_gradient_changes(compiled):
    plain, again = (build(flag, compiled) for flag in (False, True))
    kept, gradients = run(plain)
    kept_now, gradients_now = run(again)
    assert kept_now < 0.4 * kept
    assert len(gradients) == len(gradients_now) == len(list(plain.parameters())) - 1  # the head has no part in it
    assert all(torch.equal(before, now) for before, now in zip(gradients, gradients_now))
    assert plain.state_dict().keys() == again.state_dict().keys()
    tokens = torch.randint(CONFIG.vocab_size, (2, 19))
    with torch.no_grad():  # as an evaluation runs it
        assert torch.equal(again(tokens).final, plain(tokens).final)
