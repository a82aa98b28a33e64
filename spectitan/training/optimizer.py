"""AdamW, or Muon and AdamW, over named parameters, a step that skips itself on the device, and the whole state as named tensors."""

from collections import defaultdict
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from spectitan.config.sections import Optimizer
from spectitan.training.muon import Muon, Together


def build_optimizer(module: nn.Module, config: Optimizer, inner_matrices: Collection[str] = ()) -> torch.optim.AdamW | Together:
    """AdamW with decoupled weight decay of matrices only: embeddings count as matrices, norms and biases are vectors.

    With `optimizer.name` = muon, `inner_matrices` are left to Muon.

    The state is made here, not at the first step: a checkpoint has the same tensors at every step, and can be read in place
    before the first. (torch.distributed.checkpoint.state_dict.get_optimizer_state_dict would take a dummy step for that.)

    Args:
        module: its parameters that require gradients are trained. nn.ModuleDict joins several modules; the one named "base" has
            a learning rate of its own.
        inner_matrices: names of parameters that map features to features, which are no tables over the vocabulary.
    """
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if config.name == "adamw":
        return _adamw(trained, config)
    matrices = [(name, parameter) for name, parameter in trained if name in inner_matrices]
    muon = Muon(
        [{"params": matrices, "lr": config.muon_lr, "peak_lr": config.muon_lr}],
        momentum=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn=config.muon_adjust_lr_fn,
    )
    return Together([_adamw([(name, parameter) for name, parameter in trained if name not in inner_matrices], config), muon])


def _adamw(named_parameters: list[tuple[str, nn.Parameter]], config: Optimizer) -> torch.optim.AdamW:
    groups = defaultdict(list)
    for name, parameter in named_parameters:
        # By part: base and speculator may lie on different meshes, which one kernel cannot step together.
        groups[name.partition(".")[0], parameter.dim() >= 2].append((name, parameter))
    optimizer = torch.optim.AdamW(
        [
            {"params": pairs, "lr": peak_learning_rate(part, config), "peak_lr": peak_learning_rate(part, config)}
            | {"weight_decay": config.weight_decay if is_matrix else 0.0}
            for (part, is_matrix), pairs in groups.items()
        ],
        betas=tuple(config.betas),
        eps=config.eps,
        fused=True,  # one pass over memory, on the CPU several times faster than the default
    )
    for _, parameter in (pair for pairs in groups.values() for pair in pairs):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def peak_learning_rate(name: str, config: Optimizer) -> float:
    """Of a parameter or module, by its name: "base" and all in it have `base_lr`, if that is set."""
    return config.base_lr if name.partition(".")[0] == "base" and config.base_lr != -1 else config.lr


def peak_learning_rates(parts: Iterable[str], config: Optimizer) -> dict[str, float]:
    """Of each part that is trained ("speculator", "base"), and "muon": of what Muon trains of the speculator."""
    rates = {part: peak_learning_rate(part, config) for part in parts}
    return rates | {"muon": config.muon_lr} if config.name == "muon" else rates


def optimizer_tensors(optimizer: torch.optim.Optimizer | Together) -> dict[str, Tensor]:
    """The live state tensors, `<parameter>.<state>`; reading into them in place restores the optimizer exactly."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"]):
            tensors.update({f"{name}.{key}": value for key, value in optimizer.state[parameter].items()})
    return tensors


def step_if_finite(optimizer: torch.optim.Optimizer | Together, multiplier: float, *grad_norms: Tensor) -> Tensor:
    """One optimizer step, unless a gradient norm is not finite: then parameters and state stay as they are, bit for bit.

    The fused kernels, and Muon, look at `found_inf` on the device (GradScaler's door), so that the host neither waits nor branches.

    Args:
        multiplier: of the peak learning rates, in this step.
        grad_norms: [] on the device, the same on all ranks (distributed/utils.py: clip_grad_norm).

    Returns:
        float32 [] on the device: 1 if the step was skipped, else 0.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    optimizer.found_inf = (~torch.stack(grad_norms).isfinite().all()).float()
    optimizer.step()
    return optimizer.found_inf
