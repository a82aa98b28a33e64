"""What an optimizer step of a real run holds, multiplies and sends, read from the tensors that pass by."""

import contextlib
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spectitan import train
from spectitan.objectives import block_passes, fused_linear
from spectitan.states.continued import ContinuedStates


class Measured(TorchDispatchMode):
    """Peak of the bytes of all storages that operations of this rank have seen and that are still alive; operations of matrix products;
    bytes that a ring of the ranks would send."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = self.flops = self.sent = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.see(tree_leaves((args, kwargs, result)))
        alive = {key: reference() for key, reference in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in alive.items() if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive.values() if storage is not None))
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm"):
            left, right = args[:2] if name in ("mm", "bmm", "_grouped_mm") else args[1:3]
            self.flops += 2 * left.numel() * right.shape[-1]
        elif name.startswith("_scaled_dot_product"):  # causal: half of the scores; two products, four in the backward
            queries, keys = args[1:3] if name.endswith("backward") else args[:2]
            self.flops += (4 if name.endswith("backward") else 2) * queries.numel() * (keys.shape[2] + 1)
        self._count_sent(function, name.strip("_"), args, result)
        return result

    def see(self, tensors) -> None:
        for tensor in tensors:
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage._cdata, weakref.ref(storage))

    def _count_sent(self, function, name: str, args: tuple, result) -> None:
        if function.namespace == "_c10d_functional" and name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            whole, ranks = (result, args[1]) if name == "all_gather_into_tensor" else (args[0], args[2])
            self.sent += whole.numel() * whole.element_size() * (ranks - 1) // ranks
        elif function.namespace == "c10d" and name in ("allgather_base", "reduce_scatter_base", "allreduce"):
            group = next(g for g in map(_group, args) if g is not None)
            whole = args[0][0] if name == "allreduce" else args[0] if name == "allgather_base" else args[1]
            times = 2 if name == "allreduce" else 1
            self.sent += times * whole.numel() * whole.element_size() * (group.size() - 1) // group.size()


def _group(argument):
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:  # another kind of object: the reduction, say
        return None


def measure(flags: list[str]) -> dict:
    """Trains for two steps, and returns what the second one took."""
    measured, steps, train_step, begin = Measured(), [], train.Trainer._train_step, ContinuedStates.begin

    def measured_step(trainer, *args):
        with measured if steps else contextlib.nullcontext():
            train_step(trainer, *args)
        steps.append(trainer.step)
        state = (tensor for tensors in trainer.optimizer.state.values() for tensor in tensors.values())
        measured.see([*trainer.base.parameters(), *trainer.speculator.parameters(), *state])  # what is there before the next one

    def measured_begin(source, batch):  # a step of stage 2 begins with sampling
        with measured if steps else contextlib.nullcontext():
            return begin(source, batch)

    def fresh_memory(name, rows, like, dtype=None):  # as on a GPU, which plans are for
        return like.new_empty(rows, len(like), dtype=dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "_train_step", measured_step)
        patch.setattr(ContinuedStates, "begin", measured_begin)
        patch.setattr(fused_linear, "kept_memory", fresh_memory)
        patch.setattr(block_passes, "kept_memory", fresh_memory)
        assert train.main(flags) == 0
    assert len(steps) == 2
    return {"peak": measured.peak, "flops": measured.flops, "sent": measured.sent}


def worker(rank: int, output: str, runs: dict[str, list[str]]) -> None:
    """Makes the runs, and writes what they took to output.RANK.json."""
    results = {name: measure(flags) for name, flags in runs.items()}
    Path(f"{output}.{rank}.json").write_text(json.dumps(results))
