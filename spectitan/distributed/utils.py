"""Small collective helpers. None of them waits for the device, unless it says so."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spectitan.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Processes of the run; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """A new tensor, the sum over all ranks. CPU tensors go by gloo, GPU tensors by nccl without waiting for the result."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_rank(flag: bool) -> bool:
    """True on every rank if true on one: how ranks agree to stop, to save, or that something failed."""
    return bool(sum_over_ranks(torch.tensor(int(flag))) > 0)


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank. For small Python values."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks, on every rank. For small Python values."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable) -> list:
    """Every rank's result of `work`; a UserError or OSError that it raises on one rank is raised on all of them."""
    if world_size() == 1:
        return [work()]
    result = error = None
    try:
        result = work()
    except (UserError, OSError) as failure:
        error = failure
    outcomes = gather((result, error))
    failed = next((failure for _, failure in outcomes if failure is not None), None)
    if failed is not None:
        raise failed from error
    return [result for result, _ in outcomes]


def on_main(work: Callable):
    """Rank 0's result of `work`, which runs there only; its UserError or OSError is raised on every rank."""
    return together(work if rank() == 0 else lambda: None)[0]


def backward(total: Tensor) -> None:
    """`total.backward()`, with gradients of NaN if the loss is not finite.

    A loss can be infinite while its gradients are finite. Made NaN on one rank they reach the gradient norm, which is the
    same on all ranks, so that all of them skip the step without a collective or a host sync of its own.
    """
    total.backward(torch.where(total.detach().isfinite(), 1.0, math.nan).to(total.dtype))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to a norm of at most `max_norm`, in place.

    Args:
        parameters: of one mesh; those without gradient are left out.
        max_norm: 0 only measures.

    Returns:
        float32 (float64 for float64 gradients) [] on the device: the norm over all parameters and ranks, before clipping.
        It is not finite exactly if some gradient is not finite or the norm overflows: the next step must be skipped then
        (training/optimizer.py does).
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # On the CPU the comparison costs nothing and saves a pass over all gradients; on a GPU it would make the host wait.
    if max_norm > 0 and not (norm.device.type == "cpu" and norm <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
