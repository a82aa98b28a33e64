import math

import pytest
import torch
from torch import nn

from spectitan.config.sections import Optimizer
from spectitan.distributed.utils import backward, clip_grad_norm
from spectitan.training.optimizer import build_optimizer, optimizer_tensors, step_if_finite


def toy(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return nn.ModuleDict({"embed": nn.Embedding(7, 5), "norm": nn.LayerNorm(5), "out": nn.Linear(5, 3)}).to(dtype)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.tensor([step % 7, 3, 6])
    return (model["out"](model["norm"](model["embed"](tokens))) ** 2).sum()


def test_adamw_with_decay_of_matrices_only_equals_the_paper():
    """Algorithm 2 of Loshchilov and Hutter, by hand, in float64."""
    config = Optimizer(lr=0.02, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.3)
    model = toy()
    optimizer = build_optimizer(model, config)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(1, 5):
        optimizer.zero_grad()
        backward(loss_of(model, step))
        norm = clip_grad_norm(model.parameters(), 0.0)
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            decay = 0.3 if name in ("embed.weight", "out.weight") else 0.0
            update = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            expected[name] = expected[name] - 0.01 * (update + decay * expected[name])
        step_if_finite(optimizer, 0.5, norm)  # of the configured peak
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_frozen_parameters_are_left_out():
    model = toy()
    model["embed"].requires_grad_(False)
    names = [name for group in build_optimizer(model, Optimizer()).param_groups for name in group["param_names"]]
    assert sorted(names) == ["norm.bias", "norm.weight", "out.bias", "out.weight"]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_is_not_finite_changes_nothing(bad, max_norm, dtype):
    model = toy(dtype)
    optimizer = build_optimizer(model, Optimizer())
    snapshots = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        backward(loss + bad if step == 1 else loss)  # the gradients themselves would be finite
        norm = clip_grad_norm(model.parameters(), max_norm)
        assert bool(norm.isfinite()) == (step != 1)
        skipped = step_if_finite(optimizer, 10, norm)
        assert skipped.item() == (step == 1)
        state = [*model.parameters(), *optimizer_tensors(optimizer).values()]
        snapshots.append([tensor.detach().clone() for tensor in state])
    assert all(torch.equal(before, after) for before, after in zip(snapshots[0], snapshots[1]))
    assert all(not torch.equal(before, after) for before, after in zip(snapshots[1], snapshots[2]) if before.numel() > 1)
    assert all(tensor.isfinite().all() for tensor in snapshots[2])
    assert optimizer_tensors(optimizer)["out.bias.step"].item() == 2


def test_one_bad_norm_of_several_skips_the_step():
    model = toy()
    optimizer = build_optimizer(model, Optimizer())
    loss_of(model, 0).backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert step_if_finite(optimizer, 10, torch.tensor(1.0), torch.tensor(math.nan)) == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_clipping_equals_the_definition():
    for max_norm in (0.0, 1e-3, 1e9):
        model = toy()
        loss_of(model, 0).backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        total = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in gradients))
        norm = clip_grad_norm(model.parameters(), max_norm)
        assert norm.item() == pytest.approx(total, rel=1e-14)
        scale = min(1.0, max_norm / (total + 1e-6)) if max_norm else 1.0
        for before, parameter in zip(gradients, model.parameters()):
            torch.testing.assert_close(parameter.grad, before * scale, rtol=1e-12, atol=0)


def test_state_is_whole_before_the_first_step_and_restores_exactly():
    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            backward(loss_of(model, step))
            step_if_finite(optimizer, 10 / (1 + step), clip_grad_norm(model.parameters(), 1.0))

    model = toy(torch.float32)
    optimizer = build_optimizer(model, Optimizer())
    fresh = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    assert len(fresh) == 3 * 5 and all(tensor.count_nonzero() == 0 for tensor in fresh.values())
    run(model, optimizer, range(4))

    resumed = toy(torch.float32)
    resumed_optimizer = build_optimizer(resumed, Optimizer())
    half = toy(torch.float32)
    half_optimizer = build_optimizer(half, Optimizer())
    run(half, half_optimizer, range(2))
    assert optimizer_tensors(half_optimizer).keys() == fresh.keys()
    resumed.load_state_dict(half.state_dict())
    for name, tensor in optimizer_tensors(resumed_optimizer).items():
        tensor.copy_(optimizer_tensors(half_optimizer)[name])
    run(resumed, resumed_optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
