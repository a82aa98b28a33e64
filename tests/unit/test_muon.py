"""Muon beside AdamW: which parameters it trains, its update, steps that skip themselves, and its state."""

import math

import pytest
import torch
from torch import nn

from spectitan.config.sections import Objective, Optimizer
from spectitan.distributed.utils import backward, clip_grad_norm
from spectitan.models.llama import LlamaConfig
from spectitan.speculators.registry import SPECULATOR_CONFIGS, build_speculator
from spectitan.training.optimizer import build_optimizer, optimizer_tensors, peak_learning_rates, step_if_finite

VOCAB = 61  # no other size in a family's parameters
INNER = {"up.weight", "down.weight"}


def toy(dtype=torch.float32) -> nn.Module:
    """Wide and tall matrices beside tables over the vocabulary, a norm and biases."""
    torch.manual_seed(3)
    parts = {
        "embed": nn.Embedding(VOCAB, 5),
        "up": nn.Linear(5, 11),
        "norm": nn.LayerNorm(11),
        "down": nn.Linear(11, 3),
        "out": nn.Linear(3, VOCAB),
    }
    return nn.ModuleDict(parts).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    hidden = model["embed"](torch.tensor([step % 7, 3, 60]))
    for name in ("up", "norm", "down", "out"):
        hidden = torch.tanh(model[name](hidden))
    return (hidden**2).sum()


def train(model, optimizer, steps) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(loss_of(model, step))
        step_if_finite(optimizer, 1 / (1 + step), clip_grad_norm(model.parameters(), 0.5))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_step_as_torchs_muon_and_all_else_as_adamw(adjust, dtype):
    config = Optimizer(name="muon", muon_lr=0.03, muon_momentum=0.9, muon_weight_decay=0.2, muon_ns_steps=4, muon_adjust_lr_fn=adjust)
    ours, theirs = toy(dtype), toy(dtype)
    optimizer = build_optimizer(ours, config, INNER)
    split = {True: [], False: []}
    for name, parameter in theirs.named_parameters():
        split[name in INNER].append((name, parameter))
    muon = torch.optim.Muon(
        [parameter for _, parameter in split[True]], lr=0.03, momentum=0.9, weight_decay=0.2, ns_steps=4, adjust_lr_fn=adjust
    )
    adamw = build_optimizer(nn.ParameterDict({name.replace(".", "_"): parameter for name, parameter in split[False]}), Optimizer())
    for step in range(4):
        train(ours, optimizer, [step])
        theirs.zero_grad()
        backward(loss_of(theirs, step))
        norm = clip_grad_norm(theirs.parameters(), 0.5)
        muon.param_groups[0]["lr"] = 0.03 * (1 / (1 + step))
        muon.step()
        step_if_finite(adamw, 1 / (1 + step), norm)
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(parameter, expected), name


def test_an_update_is_nearly_orthogonal():
    """Jordan's iteration maps singular values into about [0.7, 1.2] and keeps the singular vectors; decay is decoupled."""
    model = toy(torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in INNER}
    config = Optimizer(name="muon", muon_lr=0.5, muon_weight_decay=0.25, muon_adjust_lr_fn="original")
    optimizer = build_optimizer(model, config, INNER)
    backward(loss_of(model, 0))
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if name in INNER}
    step_if_finite(optimizer, 1.0, torch.tensor(1.0))
    for name, old in before.items():
        rows, columns = old.shape
        update = (old * (1 - 0.5 * 0.25) - model.get_parameter(name)) / (0.5 * math.sqrt(max(1, rows / columns)))
        u, sizes, v = torch.linalg.svd(gradients[name], full_matrices=False)
        diagonal = torch.diagonal(u.mT @ update @ v.mT)
        large = sizes > 0.05 * sizes[0]  # smaller ones are not at their limit after five iterations
        assert large.sum() >= 2 and (diagonal[large] > 0.6).all() and (singular_values(update) < 1.3).all(), name


def test_its_rate_is_told_beside_adamws():
    config = Optimizer(name="muon", lr=0.003, base_lr=0.002, muon_lr=0.04)
    assert peak_learning_rates(["speculator", "base"], config) == {"speculator": 0.003, "base": 0.002, "muon": 0.04}
    assert peak_learning_rates(["speculator"], Optimizer(lr=0.003)) == {"speculator": 0.003}


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_changes_nothing(bad):
    model = toy()
    optimizer = build_optimizer(model, Optimizer(name="muon"), INNER)
    train(model, optimizer, [0])
    tensors = [*model.parameters(), *optimizer_tensors(optimizer).values()]
    before = [tensor.detach().clone() for tensor in tensors]
    optimizer.zero_grad()
    backward(loss_of(model, 1) + bad)
    assert step_if_finite(optimizer, 1.0, clip_grad_norm(model.parameters(), 1.0)) == 1
    assert all(torch.equal(old, new) for old, new in zip(before, tensors))
    train(model, optimizer, [2])
    assert all(not torch.equal(old, new) and new.isfinite().all() for old, new in zip(before, tensors) if old.numel() > 1)


def test_state_is_whole_before_the_first_step_in_full_precision_and_restores_exactly():
    model, half, resumed = toy(), toy(), toy()
    config = Optimizer(name="muon")
    optimizer, half_optimizer, resumed_optimizer = (build_optimizer(each, config, INNER) for each in (model, half, resumed))
    fresh = optimizer_tensors(optimizer)
    assert {name for name in fresh if name.endswith("momentum_buffer")} == {f"{name}.momentum_buffer" for name in INNER}
    assert len(fresh) == 2 + 3 * 7 and {tensor.dtype for tensor in fresh.values()} == {torch.float32}
    train(model, optimizer, range(4))
    train(half, half_optimizer, range(2))
    resumed.load_state_dict(half.state_dict())
    for name, tensor in optimizer_tensors(resumed_optimizer).items():
        tensor.copy_(optimizer_tensors(half_optimizer)[name])
    train(resumed, resumed_optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))


SHAPES = {
    "mlp": [{}, {"tie_weights": False}, {"inner_dim": "20.28", "emb_dim": "18.24", "proj_dim": "26.24"}],
    "lstm": [{}, {"tie_lstm_embs": False}, {"inner_dim": "20.28", "emb_dim": "18.24", "proj_dim": "26.24"}],
    "eagle3": [{}, {"embed_requires_grad": True, "train_head": True, "draft_arch": "qwen3", "fc_norm": True}],
}
CASES = [(family, keys) for family, several in SHAPES.items() for keys in several]


@pytest.mark.parametrize(("family", "keys"), CASES)
def test_no_embedding_head_norm_or_bias_is_left_to_muon(family, keys):
    if family != "eagle3":
        keys = {"speculator_width": 24} | keys
    base = LlamaConfig(VOCAB, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2)
    speculator = build_speculator(family, SPECULATOR_CONFIGS[family](**keys), base, Objective())
    expected = {name for name, parameter in speculator.named_parameters() if parameter.dim() == 2 and VOCAB not in parameter.shape}
    assert expected and speculator.inner_matrices() == expected
    optimizer = build_optimizer(speculator, Optimizer(name="muon"), speculator.inner_matrices())
    trained = {type(part): {name for group in part.param_groups for name in group["param_names"]} for part in optimizer.parts}
    by_muon, by_adamw = (
        next(names for kind, names in trained.items() if issubclass(kind, each)) for each in (torch.optim.Muon, torch.optim.AdamW)
    )
    assert by_muon == expected and by_adamw == {name for name, _ in speculator.named_parameters()} - expected
