"""What FSDP2 holds and sends beside the shards, on the meta device, where FSDP itself refuses to step.

The modules' parameters are whole here, in the dtype that they are gathered in, and count nowhere; hooks take and give back the memory
that FSDP2 does (torch 2.11 to 2.13), unit by unit: the buffer of a gather and the parameters copied out of it, gradients until they
are reduced, the buffer of a reduction until the next one.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from spectitan.planning.live_bytes import LiveBytes


class Layout(NamedTuple):
    """How a module is divided among ranks, tensor parallelism aside."""

    name: str  # of the module, in what is sent
    shards: int
    copies: int  # of the shards
    dtype: torch.dtype  # gathered
    master_dtype: torch.dtype  # of shards that are trained, and of reductions


def share(parameter: Tensor, shards: int) -> tuple[int, ...]:
    """Shape of the largest rank's share: rows are divided, and rounded up."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return (-(-local.shape[0] // shards), *local.shape[1:])


class ShardedRoot:
    """A module that FSDP shards, and its units.

    Args:
        module: called through its `forward`; its parameters need no gradient if it is frozen.
        blocks: units of their own, gathered in this order, each before the one ahead of it has ended.
        readout: a unit too, gathered around its method `call`; None for none.
        layout: of all of them.
        ledger: counts.
        reshard: free gathered parameters after each use in the forward. A trained readout always stays.
    """

    def __init__(
        self, module: nn.Module, blocks: Iterable[nn.Module], readout: nn.Module | None, layout: Layout, ledger: LiveBytes, reshard: bool
    ):
        self.layout, self.ledger = layout, ledger
        self.kept_gather = self.kept_reduction = None  # until the next one
        self.order: list[Unit] = []  # as units ended in the forward
        self.syncs = self.all_reduces = True  # in the next backward
        blocks = list(blocks)
        owners = [*((block, "forward") for block in blocks), *([(readout, "call")] if readout is not None else [])]
        taken: set[nn.Parameter] = set()
        self.units = []
        for owner, method in (*owners, (module, "forward")):
            own = [parameter for parameter in owner.parameters() if parameter not in taken]
            taken.update(own)
            if own:
                keeps = owner is readout and any(parameter.requires_grad for parameter in own)
                self.units.append(Unit(self, own, reshard and not keeps, together=owner is not readout))
                _around(owner, method, self.units[-1])
        self.is_whole = False
        for unit, following in zip(self.units, self.units[1 : len(owners)]):
            unit.following = following
        _around(module, "forward", self)

    def before_forward(self) -> None:
        pass

    def after_forward(self, result):
        self.kept_gather = None
        return result

    def gather_all(self) -> None:
        """As distributed.fsdp.gather_frozen."""
        self.is_whole = True
        for unit in self.units:
            unit.gather()
            unit.copy_out()

    def free_all(self) -> None:
        self.is_whole = False
        for unit in self.units:
            unit.whole = None

    def forget_gradients(self) -> None:
        for unit in self.units:
            unit.gradients.clear()

    def end_backward(self) -> None:
        for unit in self.units:
            unit.end_backward()
        self.order.clear()
        self.kept_reduction = None


