"""Fully sharded data parallelism: how the parts of a run are wrapped, and in which precision they are held and computed.

Masters are float32 (float64 when computing in float64), gathered in the compute dtype; gradients are summed, never averaged,
because losses are already normalised by global counts. On one rank, where there is nothing to gather or reduce, FSDP would still
hold copies of all parameters and gradients: a speculator is cast as it is used there, and what computes in its masters' precision
is left as it is.
"""

import itertools
import logging
import math
import platform
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from spectitan.distributed.cast_on_use import cast_on_use

logger = logging.getLogger(__name__)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `training.compute_dtype`: auto is bfloat16 where the hardware multiplies it fast, else float32."""
    if name == "auto":
        return torch.bfloat16 if _fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}[name]


def _fast_bfloat16(device: torch.device) -> bool:
    """GPU: compute capability 8.0 or later. CPU: AMX, AVX-512 BF16 or the Arm bf16 extension.

    oneDNN calls bfloat16 supported where it only emulates it, several times slower than float32, so the CPU's flags decide.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if platform.system() != "Linux":
        return False
    with open("/proc/cpuinfo") as file:
        flags = next((line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features"))), [])
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(flags)


def master_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """dtype in which trained parameters, gradients and optimizer state are held and reduced."""
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters in place. Buffers keep their dtype: rotary frequencies, for one, need float32."""
    for parameter in module.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def _shard(
    module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype, reshard_after_forward: bool
) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=master_dtype(compute_dtype),
        cast_forward_inputs=False,  # it would cast float arguments, even inside tuples; counts and weights must stay exact
    )
    for unit in (*blocks, module):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    for unit in module.modules():
        if isinstance(unit, FSDPModule) and mesh.size() == 1:
            unit.set_custom_reduce_scatter(_OneRankReduction())
        elif isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other way to a factor of 1


class _OneRankReduction:
    """What is summed over one rank is the sum: both get the same memory, where FSDP would copy one into the other.

    For `set_custom_reduce_scatter`, which asks for memory by `allocate`. The reduction itself is never called on one rank: there
    FSDP copies input to output (torch 2.11 to 2.13), which is nothing where they are the same tensor.
    """

    def __init__(self):
        self.input: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input's memory, then for the output's, unit after unit."""
        if self.input is None:
            self.input = torch.empty(*size, dtype=dtype, device=device)
            return self.input
        output, self.input = self.input, None
        assert output.numel() == math.prod(size) and output.dtype == dtype, f"{output.shape} {output.dtype} for {size} {dtype}"
        return output


def shard_trained(
    module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype, *, reshard_after_forward: bool = False
) -> None:
    """Shards a module that is trained, in place.

    Args:
        module: holds full parameters, the same on every rank.
        blocks: its parts that are gathered one at a time; what they leave is gathered with the whole module.
        mesh: "shard", or ("replicate", "shard") for copies of what is sharded (HSDP); of size 1 it only separates masters from compute
            precision, where they differ.
        compute_dtype: dtype of gathered parameters.
        reshard_after_forward: free gathered parameters after the forward and gather them again in the backward.
    """
    cast_parameters(module, master_dtype(compute_dtype))
    is_split = any(isinstance(parameter, DTensor) for parameter in module.parameters())  # FSDP finishes the gradients of what tp splits
    if mesh.size() == 1 and compute_dtype == master_dtype(compute_dtype) and not is_split:
        _move(module, torch.device(mesh.device_type))
        return
    _shard(module, blocks, mesh, compute_dtype, reshard_after_forward)


def shard_frozen(module: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, compute_dtype: torch.dtype) -> None:
    """Shards a module that is only run forward, held in the compute dtype: there is no optimizer that needs masters."""
    module.requires_grad_(False)
    cast_parameters(module, compute_dtype)
    # Explicit: without a backward nothing else would ever free the gathered root.
    _shard(module, blocks, mesh, compute_dtype, reshard_after_forward=True)


def hold_trained(module: nn.Module, device: torch.device, compute_dtype: torch.dtype, heads: Collection[str] = ()) -> None:
    """A module trained on one process, whose own forward uses all its parameters: masters, cast as they are used; by the fused loss
    those of the submodules named `heads`."""
    cast_parameters(module, master_dtype(compute_dtype))
    module.to(device)
    if compute_dtype != master_dtype(compute_dtype):
        cast_on_use(module, compute_dtype, heads)


def hold_frozen(module: nn.Module, device: torch.device, compute_dtype: torch.dtype) -> None:
    """A frozen module on one process needs no wrapping: it is held in the compute dtype."""
    module.requires_grad_(False)
    cast_parameters(module, compute_dtype)
    _move(module, device)


def _move(module: nn.Module, device: torch.device) -> None:
    """Meta tensors stay: they are made on their device when all is sharded."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        module.to(device)


def apply_fsdp(
    base: nn.Module,
    speculator: nn.Module,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    freeze_base: bool,
    speculator_mesh: DeviceMesh | None = None,
) -> None:
    """Places base and speculator on the mesh, in place, each as its use asks.

    The readout is one unit of the base: its embedding and head may be tied, and objectives use it after the base's forward
    has ended, through `readout.call`.

    Args:
        base: has `.layers` and `.readout`; full parameters, the same on every rank.
        speculator: may be without parameters (`speculator.type = "none"`).
        mesh: as `shard_trained`'s.
        speculator_mesh: the speculator's own mesh; None: the base's.
    """
    device = torch.device(mesh.device_type)
    blocks = [*base.layers, base.readout]
    if not freeze_base:
        # Where each rank holds all of the base there is no memory to win by gathering twice.
        shard_trained(base, blocks, mesh, compute_dtype, reshard_after_forward=_shards(mesh) > 1)
        if isinstance(base.readout, FSDPModule):
            base.readout.set_reshard_after_forward(False)  # used at both ends of the step
        register_fsdp_forward_method(base.readout, "call")
        logger.info("base: trained, %s masters, %s, computed in %s", master_dtype(compute_dtype), _extent(mesh), compute_dtype)
    elif _shards(mesh) > 1:
        shard_frozen(base, blocks, mesh, compute_dtype)
        register_fsdp_forward_method(base.readout, "call")
        logger.info("base: frozen, %s, held and computed in %s", _extent(mesh), compute_dtype)
    else:
        hold_frozen(base, device, compute_dtype)
        logger.info("base: frozen, held and computed in %s", compute_dtype)
    _prefetch(blocks)

    if any(True for _ in speculator.parameters()):
        speculator_mesh = speculator_mesh or mesh
        if speculator_mesh.size() == 1:
            hold_trained(speculator, device, compute_dtype, speculator.head_modules)
        else:
            shard_trained(speculator, (), speculator_mesh, compute_dtype)
        logger.info("speculator: %s masters, %s, computed in %s", master_dtype(compute_dtype), _extent(speculator_mesh), compute_dtype)


def _shards(mesh: DeviceMesh) -> int:
    return mesh.size(-1)


def _extent(mesh: DeviceMesh) -> str:
    return "sharded over " + str(_shards(mesh)) + (f", {mesh.size(0)} copies" if mesh.ndim == 2 else "")


def _prefetch(blocks: Sequence[nn.Module]) -> None:
    """Each block has the next one gathered while it computes. (In the backward FSDP does so by itself.)"""
    for block, following in itertools.pairwise(blocks):
        if isinstance(block, FSDPModule):
            block.set_modules_to_forward_prefetch([following])


def gather_frozen(module: nn.Module) -> None:
    """Gathers a module that `shard_frozen` has sharded, whole: it stays so over any number of forwards, until `free_frozen`.

    All ranks call it together. Nothing happens where nothing is sharded.
    """
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def free_frozen(module: nn.Module) -> None:
    """Undoes `gather_frozen`: each unit is gathered for its own forward again."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


def set_gradient_sync(modules: Iterable[nn.Module], enabled: bool) -> None:
    """Whether the next backward reduces the gradients of these modules over the mesh.

    False for all but an optimizer step's last micro-batch saves communication and accumulates in the reduce dtype, at the
    cost of one full gradient (4 bytes a parameter) on every rank: right for a speculator, whose parameters stay gathered
    anyway; a sharded base reduces with every micro-batch, which accumulates in the reduce dtype as well.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(enabled)


def set_all_reduce(module: nn.Module, readout: nn.Module, enabled: bool) -> None:
    """Whether the next backward sums gradients over the copies of what is sharded (HSDP): needed once an optimizer step.

    The readout, used at both ends of the step, is reduced in two parts, which FSDP would add up as one: it sums every time.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(enabled)
        readout.set_requires_all_reduce(True)
