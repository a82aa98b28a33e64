"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), as torch.optim has it, of matrices that may be sharded."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


class Muon(torch.optim.Muon):
    """torch's update to the bit on one process, the same on shards, in steps that skip themselves on the device.

    torch's own `step` would let DTensor split the products of the Newton-Schulz iteration: in bfloat16 their sums then depend on the
    layout, and every product is a collective. Here the momentum is a shard, in the parameter's precision; a matrix's update is gathered
    once, every rank orthogonalises it whole, and keeps its part.

    Attributes:
        found_inf: float32 [] on the device; where it is not 0 a step changes nothing. (As the fused AdamW has it.)
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict], **settings):
        super().__init__(groups, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        weights, gradient, buffer = (_local(each) for each in (parameter, parameter.grad, self.state[parameter]["momentum_buffer"]))
        new_buffer = buffer.lerp(gradient, 1 - group["momentum"])
        update = gradient.lerp(new_buffer, group["momentum"]) if group["nesterov"] else new_buffer
        direction = _orthogonal(_gather(update, parameter), group)
        lr = group["lr"] * _adjustment(*parameter.shape, group["adjust_lr_fn"])
        new_weights = (weights * (1 - group["lr"] * group["weight_decay"])).add_(_own_part(direction, parameter), alpha=-lr)
        skipped = self.found_inf is not None and self.found_inf != 0
        _replace(buffer, new_buffer, skipped)
        _replace(weights, new_weights, skipped)


class Together:
    """Several optimizers as one, for all that a run asks of one: `zero_grad`, `step`, `param_groups`, `state`, `found_inf`."""

    found_inf: Tensor | None = None

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        self.state = {parameter: state for part in parts for parameter, state in part.state.items()}

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.found_inf = self.found_inf
            part.step()


def _orthogonal(update: Tensor, group: dict) -> Tensor:
    """The Newton-Schulz iteration of torch's Muon, of a whole matrix: what its step without momentum and decay makes of a weight of 0."""
    lies = update if update.shape[0] <= update.shape[1] else update.T  # its own rate is then not adjusted
    weight = nn.Parameter(torch.zeros_like(lies))
    weight.grad = lies
    iteration = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps")}
    torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, **iteration).step()
    turned = weight.detach().neg_()
    return turned if lies is update else turned.T


def _adjustment(rows: int, columns: int, adjust_lr_fn: str) -> float:
    """See optimizer.muon_adjust_lr_fn."""
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr_fn == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def _replace(target: Tensor, new: Tensor, skipped: Tensor | bool) -> None:
    """`target` becomes `new`, unless skipped; the host does not wait."""
    target.copy_(new if skipped is False else torch.where(skipped, target, new))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole matrix, of which this rank has what it has of the parameter. All ranks call it together."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def _own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What this rank keeps of a matrix that all ranks have whole."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, parameter.placements).to_local()
