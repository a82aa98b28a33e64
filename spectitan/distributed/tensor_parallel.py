"""Tensor parallelism of a base: each layer is split over the ranks of a group, which all work on the rows of all of them.

Every rank loads rows of its own. Between the split products a rank holds the activations of its own rows only (sequence
parallelism, Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, along the batch): attention and MLP gather the rows of
the group before, and scatter them after. So every module of the base takes a rank's own rows and returns them; what stands
outside, the speculator first of all, is data parallel over all ranks and does no work twice. Sequences need not divide.
"""

import inspect
import logging
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from spectitan.errors import UserError

logger = logging.getLogger(__name__)

_ROWS = Shard(0)
_ROW_ARGUMENTS = ("document_ids", "positions", "mask")  # of a base's forward: attention needs those of all rows of the group


class OneKVHead(ParallelStyle):
    """k_proj or v_proj of fewer heads than ranks: whole on every rank, which computes the head that its own queries read."""

    def __init__(self, head_dim: int):
        self.head_dim = head_dim

    def _apply(self, module: nn.Linear, mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            replicated = distribute_tensor(parameter.data, mesh, [Replicate()], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(replicated, parameter.requires_grad))
        heads = module.out_features // self.head_dim
        head = mesh.get_local_rank() * heads // mesh.size()
        rows = slice(head * self.head_dim, (head + 1) * self.head_dim)

        def forward(x: DTensor) -> Tensor:
            # What flows back are shares: of every rank's own queries.
            x, weight = (tensor.to_local(grad_placements=[Partial()]) for tensor in (x, module.weight))
            bias = None if module.bias is None else module.bias.to_local(grad_placements=[Partial()])[rows]
            return F.linear(x, weight[rows], bias)

        module.forward = forward
        return module


class LocalWeight(ParallelStyle):
    """The module's own code, on plain tensors, with this rank's part of its weight; what flows back to a whole one are shares."""

    def __init__(self, placement: Placement):
        self.placement = placement

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        part = distribute_tensor(module.weight.data, mesh, [self.placement], src_data_rank=None)
        module.register_parameter("weight", nn.Parameter(part, module.weight.requires_grad))
        backward = [self.placement if self.placement.is_shard() else Partial()]

        def shadow(module: nn.Module, args: tuple) -> None:
            module.__dict__["weight"] = module._parameters["weight"].to_local(grad_placements=backward)

        def restore(module: nn.Module, args: tuple, output: Tensor) -> None:
            del module.__dict__["weight"]

        module.register_forward_pre_hook(shadow)
        module.register_forward_hook(restore, always_call=True)
        return module


class ShareOfSum(ParallelStyle):
    """The module works on the rows of the group, in plain tensors, and what it returns is this rank's share of a sum over ranks."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, args: tuple) -> Tensor:
            rows = DTensor.from_local(args[0], mesh, [_ROWS], run_check=False).redistribute(placements=[Replicate()])
            return rows.to_local(grad_placements=[Partial()])

        def scatter(module: nn.Module, args: tuple, share: Tensor) -> Tensor:
            return DTensor.from_local(share, mesh, [Partial()], run_check=False).redistribute(placements=[_ROWS]).to_local()

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(scatter)
        return module


class RowsOfVocabulary(RowwiseParallel):
    """An embedding of tokens, split by rows: int64 [own rows, m] -> [own rows, m, hidden], which has arrived when it is returned.

    A compiled function drops the gradient of an argument that is still on its way: AOTAutograd takes in its place what
    `AsyncCollectiveTensor.trigger_wait()` returns, which has no history (torch 2.13; 2.11 had it right).
    """

    def __init__(self):
        super().__init__(input_layouts=_ROWS, output_layouts=_ROWS)

    def _apply(self, module: nn.Embedding, mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, mesh)
        module.register_forward_hook(lambda module, args, rows: wait_tensor(rows))
        return module


class PositionsOfRows(RowwiseParallel):
    """An embedding of positions, split by rows: int64 [rows of the group, or 1, m] -> [own rows, or 1, m, hidden]."""

    def __init__(self):
        super().__init__(input_layouts=Replicate(), output_layouts=_ROWS)

    def _apply(self, module: nn.Embedding, mesh: DeviceMesh) -> nn.Module:
        module = super()._apply(module, mesh)
        module.register_forward_pre_hook(lambda module, args: (_at_least(args[0], mesh.size()),), prepend=True)
        return module


def _at_least(positions: Tensor, rows: int) -> Tensor:
    """Positions that are the same for all rows, once for each rank."""
    return positions.expand(rows, -1) if len(positions) == 1 else positions


def _layer_plan(config, tp_size: int) -> dict[str, ParallelStyle]:
    """Norms work on own rows. Queries are split by columns and their outputs' projection by rows: one gather before, one scatter after."""
    own_rows = SequenceParallel(sequence_dim=0, use_local_output=True)
    one_kv_head = _kv_heads(config) < tp_size
    return {
        "input_layernorm": own_rows,
        "self_attn": PrepareModuleInput(input_layouts=(_ROWS, *[None] * 5), desired_input_layouts=(Replicate(), *[None] * 5)),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": OneKVHead(config.head_dim) if one_kv_head else ColwiseParallel(),
        "self_attn.v_proj": OneKVHead(config.head_dim) if one_kv_head else ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=_ROWS),
        "post_attention_layernorm": own_rows,
    }


