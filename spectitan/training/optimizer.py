"""AdamW over named parameters, a step that skips itself on the device, and its whole state as named tensors."""

import torch
from torch import Tensor, nn

from spectitan.config.sections import Optimizer


def build_optimizer(module: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay of matrices only: embeddings count as matrices, norms and biases are vectors.

    The state is made here, not at the first step: a checkpoint has the same tensors at every step, and can be read in place
    before the first. (torch.distributed.checkpoint.state_dict.get_optimizer_state_dict would take a dummy step for that.)

    Args:
        module: its parameters that require gradients are trained. nn.ModuleDict joins several modules.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [pair for pair in trained if pair[1].dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [pair for pair in trained if pair[1].dim() < 2], "weight_decay": 0.0},
    ]
    # Fused: one pass over memory, on the CPU several times faster than the default.
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True
    )
    for _, parameter in trained:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The live state tensors, `<parameter>.<state>`; reading into them in place restores the optimizer exactly."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"]):
            tensors.update({f"{name}.{key}": value for key, value in optimizer.state[parameter].items()})
    return tensors


def step_if_finite(optimizer: torch.optim.Optimizer, learning_rate: float, *grad_norms: Tensor) -> None:
    """One optimizer step, unless a gradient norm is not finite: then parameters and state stay as they are, bit for bit.

    The fused kernels look at `found_inf` on the device (GradScaler's door), so that the host neither waits nor branches.

    Args:
        learning_rate: of this step, for all parameters.
        grad_norms: [] on the device, the same on all ranks (distributed/utils.py: clip_grad_norm).
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.found_inf = (~torch.stack(grad_norms).isfinite().all()).float()
    optimizer.step()