class Unit:
    """Parameters that are gathered together.

    Args:
        root: whose they are.
        parameters: of the unit alone.
        reshard: free them after the forward.
        together: their gradients are reduced in one; else each as it comes, because the unit is used several times.
    """

    def __init__(self, root: ShardedRoot, parameters: list[nn.Parameter], reshard: bool, together: bool):
        self.root, self.reshard, self.together = root, reshard, together
        self.elements = {parameter: math.prod(share(parameter, root.layout.shards)) * root.layout.shards for parameter in parameters}
        self.following: Unit | None = None
        self.gathering = self.whole = None
        self.uses: list[int] = []  # places in root.order
        self.in_backward = False
        self.waiting: list[nn.Parameter] = []  # for their gradients to be reduced
        self.accumulated: dict[nn.Parameter, Tensor] = {}  # whole gradients of micro-batches that did not reduce
        self.gradients: dict[nn.Parameter, Tensor] = {}  # shards
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._received)

    def _hold(self, elements: int, dtype: torch.dtype | None = None, kind: str = "gathered") -> Tensor:
        return self.root.ledger.hold(elements, dtype or self.root.layout.dtype, kind)

    # ---- parameters ----

    def gather(self) -> None:
        """Begins to."""
        if self.gathering is not None or self.whole is not None:
            return
        layout, elements = self.root.layout, sum(self.elements.values())
        self.gathering = self._hold(elements if layout.shards > 1 else 0)
        self._hold(elements // layout.shards)  # the shard in that dtype, which goes into the buffer
        self._count("shard", elements * layout.dtype.itemsize, layout.shards)

    def copy_out(self, keep: bool = False) -> None:
        if self.gathering is None:
            return
        if keep:
            self.root.kept_gather = None
        self.whole = self._hold(sum(self.elements.values()))
        if keep:
            self.root.kept_gather = self.gathering
        self.gathering = None

    def before_forward(self) -> None:
        self.gather()
        self.copy_out(keep=True)
        if self.following is not None:
            self.following.gather()

    def after_forward(self, result):
        if self.reshard and not self.root.is_whole:
            self.whole = None
        if torch.is_grad_enabled():
            self.uses.append(len(self.root.order))
            self.root.order.append(self)
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self._before_backward)
        return result

    def _before_backward(self, gradient: Tensor) -> None:
        if self.in_backward:
            return
        self.in_backward = True
        self.gather()
        self.copy_out()
        if self.uses and (place := self.uses.pop()):
            self.root.order[place - 1].gather()

    # ---- gradients ----

    def _received(self, parameter: nn.Parameter) -> None:
        self.root.ledger.rename(parameter.grad, "gathered")
        self.waiting.append(parameter)
        if not self.together or len(self.waiting) == len(self.elements):
            self._reduce()

    def end_backward(self) -> None:
        """The gradients of what is used twice come last, and some never do."""
        self._reduce()
        self.gathering = self.whole = None
        self.uses.clear()
        self.in_backward = False

    def _reduce(self) -> None:
        if not self.waiting:
            return
        layout = self.root.layout
        self.whole, self.in_backward = None, False
        parameters, self.waiting = self.waiting, []
        if not self.root.syncs:
            for parameter in parameters:
                if parameter not in self.accumulated:
                    self.accumulated[parameter] = self._hold(self.elements[parameter], layout.master_dtype)
                parameter.grad = None
            return
        elements = sum(self.elements[parameter] for parameter in parameters)
        for parameter in parameters:
            if parameter in self.accumulated:
                parameter.grad = None
        self.root.kept_reduction = None
        buffer = self._hold(elements if layout.shards * layout.copies > 1 else 0, layout.master_dtype)
        for parameter in parameters:
            parameter.grad = None
            self.accumulated.pop(parameter, None)
        reduced = self._hold(elements // layout.shards, layout.master_dtype)
        for parameter in parameters:
            if parameter not in self.gradients:
                self.gradients[parameter] = self._hold(self.elements[parameter] // layout.shards, layout.master_dtype, "gradients")
        size = elements * layout.master_dtype.itemsize
        self._count("shard", size, layout.shards)
        if self.root.all_reduces or not self.together:
            self._count("replicate", 2 * size // layout.shards, layout.copies)
        self.root.kept_reduction = buffer
        del reduced

    def _count(self, dimension: str, whole: int, ranks: int) -> None:
        """Bytes that each rank sends, in a ring, to gather or to reduce and scatter `whole` bytes."""
        self.root.ledger.sent[f"{self.root.layout.name} {dimension}"] += whole * (ranks - 1) // ranks


def _around(owner: nn.Module, method: str, unit) -> None:
    inner: Callable = getattr(owner, method)

    def gathered(*args, **kwargs):
        unit.before_forward()
        return unit.after_forward(inner(*args, **kwargs))

    setattr(owner, method, gathered)