def _llama_plan(config, tp_size: int) -> dict[str, ParallelStyle]:
    """As attention, the MLP: its gates by columns, what they go into by rows."""
    plan = _layer_plan(config, tp_size) | {
        "mlp": PrepareModuleInput(input_layouts=(_ROWS,), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=_ROWS),
    }
    if config.qk_norm:
        own_heads = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan |= {"self_attn.q_norm": own_heads, "self_attn.k_norm": own_heads}
    return plan


def _mixtral_plan(config, tp_size: int) -> dict[str, ParallelStyle]:
    """Every rank has a part of every expert; the router is whole, and chooses alike on all of them."""
    return _layer_plan(config, tp_size) | {
        "mlp": ShareOfSum(),
        "mlp.gate": LocalWeight(Replicate()),
        "mlp.experts.gate_proj": LocalWeight(Shard(1)),
        "mlp.experts.up_proj": LocalWeight(Shard(1)),
        "mlp.experts.down_proj": LocalWeight(Shard(2)),
    }


def _gpt_bigcode_plan(config, tp_size: int) -> dict[str, ParallelStyle]:
    """One key and one value head, on every rank."""
    return _layer_plan(config, tp_size) | {
        "mlp": PrepareModuleInput(input_layouts=(_ROWS,), desired_input_layouts=(Replicate(),)),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=_ROWS),
    }


# base.arch -> (config, tp_size) -> plan of a layer
_PLANS: dict[str, Callable] = {"embedllama": _llama_plan, "embedmixtral": _mixtral_plan, "embedgptbigcode": _gpt_bigcode_plan}


def _kv_heads(config) -> int:
    return getattr(config, "num_kv_heads", 1)


# Embedding and head are split by vocabulary, so that they can be tied. The last rank has fewer rows where the vocabulary does not divide.
_READOUT_PLAN = {
    "embedding": RowsOfVocabulary(),
    "norm": SequenceParallel(sequence_dim=0, use_local_output=True),
    "head": ColwiseParallel(input_layouts=_ROWS, output_layouts=_ROWS),
}


def check_tensor_parallel(arch: str, config, tp_size: int) -> None:
    """Refuses, before weights are read, what cannot be split.

    Args:
        arch: base.arch.
        config: the base's; has its shape.

    Raises:
        UserError: names the number that does not divide.
    """
    if tp_size == 1:
        return
    given = f"parallelism.tp_size = {tp_size}"
    if arch not in _PLANS:
        raise UserError(f"{given}: base.arch = {arch} cannot be split; allowed: {', '.join(_PLANS)}, or tp_size = 1")
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % tp_size:
            raise UserError(f"{given}: the base's {name} = {getattr(config, name)} does not divide by it; allowed: a divisor of that")
    if config.vocab_size <= (tp_size - 1) * -(-config.vocab_size // tp_size):  # shares are rounded up
        raise UserError(f"{given}: the base's vocab_size = {config.vocab_size} leaves the last of them nothing; allowed: fewer")
    kv_heads = _kv_heads(config)
    if kv_heads % tp_size and tp_size % kv_heads:
        raise UserError(f"{given}: the base's num_kv_heads = {kv_heads}; allowed: a divisor or a multiple of that")


def apply_tp(base: nn.Module, arch: str, mesh: DeviceMesh) -> None:
    """Splits a base on the meta device over the ranks of a mesh of one dimension, in place, before it is compiled or sharded.

    Every parameter becomes a DTensor of the mesh, norms as copies. All ranks of the group call the base's modules together, with as
    many rows each; a cache of `base.new_cache` holds the rows of the group.

    Args:
        base: checked by `check_tensor_parallel`; has `.config`, `.layers` and `.readout`.
        arch: base.arch.
    """
    for layer in base.layers:
        parallelize_module(layer, mesh, _PLANS[arch](base.config, mesh.size()))
    ends = {name: style for name, style in _READOUT_PLAN.items() if getattr(base.readout, name) is not None}  # a head may be dropped
    parallelize_module(base.readout, mesh, ends)
    if hasattr(base, "positions"):
        parallelize_module(base, mesh, {"positions": PositionsOfRows()})
    if base.readout.tied:
        base.readout.head.weight = base.readout.embedding.weight
    new_cache, signature = base.new_cache, inspect.signature(base.forward)
    base.new_cache = lambda batch, length: new_cache(batch * mesh.size(), length)

    def gather_arguments(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = signature.bind(*args, **kwargs).arguments
        for name in _ROW_ARGUMENTS:
            if given.get(name) is not None:
                given[name] = gather_rows(given[name], mesh)
        return (), given

    base.register_forward_pre_hook(gather_arguments, with_kwargs=True)
    logger.info("base: each layer split over %d ranks", mesh.size())


def gather_rows(own: Tensor, mesh: DeviceMesh) -> Tensor:
    """[rows, ...] of each rank, as many on all of them -> [ranks * rows, ...] on all of them."""
    return DTensor.from_local(own, mesh, [_ROWS], run_check=False).full_tensor()
